// As activation_both.cu with group_sizes, each row of the activation times its weight (M) before it
// is quantized.
#include "activation.cuh"

#define JAXFP8_ACTIVATION_WEIGHTED_BOTH_OF(name, kGated, In, Out)                                \
  extern "C" __global__ void __launch_bounds__(256, 2)                                           \
      name(const uint8_t* x, const float* weight, const int32_t* group_sizes, uint8_t* row_data, \
           float* row_scale, uint8_t* column_data, float* column_scale, int64_t g, int64_t m,    \
           int64_t f, int32_t activation, int32_t pow2) {                                        \
    using namespace jaxfp8::activation;                                                          \
    quantize_activation<In, Out, kGated, false, true>(                                           \
        x, nullptr, group_sizes, {row_data, row_scale, column_data, column_scale}, g, m, f,      \
        Activation(activation), pow2 != 0, nullptr, {weight, nullptr});                          \
  }

#define JAXFP8_ACTIVATION_WEIGHTED_BOTH(in, In, out, Out)                                   \
  JAXFP8_ACTIVATION_WEIGHTED_BOTH_OF(activation_weighted_both_##in##_##out, false, In, Out) \
  JAXFP8_ACTIVATION_WEIGHTED_BOTH_OF(activation_weighted_both_gated_##in##_##out, true, In, Out)

JAXFP8_PRODUCT_FORMATS(JAXFP8_ACTIVATION_WEIGHTED_BOTH)
