// Conversions, and the arithmetic of which every bit matters. One instruction each; operands are
// named as in the PTX ISA, of which the section is cited.
#pragma once
#include <cstdint>

namespace jaxfp8::ptx {

// Data Movement and Conversion Instructions, cvt: a becomes the upper byte, b the lower. Saturates
// to the largest finite value; NaN becomes 0x7f in both formats.
__device__ __forceinline__ uint16_t cvt_rn_satfinite_e4m3x2_f32(float a, float b) {
  uint16_t d;
  asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(d) : "f"(a), "f"(b));
  return d;
}

__device__ __forceinline__ uint16_t cvt_rn_satfinite_e5m2x2_f32(float a, float b) {
  uint16_t d;
  asm("cvt.rn.satfinite.e5m2x2.f32 %0, %1, %2;" : "=h"(d) : "f"(a), "f"(b));
  return d;
}

// Data Movement and Conversion Instructions, cvt: exact; the lower byte becomes the lower half. NaN
// stays NaN.
__device__ __forceinline__ uint32_t cvt_rn_f16x2_e4m3x2(uint16_t a) {
  uint32_t d;
  asm("cvt.rn.f16x2.e4m3x2 %0, %1;" : "=r"(d) : "h"(a));
  return d;
}

__device__ __forceinline__ uint32_t cvt_rn_f16x2_e5m2x2(uint16_t a) {
  uint32_t d;
  asm("cvt.rn.f16x2.e5m2x2 %0, %1;" : "=r"(d) : "h"(a));
  return d;
}

// Data Movement and Conversion Instructions, cvt: exact.
__device__ __forceinline__ float cvt_f32_f16(uint16_t a) {
  float d;
  asm("cvt.f32.f16 %0, %1;" : "=f"(d) : "h"(a));
  return d;
}

// Data Movement and Conversion Instructions, cvt: a becomes the upper half, b the lower.
__device__ __forceinline__ uint32_t cvt_rn_bf16x2_f32(float a, float b) {
  uint32_t d;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(d) : "f"(a), "f"(b));
  return d;
}

// Floating Point Instructions, fma: with .ftz a subnormal operand or result is a zero of the same
// sign.
__device__ __forceinline__ float fma_rn_ftz_f32(float a, float b, float c) {
  float d;
  asm("fma.rn.ftz.f32 %0, %1, %2, %3;" : "=f"(d) : "f"(a), "f"(b), "f"(c));
  return d;
}

// Floating Point Instructions, mul: subnormals kept, never contracted with an addition.
__device__ __forceinline__ float mul_rn_f32(float a, float b) {
  float d;
  asm("mul.rn.f32 %0, %1, %2;" : "=f"(d) : "f"(a), "f"(b));
  return d;
}

// Floating Point Instructions, rcp: correctly rounded.
__device__ __forceinline__ float rcp_rn_f32(float a) {
  float d;
  asm("rcp.rn.f32 %0, %1;" : "=f"(d) : "f"(a));
  return d;
}

// Floating Point Instructions, add.
__device__ __forceinline__ float add_rn_f32(float a, float b) {
  float d;
  asm("add.rn.f32 %0, %1, %2;" : "=f"(d) : "f"(a), "f"(b));
  return d;
}

// Floating Point Instructions, fma: subnormals kept.
__device__ __forceinline__ float fma_rn_f32(float a, float b, float c) {
  float d;
  asm("fma.rn.f32 %0, %1, %2, %3;" : "=f"(d) : "f"(a), "f"(b), "f"(c));
  return d;
}

// Floating Point Instructions, min: of a number and NaN, the number.
__device__ __forceinline__ float min_f32(float a, float b) {
  float d;
  asm("min.f32 %0, %1, %2;" : "=f"(d) : "f"(a), "f"(b));
  return d;
}

// Floating Point Instructions, ex2: 2^a with a relative error of at most 2^-22; subnormal operands
// and results are zeros.
__device__ __forceinline__ float ex2_approx_ftz_f32(float a) {
  float d;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(d) : "f"(a));
  return d;
}

// Floating Point Instructions, rcp: 1 / a with an error of at most 1 ulp; subnormal operands and
// results are zeros.
__device__ __forceinline__ float rcp_approx_ftz_f32(float a) {
  float d;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(d) : "f"(a));
  return d;
}

// Integer Arithmetic Instructions, max: of the unsigned 16-bit halves.
__device__ __forceinline__ uint32_t max_u16x2(uint32_t a, uint32_t b) {
  uint32_t d;
  asm("max.u16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b));
  return d;
}

// No instruction: `a`, as a value that the compiler knows nothing about.
__device__ __forceinline__ int64_t opaque(int64_t a) {
  asm volatile("" : "+l"(a));
  return a;
}

}  // namespace jaxfp8::ptx
