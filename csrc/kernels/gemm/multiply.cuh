// The math warpgroups: products, promotion to float32, and the tile's way to the epilogue.
#pragma once
#include <cstdint>

#include "../../ptx/mbarrier.cuh"
#include "../../ptx/sync.cuh"
#include "../../ptx/wgmma.cuh"
#include "epilogue.cuh"
#include "row_scales.cuh"
#include "schedule.cuh"
#include "tile.cuh"

namespace jaxfp8 {

// The products of one 128-wide block of one 64-row wave: four wgmma, one commit group.
template <class Tile>
__device__ __forceinline__ void issue_products(float (&acc)[Tile::kSums], uint64_t lhs_descriptor,
                                               uint64_t rhs_descriptor) {
  constexpr uint64_t kStep = ptx::matrix_units(32);  // of the contraction, for one wgmma
  ptx::pin_registers(acc);
  ptx::wgmma_fence();
#pragma unroll
  for (int k = 0; k < kBlockK / 32; ++k) {
    ptx::Wgmma<typename Tile::Lhs, typename Tile::Rhs, Tile::kSums>::mma(
        acc, lhs_descriptor + k * kStep, rhs_descriptor + k * kStep, k > 0);
  }
  ptx::wgmma_commit_group();
  ptx::pin_registers(acc);
}

// Where a math warp finds what it needs of a stage.
struct Block {
  uint64_t lhs_descriptor, rhs_descriptor;  // of the warpgroup's first rows
  uint32_t scales;
  uint32_t released;  // lane i: barrier `empty` in CTA i of the cluster
};

// The math of a warp. Between the end of its products and its next ones a warpgroup keeps no tensor
// core busy, so that scales are read after products are issued (but where kReadFirst says that the
// second wgmma would come too late), and the next block's addresses are computed before their end;
// not with two sets and one wave, where 1d1d would spill.
template <class Tile>
struct Consumer {
  using Scales = typename Tile::Scales;
  using Columns = typename Scales::Columns;
  using Factors = typename Scales::Factors;
  using Sums = float[Tile::kSums];

  const GemmArgs& args;
  typename Tile::Stages stages;
  uint32_t lhs_units, rhs_units;  // Block's, of stage 0, in a descriptor's units
  uint32_t scales, released;      // Block's, of stage 0
  int row, col;                   // of the tile, this warp's first
  int lane;
  int tile_col = 0;  // of the output, the tile's first

  // Of the current stage.
  __device__ __forceinline__ Block block() const {
    const uint32_t slot = stages.slot;
    return {.lhs_descriptor =
                ptx::matrix_descriptor(lhs_units + slot * ptx::matrix_units(Tile::kLhsBytes)),
            .rhs_descriptor =
                ptx::matrix_descriptor(rhs_units + slot * ptx::matrix_units(Tile::kRhsBytes)),
            .scales = scales + slot * Tile::kScaleBytes,
            .released = released + slot * 8};
  }

  __device__ __forceinline__ float2 row_scales(const Block& block, int wave) const {
    return RowScales<Tile::kBlockM>::read(block.scales, row + wave * 64, lane);
  }
  __device__ __forceinline__ Columns column_scales(const Block& block) const {
    return Columns(block.scales, col, tile_col, lane);
  }

  __device__ __forceinline__ void issue(Sums& acc, const Block& block, int wave) {
    issue_products<Tile>(acc, block.lhs_descriptor + wave * ptx::matrix_units(64 * kBlockK),
                         block.rhs_descriptor);
  }

  __device__ __forceinline__ void finish(Sums& acc) {
    ptx::wgmma_wait_group<0>();
    ptx::pin_registers(acc);
  }

  // This warp is done with the stage, here and in the other CTAs of the cluster.
  __device__ __forceinline__ void release(const Block& block) {
    __syncwarp();
    if (lane < args.cluster_m * args.cluster_n) ptx::mbarrier_arrive_cluster(block.released);
  }

