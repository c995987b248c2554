// What the quantizer kernels share: the scale of a block, the conversion to FP8, loads and stores
// of any alignment, and the transposition of a 128x128 tile through shared memory. Formats are in
// formats.cuh; the arithmetic is that of docs/architecture.md ("Quantization, exactly").
//
// Everywhere, a thread holds vectors: `Vector<In>::kSize` neighbouring elements of one row, so that
// `Vector<In>::kLanes` lanes cover the 128 elements of a block.
#pragma once
#include <cstdint>

#include "formats.cuh"

namespace jaxfp8::quantize {

constexpr int kBlock = 128;
constexpr uint32_t kFullWarp = 0xffffffffu;

// The scale of a block from the float32 bits of its largest magnitude.
template <class Out>
__device__ float scale_of(uint32_t amax_bits, bool pow2) {
  constexpr uint32_t kSmallestNormal = 0x00800000u, kInfinity = 0x7f800000u, kNan = 0x7fc00000u;
  // Positive floats order like their bits.
  uint32_t scale =
      max(__float_as_uint(ptx::mul_rn_f32(__uint_as_float(amax_bits), Out::kReciprocalOfLargest)),
          kSmallestNormal);
  if (pow2) scale = (scale + 0x007fffffu) & 0x7f800000u;
  if (amax_bits < kSmallestNormal) scale = __float_as_uint(1.0f);  // only zeros and subnormals
  if (amax_bits >= kInfinity) scale = kNan;
  return __uint_as_float(scale);
}

// x / scale, rounded twice as documented. Adding +0 in the same instruction turns a subnormal or
// negative zero x into +0 and changes no other product; a NaN inverse makes the data NaN.
__device__ __forceinline__ float scaled(float x, float inverse) {
  return ptx::fma_rn_ftz_f32(x, inverse, 0.0f);
}

// Four elements to four bytes, the first one lowest.
template <class Out>
__device__ uint32_t convert4(float x0, float x1, float x2, float x3) {
  return Out::convert(x1, x0) | Out::convert(x3, x2) << 16;
}

template <class In>
struct alignas(16) Vector {
  static constexpr int kSize = In::kVectorSize;
  static constexpr int kLanes = kBlock / kSize;
  static constexpr int kWords = kSize * sizeof(typename In::Bits) / 4;
  uint32_t words[kWords];

  __device__ float element(int i) const { return In::element(words, i); }
  __device__ uint32_t amax() const {
    uint32_t m = 0;
#pragma unroll
    for (int i = 0; i < kWords; ++i) m = In::max_magnitude(m, words[i]);
    return In::within_word(m);
  }
};

// Alignment in bytes, at most 16, of every row of an array.
__device__ __forceinline__ int row_alignment(const void* base, int64_t pitch_bytes) {
  uint32_t bits = static_cast<uint32_t>(reinterpret_cast<uintptr_t>(base)) |
                  static_cast<uint32_t>(pitch_bytes) | 16u;
  return static_cast<int>(bits & -bits);
}

// Loads 16 bytes in pieces of W; pieces from `valid` bytes on are zeros and not read.
template <class In, int W>
__device__ Vector<In> load(const uint8_t* source, int valid) {
  Vector<In> v{};
  if constexpr (W == 16) {
    if (valid > 0) {
      uint4 u = __ldg(reinterpret_cast<const uint4*>(source));
      v = {u.x, u.y, u.z, u.w};
    }
  } else if constexpr (W == 4) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (i * 4 < valid) v.words[i] = __ldg(reinterpret_cast<const uint32_t*>(source) + i);
    }
  } else {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      if (i * 2 < valid) {
        uint32_t half = __ldg(reinterpret_cast<const uint16_t*>(source) + i);
        v.words[i / 2] |= half << (i % 2 * 16);
      }
    }
  }
  return v;
}

// Loads one vector from each of R rows, `rows` and `columns` of which exist from `source` on. All
// loads are issued before the first use.
template <class In, int R>
__device__ void load_rows(Vector<In> (&v)[R], const uint8_t* source, int64_t pitch_bytes, int rows,
                          int columns, int alignment) {
  int valid = columns * static_cast<int>(sizeof(typename In::Bits));
  if (alignment == 16) {
#pragma unroll
    for (int i = 0; i < R; ++i) {
      v[i] = load<In, 16>(source + i * pitch_bytes, i < rows ? valid : 0);
    }
  } else if (alignment >= 4) {
#pragma unroll
    for (int i = 0; i < R; ++i) {
      v[i] = load<In, 4>(source + i * pitch_bytes, i < rows ? valid : 0);
    }
  } else if constexpr (sizeof(typename In::Bits) == 2) {
#pragma unroll
    for (int i = 0; i < R; ++i) {
      v[i] = load<In, 2>(source + i * pitch_bytes, i < rows ? valid : 0);
    }
  }
}

