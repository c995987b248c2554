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

  // A stage: lhs scales in RowScales' order | a scale for each segment of the tile's columns.
  static constexpr int kRhs = Tile::kBlockM * 4;
  static constexpr bool kPromotionReadsStage = false;
  // Of the contraction's blocks, with one accumulator set; the smallest tile gains nothing.
  static constexpr int kUnroll = Tile::kCols == 32 ? 1 : 4;

  // Warp 2: the scales of one block of the contraction after another.
  struct Source {
    RowScales<Tile::kBlockM> lhs;
    const float* rhs;  // of this lane's segment
    bool has_rhs, rhs_inside;

    __device__ Source(const GemmArgs& args, const Work& work, int lane)
        : lhs(args.lhs_scale, args.lhs_rows, work.lhs_row, work.k_block, lane) {
      const int blocks = ceil_div(args.n, 128);
      const int block = (work.col + lane * kSegment) / 128;
      has_rhs = lane < Tile::kLayout.rhs_scales();
      rhs_inside = block < blocks;
      rhs = args.rhs_scale + (int64_t{work.group} * blocks + block) * args.k_blocks + work.k_block;
    }

    __device__ void load_next(uint32_t stage, int lane) {
      lhs.load_next(stage);
      if (has_rhs) ptx::cp_async_4(stage + kRhs + 4 * lane, rhs, rhs_inside ? 4 : 0);
      ++rhs;
    }
  };

  // A lane's scales of the columns that its warpgroup computes.
  struct Columns {
    float scale[kSegments];

    // `col`: of the tile, the warpgroup's first.
    __device__ __forceinline__ Columns(uint32_t stage, int col, int lane) {
      for (int s = 0; s < kSegments; ++s) {
        scale[s] = ptx::load_shared_f1(stage + kRhs + 4 * (col / kSegment + s));
      }
    }
  };

  // `rows`: the scales of the lane's two rows.
  __device__ static __forceinline__ void promote(float (&sum)[Tile::kSums],
                                                 const float (&acc)[Tile::kSums], float2 rows,
                                                 const Columns& columns) {
    float factor[kSegments][2];
#pragma unroll
    for (int s = 0; s < kSegments; ++s) {
      factor[s][0] = rows.x * columns.scale[s];
      factor[s][1] = rows.y * columns.scale[s];
    }
#pragma unroll
    for (int i = 0; i < Tile::kSums; ++i) {
      sum[i] = fmaf(factor[i / 4 * 8 / kSegment][i / 2 % 2], acc[i], sum[i]);
    }
  }
};

}  // namespace jaxfp8
