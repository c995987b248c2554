// What the planners share: blocks, and the checks that are theirs. The contract (csrc/ffi) has
// checked each array's type, shape and address, and every attribute; a planner checks what follows
// from several of them together, and what its kernels cannot serve.
#pragma once
#include <cstdint>
#include <initializer_list>
#include <limits>
#include <string>

#include "../kernels/ceil_div.h"
#include "dtype.h"
#include "plan.h"

namespace jaxfp8 {

constexpr int64_t kBlock = 128;         // elements of the contraction that share a scale
constexpr uint32_t kTileThreads = 256;  // quantize.cuh, Tile::kThreads

[[noreturn]] inline void refuse(const std::string& message) { throw PlanError(message); }

// The message is built only where it is needed: planning is part of every call's host time.
#define JAXFP8_REQUIRE(condition, message)       \
  do {                                           \
    if (!(condition)) ::jaxfp8::refuse(message); \
  } while (false)

// The grid's x extent for the product of `factors`, the blocks of array `name`.
inline uint32_t checked_grid(const char* name, std::initializer_list<int64_t> factors) {
  constexpr int64_t kMaxGrid = std::numeric_limits<int32_t>::max();
  int64_t product = 1;
  for (int64_t factor : factors) {
    JAXFP8_REQUIRE(factor <= kMaxGrid / product,
                   std::string(name) + " has more blocks than a grid holds, 2^31 - 1");
    product *= factor;
  }
  return static_cast<uint32_t>(product);
}

struct Grid {
  uint32_t ctas, threads;
};

// Warps that take 32 vectors of 16 bytes of each of `runs` runs of rows. They share nothing, so a
// small problem is spread over all multiprocessors in small CTAs.
inline Grid warps_grid(const char* name, int64_t runs, int64_t cols, DType in, int device_sms) {
  const int64_t vectors = 32 * 16 / size_in_bytes(in);
  uint32_t tiles = checked_grid(name, {runs, ceil_div(cols, vectors)});
  uint32_t warps = 8;
  while (warps > 1 && tiles < static_cast<int64_t>(warps) * 2 * device_sms) warps /= 2;
  return {static_cast<uint32_t>(ceil_div<int64_t>(tiles, warps)), warps * 32};
}

// Of the kernels whose warps take 8 rows: quantize_rows.cu, activation_rows.cu, gather_rows.cu.
inline Grid rows_grid(const char* name, int64_t rows, int64_t cols, DType in, int device_sms) {
  return warps_grid(name, ceil_div<int64_t>(rows, 8), cols, in, device_sms);
}

// As kernels are named.
inline const char* short_name(DType type) { return type == DType::kF8E5M2 ? "e5m2" : "e4m3"; }

}  // namespace jaxfp8
