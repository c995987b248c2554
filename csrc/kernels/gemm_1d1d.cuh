// 1d1d: a scale for each 1x128 block of lhs and of rhs (the weight gradient).
//
//   out[m, n] = sum_b lhs_scale[b, m] * rhs_scale[b, n] * (lhs[m, b] . rhs[n, b])
#pragma once
#include "gemm.cuh"

namespace jaxfp8 {

template <class Tile>
struct OuterScales;

template <>
constexpr bool kHasOuterScales<OuterScales> = true;

template <class Tile>
struct OuterScales {
  // A stage: lhs scales in load_lhs_scales' order | rhs scales. Of each 16 columns a wgmma lane has
  // 2 q, 2 q + 1, 8 + 2 q and 9 + 2 q (q = lane % 4): column c lies at float
  // 16 (c / 16) + 4 (c % 8 / 2) + 2 (c / 8 % 2) + c % 2, so that one 16-byte read fetches all four.
  static constexpr int kRhs = Tile::kBlockM * 4;
  static constexpr bool kPromotionReadsStage = true;

  // Reads of column scales that are under way before a wave's products are complete. With two sets
  // the promotion runs under the next products anyway.
  static constexpr int kAhead = Tile::kSets == 2 ? 0 : 3;

  __device__ static void load(const GemmArgs& args, const Work& work, int k_block, uint32_t stage,
                              int lane) {
    load_lhs_scales<Tile::kBlockM>(args, work, k_block, stage, lane);
    const float* source = args.rhs_scale + int64_t{k_block} * args.rhs_rows + work.rhs_row;
    const int columns = args.rhs_rows - work.rhs_row;
#pragma unroll
    for (int i = 0; i < Tile::kBlockN; i += 32) {
      const int c = i + lane;
      const bool inside = c < columns;
      if (Tile::kBlockN % 32 == 0 || c < Tile::kBlockN) {
        ptx::cp_async_4(stage + kRhs + 4 * (c / 16 * 16 + c % 8 / 2 * 4 + c / 8 % 2 * 2 + c % 2),
                        inside ? source + c : args.rhs_scale, inside ? 4 : 0);
      }
    }
  }

  // What a lane needs to promote a wave: its two rows' scales, and where the columns' lie.
  struct Lane {
    float2 rows;
    uint32_t columns;
    float4 ahead[kAhead + 1];

    // `row`, `col`: of the tile, the warp's first.
    __device__ __forceinline__ Lane(uint32_t stage, int row, int col, int lane)
        : rows(ptx::load_shared_f2(stage + 4 * row + lane / 4 * 8)),
          columns(stage + kRhs + 4 * col + lane % 4 * 16) {
#pragma unroll
      for (int i = 0; i < kAhead; ++i) ahead[i] = column_scales(i);
    }

    // Of the lane's four columns of the 16 from 16 i on.
    __device__ __forceinline__ float4 column_scales(int i) const {
      return ptx::load_shared_f4(columns + i * 64);
    }

    __device__ __forceinline__ void promote(float (&sum)[Tile::kSums],
                                            const float (&acc)[Tile::kSums]) {
#pragma unroll
      for (int i = 0; i < Tile::kSums / 8; ++i) {
        const float4 c = kAhead == 0 ? column_scales(i) : ahead[i % (kAhead + 1)];
        if (kAhead > 0 && i + kAhead < Tile::kSums / 8) {
          ahead[(i + kAhead) % (kAhead + 1)] = column_scales(i + kAhead);
        }
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
};

}  // namespace jaxfp8
