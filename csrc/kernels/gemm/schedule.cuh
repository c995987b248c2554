// Which tile comes next.
//
// The output is a list of segments: rectangles of whole output rows that share a group and a range
// of the contraction. Tiles never span segments.
//
//   dense          a segment a batch entry
//   grouped        a segment a group, at any row; then the rows past the last group (no k-blocks)
//   masked         two a group: its valid rows; the rest (no k-blocks)
//   grouped wgrad  a segment a group, each with its own range of the contraction
//
// A segment without k-blocks is stored as zeros, or left alone when accumulating. Tiles are
// numbered through all segments, and cluster c takes tiles c, c + clusters, ... Dense segments are
// equal, so that a division finds a tile's; else every CTA walks the list on the device: lane i of
// the scheduling warp holds segment base + i, and prefix sums over the lanes number the tiles. In a
// segment tiles run in bands of `band` columns of tiles, row by row, so that the CTAs of a wave
// share operands in L2.
//
// Group sizes are not trusted: a negative one counts as zero, and groups end with the last row.
#pragma once
#include <cstdint>

#include "../../ptx/sync.cuh"
#include "../ceil_div.h"
#include "args.cuh"
#include "ring.cuh"

namespace jaxfp8 {

// One tile's work, as the scheduling warp hands it to the others.
struct Work {
  int32_t lhs_row;   // first row in the lhs of all groups
  int32_t rhs_row;   // first row in the rhs of all groups
  int32_t out_row;   // first row in the output of all groups
  int32_t col;       // first output column
  int32_t rows;      // rows to store; a tile beside the segment (of a cluster) has none
  int32_t k_block;   // first
  int32_t k_blocks;  // how many; kEnd: no more tiles
  int32_t group;

  static constexpr int32_t kEnd = -1;
};

// Hands Work from the scheduling warp to every other warp. `full`: the scheduling lane has written
// the slot. `empty`: each reading warp has read it.
struct Mailbox {
  static_assert(sizeof(Work) == kWorkBytes);

  uint32_t slots;  // shared address
  Ring<kMailboxSlots> ring;

  // By one lane.
  __device__ void send(const Work& work) {
    ring.wait_empty();
    const uint32_t slot = slots + ring.slot * sizeof(Work);
    ptx::store_shared_i4(slot, {work.lhs_row, work.rhs_row, work.out_row, work.col});
    ptx::store_shared_i4(slot + 16, {work.rows, work.k_block, work.k_blocks, work.group});
    ptx::mbarrier_arrive(ring.full());
    ring.advance();
  }

  // By a whole warp. The reductions tell the compiler that the fields are the same in all lanes, so
  // that it keeps what follows from them in uniform registers.
  __device__ Work receive(int lane) {
    ring.wait_full();
    const uint32_t slot = slots + ring.slot * sizeof(Work);
    const int4 a = ptx::load_shared_i4(slot);
    const int4 b = ptx::load_shared_i4(slot + 16);
    const Work work = {.lhs_row = uniform(a.x),
                       .rhs_row = uniform(a.y),
                       .out_row = uniform(a.z),
                       .col = uniform(a.w),
                       .rows = uniform(b.x),
                       .k_block = uniform(b.y),
                       .k_blocks = uniform(b.z),
                       .group = uniform(b.w)};
    if (lane == 0) ptx::mbarrier_arrive(ring.empty());
    ring.advance();
    return work;
  }

