#include "gemm.h"

#include <algorithm>
#include <array>
#include <climits>
#include <cmath>
#include <cstddef>
#include <limits>

#include "../kernels/gemm/args.h"
#include "../kernels/gemm/tiles.h"
#include "checks.h"

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

struct TileName {
  const char* name;
  int block_m, block_n, warpgroups_n;
};
#define JAXFP8_TILE_NAME(name, m, n, warpgroups_n, sets, ...) TileName{#name, m, n, warpgroups_n},
constexpr TileName kBlockScaleTiles[] = {JAXFP8_BLOCK_SCALE_TILES(JAXFP8_TILE_NAME)};
constexpr TileName kOuterScaleTiles[] = {JAXFP8_OUTER_SCALE_TILES(JAXFP8_TILE_NAME)};
#undef JAXFP8_TILE_NAME

// The tile of a configuration, as kernels are named; null: none is compiled.
template <size_t kCount>
constexpr const char* find_tile(const TileName (&tiles)[kCount], const Config& c) {
  for (const TileName& tile : tiles) {
    if (tile.block_m == c.block_m && tile.block_n == c.block_n &&
        tile.warpgroups_n == c.warpgroups_n) {
      return tile.name;
    }
  }
  return nullptr;
}

template <size_t kTiles, size_t kConfigs>
constexpr bool are_compiled(const TileName (&tiles)[kTiles],
                            const std::array<Config, kConfigs>& configs) {
  for (const Config& c : configs) {
    if (find_tile(tiles, c) == nullptr) return false;
  }
  return true;
}
static_assert(are_compiled(kBlockScaleTiles, kBlockScaleConfigs) &&
              are_compiled(kOuterScaleTiles, kOuterScaleConfigs));

const char* tile_name(const Config& c, bool outer_scales) {
  return outer_scales ? find_tile(kOuterScaleTiles, c) : find_tile(kBlockScaleTiles, c);
}

bool has_outer_scales(Kind kind) { return kind == Kind::k1d1d || kind == Kind::kGroupedWgrad; }

const Config& config_of(bool outer_scales, int config) {
  return outer_scales ? kOuterScaleConfigs.at(config) : kBlockScaleConfigs.at(config);
}

// What a kind of product means for rows and tiles: the one switch over the kinds.
struct Geometry {
  Mode mode = kDense;
  bool outer_scales = false;
  int64_t out_rows, lhs_rows, rhs_rows;    // of all groups together
  int64_t lhs_group_rows, rhs_group_rows;  // from one group to the next; 0: all share one
  int64_t row_groups;                      // of `m` rows each
  int64_t spare_tiles = 0;                 // along M, of row groups whose segments start anywhere
  // What the heuristic takes for likely: sizes are on the device.
  int64_t likely_rows;
  double half_full_tiles = 0;  // the last one of each group
  double likely_k_blocks;
};

Geometry geometry_of(const GemmProblem& p) {
  Geometry g;
  g.outer_scales = has_outer_scales(p.kind);
  g.row_groups = p.groups;
  g.out_rows = g.lhs_rows = p.groups * p.m;
  g.rhs_rows = p.groups * p.n;
  g.lhs_group_rows = p.m;
  g.rhs_group_rows = p.n;
  g.likely_rows = p.m;
  g.likely_k_blocks = ceil_div(p.k, kBlock);
  switch (p.kind) {
    case Kind::k1d2d:
    case Kind::k1d1d:
      if (p.lhs_shared) {
        g.lhs_rows = p.m;
        g.lhs_group_rows = 0;
      }
      break;
    case Kind::kGrouped:
      g.mode = kGrouped;
      g.out_rows = g.lhs_rows = p.m;
      g.lhs_group_rows = 0;
      g.row_groups = 1;
      g.spare_tiles = p.groups + 1;
      if (p.groups > 1) g.half_full_tiles = std::min(p.groups, p.m);
      break;
    case Kind::kMasked:
      g.mode = kMasked;
      g.spare_tiles = 2;
      g.likely_rows = ceil_div<int64_t>(p.m, 4);  // the others cost a store of zeros
      break;
    case Kind::kGroupedWgrad:
      g.mode = kGroupedWgrad;
      g.lhs_rows = p.m;
      g.rhs_rows = p.n;
      g.lhs_group_rows = g.rhs_group_rows = 0;
      // A block for each group is spare, half of which its last block uses.
      g.likely_k_blocks = std::max(1.0, g.likely_k_blocks / p.groups - 0.5);
      break;
  }
  return g;
}

// Rows, and tiles of a cluster, are counted in 32 bits, a last tile's and a step past the last one
// included (schedule.cuh).
constexpr int64_t kMaxCount = INT_MAX - 1024;

