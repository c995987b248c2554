// 1d2d: a scale for each 1x128 block of lhs and for each 128x128 block of rhs (forward and dgrad).
//
//   out[m, n] = sum_b lhs_scale[b, m] * rhs_scale[n / 128, b] * (lhs[m, b] . rhs[n, b])
#pragma once
#include "gemm.cuh"

namespace jaxfp8 {

template <class Tile>
struct BlockScales {
  static constexpr int kSegment = Tile::kLayout.scale_segment();
  static constexpr int kSegments = Tile::kCols / kSegment;  // of a warpgroup

  // A stage: lhs scales in load_lhs_scales' order | a scale for each segment of the tile's columns.
  static constexpr int kRhs = Tile::kBlockM * 4;
  static constexpr bool kPromotionReadsStage = false;

  __device__ static void load(const GemmArgs& args, const Work& work, int k_block, uint32_t stage,
                              int lane) {
    load_lhs_scales<Tile::kBlockM>(args, work, k_block, stage, lane);
    if (lane < Tile::kLayout.rhs_scales()) {
      const int blocks = ceil_div(args.n, 128);
      const int block = (work.col + lane * kSegment) / 128;
      const int64_t row = int64_t{work.group} * blocks + block;
      const bool inside = block < blocks;
      ptx::cp_async_4(stage + kRhs + 4 * lane,
                      args.rhs_scale + (inside ? row * args.k_blocks + k_block : 0),
                      inside ? 4 : 0);
    }
  }

  // What a lane needs to promote a wave: a factor for each of its two rows and each segment.
  struct Lane {
    float factor[kSegments][2];

    // `row`, `col`: of the tile, the warp's first.
    __device__ __forceinline__ Lane(uint32_t stage, int row, int col, int lane) {
      const float2 rows = ptx::load_shared_f2(stage + 4 * row + lane / 4 * 8);
#pragma unroll
      for (int s = 0; s < kSegments; ++s) {
        const float column = ptx::load_shared_f1(stage + kRhs + 4 * (col / kSegment + s));
        factor[s][0] = rows.x * column;
        factor[s][1] = rows.y * column;
      }
    }

    __device__ __forceinline__ void promote(float (&sum)[Tile::kSums],
                                            const float (&acc)[Tile::kSums]) const {
#pragma unroll
      for (int i = 0; i < Tile::kSums; ++i) {
        sum[i] = fmaf(factor[i / 4 * 8 / kSegment][i / 2 % 2], acc[i], sum[i]);
      }
    }
  };
};

}  // namespace jaxfp8
