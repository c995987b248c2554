// From a warp's accumulators to the output.
//
// A warp stores its own 16 rows of a 64-row wave and waits for no other. Where all 16 belong to the
// segment and the output has a tensor map, they go through the warp's staging strips and the copy
// engine, which clips columns and runs under the next tile's products. Otherwise (a segment's last
// rows, an output whose rows are no multiple of 16 bytes) they go straight from registers, clipped
// element by element.
//
// To accumulate: float32 is added in memory (each element once, so the result does not depend on
// the order); bfloat16 is read first, since the sum must be rounded once.
#pragma once
#include <cstdint>

#include "../ptx/convert.cuh"
#include "../ptx/copy.cuh"
#include "../ptx/global.cuh"
#include "../ptx/sync.cuh"
#include "gemm_args.cuh"
#include "schedule.cuh"

namespace jaxfp8 {

struct BF16 {
  static constexpr int kBytes = 2;
  static constexpr bool kAddByTensorMap = false;
  using Storage = uint16_t;
};

struct F32 {
  static constexpr int kBytes = 4;
  static constexpr bool kAddByTensorMap = true;
  using Storage = float;
};

// Where a warp's 16 rows go, clipped. Registers 8 g + 2 h + {0, 1} and 8 g + 4 + 2 h + {0, 1} of a
// lane hold row lane / 4 + 8 h, columns 16 g + 2 (lane % 4) + {0, 1} and those 8 further.
template <class Out>
struct Target {
  typename Out::Storage* out;  // of the first row and column
  int64_t stride;              // elements
  int rows, cols;              // that exist
  bool vector;                 // accesses of 8 bytes are aligned
  bool accumulate;
};

// Adds the old output to the accumulators.
template <int kCols>
__device__ __forceinline__ void add_old(const Target<BF16>& target, float (&sum)[kCols / 2],
                                        int lane) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = lane / 4 + 8 * half;
    const uint16_t* out = target.out + row * target.stride;
    if (row >= target.rows) continue;
#pragma unroll
    for (int i = 0; i < kCols / 8; ++i) {
      const int col = 8 * i + 2 * (lane % 4);
      float& x = sum[4 * i + 2 * half];
      float& y = sum[4 * i + 2 * half + 1];
      if (target.vector) {
        if (col < target.cols) {
          const uint32_t old = *reinterpret_cast<const uint32_t*>(out + col);
          x += __uint_as_float(old << 16);
          y += __uint_as_float(old & 0xffff0000u);
        }
      } else {
        if (col < target.cols) x += __uint_as_float(uint32_t{out[col]} << 16);
        if (col + 1 < target.cols) y += __uint_as_float(uint32_t{out[col + 1]} << 16);
      }
    }
  }
}

template <int kCols>
__device__ __forceinline__ void store(const Target<BF16>& target, float (&sum)[kCols / 2],
                                      int lane) {
  const int quad = lane % 4;
  const bool odd = quad % 2;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = lane / 4 + 8 * half;
    const bool inside = row < target.rows;
    uint16_t* out = target.out + row * target.stride;
#pragma unroll
    for (int g = 0; g < kCols / 16; ++g) {
      // Neighbouring lanes swap a pair, so that each has four columns that lie together: even lanes
      // in the first eight of the sixteen, odd lanes in the second.
      const float* values = sum + 8 * g + 2 * half;
      const uint32_t first = ptx::cvt_rn_bf16x2_f32(values[1], values[0]);
      const uint32_t second = ptx::cvt_rn_bf16x2_f32(values[5], values[4]);
      const uint32_t other = __shfl_xor_sync(~0u, odd ? first : second, 1);
      const uint2 four = odd ? uint2{other, second} : uint2{first, other};
      const int col = 16 * g + 8 * odd + quad / 2 * 4;
      if (target.vector) {
        if (inside && col < target.cols) *reinterpret_cast<uint2*>(out + col) = four;
      } else if (inside) {
        if (col < target.cols) out[col] = four.x;
        if (col + 1 < target.cols) out[col + 1] = four.x >> 16;
        if (col + 2 < target.cols) out[col + 2] = four.y;
        if (col + 3 < target.cols) out[col + 3] = four.y >> 16;
      }
    }
  }
}

template <int kCols>
__device__ __forceinline__ void store(const Target<F32>& target, float (&sum)[kCols / 2],
                                      int lane) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = lane / 4 + 8 * half;
    float* out = target.out + row * target.stride;
    if (row < target.rows) {
#pragma unroll
      for (int i = 0; i < kCols / 8; ++i) {
        const int col = 8 * i + lane % 4 * 2;
        const float2 pair = {sum[4 * i + 2 * half], sum[4 * i + 2 * half + 1]};
        if (target.vector) {
          if (col < target.cols) {
            if (target.accumulate) {
              ptx::red_add_v2_f32(out + col, pair);
            } else {
              *reinterpret_cast<float2*>(out + col) = pair;
            }
          }
        } else {
          if (col < target.cols) out[col] = target.accumulate ? out[col] + pair.x : pair.x;
          if (col + 1 < target.cols) {
            out[col + 1] = target.accumulate ? out[col + 1] + pair.y : pair.y;
          }
        }
      }
    }
  }
}

