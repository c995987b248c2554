// FP8 block-scaled GEMM for Hopper: out = sum over 128-wide blocks b of the contraction of
//   scale(row, col, b) * (lhs block . rhs block),
// the products in the tensor cores, the sum over b in float32 registers. scales_1d2d.cuh and
// scales_1d1d.cuh say what the scales are.
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

#include "../../ptx/copy.cuh"
#include "../../ptx/mbarrier.cuh"
#include "../../ptx/sync.cuh"
#include "load.cuh"
#include "multiply.cuh"
#include "schedule.cuh"
#include "tile.cuh"

namespace jaxfp8 {

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

// JAXFP8_GEMM(name of the kernel, arguments of Tile)
#define JAXFP8_GEMM(name, ...)                                                         \
  extern "C" __global__ void __launch_bounds__(jaxfp8::Tile<__VA_ARGS__>::kThreads, 1) \
      name(const __grid_constant__ jaxfp8::ptx::TensorMap lhs_map,                     \
           const __grid_constant__ jaxfp8::ptx::TensorMap rhs_map,                     \
           const __grid_constant__ jaxfp8::ptx::TensorMap out_map,                     \
           const __grid_constant__ jaxfp8::GemmParams params) {                        \
    jaxfp8::gemm<jaxfp8::Tile<__VA_ARGS__>>({params, &lhs_map, &rhs_map, &out_map});   \
  }

}  // namespace jaxfp8
