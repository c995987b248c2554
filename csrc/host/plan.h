// What a launch is, as plain data. Planning functions (one per kernel family) are pure: sizes,
// addresses, SM count and attributes in, LaunchPlan out. csrc/driver executes a plan; tests print
// it.
#pragma once
#include <array>
#include <cstdint>
#include <string>
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

// One kernel parameter, in order.
using KernelArg = std::variant<TensorMap, void*, int32_t, uint32_t, int64_t, float>;

struct Dim3 {
  uint32_t x = 1, y = 1, z = 1;
};

struct LaunchPlan {
  std::string image;   // csrc/kernels/*/<image>.cu, compiled to <image>.cubin and <image>.ptx
  std::string kernel;  // extern "C" name in that image
  Dim3 grid, block, cluster;
  uint32_t dynamic_smem = 0;
  std::vector<KernelArg> args;
};

}  // namespace jaxfp8
