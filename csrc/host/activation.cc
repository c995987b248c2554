#include "activation.h"

#include <limits>
#include <string>

#include "checks.h"

namespace jaxfp8 {

LaunchPlan plan_activation(const ActivationProblem& p, int device_sms) {
  using namespace quantize_checks;
  using Kind = ActivationProblem::Kind;
  constexpr const char* kName = "activation";
  // activation.cuh, ParkedTile: a tile of float32.
  constexpr uint32_t kParkedBytes = kBlock * kBlock * sizeof(float);

  bool gradient = p.kind == Kind::kGradBoth || p.kind == Kind::kRaggedGradBoth;
  bool ragged = p.kind == Kind::kRaggedBoth || p.kind == Kind::kRaggedGradBoth;
  check_size(kName, "G", p.groups);
  check_size(kName, "M", p.rows);
  check_size(kName, "F", p.cols);
  if (p.activation < 0 || p.activation >= kNumActivations) {
    fail(kName,
         "activation is " + std::to_string(p.activation) + "; allowed is 0 (silu) or 1 (gelu)");
  }
  check_address(kName, "x", p.x, size_in_bytes(p.in));
  if (gradient) check_address(kName, "dy", p.dy, size_in_bytes(p.in));
  if (ragged) check_address(kName, "group_sizes", p.group_sizes, sizeof(int32_t));
  check_address(kName, "the row data", p.row_data, 1);
  check_address(kName, "the row scale", p.row_scale, sizeof(float));
  if (p.kind != Kind::kRows) {
    check_address(kName, "the column data", p.column_data, 1);
    check_address(kName, "the column scale", p.column_scale, sizeof(float));
  }

  LaunchPlan plan;
  plan.image = p.kind == Kind::kRows ? "activation_rows"
               : gradient            ? "activation_grad"
                                     : "activation_both";
  plan.kernel = plan.image + (p.gated ? "_gated" : "") + "_" + in_suffix(kName, "x", p.in) + "_" +
                out_suffix(kName, p.out);
  if (p.kind == Kind::kRows) {
    if (p.rows > std::numeric_limits<int64_t>::max() / p.groups) fail(kName, "G * M overflows");
    int64_t rows = p.groups * p.rows;
    Grid grid = rows_grid(kName, "x", rows, p.cols, p.in, device_sms);
    plan.grid.x = grid.ctas;
    plan.block.x = grid.threads;
    plan.args = {p.x, p.row_data, p.row_scale, rows, p.cols};
  } else {
    int64_t column_blocks = ceil_div(p.cols, kBlock), row_blocks = ceil_div(p.rows, kBlock);
    plan.grid.x = ragged ? checked_grid(kName, "x", {row_blocks + p.groups, column_blocks})
                         : checked_grid(kName, "x", {p.groups, row_blocks, column_blocks});
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
