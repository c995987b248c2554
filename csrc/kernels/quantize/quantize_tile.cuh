// A 128x128 tile in the registers of a CTA, quantized in rows and in columns, and the group-padded
// token axis. `Outputs` are the results' arrays; scales are stored M-major, the batch folded into
// the rows.
#pragma once
#include "quantize.cuh"

namespace jaxfp8::quantize {

struct Outputs {
  uint8_t* row_data;  // null without rows
  float* row_scale;
  uint8_t* column_data;
  float* column_scale;
};

// What of a tile exists, and where its results start.
struct Region {
  int rows, columns;
  int64_t row_pitch;  // of row_data
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

// Writes the maxima of the warp's 16 rows for each column, and finds those of the thread's part of
// each row. Together: magnitudes that waited for a barrier would take as many registers as v.
template <class In, bool kWithRows>
__device__ void find_maxima(const Vector<In> (&v)[Tile<In>::kRows],
                            uint32_t (&row_amax)[Tile<In>::kRows], SharedTile<In>& shared) {
  constexpr int kWords = Vector<In>::kWords;
  uint32_t amax[kWords] = {};
#pragma unroll
  for (int i = 0; i < Tile<In>::kRows; ++i) {
    uint32_t row = 0;
#pragma unroll
    for (int w = 0; w < kWords; ++w) {
      amax[w] = In::max_magnitude(amax[w], v[i].words[w]);
      if constexpr (kWithRows) row = In::max_magnitude(row, v[i].words[w]);
    }
    row_amax[i] = In::within_word(row);
  }
#pragma unroll
  for (int w = 0; w < kWords; ++w) {
#pragma unroll
    for (int distance = Vector<In>::kLanes; distance < 32; distance *= 2) {
      amax[w] = In::max_magnitude(amax[w], __shfl_xor_sync(kFullWarp, amax[w], distance));
    }
  }
  if (threadIdx.x % 32 < Vector<In>::kLanes) {
    auto* target =
        reinterpret_cast<uint4*>(&shared.column_amax[threadIdx.x / 32][Tile<In>::column()]);
#pragma unroll
    for (int w = 0; w < kWords; w += 4) {
      target[w / 4] = make_uint4(amax[w], amax[w + 1], amax[w + 2], amax[w + 3]);
    }
  }
}

// Quantizes a tile from registers: v[i] is the thread's part of row Tile<In>::row() + i, zeros
// outside of the region. Three barriers:
//   1. each warp's column maxima are written  -> 128 threads reduce them to scales and inverses
//   2. inverses are written                   -> all quantize columns into the transposed tile
//   3. the transposed tile is written         -> all store it
// May be called again at once: what a call still reads after barrier 3, the transposed tile, the
// next one writes after its barrier 2.
template <class In, class Out, bool kWithRows>
__device__ void quantize_tile(const Vector<In> (&v)[Tile<In>::kRows], const Region& region,
                              const Outputs& arrays, bool pow2, SharedTile<In>& shared) {
  constexpr int kRows = Tile<In>::kRows;
  int row = Tile<In>::row(), column = Tile<In>::column();

  uint32_t row_amax[kRows];
  find_maxima<In, kWithRows>(v, row_amax, shared);
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
    RowBlocks<In, Out, kRows> blocks(row_amax, pow2);
    // A half of a row may end inside a vector that its pitch, of two halves, has room for.
    int alignment = row_alignment(arrays.row_data, region.row_pitch | region.columns);
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      float inverse = blocks.inverse_of(i);
      if (row + i < region.rows) {
        store_row<Out>(region.out.row_data + (row + i) * region.row_pitch + column, v[i], inverse,
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

}  // namespace jaxfp8::quantize
