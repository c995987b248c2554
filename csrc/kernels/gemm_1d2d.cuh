// 1d2d: a scale for each 1x128 block of lhs and for each 128x128 block of rhs (forward and dgrad).
//
//   out[m, n] = sum_b lhs_scale[b, m] * rhs_scale[n / 128, b] * (lhs[m, b] . rhs[n, b])
#pragma once
#include "gemm.cuh"

namespace jaxfp8 {

template <int kBlockM, int kBlockN>
struct BlockScales {
  static constexpr bool kOuter = false;
  static constexpr TileLayout kLayout = {kBlockM, kBlockN, 2, false};
  static constexpr int kSegment = kLayout.scale_segment(), kSegments = kLayout.rhs_scales();

  // A stage: lhs scales in load_lhs_scales' order | a scale for each segment of columns.
  static constexpr int kRhs = kBlockM * 4;
  static constexpr bool kPromotionReadsStage = false;

  __device__ static void load(const GemmArgs& args, const Work& work, int k_block, uint32_t stage,
                              int lane) {
    load_lhs_scales<kBlockM>(args, work, k_block, stage, lane);
    if (lane < kSegments) {
      const int blocks = ceil_div(args.n, 128);
      const int block = (work.col + lane * kSegment) / 128;
      const int64_t row = int64_t{work.group} * blocks + block;
      const bool inside = block < blocks;
      ptx::cp_async_4(stage + kRhs + 4 * lane,
                      args.rhs_scale + (inside ? row * args.k_blocks + k_block : 0),
                      inside ? 4 : 0);
    }
  }

  // What a lane needs to promote a block: a factor for each of its two rows and each segment.
  struct Lane {
    float factor[kSegments][2];
    int slot;

    // `row`: the first of the warp's 16.
    __device__ __forceinline__ Lane(uint32_t stage, int row, int lane, int slot) : slot(slot) {
      const float2 rows = ptx::load_shared_f2(stage + 4 * row + lane / 4 * 8);
#pragma unroll
      for (int s = 0; s < kSegments; ++s) {
        const float column = ptx::load_shared_f1(stage + kRhs + 4 * s);
        factor[s][0] = rows.x * column;
        factor[s][1] = rows.y * column;
      }
    }

    __device__ __forceinline__ void promote(float (&sum)[kBlockN / 2],
                                            const float (&acc)[kBlockN / 2]) const {
#pragma unroll
      for (int i = 0; i < kBlockN / 2; ++i) {
        sum[i] = fmaf(factor[i / 4 * 8 / kSegment][i / 2 % 2], acc[i], sum[i]);
      }
    }
  };
};

}  // namespace jaxfp8
