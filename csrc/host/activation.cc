#include "activation.h"

#include "checks.h"

namespace jaxfp8 {

LaunchPlan plan_activation(const ActivationProblem& p, int device_sms) {
  // activation.cuh, ParkedTile: a tile of float32.
  constexpr uint32_t kParkedBytes = kBlock * kBlock * sizeof(float);

  const bool rows_only = is_of_rows_only(p.kind), gradient = is_gradient(p.kind);
  const bool ragged = is_ragged(p.kind), weighted = is_weighted(p.kind);

  LaunchPlan plan;
  plan.image = weighted ? "activation_weighted_" : "activation_";
  plan.image += rows_only ? "rows" : gradient ? "grad" : "both";
  plan.kernel = plan.image + (p.gated ? "_gated" : "") + "_" + name(p.in) + "_" + short_name(p.out);
  plan.args = {p.x};
  if (gradient) plan.args.push_back(p.dy);
  if (weighted) plan.args.push_back(p.weight);
  if (rows_only) {
    int64_t rows = p.groups * p.rows;
    Grid grid = rows_grid("x", rows, p.cols, p.in, device_sms);
    plan.grid.x = grid.ctas;
    plan.block.x = grid.threads;
    plan.args.insert(plan.args.end(), {p.row_data, p.row_scale, rows, p.cols});
  } else {
    int64_t column_blocks = ceil_div(p.cols, kBlock), row_blocks = ceil_div(p.rows, kBlock);
    plan.grid.x = ragged ? checked_grid("x", {row_blocks + p.groups, column_blocks})
                         : checked_grid("x", {p.groups, row_blocks, column_blocks});
    plan.block.x = kTileThreads;
    plan.args.insert(plan.args.end(), {ragged ? p.group_sizes : nullptr, p.row_data, p.row_scale,
                                       p.column_data, p.column_scale});
    if (gradient && weighted) plan.args.push_back(p.weight_grad);
    plan.args.insert(plan.args.end(), {p.groups, p.rows, p.cols});
    if (gradient && p.gated) plan.dynamic_smem = kParkedBytes;
  }
  plan.args.push_back(p.activation);
  plan.args.push_back(static_cast<int32_t>(p.pow2));
  return plan;
}

}  // namespace jaxfp8
