// Rows by index: row m of a result is a copy of row source[m] of x (S, K), or a row of zeros where
// source[m] is below 0 or not below S.
#pragma once
#include "../quantize/quantize_tile.cuh"

namespace jaxfp8::moe {

using namespace quantize;

// The rows of x behind R neighbouring rows of a result, which `kLanes` neighbouring lanes share:
// each lane loads one index, and lanes of the warp ask one another. -1 stands for a row of zeros.
template <int R, int kLanes>
struct SourceRows {
  static_assert(R <= kLanes);
  int32_t own;  // of row `lane()`
  bool past;    // that row's index is not below S

  // `rows` of them exist from `source` on.
  __device__ SourceRows(const int32_t* source, int rows, int64_t s) {
    own = lane() < rows ? __ldg(source + lane()) : -1;
    past = own >= s;
    if (own < 0 || past) own = -1;
  }
  static __device__ int lane() { return threadIdx.x % R; }
  __device__ int32_t operator[](int i) const { return __shfl_sync(kFullWarp, own, i, kLanes); }
};

// Loads a vector from each of R rows, in pieces of W bytes (quantize.cuh, load).
template <class In, int W, int R>
__device__ void load_pieces(Vector<In> (&v)[R], const uint8_t* x, int64_t pitch_bytes,
                            const SourceRows<R, Vector<In>::kLanes>& source, int valid) {
#pragma unroll
  for (int i = 0; i < R; ++i) {
    int32_t row = source[i];
    v[i] = load<In, W>(x + row * pitch_bytes, row < 0 ? 0 : valid);
  }
}

// Loads a vector from each of R rows, `columns` elements of which exist from `x`, a place in row 0,
// on. All loads are issued before the first use.
template <class In, int R>
__device__ void load_gathered(Vector<In> (&v)[R], const uint8_t* x, int64_t pitch_bytes,
                              const SourceRows<R, Vector<In>::kLanes>& source, int columns,
                              int alignment) {
  int valid = columns * static_cast<int>(sizeof(typename In::Bits));
  if (alignment == 16) {
    load_pieces<In, 16>(v, x, pitch_bytes, source, valid);
  } else if (alignment >= 4) {
    load_pieces<In, 4>(v, x, pitch_bytes, source, valid);
  } else if constexpr (sizeof(typename In::Bits) == 2) {
    load_pieces<In, 2>(v, x, pitch_bytes, source, valid);
  }
}

// Block (row, column) of the token axis T x K: the grid goes through bands of `band` blocks of
// columns, in each through the rows, columns fastest. A token's rows lie in several groups; where
// the planner lets L2 hold a band of x (host/gather.cc), it is read from memory once.
struct BandedTile {
  int64_t row, column;

  __device__ BandedTile(int64_t t, int64_t k, int32_t band) {
    uint32_t row_blocks = static_cast<uint32_t>(t / kBlock);
    uint32_t column_blocks = static_cast<uint32_t>((k + kBlock - 1) / kBlock);
    uint32_t tiles = row_blocks * static_cast<uint32_t>(band);  // of a band; the last has fewer
    uint32_t first = blockIdx.x / tiles * static_cast<uint32_t>(band), at = blockIdx.x % tiles;
    uint32_t width = min(static_cast<uint32_t>(band), column_blocks - first);
    row = at / width;
    column = first + at % width;
  }
};

// What of one tile of a group-padded token axis (quantize_columns.cu) exists, and where its results
// start: rows (M, K) and columns (K, T) of gathered rows.
__device__ __forceinline__ Region gathered_region(const BandedTile& tile, const TokenBlock& found,
                                                  const Outputs& out, int64_t m, int64_t k,
                                                  int64_t t) {
  int64_t column = tile.column * kBlock;
  Region region;
  region.rows = found.rows;
  region.columns = at_most_block(k - column);
  region.row_pitch = k;
  region.tokens = found.tokens;
  region.stored_tokens = kBlock;
  region.column_pitch = t;
  region.out.column_data = out.column_data + column * t + tile.row * kBlock;
  region.out.column_scale = out.column_scale + tile.row * k + column;
  region.out.row_data = out.row_data + found.row * k + column;
  region.out.row_scale = out.row_scale + tile.column * m + found.row;
  return region;
}

}  // namespace jaxfp8::moe
