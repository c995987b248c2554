// The 1d1d products with bfloat16 output: scales_1d1d.cuh, tiles.h.
#include "scales_1d1d.cuh"
#include "tiles.h"

using jaxfp8::BF16;
using jaxfp8::OuterScales;
using jaxfp8::ptx::E4M3;
using jaxfp8::ptx::E5M2;

#define KERNEL(tile, m, n, warpgroups_n, sets, lhs, Lhs, rhs, Rhs)                                 \
  JAXFP8_GEMM(gemm_1d1d_##tile##_##lhs##_##rhs##_bf16, m, n, warpgroups_n, sets, OuterScales, Lhs, \
              Rhs, BF16)
JAXFP8_OUTER_SCALE_TILES(KERNEL, e4m3, E4M3, e4m3, E4M3)
// Gradients in E5M2 as lhs or as rhs.
JAXFP8_OUTER_SCALE_TILES(KERNEL, e5m2, E5M2, e4m3, E4M3)
JAXFP8_OUTER_SCALE_TILES(KERNEL, e4m3, E4M3, e5m2, E5M2)
