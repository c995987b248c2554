// The 1d2d products with bfloat16 output: scales_1d2d.cuh.
#include "scales_1d2d.cuh"

using jaxfp8::BF16;
using jaxfp8::BlockScales;
using jaxfp8::ptx::E4M3;
using jaxfp8::ptx::E5M2;

// Rows, columns, warpgroups side by side, accumulator sets.
JAXFP8_GEMM(gemm_1d2d_m64n16_e4m3_e4m3_bf16, 64, 16, 1, 1, BlockScales, E4M3, E4M3, BF16)
JAXFP8_GEMM(gemm_1d2d_m64n32_e4m3_e4m3_bf16, 64, 32, 1, 1, BlockScales, E4M3, E4M3, BF16)
JAXFP8_GEMM(gemm_1d2d_m64n64_e4m3_e4m3_bf16, 64, 64, 1, 1, BlockScales, E4M3, E4M3, BF16)
JAXFP8_GEMM(gemm_1d2d_m64n128_e4m3_e4m3_bf16, 64, 128, 1, 1, BlockScales, E4M3, E4M3, BF16)
JAXFP8_GEMM(gemm_1d2d_m128n128_e4m3_e4m3_bf16, 128, 128, 1, 2, BlockScales, E4M3, E4M3, BF16)
JAXFP8_GEMM(gemm_1d2d_m128n192_e4m3_e4m3_bf16, 128, 192, 1, 1, BlockScales, E4M3, E4M3, BF16)
JAXFP8_GEMM(gemm_1d2d_m128n96x2_e4m3_e4m3_bf16, 128, 192, 2, 2, BlockScales, E4M3, E4M3, BF16)
JAXFP8_GEMM(gemm_1d2d_m256n128_e4m3_e4m3_bf16, 256, 128, 1, 1, BlockScales, E4M3, E4M3, BF16)

// Gradients in E5M2 as lhs: dgrad.
JAXFP8_GEMM(gemm_1d2d_m64n16_e5m2_e4m3_bf16, 64, 16, 1, 1, BlockScales, E5M2, E4M3, BF16)
JAXFP8_GEMM(gemm_1d2d_m64n32_e5m2_e4m3_bf16, 64, 32, 1, 1, BlockScales, E5M2, E4M3, BF16)
JAXFP8_GEMM(gemm_1d2d_m64n64_e5m2_e4m3_bf16, 64, 64, 1, 1, BlockScales, E5M2, E4M3, BF16)
JAXFP8_GEMM(gemm_1d2d_m64n128_e5m2_e4m3_bf16, 64, 128, 1, 1, BlockScales, E5M2, E4M3, BF16)
JAXFP8_GEMM(gemm_1d2d_m128n128_e5m2_e4m3_bf16, 128, 128, 1, 2, BlockScales, E5M2, E4M3, BF16)
JAXFP8_GEMM(gemm_1d2d_m128n192_e5m2_e4m3_bf16, 128, 192, 1, 1, BlockScales, E5M2, E4M3, BF16)
JAXFP8_GEMM(gemm_1d2d_m128n96x2_e5m2_e4m3_bf16, 128, 192, 2, 2, BlockScales, E5M2, E4M3, BF16)
JAXFP8_GEMM(gemm_1d2d_m256n128_e5m2_e4m3_bf16, 256, 128, 1, 1, BlockScales, E5M2, E4M3, BF16)
