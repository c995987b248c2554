// Warpgroup matrix product of FP8 operands. PTX ISA 9.0, section "Asynchronous Warpgroup Level
// Matrix Instructions" (wgmma).
//
// Register i of thread t of the warpgroup (warp w = t / 32 of 4, lane l = t % 32) holds
//   row 16 w + l / 4 + 8 ((i / 2) % 2),  column 8 (i / 4) + 2 (l % 4) + i % 2.
#pragma once
#include <cstdint>

namespace jaxfp8::ptx {

struct E4M3 {};
struct E5M2 {};

// As a descriptor counts a shared address: in 16 bytes.
__device__ __forceinline__ constexpr uint32_t matrix_units(uint32_t bytes) {
  return (bytes & 0x3ffff) >> 4;
}

// Descriptor of a K-major operand: rows of 128 bytes, 128-byte swizzle, so that 8 rows are one
// 1024-byte pattern (the stride offset). The low half holds the address in units.
__device__ __forceinline__ uint64_t matrix_descriptor(uint32_t units) {
  constexpr uint64_t kSwizzle128B = uint64_t{1} << 62;
  constexpr uint64_t kStride = uint64_t{1024 >> 4} << 32;
  return kSwizzle128B | kStride | units;
}

// wgmma.fence: before the first wgmma that touches registers written or read by other instructions.
__device__ __forceinline__ void wgmma_fence() {
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}

// wgmma.commit_group
__device__ __forceinline__ void wgmma_commit_group() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}

// wgmma.wait_group: until at most kPending groups are in flight.
template <int kPending>
__device__ __forceinline__ void wgmma_wait_group() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

// No instruction: the compiler moves no access of these registers across it.
template <int kCount>
__device__ __forceinline__ void pin_registers(float (&d)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) asm volatile("" : "+f"(d[i])::"memory");
}

// wgmma.mma_async m64nNk32: d = a b + (accumulate ? d : 0), N = 2 kRegisters. Overloads below.
template <class Lhs, class Rhs, int kRegisters>
struct Wgmma;

// Operand lists, eight registers a line.
#define JAXFP8_R8 "%0, %1, %2, %3, %4, %5, %6, %7"
#define JAXFP8_R16 JAXFP8_R8 ", %8, %9, %10, %11, %12, %13, %14, %15"
#define JAXFP8_R24 JAXFP8_R16 ", %16, %17, %18, %19, %20, %21, %22, %23"
#define JAXFP8_R32 JAXFP8_R24 ", %24, %25, %26, %27, %28, %29, %30, %31"
#define JAXFP8_R40 JAXFP8_R32 ", %32, %33, %34, %35, %36, %37, %38, %39"
#define JAXFP8_R48 JAXFP8_R40 ", %40, %41, %42, %43, %44, %45, %46, %47"
#define JAXFP8_R56 JAXFP8_R48 ", %48, %49, %50, %51, %52, %53, %54, %55"
#define JAXFP8_R64 JAXFP8_R56 ", %56, %57, %58, %59, %60, %61, %62, %63"
#define JAXFP8_R72 JAXFP8_R64 ", %64, %65, %66, %67, %68, %69, %70, %71"
#define JAXFP8_R80 JAXFP8_R72 ", %72, %73, %74, %75, %76, %77, %78, %79"
#define JAXFP8_R88 JAXFP8_R80 ", %80, %81, %82, %83, %84, %85, %86, %87"
#define JAXFP8_R96 JAXFP8_R88 ", %88, %89, %90, %91, %92, %93, %94, %95"
#define JAXFP8_D8 \
  "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7])
#define JAXFP8_D16                                                                       \
  JAXFP8_D8, "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), \
      "+f"(d[14]), "+f"(d[15])
#define JAXFP8_D24                                                                          \
  JAXFP8_D16, "+f"(d[16]), "+f"(d[17]), "+f"(d[18]), "+f"(d[19]), "+f"(d[20]), "+f"(d[21]), \
      "+f"(d[22]), "+f"(d[23])
#define JAXFP8_D32                                                                          \
  JAXFP8_D24, "+f"(d[24]), "+f"(d[25]), "+f"(d[26]), "+f"(d[27]), "+f"(d[28]), "+f"(d[29]), \
      "+f"(d[30]), "+f"(d[31])
#define JAXFP8_D40                                                                          \
  JAXFP8_D32, "+f"(d[32]), "+f"(d[33]), "+f"(d[34]), "+f"(d[35]), "+f"(d[36]), "+f"(d[37]), \
      "+f"(d[38]), "+f"(d[39])
#define JAXFP8_D48                                                                          \
  JAXFP8_D40, "+f"(d[40]), "+f"(d[41]), "+f"(d[42]), "+f"(d[43]), "+f"(d[44]), "+f"(d[45]), \
      "+f"(d[46]), "+f"(d[47])
