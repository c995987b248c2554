// Rows: x (M, K) to data (M, K) in FP8 and one float32 scale for every 1x128 block along K, stored
// M-major: scale[kb * M + m].
//
// A warp quantizes 8 rows of 256 columns (128 for float32) and shares nothing: it issues 8 loads of
// 16 bytes a lane, finds the 8 maxima with one transposing reduction, computes each scale and its
// inverse in one lane, and stores. Its 8 rows make a 32-byte run of scales in each block column.
#include "quantize.cuh"

namespace jaxfp8::quantize {

constexpr int kRows = 8;

template <class In, class Out>
__device__ void quantize_rows(const uint8_t* x, uint8_t* data, float* scale, int64_t m, int64_t k,
                              bool pow2) {
  using Lane = Vector<In>;
  constexpr int kColumns = 32 * Lane::kSize;
  constexpr int kElementBytes = sizeof(typename In::Bits);

  int lane = threadIdx.x % 32;
  uint32_t tile = blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32;
  uint32_t tiles_per_row = static_cast<uint32_t>((k + kColumns - 1) / kColumns);
  int64_t row = static_cast<int64_t>(tile / tiles_per_row) * kRows;
  int64_t column = static_cast<int64_t>(tile % tiles_per_row) * kColumns + lane * Lane::kSize;
  if (row >= m) return;  // the whole warp

  int rows = static_cast<int>(min(static_cast<int64_t>(kRows), m - row));
  int columns = static_cast<int>(min(static_cast<int64_t>(Lane::kSize), k - column));
  Lane v[kRows];
  load_rows(v, x + (row * k + column) * kElementBytes, k * kElementBytes, rows, columns,
            row_alignment(x, k * kElementBytes));

  store_row_blocks<In, Out>(v, data, scale, row, column, m, k, pow2);
}

}  // namespace jaxfp8::quantize

#define JAXFP8_QUANTIZE_ROWS(in, In, out, Out)                                             \
  extern "C" __global__ void __launch_bounds__(256) quantize_rows_##in##_##out(            \
      const uint8_t* x, uint8_t* data, float* scale, int64_t m, int64_t k, int32_t pow2) { \
    using namespace jaxfp8::quantize;                                                      \
    quantize_rows<In, Out>(x, data, scale, m, k, pow2 != 0);                               \
  }

JAXFP8_QUANTIZER_FORMATS(JAXFP8_QUANTIZE_ROWS)
