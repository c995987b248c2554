// Warp roles, clusters and fences. PTX ISA 9.0; each wrapper names its instruction.
#pragma once
#include <cstdint>

namespace jaxfp8::ptx {

// setmaxnreg: the warpgroup's registers per thread from here on. `dec` frees, `inc` waits for them.
template <int kRegisters>
__device__ __forceinline__ void setmaxnreg_dec() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
template <int kRegisters>
__device__ __forceinline__ void setmaxnreg_inc() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

// %cluster_ctarank
__device__ __forceinline__ uint32_t cluster_rank() {
  uint32_t rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}

// barrier.cluster.arrive.relaxed: orders no memory accesses. With fence.mbarrier_init before it, it
// publishes those barriers; a releasing arrival would wait for all of the thread's accesses.
__device__ __forceinline__ void cluster_arrive_relaxed() {
  asm volatile("barrier.cluster.arrive.relaxed;" ::: "memory");
}

// barrier.cluster.wait: until all threads of all CTAs of the cluster have arrived.
__device__ __forceinline__ void cluster_wait() {
  asm volatile("barrier.cluster.wait;" ::: "memory");
}

// bar.sync: until `threads` of the CTA (whole warps) have arrived at barrier `id`; 0 is
// __syncthreads's. Orders their shared-memory accesses.
__device__ __forceinline__ void barrier_sync(int id, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// elect.sync: true in one lane of the warp. The compiler knows that what follows is done once.
__device__ __forceinline__ bool elect() {
  uint32_t elected;
  asm volatile(
      "{\n"
      ".reg .pred p;\n"
      "elect.sync _|p, 0xffffffff;\n"
      "selp.u32 %0, 1, 0, p;\n"
      "}\n"
      : "=r"(elected));
  return elected;
}

// mapa: the address in CTA `rank` of the cluster that corresponds to this CTA's `address`.
__device__ __forceinline__ uint32_t mapa(uint32_t address, uint32_t rank) {
  uint32_t mapped;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(mapped) : "r"(address), "r"(rank));
  return mapped;
}

// fence.proxy.async: orders this thread's ordinary shared-memory accesses before those of the copy
// engine and the tensor cores.
__device__ __forceinline__ void fence_proxy_async() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

}  // namespace jaxfp8::ptx
