// The XLA FFI handlers of every target, for the CUDA platform and for the CPU platform, where an
// installed driver emulates the device.
#pragma once
#include <utility>
#include <vector>

#include "xla/ffi/api/c_api.h"

namespace jaxfp8 {

using Handler = XLA_FFI_Error* (*)(XLA_FFI_CallFrame*);

// In the order of targets().
std::vector<Handler> cuda_handlers();
std::vector<Handler> emulated_handlers();

}  // namespace jaxfp8
