// Columns: x (G, M, K) to x^T (G, K, M) in FP8 with one float32 scale for every 128x1 block of x
// along M; with rows, the 1x128 blocks along K of the same read. Scales are stored M-major, the
// batch folded into the rows: column scale[mb * G * K + g * K + k], row scale[kb * G * M + g * M +
// m].
//
// Ragged: x (M, K) and group_sizes (G) to (K, T), T = ceil(M / 128) * 128 + 128 * G. Each group
// starts at a multiple of 128 of the token axis T; what no group covers holds data 0 and scale 1.
//
// A CTA takes one 128x128 tile, which stays in registers: rows are quantized from there, columns
// through a transposition in shared memory. Three barriers:
//   1. each warp's column maxima are written  -> 128 threads reduce them to scales and inverses
//   2. inverses are written                   -> all quantize columns into the transposed tile
//   3. the transposed tile is written         -> all store it
#include "quantize.cuh"

namespace jaxfp8::quantize {

struct Outputs {
  uint8_t* row_data;  // null without rows
  float* row_scale;
  uint8_t* column_data;
  float* column_scale;
};

// The part of x that a tile covers, and where its results start.
struct Region {
  const uint8_t* x;
  int64_t pitch;  // of x, in elements
  int rows, columns;
  int tokens;         // rows that belong to a column block; the others are quantized as rows only
  int stored_tokens;  // bytes to store in each row of column_data, zeros from `tokens` on
  int64_t column_pitch;
  Outputs out;
};

template <class In>
struct SharedTile {
  alignas(16) typename In::Bits column_amax[Tile<In>::kWarps][kBlock];
  alignas(16) float inverse[kBlock];
  TransposedTile<In> transposed;
};

// Writes the maxima of the warp's 16 rows for each column.
template <class In>
__device__ void reduce_columns(const Vector<In> (&v)[Tile<In>::kRows], SharedTile<In>& shared) {
  uint32_t amax[4] = {};
#pragma unroll
  for (int w = 0; w < 4; ++w) {
#pragma unroll
    for (int i = 0; i < Tile<In>::kRows; ++i) {
      amax[w] = In::max_magnitude(amax[w], v[i].words[w]);
    }
#pragma unroll
    for (int distance = Vector<In>::kLanes; distance < 32; distance *= 2) {
      amax[w] = In::max_magnitude(amax[w], __shfl_xor_sync(kFullWarp, amax[w], distance));
    }
  }
  if (threadIdx.x % 32 < Vector<In>::kLanes) {
    *reinterpret_cast<uint4*>(&shared.column_amax[threadIdx.x / 32][Tile<In>::column()]) =
        make_uint4(amax[0], amax[1], amax[2], amax[3]);
  }
}

template <class In, class Out, bool kWithRows>
__device__ void quantize_region(const Region& region, const Outputs& arrays, const uint8_t* x,
                                bool pow2, SharedTile<In>& shared) {
  constexpr int kRows = Tile<In>::kRows;
  constexpr int kElementBytes = sizeof(typename In::Bits);
  int row = Tile<In>::row(), column = Tile<In>::column();

  Vector<In> v[kRows];
  load_rows(v, region.x + (row * region.pitch + column) * kElementBytes,
            region.pitch * kElementBytes, region.rows - row, region.columns - column,
            row_alignment(x, region.pitch * kElementBytes));
  reduce_columns<In>(v, shared);
  __syncthreads();  // 1

  if (threadIdx.x < kBlock) {
    uint32_t amax = 0;
#pragma unroll
    for (int w = 0; w < Tile<In>::kWarps; ++w) {
      amax = max(amax, static_cast<uint32_t>(shared.column_amax[w][threadIdx.x]));
    }
    if (region.tokens == 0) amax = 0;
    float scale = scale_of<Out>(In::f32_bits(amax), pow2);
    shared.inverse[threadIdx.x] = ptx::rcp_rn_f32(scale);
    if (threadIdx.x < region.columns) region.out.column_scale[threadIdx.x] = scale;
  }
  if constexpr (kWithRows) {
    RowBlocks<In, Out, kRows> blocks(v, pow2);
    int alignment = row_alignment(arrays.row_data, region.pitch);
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      float inverse = blocks.inverse_of(i);
      if (row + i < region.rows) {
        store_row<Out>(region.out.row_data + (row + i) * region.pitch + column, v[i], inverse,
                       region.columns - column, alignment);
      }
    }
    if (blocks.stores_scale() && row + blocks.row() < region.rows) {
      region.out.row_scale[row + blocks.row()] = blocks.scale;
    }
  }
  __syncthreads();  // 2

  uint32_t kept[kRows / 4];  // a gap stays zero next to a NaN
#pragma unroll
  for (int i = 0; i < kRows / 4; ++i) {
    int n = min(max(region.tokens - row - 4 * i, 0), 4);
    kept[i] = n == 4 ? 0xffffffffu : (1u << (8 * n)) - 1;
  }
#pragma unroll
  for (int j = 0; j < Tile<In>::kSize; ++j) {
    shared.transposed.template put<Out>(v, j, shared.inverse[column + j], kept);
  }
  __syncthreads();  // 3
  shared.transposed.store(region.out.column_data, region.column_pitch, region.columns,
                          region.stored_tokens,
                          row_alignment(arrays.column_data, region.column_pitch));
}

