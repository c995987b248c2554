#include "quantize.h"

#include <algorithm>
#include <limits>
#include <stdexcept>
#include <string>

namespace jaxfp8 {
namespace {

using Kind = QuantizeProblem::Kind;

constexpr int64_t kBlock = 128;
// quantize_rows.cu: a warp takes 8 rows of 32 vectors of 16 bytes.
constexpr int64_t kWarpRows = 8;
constexpr int64_t kWarpRowBytes = 32 * 16;
constexpr int kMaxWarps = 8;
// quantize.cuh, Tile::kThreads.
constexpr uint32_t kTileThreads = 256;

int64_t ceil_div(int64_t a, int64_t b) { return (a - 1) / b + 1; }

[[noreturn]] void fail(const std::string& message) {
  throw std::invalid_argument("quantize: " + message);
}

void check_size(const char* name, int64_t size) {
  if (size < 1) fail(std::string(name) + " is " + std::to_string(size) + "; it must be at least 1");
}

void* checked(const char* name, void* address, int64_t alignment) {
  if (address == nullptr) fail(std::string(name) + " has no address");
  if (reinterpret_cast<uintptr_t>(address) % alignment != 0) {
    fail(std::string(name) + " must be aligned to " + std::to_string(alignment) + " bytes");
  }
  return address;
}

// The grid's x extent for the product of `factors`.
uint32_t checked_grid(const QuantizeProblem& p, std::initializer_list<int64_t> factors) {
  constexpr int64_t kMaxGrid = std::numeric_limits<int32_t>::max();
  int64_t product = 1;
  for (int64_t factor : factors) {
    if (factor > kMaxGrid / product) {
      fail(std::string(p.kind == Kind::kWeight ? "w" : "x") +
           " has more blocks than a grid holds, 2^31 - 1");
    }
    product *= factor;
  }
  return static_cast<uint32_t>(product);
}

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
  fail("unknown kind");
}

const char* in_suffix(DType type) {
  switch (type) {
    case DType::kBFloat16:
      return "bf16";
    case DType::kFloat16:
      return "f16";
    case DType::kFloat32:
      return "f32";
    default:
      fail(std::string("x has type ") + name(type) + "; it must be bf16, f16 or f32");
  }
}

const char* out_suffix(DType type) {
  switch (type) {
    case DType::kF8E4M3FN:
      return "e4m3";
    case DType::kF8E5M2:
      return "e5m2";
    default:
      fail(std::string("data has type ") + name(type) + "; it must be f8e4m3fn or f8e5m2");
  }
}

// Rows share nothing, so a small problem is spread over all multiprocessors in small CTAs.
void plan_rows(const QuantizeProblem& p, int device_sms, LaunchPlan& plan) {
  if (p.rows > std::numeric_limits<int64_t>::max() / p.groups) fail("G * M overflows");
  int64_t rows = p.groups * p.rows;
  uint32_t tiles = checked_grid(
      p, {ceil_div(rows, kWarpRows), ceil_div(p.cols, kWarpRowBytes / size_in_bytes(p.in))});
  int warps = kMaxWarps;
  while (warps > 1 && tiles < static_cast<int64_t>(warps) * 2 * device_sms) warps /= 2;
  plan.image = "quantize_rows";
  plan.grid.x = static_cast<uint32_t>(ceil_div(tiles, warps));
  plan.block.x = static_cast<uint32_t>(warps) * 32;
  plan.args = {p.x, p.row_data, p.row_scale, rows, p.cols};
}

}  // namespace

int64_t padded_tokens(int64_t rows, int64_t groups) {
  return ceil_div(rows, kBlock) * kBlock + kBlock * groups;
}

LaunchPlan plan_quantize(const QuantizeProblem& p, int device_sms) {
  check_size("G", p.groups);
  check_size("M", p.rows);
  check_size("K", p.cols);
  bool ragged = p.kind == Kind::kRaggedColumns || p.kind == Kind::kRaggedBoth;
  bool row_results = p.kind != Kind::kColumns && p.kind != Kind::kRaggedColumns;
  bool column_results = p.kind != Kind::kRows && p.kind != Kind::kBlocks;
  bool column_scales = column_results && p.kind != Kind::kWeight;

  LaunchPlan plan;
  plan.kernel = std::string("quantize_") + kind_name(p.kind) + "_" + in_suffix(p.in) + "_" +
                out_suffix(p.out);
  checked("x", p.x, size_in_bytes(p.in));
  if (ragged) checked("group_sizes", p.group_sizes, sizeof(int32_t));
  if (row_results) {
    checked("the row data", p.row_data, 1);
    checked("the row scale", p.row_scale, sizeof(float));
  }
  if (column_results) checked("the column data", p.column_data, 1);
  if (column_scales) checked("the column scale", p.column_scale, sizeof(float));

  if (p.kind == Kind::kRows) {
    plan_rows(p, device_sms, plan);
  } else {
    int64_t column_blocks = ceil_div(p.cols, kBlock);
    plan.grid.x = ragged ? checked_grid(p, {ceil_div(p.rows, kBlock) + p.groups, column_blocks})
                         : checked_grid(p, {p.groups, ceil_div(p.rows, kBlock), column_blocks});
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
