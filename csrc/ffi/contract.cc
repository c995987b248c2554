#include "ffi/contract.h"

#include <array>
#include <limits>

namespace jaxfp8 {
namespace {

constexpr int64_t kBlock = 128;
constexpr uintptr_t kAlignment = 16;      // of a tensor map's base and of a vector load
constexpr int64_t kContractionStep = 16;  // bytes: strides of a tensor map
// Kernels and the tensor copy engine count along an axis in 32 bits.
constexpr int64_t kMaxSize = std::numeric_limits<int32_t>::max() - kBlock;

constexpr size_t kNumBoundDims = 8;  // the symbols that a call binds come first in Dim

constexpr Dim G = Dim::kG, M = Dim::kM, N = Dim::kN, K = Dim::kK, T = Dim::kT,
              OneOrG = Dim::kOneOrG, F = Dim::kF, A = Dim::kA, MB = Dim::kMBlocks,
              NB = Dim::kNBlocks, KB = Dim::kKBlocks, FB = Dim::kFBlocks, TB = Dim::kTBlocks,
              PaddedM = Dim::kPaddedM;

std::vector<Target> make_targets() {
  using Quantize = QuantizeProblem::Kind;
  using Activation = ActivationProblem::Kind;
  using Gemm = GemmProblem::Kind;
  constexpr Types fp8 = Types::kFp8, x = Types::kFloat, f32 = Types::kFloat32, s32 = Types::kInt32,
                  out = Types::kOutput;
  std::vector<Target> all;
  const auto quantize = [&](const char* name, Quantize kind, std::vector<ArraySpec> operands,
                            std::vector<ArraySpec> results) {
    all.push_back({std::string("jaxfp8_quantize_") + name + "_v1",
                   Family::kQuantize,
                   kind,
                   {},
                   std::move(operands),
                   std::move(results)});
  };
  const auto activation = [&](const char* name, Activation kind, std::vector<ArraySpec> operands,
                              std::vector<ArraySpec> results) {
    Target target{std::string("jaxfp8_activation_") + name + "_v1",
                  Family::kActivation,
                  {},
                  {},
                  std::move(operands),
                  std::move(results)};
    target.activation = kind;
    all.push_back(std::move(target));
  };
  const auto gemm = [&](const char* name, Gemm kind, const std::vector<ArraySpec>& operands,
                        const ArraySpec& result) {
    std::string prefix = std::string("jaxfp8_") + name;
    all.push_back({prefix + "_v1", Family::kGemm, {}, kind, operands, {result}});
    Target accumulating{prefix + "_accum_v1", Family::kGemm, {}, kind, operands, {result}, true};
    accumulating.operands.push_back({"accum", result.types, result.dims});
    all.push_back(std::move(accumulating));
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
  return all;
}

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

bool allows(Types types, DType dtype) {
  switch (types) {
    case Types::kFp8:
      return dtype == DType::kF8E4M3FN || dtype == DType::kF8E5M2;
    case Types::kFloat:
      return dtype == DType::kBFloat16 || dtype == DType::kFloat16 || dtype == DType::kFloat32;
    case Types::kFloat32:
      return dtype == DType::kFloat32;
    case Types::kInt32:
      return dtype == DType::kInt32;
    case Types::kOutput:
      return dtype == DType::kBFloat16 || dtype == DType::kFloat32;
  }
  return false;
}

const char* describe(Types types) {
  switch (types) {
    case Types::kFp8:
      return "f8e4m3fn or f8e5m2";
    case Types::kFloat:
      return "bf16, f16 or f32";
    case Types::kFloat32:
      return "f32";
    case Types::kInt32:
      return "s32";
    case Types::kOutput:
      return "bf16 or f32";
  }
  return "?";
}

// The sizes of a call's symbols; 0: not bound yet.
class Sizes {
 public:
  int64_t operator[](Dim dim) const {
    switch (dim) {
      case Dim::kMBlocks:
        return ceil_div((*this)[M], kBlock);
      case Dim::kNBlocks:
        return ceil_div((*this)[N], kBlock);
      case Dim::kKBlocks:
        return ceil_div((*this)[K], kBlock);
      case Dim::kFBlocks:
        return ceil_div((*this)[F], kBlock);
      case Dim::kTBlocks:
        return ((*this)[T] != 0 ? (*this)[T] : (*this)[PaddedM]) / kBlock;
      case Dim::kPaddedM:
        return ceil_div((*this)[M], kBlock) * kBlock + kBlock * (*this)[G];
      default:
        return bound_[static_cast<size_t>(dim)];
    }
  }

  // Binds `dim` or compares it.
  bool matches(Dim dim, int64_t size) {
    size_t i = static_cast<size_t>(dim);
    if (i < kNumBoundDims && bound_[i] == 0) bound_[i] = size;
    return (*this)[dim] == size;
  }

  std::string describe(Dim dim) const {
    static constexpr const char* kNames[] = {
        "G", "M",           "N",           "K",           "T",           "1 or G", "F",
        "A", "ceil(M/128)", "ceil(N/128)", "ceil(K/128)", "ceil(F/128)", "T/128",  "T"};
    std::string text = kNames[static_cast<size_t>(dim)];
    int64_t size = (*this)[dim];
    return size == 0 ? text : text + "=" + std::to_string(size);
  }

 private:
  std::array<int64_t, kNumBoundDims> bound_{};
};

std::string describe(const Array& array) {
  std::string text = std::string(array.dtype_name) + "[";
  for (size_t i = 0; i < array.rank; ++i) {
    text += (i == 0 ? "" : ",") + std::to_string(array.dims[i]);
  }
  return text + "]";
}

std::string describe(const std::vector<Dim>& dims, const Sizes& sizes) {
  std::string text = "(";
  for (size_t i = 0; i < dims.size(); ++i) text += (i == 0 ? "" : ", ") + sizes.describe(dims[i]);
  return text + ")";
}

[[noreturn]] void fail(const Target& target, const std::string& message) {
  throw CallError(target.name + ": " + message);
}

void check_array(const Target& target, const ArraySpec& spec, const Array& array, Sizes& sizes) {
  const auto mismatch = [&](const Sizes& known) {
    fail(target, std::string(spec.name) + " is " + describe(array) + "; allowed is " +
                     describe(spec.types) + " of shape " + describe(spec.dims, known));
  };
  if (!array.dtype || !allows(spec.types, *array.dtype) || array.rank != spec.dims.size()) {
    mismatch(sizes);
  }
  const Sizes known = sizes;
  for (size_t i = 0; i < array.rank; ++i) {
    int64_t size = array.dims[i];
    if (size < 1 || size > kMaxSize) {
      fail(target, std::string(spec.name) + " is " + describe(array) + "; every axis has 1 to " +
                       std::to_string(kMaxSize) + " elements (an empty call is never made)");
    }
    if (!sizes.matches(spec.dims[i], size)) mismatch(known);
  }
  auto address = reinterpret_cast<uintptr_t>(array.data);
  if (address == 0 || address % kAlignment != 0) {
    fail(target, std::string(spec.name) + " is at address " + std::to_string(address) +
                     "; it must be a multiple of " + std::to_string(kAlignment) + " bytes");
  }
}

Sizes check(const Call& call, int device_sms) {
  const Target& target = *call.target;
  const auto count = [&](const char* what, size_t given, size_t wanted) {
    if (given == wanted) return;
    fail(target, std::to_string(given) + " " + what + "; allowed are " + std::to_string(wanted));
  };
  count("operands", call.operands.size(), target.operands.size());
  count("results", call.results.size(), target.results.size());

  Sizes sizes;
  for (size_t i = 0; i < call.operands.size(); ++i) {
    check_array(target, target.operands[i], call.operands[i], sizes);
  }
  for (size_t i = 0; i < call.results.size(); ++i) {
    check_array(target, target.results[i], call.results[i], sizes);
  }

  if (target.family == Family::kActivation) {
    if (sizes[A] > 2) {
      fail(target,
           "x is " + describe(call.operands[0]) + "; its axis A must be 1, or 2 (gate, up)");
    }
    if (call.activation < 0 || call.activation >= kNumActivations) {
      fail(target, "activation is " + std::to_string(call.activation) +
                       "; allowed is 0 (silu) or 1 (gelu)");
    }
    if (target.operands.size() > 1 && target.operands[1].types == Types::kFloat &&
        call.operands[1].dtype != call.operands[0].dtype) {
      fail(target, "dy is " + describe(call.operands[1]) + "; allowed is the element type of x, " +
                       call.operands[0].dtype_name);
    }
  }
  if (target.family != Family::kGemm) {
    // The two FP8 results of one call share their element type.
    const Array* first = nullptr;
    for (size_t i = 0; i < call.results.size(); ++i) {
      if (target.results[i].types != Types::kFp8) continue;
      if (first == nullptr) first = &call.results[i];
      if (call.results[i].dtype != first->dtype) {
        fail(target, std::string(target.results[i].name) + " is " + describe(call.results[i]) +
                         "; allowed is the element type of " + target.results[0].name + ", " +
                         first->dtype_name);
      }
    }
    return sizes;
  }

  if (int64_t one_or_g = sizes[OneOrG]; one_or_g != 0 && one_or_g != 1 && one_or_g != sizes[G]) {
    fail(target, "lhs is " + describe(call.operands[0]) +
                     "; its first axis must be 1 or G=" + std::to_string(sizes[G]));
  }
  Dim contraction = sizes[T] != 0 ? T : K;
  int64_t step = contraction == T ? kBlock : kContractionStep;
  if (sizes[contraction] % step != 0) {
    fail(target, "lhs is " + describe(call.operands[0]) + "; its contraction " +
                     (contraction == T ? "T" : "K") + " must be a multiple of " +
                     std::to_string(step));
  }
  if (target.accum) {
    const Array& accum = call.operands.back();
    const Array& out = call.results.front();
    if (accum.dtype != out.dtype) {
      fail(target,
           "accum is " + describe(accum) + "; allowed is the type of out, " + describe(out));
    }
    if (accum.data != out.data) fail(target, "accum is not the buffer of out; it must be aliased");
  }
  if (call.num_sms < 0 || call.num_sms > device_sms) {
    fail(target, "num_sms is " + std::to_string(call.num_sms) + "; allowed is 0 (all) to the " +
                     std::to_string(device_sms) + " of this device");
  }
  return sizes;
}

QuantizeProblem quantize_problem(const Call& call, const Sizes& sizes) {
  using Kind = QuantizeProblem::Kind;
  const Target& target = *call.target;
  bool weight = target.quantize == Kind::kWeight;
  bool ragged = target.quantize == Kind::kRaggedColumns || target.quantize == Kind::kRaggedBoth;
  bool columns = target.quantize == Kind::kColumns || target.quantize == Kind::kRaggedColumns;
  bool both = target.quantize == Kind::kBoth || target.quantize == Kind::kRaggedBoth;
  QuantizeProblem problem;
  problem.kind = target.quantize;
  problem.groups = target.quantize == Kind::kRows ? 1 : sizes[G];
  problem.rows = sizes[weight ? K : M];
  problem.cols = sizes[weight ? N : K];
  problem.in = *call.operands[0].dtype;
  problem.out = *call.results[0].dtype;
  problem.pow2 = call.pow2;
  problem.x = call.operands[0].data;
  if (ragged) problem.group_sizes = call.operands[1].data;
  (columns ? problem.column_data : problem.row_data) = call.results[0].data;
  (columns ? problem.column_scale : problem.row_scale) = call.results[1].data;
  if (weight || both) problem.column_data = call.results[2].data;
  if (both) problem.column_scale = call.results[3].data;
  return problem;
}

ActivationProblem activation_problem(const Call& call, const Sizes& sizes) {
  using Kind = ActivationProblem::Kind;
  Kind kind = call.target->activation;
  bool ragged = kind == Kind::kRaggedBoth || kind == Kind::kRaggedGradBoth;
  bool gradient = kind == Kind::kGradBoth || kind == Kind::kRaggedGradBoth;
  ActivationProblem problem;
  problem.kind = kind;
  problem.groups = kind == Kind::kRows ? 1 : sizes[G];
  problem.rows = sizes[M];
  problem.cols = sizes[F];
  problem.gated = sizes[A] == 2;
  problem.activation = call.activation;
  problem.in = *call.operands[0].dtype;
  problem.out = *call.results[0].dtype;
  problem.pow2 = call.pow2;
  problem.x = call.operands[0].data;
  if (gradient) problem.dy = call.operands[1].data;
  if (ragged) problem.group_sizes = call.operands.back().data;
  problem.row_data = call.results[0].data;
  problem.row_scale = call.results[1].data;
  if (kind != Kind::kRows) {
    problem.column_data = call.results[2].data;
    problem.column_scale = call.results[3].data;
  }
  return problem;
}

GemmProblem gemm_problem(const Call& call, const Sizes& sizes) {
  const Target& target = *call.target;
  bool wgrad = target.gemm == GemmProblem::Kind::kGroupedWgrad;
  bool grouped = target.gemm != GemmProblem::Kind::k1d2d && target.gemm != GemmProblem::Kind::k1d1d;
  GemmProblem problem;
  problem.kind = target.gemm;
  problem.m = sizes[wgrad ? N : M];
  problem.n = sizes[wgrad ? K : N];
  problem.k = sizes[wgrad ? T : K];
  problem.groups = sizes[G];
  problem.lhs_shared = sizes[OneOrG] == 1;
  problem.lhs = *call.operands[0].dtype;
  problem.rhs = *call.operands[2].dtype;
  problem.out = *call.results[0].dtype;
  problem.accum = target.accum;
  problem.lhs_data = call.operands[0].data;
  problem.lhs_scale = call.operands[1].data;
  problem.rhs_data = call.operands[2].data;
  problem.rhs_scale = call.operands[3].data;
  problem.group_sizes = grouped ? call.operands[4].data : nullptr;
  problem.out_data = call.results[0].data;
  return problem;
}

}  // namespace

const std::vector<Target>& targets() {
  static const auto* all = new std::vector<Target>(make_targets());  // lives as long as any thread
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

LaunchPlan plan_call(const Call& call, int device_sms) {
  Sizes sizes = check(call, device_sms);
  try {
    switch (call.target->family) {
      case Family::kGemm:
        return plan_gemm(gemm_problem(call, sizes), call.config, call.num_sms, device_sms);
      case Family::kActivation:
        return plan_activation(activation_problem(call, sizes), device_sms);
      case Family::kQuantize:
        return plan_quantize(quantize_problem(call, sizes), device_sms);
    }
    fail(*call.target, "unknown family");
  } catch (const std::invalid_argument& error) {
    // A planner names its family; a caller knows the target.
    std::string message = error.what();
    size_t family = message.find(": ");
    fail(*call.target, family == std::string::npos ? message : message.substr(family + 2));
  }
}

}  // namespace jaxfp8