void check(const GemmProblem& p, const Geometry& g) {
  for (auto [rows, name] :
       {std::pair{g.out_rows, "out"}, {g.lhs_rows, "lhs"}, {g.rhs_rows, "rhs"}}) {
    JAXFP8_REQUIRE(rows <= kMaxCount, std::string(name) + " has " + std::to_string(rows) +
                                          " rows over all groups; allowed are " +
                                          std::to_string(kMaxCount));
  }
  if (g.outer_scales) {
    JAXFP8_REQUIRE(p.lhs == DType::kF8E4M3FN || p.rhs == DType::kF8E4M3FN,
                   "lhs and rhs both have dtype f8e5m2; one must be f8e4m3fn");
  } else {
    JAXFP8_REQUIRE(p.rhs == DType::kF8E4M3FN,
                   std::string("rhs has dtype ") + name(p.rhs) + "; allowed is f8e4m3fn");
  }
  if (p.kind == Kind::kGroupedWgrad) {
    JAXFP8_REQUIRE(p.k / kBlock >= p.groups, "lhs has a contraction of " + std::to_string(p.k) +
                                                 "; it must have " + std::to_string(kBlock) +
                                                 " for each of the " + std::to_string(p.groups) +
                                                 " groups");
  }
}

int64_t columns_of(const GemmProblem& p, const Config& c) {
  return ceil_div<int64_t>(p.n, c.block_n * c.cluster_n);
}

// At most how many tiles of a cluster there are; group sizes are on the device.
int64_t max_tiles(const GemmProblem& p, const Geometry& g, const Config& c) {
  const int64_t block_m = c.block_m * c.cluster_m;
  const int64_t rows = g.spare_tiles == 0 ? ceil_div(p.m, block_m) : p.m / block_m + g.spare_tiles;
  return g.row_groups * rows * columns_of(p, c);
}

// Estimated time of a launch: waves of tiles.
double estimated_ns(const GemmProblem& p, const Geometry& g, const Config& c, int sms) {
  const int cluster = c.cluster_m * c.cluster_n;
  // So few rows move weights and little else, which small tiles spread over more SMs.
  const bool too_tall = p.m <= 64 && c.block_m * c.cluster_m > 64;
  if (cluster > sms || too_tall) return std::numeric_limits<double>::infinity();
  const int64_t block_m = c.block_m * c.cluster_m;
  const double rows = g.half_full_tiles > 0
                          ? p.m / double(block_m) + g.half_full_tiles * 0.5
                          : double(g.row_groups * ceil_div(g.likely_rows, block_m));
  const double waves = std::ceil(rows * columns_of(p, c) / (sms / cluster));
  return waves * (g.likely_k_blocks * c.block_ns + c.tile_ns);
}

