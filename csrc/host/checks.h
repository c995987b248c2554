// Checks that the planners of the quantizing kernels share. `function` begins every message.
#pragma once
#include <cstdint>
#include <initializer_list>
#include <limits>
#include <stdexcept>
#include <string>

#include "dtype.h"

namespace jaxfp8::quantize_checks {

constexpr int64_t kBlock = 128;
// quantize.cuh, Tile::kThreads.
constexpr uint32_t kTileThreads = 256;

inline int64_t ceil_div(int64_t a, int64_t b) { return (a - 1) / b + 1; }

[[noreturn]] inline void fail(const char* function, const std::string& message) {
  throw std::invalid_argument(std::string(function) + ": " + message);
}

inline void check_size(const char* function, const char* name, int64_t size) {
  if (size < 1) {
    fail(function, std::string(name) + " is " + std::to_string(size) + "; it must be at least 1");
  }
}

inline void check_address(const char* function, const char* name, void* address,
                          int64_t alignment) {
  if (address == nullptr) fail(function, std::string(name) + " has no address");
  if (reinterpret_cast<uintptr_t>(address) % alignment != 0) {
    fail(function,
         std::string(name) + " must be aligned to " + std::to_string(alignment) + " bytes");
  }
}

// The grid's x extent for the product of `factors`, the blocks of array `name`.
inline uint32_t checked_grid(const char* function, const char* name,
                             std::initializer_list<int64_t> factors) {
  constexpr int64_t kMaxGrid = std::numeric_limits<int32_t>::max();
  int64_t product = 1;
  for (int64_t factor : factors) {
    if (factor > kMaxGrid / product) {
      fail(function, std::string(name) + " has more blocks than a grid holds, 2^31 - 1");
    }
    product *= factor;
  }
  return static_cast<uint32_t>(product);
}

struct Grid {
  uint32_t ctas, threads;
};

// Rows share nothing, so a small problem is spread over all multiprocessors in small CTAs: a warp
// takes 8 rows of 32 vectors of 16 bytes (quantize_rows.cu, activation_rows.cu).
inline Grid rows_grid(const char* function, const char* name, int64_t rows, int64_t cols, DType in,
                      int device_sms) {
  uint32_t tiles = checked_grid(function, name,
                                {ceil_div(rows, 8), ceil_div(cols, 32 * 16 / size_in_bytes(in))});
  uint32_t warps = 8;
  while (warps > 1 && tiles < static_cast<int64_t>(warps) * 2 * device_sms) warps /= 2;
  return {static_cast<uint32_t>(ceil_div(tiles, warps)), warps * 32};
}

inline const char* in_suffix(const char* function, const char* name_of_array, DType type) {
  if (type != DType::kBFloat16 && type != DType::kFloat16 && type != DType::kFloat32) {
    fail(function,
         std::string(name_of_array) + " has type " + name(type) + "; it must be bf16, f16 or f32");
  }
  return name(type);
}

inline const char* out_suffix(const char* function, DType type) {
  switch (type) {
    case DType::kF8E4M3FN:
      return "e4m3";
    case DType::kF8E5M2:
      return "e5m2";
    default:
      fail(function,
           std::string("data has type ") + name(type) + "; it must be f8e4m3fn or f8e5m2");
  }
}

}  // namespace jaxfp8::quantize_checks
