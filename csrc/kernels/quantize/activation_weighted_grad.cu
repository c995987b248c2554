// As activation_grad.cu with group_sizes, of the activation times a weight (M) for each row: dy is
// the gradient of the product. The gradient of the weights is weight_grad (M, FB), of which block
// fb of F has its part, the sum of dy times the activation: weight_grad[fb * M + m].
#include "activation.cuh"

#define JAXFP8_ACTIVATION_WEIGHTED_GRAD_OF(name, kGated, In, Out)                                \
  extern "C" __global__ void __launch_bounds__(                                                  \
      256, (jaxfp8::activation::kGradientCtasPerSm<jaxfp8::quantize::In, kGated>))               \
      name(const uint8_t* x, const uint8_t* dy, const float* weight, const int32_t* group_sizes, \
           uint8_t* row_data, float* row_scale, uint8_t* column_data, float* column_scale,       \
           float* weight_grad, int64_t g, int64_t m, int64_t f, int32_t activation,              \
           int32_t pow2) {                                                                       \
    using namespace jaxfp8::activation;                                                          \
    extern __shared__ uint4 dynamic_shared[];                                                    \
    quantize_activation<In, Out, kGated, true, true>(                                            \
        x, dy, group_sizes, {row_data, row_scale, column_data, column_scale}, g, m, f,           \
        Activation(activation), pow2 != 0, dynamic_shared, {weight, weight_grad});               \
  }

#define JAXFP8_ACTIVATION_WEIGHTED_GRAD(in, In, out, Out)                                   \
  JAXFP8_ACTIVATION_WEIGHTED_GRAD_OF(activation_weighted_grad_##in##_##out, false, In, Out) \
  JAXFP8_ACTIVATION_WEIGHTED_GRAD_OF(activation_weighted_grad_gated_##in##_##out, true, In, Out)

JAXFP8_PRODUCT_FORMATS(JAXFP8_ACTIVATION_WEIGHTED_GRAD)
