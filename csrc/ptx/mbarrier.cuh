// Memory barriers in shared memory. PTX ISA 9.0, section "Parallel Synchronization and
// Communication Instructions: mbarrier". `bar` is a shared::cta address.
#pragma once
#include <cstdint>

namespace jaxfp8::ptx {

// mbarrier.init: a phase completes after `count` arrivals and when its transaction count is zero.
__device__ __forceinline__ void mbarrier_init(uint32_t bar, uint32_t count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(bar), "r"(count) : "memory");
}

// fence.mbarrier_init: makes prior inits visible to the cluster and to the copy engine.
__device__ __forceinline__ void fence_mbarrier_init() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

// mbarrier.arrive: one arrival, releasing this thread's earlier accesses.
__device__ __forceinline__ void mbarrier_arrive(uint32_t bar) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(bar) : "memory");
}

// mbarrier.arrive on a barrier of any CTA of the cluster; `bar` comes from mapa(). Of the default
// scope: a release to the whole cluster costs a GPU-wide memory barrier, and the slots that these
// arrivals free have been read, which orders nothing but the arrival itself.
__device__ __forceinline__ void mbarrier_arrive_cluster(uint32_t bar) {
  asm volatile("mbarrier.arrive.shared::cluster.b64 _, [%0];" ::"r"(bar) : "memory");
}

// mbarrier.arrive.expect_tx: one arrival, and `bytes` more for the phase to wait for.
__device__ __forceinline__ void mbarrier_arrive_expect_tx(uint32_t bar, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(bar), "r"(bytes)
               : "memory");
}

// mbarrier.try_wait.parity: whether the phase of this parity has completed. May return false at any
// time, so it belongs in a loop. The thread is suspended meanwhile, for a short time that the
// hardware chooses, or for `nanoseconds`.
__device__ __forceinline__ bool mbarrier_try_wait(uint32_t bar, uint32_t parity) {
  uint32_t done;
  asm volatile(
      "{\n"
      ".reg .pred p;\n"
      "mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n"
      "selp.u32 %0, 1, 0, p;\n"
      "}\n"
      : "=r"(done)
      : "r"(bar), "r"(parity)
      : "memory");
  return done;
}
__device__ __forceinline__ bool mbarrier_try_wait(uint32_t bar, uint32_t parity,
                                                  uint32_t nanoseconds) {
  uint32_t done;
  asm volatile(
      "{\n"
      ".reg .pred p;\n"
      "mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2, %3;\n"
      "selp.u32 %0, 1, 0, p;\n"
      "}\n"
      : "=r"(done)
      : "r"(bar), "r"(parity), "r"(nanoseconds)
      : "memory");
  return done;
}

// cp.async.mbarrier.arrive.noinc: this thread's arrival, made when its earlier cp.async copies have
// landed. It counts among the arrivals that the barrier was initialized for.
__device__ __forceinline__ void cp_async_mbarrier_arrive(uint32_t bar) {
  asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(bar) : "memory");
}

}  // namespace jaxfp8::ptx
