// 1d1d: a scale for each 1x128 block of lhs and of rhs (the weight gradient).
//
//   out[m, n] = sum_b lhs_scale[b, m] * rhs_scale[b, n] * (lhs[m, b] . rhs[n, b])
//
// Every lane needs the scales of a quarter of its warpgroup's columns for each block: as many bytes
// through shared memory as half the operands' that a wgmma reads. Two waves that hold them share
// one read.
//
// Issue slots of a warp for a wave of 64 x N and 128 of the contraction: N / 2 multiply-adds and as
// many products of scales, four wgmma, 34 to 52 for waits, reads and addresses; 128x128 in two sets
// takes 174, 14 of them without products in flight, 256x128 in one set 166 and 155:
// benchmarks/gemm_sass.md.
#pragma once
#include "gemm.cuh"

namespace jaxfp8 {

template <class Tile>
struct OuterScales;

template <>
constexpr bool kHasOuterScales<OuterScales> = true;

template <class Tile>
struct OuterScales {
  // A stage: lhs scales in RowScales' order | rhs scales in ColumnScales' order.
  static constexpr int kRhsOffset = Tile::kBlockM * 4;
  static constexpr bool kHold = Tile::kWaves == 2 && Tile::kCols <= 96;  // else too many registers
  static constexpr bool kPromotionReadsStage = !kHold;
  static constexpr bool kReadFirst = false;
  static constexpr int kUnroll = 1;  // four would spill

  // Of each 16 columns a wgmma lane has 2 q, 2 q + 1, 8 + 2 q and 9 + 2 q (q = lane % 4): column c
  // lies at float 16 (c / 16) + 4 (c % 8 / 2) + 2 (c / 8 % 2) + c % 2, so that one 16-byte read
  // fetches all four.
  __device__ static constexpr int place(int c) {
    return c / 16 * 16 + c % 8 / 2 * 4 + c / 8 % 2 * 2 + c % 2;
  }

  // Warp 2: the scales of one block of the contraction after another.
  struct Source {
    RowScales<Tile::kBlockM> lhs_scales;
    const float* rhs_scales;  // of this lane's first column
    int64_t stride;
    uint32_t target;
    int columns;  // from the lane's first on

    __device__ Source(const GemmArgs& args, const Work& work, int lane)
        : lhs_scales(args.lhs_scale, args.lhs_rows, work.lhs_row, work.k_block, lane),
          rhs_scales(args.rhs_scale + int64_t{work.k_block} * args.rhs_rows + work.rhs_row + lane),
          stride(args.rhs_rows),
          target(kRhsOffset + 4 * place(lane)),
          columns(args.rhs_rows - work.rhs_row - lane) {}

    __device__ void load_next(uint32_t stage, int lane) {
      lhs_scales.load_next(stage);
#pragma unroll
      for (int i = 0; i < Tile::kBlockN; i += 32) {
        ptx::cp_async_4(stage + target + 4 * i, rhs_scales + i, i < columns ? 4 : 0);
      }
      rhs_scales += stride;
    }
  };
  static_assert(Tile::kBlockN % 32 == 0);

  // A lane's scales of the columns that its warpgroup computes; where they lie, unless held.
  struct Columns {
    uint32_t address;
    float4 held[kHold ? Tile::kCols / 16 : 1];

    Columns() = default;

    // `col`: of the tile, the warpgroup's first.
    __device__ __forceinline__ Columns(uint32_t stage, int col, int /*tile_col*/, int lane)
        : address(stage + kRhsOffset + 4 * col + lane % 4 * 16) {
      if constexpr (kHold) {
#pragma unroll
        for (int i = 0; i < Tile::kCols / 16; ++i) held[i] = ptx::load_shared_f4(address + 64 * i);
      }
    }

    // Of the lane's four columns of the 16 from 16 i on.
    __device__ __forceinline__ float4 four(int i) const {
      if constexpr (kHold) return held[i];
      return ptx::load_shared_f4(address + 64 * i);
    }
  };

  // What a lane multiplies its products by: a product for each of them, made where it is used.
  struct Factors {
    float2 rows;  // the scales of the lane's two rows
    Columns columns;

    __device__ __forceinline__ Factors(float2 rows, const Columns& columns)
        : rows(rows), columns(columns) {}
  };

  __device__ static __forceinline__ void promote(float (&sum)[Tile::kSums],
                                                 const float (&acc)[Tile::kSums],
                                                 const Factors& factors) {
    const float2 rows = factors.rows;
#pragma unroll
    for (int i = 0; i < Tile::kSums / 8; ++i) {
      const float4 c = factors.columns.four(i);
      float* s = sum + 8 * i;
      const float* a = acc + 8 * i;
      s[0] = fmaf(rows.x * c.x, a[0], s[0]);
      s[1] = fmaf(rows.x * c.y, a[1], s[1]);
      s[2] = fmaf(rows.y * c.x, a[2], s[2]);
      s[3] = fmaf(rows.y * c.y, a[3], s[3]);
      s[4] = fmaf(rows.x * c.z, a[4], s[4]);
      s[5] = fmaf(rows.x * c.w, a[5], s[5]);
      s[6] = fmaf(rows.y * c.z, a[6], s[6]);
      s[7] = fmaf(rows.y * c.w, a[7], s[7]);
    }
  }
};

}  // namespace jaxfp8
