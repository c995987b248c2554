// As activation_rows.cu, each row of the activation times its weight (M) before it is quantized.
#include "activation.cuh"

#define JAXFP8_ACTIVATION_WEIGHTED_ROWS_OF(name, kGated, In, Out)                         \
  extern "C" __global__ void __launch_bounds__(256)                                       \
      name(const uint8_t* x, const float* weight, uint8_t* data, float* scale, int64_t m, \
           int64_t f, int32_t activation, int32_t pow2) {                                 \
    using namespace jaxfp8::activation;                                                   \
    activation_rows<In, Out, kGated, true>(x, data, scale, m, f, Activation(activation),  \
                                           pow2 != 0, weight);                            \
  }

#define JAXFP8_ACTIVATION_WEIGHTED_ROWS(in, In, out, Out)                                   \
  JAXFP8_ACTIVATION_WEIGHTED_ROWS_OF(activation_weighted_rows_##in##_##out, false, In, Out) \
  JAXFP8_ACTIVATION_WEIGHTED_ROWS_OF(activation_weighted_rows_gated_##in##_##out, true, In, Out)

JAXFP8_PRODUCT_FORMATS(JAXFP8_ACTIVATION_WEIGHTED_ROWS)