// The fastest configuration by that estimate; `countable`: of those whose tiles can be counted.
int choose_config(const GemmProblem& p, const Geometry& g, int sms, bool countable) {
  int best = -1;
  double best_ns = std::numeric_limits<double>::infinity();
  for (int i = 0; i < num_gemm_configs(p.kind); ++i) {
    if (countable && max_tiles(p, g, config_of(g.outer_scales, i)) > kMaxCount) continue;
    const double ns = estimated_ns(p, g, config_of(g.outer_scales, i), sms);
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
  return static_cast<int>(std::clamp<int64_t>(std::lround(square), 1, columns_of(p, c)));
}

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

// The output's tensor map, and which accesses its rows allow.
struct OutAccess {
  bool mapped, vector;

  OutAccess(const GemmProblem& p) : mapped(aligned(p, 16)), vector(aligned(p, 8)) {}
  static bool aligned(const GemmProblem& p, int bytes) {
    return p.n * size_in_bytes(p.out) % bytes == 0 &&
           reinterpret_cast<uintptr_t>(p.out_data) % bytes == 0;
  }
  int32_t flags(bool accum) const {
    return (accum ? kAccumulate : 0) | (mapped ? kOutTensorMap : 0) | (vector ? kVectorOut : 0);
  }
};

TensorMap output_map(const GemmProblem& p, const Geometry& g, const TileLayout& layout) {
  return {p.out == DType::kFloat32 ? TensorMap::Type::kFloat32 : TensorMap::Type::kBfloat16,
          p.out_data,
          {static_cast<uint64_t>(p.n), static_cast<uint64_t>(g.out_rows)},
          {static_cast<uint64_t>(p.n * size_in_bytes(p.out))},
          {static_cast<uint32_t>(layout.strip_cols()), kStripRows},
          swizzle_of(layout.strip_row_bytes())};
}

ParamBlock params_of(const GemmProblem& p, const Geometry& g, const Config& c, int clusters,
                     int32_t flags) {
  const auto i32 = [](int64_t x) { return static_cast<int32_t>(x); };
  const GemmParams params{.lhs_scale = static_cast<const float*>(p.lhs_scale),
                          .rhs_scale = static_cast<const float*>(p.rhs_scale),
                          .group_sizes = static_cast<const int32_t*>(p.group_sizes),
                          .out = p.out_data,
                          .mode = g.mode,
                          .m = i32(p.m),
                          .n = i32(p.n),
                          .groups = i32(p.groups),
                          .k_blocks = i32(ceil_div(p.k, kBlock)),
                          .lhs_rows = i32(g.lhs_rows),
                          .rhs_rows = i32(g.rhs_rows),
                          .lhs_group_rows = i32(g.lhs_group_rows),
                          .rhs_group_rows = i32(g.rhs_group_rows),
                          .cluster_m = c.cluster_m,
                          .cluster_n = c.cluster_n,
                          .band = band_of(p, c, clusters),
                          .flags = flags};
  constexpr uint32_t kAddresses = offsetof(GemmParams, mode) / sizeof(void*);
  static_assert(kAddresses == 4);
  return ParamBlock(params, kAddresses);
}

// The configuration to run, within `sms` multiprocessors.
int checked_config(const GemmProblem& p, const Geometry& g, int config, int sms) {
  JAXFP8_REQUIRE(sms >= 1, "the device has " + std::to_string(sms) + " SMs");
  JAXFP8_REQUIRE(config >= -1 && config < num_gemm_configs(p.kind),
                 "config is " + std::to_string(config) + "; allowed is -1 (the heuristic) to " +
                     std::to_string(num_gemm_configs(p.kind) - 1));
  if (config == -1) {
    const int best = choose_config(p, g, sms, false);
    if (max_tiles(p, g, config_of(g.outer_scales, best)) <= kMaxCount) return best;
    return std::max(choose_config(p, g, sms, true), 0);  // plan_gemm refuses what none can count
  }
  const Config& c = config_of(g.outer_scales, config);
  const int cluster = c.cluster_m * c.cluster_n;
  JAXFP8_REQUIRE(cluster <= sms, "config is " + std::to_string(config) +
                                     ", which runs in clusters of " + std::to_string(cluster) +
                                     " SMs; num_sms allows " + std::to_string(sms));
  return config;
}

}  // namespace

int num_gemm_configs(Kind kind) {
  return has_outer_scales(kind) ? kOuterScaleConfigs.size() : kBlockScaleConfigs.size();
}

std::string gemm_config_name(Kind kind, int config) {
  const Config& c = config_of(has_outer_scales(kind), config);
  return std::string(tile_name(c, has_outer_scales(kind))) + " cluster " +
         std::to_string(c.cluster_m) + "x" + std::to_string(c.cluster_n);
}

LaunchPlan plan_gemm(const GemmProblem& p, int config, int num_sms, int device_sms) {
  const Geometry g = geometry_of(p);
  check(p, g);
  const int sms = num_sms == 0 ? device_sms : std::min(num_sms, device_sms);
  LaunchPlan plan;
  plan.config = checked_config(p, g, config, sms);
  const Config& c = config_of(g.outer_scales, plan.config);
  const int cluster = c.cluster_m * c.cluster_n;
  const int64_t tiles = max_tiles(p, g, c);
  JAXFP8_REQUIRE(tiles <= kMaxCount, "out has more than " + std::to_string(kMaxCount) + " tiles");
  const int clusters = static_cast<int>(std::min<int64_t>(sms / cluster, tiles));

  const char* family = g.outer_scales ? "gemm_1d1d_" : "gemm_1d2d_";
  plan.image = std::string(family) + name(p.out);
  plan.kernel.reserve(48);
  plan.kernel.append(family).append(tile_name(c, g.outer_scales));
  for (const char* type : {short_name(p.lhs), short_name(p.rhs), name(p.out)}) {
    plan.kernel.append("_").append(type);
  }
  const TileLayout layout{c.block_m, c.block_n, c.warpgroups_n,
                          static_cast<int>(size_in_bytes(p.out)), g.outer_scales};
  plan.grid.x = clusters * cluster;
  plan.block.x = layout.threads();
  plan.cluster.x = cluster;
  plan.dynamic_smem = layout.shared_bytes();

  const OutAccess access(p);
  const LhsCopies lhs_copies(c.block_m, g.outer_scales, c.cluster_n, g.lhs_rows);
  const TensorMap lhs_map = operand_map(p.lhs_data, g.lhs_rows, p.k, lhs_copies.box);
  plan.args = {lhs_map, operand_map(p.rhs_data, g.rhs_rows, p.k, c.block_n / c.cluster_m),
               access.mapped ? output_map(p, g, layout) : lhs_map,  // unused
               params_of(p, g, c, clusters, access.flags(p.accum))};
  return plan;
}

}  // namespace jaxfp8