// Quantizes a vector and stores the bytes before `valid`.
template <class Out, class In>
__device__ void store_row(uint8_t* target, const Vector<In>& v, float inverse, int valid,
                          int alignment) {
  constexpr int kSize = Vector<In>::kSize;
  uint32_t bytes[kSize / 4];
#pragma unroll
  for (int i = 0; i < kSize / 4; ++i) {
    bytes[i] =
        convert4<Out>(scaled(v.element(4 * i), inverse), scaled(v.element(4 * i + 1), inverse),
                      scaled(v.element(4 * i + 2), inverse), scaled(v.element(4 * i + 3), inverse));
  }
  if (alignment >= kSize) {
    if (valid <= 0) return;
    if constexpr (kSize == 8) {
      *reinterpret_cast<uint2*>(target) = make_uint2(bytes[0], bytes[1]);
    } else {
      *reinterpret_cast<uint32_t*>(target) = bytes[0];
    }
  } else {
    // Not unrolled: the addresses of all bytes at once would not fit into the registers.
    uint64_t rest = bytes[0];
    if constexpr (kSize == 8) rest |= static_cast<uint64_t>(bytes[1]) << 32;
#pragma unroll 1
    for (int i = 0; i < min(valid, kSize); ++i, rest >>= 8) {
      target[i] = static_cast<uint8_t>(rest);
    }
  }
}

// Largest of R values, each across L neighbouring lanes, in L / R + R - 1 + ... shuffles: every
// exchange halves the values that a lane still carries. Lane l returns the maximum of value
// l % L / (L / R).
template <int R, int L>
__device__ uint32_t reduce_lanes(const uint32_t (&value)[R]) {
  static_assert(R <= L && L <= 32);
  if constexpr (L == 1) {
    return value[0];
  } else {
    constexpr int kKept = R > 1 ? R / 2 : 1;
    bool upper = threadIdx.x & (L / 2);
    uint32_t largest[kKept];
#pragma unroll
    for (int i = 0; i < kKept; ++i) {
      uint32_t low = value[i], high = value[R - kKept + i];
      uint32_t kept = upper ? high : low, sent = upper ? low : high;
      largest[i] = max(kept, __shfl_xor_sync(kFullWarp, sent, L / 2));
    }
    return reduce_lanes<kKept, L / 2>(largest);
  }
}

// Row blocks of a warp's vectors: v[i] belongs to row i of the lane's group of kLanes lanes.
template <class In, class Out, int R>
struct RowBlocks {
  static constexpr int kLanes = Vector<In>::kLanes;
  static constexpr int kLanesPerRow = kLanes / R;  // after the reduction
  float scale, inverse;                            // of row `row()`

  // amax[i]: largest magnitude of the lane's vector of row i.
  __device__ RowBlocks(const uint32_t (&amax)[R], bool pow2) {
    scale = scale_of<Out>(In::f32_bits(reduce_lanes<R, kLanes>(amax)), pow2);
    inverse = ptx::rcp_rn_f32(scale);
  }
  static __device__ int row() { return threadIdx.x % kLanes / kLanesPerRow; }
  static __device__ bool stores_scale() { return threadIdx.x % kLanesPerRow == 0; }
  __device__ float inverse_of(int i) const {
    return __shfl_sync(kFullWarp, inverse, i * kLanesPerRow, kLanes);
  }
};

// Quantizes one vector a lane of each of R rows from `row` on, in 1x128 blocks of an array (M, K).
template <class In, class Out, int R>
__device__ void store_row_blocks(const Vector<In> (&v)[R], uint8_t* data, float* scale, int64_t row,
                                 int64_t column, int64_t m, int64_t k, bool pow2) {
  int rows = static_cast<int>(min(static_cast<int64_t>(R), m - row));
  int columns = static_cast<int>(min(static_cast<int64_t>(Vector<In>::kSize), k - column));
  uint32_t amax[R];
#pragma unroll
  for (int i = 0; i < R; ++i) amax[i] = v[i].amax();
  RowBlocks<In, Out, R> blocks(amax, pow2);
  int alignment = row_alignment(data, k);
#pragma unroll
  for (int i = 0; i < R; ++i) {
    float inverse = blocks.inverse_of(i);
    if (i < rows) {
      store_row<Out>(data + (row + i) * k + column, v[i], inverse, columns, alignment);
    }
  }
  // A block exists if its first column does.
  int64_t block = column / kBlock;
  if (blocks.stores_scale() && blocks.row() < rows && block * kBlock < k) {
    scale[block * m + row + blocks.row()] = blocks.scale;
  }
}

