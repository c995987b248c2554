// From a warp's accumulators to the output.
//
// A warp stores its own 16 rows of a 64-row wave and waits for no other. They go through the warp's
// strips in shared memory: the copy engine takes them from there, clips columns, and runs under the
// next tile's products. Where not all 16 rows belong to the segment, or the output has no tensor
// map (its rows are no multiple of 16 bytes), the warp copies them itself. That code, like what
// reads an old bfloat16 output, stays out of the way of the fast path: each is a short loop or
// marked unlikely.
//
// To accumulate: float32 is added in memory (each element once, so the result does not depend on
// the order); bfloat16 is read first, since the sum must be rounded once.
#pragma once
#include <cstdint>

#include "../../ptx/convert.cuh"
#include "../../ptx/copy.cuh"
#include "../../ptx/global.cuh"
#include "../../ptx/sync.cuh"
#include "args.cuh"
#include "schedule.cuh"

namespace jaxfp8 {

// Output types. copy<kWidth>: kWidth elements (1, or as many as 8 bytes hold) from shared memory.
struct BF16 {
  static constexpr int kBytes = 2;
  static constexpr bool kAddByTensorMap = false;
  using Storage = uint16_t;

  template <int kWidth>
  __device__ static __forceinline__ void copy(Storage* out, uint32_t source, bool) {
    if constexpr (kWidth == 1) {
      *out = ptx::load_shared_b16(source);
    } else {
      ptx::store_global_f2(out, ptx::load_shared_f2(source));
    }
  }
};

struct F32 {
  static constexpr int kBytes = 4;
  static constexpr bool kAddByTensorMap = true;
  using Storage = float;

  template <int kWidth>
  __device__ static __forceinline__ void copy(Storage* out, uint32_t source, bool accumulate) {
    if constexpr (kWidth == 1) {
      const float value = ptx::load_shared_f1(source);
      *out = accumulate ? *out + value : value;
    } else if (accumulate) {
      ptx::red_add_v2_f32(out, ptx::load_shared_f2(source));
    } else {
      ptx::store_global_f2(out, ptx::load_shared_f2(source));
    }
  }
};

// Where a warp's 16 rows go, clipped.
template <class Out>
struct Target {
  typename Out::Storage* out;  // of the first row and column
  int64_t stride;              // elements
  int rows, cols;              // that exist
  bool vector;                 // accesses of 8 bytes are aligned
  bool accumulate;
};

// Adds the old output to the accumulators. Registers 8 g + 2 h + {0, 1} and 8 g + 4 + 2 h + {0, 1}
// of a lane hold row lane / 4 + 8 h, columns 16 g + 2 (lane % 4) + {0, 1} and those 8 further.
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

// The warp's strips, swizzled as the copy engine does: within each 128 bytes of a strip,
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

  // What exists of a strip, `kWidth` elements at a time. `first_col`: from the target's first.
  template <int kWidth, class Out>
  __device__ __forceinline__ void copy_clipped(const Target<Out>& target, uint32_t strip,
                                               int first_col) const {
    constexpr int kPerRow = kStripCols / kWidth;
#pragma unroll 1
    for (int i = lane; i < min(target.rows, kStripRows) * kPerRow; i += 32) {
      const int row = i / kPerRow, col = i % kPerRow * kWidth;
      if (first_col + col < target.cols) {
        Out::template copy<kWidth>(target.out + row * target.stride + first_col + col,
                                   strip + place(row, col * Out::kBytes), target.accumulate);
      }
    }
  }

  // The warp's 16 rows, to output row `row` and column `col`, where the target starts.
  template <class Out>
  __device__ __forceinline__ void store(const GemmArgs& args, const Target<Out>& target,
                                        const float (&sum)[Tile::kSums], int row, int col) const {
    const bool whole = target.rows >= kStripRows && args.flags & kOutTensorMap;
#pragma unroll
    for (int first = 0; first < kStrips; first += kSlots) {
      if (lane == 0) ptx::bulk_wait_read<0>();  // until the copy engine has read the strips
      __syncwarp();
#pragma unroll
      for (int i = 0; i < kSlots; ++i) {
        write(base + i * kStripBytes, sum + (first + i) * kStripCols / 2, Out{});
      }
      if (__builtin_expect(whole, true)) {
        ptx::fence_proxy_async();
        __syncwarp();
        if (lane == 0) {
#pragma unroll
          for (int i = 0; i < kSlots; ++i) {
            const int x = col + (first + i) * kStripCols;
            if (Out::kAddByTensorMap && args.flags & kAccumulate) {
              ptx::tma_add_2d(args.out_map, x, row, base + i * kStripBytes);
            } else {
              ptx::tma_store_2d(args.out_map, x, row, base + i * kStripBytes);
            }
          }
          ptx::bulk_commit_group();
        }
      } else {
        __syncwarp();
#pragma unroll 1
        for (int i = 0; i < kSlots; ++i) {
          const uint32_t strip = base + i * kStripBytes;
          const int first_col = (first + i) * kStripCols;
          if (target.vector) {
            copy_clipped<8 / Out::kBytes>(target, strip, first_col);
          } else {
            copy_clipped<1>(target, strip, first_col);
          }
        }
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
      if (__builtin_expect(target.accumulate, false)) add_old<Tile::kCols>(target, sum, lane);
      __syncwarp();
    }
    staging.store(args, target, sum, work.out_row + row, col);
  }
  __syncwarp();
}

}  // namespace jaxfp8
