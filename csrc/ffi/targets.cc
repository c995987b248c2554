#include <stdexcept>
#include <utility>

#include "ffi/contract.h"
#include "ffi/sizes.h"

namespace jaxfp8 {
namespace {

Target target(const std::string& name, Kind kind, std::vector<ArraySpec> operands,
              std::vector<ArraySpec> results) {
  return {"jaxfp8_" + name + "_v1", kind, std::move(operands), std::move(results)};
}

constexpr Types fp8 = Types::kFp8, x = Types::kFloat, f32 = Types::kFloat32, s32 = Types::kInt32,
                out = Types::kOutput;

void add_quantizers(std::vector<Target>& all) {
  using Quantize = QuantizeProblem::Kind;
  const auto quantize = [&](const std::string& name, Quantize kind, std::vector<ArraySpec> operands,
                            std::vector<ArraySpec> results) {
    all.push_back(target("quantize_" + name, kind, std::move(operands), std::move(results)));
  };
  quantize("rows", Quantize::kRows, {{"x", x, {M, K}}},
           {{"data", fp8, {M, K}}, {"scale", f32, {M, KB}}});
  quantize("columns", Quantize::kColumns, {{"x", x, {G, M, K}}},
           {{"data", fp8, {G, K, M}}, {"scale", f32, {G, K, MB}}});
  quantize("both", Quantize::kBoth, {{"x", x, {G, M, K}}},
           {{"row_data", fp8, {G, M, K}},
            {"row_scale", f32, {G, M, KB}},
            {"column_data", fp8, {G, K, M}},
            {"column_scale", f32, {G, K, MB}}});
  quantize("blocks", Quantize::kBlocks, {{"x", x, {G, M, K}}},
           {{"data", fp8, {G, M, K}}, {"scale", f32, {G, MB, KB}}});
  quantize("weight", Quantize::kWeight, {{"w", x, {G, K, N}}},
           {{"data_nn", fp8, {G, K, N}}, {"scale", f32, {G, KB, NB}}, {"data_nt", fp8, {G, N, K}}});
  quantize("ragged_columns", Quantize::kRaggedColumns,
           {{"x", x, {M, K}}, {"group_sizes", s32, {G}}},
           {{"data", fp8, {K, PaddedM}}, {"scale", f32, {K, TB}}});
  quantize("ragged_both", Quantize::kRaggedBoth, {{"x", x, {M, K}}, {"group_sizes", s32, {G}}},
           {{"row_data", fp8, {M, K}},
            {"row_scale", f32, {M, KB}},
            {"column_data", fp8, {K, PaddedM}},
            {"column_scale", f32, {K, TB}}});
}

void add_activations(std::vector<Target>& all) {
  using Activation = ActivationProblem::Kind;
  const auto activation = [&](const std::string& name, Activation kind,
                              std::vector<ArraySpec> operands, std::vector<ArraySpec> results) {
    all.push_back(target("activation_" + name, kind, std::move(operands), std::move(results)));
  };
  activation("rows", Activation::kRows, {{"x", x, {M, A, F}}},
             {{"data", fp8, {M, F}}, {"scale", f32, {M, FB}}});
  activation("both", Activation::kBoth, {{"x", x, {G, M, A, F}}},
             {{"row_data", fp8, {G, M, F}},
              {"row_scale", f32, {G, M, FB}},
              {"column_data", fp8, {G, F, M}},
              {"column_scale", f32, {G, F, MB}}});
  activation("grad_both", Activation::kGradBoth, {{"x", x, {G, M, A, F}}, {"dy", x, {G, M, F}}},
             {{"row_data", fp8, {G, M, A, F}},
              {"row_scale", f32, {G, M, A, FB}},
              {"column_data", fp8, {G, A, F, M}},
              {"column_scale", f32, {G, A, F, MB}}});
  activation("ragged_both", Activation::kRaggedBoth,
             {{"x", x, {M, A, F}}, {"group_sizes", s32, {G}}},
             {{"row_data", fp8, {M, F}},
              {"row_scale", f32, {M, FB}},
              {"column_data", fp8, {F, PaddedM}},
              {"column_scale", f32, {F, TB}}});
  activation("ragged_grad_both", Activation::kRaggedGradBoth,
             {{"x", x, {M, A, F}}, {"dy", x, {M, F}}, {"group_sizes", s32, {G}}},
             {{"row_data", fp8, {M, A, F}},
              {"row_scale", f32, {M, A, FB}},
              {"column_data", fp8, {A, F, PaddedM}},
              {"column_scale", f32, {A, F, TB}}});
  activation("weighted_rows", Activation::kWeightedRows,
             {{"x", out, {M, A, F}}, {"weight", f32, {M}}},
             {{"data", fp8, {M, F}}, {"scale", f32, {M, FB}}});
  activation("ragged_weighted_both", Activation::kRaggedWeightedBoth,
             {{"x", out, {M, A, F}}, {"weight", f32, {M}}, {"group_sizes", s32, {G}}},
             {{"row_data", fp8, {M, F}},
              {"row_scale", f32, {M, FB}},
              {"column_data", fp8, {F, PaddedM}},
              {"column_scale", f32, {F, TB}}});
  activation(
      "ragged_weighted_grad_both", Activation::kRaggedWeightedGradBoth,
      {{"x", out, {M, A, F}}, {"dy", out, {M, F}}, {"weight", f32, {M}}, {"group_sizes", s32, {G}}},
      {{"row_data", fp8, {M, A, F}},
       {"row_scale", f32, {M, A, FB}},
       {"column_data", fp8, {A, F, PaddedM}},
       {"column_scale", f32, {A, F, TB}},
       {"weight_grad", f32, {M, FB}}});
}

void add_gathers(std::vector<Target>& all) {
  using Gather = GatherProblem::Kind;
  const auto gather = [&](const std::string& name, Gather kind) {
    std::vector<ArraySpec> operands = {{"x", is_of_fp8(kind) ? fp8 : x, {S, K}}};
    if (is_of_fp8(kind)) operands.push_back({"x_scale", f32, {S, KB}});
    operands.push_back({"source", s32, {M}});
    const bool both = has_columns(kind);
    std::vector<ArraySpec> results = {{both ? "row_data" : "data", fp8, {M, K}},
                                      {both ? "row_scale" : "scale", f32, {M, KB}}};
    if (both) {
      operands.push_back({"group_sizes", s32, {G}});
      results.push_back({"column_data", fp8, {K, PaddedM}});
      results.push_back({"column_scale", f32, {K, TB}});
    }
    all.push_back(target("gather_" + name, kind, std::move(operands), std::move(results)));
  };
  gather("quantize_rows", Gather::kQuantizeRows);
  gather("quantize_both", Gather::kQuantizeBoth);
  gather("rows", Gather::kRows);
  gather("requantize_both", Gather::kRequantizeBoth);
}

void add_sums(std::vector<Target>& all) {
  using Sum = SumRowsProblem::Kind;
  const std::vector<ArraySpec> operands = {{"rows", out, {M, K}}, {"position", s32, {S, J}}};
  all.push_back(target("sum_rows", Sum::kPlain, operands, {{"out", out, {S, K}}}));
  all.push_back(target("sum_weighted_rows", Sum::kWeighted, operands, {{"out", out, {S, K}}}));
  all.back().operands.push_back({"weight", f32, {S, J}});
}

// Each followed by its accumulating twin.
void add_products(std::vector<Target>& all) {
  using Gemm = GemmProblem::Kind;
  const auto gemm = [&](const std::string& name, Gemm kind, const std::vector<ArraySpec>& operands,
                        const ArraySpec& result) {
    all.push_back(target(name, kind, operands, {result}));
    Target accumulating = target(name + "_accum", kind, operands, {result});
    accumulating.operands.push_back({"accum", result.types, result.dims});
    accumulating.accum = true;
    all.push_back(std::move(accumulating));
  };
  gemm("gemm_1d2d", Gemm::k1d2d,
       {{"lhs", fp8, {OneOrG, M, K}},
        {"lhs_scale", f32, {OneOrG, M, KB}},
        {"rhs", fp8, {G, N, K}},
        {"rhs_scale", f32, {G, NB, KB}}},
       {"out", out, {G, M, N}});
  gemm("gemm_1d1d", Gemm::k1d1d,
       {{"lhs", fp8, {OneOrG, M, K}},
        {"lhs_scale", f32, {OneOrG, M, KB}},
        {"rhs", fp8, {G, N, K}},
        {"rhs_scale", f32, {G, N, KB}}},
       {"out", out, {G, M, N}});
  gemm("grouped_gemm", Gemm::kGrouped,
       {{"lhs", fp8, {M, K}},
        {"lhs_scale", f32, {M, KB}},
        {"rhs", fp8, {G, N, K}},
        {"rhs_scale", f32, {G, NB, KB}},
        {"group_sizes", s32, {G}}},
       {"out", out, {M, N}});
  gemm("masked_grouped_gemm", Gemm::kMasked,
       {{"lhs", fp8, {G, M, K}},
        {"lhs_scale", f32, {G, M, KB}},
        {"rhs", fp8, {G, N, K}},
        {"rhs_scale", f32, {G, NB, KB}},
        {"masked_m", s32, {G}}},
       {"out", out, {G, M, N}});
  gemm("grouped_wgrad_gemm", Gemm::kGroupedWgrad,
       {{"lhs", fp8, {N, T}},
        {"lhs_scale", f32, {N, TB}},
        {"rhs", fp8, {K, T}},
        {"rhs_scale", f32, {K, TB}},
        {"group_sizes", s32, {G}}},
       {"out", out, {G, N, K}});
}

}  // namespace

bool Target::quantizes() const {
  const auto* gather = std::get_if<GatherProblem::Kind>(&kind);
  return gather != nullptr ? *gather != GatherProblem::Kind::kRows
                           : is<QuantizeProblem>() || is<ActivationProblem>();
}

const std::vector<Target>& targets() {
  static const auto* all = [] {
    auto* made = new std::vector<Target>;  // lives as long as any thread
    add_quantizers(*made);
    add_activations(*made);
    add_gathers(*made);
    add_sums(*made);
    add_products(*made);
    if (made->size() != kNumTargets) throw std::logic_error("kNumTargets is out of date");
    return made;
  }();
  return *all;
}

const Target& find_target(const std::string& name) {
  std::string known;
  for (const Target& target : targets()) {
    if (target.name == name) return target;
    known += (known.empty() ? "" : ", ") + target.name;
  }
  throw CallError("there is no target " + name + "; known are " + known);
}

}  // namespace jaxfp8
