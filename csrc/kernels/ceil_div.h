// ceil(a / b), on host and device.
#pragma once

namespace jaxfp8 {

template <class T>
constexpr T ceil_div(T a, T b) {
  return a / b + (a % b != 0);
}

}  // namespace jaxfp8
