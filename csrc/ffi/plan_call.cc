#include <string>

#include "ffi/contract.h"
#include "ffi/sizes.h"

namespace jaxfp8 {
namespace {

QuantizeProblem problem_of(QuantizeProblem::Kind kind, const Call& call, const Sizes& sizes) {
  using Kind = QuantizeProblem::Kind;
  bool weight = kind == Kind::kWeight;
  bool ragged = kind == Kind::kRaggedColumns || kind == Kind::kRaggedBoth;
  bool columns = kind == Kind::kColumns || kind == Kind::kRaggedColumns;
  bool both = kind == Kind::kBoth || kind == Kind::kRaggedBoth;
  QuantizeProblem problem;
  problem.kind = kind;
  problem.groups = kind == Kind::kRows ? 1 : sizes[G];
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

ActivationProblem problem_of(ActivationProblem::Kind kind, const Call& call, const Sizes& sizes) {
  using Kind = ActivationProblem::Kind;
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

GemmProblem problem_of(GemmProblem::Kind kind, const Call& call, const Sizes& sizes) {
  using Kind = GemmProblem::Kind;
  bool wgrad = kind == Kind::kGroupedWgrad;
  bool grouped = kind != Kind::k1d2d && kind != Kind::k1d1d;
  GemmProblem problem;
  problem.kind = kind;
  problem.m = sizes[wgrad ? N : M];
  problem.n = sizes[wgrad ? K : N];
  problem.k = sizes[wgrad ? T : K];
  problem.groups = sizes[G];
  problem.lhs_shared = sizes[OneOrG] == 1;
  problem.lhs = *call.operands[0].dtype;
  problem.rhs = *call.operands[2].dtype;
  problem.out = *call.results[0].dtype;
  problem.accum = call.target->accum;
  problem.lhs_data = call.operands[0].data;
  problem.lhs_scale = call.operands[1].data;
  problem.rhs_data = call.operands[2].data;
  problem.rhs_scale = call.operands[3].data;
  problem.group_sizes = grouped ? call.operands[4].data : nullptr;
  problem.out_data = call.results[0].data;
  return problem;
}

LaunchPlan plan(const QuantizeProblem& problem, const Call&, int device_sms) {
  return plan_quantize(problem, device_sms);
}
LaunchPlan plan(const ActivationProblem& problem, const Call&, int device_sms) {
  return plan_activation(problem, device_sms);
}
LaunchPlan plan(const GemmProblem& problem, const Call& call, int device_sms) {
  return plan_gemm(problem, call.config, call.num_sms, device_sms);
}

}  // namespace

LaunchPlan plan_call(const Call& call, int device_sms) {
  const Sizes sizes = check(call);
  try {
    LaunchPlan made =
        std::visit([&](auto kind) { return plan(problem_of(kind, call, sizes), call, device_sms); },
                   call.target->kind);
    if (call.target->accum && call.operands.back().data != call.results.front().data) {
      const Array& out = call.results.front();
      made.copy = Copy{out.data, call.operands.back().data, size_in_bytes(out)};
    }
    return made;
  } catch (const PlanError& error) {
    fail(*call.target, error.what());
  }
}

}  // namespace jaxfp8
