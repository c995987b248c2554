// A ring of slots in shared memory that some warps fill and others empty, in order.
//
// Each slot has two barriers. `full` completes when the slot's contents are there; `empty` when
// every reader is done with them. A party walks the slots with a cursor of its own: the parity of
// its lap says which phase it waits for. A writer's first lap passes at once.
#pragma once
#include <cstdint>

#include "../../ptx/mbarrier.cuh"

namespace jaxfp8 {

template <int kSlots>
struct Ring {
  static constexpr uint32_t kSuspendNs = 10'000'000;  // longer than any wait

  uint32_t barriers;  // shared address: full[kSlots], empty[kSlots]
  uint32_t slot = 0;
  uint32_t lap = 0;  // parity

  __device__ explicit Ring(uint32_t address) : barriers(address) {}

  // One of `parties` threads that make the barriers together, before any use; then a fence, and a
  // barrier of all who use them.
  __device__ void init(int party, int parties, uint32_t full_arrivals,
                       uint32_t empty_arrivals) const {
#pragma unroll 1
    for (int i = party; i < 2 * kSlots; i += parties) {
      ptx::mbarrier_init(barriers + 8 * i, i < kSlots ? full_arrivals : empty_arrivals);
    }
  }

  __device__ uint32_t full() const { return barriers + 8 * slot; }
  __device__ uint32_t empty() const { return barriers + 8 * (kSlots + slot); }

  // A waiting thread is suspended until the slot is ready, instead of polling in shared memory.
  __device__ void wait_full() const {
    while (!ptx::mbarrier_try_wait(full(), lap, kSuspendNs)) {
    }
  }
  __device__ void wait_empty() const {
    while (!ptx::mbarrier_try_wait(empty(), lap ^ 1, kSuspendNs)) {
    }
  }
  // Where a slot is nearly always ready and waking up costs more than polling.
  __device__ void poll_full() const {
    while (!ptx::mbarrier_try_wait(full(), lap)) {
    }
  }
  __device__ void advance() {
    if (++slot == kSlots) {
      slot = 0;
      lap ^= 1;
    }
  }
};

}  // namespace jaxfp8
