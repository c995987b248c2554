// Bytes of FP8 rows as words: moved, never interpreted, in pieces of what their addresses are
// aligned to.
#pragma once
#include <cstdint>

namespace jaxfp8::moe {

// N bytes of one row.
template <int N>
struct alignas(N) Bytes {
  static_assert(N == 8 || N == 16);
  uint32_t words[N / 4];
};

// Loads N bytes, of which `valid` exist; the others are zeros and not read. `W` is the piece.
template <int N, int W>
__device__ Bytes<N> load_bytes(const uint8_t* source, int valid) {
  Bytes<N> v{};
  if constexpr (W == N) {
    if (valid > 0) {
      if constexpr (N == 16) {
        uint4 u = __ldg(reinterpret_cast<const uint4*>(source));
        v = {u.x, u.y, u.z, u.w};
      } else {
        uint2 u = __ldg(reinterpret_cast<const uint2*>(source));
        v = {u.x, u.y};
      }
    }
  } else if constexpr (W == 4) {
#pragma unroll
    for (int i = 0; i < N / 4; ++i) {
      if (i * 4 < valid) v.words[i] = __ldg(reinterpret_cast<const uint32_t*>(source) + i);
    }
  } else {
#pragma unroll
    for (int i = 0; i < N; ++i) {
      if (i < valid) v.words[i / 4] |= static_cast<uint32_t>(__ldg(source + i)) << (i % 4 * 8);
    }
  }
  return v;
}

// Stores the bytes before `valid`; whole where `alignment`, that of every row, allows it.
template <int N>
__device__ void store_bytes(uint8_t* target, const Bytes<N>& v, int valid, int alignment) {
  if (alignment >= N) {
    if (valid > 0) *reinterpret_cast<Bytes<N>*>(target) = v;
  } else if (alignment >= 4) {
#pragma unroll
    for (int i = 0; i < N / 4; ++i) {
      if (i * 4 < valid) reinterpret_cast<uint32_t*>(target)[i] = v.words[i];
    }
  } else {
#pragma unroll
    for (int i = 0; i < N; ++i) {
      if (i < valid) target[i] = static_cast<uint8_t>(v.words[i / 4] >> (i % 4 * 8));
    }
  }
}

}  // namespace jaxfp8::moe
