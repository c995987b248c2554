// Global memory.
#pragma once
#include <cstdint>

namespace jaxfp8::ptx {

// st.global.v2: 8 bytes, at an address that is a multiple of 8.
__device__ __forceinline__ void store_global_f2(void* address, float2 value) {
  asm volatile("st.global.v2.f32 [%0], {%1, %2};" ::"l"(address), "f"(value.x), "f"(value.y)
               : "memory");
}

// red (PTX ISA 9.0, section "Parallel Synchronization and Communication Instructions: red"): adds
// two floats in memory, at an address that is a multiple of 8.
__device__ __forceinline__ void red_add_v2_f32(float* address, float2 value) {
  asm volatile("red.relaxed.gpu.global.add.v2.f32 [%0], {%1, %2};" ::"l"(address), "f"(value.x),
               "f"(value.y)
               : "memory");
}

}  // namespace jaxfp8::ptx
