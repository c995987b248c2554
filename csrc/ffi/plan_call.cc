#include <string>

#include "ffi/contract.h"
#include "ffi/sizes.h"

namespace jaxfp8 {
namespace {

QuantizeProblem quantize_problem(const Call& call, const Sizes& sizes) {
  using Kind = QuantizeProblem::Kind;
  const Target& target = *call.target;
  bool weight = target.quantize == Kind::kWeight;
  bool ragged = target.quantize == Kind::kRaggedColumns || target.quantize == Kind::kRaggedBoth;
  bool columns = target.quantize == Kind::kColumns || target.quantize == Kind::kRaggedColumns;
  bool both = target.quantize == Kind::kBoth || target.quantize == Kind::kRaggedBoth;
  QuantizeProblem problem;
  problem.kind = target.quantize;
  problem.groups = target.quantize == Kind::kRows ? 1 : sizes[G];
  problem.rows = sizes[weight ? K : M];
  problem.cols = sizes[weight ? N : K];
  problem.in = *call.operands[0].dtype;
  problem.out = *call.results[0].dtype;
  problem.pow2 = call.pow2;
  problem.x = call.operands[0].data;
  if (ragged) problem.group_sizes = call.operands[1].data;
  (columns ? problem.column_data : problem.row_data) = call.results[0].data;
  (columns ? problem.column_scale : problem.row_scale) = call.results[1].data;
  if (weight || both) problem.column_data = call.results[2].data;
  if (both) problem.column_scale = call.results[3].data;
  return problem;
}

ActivationProblem activation_problem(const Call& call, const Sizes& sizes) {
  using Kind = ActivationProblem::Kind;
  Kind kind = call.target->activation;
  bool ragged = kind == Kind::kRaggedBoth || kind == Kind::kRaggedGradBoth;
  bool gradient = kind == Kind::kGradBoth || kind == Kind::kRaggedGradBoth;
  ActivationProblem problem;
  problem.kind = kind;
  problem.groups = kind == Kind::kRows ? 1 : sizes[G];
  problem.rows = sizes[M];
  problem.cols = sizes[F];
  problem.gated = sizes[A] == 2;
  problem.activation = call.activation;
  problem.in = *call.operands[0].dtype;
  problem.out = *call.results[0].dtype;
  problem.pow2 = call.pow2;
  problem.x = call.operands[0].data;
  if (gradient) problem.dy = call.operands[1].data;
  if (ragged) problem.group_sizes = call.operands.back().data;
  problem.row_data = call.results[0].data;
  problem.row_scale = call.results[1].data;
  if (kind != Kind::kRows) {
    problem.column_data = call.results[2].data;
    problem.column_scale = call.results[3].data;
  }
  return problem;
}

GemmProblem gemm_problem(const Call& call, const Sizes& sizes) {
  const Target& target = *call.target;
  bool wgrad = target.gemm == GemmProblem::Kind::kGroupedWgrad;
  bool grouped = target.gemm != GemmProblem::Kind::k1d2d && target.gemm != GemmProblem::Kind::k1d1d;
  GemmProblem problem;
  problem.kind = target.gemm;
  problem.m = sizes[wgrad ? N : M];
  problem.n = sizes[wgrad ? K : N];
  problem.k = sizes[wgrad ? T : K];
  problem.groups = sizes[G];
  problem.lhs_shared = sizes[OneOrG] == 1;
  problem.lhs = *call.operands[0].dtype;
  problem.rhs = *call.operands[2].dtype;
  problem.out = *call.results[0].dtype;
  problem.accum = target.accum;
  problem.lhs_data = call.operands[0].data;
  problem.lhs_scale = call.operands[1].data;
  problem.rhs_data = call.operands[2].data;
  problem.rhs_scale = call.operands[3].data;
  problem.group_sizes = grouped ? call.operands[4].data : nullptr;
  problem.out_data = call.results[0].data;
  return problem;
}

}  // namespace

LaunchPlan plan_call(const Call& call, int device_sms) {
  Sizes sizes = check(call, device_sms);
  try {
    switch (call.target->family) {
      case Family::kGemm:
        return plan_gemm(gemm_problem(call, sizes), call.config, call.num_sms, device_sms);
      case Family::kActivation:
        return plan_activation(activation_problem(call, sizes), device_sms);
      case Family::kQuantize:
        return plan_quantize(quantize_problem(call, sizes), device_sms);
    }
    fail(*call.target, "unknown family");
  } catch (const std::invalid_argument& error) {
    // A planner names its family; a caller knows the target.
    std::string message = error.what();
    size_t family = message.find(": ");
    fail(*call.target, family == std::string::npos ? message : message.substr(family + 2));
  }
}

}  // namespace jaxfp8
