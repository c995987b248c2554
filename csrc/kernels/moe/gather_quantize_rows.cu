// Rows of x (S, K) gathered by source (M): data (M, K) in FP8 and one float32 scale for every 1x128
// block along K, stored M-major: scale[kb * M + m]. A row of zeros where source is not a row of x.
//
// A warp takes 8 rows of 256 columns (128 for float32) and shares nothing, as in quantize_rows.cu.
#include "gather.cuh"

namespace jaxfp8::moe {

constexpr int kRows = 8;

template <class In, class Out>
__device__ void gather_quantize_rows(const uint8_t* x, const int32_t* source, uint8_t* data,
                                     float* scale, int64_t s, int64_t m, int64_t k, bool pow2) {
  constexpr int kColumns = 32 * Vector<In>::kSize;
  constexpr int kElementBytes = sizeof(typename In::Bits);

  int lane = threadIdx.x % 32;
  uint32_t tile = blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32;
  uint32_t tiles_per_row = static_cast<uint32_t>((k + kColumns - 1) / kColumns);
  int64_t row = static_cast<int64_t>(tile / tiles_per_row) * kRows;
  int64_t column = static_cast<int64_t>(tile % tiles_per_row) * kColumns + lane * Vector<In>::kSize;
  if (row >= m) return;  // the whole warp

  int rows = static_cast<int>(min(static_cast<int64_t>(kRows), m - row));
  int columns = static_cast<int>(min(static_cast<int64_t>(Vector<In>::kSize), k - column));
  Vector<In> v[kRows];
  load_gathered(v, x + column * kElementBytes, k * kElementBytes, {source + row, rows, s}, columns,
                row_alignment(x, k * kElementBytes));
  store_row_blocks<In, Out>(v, data, scale, row, column, m, k, pow2);
}

}  // namespace jaxfp8::moe

#define JAXFP8_GATHER_QUANTIZE_ROWS(in, In, out, Out)                                             \
  extern "C" __global__ void __launch_bounds__(256) gather_quantize_rows_##in##_##out(            \
      const uint8_t* x, const int32_t* source, uint8_t* data, float* scale, int64_t s, int64_t m, \
      int64_t k, int32_t pow2) {                                                                  \
    using namespace jaxfp8::moe;                                                                  \
    gather_quantize_rows<In, Out>(x, source, data, scale, s, m, k, pow2 != 0);                    \
  }

JAXFP8_QUANTIZER_FORMATS(JAXFP8_GATHER_QUANTIZE_ROWS)
