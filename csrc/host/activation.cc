#include "activation.h"

#include "checks.h"

namespace jaxfp8 {

LaunchPlan plan_activation(const ActivationProblem& p, int device_sms) {
  using Kind = ActivationProblem::Kind;
  // activation.cuh, ParkedTile: a tile of float32.
  constexpr uint32_t kParkedBytes = kBlock * kBlock * sizeof(float);

  bool gradient = p.kind == Kind::kGradBoth || p.kind == Kind::kRaggedGradBoth;
  bool ragged = p.kind == Kind::kRaggedBoth || p.kind == Kind::kRaggedGradBoth;

  LaunchPlan plan;
  plan.image = p.kind == Kind::kRows ? "activation_rows"
               : gradient            ? "activation_grad"
                                     : "activation_both";
  plan.kernel = plan.image + (p.gated ? "_gated" : "") + "_" + name(p.in) + "_" + short_name(p.out);
  if (p.kind == Kind::kRows) {
    int64_t rows = p.groups * p.rows;
    Grid grid = rows_grid("x", rows, p.cols, p.in, device_sms);
    plan.grid.x = grid.ctas;
    plan.block.x = grid.threads;
    plan.args = {p.x, p.row_data, p.row_scale, rows, p.cols};
  } else {
    int64_t column_blocks = ceil_div(p.cols, kBlock), row_blocks = ceil_div(p.rows, kBlock);
    plan.grid.x = ragged ? checked_grid("x", {row_blocks + p.groups, column_blocks})
                         : checked_grid("x", {p.groups, row_blocks, column_blocks});
    plan.block.x = kTileThreads;
    plan.args = {p.x};
    if (gradient) plan.args.push_back(p.dy);
    plan.args.insert(plan.args.end(), {ragged ? p.group_sizes : nullptr, p.row_data, p.row_scale,
                                       p.column_data, p.column_scale, p.groups, p.rows, p.cols});
    if (gradient && p.gated) plan.dynamic_smem = kParkedBytes;
  }
  plan.args.push_back(p.activation);
  plan.args.push_back(static_cast<int32_t>(p.pow2));
  return plan;
}

}  // namespace jaxfp8
