// The table of driver entry points, and errors of its calls as exceptions.
#pragma once
#include <functional>
#include <stdexcept>
#include <string>

#include "driver/cuda_abi.h"

namespace jaxfp8::driver {

// What a failed call reports: the entry point, its arguments, the driver's name and text, and what
// to do about it where that is known.
struct DriverError : std::runtime_error {
  explicit DriverError(const std::string& message, cuda::Result result = cuda::kSuccess)
      : std::runtime_error(message), result(result) {}
  cuda::Result result;  // kSuccess: a plan that no driver was asked about
};

// There is nothing to run on: no driver, no device, the wrong device, or no compiled kernels.
struct UnavailableError : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// `source`: what is to have the entry points, for the error about those that it has not.
cuda::Table fill_table(const char* source, const std::function<void*(const char* symbol)>& resolve);
cuda::Table load_libcuda();

struct Api {
  cuda::Table table;

  // Throws DriverError "<call>: <name>: <text>" unless `result` is success.
  template <class Call>
  void check(cuda::Result result, Call call) const {
    if (result != cuda::kSuccess) throw error(call(), result);
  }
  DriverError error(const std::string& call, cuda::Result result) const;
};

}  // namespace jaxfp8::driver
