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
  const bool rows_only = is_of_rows_only(kind);
  ActivationProblem problem;
  problem.kind = kind;
  problem.groups = rows_only ? 1 : sizes[G];
  problem.rows = sizes[M];
  problem.cols = sizes[F];
  problem.gated = sizes[A] == 2;
  problem.activation = call.activation;
  problem.in = *call.operands[0].dtype;
  problem.out = *call.results[0].dtype;
  problem.pow2 = call.pow2;
  const Array* operand = call.operands.data();
  problem.x = operand++->data;
  if (is_gradient(kind)) problem.dy = operand++->data;
  if (is_weighted(kind)) problem.weight = operand++->data;
  if (is_ragged(kind)) problem.group_sizes = operand->data;
  problem.row_data = call.results[0].data;
  problem.row_scale = call.results[1].data;
  if (!rows_only) {
    problem.column_data = call.results[2].data;
    problem.column_scale = call.results[3].data;
  }
  if (is_gradient(kind) && is_weighted(kind)) problem.weight_grad = call.results[4].data;
  return problem;
}

GatherProblem problem_of(GatherProblem::Kind kind, const Call& call, const Sizes& sizes) {
  GatherProblem problem;
  problem.kind = kind;
  problem.groups = has_columns(kind) ? sizes[G] : 1;
  problem.source_rows = sizes[S];
  problem.rows = sizes[M];
  problem.cols = sizes[K];
  problem.in = *call.operands[0].dtype;
  problem.out = *call.results[0].dtype;
  problem.pow2 = call.pow2;
  const Array* operand = call.operands.data();
  problem.x = operand++->data;
  if (is_of_fp8(kind)) problem.x_scale = operand++->data;
  problem.source = operand++->data;
  if (has_columns(kind)) problem.group_sizes = operand++->data;
  const Array* result = call.results.data();
  problem.row_data = result[0].data;
  problem.row_scale = result[1].data;
  if (has_columns(kind)) {
    problem.column_data = result[2].data;
    problem.column_scale = result[3].data;
  }
  return problem;
}

SumRowsProblem problem_of(SumRowsProblem::Kind kind, const Call& call, const Sizes& sizes) {
  SumRowsProblem problem;
  problem.kind = kind;
  problem.tokens = sizes[S];
  problem.choices = sizes[J];
  problem.rows = sizes[M];
  problem.cols = sizes[K];
  problem.in = *call.operands[0].dtype;
  problem.out = *call.results[0].dtype;
  problem.row_data = call.operands[0].data;
  problem.position = call.operands[1].data;
  if (kind == SumRowsProblem::Kind::kWeighted) problem.weight = call.operands[2].data;
  problem.out_data = call.results[0].data;
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
LaunchPlan plan(const GatherProblem& problem, const Call&, int device_sms) {
  return plan_gather(problem, device_sms);
}
LaunchPlan plan(const SumRowsProblem& problem, const Call&, int device_sms) {
  return plan_sum_rows(problem, device_sms);
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
