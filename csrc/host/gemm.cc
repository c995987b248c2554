#include "gemm.h"

#include <algorithm>
#include <array>
#include <climits>
#include <cmath>
#include <limits>

#include "../kernels/gemm/layout.h"

namespace jaxfp8 {
namespace {

using Kind = GemmProblem::Kind;

// A configuration: a compiled tile, the cluster that it runs in, and what a CTA needs for a tile: a
// time for each 128 of the contraction and a time for the rest, fitted to an H100's figures, and
// for rows of 64 to an H200's (benchmarks/NOTES.md).
struct Config {
  int block_m, block_n;
  int warpgroups_n;          // side by side
  int cluster_m, cluster_n;  // CTAs along M (they share rhs blocks) and N (they share lhs blocks)
  int block_ns, tile_ns;
};

// A compiled or exported program names a configuration by its index: new ones go last.
// clang-format off
constexpr std::array<Config, 19> kBlockScaleConfigs = {{
    {64, 32, 1, 1, 1, 190, 700},
    {64, 64, 1, 1, 1, 250, 700},
    {64, 128, 1, 1, 1, 320, 800},
    {128, 128, 1, 1, 1, 450, 850},
    {128, 128, 1, 2, 1, 389, 820},
    {128, 128, 1, 1, 2, 389, 830},
    {128, 192, 1, 1, 1, 570, 1350},
    {128, 192, 1, 2, 1, 523, 1310},
    {128, 192, 2, 1, 1, 572, 1670},
    {128, 192, 2, 2, 1, 557, 1650},
    {256, 128, 1, 1, 1, 733, 1920},
    {256, 128, 1, 1, 2, 704, 1870},
    {256, 128, 1, 2, 1, 715, 1900},
    {64, 64, 1, 1, 2, 200, 500},
    {64, 64, 1, 2, 1, 195, 700},
    {64, 128, 1, 1, 2, 305, 800},
    {64, 128, 1, 2, 1, 300, 800},
    {64, 16, 1, 1, 1, 175, 700},
    {64, 16, 1, 1, 2, 170, 700},
}};
// clang-format on

constexpr std::array<Config, 11> kOuterScaleConfigs = {{
    {64, 64, 1, 1, 1, 300, 1000},
    {128, 128, 1, 1, 1, 514, 1800},
    {128, 128, 1, 2, 1, 504, 1250},
    {128, 128, 1, 1, 2, 505, 1200},
    {128, 192, 1, 1, 1, 768, 1700},
    {128, 192, 1, 2, 1, 752, 1650},
    {128, 192, 2, 1, 1, 743, 1500},
    {128, 192, 2, 2, 1, 722, 1600},
    {256, 128, 1, 1, 1, 1066, 2100},
    {256, 128, 1, 1, 2, 1030, 2300},
    {256, 128, 1, 2, 1, 1050, 2300},
}};

// A cluster has one row or one column (gemm.cuh), and schedule.cuh divides by its sides with
// shifts.
template <size_t kCount>
constexpr bool have_supported_clusters(const std::array<Config, kCount>& configs) {
  for (const Config& c : configs) {
    const int size = c.cluster_m * c.cluster_n;
    if ((c.cluster_m > 1 && c.cluster_n > 1) || size & (size - 1)) return false;
  }
  return true;
}
static_assert(have_supported_clusters(kBlockScaleConfigs) &&
              have_supported_clusters(kOuterScaleConfigs));

// As kernels are named: rows, columns of a warpgroup and how many warpgroups side by side.
std::string tile_name(const Config& c) {
  return "m" + std::to_string(c.block_m) + "n" + std::to_string(c.block_n / c.warpgroups_n) +
         (c.warpgroups_n == 2 ? "x2" : "");
}

bool has_outer_scales(Kind kind) { return kind == Kind::k1d1d || kind == Kind::kGroupedWgrad; }

const Config& config_of(Kind kind, int config) {
  return has_outer_scales(kind) ? kOuterScaleConfigs.at(config) : kBlockScaleConfigs.at(config);
}

TileLayout layout_of(const Config& config, const GemmProblem& p) {
  return {config.block_m, config.block_n, config.warpgroups_n,
          static_cast<int>(size_in_bytes(p.out)), has_outer_scales(p.kind)};
}

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

[[noreturn]] void fail(const std::string& message) { throw PlanError("gemm: " + message); }

// The message is built only where it is needed: planning is part of every call's host time.
#define REQUIRE(condition, message)  \
  do {                               \
    if (!(condition)) fail(message); \
  } while (false)

void require_aligned(const void* address, int64_t alignment, const char* argument) {
  REQUIRE(reinterpret_cast<uintptr_t>(address) % alignment == 0,
          std::string(argument) + " lies at an address that is no multiple of " +
              std::to_string(alignment) + " bytes");
}

bool is_grouped(Kind kind) {
  return kind == Kind::kGrouped || kind == Kind::kMasked || kind == Kind::kGroupedWgrad;
}

// Rows of all groups of the output, the lhs and the rhs.
int64_t out_rows(const GemmProblem& p) { return p.kind == Kind::kGrouped ? p.m : p.groups * p.m; }
int64_t lhs_rows(const GemmProblem& p) {
  const bool one = p.lhs_shared || p.kind == Kind::kGrouped || p.kind == Kind::kGroupedWgrad;
  return one ? p.m : p.groups * p.m;
}
int64_t rhs_rows(const GemmProblem& p) {
  return p.kind == Kind::kGroupedWgrad ? p.n : p.groups * p.n;
}

void check(const GemmProblem& p) {
  const auto positive = [](int64_t size, const char* name) {
    REQUIRE(size >= 1 && size <= INT_MAX, std::string(name) + " is " + std::to_string(size) +
                                              "; allowed is 1 to " + std::to_string(INT_MAX));
  };
  positive(p.m, "M");
  positive(p.n, "N");
  positive(p.k, "K");
  positive(p.groups, "the number of groups");
  REQUIRE(p.k % 16 == 0, "K is " + std::to_string(p.k) + "; it must be a multiple of 16");
  for (auto [rows, name] :
       {std::pair{out_rows(p), "out"}, {lhs_rows(p), "lhs"}, {rhs_rows(p), "rhs"}}) {
    constexpr int kAllowed = INT_MAX - 1024;  // the rows of a last tile are counted too
    REQUIRE(rows <= kAllowed, std::string(name) + " has " + std::to_string(rows) +
                                  " rows over all groups; allowed are " + std::to_string(kAllowed));
  }
  const auto lhs_allowed = p.lhs == DType::kF8E4M3FN || p.lhs == DType::kF8E5M2;
  REQUIRE(lhs_allowed,
          std::string("lhs has dtype ") + name(p.lhs) + "; allowed are f8e4m3fn and f8e5m2");
  if (has_outer_scales(p.kind)) {
    REQUIRE(p.rhs == DType::kF8E4M3FN || p.rhs == DType::kF8E5M2,
            std::string("rhs has dtype ") + name(p.rhs) + "; allowed are f8e4m3fn and f8e5m2");
    REQUIRE(p.lhs == DType::kF8E4M3FN || p.rhs == DType::kF8E4M3FN,
            "lhs and rhs both have dtype f8e5m2; one must be f8e4m3fn");
  } else {
    REQUIRE(p.rhs == DType::kF8E4M3FN,
            std::string("rhs has dtype ") + name(p.rhs) + "; allowed is f8e4m3fn");
  }
  REQUIRE(p.out == DType::kBFloat16 || p.out == DType::kFloat32,
          std::string("out has dtype ") + name(p.out) + "; allowed are bf16 and f32");
  if (p.lhs_shared) {
    REQUIRE(!is_grouped(p.kind), "lhs can be shared by batch entries only, not by ragged groups");
  }
  if (p.kind == Kind::kGroupedWgrad) {
    REQUIRE(p.k % 128 == 0 && p.k / 128 >= p.groups,
            "lhs has a contraction of " + std::to_string(p.k) +
                "; it must be a multiple of 128 and have 128 for each of the " +
                std::to_string(p.groups) + " groups");
  }
  require_aligned(p.lhs_data, 16, "lhs");
  require_aligned(p.rhs_data, 16, "rhs");
  require_aligned(p.lhs_scale, 4, "the scale of lhs");
  require_aligned(p.rhs_scale, 4, "the scale of rhs");
  require_aligned(p.out_data, size_in_bytes(p.out), "out");
  if (is_grouped(p.kind)) require_aligned(p.group_sizes, 4, "group_sizes");
}

// At most how many tiles of a cluster there are; group sizes are on the device.
int64_t max_tiles(const GemmProblem& p, const Config& c) {
  const int64_t block_m = c.block_m * c.cluster_m;
  const int64_t columns = ceil_div(p.n, c.block_n * c.cluster_n);
  if (p.kind == Kind::kGrouped) return (p.m / block_m + p.groups + 1) * columns;
  if (p.kind == Kind::kMasked) return p.groups * (p.m / block_m + 2) * columns;
  return p.groups * ceil_div(p.m, block_m) * columns;
}

// Estimated time of a launch: waves of tiles.
double estimated_ns(const GemmProblem& p, const Config& c, int sms) {
  const int cluster = c.cluster_m * c.cluster_n;
  // So few rows move weights and little else, which small tiles spread over more SMs.
  const bool too_tall = p.m <= 64 && c.block_m * c.cluster_m > 64;
  if (cluster > sms || too_tall) return std::numeric_limits<double>::infinity();
  const int64_t block_m = c.block_m * c.cluster_m, block_n = c.block_n * c.cluster_n;
  const int64_t columns = ceil_div(p.n, block_n);
  double k_blocks = ceil_div(p.k, 128);
  double rows;  // of tiles
  if (p.kind == Kind::kGrouped && p.groups > 1) {
    // Sizes are on the device. As if they were equal; the last tile of each is half full.
    const double groups = std::min(p.groups, p.m);
    rows = p.m / double(block_m) + groups * 0.5;
  } else if (p.kind == Kind::kMasked) {
    // As if a quarter of the rows were valid; the others cost a store of zeros.
    rows = double(p.groups * ceil_div((p.m + 3) / 4, block_m));
  } else {
    rows = double((p.kind == Kind::kGrouped ? 1 : p.groups) * ceil_div(p.m, block_m));
  }
  // Of the contraction, a block for each group is spare, half of which its last block uses.
  if (p.kind == Kind::kGroupedWgrad) k_blocks = std::max(1.0, k_blocks / p.groups - 0.5);
  const double waves = std::ceil(rows * columns / (sms / cluster));
  return waves * (k_blocks * c.block_ns + c.tile_ns);
}

int choose_config(const GemmProblem& p, int sms) {
  int best = -1;
  double best_ns = std::numeric_limits<double>::infinity();
  for (int i = 0; i < num_gemm_configs(p.kind); ++i) {
    const double ns = estimated_ns(p, config_of(p.kind, i), sms);
    if (ns < best_ns) {
      best = i;
      best_ns = ns;
    }
  }
  return best;
}

// Tiles along N that are walked together, so that the clusters that run at once cover about as many
// rows of the lhs as of the rhs.
int band_of(const GemmProblem& p, const Config& c, int clusters) {
  const double square =
      std::sqrt(double(clusters) * c.block_m * c.cluster_m / (c.block_n * c.cluster_n));
  const int64_t columns = ceil_div(p.n, c.block_n * c.cluster_n);
  return static_cast<int>(std::clamp<int64_t>(std::lround(square), 1, columns));
}

const char* short_name(DType type) { return type == DType::kF8E5M2 ? "e5m2" : "e4m3"; }

TensorMap operand_map(void* data, int64_t rows, int64_t k, int box_rows) {
  return {TensorMap::Type::kUint8,
          data,
          {static_cast<uint64_t>(k), static_cast<uint64_t>(rows)},
          {static_cast<uint64_t>(k)},
          {kBlockK, static_cast<uint32_t>(box_rows)},
          TensorMap::Swizzle::k128B};
}

TensorMap::Swizzle swizzle_of(int bytes) {
  return bytes == 128  ? TensorMap::Swizzle::k128B
         : bytes == 64 ? TensorMap::Swizzle::k64B
                       : TensorMap::Swizzle::k32B;
}

}  // namespace

int num_gemm_configs(Kind kind) {
  return has_outer_scales(kind) ? kOuterScaleConfigs.size() : kBlockScaleConfigs.size();
}

std::string gemm_config_name(Kind kind, int config) {
  const Config& c = config_of(kind, config);
  return tile_name(c) + " cluster " + std::to_string(c.cluster_m) + "x" +
         std::to_string(c.cluster_n);
}

LaunchPlan plan_gemm(const GemmProblem& p, int config, int num_sms, int device_sms) {
  check(p);
  REQUIRE(device_sms >= 1, "the device has " + std::to_string(device_sms) + " SMs");
  REQUIRE(num_sms >= 0, "num_sms is " + std::to_string(num_sms) + "; allowed is 0 (all) or more");
  const int sms = num_sms == 0 ? device_sms : std::min(num_sms, device_sms);
  REQUIRE(config >= -1 && config < num_gemm_configs(p.kind),
          "config is " + std::to_string(config) + "; allowed is -1 (the heuristic) to " +
              std::to_string(num_gemm_configs(p.kind) - 1));
  const Config& c = config_of(p.kind, config == -1 ? choose_config(p, sms) : config);
  const int cluster = c.cluster_m * c.cluster_n;
  REQUIRE(cluster <= sms, "config is " + std::to_string(config) + ", which runs in clusters of " +
                              std::to_string(cluster) + " SMs; num_sms is " +
                              std::to_string(num_sms));
  const int64_t tiles = max_tiles(p, c);
  REQUIRE(tiles <= INT_MAX, "out has more than " + std::to_string(INT_MAX) + " tiles");

  const TileLayout layout = layout_of(c, p);
  const int clusters = static_cast<int>(std::min<int64_t>(sms / cluster, tiles));
  const int64_t out_row_bytes = p.n * size_in_bytes(p.out);
  const auto aligned = [&](int bytes) {
    return out_row_bytes % bytes == 0 && reinterpret_cast<uintptr_t>(p.out_data) % bytes == 0;
  };
  const bool mapped = aligned(16), vector = aligned(8);

  const LhsCopies lhs_copies(c.block_m, layout.outer_scales, c.cluster_n, lhs_rows(p));
  const TensorMap lhs_map = operand_map(p.lhs_data, lhs_rows(p), p.k, lhs_copies.box);
  const TensorMap rhs_map = operand_map(p.rhs_data, rhs_rows(p), p.k, c.block_n / c.cluster_m);
  const TensorMap out_map =
      mapped ? TensorMap{p.out == DType::kFloat32 ? TensorMap::Type::kFloat32
                                                  : TensorMap::Type::kBfloat16,
                         p.out_data,
                         {static_cast<uint64_t>(p.n), static_cast<uint64_t>(out_rows(p))},
                         {static_cast<uint64_t>(out_row_bytes)},
                         {static_cast<uint32_t>(layout.strip_cols()), kStripRows},
                         swizzle_of(layout.strip_row_bytes())}
             : lhs_map;  // unused
  const int32_t mode = p.kind == Kind::kGrouped        ? kGrouped
                       : p.kind == Kind::kMasked       ? kMasked
                       : p.kind == Kind::kGroupedWgrad ? kGroupedWgrad
                                                       : kDense;
  const bool wgrad = p.kind == Kind::kGroupedWgrad;
  const int64_t lhs_group_rows = p.lhs_shared || p.kind == Kind::kGrouped || wgrad ? 0 : p.m;
  const int64_t rhs_group_rows = wgrad ? 0 : p.n;

  LaunchPlan plan;
  const char* family = has_outer_scales(p.kind) ? "gemm_1d1d_" : "gemm_1d2d_";
  plan.image = std::string(family) + name(p.out);
  plan.kernel.reserve(48);
  plan.kernel.append(family).append(tile_name(c));
  for (const char* type : {short_name(p.lhs), short_name(p.rhs), name(p.out)}) {
    plan.kernel.append("_").append(type);
  }
  plan.grid.x = clusters * cluster;
  plan.block.x = layout.threads();
  plan.cluster.x = cluster;
  plan.dynamic_smem = layout.shared_bytes();
  // In the order of GemmArgs (csrc/kernels/gemm/args.h).
  plan.args = {lhs_map,
               rhs_map,
               out_map,
               p.lhs_scale,
               p.rhs_scale,
               p.group_sizes,
               p.out_data,
               mode,
               static_cast<int32_t>(p.m),
               static_cast<int32_t>(p.n),
               static_cast<int32_t>(p.groups),
               static_cast<int32_t>(ceil_div(p.k, 128)),
               static_cast<int32_t>(lhs_rows(p)),
               static_cast<int32_t>(rhs_rows(p)),
               static_cast<int32_t>(lhs_group_rows),
               static_cast<int32_t>(rhs_group_rows),
               static_cast<int32_t>(c.cluster_m),
               static_cast<int32_t>(c.cluster_n),
               static_cast<int32_t>(band_of(p, c, clusters)),
               static_cast<int32_t>((p.accum ? kAccumulate : 0) | (mapped ? kOutTensorMap : 0) |
                                    (vector ? kVectorOut : 0))};
  return plan;
}

}  // namespace jaxfp8
