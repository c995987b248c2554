// Planning of the FP8 block-scaled products: shapes, addresses and SM count in, a launch out.
//
//   out[g, m, n] = sum over blocks b of 128 of the contraction, in order, of
//                  lhs_scale[g, m, b] * rhs_scale[g, n (or n / 128), b] * (lhs[g, m, b] . rhs[g, n,
//                  b])
//
// The layouts of the operands are those of docs/architecture.md.
#pragma once
#include <cstdint>
#include <string>
#include <vector>

#include "dtype.h"
#include "plan.h"

namespace jaxfp8 {

struct GemmProblem {
  enum class Kind {
    k1d2d,     // lhs (1 or G, M, K), rhs (G, N, K), rhs scale (G, NB, KB) -> out (G, M, N)
    k1d1d,     // lhs (1 or G, M, K), rhs (G, N, K), rhs scale (G, N, KB) M-major -> out (G, M, N)
    kGrouped,  // lhs (M, K), rhs (G, N, K), rhs scale (G, NB, KB), group_sizes -> out (M, N)
    kMasked,   // lhs (G, M, K), rhs as above, group_sizes = masked_m -> out (G, M, N)
    kGroupedWgrad,  // lhs (M, K), rhs (N, K) over a group-padded contraction K = T, both scales
                    // M-major, group_sizes -> out (G, M, N)
  };
  int64_t m = 0, n = 0, k = 0, groups = 1;
  bool lhs_shared = false;  // k1d2d and k1d1d: one lhs (1, M, K) for every group
  Kind kind = Kind::k1d2d;
  DType lhs = DType::kF8E4M3FN, rhs = DType::kF8E4M3FN, out = DType::kBFloat16;
  bool accum = false;  // out += product; out is read and written
  void* lhs_data = nullptr;
  void* lhs_scale = nullptr;
  void* rhs_data = nullptr;
  void* rhs_scale = nullptr;
  void* group_sizes = nullptr;  // int32 (G), null for k1d2d and k1d1d
  void* out_data = nullptr;
};

// The number of explicit configurations of a kind; `config` counts from 0.
int num_gemm_configs(GemmProblem::Kind kind);

// A readable name of configuration `config`, e.g. "m128n128 cluster 2x1".
std::string gemm_config_name(GemmProblem::Kind kind, int config);

// The launch that computes `problem`, which the contract has checked. `config` -1: the heuristic
// chooses. `num_sms` 0, or more than there are: all of `device_sms`. Throws PlanError.
LaunchPlan plan_gemm(const GemmProblem& problem, int config, int num_sms, int device_sms);

}  // namespace jaxfp8
