// Planning of the quantizers: sizes and addresses in, a launch out. Layouts and arithmetic are
// those of docs/architecture.md.
#pragma once
#include <cstdint>

#include "dtype.h"
#include "plan.h"

namespace jaxfp8 {

struct QuantizeProblem {
  // Of x (G, M, K): `row` results are blocked along K, `column` results along M and transposed.
  enum class Kind {
    kRows,           // row_data (G, M, K), row_scale (G, M, KB)
    kColumns,        // column_data (G, K, M), column_scale (G, K, MB)
    kBoth,           // both of them
    kBlocks,         // row_data (G, M, K), row_scale (G, MB, KB)
    kWeight,         // as kBlocks, and column_data (G, K, M) with the same scales
    kRaggedColumns,  // x (M, K), group_sizes (G): column_data (K, T), column_scale (K, T / 128)
    kRaggedBoth,     // as kRaggedColumns, and row_data (M, K), row_scale (M, KB)
  };
  Kind kind = Kind::kRows;
  int64_t groups = 1, rows = 0, cols = 0;  // G, M, K; each at least 1
  DType in = DType::kBFloat16;             // kBFloat16, kFloat16 or kFloat32
  DType out = DType::kF8E4M3FN;            // kF8E4M3FN or kF8E5M2
  bool pow2 = false;
  void* x = nullptr;
  void* group_sizes = nullptr;
  void* row_data = nullptr;
  void* row_scale = nullptr;
  void* column_data = nullptr;
  void* column_scale = nullptr;
};

// T, the length of the group-padded token axis, in tokens.
int64_t padded_tokens(int64_t rows, int64_t groups);

// The launch that computes `problem`, which the contract has checked, on a device of `device_sms`
// multiprocessors. Throws PlanError for a problem of more blocks than a grid holds.
LaunchPlan plan_quantize(const QuantizeProblem& problem, int device_sms);

}  // namespace jaxfp8
