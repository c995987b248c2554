// FP8 block-scaled GEMM for Hopper: out = sum over 128-wide blocks b of the contraction of
//   scale(row, col, b) * (lhs block . rhs block),
// the products in the tensor cores, the sum over b in float32 registers. gemm_1d2d.cuh and
// gemm_1d1d.cuh say what the scales are.
//
// A persistent CTA an SM. Warpgroup 0 feeds, the others compute:
//
//   warp 0   schedules: writes each tile's Work to the mailbox
//   warp 1   loads: TMA of the lhs and rhs blocks into the ring of stages (128-byte swizzle)
//   warp 2   loads the stage's scales, 4 bytes at a time, so that no row start is misaligned
//   math     wgmma m64nNk32, promotion to float32 with the scales, epilogue
//
// What protects what:
//
// - stage.full: the stage's operands (transaction bytes) and scales (32 lanes of warp 2) are there.
// - stage.empty: every math warp of the cluster is done with the stage. Of the cluster, since a
//   CTA's loads are multicast into the others' stages; warp 1 leaves when all stages are empty.
// - mailbox: see schedule.cuh.
// - staging: each warp's own; its lane 0 waits until the copy engine has read the strips.
//
// With two accumulator sets (kSets = 2) a warpgroup promotes block k while its own wgmma of block
// k + 1 runs. With one set only the other warpgroup's wgmma runs meanwhile; the registers go into
// a larger tile, which reads less shared memory and L2 per product.
//
// Clusters of one row or one column: CTAs along N share their lhs block, CTAs along M their rhs
// block. Each loads its part of a shared block and multicasts it.
#pragma once
#include <cstdint>

#include "../ptx/copy.cuh"
#include "../ptx/mbarrier.cuh"
#include "../ptx/sync.cuh"
#include "../ptx/wgmma.cuh"
#include "epilogue.cuh"
#include "gemm_args.cuh"
#include "ring.cuh"
#include "schedule.cuh"

namespace jaxfp8 {

// Whether a kind of scales has one for each rhs row (gemm_1d1d.cuh) or one for each 128 of them.
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
  static constexpr int kRhs = kLayout.rhs_offset();
  static constexpr int kScale = kLayout.scale_offset();
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

// ---- Warp 1: operands

template <class Tile>
struct Loader {
  const GemmArgs& args;
  typename Tile::Stages stages;
  uint32_t lhs, rhs;     // where this CTA's part of the operands goes in stage 0
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
      const uint32_t lhs_stage = lhs + stages.slot * Tile::kLhsBytes;
      const uint32_t rhs_stage = rhs + stages.slot * Tile::kRhsBytes;
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
  Loader<Tile> loader = {args,
                         stages,
                         shared + lhs_row * kBlockK,
                         shared + Tile::kRhs + rhs_row * kBlockK,
                         lhs_row,
                         rhs_row,
                         args.cluster_n * lhs_copies.box * kBlockK + Tile::kRhsBytes};

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

// The lhs scales of a stage: row r of the tile at float 16 (r / 16) + 2 (r % 8) + (r / 8) % 2, so
// that the two rows of a wgmma lane lie together. Rows past the operand's end get zero. A lane
// takes rows lane, lane + 32, ...: with constant distances both here and there, a copy is one
// instruction.
template <int kBlockM>
struct RowScales {
  const float* source;  // of this lane's first row
  int64_t stride;
  uint32_t target;
  int rows;  // from the lane's first on

  __device__ RowScales(const float* scale, int all_rows, int first_row, int k_block, int lane)
      : source(scale + int64_t{k_block} * all_rows + first_row + lane),
        stride(all_rows),
        target(4 * (lane / 16 * 16 + lane % 8 * 2 + lane / 8 % 2)),
        rows(all_rows - first_row - lane) {}

  // Into the stage at this shared address, then on to the next block.
  __device__ void load_next(uint32_t stage) {
#pragma unroll
    for (int i = 0; i < kBlockM; i += 32) {
      ptx::cp_async_4(stage + target + 4 * i, source + i, i < rows ? 4 : 0);
    }
    source += stride;
  }

  // The scales of rows `row` + lane / 4 and 8 further; `row` is a multiple of 16.
  __device__ static __forceinline__ float2 read(uint32_t stage, int row, int lane) {
    return ptx::load_shared_f2(stage + 4 * row + lane / 4 * 8);
  }
};

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
      source.load_next(shared + Tile::kScale + stages.slot * Tile::kScaleBytes, lane);
      ptx::cp_async_mbarrier_arrive(stages.full());
    }
  }
}

// ---- Math warpgroups

// The products of one 128-wide block of one 64-row wave: four wgmma, one commit group.
// `lhs`, `rhs`: descriptors.
template <class Tile>
__device__ __forceinline__ void issue_products(float (&acc)[Tile::kSums], uint64_t lhs,
                                               uint64_t rhs) {
  constexpr uint64_t kStep = ptx::matrix_units(32);  // of the contraction, for one wgmma
  ptx::pin_registers(acc);
  ptx::wgmma_fence();
#pragma unroll
  for (int k = 0; k < kBlockK / 32; ++k) {
    ptx::Wgmma<typename Tile::Lhs, typename Tile::Rhs, Tile::kSums>::mma(acc, lhs + k * kStep,
                                                                         rhs + k * kStep, k > 0);
  }
  ptx::wgmma_commit_group();
  ptx::pin_registers(acc);
}

