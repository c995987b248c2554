#include "quantize.h"

#include <string>

#include "checks.h"

namespace jaxfp8 {
namespace {

using Kind = QuantizeProblem::Kind;

const char* kind_name(Kind kind) {
  switch (kind) {
    case Kind::kRows:
      return "rows";
    case Kind::kColumns:
      return "columns";
    case Kind::kBoth:
      return "both";
    case Kind::kBlocks:
      return "blocks";
    case Kind::kWeight:
      return "weight";
    case Kind::kRaggedColumns:
      return "ragged_columns";
    case Kind::kRaggedBoth:
      return "ragged_both";
  }
  return "?";
}

void plan_rows(const QuantizeProblem& p, int device_sms, LaunchPlan& plan) {
  int64_t rows = p.groups * p.rows;
  Grid grid = rows_grid("x", rows, p.cols, p.in, device_sms);
  plan.image = "quantize_rows";
  plan.grid.x = grid.ctas;
  plan.block.x = grid.threads;
  plan.args = {p.x, p.row_data, p.row_scale, rows, p.cols};
}

}  // namespace

int64_t padded_tokens(int64_t rows, int64_t groups) {
  return ceil_div(rows, kBlock) * kBlock + kBlock * groups;
}

LaunchPlan plan_quantize(const QuantizeProblem& p, int device_sms) {
  bool ragged = p.kind == Kind::kRaggedColumns || p.kind == Kind::kRaggedBoth;
  bool row_results = p.kind != Kind::kColumns && p.kind != Kind::kRaggedColumns;
  bool column_results = p.kind != Kind::kRows && p.kind != Kind::kBlocks;

  LaunchPlan plan;
  plan.kernel =
      std::string("quantize_") + kind_name(p.kind) + "_" + name(p.in) + "_" + short_name(p.out);
  if (p.kind == Kind::kRows) {
    plan_rows(p, device_sms, plan);
  } else {
    int64_t column_blocks = ceil_div(p.cols, kBlock);
    plan.grid.x = ragged ? checked_grid(p.kind == Kind::kWeight ? "w" : "x",
                                        {ceil_div(p.rows, kBlock) + p.groups, column_blocks})
                         : checked_grid(p.kind == Kind::kWeight ? "w" : "x",
                                        {p.groups, ceil_div(p.rows, kBlock), column_blocks});
    plan.block.x = kTileThreads;
    plan.args = {p.x};
    if (ragged) plan.args.push_back(p.group_sizes);
    if (p.kind == Kind::kBlocks || p.kind == Kind::kWeight) {
      plan.image = "quantize_weight";
      plan.args.insert(plan.args.end(), {p.row_data, p.row_scale});
      if (column_results) plan.args.push_back(p.column_data);
    } else {
      plan.image = "quantize_columns";
      if (row_results) plan.args.insert(plan.args.end(), {p.row_data, p.row_scale});
      plan.args.insert(plan.args.end(), {p.column_data, p.column_scale, p.groups});
    }
    plan.args.insert(plan.args.end(), {p.rows, p.cols});
  }
  plan.args.push_back(static_cast<int32_t>(p.pow2));
  return plan;
}

}  // namespace jaxfp8
