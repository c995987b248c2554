// Planning of gathers of rows by index into FP8: sizes and addresses in, a launch out. Layouts and
// arithmetic are those of docs/architecture.md.
#pragma once
#include <cstdint>

#include "dtype.h"
#include "plan.h"

namespace jaxfp8 {

struct GatherProblem {
  // Of the rows source (M) of x (S, K), with group_sizes (G) where there are columns.
  enum class Kind {
    kQuantizeRows,    // row_data (M, K), row_scale (M, KB)
    kQuantizeBoth,    // and column_data (K, T), column_scale (K, T / 128)
    kRows,            // of an FP8 x and its x_scale (S, KB): as kQuantizeRows, moved as they are
    kRequantizeBoth,  // as kRows, and columns from x * x_scale
  };
  Kind kind = Kind::kQuantizeRows;
  int64_t groups = 1, source_rows = 0, rows = 0, cols = 0;  // G, S, M, K; each at least 1
  DType in = DType::kBFloat16;   // kBFloat16, kFloat16 or kFloat32; of an FP8 x, as out
  DType out = DType::kF8E4M3FN;  // kF8E4M3FN or kF8E5M2
  bool pow2 = false;             // the scales that are made here
  void* x = nullptr;
  void* x_scale = nullptr;
  void* source = nullptr;
  void* group_sizes = nullptr;
  void* row_data = nullptr;
  void* row_scale = nullptr;
  void* column_data = nullptr;
  void* column_scale = nullptr;
};

constexpr bool is_of_fp8(GatherProblem::Kind kind) {
  using Kind = GatherProblem::Kind;
  return kind == Kind::kRows || kind == Kind::kRequantizeBoth;
}
constexpr bool has_columns(GatherProblem::Kind kind) {
  using Kind = GatherProblem::Kind;
  return kind == Kind::kQuantizeBoth || kind == Kind::kRequantizeBoth;
}

// The launch that computes `problem`, which the contract has checked, on a device of `device_sms`
// multiprocessors. Throws PlanError for a problem of more blocks than a grid holds.
LaunchPlan plan_gather(const GatherProblem& problem, int device_sms);

}  // namespace jaxfp8
