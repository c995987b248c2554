// From a warp's accumulators to the output: plain stores, straight from registers.
//
// A warp stores its own 16 rows of a 64-row wave and waits for no other; rows beyond the segment
// and columns beyond the output are left out one by one. No staging buffer: the shared memory that
// it would take holds one more stage of operands instead, and no warp waits for a copy engine.
// Every access of the aligned path fills whole 32-byte sectors: eight rows of 32 bytes a store.
//
// To accumulate: float32 is added in memory (each element once, so the result does not depend on
// the order); bfloat16 is read first, since the sum must be rounded once.
#pragma once
#include <cstdint>

#include "../ptx/convert.cuh"
#include "../ptx/global.cuh"
#include "gemm_args.cuh"
#include "schedule.cuh"

namespace jaxfp8 {

struct BF16 {
  static constexpr int kBytes = 2;
  using Storage = uint16_t;
};

struct F32 {
  static constexpr int kBytes = 4;
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
    if (target.accumulate && inside) {
#pragma unroll
      for (int i = 0; i < kCols / 8; ++i) {
        const int col = 8 * i + 2 * quad;
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
    __syncwarp();
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

// `row`, `first_col`: of the tile, the warp's first.
template <class Out, int kCols>
__device__ __forceinline__ void store(const GemmArgs& args, const Work& work,
                                      float (&sum)[kCols / 2], int row, int first_col, int lane) {
  const int col = work.col + first_col;
  const Target<Out> target = {
      static_cast<typename Out::Storage*>(args.out) + int64_t{work.out_row + row} * args.n + col,
      args.n,
      work.rows - row,
      args.n - col,
      (args.flags & kVectorOut) != 0,
      (args.flags & kAccumulate) != 0};
  if (target.rows > 0) store<kCols>(target, sum, lane);
  __syncwarp();
}

}  // namespace jaxfp8