// The warp's ring of strips, swizzled as the copy engine does: within each 128 bytes of a strip,
// 16-byte chunk c lies at c ^ (number of the 128 bytes % chunks a row).
template <class Tile>
struct Staging {
  static constexpr int kRowBytes = Tile::kLayout.strip_row_bytes();
  static constexpr int kChunks = kRowBytes / 16;
  static constexpr int kStripBytes = Tile::kLayout.strip_bytes();
  static constexpr int kStripCols = Tile::kLayout.strip_cols();
  static constexpr int kStrips = Tile::kLayout.strips(), kSlots = Tile::kLayout.staging_strips();
  static_assert(kStrips % kSlots == 0);

  uint32_t base;  // shared address, a multiple of the swizzle pattern (8 kRowBytes)
  int lane;

  // Where byte `byte` of row `row` of a strip lies.
  __device__ static __forceinline__ uint32_t place(int row, int byte) {
    const int offset = row * kRowBytes + byte;
    return offset ^ (offset / 128 % kChunks * 16);
  }

  __device__ __forceinline__ void write(uint32_t strip, const float* sum, BF16) const {
    // Lane 8 i + r addresses row r of matrix i: rows 0-7 and 8-15 of 8 columns, then of the next 8.
#pragma unroll
    for (int i = 0; i < kStripCols / 2; i += 8) {
      const uint32_t regs[4] = {ptx::cvt_rn_bf16x2_f32(sum[i + 1], sum[i]),
                                ptx::cvt_rn_bf16x2_f32(sum[i + 3], sum[i + 2]),
                                ptx::cvt_rn_bf16x2_f32(sum[i + 5], sum[i + 4]),
                                ptx::cvt_rn_bf16x2_f32(sum[i + 7], sum[i + 6])};
      ptx::stmatrix_x4(strip + place(lane % 16, i * 4 + lane / 16 * 16), regs);
    }
  }

  __device__ __forceinline__ void write(uint32_t strip, const float* sum, F32) const {
#pragma unroll
    for (int i = 0; i < kStripCols / 2; i += 2) {
      const int byte = (i / 4 * 8 + lane % 4 * 2) * 4;
      ptx::store_shared_f2(strip + place(lane / 4 + i / 2 % 2 * 8, byte), sum[i], sum[i + 1]);
    }
  }

  // The warp's 16 rows, whole, from output row `row` and column `col` on.
  __device__ __forceinline__ void store(const GemmArgs& args, const float (&sum)[Tile::kSums],
                                        int row, int col) const {
    using Out = typename Tile::Out;
#pragma unroll
    for (int i = 0; i < kStrips; ++i) {
      const uint32_t strip = base + i % kSlots * kStripBytes;
      if (lane == 0) ptx::bulk_wait_read<kSlots - 1>();  // until the slot has been read
      __syncwarp();
      write(strip, sum + i * kStripCols / 2, Out{});
      ptx::fence_proxy_async();
      __syncwarp();
      if (lane == 0) {
        if (Out::kAddByTensorMap && args.flags & kAccumulate) {
          ptx::tma_add_2d(args.out_map, col + i * kStripCols, row, strip);
        } else {
          ptx::tma_store_2d(args.out_map, col + i * kStripCols, row, strip);
        }
        ptx::bulk_commit_group();
      }
    }
  }
};

// `row`, `first_col`: of the tile, the warp's first.
template <class Tile>
__device__ __forceinline__ void store(const GemmArgs& args, const Work& work,
                                      float (&sum)[Tile::kSums], int row, int first_col,
                                      Staging<Tile> staging, int lane) {
  using Out = typename Tile::Out;
  const int col = work.col + first_col;
  const Target<Out> target = {
      static_cast<typename Out::Storage*>(args.out) + int64_t{work.out_row + row} * args.n + col,
      args.n,
      work.rows - row,
      args.n - col,
      (args.flags & kVectorOut) != 0,
      (args.flags & kAccumulate) != 0};
  if (target.rows > 0) {
    if constexpr (!Out::kAddByTensorMap) {
      if (target.accumulate) add_old<Tile::kCols>(target, sum, lane);
      __syncwarp();
    }
    if (target.rows >= kStripRows && args.flags & kOutTensorMap) {
      staging.store(args, sum, work.out_row + row, col);
    } else {
      store<Tile::kCols>(target, sum, lane);
    }
  }
  __syncwarp();
}

}  // namespace jaxfp8