  // One set: waits for a wave's products, then promotes them.
  __device__ __forceinline__ void accumulate_in_one_set(Sums (&sum)[Tile::kWaves], int k_blocks) {
    Block current = block();
#pragma unroll Scales::kUnroll
    for (int b = 0; b < k_blocks; ++b) {
      stages.wait_full();
      Block next;
#pragma unroll
      for (int wave = 0; wave < Tile::kWaves; ++wave) {
        const bool last = wave == Tile::kWaves - 1;
        Sums acc;
        float2 rows;
        Columns columns;
        const auto read_scales = [&] {
          rows = row_scales(current, wave);
          columns = column_scales(current);
        };
        if (Scales::kReadFirst) read_scales();
        issue(acc, current, wave);
        if (!Scales::kReadFirst) read_scales();
        const Factors factors(rows, columns);
        if (last) {
          stages.advance();
          next = block();
        }
        finish(acc);
        if (last && !Scales::kPromotionReadsStage) release(current);
        Scales::promote(sum[wave], acc, factors);
        if (last && Scales::kPromotionReadsStage) release(current);
      }
      current = next;
    }
  }

  // Two sets: a block's products run while the block before is promoted. No group is in flight
  // across a loop's back edge, where ptxas would serialize them all; so blocks go in pairs.
  __device__ __forceinline__ void accumulate_in_two_sets(Sums& sum, int k_blocks) {
    Sums even, odd;
    stages.poll_full();
    Block current = block();
    issue(even, current, 0);
    Factors factors(row_scales(current, 0), column_scales(current));
    finish(even);
    if (!Scales::kPromotionReadsStage) release(current);
    stages.advance();

    // Issues the next block into `coming`, promotes `done` under it, and waits.
    const auto turn = [&](Sums& coming, Sums& done) __attribute__((always_inline)) {
      stages.poll_full();
      const Block next = block();
      issue(coming, next, 0);
      const Factors next_factors(row_scales(next, 0), column_scales(next));
      stages.advance();
      Scales::promote(sum, done, factors);
      if (Scales::kPromotionReadsStage) release(current);
      finish(coming);
      if (!Scales::kPromotionReadsStage) release(next);
      factors = next_factors;
      current = next;
    };
    int b = 1;
    for (; b + 1 < k_blocks; b += 2) {
      turn(odd, even);
      turn(even, odd);
    }
    if (b < k_blocks) {
      turn(odd, even);
      Scales::promote(sum, odd, factors);
    } else {
      Scales::promote(sum, even, factors);
    }
    if (Scales::kPromotionReadsStage) release(current);
  }

  // Two sets, two waves: each wave has its set, and is promoted while the other's products run.
  // Both use one read of the column scales.
  __device__ __forceinline__ void accumulate_in_two_waves(Sums (&sum)[2], int k_blocks) {
    static_assert(!Scales::kPromotionReadsStage || Tile::kSets == 1 || Tile::kWaves == 1);
    Sums upper, lower;
    Block current = block();
    stages.wait_full();
    issue(upper, current, 0);
    float2 rows = row_scales(current, 0);
    Columns columns = column_scales(current);
    Factors upper_factors(rows, columns);
    finish(upper);
    for (int b = 1;; ++b) {
      issue(lower, current, 1);
      rows = row_scales(current, 1);
      stages.advance();
      const Block next = block();
      Scales::promote(sum[0], upper, upper_factors);
      const Factors lower_factors(rows, columns);
      finish(lower);
      release(current);
      if (b == k_blocks) {
        Scales::promote(sum[1], lower, lower_factors);
        return;
      }
      current = next;
      stages.wait_full();
      issue(upper, current, 0);
      rows = row_scales(current, 0);
      Scales::promote(sum[1], lower, lower_factors);
      columns = column_scales(current);
      upper_factors = Factors(rows, columns);
      finish(upper);
    }
  }

  // Where nothing of the tile is this warpgroup's: its stages go by.
  __device__ __forceinline__ void skip(int k_blocks) {
#pragma unroll 1
    for (int b = 0; b < k_blocks; ++b, stages.advance()) {
      stages.wait_full();
      release(block());
    }
  }