// A 128x128 tile of elements in the registers of 256 threads: a thread holds a vector from each of
// kRows neighbouring rows, a warp 16 whole rows.
template <class In>
struct Tile {
  static constexpr int kThreads = 256;
  static constexpr int kWarps = kThreads / 32;
  static constexpr int kSize = Vector<In>::kSize;
  static constexpr int kRows = kBlock * kBlock / kThreads / kSize;
  static_assert(kWarps * 16 == kBlock && 32 / Vector<In>::kLanes * kRows == 16);

  static __device__ int row() {
    return threadIdx.x / 32 * 16 + threadIdx.x % 32 / Vector<In>::kLanes * kRows;
  }
  static __device__ int column() { return threadIdx.x % Vector<In>::kLanes * kSize; }
};

// The tile's bytes, transposed: 128 bytes, the tokens, for each of 128 columns. Chunks of 16 bytes
// are swizzled by the column's vector, so that a warp writing one chunk of many columns, and a
// warp reading all chunks of four, touch every bank. The caller separates put and store by a
// barrier.
template <class In>
struct TransposedTile {
  alignas(16) uint8_t bytes[kBlock * kBlock];

  __device__ uint8_t* at(int column, int row) {
    int chunk = row / 16 ^ column / Vector<In>::kSize % 8;
    return bytes + column * kBlock + chunk * 16 + row % 16;
  }

  // Quantizes the thread's part of its j-th column. Bytes whose bit in `kept` is zero become zero.
  template <class Out>
  __device__ void put(const Vector<In> (&v)[Tile<In>::kRows], int j, float inverse,
                      const uint32_t (&kept)[Tile<In>::kRows / 4]) {
    uint32_t words[Tile<In>::kRows / 4];
#pragma unroll
    for (int i = 0; i < Tile<In>::kRows / 4; ++i) {
      words[i] = kept[i] & convert4<Out>(scaled(v[4 * i].element(j), inverse),
                                         scaled(v[4 * i + 1].element(j), inverse),
                                         scaled(v[4 * i + 2].element(j), inverse),
                                         scaled(v[4 * i + 3].element(j), inverse));
    }
    uint8_t* target = at(Tile<In>::column() + j, Tile<In>::row());
    if constexpr (Tile<In>::kRows == 8) {
      *reinterpret_cast<uint2*>(target) = make_uint2(words[0], words[1]);
    } else {
      *reinterpret_cast<uint4*>(target) = make_uint4(words[0], words[1], words[2], words[3]);
    }
  }

  // Stores `rows` bytes of each of `columns` columns; whole 16-byte chunks where every row of the
  // target is aligned so.
  __device__ void store(uint8_t* target, int64_t pitch, int columns, int rows, int alignment) {
    if (alignment == 16) {
      store_pieces<uint4>(target, pitch, columns, rows);
    } else if (alignment >= 4) {
      store_pieces<uint32_t>(target, pitch, columns, rows);
    } else {
      store_pieces<uint8_t>(target, pitch, columns, rows);
    }
  }

 private:
  template <class Piece>
  __device__ void store_pieces(uint8_t* target, int64_t pitch, int columns, int rows) {
    constexpr int kPieces = kBlock / sizeof(Piece);
    constexpr int kColumnsAtOnce = Tile<In>::kThreads / kPieces;
    int row = threadIdx.x % kPieces * sizeof(Piece);
    if (row >= rows) return;
#pragma unroll 4
    for (int c = threadIdx.x / kPieces; c < kBlock; c += kColumnsAtOnce) {
      if (c < columns) {
        *reinterpret_cast<Piece*>(target + c * pitch + row) =
            *reinterpret_cast<const Piece*>(at(c, row));
      }
    }
  }
};

// Block (row, column) of matrix `group`: columns fastest over the grid.
struct TileIndex {
  int64_t group, row, column;

  __device__ TileIndex(int64_t rows, int64_t columns) {
    uint32_t row_blocks = static_cast<uint32_t>((rows + kBlock - 1) / kBlock);
    uint32_t column_blocks = static_cast<uint32_t>((columns + kBlock - 1) / kBlock);
    uint32_t r = blockIdx.x / column_blocks;
    column = blockIdx.x % column_blocks;
    row = r % row_blocks;
    group = r / row_blocks;
  }
};

__device__ __forceinline__ int at_most_block(int64_t n) {
  return static_cast<int>(n < kBlock ? n : kBlock);
}

}  // namespace jaxfp8::quantize
