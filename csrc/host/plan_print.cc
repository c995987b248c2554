#include "plan_print.h"

#include <type_traits>

namespace jaxfp8 {
std::string to_string(const Dim3& d) {
  return std::to_string(d.x) + "x" + std::to_string(d.y) + "x" + std::to_string(d.z);
}

const char* name(TensorMap::Type type) {
  switch (type) {
    case TensorMap::Type::kUint8:
      return "u8";
    case TensorMap::Type::kBfloat16:
      return "bf16";
    case TensorMap::Type::kFloat32:
      return "f32";
  }
  return "?";
}

const char* name(TensorMap::Swizzle swizzle) {
  switch (swizzle) {
    case TensorMap::Swizzle::kNone:
      return "none";
    case TensorMap::Swizzle::k32B:
      return "32B";
    case TensorMap::Swizzle::k64B:
      return "64B";
    case TensorMap::Swizzle::k128B:
      return "128B";
  }
  return "?";
}

std::string to_string(const LaunchPlan& plan, const NameAddress& name_address) {
  std::string text = plan.image + ": " + plan.kernel + "\n  grid " + to_string(plan.grid) +
                     ", block " + to_string(plan.block) + ", cluster " + to_string(plan.cluster) +
                     ", " + std::to_string(plan.dynamic_smem) + " bytes of dynamic shared memory";
  for (size_t i = 0; i < plan.args.size(); ++i) {
    text += "\n  " + std::to_string(i) + ": ";
    std::visit(
        [&](const auto& arg) {
          using T = std::decay_t<decltype(arg)>;
          if constexpr (std::is_same_v<T, TensorMap>) {
            text += std::string("tensor map of ") + name_address(arg.base) + ", " + name(arg.type) +
                    " " + to_string(arg.dims) + ", strides " + to_string(arg.strides) + ", box " +
                    to_string(arg.box) + ", swizzle " + name(arg.swizzle);
          } else if constexpr (std::is_same_v<T, ParamBlock>) {
            text += "struct of " + std::to_string(arg.size) + " bytes:";
            for (uint32_t a = 0; a < arg.num_addresses; ++a) {
              text += " " + name_address(arg.address(a));
            }
            for (uint32_t at = 8 * arg.num_addresses; at + 4 <= arg.size; at += 4) {
              int32_t value;
              std::memcpy(&value, arg.bytes.data() + at, sizeof(value));
              text += " " + std::to_string(value);
            }
          } else if constexpr (std::is_same_v<T, void*>) {
            text += name_address(arg);
          } else {
            text += std::to_string(arg);
          }
        },
        plan.args[i]);
  }
  if (plan.copy) {
    text += "\n  before: " + std::to_string(plan.copy->bytes) + " bytes of " +
            name_address(const_cast<void*>(plan.copy->source)) + " are copied to " +
            name_address(plan.copy->target);
  }
  return text;
}

}  // namespace jaxfp8
