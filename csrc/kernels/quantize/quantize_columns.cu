// Columns: x (G, M, K) to x^T (G, K, M) in FP8 with one float32 scale for every 128x1 block of x
// along M; with rows, the 1x128 blocks along K of the same read. Scales are stored M-major, the
// batch folded into the rows: column scale[mb * G * K + g * K + k], row scale[kb * G * M + g * M +
// m].
//
// Ragged: x (M, K) and group_sizes (G) to (K, T), T = ceil(M / 128) * 128 + 128 * G. Each group
// starts at a multiple of 128 of the token axis T; what no group covers holds data 0 and scale 1.
//
// A CTA takes one 128x128 tile, which stays in registers: rows are quantized from there, columns
// through a transposition in shared memory (quantize_tile.cuh, where the barriers are).
#include "quantize_tile.cuh"

namespace jaxfp8::quantize {

template <class In, class Out, bool kWithRows>
__device__ void load_and_quantize(const uint8_t* x, const uint8_t* corner, const Region& region,
                                  const Outputs& arrays, bool pow2, SharedTile<In>& shared) {
  constexpr int kElementBytes = sizeof(typename In::Bits);
  int row = Tile<In>::row(), column = Tile<In>::column();
  int64_t pitch = region.row_pitch * kElementBytes;
  Vector<In> v[Tile<In>::kRows];
  load_rows(v, corner + row * pitch + column * kElementBytes, pitch, region.rows - row,
            region.columns - column, row_alignment(x, pitch));
  quantize_tile<In, Out, kWithRows>(v, region, arrays, pow2, shared);
}

template <class In, class Out, bool kWithRows>
__device__ void quantize_columns(const uint8_t* x, const Outputs& out, int64_t g, int64_t m,
                                 int64_t k, bool pow2) {
  __shared__ SharedTile<In> shared;
  TileIndex tile(m, k);
  int64_t row = tile.row * kBlock, column = tile.column * kBlock;
  Region region;
  const uint8_t* corner = x + ((tile.group * m + row) * k + column) * sizeof(typename In::Bits);
  region.row_pitch = k;
  region.rows = region.tokens = region.stored_tokens = at_most_block(m - row);
  region.columns = at_most_block(k - column);
  region.column_pitch = m;
  region.out.column_data = out.column_data + (tile.group * k + column) * m + row;
  region.out.column_scale = out.column_scale + (tile.row * g + tile.group) * k + column;
  if constexpr (kWithRows) {
    region.out.row_data = out.row_data + (tile.group * m + row) * k + column;
    region.out.row_scale = out.row_scale + (tile.column * g + tile.group) * m + row;
  }
  load_and_quantize<In, Out, kWithRows>(x, corner, region, out, pow2, shared);
}

template <class In, class Out, bool kWithRows>
__device__ void quantize_ragged(const uint8_t* x, const int32_t* group_sizes, const Outputs& out,
                                int64_t g, int64_t m, int64_t k, bool pow2) {
  __shared__ SharedTile<In> shared;
  __shared__ TokenBlock source;
  int64_t t = (m + kBlock - 1) / kBlock * kBlock + kBlock * g;
  TileIndex tile(t, k);
  if (threadIdx.x < 32) find_token_block(group_sizes, g, m, tile.row, source);
  __syncthreads();  // `source` is written

  int64_t column = tile.column * kBlock;
  Region region;
  const uint8_t* corner = x + (source.row * k + column) * sizeof(typename In::Bits);
  region.row_pitch = k;
  region.rows = kWithRows ? source.rows : source.tokens;
  region.columns = at_most_block(k - column);
  region.tokens = source.tokens;
  region.stored_tokens = kBlock;
  region.column_pitch = t;
  region.out.column_data = out.column_data + column * t + tile.row * kBlock;
  region.out.column_scale = out.column_scale + tile.row * k + column;
  if constexpr (kWithRows) {
    region.out.row_data = out.row_data + source.row * k + column;
    region.out.row_scale = out.row_scale + tile.column * m + source.row;
  }
  if (region.rows == 0) {  // many tiles, when groups are small
    store_empty(region, row_alignment(out.column_data, t));
  } else {
    load_and_quantize<In, Out, kWithRows>(x, corner, region, out, pow2, shared);
  }
}

}  // namespace jaxfp8::quantize

#define JAXFP8_QUANTIZE_COLUMNS(in, In, out, Out)                                                  \
  extern "C" __global__ void __launch_bounds__(256)                                                \
      quantize_columns_##in##_##out(const uint8_t* x, uint8_t* column_data, float* column_scale,   \
                                    int64_t g, int64_t m, int64_t k, int32_t pow2) {               \
    using namespace jaxfp8::quantize;                                                              \
    quantize_columns<In, Out, false>(x, {nullptr, nullptr, column_data, column_scale}, g, m, k,    \
                                     pow2 != 0);                                                   \
  }                                                                                                \
  extern "C" __global__ void __launch_bounds__(256) quantize_both_##in##_##out(                    \
      const uint8_t* x, uint8_t* row_data, float* row_scale, uint8_t* column_data,                 \
      float* column_scale, int64_t g, int64_t m, int64_t k, int32_t pow2) {                        \
    using namespace jaxfp8::quantize;                                                              \
    quantize_columns<In, Out, true>(x, {row_data, row_scale, column_data, column_scale}, g, m, k,  \
                                    pow2 != 0);                                                    \
  }                                                                                                \
  extern "C" __global__ void __launch_bounds__(256) quantize_ragged_columns_##in##_##out(          \
      const uint8_t* x, const int32_t* group_sizes, uint8_t* column_data, float* column_scale,     \
      int64_t g, int64_t m, int64_t k, int32_t pow2) {                                             \
    using namespace jaxfp8::quantize;                                                              \
    quantize_ragged<In, Out, false>(x, group_sizes, {nullptr, nullptr, column_data, column_scale}, \
                                    g, m, k, pow2 != 0);                                           \
  }                                                                                                \
  extern "C" __global__ void __launch_bounds__(256) quantize_ragged_both_##in##_##out(             \
      const uint8_t* x, const int32_t* group_sizes, uint8_t* row_data, float* row_scale,           \
      uint8_t* column_data, float* column_scale, int64_t g, int64_t m, int64_t k, int32_t pow2) {  \
    using namespace jaxfp8::quantize;                                                              \
    quantize_ragged<In, Out, true>(                                                                \
        x, group_sizes, {row_data, row_scale, column_data, column_scale}, g, m, k, pow2 != 0);     \
  }

JAXFP8_QUANTIZER_FORMATS(JAXFP8_QUANTIZE_COLUMNS)
