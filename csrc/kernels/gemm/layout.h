// What host and device must agree on: modes, flags, and the shared memory of a tile. No device
// code.
#pragma once
#include <cstdint>

namespace jaxfp8 {

// How the output falls into segments of rows: see schedule.cuh.
enum Mode : int32_t { kDense, kGrouped, kMasked, kGroupedWgrad };

enum Flag : int32_t {
  kAccumulate = 1,    // out += product
  kOutTensorMap = 2,  // the output's rows are aligned to 16 bytes; else out_map is unused
  kVectorOut = 4,     // the output's rows allow aligned accesses of 8 bytes
};

constexpr int kBlockK = 128;             // elements, bytes, and the width of a scale's block
constexpr int kMaxSharedBytes = 232448;  // of a CTA on sm_90
constexpr int kStripRows = 16;           // of the output, that a warp stores at a time
constexpr int kMailboxSlots = 4;
constexpr int kWorkBytes = 32;

constexpr int common_divisor(int a, int b) { return b == 0 ? a : common_divisor(b, a % b); }

// How the CTAs of a cluster along N share the copies of their lhs block: each copies `box` rows,
// `part` rows after those of the CTA before. Not more rows than the operand has: to fill in rows
// past its end takes the copy engine longer than to copy them. 1d1d copies whole blocks, since its
// loop got slower with it (both: benchmarks/NOTES.md).
struct LhsCopies {
  int part = 0, box = 0;

  constexpr LhsCopies(int block_m, bool outer_scales, int cluster_n, int lhs_rows) {
    const int rows = outer_scales || lhs_rows > block_m ? block_m : lhs_rows;
    part = ((rows + cluster_n - 1) / cluster_n + 7) / 8 * 8;  // whole swizzle patterns of 8 rows
    box = part < rows ? part : rows;
  }

  // Whether some CTA copies this row of the block.
  constexpr bool include(int row, int cluster_n) const {
    return row < part * cluster_n && row % part < box;
  }
};

// A CTA's tile and its shared memory:
//   lhs stages | rhs stages | staging | scale stages | mailbox | barriers
struct TileLayout {
  int block_m, block_n;
  int warpgroups_n;   // 1: the math warpgroups share the rows; 2: the columns
  int out_bytes;      // of an output element
  bool outer_scales;  // 1d1d: a scale for each rhs row; else one for each 128 of them

  constexpr int math_warpgroups() const { return block_m == 64 ? 1 : 2; }
  constexpr int warpgroup_rows() const { return block_m * warpgroups_n / math_warpgroups(); }
  constexpr int warpgroup_cols() const { return block_n / warpgroups_n; }
  constexpr int threads() const { return 128 * (1 + math_warpgroups()); }

  constexpr int lhs_bytes() const { return block_m * kBlockK; }
  constexpr int rhs_bytes() const { return block_n * kBlockK; }

  // A warp's output goes through strips: 16 rows of 128, 64 or 32 bytes. All of a wave's where they
  // are few, else two: to write one that the copy engine has not read yet takes hundreds of cycles.
  // The largest tile has one, and a fourth stage in place of more.
  constexpr int strip_row_bytes() const {
    return common_divisor(128, warpgroup_cols() * out_bytes);
  }
  constexpr int strip_cols() const { return strip_row_bytes() / out_bytes; }
  constexpr int strip_bytes() const { return kStripRows * strip_row_bytes(); }
  constexpr int strips() const { return warpgroup_cols() / strip_cols(); }
  constexpr int staging_strips() const {
    if (block_m * block_n == 256 * 128) return 1;
    return strips() > 3 ? 2 : strips();
  }
  constexpr int staging_bytes_per_warp() const { return staging_strips() * strip_bytes(); }
  constexpr int staging_bytes() const { return 4 * math_warpgroups() * staging_bytes_per_warp(); }

  // 1d2d: a warpgroup's columns start at a multiple of their number, so that the borders of the
  // 128-wide scale blocks lie on multiples of the common divisor: each segment has one scale. A
  // stage holds a warpgroup's scales of its first and last segment, or the one of its only segment.
  constexpr int scale_segment() const { return common_divisor(warpgroup_cols(), 128); }
  constexpr int warpgroup_scales() const { return warpgroup_cols() == scale_segment() ? 1 : 2; }
  constexpr int rhs_scales() const {
    return outer_scales ? block_n : warpgroups_n * warpgroup_scales();
  }
  constexpr int scale_bytes() const { return block_m * 4 + (rhs_scales() * 4 + 15) / 16 * 16; }

  static constexpr int barrier_bytes(int slots) { return 2 * slots * 8; }
  constexpr int fixed_bytes() const {
    return staging_bytes() + kMailboxSlots * kWorkBytes + barrier_bytes(kMailboxSlots);
  }
  constexpr int stages() const {
    const int fitting = (kMaxSharedBytes - fixed_bytes()) /
                        (lhs_bytes() + rhs_bytes() + scale_bytes() + barrier_bytes(1));
    return fitting < 12 ? fitting : 12;
  }

  constexpr int rhs_offset() const { return stages() * lhs_bytes(); }
  constexpr int staging_offset() const { return rhs_offset() + stages() * rhs_bytes(); }
  constexpr int scale_offset() const { return staging_offset() + staging_bytes(); }
  constexpr int mailbox_offset() const { return scale_offset() + stages() * scale_bytes(); }
  constexpr int stage_barriers_offset() const {
    return mailbox_offset() + kMailboxSlots * kWorkBytes;
  }
  constexpr int mailbox_barriers_offset() const {
    return stage_barriers_offset() + barrier_bytes(stages());
  }
  constexpr int shared_bytes() const {
    return mailbox_barriers_offset() + barrier_bytes(kMailboxSlots);
  }
};

}  // namespace jaxfp8
