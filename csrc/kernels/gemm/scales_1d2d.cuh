// 1d2d: a scale for each 1x128 block of lhs and for each 128x128 block of rhs (forward and dgrad).
//
//   out[m, n] = sum_b lhs_scale[b, m] * rhs_scale[n / 128, b] * (lhs[m, b] . rhs[n, b])
//
// Issue slots of a warp for a wave of 64 x N and 128 of the contraction: N / 2 multiply-adds, two
// products of scales for each of the one or two blocks of 128 columns, four wgmma, 20 to 37 for
// waits, reads and addresses. The scheduler has 2 N cycles for them while the tensor cores work for
// one warpgroup, 4 N with two. One set leaves the multiply-adds and about ten more without products
// of the warpgroup in flight (78 of 91 slots in 256x128, 114 of 137 in 128x192), two sets 15 to 22:
// benchmarks/gemm_sass.md.
#pragma once
#include "gemm.cuh"

namespace jaxfp8 {

template <class Tile>
struct BlockScales {
  static constexpr int kSegment = Tile::kLayout.scale_segment();
  static constexpr int kSegments = Tile::kCols / kSegment;  // of a warpgroup

  // Of a warpgroup, in a stage: of its first and last segment, or the one.
  static constexpr int kScales = Tile::kLayout.warpgroup_scales();

  // A stage: lhs scales in RowScales' order | each warpgroup's rhs scales.
  static constexpr int kRhsOffset = Tile::kBlockM * 4;
  static constexpr bool kPromotionReadsStage = false;
  static constexpr bool kReadFirst = Tile::kWaves == 2;  // measured: benchmarks/NOTES.md
  static constexpr int kUnroll = 4;  // of the contraction's blocks, with one accumulator set

  // Warp 2: the scales of one block of the contraction after another.
  struct Source {
    RowScales<Tile::kBlockM> lhs_scales;
    const float* rhs_scales;  // this lane's
    bool has_rhs, rhs_inside;

    __device__ Source(const GemmArgs& args, const Work& work, int lane)
        : lhs_scales(args.lhs_scale, args.lhs_rows, work.lhs_row, work.k_block, lane) {
      const int blocks = ceil_div(args.n, 128);
      const int col = lane / kScales * Tile::kCols + lane % kScales * (Tile::kCols - kSegment);
      const int block = (work.col + col) / 128;
      has_rhs = lane < Tile::kLayout.rhs_scales();
      rhs_inside = block < blocks;
      rhs_scales =
          args.rhs_scale + (int64_t{work.group} * blocks + block) * args.k_blocks + work.k_block;
    }

    __device__ void load_next(uint32_t stage, int lane) {
      lhs_scales.load_next(stage);
      if (has_rhs) ptx::cp_async_4(stage + kRhsOffset + 4 * lane, rhs_scales, rhs_inside ? 4 : 0);
      ++rhs_scales;
    }
  };

  // A lane's scales of the columns that its warpgroup computes. Of three segments the middle one
  // lies in the 128-wide block of the first or of the last.
  struct Columns {
    float first, last;
    bool middle_is_first;

    Columns() = default;

    // `col`: of the tile, the warpgroup's first; `tile_col`: of the output, the tile's.
    __device__ __forceinline__ Columns(uint32_t stage, int col, int tile_col, int lane) {
      const uint32_t scale = stage + kRhsOffset + 4 * kScales * (col / Tile::kCols);
      if constexpr (kScales == 1) {
        first = last = ptx::load_shared_f1(scale);
      } else {
        const float2 both = ptx::load_shared_f2(scale);
        first = both.x, last = both.y;
      }
      middle_is_first = (tile_col + col) % 128 + kSegment < 128;
    }
  };
  static_assert(kSegments == 1 || kSegments == 3);

  // What a lane multiplies its products by, a factor for each segment and row.
  struct Factors {
    float factor[kSegments][2];

    // `rows`: the scales of the lane's two rows.
    __device__ __forceinline__ Factors(float2 rows, const Columns& columns) {
      const float first[] = {rows.x * columns.first, rows.y * columns.first};
      const float last[] = {rows.x * columns.last, rows.y * columns.last};
#pragma unroll
      for (int s = 0; s < kSegments; ++s) {
        const bool is_first = s == 0 || (s == 1 && columns.middle_is_first);
        for (int row = 0; row < 2; ++row) factor[s][row] = is_first ? first[row] : last[row];
      }
    }
  };

  __device__ static __forceinline__ void promote(float (&sum)[Tile::kSums],
                                                 const float (&acc)[Tile::kSums],
                                                 const Factors& factors) {
#pragma unroll
    for (int i = 0; i < Tile::kSums; ++i) {
      sum[i] = fmaf(factors.factor[i / 4 * 8 / kSegment][i / 2 % 2], acc[i], sum[i]);
    }
  }
};

}  // namespace jaxfp8
