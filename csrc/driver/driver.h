// Executes launch plans through a table of CUDA driver entry points.
//
// The table is filled from libcuda.so.1 at the first call, never at import; tests install their
// own. Kernels are loaded as context-independent libraries, so every device of the process uses the
// same handles. Nothing that failed is remembered: the next call tries again.
#pragma once
#include <memory>

#include "driver/cuda_abi.h"
#include "driver/state.h"
#include "host/plan.h"

namespace jaxfp8::driver {

// Makes a stream's context current while it lives.
class CurrentContext {
 public:
  CurrentContext(const Api& api, cuda::Stream stream);
  ~CurrentContext();
  CurrentContext(const CurrentContext&) = delete;
  CurrentContext& operator=(const CurrentContext&) = delete;

  uint64_t number() const { return number_; }  // no later context of the process has it

 private:
  const Api& api_;
  bool pushed_ = false;
  uint64_t number_ = 0;
};

// The device of a stream, ready for launches; used on one thread, for one call.
class Device {
 public:
  // A null stream is the emulated platform's, which only an installed driver has.
  explicit Device(cuda::Stream stream);

  int num_sms() const { return num_sms_; }
  bool emulated() const { return driver_->emulated; }
  CallHook hook() const { return driver_->hook; }  // null unless a test asked for it

  // Loads the plan's kernel, if that is not done.
  void prepare(const LaunchPlan& plan) const;
  void execute(const LaunchPlan& plan) const;

 private:
  std::shared_ptr<Driver> driver_;
  cuda::Stream stream_;
  CurrentContext context_;
  cuda::Device ordinal_ = 0;
  int num_sms_ = 0;
};

// Whether a call, by a number that the caller gives it, was prepared in the stream's context. They
// throw nothing: where the driver refuses, the call is not known.
bool is_prepared(cuda::Stream stream, uint64_t known_as) noexcept;
void remember_prepared(cuda::Stream stream, uint64_t known_as) noexcept;

}  // namespace jaxfp8::driver
