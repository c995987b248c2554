#include "gather.h"

#include <algorithm>
#include <string>

#include "checks.h"

namespace jaxfp8 {
namespace {

using Kind = GatherProblem::Kind;

// gather_rows moves either FP8 type; others are such as gather_quantize_both_bf16_e4m3 and
// gather_requantize_both_e4m3.
std::string kernel_name(const GatherProblem& p) {
  const std::string out = std::string("_") + short_name(p.out);
  const std::string types = std::string("_") + name(p.in) + out;
  switch (p.kind) {
    case Kind::kQuantizeRows:
      return "gather_quantize_rows" + types;
    case Kind::kQuantizeBoth:
      return "gather_quantize_both" + types;
    case Kind::kRows:
      return "gather_rows";
    case Kind::kRequantizeBoth:
      return "gather_requantize_both" + out;
  }
  return "?";
}

// Blocks of columns that the tiles go through at a time (gather.cuh, BandedTile). As many as L2
// holds of x beside the results that stream through it, of its 50 MB, half on each side of the
// chip; all where rows do not come again or L2 holds no block.
int32_t band_of(const GatherProblem& p) {
  constexpr int64_t kBandBytes = 8 << 20, kMostBytes = 16 << 20;
  const int64_t blocks = ceil_div(p.cols, kBlock);
  const int64_t bytes = p.source_rows * kBlock * size_in_bytes(p.in);  // of a block of columns
  if (p.rows < 2 * p.source_rows || bytes > kMostBytes) return static_cast<int32_t>(blocks);
  return static_cast<int32_t>(std::clamp<int64_t>(kBandBytes / bytes, 1, blocks));
}

}  // namespace

LaunchPlan plan_gather(const GatherProblem& p, int device_sms) {
  const bool fp8 = is_of_fp8(p.kind);
  const char* result = has_columns(p.kind) ? "row_data" : "data";
  LaunchPlan plan;
  plan.kernel = kernel_name(p);
  plan.args = {p.x};
  if (fp8) plan.args.push_back(p.x_scale);
  plan.args.push_back(p.source);
  if (has_columns(p.kind)) {
    plan.image = fp8 ? "gather_requantize_both" : "gather_quantize_both";
    plan.grid.x =
        checked_grid(result, {ceil_div(p.rows, kBlock) + p.groups, ceil_div(p.cols, kBlock)});
    plan.block.x = kTileThreads;
    plan.args.push_back(p.group_sizes);
  } else {
    plan.image = fp8 ? "gather_rows" : "gather_quantize_rows";
    const Grid grid = rows_grid(result, p.rows, p.cols, p.in, device_sms);
    plan.grid.x = grid.ctas;
    plan.block.x = grid.threads;
  }
  plan.args.insert(plan.args.end(), {p.row_data, p.row_scale});
  if (has_columns(p.kind)) {
    plan.args.insert(plan.args.end(), {p.column_data, p.column_scale, p.groups});
  }
  plan.args.insert(plan.args.end(), {p.source_rows, p.rows, p.cols});
  if (has_columns(p.kind)) plan.args.push_back(band_of(p));
  if (p.kind != Kind::kRows) plan.args.push_back(static_cast<int32_t>(p.pow2));
  return plan;
}

}  // namespace jaxfp8
