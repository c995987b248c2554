// The formats of the quantizing kernels: how an element of an input is read, how one of FP8 is
// written, and the pairs of them that are compiled.
#pragma once
#include <cstdint>

#include "../../ptx/convert.cuh"

namespace jaxfp8::quantize {

// Input formats. A magnitude is an element's bits without the sign: as integers, magnitudes order
// like absolute values, with NaN above infinity above every number, so no maximum drops a NaN.

// `kVectorSize`: elements that a thread holds of one row; 16 bytes of an input format.

struct Pair16 {  // two elements a word
  using Bits = uint16_t;
  static constexpr int kVectorSize = 8;
  static __device__ uint32_t max_magnitude(uint32_t magnitudes, uint32_t word) {
    return ptx::max_u16x2(magnitudes, word & 0x7fff7fffu);
  }
  static __device__ uint32_t within_word(uint32_t magnitudes) {
    return max(magnitudes & 0xffffu, magnitudes >> 16);
  }
};

struct BF16 : Pair16 {
  static __device__ float element(const uint32_t* words, int i) {
    return __uint_as_float(i % 2 ? words[i / 2] & 0xffff0000u : words[i / 2] << 16);
  }
  static __device__ uint32_t f32_bits(uint32_t magnitude) { return magnitude << 16; }
};

struct F16 : Pair16 {
  static __device__ float element(const uint32_t* words, int i) {
    return ptx::cvt_f32_f16(static_cast<uint16_t>(i % 2 ? words[i / 2] >> 16 : words[i / 2]));
  }
  static __device__ uint32_t f32_bits(uint32_t magnitude) {
    return __float_as_uint(ptx::cvt_f32_f16(static_cast<uint16_t>(magnitude)));
  }
};

struct F32 {
  using Bits = uint32_t;
  static constexpr int kVectorSize = 4;
  static __device__ uint32_t max_magnitude(uint32_t magnitude, uint32_t word) {
    return max(magnitude, word & 0x7fffffffu);
  }
  static __device__ uint32_t within_word(uint32_t magnitude) { return magnitude; }
  static __device__ float element(const uint32_t* words, int i) {
    return __uint_as_float(words[i]);
  }
  static __device__ uint32_t f32_bits(uint32_t magnitude) { return magnitude; }
};

// Computed float32 values that lie over the threads like two-byte inputs. Never loaded.
struct F32x8 : F32 {
  static constexpr int kVectorSize = 8;
};

// Output formats.

struct E4M3 {
  static constexpr float kReciprocalOfLargest = 1.0f / 448.0f;
  static __device__ uint32_t convert(float upper, float lower) {
    return ptx::cvt_rn_satfinite_e4m3x2_f32(upper, lower);
  }
};

struct E5M2 {
  static constexpr float kReciprocalOfLargest = 1.0f / 57344.0f;
  static __device__ uint32_t convert(float upper, float lower) {
    return ptx::cvt_rn_satfinite_e5m2x2_f32(upper, lower);
  }
};

}  // namespace jaxfp8::quantize

// X(in, In, out, Out) for each pair: its name in a kernel's, and its type.
// clang-format off
#define JAXFP8_QUANTIZER_FORMATS(X) \
  X(bf16, BF16, e4m3, E4M3)         \
  X(bf16, BF16, e5m2, E5M2)         \
  X(f16, F16, e4m3, E4M3)           \
  X(f16, F16, e5m2, E5M2)           \
  X(f32, F32, e4m3, E4M3)           \
  X(f32, F32, e5m2, E5M2)
// Of what products made: they write no float16.
#define JAXFP8_PRODUCT_FORMATS(X) \
  X(bf16, BF16, e4m3, E4M3)       \
  X(bf16, BF16, e5m2, E5M2)       \
  X(f32, F32, e4m3, E4M3)         \
  X(f32, F32, e5m2, E5M2)
// clang-format on
