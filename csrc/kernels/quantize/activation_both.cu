// Activation, rows and columns from one read: x (G, M, A, F) to
//   y (G, M, F) in 1x128 blocks along F,    scale[fb * G * M + g * M + m], and
//   y^T (G, F, M) in 1x128 blocks along M,  scale[mb * G * F + g * F + f].
// With group_sizes, x (M, A, F) and y^T (F, T) over the group-padded token axis of
// quantize_columns.cu; null without.
//
// A CTA takes one 128x128 tile of y, computed into registers (quantize_tile.cuh has the barriers).
// Two CTAs share a multiprocessor, so that one loads while the other computes.
#include "activation.cuh"

#define JAXFP8_ACTIVATION_BOTH_OF(name, kGated, In, Out)                                      \
  extern "C" __global__ void __launch_bounds__(256, 2)                                        \
      name(const uint8_t* x, const int32_t* group_sizes, uint8_t* row_data, float* row_scale, \
           uint8_t* column_data, float* column_scale, int64_t g, int64_t m, int64_t f,        \
           int32_t activation, int32_t pow2) {                                                \
    using namespace jaxfp8::activation;                                                       \
    quantize_activation<In, Out, kGated, false>(                                              \
        x, nullptr, group_sizes, {row_data, row_scale, column_data, column_scale}, g, m, f,   \
        Activation(activation), pow2 != 0, nullptr);                                          \
  }

#define JAXFP8_ACTIVATION_BOTH(in, In, out, Out)                          \
  JAXFP8_ACTIVATION_BOTH_OF(activation_both_##in##_##out, false, In, Out) \
  JAXFP8_ACTIVATION_BOTH_OF(activation_both_gated_##in##_##out, true, In, Out)

JAXFP8_QUANTIZER_FORMATS(JAXFP8_ACTIVATION_BOTH)