template <class In, class Out, bool kWithRows>
__device__ void quantize_columns(const uint8_t* x, const Outputs& out, int64_t g, int64_t m,
                                 int64_t k, bool pow2) {
  __shared__ SharedTile<In> shared;
  TileIndex tile(m, k);
  int64_t row = tile.row * kBlock, column = tile.column * kBlock;
  Region region;
  region.x = x + ((tile.group * m + row) * k + column) * sizeof(typename In::Bits);
  region.pitch = k;
  region.rows = region.tokens = region.stored_tokens = at_most_block(m - row);
  region.columns = at_most_block(k - column);
  region.column_pitch = m;
  region.out.column_data = out.column_data + (tile.group * k + column) * m + row;
  region.out.column_scale = out.column_scale + (tile.row * g + tile.group) * k + column;
  if constexpr (kWithRows) {
    region.out.row_data = out.row_data + (tile.group * m + row) * k + column;
    region.out.row_scale = out.row_scale + (tile.column * g + tile.group) * m + row;
  }
  quantize_region<In, Out, kWithRows>(region, out, x, pow2, shared);
}

// Rows of x behind one block of the group-padded token axis.
struct TokenBlock {
  int64_t row;
  int rows;    // from `row` on
  int tokens;  // of them in a group: all or none
};

// Finds a block of the token axis, by one warp. Sizes are not trusted: negative ones count as zero,
// and groups end with x. Up to the group in which x ends no clipping is needed, so one scan serves,
// and the groups after it have blocks without rows. The rows after the last group follow as blocks
// without tokens; with every segment rounded up to 128 all fit in T.
__device__ void find_token_block(const int32_t* group_sizes, int64_t g, int64_t m, int64_t block,
                                 TokenBlock& found) {
  auto size_of = [&](int64_t i) { return static_cast<int64_t>(max(group_sizes[i], 0)); };
  auto blocks_of = [](int64_t size) { return (size + kBlock - 1) / kBlock; };
  auto rows_before = [](int64_t limit, int64_t row) {
    return at_most_block(max(limit - row, static_cast<int64_t>(0)));
  };
  int lane = threadIdx.x % 32;
  int64_t share = (g + 31) / 32;  // a lane's groups are neighbours
  int64_t first = min(lane * share, g), last = min(first + share, g);

  int64_t rows = 0, blocks = 0;
#pragma unroll 8
  for (int64_t i = first; i < last; ++i) {
    rows += size_of(i);
    blocks += blocks_of(size_of(i));
  }
  int64_t row_end = rows, block_end = blocks;
#pragma unroll
  for (int distance = 1; distance < 32; distance *= 2) {
    int64_t rows_below = __shfl_up_sync(kFullWarp, row_end, distance);
    int64_t blocks_below = __shfl_up_sync(kFullWarp, block_end, distance);
    if (lane >= distance) {
      row_end += rows_below;
      block_end += blocks_below;
    }
  }

  int64_t row = row_end - rows, at = block_end - blocks;
  if (block >= at && block < block_end) {
    int64_t i = first;
    while (block >= at + blocks_of(size_of(i))) {
      row += size_of(i);
      at += blocks_of(size_of(i));
      ++i;
    }
    int64_t start = row + (block - at) * kBlock;
    int tokens = rows_before(min(row + size_of(i), m), start);
    found = {start, tokens, tokens};
  } else if (lane == 31 && block >= block_end) {
    int64_t start = row_end + (block - block_end) * kBlock;
    found = {start, rows_before(m, start), 0};
  }
}

// Writes a tile of the token axis that no row of x belongs to.
__device__ void store_empty(const Region& region, int alignment) {
  if (threadIdx.x < region.columns) region.out.column_scale[threadIdx.x] = 1.0f;
  if (alignment == 16) {
    for (int i = threadIdx.x; i < region.columns * kBlock / 16; i += blockDim.x) {
      int column = i / (kBlock / 16), token = i % (kBlock / 16) * 16;
      *reinterpret_cast<uint4*>(region.out.column_data + column * region.column_pitch + token) = {};
    }
  } else {
    for (int i = threadIdx.x; i < region.columns * kBlock; i += blockDim.x) {
      region.out.column_data[i / kBlock * region.column_pitch + i % kBlock] = 0;
    }
  }
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
  region.x = x + (source.row * k + column) * sizeof(typename In::Bits);
  region.pitch = k;
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
    quantize_region<In, Out, kWithRows>(region, out, x, pow2, shared);
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

JAXFP8_QUANTIZE_COLUMNS(bf16, Bf16, e4m3, E4m3)
JAXFP8_QUANTIZE_COLUMNS(bf16, Bf16, e5m2, E5m2)
JAXFP8_QUANTIZE_COLUMNS(f16, F16, e4m3, E4m3)
JAXFP8_QUANTIZE_COLUMNS(f16, F16, e5m2, E5m2)
JAXFP8_QUANTIZE_COLUMNS(f32, F32, e4m3, E4m3)
JAXFP8_QUANTIZE_COLUMNS(f32, F32, e5m2, E5m2)
