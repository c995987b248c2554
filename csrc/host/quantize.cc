#include "quantize.h"

#include <limits>
#include <string>

#include "checks.h"

namespace jaxfp8 {
namespace {

using namespace quantize_checks;
using Kind = QuantizeProblem::Kind;

constexpr const char* kName = "quantize";

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
  fail(kName, "unknown kind");
}

void plan_rows(const QuantizeProblem& p, int device_sms, LaunchPlan& plan) {
  if (p.rows > std::numeric_limits<int64_t>::max() / p.groups) fail(kName, "G * M overflows");
  int64_t rows = p.groups * p.rows;
  Grid grid = rows_grid(kName, "x", rows, p.cols, p.in, device_sms);
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
  check_size(kName, "G", p.groups);
  check_size(kName, "M", p.rows);
  check_size(kName, "K", p.cols);
  bool ragged = p.kind == Kind::kRaggedColumns || p.kind == Kind::kRaggedBoth;
  bool row_results = p.kind != Kind::kColumns && p.kind != Kind::kRaggedColumns;
  bool column_results = p.kind != Kind::kRows && p.kind != Kind::kBlocks;
  bool column_scales = column_results && p.kind != Kind::kWeight;

  LaunchPlan plan;
  plan.kernel = std::string("quantize_") + kind_name(p.kind) + "_" + in_suffix(kName, "x", p.in) +
                "_" + out_suffix(kName, p.out);
  check_address(kName, "x", p.x, size_in_bytes(p.in));
  if (ragged) check_address(kName, "group_sizes", p.group_sizes, sizeof(int32_t));
  if (row_results) {
    check_address(kName, "the row data", p.row_data, 1);
    check_address(kName, "the row scale", p.row_scale, sizeof(float));
  }
  if (column_results) check_address(kName, "the column data", p.column_data, 1);
  if (column_scales) check_address(kName, "the column scale", p.column_scale, sizeof(float));

  if (p.kind == Kind::kRows) {
    plan_rows(p, device_sms, plan);
  } else {
    int64_t column_blocks = ceil_div(p.cols, kBlock);
    plan.grid.x = ragged ? checked_grid(kName, p.kind == Kind::kWeight ? "w" : "x",
                                        {ceil_div(p.rows, kBlock) + p.groups, column_blocks})
                         : checked_grid(kName, p.kind == Kind::kWeight ? "w" : "x",
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
