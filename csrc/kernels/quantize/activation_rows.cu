// Activation, rows only: x (M, A, F) to y (M, F) in FP8 and one float32 scale for every 1x128 block
// along F, stored M-major: scale[fb * M + m]. For forward passes without a gradient.
//
// A warp takes 8 rows of 256 columns of F (128 for float32) and shares nothing, as in
// quantize_rows.cu.
#include "activation.cuh"

namespace jaxfp8::activation {

constexpr int kRows = 8;

template <class In, class Out, bool kGated>
__device__ void activation_rows(const uint8_t* x, uint8_t* data, float* scale, int64_t m, int64_t f,
                                const Activation& activation, bool pow2) {
  constexpr int kColumns = 32 * Vector<In>::kSize;

  int lane = threadIdx.x % 32;
  uint32_t tile = blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32;
  uint32_t tiles_per_row = static_cast<uint32_t>((f + kColumns - 1) / kColumns);
  int64_t row = static_cast<int64_t>(tile / tiles_per_row) * kRows;
  int64_t column = static_cast<int64_t>(tile % tiles_per_row) * kColumns + lane * Vector<In>::kSize;
  if (row >= m) return;  // the whole warp

  int rows = static_cast<int>(min(static_cast<int64_t>(kRows), m - row));
  int columns = static_cast<int>(min(static_cast<int64_t>(Vector<In>::kSize), f - column));
  int64_t half = f * sizeof(typename In::Bits);
  Vector<Value<In>> v[kRows];
  load_activations<In, kGated>(
      v, x + row * (kGated ? 2 : 1) * half + column * sizeof(typename In::Bits), f, rows, columns,
      row_alignment(x, half), activation);
  store_row_blocks<Value<In>, Out>(v, data, scale, row, column, m, f, pow2);
}

}  // namespace jaxfp8::activation

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
