// Planning of sums of rows by index: sizes and addresses in, a launch out. Layouts and arithmetic
// are those of docs/architecture.md.
#pragma once
#include <cstdint>

#include "dtype.h"
#include "plan.h"

namespace jaxfp8 {

// out (S, K): for each s the sum over j of weight[s, j] * rows[position[s, j]].
struct SumRowsProblem {
  enum class Kind { kPlain, kWeighted };
  Kind kind = Kind::kPlain;
  int64_t tokens = 0, choices = 0, rows = 0, cols = 0;  // S, J, M, K; each at least 1
  DType in = DType::kBFloat16;                          // of the rows: kBFloat16 or kFloat32
  DType out = DType::kBFloat16;                         // kBFloat16 or kFloat32
  void* row_data = nullptr;                             // (M, K)
  void* position = nullptr;                             // int32 (S, J)
  void* weight = nullptr;                               // float32 (S, J), of kWeighted
  void* out_data = nullptr;
};

// The launch that computes `problem`, which the contract has checked, on a device of `device_sms`
// multiprocessors. Throws PlanError for a problem of more blocks than a grid holds.
LaunchPlan plan_sum_rows(const SumRowsProblem& problem, int device_sms);

}  // namespace jaxfp8
