// A launch plan as text, for people and tests.
#pragma once
#include <array>
#include <functional>
#include <string>

#include "plan.h"

namespace jaxfp8 {

// What to call an address, e.g. "lhs" or "lhs+1024".
using NameAddress = std::function<std::string(void*)>;

const char* name(TensorMap::Type type);
const char* name(TensorMap::Swizzle swizzle);

std::string to_string(const Dim3& d);

template <class T, size_t kCount>
std::string to_string(const std::array<T, kCount>& values) {
  std::string text = "(";
  for (size_t i = 0; i < values.size(); ++i) {
    text += (i == 0 ? "" : ", ") + std::to_string(values[i]);
  }
  return text + ")";
}

std::string to_string(const LaunchPlan& plan, const NameAddress& name_address);

}  // namespace jaxfp8
