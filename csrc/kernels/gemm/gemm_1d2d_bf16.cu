// The 1d2d products with bfloat16 output: scales_1d2d.cuh, tiles.h.
#include "scales_1d2d.cuh"
#include "tiles.h"

using jaxfp8::BF16;
using jaxfp8::BlockScales;
using jaxfp8::ptx::E4M3;
using jaxfp8::ptx::E5M2;

#define KERNEL(tile, m, n, warpgroups_n, sets, lhs, Lhs, rhs, Rhs)                                 \
  JAXFP8_GEMM(gemm_1d2d_##tile##_##lhs##_##rhs##_bf16, m, n, warpgroups_n, sets, BlockScales, Lhs, \
              Rhs, BF16)
JAXFP8_BLOCK_SCALE_TILES(KERNEL, e4m3, E4M3, e4m3, E4M3)
// Gradients in E5M2 as lhs: dgrad.
JAXFP8_BLOCK_SCALE_TILES(KERNEL, e5m2, E5M2, e4m3, E4M3)
