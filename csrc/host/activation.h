// Planning of the activations fused with quantization: sizes and addresses in, a launch out.
// Layouts and arithmetic are those of docs/architecture.md.
#pragma once
#include <cstdint>

#include "dtype.h"
#include "plan.h"

namespace jaxfp8 {

// As the custom calls' attribute and csrc/kernels/quantize/activation.cuh number them.
constexpr int32_t kNumActivations = 2;  // silu, gelu

struct ActivationProblem {
  // Of x (G, M, A, F), gate and up side by side where A is 2, and y (G, M, F), its activation:
  // `row` results are blocked along F, `column` results along M and transposed.
  enum class Kind {
    kRows,            // y: row_data (G, M, F), row_scale (G, M, FB)
    kBoth,            // and column_data (G, F, M), column_scale (G, F, MB)
    kGradBoth,        // dx from x and dy (G, M, F): row_data (G, M, A, F), row_scale (G, M, A, FB),
                      // column_data (G, A, F, M), column_scale (G, A, F, MB)
    kRaggedBoth,      // as kBoth of x (M, A, F) with group_sizes (G): columns (F, T), (F, T / 128)
    kRaggedGradBoth,  // as kGradBoth of x (M, A, F): columns (A, F, T), (A, F, T / 128)
    // The same with a factor for each row of y, weight (M), and dy that of the product:
    kWeightedRows,
    kRaggedWeightedBoth,
    kRaggedWeightedGradBoth,  // and weight_grad (M, FB), by block of F
  };
  Kind kind = Kind::kRows;
  int64_t groups = 1, rows = 0, cols = 0;  // G, M, F; each at least 1
  bool gated = false;                      // A is 2
  int32_t activation = 0;                  // below kNumActivations
  DType in = DType::kBFloat16;             // of x and dy: kBFloat16, kFloat16 or kFloat32
  DType out = DType::kF8E4M3FN;            // kF8E4M3FN or kF8E5M2
  bool pow2 = false;
  void* x = nullptr;
  void* dy = nullptr;
  void* weight = nullptr;
  void* group_sizes = nullptr;
  void* row_data = nullptr;
  void* row_scale = nullptr;
  void* column_data = nullptr;
  void* column_scale = nullptr;
  void* weight_grad = nullptr;
};

constexpr bool is_of_rows_only(ActivationProblem::Kind kind) {
  using Kind = ActivationProblem::Kind;
  return kind == Kind::kRows || kind == Kind::kWeightedRows;
}
constexpr bool is_gradient(ActivationProblem::Kind kind) {
  using Kind = ActivationProblem::Kind;
  return kind == Kind::kGradBoth || kind == Kind::kRaggedGradBoth ||
         kind == Kind::kRaggedWeightedGradBoth;
}
constexpr bool is_weighted(ActivationProblem::Kind kind) {
  using Kind = ActivationProblem::Kind;
  return kind == Kind::kWeightedRows || kind == Kind::kRaggedWeightedBoth ||
         kind == Kind::kRaggedWeightedGradBoth;
}
constexpr bool is_ragged(ActivationProblem::Kind kind) {
  using Kind = ActivationProblem::Kind;
  return kind == Kind::kRaggedBoth || kind == Kind::kRaggedGradBoth ||
         kind == Kind::kRaggedWeightedBoth || kind == Kind::kRaggedWeightedGradBoth;
}

// The launch that computes `problem`, which the contract has checked, on a device of `device_sms`
// multiprocessors. Throws PlanError for a problem of more blocks than a grid holds.
LaunchPlan plan_activation(const ActivationProblem& problem, int device_sms);

}  // namespace jaxfp8
