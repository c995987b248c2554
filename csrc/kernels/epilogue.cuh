// From a warp's accumulators to the output.
//
// A warp stores its own 16 rows of a 64-row wave, through its own staging buffer, and waits for no
// other. Where all 16 rows belong to the segment and the output has a tensor map, the copy engine
// takes them from there, clips columns, and runs under the next tile's products. Otherwise (a
// segment's last rows, an output whose rows are no multiple of 16 bytes) the warp copies what lies
// inside. To accumulate, the old output is staged first and added to the registers, except where
// the copy engine itself adds (float32).
//
// Staging: strips of 16 rows of up to 128 bytes, swizzled as the copy engine does: within each 128
// bytes of a row, 16-byte chunk c lies at c ^ ((offset of the row / 128) % chunks a row).
#pragma once
#include <cstdint>

#include "../ptx/convert.cuh"
#include "../ptx/copy.cuh"
#include "../ptx/sync.cuh"
#include "gemm_args.cuh"
#include "schedule.cuh"

namespace jaxfp8 {

struct BF16 {
  static constexpr int kBytes = 2;
  static constexpr bool kAddByTensorMap = false;  // the sum must be rounded once
  using Storage = uint16_t;
};

struct F32 {
  static constexpr int kBytes = 4;
  static constexpr bool kAddByTensorMap = true;
  using Storage = uint32_t;
};

template <class Out, int kBlockN>
struct Staging {
  using Storage = typename Out::Storage;
  static constexpr TileLayout kLayout = {64, kBlockN, Out::kBytes, false};
  static constexpr int kRowBytes = kLayout.strip_row_bytes();
  static constexpr int kChunks = kRowBytes / 16;
  static constexpr int kStripBytes = kStripRows * kRowBytes;
  static constexpr int kStripCols = kRowBytes / Out::kBytes;
  static constexpr int kStrips = kBlockN / kStripCols;
  static_assert(kBlockN % kStripCols == 0);

  uint32_t base;  // shared address, a multiple of the swizzle pattern (8 kRowBytes)
  int lane;

  // Where byte `byte` of row `row` lies.
  __device__ __forceinline__ uint32_t at(int row, int byte) const {
    const int offset = row * kRowBytes + byte % kRowBytes;
    return base + byte / kRowBytes * kStripBytes + (offset ^ (offset / 128 % kChunks * 16));
  }

  // This lane's registers 2 i and 2 i + 1 of a wave: row lane / 4 (+ 8), two columns.
  __device__ __forceinline__ uint32_t at_pair(int i) const {
    return at(lane / 4 + i % 2 * 8, (i / 2 * 8 + lane % 4 * 2) * Out::kBytes);
  }

  __device__ __forceinline__ void write(const float (&sum)[kBlockN / 2]) const {
    if constexpr (Out::kBytes == 2) {
      // Lane 8 i + r addresses row r of matrix i: rows 0-7 and 8-15 of 8 columns, then of the
      // next 8.
#pragma unroll
      for (int j = 0; j < kBlockN / 2; j += 8) {
        const uint32_t regs[4] = {ptx::cvt_rn_bf16x2_f32(sum[j + 1], sum[j]),
                                  ptx::cvt_rn_bf16x2_f32(sum[j + 3], sum[j + 2]),
                                  ptx::cvt_rn_bf16x2_f32(sum[j + 5], sum[j + 4]),
                                  ptx::cvt_rn_bf16x2_f32(sum[j + 7], sum[j + 6])};
        ptx::stmatrix_x4(at(lane % 16, j * 4 + lane / 16 * 16), regs);
      }
    } else {
#pragma unroll
      for (int i = 0; i < kBlockN / 4; ++i) {
        ptx::store_shared_f2(at_pair(i), sum[2 * i], sum[2 * i + 1]);
      }
    }
  }

