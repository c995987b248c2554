// 1d1d: a scale for each 1x128 block of lhs and of rhs (the weight gradient).
//
//   out[m, n] = sum_b lhs_scale[b, m] * rhs_scale[b, n] * (lhs[m, b] . rhs[n, b])
#pragma once
#include "gemm.cuh"

namespace jaxfp8 {

template <int kBlockM, int kBlockN>
struct OuterScales {
  static constexpr bool kOuter = true;

  // A stage: lhs scales in load_lhs_scales' order | rhs scales. Of each 16 columns a wgmma lane has
  // 2 q, 2 q + 1, 8 + 2 q and 9 + 2 q (q = lane % 4): column c lies at float
  // 16 (c / 16) + 4 (c % 8 / 2) + 2 (c / 8 % 2) + c % 2, so that one 16-byte read fetches all four.
  static constexpr int kRhs = kBlockM * 4;
  static constexpr bool kPromotionReadsStage = true;

  __device__ static void load(const GemmArgs& args, const Work& work, int k_block, uint32_t stage,
                              int lane) {
    load_lhs_scales<kBlockM>(args, work, k_block, stage, lane);
    const float* source = args.rhs_scale + int64_t{k_block} * args.rhs_rows + work.rhs_row;
    const int columns = args.rhs_rows - work.rhs_row;
#pragma unroll
    for (int i = 0; i < kBlockN; i += 32) {
      const int c = i + lane;
      const bool inside = c < columns;
      if (kBlockN % 32 == 0 || c < kBlockN) {
        ptx::cp_async_4(stage + kRhs + 4 * (c / 16 * 16 + c % 8 / 2 * 4 + c / 8 % 2 * 2 + c % 2),
                        inside ? source + c : args.rhs_scale, inside ? 4 : 0);
      }
    }
  }

  // What a lane needs to promote a block: its two rows' scales, and where the columns' lie.
  struct Lane {
    float2 rows;
    uint32_t columns;
    int slot;

    __device__ __forceinline__ Lane(uint32_t stage, int row, int lane, int slot)
        : rows(ptx::load_shared_f2(stage + 4 * row + lane / 4 * 8)),
          columns(stage + kRhs + lane % 4 * 16),
          slot(slot) {}

    __device__ __forceinline__ void promote(float (&sum)[kBlockN / 2],
                                            const float (&acc)[kBlockN / 2]) const {
#pragma unroll
      for (int i = 0; i < kBlockN / 2; i += 8) {
        const float4 c = ptx::load_shared_f4(columns + i / 8 * 64);
        sum[i] = fmaf(rows.x * c.x, acc[i], sum[i]);
        sum[i + 1] = fmaf(rows.x * c.y, acc[i + 1], sum[i + 1]);
        sum[i + 2] = fmaf(rows.y * c.x, acc[i + 2], sum[i + 2]);
        sum[i + 3] = fmaf(rows.y * c.y, acc[i + 3], sum[i + 3]);
        sum[i + 4] = fmaf(rows.x * c.z, acc[i + 4], sum[i + 4]);
        sum[i + 5] = fmaf(rows.x * c.w, acc[i + 5], sum[i + 5]);
        sum[i + 6] = fmaf(rows.y * c.z, acc[i + 6], sum[i + 6]);
        sum[i + 7] = fmaf(rows.y * c.w, acc[i + 7], sum[i + 7]);
      }
    }
  };
};

}  // namespace jaxfp8
