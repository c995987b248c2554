// The Python module jaxfp8._C.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>

#include "build_info.h"
#include "xla/ffi/api/c_api.h"

namespace nb = nanobind;

namespace {

nb::dict build_info() {
  nb::list images;
  for (const char* image : jaxfp8::build::kImages) {
    if (image != nullptr) images.append(image);
  }
  nb::dict info;
  info["version"] = jaxfp8::build::kVersion;
  info["nvcc"] = jaxfp8::build::kNvccVersion;
  info["ffi"] = nb::make_tuple(XLA_FFI_API_MAJOR, XLA_FFI_API_MINOR);
  info["images"] = images;
  return info;
}

}  // namespace

NB_MODULE(_C, m) { m.def("build_info", &build_info); }
