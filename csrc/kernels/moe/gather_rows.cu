// FP8 rows by index: x (S, K) and its scales (S, KB) to data (M, K) and scale (M, KB), row m those
// of row source[m]; data 0 and scale 1 where that is not a row of x. Scales are stored M-major:
// x_scale[kb * S + s], scale[kb * M + m].
//
// A warp moves 512 bytes of each of 8 rows and their 4 x 8 scales, one a lane, and shares nothing.
// No byte is interpreted: one kernel serves both FP8 types.
#include "bytes.cuh"
#include "gather.cuh"

namespace jaxfp8::moe {

constexpr int kRows = 8;

template <int W>
__device__ void move_rows(const uint8_t* x, uint8_t* data, const SourceRows<kRows, 32>& source,
                          int64_t k, int rows, int columns, int alignment) {
  Bytes<16> v[kRows];
#pragma unroll
  for (int i = 0; i < kRows; ++i) {
    int32_t row = source[i];
    v[i] = load_bytes<16, W>(x + row * k, row < 0 ? 0 : columns);
  }
#pragma unroll
  for (int i = 0; i < kRows; ++i) {
    if (i < rows) store_bytes(data + i * k, v[i], columns, alignment);
  }
}

__device__ __forceinline__ void gather_rows(const uint8_t* x, const float* x_scale,
                                            const int32_t* source_rows, uint8_t* data, float* scale,
                                            int64_t s, int64_t m, int64_t k) {
  constexpr int kColumns = 32 * 16;
  int lane = threadIdx.x % 32;
  uint32_t tile = blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32;
  uint32_t tiles_per_row = static_cast<uint32_t>((k + kColumns - 1) / kColumns);
  int64_t row = static_cast<int64_t>(tile / tiles_per_row) * kRows;
  int64_t first = static_cast<int64_t>(tile % tiles_per_row) * kColumns;
  if (row >= m) return;  // the whole warp

  int rows = static_cast<int>(min(static_cast<int64_t>(kRows), m - row));
  SourceRows<kRows, 32> source(source_rows + row, rows, s);
  int64_t block = first / kBlock + lane / kRows;
  float row_scale = 1.0f;
  bool scaled = lane % kRows < rows && block * kBlock < k;
  if (scaled && source.own >= 0) row_scale = __ldg(x_scale + block * s + source.own);

  int64_t column = first + lane * 16;
  int columns = static_cast<int>(min(static_cast<int64_t>(16), k - column));
  int alignment = min(row_alignment(x, k), row_alignment(data, k));
  const uint8_t* from = x + column;
  uint8_t* to = data + row * k + column;
  if (alignment == 16) {
    move_rows<16>(from, to, source, k, rows, columns, alignment);
  } else if (alignment >= 4) {
    move_rows<4>(from, to, source, k, rows, columns, alignment);
  } else {
    move_rows<1>(from, to, source, k, rows, columns, alignment);
  }
  if (scaled) scale[block * m + row + lane % kRows] = row_scale;
}

}  // namespace jaxfp8::moe

extern "C" __global__ void __launch_bounds__(256)
    gather_rows(const uint8_t* x, const float* x_scale, const int32_t* source, uint8_t* data,
                float* scale, int64_t s, int64_t m, int64_t k) {
  jaxfp8::moe::gather_rows(x, x_scale, source, data, scale, s, m, k);
}
