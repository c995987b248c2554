// A tile: its types, its shared memory, what its warps share.
#pragma once
#include <cstdint>

#include "args.cuh"
#include "ring.cuh"

namespace jaxfp8 {

// Whether a kind of scales has one for each rhs row (scales_1d1d.cuh) or one for each 128 of them.
template <template <class> class Scales>
constexpr bool kHasOuterScales = false;

// kBlockM x kBlockN of the output by a CTA. kWarpgroupsN = 2 sets the math warpgroups side by side,
// kSets is the number of accumulator sets of each.
template <int kBlockM_, int kBlockN_, int kWarpgroupsN, int kSets_, template <class> class Scales_,
          class Lhs_, class Rhs_, class Out_>
struct Tile {
  using Lhs = Lhs_;
  using Rhs = Rhs_;
  using Out = Out_;
  using Scales = Scales_<Tile>;
  static constexpr bool kOuterScales = kHasOuterScales<Scales_>;

  static constexpr int kBlockM = kBlockM_, kBlockN = kBlockN_, kSets = kSets_;
  static constexpr TileLayout kLayout = {kBlockM, kBlockN, kWarpgroupsN, Out::kBytes, kOuterScales};
  static constexpr int kMathWarpgroups = kLayout.math_warpgroups();
  static constexpr int kMathWarps = 4 * kMathWarpgroups;
  static constexpr int kThreads = kLayout.threads();
  // Of a warpgroup: rows, in waves of 64 (the rows of a wgmma), and columns.
  static constexpr int kRows = kLayout.warpgroup_rows(), kCols = kLayout.warpgroup_cols();
  static constexpr int kWaves = kRows / 64;
  static constexpr int kSums = kCols / 2;  // registers of a wave

  static constexpr int kLhsBytes = kLayout.lhs_bytes();
  static constexpr int kRhsBytes = kLayout.rhs_bytes();
  static constexpr int kScaleBytes = kLayout.scale_bytes();
  static constexpr int kStages = kLayout.stages();
  static constexpr int kRhsOffset = kLayout.rhs_offset();
  static constexpr int kScaleOffset = kLayout.scale_offset();
  using Stages = Ring<kStages>;

  static_assert(kRows % 64 == 0 && kMathWarpgroups % kWarpgroupsN == 0);
  static_assert(kCols % 16 == 0 && kCols <= 192, "epilogue.cuh; wgmma.cuh");
  static_assert(kWaves <= 2 && kSets <= 2);
  static_assert(kStages >= 3 && kLayout.shared_bytes() <= kMaxSharedBytes);
  // A swizzle pattern is 8 rows of 128 bytes.
  static_assert(kLhsBytes % 1024 == 0 && kCols % 8 == 0);
  static_assert(kScaleBytes % 16 == 0 && kLayout.mailbox_offset() % 16 == 0 &&
                kLayout.stage_barriers_offset() % 8 == 0);
};

}  // namespace jaxfp8
