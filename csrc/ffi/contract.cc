#include "ffi/contract.h"

#include <limits>

#include "ffi/sizes.h"

namespace jaxfp8 {
namespace {

constexpr uintptr_t kAlignment = 16;      // of a tensor map's base and of a vector load
constexpr int64_t kContractionStep = 16;  // bytes: strides of a tensor map
// Kernels and the tensor copy engine count along an axis in 32 bits.
constexpr int64_t kMaxSize = std::numeric_limits<int32_t>::max() - kBlock;

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

void check_activation(const Call& call, const Sizes& sizes) {
  const Target& target = *call.target;
  if (sizes[A] > 2) {
    fail(target, "x is " + describe(call.operands[0]) + "; its axis A must be 1, or 2 (gate, up)");
  }
  if (call.activation < 0 || call.activation >= kNumActivations) {
    fail(target,
         "activation is " + std::to_string(call.activation) + "; allowed is 0 (silu) or 1 (gelu)");
  }
  if (is_gradient(std::get<ActivationProblem::Kind>(target.kind)) &&
      call.operands[1].dtype != call.operands[0].dtype) {
    fail(target, "dy is " + describe(call.operands[1]) + "; allowed is the element type of x, " +
                     call.operands[0].dtype_name);
  }
}

// The FP8 arrays of one call that is no product share their element type.
void check_fp8(const Call& call) {
  const Target& target = *call.target;
  const Array* first = nullptr;
  const char* first_name = nullptr;
  const auto check = [&](const std::vector<ArraySpec>& specs, const std::vector<Array>& arrays) {
    for (size_t i = 0; i < arrays.size(); ++i) {
      if (specs[i].types != Types::kFp8) continue;
      if (first == nullptr) first = &arrays[i], first_name = specs[i].name;
      if (arrays[i].dtype != first->dtype) {
        fail(target, std::string(specs[i].name) + " is " + describe(arrays[i]) +
                         "; allowed is the element type of " + first_name + ", " +
                         first->dtype_name);
      }
    }
  };
  check(target.operands, call.operands);
  check(target.results, call.results);
}

// XLA aliases the two, but where it takes the call into a fusion it may forget that: plan_call has
// accum copied to out then, which only buffers that overlap in part rule out.
void check_overlap(const Target& target, const Array& accum, const Array& out) {
  const auto a = reinterpret_cast<uintptr_t>(accum.data), b = reinterpret_cast<uintptr_t>(out.data);
  const bool overlap = a < b ? b - a < size_in_bytes(accum) : a - b < size_in_bytes(out);
  if (a != b && overlap) {
    fail(target, "accum is in part the buffer of out; allowed is all of it, or one beside it");
  }
}

void check_product(const Call& call, const Sizes& sizes) {
  const Target& target = *call.target;
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
    check_overlap(target, accum, out);
  }
  // More than this device has: all of them, so that a program exported for another GPU runs.
  if (call.num_sms < 0) {
    fail(target, "num_sms is " + std::to_string(call.num_sms) + "; allowed is 0 (all) or more");
  }
}

}  // namespace

[[noreturn]] void fail(const Target& target, const std::string& message) {
  throw CallError(target.name + ": " + message);
}

Sizes check(const Call& call) {
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
  if (target.is<GemmProblem>()) {
    check_product(call, sizes);
  } else {
    check_fp8(call);
  }
  if (target.is<ActivationProblem>()) check_activation(call, sizes);
  return sizes;
}

}  // namespace jaxfp8
