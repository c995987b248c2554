// Gradient of an activation, rows and columns from one read: x (G, M, A, F) and the gradient dy
// (G, M, F) of the activation to the gradient of x,
//   (G, M, A, F) in 1x128 blocks along F,    scale[(a * FB + fb) * G * M + g * M + m], and
//   (G, A, F, M) in 1x128 blocks along M,    scale[mb * G * A * F + g * A * F + a * F + f].
// With group_sizes, x (M, A, F), dy (M, F) and columns (A, F, T) over the group-padded token axis
// of quantize_columns.cu; null without.
//
// A CTA takes one 128x128 tile of F and computes the gradients of gate and up together, since they
// share every input. The gate's stays in registers and is quantized first; up's waits in shared
// memory (64 KB), where the thread that computed it reads it back. So the kernel needs no more
// registers than one tile does, and two CTAs share a multiprocessor (but for float32 inputs with
// gates, whose 16 rows a thread do not fit into half of the registers).
#include "activation.cuh"

#define JAXFP8_ACTIVATION_GRAD_OF(name, kGated, In, Out)                                       \
  extern "C" __global__ void __launch_bounds__(                                                \
      256, (jaxfp8::activation::kGradientCtasPerSm<jaxfp8::quantize::In, kGated>))             \
      name(const uint8_t* x, const uint8_t* dy, const int32_t* group_sizes, uint8_t* row_data, \
           float* row_scale, uint8_t* column_data, float* column_scale, int64_t g, int64_t m,  \
           int64_t f, int32_t activation, int32_t pow2) {                                      \
    using namespace jaxfp8::activation;                                                        \
    extern __shared__ uint4 dynamic_shared[];                                                  \
    quantize_activation<In, Out, kGated, true>(                                                \
        x, dy, group_sizes, {row_data, row_scale, column_data, column_scale}, g, m, f,         \
        Activation(activation), pow2 != 0, dynamic_shared);                                    \
  }

#define JAXFP8_ACTIVATION_GRAD(in, In, out, Out)                          \
  JAXFP8_ACTIVATION_GRAD_OF(activation_grad_##in##_##out, false, In, Out) \
  JAXFP8_ACTIVATION_GRAD_OF(activation_grad_gated_##in##_##out, true, In, Out)

JAXFP8_QUANTIZER_FORMATS(JAXFP8_ACTIVATION_GRAD)