// Where a math warp finds what it needs of a stage.
struct Block {
  uint64_t lhs, rhs;  // descriptors of the warpgroup's first rows
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
  uint32_t lhs, rhs, scales, released;  // Block's, of stage 0; lhs and rhs in a descriptor's units
  int row, col;                         // of the tile, this warp's first
  int lane;
  int tile_col = 0;  // of the output, the tile's first

  // Of the current stage.
  __device__ __forceinline__ Block block() const {
    const uint32_t slot = stages.slot;
    return {ptx::matrix_descriptor(lhs + slot * ptx::matrix_units(Tile::kLhsBytes)),
            ptx::matrix_descriptor(rhs + slot * ptx::matrix_units(Tile::kRhsBytes)),
            scales + slot * Tile::kScaleBytes, released + slot * 8};
  }

  __device__ __forceinline__ float2 row_scales(const Block& block, int wave) const {
    return RowScales<Tile::kBlockM>::read(block.scales, row + wave * 64, lane);
  }
  __device__ __forceinline__ Columns column_scales(const Block& block) const {
    return Columns(block.scales, col, tile_col, lane);
  }

  __device__ __forceinline__ void issue(Sums& acc, const Block& block, int wave) {
    issue_products<Tile>(acc, block.lhs + wave * ptx::matrix_units(64 * kBlockK), block.rhs);
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
      args,
      stages,
      ptx::matrix_units(shared + first_row * kBlockK),
      ptx::matrix_units(shared + Tile::kRhs + first_col * kBlockK),
      shared + Tile::kScale,
      ptx::mapa(stages.barriers + 8 * Tile::kStages, lane < cluster_size ? lane : 0),
      first_row + warp * 16,
      first_col,
      lane};
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

// ---- The kernel

template <class Tile>
__device__ __forceinline__ void gemm(const GemmArgs& args) {
  extern __shared__ __align__(1024) uint8_t memory[];
  const uint32_t shared = ptx::shared_address(memory);
  const int warp = __shfl_sync(~0u, threadIdx.x / 32, 0);
  const int lane = threadIdx.x % 32;

  constexpr TileLayout kLayout = Tile::kLayout;
  const typename Tile::Stages stages(shared + kLayout.stage_barriers_offset());
  const Mailbox mailbox = {shared + kLayout.mailbox_offset(),
                           Ring<kMailboxSlots>(shared + kLayout.mailbox_barriers_offset())};
  if (ptx::elect()) {
    if (warp == 0) ptx::prefetch_tensor_map(args.lhs_map);
    if (warp == 1) ptx::prefetch_tensor_map(args.rhs_map);
    if (warp == 2 && args.flags & kOutTensorMap) ptx::prefetch_tensor_map(args.out_map);
    // full: warp 1's arrival with the bytes to expect, and warp 2's lanes.
    stages.init(warp, Tile::kThreads / 32, 1 + 32,
                Tile::kMathWarps * args.cluster_m * args.cluster_n);
    mailbox.ring.init(warp, Tile::kThreads / 32, 1, 2 + Tile::kMathWarps);
    ptx::fence_mbarrier_init();
  }
  // Of the cluster: no CTA may signal another's barriers before they exist. Each warp waits for it
  // where it first needs them.
  __syncwarp();
  ptx::cluster_arrive_relaxed();

  constexpr bool kMoveRegisters = Tile::kMathWarpgroups == 2;  // else each thread may have 255
  if (warp < 4) {
    if constexpr (kMoveRegisters) ptx::setmaxnreg_dec<40>();
    if (warp == 0) {
      schedule<Tile>(args, mailbox, lane);
    } else if (warp == 1) {
      load_operands<Tile>(args, shared, mailbox, stages, lane);
    } else if (warp == 2) {
      load_scales<Tile>(args, shared, mailbox, stages, lane);
    } else {
      ptx::cluster_wait();
    }
  } else {
    if constexpr (kMoveRegisters) ptx::setmaxnreg_inc<232>();
    compute<Tile>(args, shared, mailbox, stages, warp / 4 - 1, warp % 4, lane);
  }
}

#define JAXFP8_GEMM(name, ...)                                                                     \
  extern "C" __global__ void __launch_bounds__(jaxfp8::Tile<__VA_ARGS__>::kThreads, 1)             \
      name(const __grid_constant__ jaxfp8::ptx::TensorMap lhs_map,                                 \
           const __grid_constant__ jaxfp8::ptx::TensorMap rhs_map,                                 \
           const __grid_constant__ jaxfp8::ptx::TensorMap out_map, const float* lhs_scale,         \
           const float* rhs_scale, const int32_t* group_sizes, void* out, int32_t mode, int32_t m, \
           int32_t n, int32_t groups, int32_t k_blocks, int32_t lhs_rows, int32_t rhs_rows,        \
           int32_t lhs_group_rows, int32_t rhs_group_rows, int32_t cluster_m, int32_t cluster_n,   \
           int32_t band, int32_t flags) {                                                          \
    jaxfp8::gemm<jaxfp8::Tile<__VA_ARGS__>>(                                                       \
        {&lhs_map,       &rhs_map,  &out_map,  lhs_scale, rhs_scale,                               \
         group_sizes,    out,       mode,      m,         n,                                       \
         groups,         k_blocks,  lhs_rows,  rhs_rows,  lhs_group_rows,                          \
         rhs_group_rows, cluster_m, cluster_n, band,      flags});                                 \
  }

}  // namespace jaxfp8