#define JAXFP8_D56                                                                          \
  JAXFP8_D48, "+f"(d[48]), "+f"(d[49]), "+f"(d[50]), "+f"(d[51]), "+f"(d[52]), "+f"(d[53]), \
      "+f"(d[54]), "+f"(d[55])
#define JAXFP8_D64                                                                          \
  JAXFP8_D56, "+f"(d[56]), "+f"(d[57]), "+f"(d[58]), "+f"(d[59]), "+f"(d[60]), "+f"(d[61]), \
      "+f"(d[62]), "+f"(d[63])
#define JAXFP8_D72                                                                          \
  JAXFP8_D64, "+f"(d[64]), "+f"(d[65]), "+f"(d[66]), "+f"(d[67]), "+f"(d[68]), "+f"(d[69]), \
      "+f"(d[70]), "+f"(d[71])
#define JAXFP8_D80                                                                          \
  JAXFP8_D72, "+f"(d[72]), "+f"(d[73]), "+f"(d[74]), "+f"(d[75]), "+f"(d[76]), "+f"(d[77]), \
      "+f"(d[78]), "+f"(d[79])
#define JAXFP8_D88                                                                          \
  JAXFP8_D80, "+f"(d[80]), "+f"(d[81]), "+f"(d[82]), "+f"(d[83]), "+f"(d[84]), "+f"(d[85]), \
      "+f"(d[86]), "+f"(d[87])
#define JAXFP8_D96                                                                          \
  JAXFP8_D88, "+f"(d[88]), "+f"(d[89]), "+f"(d[90]), "+f"(d[91]), "+f"(d[92]), "+f"(d[93]), \
      "+f"(d[94]), "+f"(d[95])

// REGISTERS = N / 2; A, B, S: the operand numbers after the registers.
#define JAXFP8_WGMMA(N, REGISTERS, A, B, S, LHS, RHS, TYPES)                                  \
  template <>                                                                                 \
  struct Wgmma<LHS, RHS, REGISTERS> {                                                         \
    __device__ __forceinline__ static void mma(float (&d)[REGISTERS], uint64_t a, uint64_t b, \
                                               int accumulate) {                              \
      asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" #S                                    \
                   ", 0;\n"                                                                   \
                   "wgmma.mma_async.sync.aligned.m64n" #N "k32.f32." TYPES                    \
                   " {" JAXFP8_R##REGISTERS "}, %" #A ", %" #B ", p, 1, 1;\n}\n"              \
                   : JAXFP8_D##REGISTERS                                                      \
                   : "l"(a), "l"(b), "r"(accumulate));                                        \
    }                                                                                         \
  };
#define JAXFP8_WGMMA_TYPES(N, REGISTERS, A, B, S)              \
  JAXFP8_WGMMA(N, REGISTERS, A, B, S, E4M3, E4M3, "e4m3.e4m3") \
  JAXFP8_WGMMA(N, REGISTERS, A, B, S, E5M2, E4M3, "e5m2.e4m3") \
  JAXFP8_WGMMA(N, REGISTERS, A, B, S, E4M3, E5M2, "e4m3.e5m2")
JAXFP8_WGMMA_TYPES(16, 8, 8, 9, 10)
JAXFP8_WGMMA_TYPES(32, 16, 16, 17, 18)
JAXFP8_WGMMA_TYPES(64, 32, 32, 33, 34)
JAXFP8_WGMMA_TYPES(96, 48, 48, 49, 50)
JAXFP8_WGMMA_TYPES(128, 64, 64, 65, 66)
JAXFP8_WGMMA_TYPES(160, 80, 80, 81, 82)
JAXFP8_WGMMA_TYPES(192, 96, 96, 97, 98)
#undef JAXFP8_WGMMA_TYPES
#undef JAXFP8_WGMMA
#undef JAXFP8_R8
#undef JAXFP8_D8
#undef JAXFP8_R16
#undef JAXFP8_D16
#undef JAXFP8_R24
#undef JAXFP8_D24
#undef JAXFP8_R32
#undef JAXFP8_D32
#undef JAXFP8_R40
#undef JAXFP8_D40
#undef JAXFP8_R48
#undef JAXFP8_D48
#undef JAXFP8_R56
#undef JAXFP8_D56
#undef JAXFP8_R64
#undef JAXFP8_D64
#undef JAXFP8_R72
#undef JAXFP8_D72
#undef JAXFP8_R80
#undef JAXFP8_D80
#undef JAXFP8_R88
#undef JAXFP8_D88
#undef JAXFP8_R96
#undef JAXFP8_D96

}  // namespace jaxfp8::ptx
