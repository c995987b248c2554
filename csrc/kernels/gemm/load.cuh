// The warps that load: warp 1 the operands, warp 2 the scales.
#pragma once
#include <cstdint>

#include "../../ptx/copy.cuh"
#include "../../ptx/mbarrier.cuh"
#include "../../ptx/sync.cuh"
#include "schedule.cuh"
#include "tile.cuh"

namespace jaxfp8 {

// ---- Warp 1: operands

template <class Tile>
struct Loader {
  const GemmArgs& args;
  typename Tile::Stages stages;
  uint32_t lhs_address, rhs_address;  // where this CTA's part of the operands goes in stage 0
  int lhs_row, rhs_row;  // where that part begins, from the tile's first row and column
  int stage_bytes;

  // The operands of a tile. The whole warp runs the loop, and which operand the cluster shares is
  // decided outside of it: with a branch between two copies, or in a lane that the compiler does
  // not know to be alone, the first would be waited for until the copy engine has accepted it
  // (benchmarks/NOTES.md).
  template <bool kSharedLhs, bool kSharedRhs>
  __device__ __forceinline__ void load(const Work& work) {
    const uint16_t cluster = (1 << args.cluster_m * args.cluster_n) - 1;
    for (int b = 0; b < work.k_blocks; ++b, stages.advance()) {
      const int x = (work.k_block + b) * kBlockK;
      const uint32_t lhs_stage = lhs_address + stages.slot * Tile::kLhsBytes;
      const uint32_t rhs_stage = rhs_address + stages.slot * Tile::kRhsBytes;
      stages.wait_empty();
      if (ptx::elect()) {
        ptx::mbarrier_arrive_expect_tx(stages.full(), stage_bytes);
        ptx::tma_load_2d<kSharedLhs>(lhs_stage, args.lhs_map, x, work.lhs_row + lhs_row,
                                     stages.full(), cluster);
        ptx::tma_load_2d<kSharedRhs>(rhs_stage, args.rhs_map, x, work.rhs_row + rhs_row,
                                     stages.full(), cluster);
      }
      __syncwarp();
    }
  }
};

template <class Tile>
__device__ void load_operands(const GemmArgs& args, uint32_t shared, Mailbox mailbox,
                              typename Tile::Stages stages, int lane) {
  // The CTAs of a cluster share their lhs block or their rhs block; each loads a part.
  const int rank = ptx::cluster_rank();
  const LhsCopies lhs_copies(Tile::kBlockM, Tile::kOuterScales, args.cluster_n, args.lhs_rows);
  const int lhs_row = args.cluster_n > 1 ? rank * lhs_copies.part : 0;
  const int rhs_row = args.cluster_m > 1 ? rank * (Tile::kBlockN / args.cluster_m) : 0;
  Loader<Tile> loader = {
      .args = args,
      .stages = stages,
      .lhs_address = shared + lhs_row * kBlockK,
      .rhs_address = shared + Tile::kRhsOffset + rhs_row * kBlockK,
      .lhs_row = lhs_row,
      .rhs_row = rhs_row,
      .stage_bytes = args.cluster_n * lhs_copies.box * kBlockK + Tile::kRhsBytes};

  ptx::cluster_wait();
  for (;;) {
    const Work work = mailbox.receive(lane);
    if (work.k_blocks == Work::kEnd) break;
    if (args.cluster_n > 1) {
      loader.template load<true, false>(work);
    } else if (args.cluster_m > 1) {
      loader.template load<false, true>(work);
    } else {
      loader.template load<false, false>(work);
    }
  }
  // Until every stage is empty, others of the cluster may still signal this CTA's barriers.
#pragma unroll 1
  for (int i = 0; i < Tile::kStages; ++i, loader.stages.advance()) loader.stages.wait_empty();
}

// ---- Warp 2: scales

template <class Tile>
__device__ void load_scales(const GemmArgs& args, uint32_t shared, Mailbox mailbox,
                            typename Tile::Stages stages, int lane) {
  ptx::cluster_wait();
  for (;;) {
    const Work work = mailbox.receive(lane);
    if (work.k_blocks == Work::kEnd) return;
    typename Tile::Scales::Source source(args, work, lane);
    for (int b = 0; b < work.k_blocks; ++b, stages.advance()) {
      stages.wait_empty();
      source.load_next(shared + Tile::kScaleOffset + stages.slot * Tile::kScaleBytes, lane);
      ptx::cp_async_mbarrier_arrive(stages.full());
    }
  }
}

}  // namespace jaxfp8