  __device__ static int uniform(int x) { return __reduce_or_sync(~0u, static_cast<unsigned>(x)); }
};

// Sum of `x` over this lane and those before it, not above `limit`.
__device__ inline uint32_t prefix_sum(uint32_t x, uint32_t limit, int lane) {
  for (int distance = 1; distance < 32; distance *= 2) {
    const uint32_t before = __shfl_up_sync(~0u, x, distance);
    if (lane >= distance) x = min(x + before, limit);
  }
  return x;
}

__device__ inline int num_segments(const GemmArgs& args) {
  switch (args.mode) {
    case kGrouped:
      return args.groups + 1;
    case kMasked:
      return 2 * args.groups;
    default:
      return args.groups;
  }
}

// The size of group `g`, at most `limit`.
__device__ inline uint32_t group_size(const GemmArgs& args, int g, uint32_t limit) {
  return g < args.groups ? min(static_cast<uint32_t>(max(args.group_sizes[g], 0)), limit) : 0;
}

struct Segment {
  int32_t group;
  int32_t rows;     // 0: none
  int32_t lhs_row;  // first rows
  int32_t out_row;
  int32_t k_block;
  int32_t k_blocks;
};

// Rows (or tokens), and blocks of tokens, before the segments that the warp holds.
struct Before {
  uint32_t rows = 0;
  uint32_t k_blocks = 0;
};

// Segment base + lane; `before` moves on to the next 32. By a whole warp.
__device__ inline Segment segment(const GemmArgs& args, int base, int lane, Before& before) {
  const int s = base + lane;
  const uint32_t m = args.m;
  switch (args.mode) {
    case kGrouped: {
      // The segment past the groups takes whatever rows are left.
      const uint32_t size = s == args.groups ? m : group_size(args, s, m);
      const uint32_t end = min(before.rows + prefix_sum(size, m, lane), m);
      uint32_t begin = __shfl_up_sync(~0u, end, 1);
      if (lane == 0) begin = before.rows;
      before.rows = __shfl_sync(~0u, end, 31);
      const int row = begin;
      return {min(s, args.groups - 1),
              static_cast<int>(end - begin),
              row,
              row,
              0,
              s < args.groups ? args.k_blocks : 0};
    }
    case kMasked: {
      const int g = s / 2;
      const int valid = group_size(args, g, m);
      if (g >= args.groups) return {};
      if (s % 2 == 0) {
        return {g, valid, g * args.lhs_group_rows, g * args.m, 0, args.k_blocks};
      }
      return {g, args.m - valid, g * args.lhs_group_rows + valid, g * args.m + valid, 0, 0};
    }
    case kGroupedWgrad: {
      // The contraction has a spare block for each group.
      const uint32_t tokens = (args.k_blocks - args.groups) * 128;
      const uint32_t size = group_size(args, s, tokens);
      const uint32_t end = min(before.rows + prefix_sum(size, tokens, lane), tokens);
      uint32_t begin = __shfl_up_sync(~0u, end, 1);
      if (lane == 0) begin = before.rows;
      before.rows = __shfl_sync(~0u, end, 31);
      const uint32_t blocks = (end - begin + 127) / 128;
      const uint32_t end_block = before.k_blocks + prefix_sum(blocks, ~0u, lane);
      before.k_blocks = __shfl_sync(~0u, end_block, 31);
      if (s >= args.groups) return {};
      return {
          s, args.m, 0, s * args.m, static_cast<int>(end_block - blocks), static_cast<int>(blocks)};
    }
  }
  return {};
}

// ceil(x / 2^shift)
__device__ inline int ceil_shift(int x, int shift) { return (x + (1 << shift) - 1) >> shift; }

// Sends this CTA's tiles, then kEnd. By a whole warp. The first tile is found while the barriers of
// the mailbox are made; that of a dense product in little code, since a launch that finds its code
// in no cache waits for each line of it (benchmarks/NOTES.md).
template <class Tile>
__device__ void schedule(const GemmArgs& args, Mailbox mailbox, int lane) {
  // Of a cluster's sides, which are powers of two.
  const int shift_m = __ffs(args.cluster_m) - 1, shift_n = __ffs(args.cluster_n) - 1;
  const int rank = ptx::cluster_rank();
  const int rank_m = rank >> shift_n, rank_n = rank & (args.cluster_n - 1);
  const uint32_t tiles_n = ceil_shift(ceil_div(args.n, Tile::kBlockN), shift_n);
  const auto tiles_along_m = [&](int rows) {
    return ceil_shift(ceil_div(rows, Tile::kBlockM), shift_m);
  };

  bool mailbox_exists = false;
  const auto send = [&](const Work& work) {
    if (!mailbox_exists) ptx::cluster_wait();
    mailbox_exists = true;
    if (lane == 0) mailbox.send(work);
  };
  const auto send_tile = [&](const Segment& segment, uint32_t index) {
    const uint32_t tiles_of_band = args.band * tiles_along_m(segment.rows);
    const uint32_t band = index / tiles_of_band;
    const uint32_t width = min(args.band, tiles_n - band * args.band);
    const uint32_t in_band = index - band * tiles_of_band;
    const int tile_m = in_band / width;
    const int tile_n = band * args.band + in_band - tile_m * width;
    const int row = ((tile_m << shift_m) + rank_m) * Tile::kBlockM;
    const int col = ((tile_n << shift_n) + rank_n) * Tile::kBlockN;
    send({.lhs_row = segment.lhs_row + row,
          .rhs_row = segment.group * args.rhs_group_rows + col,
          .out_row = segment.out_row + row,
          .col = col,
          .rows = min(segment.rows - row, Tile::kBlockM),
          .k_block = segment.k_block,
          .k_blocks = segment.k_blocks,
          .group = segment.group});
  };

  uint32_t tile = blockIdx.x >> (shift_m + shift_n);
  const uint32_t clusters = gridDim.x >> (shift_m + shift_n);
  if (args.mode == kDense) {
    const uint32_t tiles = tiles_along_m(args.m) * tiles_n;
    for (; tile < args.groups * tiles; tile += clusters) {
      const int group = args.groups == 1 ? 0 : tile / tiles;
      send_tile({group, args.m, group * args.lhs_group_rows, group * args.m, 0, args.k_blocks},
                tile - group * tiles);
    }
  } else {
    uint32_t begin = 0;  // first tile of the 32 segments at hand
    Before before;
    for (int base = 0; base < num_segments(args); base += 32) {
      Segment mine = segment(args, base, lane, before);
      if (mine.k_blocks == 0 && args.flags & kAccumulate) mine.rows = 0;
      const uint32_t my_tiles = tiles_along_m(mine.rows) * tiles_n;
      const uint32_t end = begin + prefix_sum(my_tiles, ~0u, lane);
      for (;; tile += clusters) {
        const uint32_t later = __ballot_sync(~0u, tile < end);
        if (later == 0) break;
        const int owner = __ffs(later) - 1;
        const auto of_owner = [&](int x) { return __shfl_sync(~0u, x, owner); };
        send_tile({of_owner(mine.group), of_owner(mine.rows), of_owner(mine.lhs_row),
                   of_owner(mine.out_row), of_owner(mine.k_block), of_owner(mine.k_blocks)},
                  tile - of_owner(end - my_tiles));
      }
      begin = __shfl_sync(~0u, end, 31);
    }
  }
  send({.k_blocks = Work::kEnd});
}

}  // namespace jaxfp8
