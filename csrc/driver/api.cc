#include "driver/api.h"

#include <dlfcn.h>

#include <type_traits>

namespace jaxfp8::driver {
namespace {

// What a caller can do about an error, to follow the driver's own text.
const char* advice(cuda::Result result) {
  switch (result) {
    case cuda::kOutOfMemory:
      return "; free device memory, or lower XLA_PYTHON_CLIENT_MEM_FRACTION: the kernels' code "
             "lies outside of JAX's pool";
    case cuda::kNotInitialized:
    case cuda::kDeinitialized:
      return "; a process forked after CUDA's first use cannot use it: start workers with the "
             "spawn method";
    case cuda::kNoDevice:
      return "; no GPU is visible: see nvidia-smi and CUDA_VISIBLE_DEVICES";
    case cuda::kInvalidImage:
    case cuda::kNoBinaryForGpu:
      return "; reinstall the package if the file is damaged, else update the driver to the CUDA "
             "version of that nvcc";
    case cuda::kEccUncorrectable:
    case cuda::kIllegalAddress:
    case cuda::kLaunchFailed:
      return "; an earlier kernel of this process failed, and its context is lost: restart the "
             "process";
    case cuda::kSystemDriverMismatch:
      return "; libcuda and the kernel module are of different versions: reboot after an update of "
             "the driver";
    default:
      return "";
  }
}

}  // namespace

cuda::Table fill_table(const char* source,
                       const std::function<void*(const char* symbol)>& resolve) {
  cuda::Table table;
  std::string missing;
  const auto entry = [&](auto& field, const char* symbol) {
    void* address = resolve(symbol);
    if (address == nullptr) missing += (missing.empty() ? "" : ", ") + std::string(symbol);
    field = reinterpret_cast<std::decay_t<decltype(field)>>(address);
  };
#define JAXFP8_FILL(name, parameters) entry(table.name, #name);
  JAXFP8_DRIVER_ENTRY_POINTS(JAXFP8_FILL)
#undef JAXFP8_FILL
  if (!missing.empty()) {
    throw UnavailableError(std::string(source) + " has no " + missing +
                           "; the kernels need a driver of CUDA 12.0 or later: update it");
  }
  return table;
}

cuda::Table load_libcuda() {
  void* library = dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL);
  if (library == nullptr) {
    throw UnavailableError(std::string("there is no CUDA driver: ") + dlerror() +
                           "; install NVIDIA's driver, or run where there is a GPU");
  }
  return fill_table("libcuda.so.1",
                    [library](const char* symbol) { return dlsym(library, symbol); });
}

DriverError Api::error(const std::string& call, cuda::Result result) const {
  const char* name = nullptr;
  const char* text = nullptr;
  table.cuGetErrorName(result, &name);
  table.cuGetErrorString(result, &text);
  std::string known = name == nullptr ? "CUDA driver error " + std::to_string(result) : name;
  if (name != nullptr && text != nullptr) known += std::string(": ") + text;
  return DriverError(call + ": " + known + advice(result), result);
}

}  // namespace jaxfp8::driver
