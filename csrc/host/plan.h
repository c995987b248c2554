// What a launch is, as plain data. Planning functions (one per kernel family) are pure: sizes,
// addresses, SM count and attributes in, LaunchPlan out. csrc/driver executes a plan; tests print
// it.
#pragma once
#include <array>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <optional>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <variant>
#include <vector>

namespace jaxfp8 {

// Operand of cuTensorMapEncodeTiled: a matrix. Dimensions innermost first, in elements; strides in
// bytes, for dimensions 1 and up.
struct TensorMap {
  enum class Type { kUint8, kBfloat16, kFloat32 };
  enum class Swizzle { kNone, k32B, k64B, k128B };
  Type type;
  void* base;
  std::array<uint64_t, 2> dims;
  std::array<uint64_t, 1> strides;
  std::array<uint32_t, 2> box;
  Swizzle swizzle;
};

// A struct that a kernel takes by value: addresses first, then 32-bit integers.
struct ParamBlock {
  alignas(8) std::array<std::byte, 128> bytes{};
  uint32_t size = 0, num_addresses = 0;

  template <class Params>
  ParamBlock(const Params& params, uint32_t num_addresses)
      : size(sizeof(Params)), num_addresses(num_addresses) {
    static_assert(sizeof(Params) <= sizeof(bytes) && alignof(Params) == 8 &&
                  std::is_trivially_copyable_v<Params>);
    std::memcpy(bytes.data(), &params, sizeof(Params));
  }
  void* address(size_t i) const {
    void* value;
    std::memcpy(&value, bytes.data() + i * sizeof(void*), sizeof(void*));
    return value;
  }
};

// One kernel parameter, in order.
using KernelArg = std::variant<TensorMap, ParamBlock, void*, int32_t, uint32_t, int64_t, float>;

// A problem that no kernel serves. The message names the argument, what it was and what is allowed;
// whose call it was is the caller's to say.
struct PlanError : std::invalid_argument {
  using std::invalid_argument::invalid_argument;
};

struct Dim3 {
  uint32_t x = 1, y = 1, z = 1;
};

// Device memory to device memory, on the launch's stream before it.
struct Copy {
  void* target;
  const void* source;
  uint64_t bytes;
};

struct LaunchPlan {
  std::string image;   // csrc/kernels/*/<image>.cu, compiled to <image>.cubin and <image>.ptx
  std::string kernel;  // extern "C" name in that image
  Dim3 grid, block, cluster;
  uint32_t dynamic_smem = 0;
  int config = -1;  // the configuration that was chosen; -1: the kernel has none
  std::vector<KernelArg> args;
  std::optional<Copy> copy;
};

}  // namespace jaxfp8
