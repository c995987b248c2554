// The XLA FFI handlers of every target, for the CUDA platform and for the CPU platform, where an
// installed driver emulates the device.
#pragma once
#include <utility>
#include <vector>

#include "xla/ffi/api/c_api.h"

namespace jaxfp8 {

using Handler = XLA_FFI_Error* (*)(XLA_FFI_CallFrame*);

// Of the execute stage, in the order of targets().
std::vector<Handler> cuda_handlers();
std::vector<Handler> emulated_handlers();

// Of the initialize stage: each loads the kernel that the execute stage will launch. XLA runs it on
// every device before any of them begins, so that no load meets a collective that waits for its
// peers, or a capture.
std::vector<Handler> cuda_initializers();

}  // namespace jaxfp8