  __device__ __forceinline__ void add_to(float (&sum)[kBlockN / 2]) const {
#pragma unroll
    for (int i = 0; i < kBlockN / 4; ++i) {
      if constexpr (Out::kBytes == 2) {
        uint32_t pair;
        ptx::load_shared(at_pair(i), pair);
        sum[2 * i] += __uint_as_float(pair << 16);
        sum[2 * i + 1] += __uint_as_float(pair & 0xffff0000u);
      } else {
        const float2 pair = ptx::load_shared_f2(at_pair(i));
        sum[2 * i] += pair.x;
        sum[2 * i + 1] += pair.y;
      }
    }
  }

  // Calls visit(shared address, element, inside) for each piece of the buffer that this lane
  // copies: 16 bytes where `vector`, else an element. `inside`: it belongs to the `rows` x `cols`
  // of the output that begin at `out`.
  template <class Visit>
  __device__ __forceinline__ void for_each(Storage* out, int64_t stride, int rows, int cols,
                                           bool vector, Visit visit) const {
    const int step = vector ? 16 : Out::kBytes;
    const int per_row = kBlockN * Out::kBytes / step;
#pragma unroll 1
    for (int i = lane; i < kStripRows * per_row; i += 32) {
      const int row = i / per_row, byte = i % per_row * step;
      const int col = byte / Out::kBytes;
      visit(at(row, byte), out + row * stride + col, row < rows && col < cols);
    }
  }

  __device__ __forceinline__ void copy_out(Storage* out, int64_t stride, int rows, int cols,
                                           bool vector) const {
    for_each(out, stride, rows, cols, vector, [&](uint32_t address, Storage* element, bool inside) {
      if (!inside) return;
      if (vector) {
        *reinterpret_cast<int4*>(element) = ptx::load_shared_i4(address);
      } else {
        Storage value;
        ptx::load_shared(address, value);
        *element = value;
      }
    });
  }

  // What lies outside becomes zero.
  __device__ __forceinline__ void copy_in(Storage* out, int64_t stride, int rows, int cols,
                                          bool vector) const {
    for_each(out, stride, rows, cols, vector, [&](uint32_t address, Storage* element, bool inside) {
      if (vector) {
        ptx::store_shared_i4(address, inside ? *reinterpret_cast<int4*>(element) : int4{});
      } else {
        ptx::store_shared(address, inside ? *element : Storage{});
      }
    });
  }
};

// `row`: of the tile, the first of the warp's 16.
template <class Out, int kBlockN>
__device__ __forceinline__ void store(const GemmArgs& args, const Work& work,
                                      float (&sum)[kBlockN / 2], int row,
                                      Staging<Out, kBlockN> staging, int lane) {
  const int rows = work.rows - row, cols = args.n - work.col;
  if (rows <= 0 || cols <= 0) return;
  const bool mapped = args.flags & kOutTensorMap, accumulate = args.flags & kAccumulate;
  const bool whole = mapped && rows >= kStripRows;
  typename Out::Storage* out = static_cast<typename Out::Storage*>(args.out) +
                               int64_t{work.out_row + row} * args.n + work.col;

  if (lane == 0) ptx::bulk_wait_read();  // the copy engine, of the staging buffer's last contents
  __syncwarp();
  if (accumulate && !(whole && Out::kAddByTensorMap)) {
    staging.copy_in(out, args.n, rows, cols, mapped);
    __syncwarp();
    staging.add_to(sum);
    __syncwarp();
  }
  staging.write(sum);
  if (whole) {
    ptx::fence_proxy_async();
    __syncwarp();
    if (lane == 0) {
      using S = Staging<Out, kBlockN>;
#pragma unroll 1
      for (int strip = 0; strip < S::kStrips && strip * S::kStripCols < cols; ++strip) {
        const int col = work.col + strip * S::kStripCols;
        const uint32_t source = staging.base + strip * S::kStripBytes;
        if (Out::kAddByTensorMap && accumulate) {
          ptx::tma_add_2d(args.out_map, col, work.out_row + row, source);
        } else {
          ptx::tma_store_2d(args.out_map, col, work.out_row + row, source);
        }
      }
      ptx::bulk_commit_group();
    }
  } else {
    __syncwarp();
    staging.copy_out(out, args.n, rows, cols, mapped);
    __syncwarp();
  }
}

}  // namespace jaxfp8
