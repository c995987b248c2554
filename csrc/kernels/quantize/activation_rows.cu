// Activation, rows only: x (M, A, F) to y (M, F) in FP8 and one float32 scale for every 1x128 block
// along F, stored M-major: scale[fb * M + m]. For forward passes without a gradient.
//
// A warp takes 8 rows of 256 columns of F (128 for float32) and shares nothing, as in
// quantize_rows.cu.
#include "activation.cuh"

#define JAXFP8_ACTIVATION_ROWS(in, In, out, Out)                                                   \
  extern "C" __global__ void __launch_bounds__(256)                                                \
      activation_rows_gated_##in##_##out(const uint8_t* x, uint8_t* data, float* scale, int64_t m, \
                                         int64_t f, int32_t activation, int32_t pow2) {            \
    using namespace jaxfp8::activation;                                                            \
    activation_rows<In, Out, true>(x, data, scale, m, f, Activation(activation), pow2 != 0);       \
  }                                                                                                \
  extern "C" __global__ void __launch_bounds__(256)                                                \
      activation_rows_##in##_##out(const uint8_t* x, uint8_t* data, float* scale, int64_t m,       \
                                   int64_t f, int32_t activation, int32_t pow2) {                  \
    using namespace jaxfp8::activation;                                                            \
    activation_rows<In, Out, false>(x, data, scale, m, f, Activation(activation), pow2 != 0);      \
  }

JAXFP8_QUANTIZER_FORMATS(JAXFP8_ACTIVATION_ROWS)