  __device__ __forceinline__ void accumulate(Sums (&sum)[Tile::kWaves], int k_blocks) {
    if constexpr (Tile::kSets == 1) {
      accumulate_in_one_set(sum, k_blocks);
    } else if constexpr (Tile::kWaves == 1) {
      accumulate_in_two_sets(sum[0], k_blocks);
    } else {
      accumulate_in_two_waves(sum, k_blocks);
    }
  }
};

// Zeros in the rows of the stages' lhs blocks that no copy writes, since the operand has fewer: the
// tensor cores read them all the same. By all math warps, before the first products.
template <class Tile>
__device__ void clear_rows_past_lhs(const GemmArgs& args, uint32_t shared) {
  if (args.lhs_rows >= Tile::kBlockM) return;
  const LhsCopies copies(Tile::kBlockM, Tile::kOuterScales, args.cluster_n, args.lhs_rows);
  constexpr int kMathThreads = 32 * Tile::kMathWarps, kChunks = kBlockK / 16;
  const int thread = threadIdx.x % kMathThreads;
#pragma unroll 1
  for (int row = thread / kChunks; row < Tile::kBlockM; row += kMathThreads / kChunks) {
    if (copies.include(row, args.cluster_n)) continue;
    const uint32_t target = shared + row * kBlockK + thread % kChunks * 16;
#pragma unroll
    for (int stage = 0; stage < Tile::kStages; ++stage) {
      ptx::store_shared_i4(target + stage * Tile::kLhsBytes, {0, 0, 0, 0});
    }
  }
  ptx::fence_proxy_async();
  ptx::barrier_sync(1, kMathThreads);
}

template <class Tile>
__device__ void compute(const GemmArgs& args, uint32_t shared, Mailbox mailbox,
                        typename Tile::Stages stages, int warpgroup, int warp, int lane) {
  const int first_row = warpgroup / Tile::kLayout.warpgroups_n * Tile::kRows;
  const int first_col = warpgroup % Tile::kLayout.warpgroups_n * Tile::kCols;
  const int cluster_size = args.cluster_m * args.cluster_n;
  Consumer<Tile> consumer = {
      .args = args,
      .stages = stages,
      .lhs_units = ptx::matrix_units(shared + first_row * kBlockK),
      .rhs_units = ptx::matrix_units(shared + Tile::kRhsOffset + first_col * kBlockK),
      .scales = shared + Tile::kScaleOffset,
      .released = ptx::mapa(stages.barriers + 8 * Tile::kStages, lane < cluster_size ? lane : 0),
      .row = first_row + warp * 16,
      .col = first_col,
      .lane = lane};
  const Staging<Tile> staging = {
      shared + Tile::kLayout.staging_offset() +
          (warpgroup * 4 + warp) * Tile::kLayout.staging_bytes_per_warp(),
      lane};
  if constexpr (!Tile::kOuterScales) clear_rows_past_lhs<Tile>(args, shared);
  ptx::cluster_wait();
  for (;;) {
    const Work work = mailbox.receive(lane);
    if (work.k_blocks == Work::kEnd) break;
    // The last rows of a group, and the last columns, may be the other warpgroup's alone. 1d1d has
    // such tiles at the output's edges only, and its 128x128 was slower by 1.6 % with this test.
    if constexpr (Tile::kMathWarpgroups == 2 && !Tile::kOuterScales) {
      if (work.rows <= first_row || args.n <= work.col + first_col) {
        consumer.skip(work.k_blocks);
        continue;
      }
    }
    consumer.tile_col = work.col;
    float sum[Tile::kWaves][Tile::kSums] = {};
    if (work.k_blocks > 0) consumer.accumulate(sum, work.k_blocks);
    store<Tile>(args, work, sum[0], consumer.row, first_col, staging, lane);
    if constexpr (Tile::kWaves == 2) {
      store<Tile>(args, work, sum[1], consumer.row + 64, first_col, staging, lane);
    }
  }
  if (lane == 0) ptx::bulk_wait_read<0>();  // shared memory must outlive the copies that read it
}

}  // namespace jaxfp8
