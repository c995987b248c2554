// The custom calls of docs/architecture.md as a table, and the one check of a call against it.
#pragma once
#include <cstdint>
#include <initializer_list>
#include <optional>
#include <stdexcept>
#include <string>
#include <variant>
#include <vector>

#include "host/activation.h"
#include "host/dtype.h"
#include "host/gather.h"
#include "host/gemm.h"
#include "host/plan.h"
#include "host/quantize.h"
#include "host/sum_rows.h"

namespace jaxfp8 {

// A call that breaks the contract. The message names the argument, what it was and what is allowed.
struct CallError : std::invalid_argument {
  using std::invalid_argument::invalid_argument;
};

// One array of a call, as it came.
struct Array {
  void* data = nullptr;
  std::optional<DType> dtype;   // empty: none that a kernel knows
  const char* dtype_name = "";  // as XLA writes it
  const int64_t* dims = nullptr;
  size_t rank = 0;
};

inline uint64_t size_in_bytes(const Array& array) {
  uint64_t size = array.dtype ? size_in_bytes(*array.dtype) : 0;
  for (size_t d = 0; d < array.rank; ++d) size *= array.dims[d];
  return size;
}

// A symbol of a shape. The first that a call mentions binds it; the derived ones follow from it.
enum class Dim : uint8_t {
  kG,
  kM,
  kN,
  kK,
  kT,       // a group-padded token axis: whole blocks of 128
  kOneOrG,  // 1: shared by all groups
  kF,
  kA,  // 2: gate and up side by side, or 1
  kS,  // rows that a gather reads and that a sum makes: tokens
  kJ,  // choices of a token
  kMBlocks,
  kNBlocks,
  kKBlocks,
  kFBlocks,
  kTBlocks,
  kPaddedM,  // T of a ragged quantization: ceil(M/128)*128 + 128*G
};

enum class Types : uint8_t { kFp8, kFloat, kFloat32, kInt32, kOutput };

struct ArraySpec {
  const char* name;
  Types types;
  std::vector<Dim> dims;
};

using Kind = std::variant<QuantizeProblem::Kind, ActivationProblem::Kind, GatherProblem::Kind,
                          SumRowsProblem::Kind, GemmProblem::Kind>;

struct Target {
  std::string name;
  Kind kind;
  std::vector<ArraySpec> operands, results;
  bool accum = false;  // the last operand is aliased to the result

  template <class Problem>
  bool is() const {
    return std::holds_alternative<typename Problem::Kind>(kind);
  }
  // Whether the call makes scales, and so has the attribute pow2.
  bool quantizes() const;
};

// A handler is a function of its own for each target; targets() asserts that there are as many.
constexpr size_t kNumTargets = 31;

// In the order of docs/architecture.md, each product followed by its accumulating twin.
const std::vector<Target>& targets();
const Target& find_target(const std::string& name);  // throws CallError

struct Call {
  const Target* target = nullptr;
  std::vector<Array> operands, results;
  bool pow2 = false;
  int32_t activation = 0;
  int32_t config = -1;
  int32_t num_sms = 0;
};

// Checks every shape, dtype, address and attribute, and plans the launch. Throws CallError, also
// where a kernel family cannot serve what the contract allows.
LaunchPlan plan_call(const Call& call, int device_sms);

}  // namespace jaxfp8
