// Executes launch plans through a table of CUDA driver entry points.
//
// The table is filled from libcuda.so.1 at the first call, never at import; tests install their
// own. Kernels are loaded as context-independent libraries, so every device of the process uses the
// same handles. Nothing that failed is remembered: the next call tries again.
#pragma once
#include <map>
#include <memory>
#include <stdexcept>
#include <string>

#include "driver/cuda_abi.h"
#include "host/plan.h"

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

// The folder with the compiled kernels, <image>.cubin.
void set_image_directory(std::string path);

// One array of a custom call.
struct Buffer {
  const char* name;
  void* data;
  uint64_t size;  // bytes
  int32_t written;
};

// Called before a plan is made, on the thread that executes it.
using CallHook = void (*)(const char* target, const Buffer* buffers, int32_t count);

// Replaces libcuda by `entry_points` (symbol -> address), all of which must be given; for tests.
// `hook` may be null. Calls in flight finish with the table that they started with.
void install(const std::map<std::string, void*>& entry_points, CallHook hook);
void uninstall();

class Driver;

// Makes a stream's context current while it lives.
class CurrentContext {
 public:
  CurrentContext(const Driver& driver, cuda::Stream stream);
  ~CurrentContext();
  CurrentContext(const CurrentContext&) = delete;
  CurrentContext& operator=(const CurrentContext&) = delete;

 private:
  const Driver& driver_;
  bool pushed_ = false;
};

// The device of a stream, ready for launches; used on one thread, for one call.
class Device {
 public:
  // A null stream is the emulated platform's, which only an installed driver has.
  explicit Device(cuda::Stream stream);

  int num_sms() const { return num_sms_; }
  bool emulated() const;
  CallHook hook() const;  // null unless a test asked for it
  void execute(const LaunchPlan& plan) const;

 private:
  std::shared_ptr<Driver> driver_;
  cuda::Stream stream_;
  CurrentContext context_;
  cuda::Device ordinal_ = 0;
  int num_sms_ = 0;
};

}  // namespace jaxfp8::driver
