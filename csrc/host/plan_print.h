// A launch plan as text, for people and tests.
#pragma once
#include <functional>
#include <string>

#include "plan.h"

namespace jaxfp8 {

// What to call an address, e.g. "lhs" or "lhs+1024".
using NameAddress = std::function<std::string(void*)>;

const char* name(TensorMap::Type type);
const char* name(TensorMap::Swizzle swizzle);

std::string to_string(const LaunchPlan& plan, const NameAddress& name_address);

}  // namespace jaxfp8
