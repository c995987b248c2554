// What the process shares: the driver in use and where its images lie.
#pragma once
#include <map>
#include <memory>
#include <string>

#include "driver/api.h"
#include "driver/image.h"
#include "driver/loader.h"

namespace jaxfp8::driver {

// One array of a custom call.
struct Buffer {
  const char* name;
  void* data;
  uint64_t size;  // bytes
  int32_t written;
};

// Called before a plan is made, on the thread that executes it.
using CallHook = void (*)(const char* target, const Buffer* buffers, int32_t count);

class Driver {
 public:
  Driver(cuda::Table table, CallHook hook, bool emulated);

  // Of a Hopper device. Throws UnavailableError for another.
  int num_sms(cuda::Device device);

  const Api api;
  const CallHook hook;
  const bool emulated;
  Loader loader;

 private:
  std::shared_mutex mutex_;
  std::map<cuda::Device, int> num_sms_;
};

// The installed one, or libcuda's, which the first call loads.
std::shared_ptr<Driver> current_driver();

ImageDirectory image_directory();
void set_image_directory(ImageDirectory directory);

// Replaces libcuda by `entry_points` (symbol -> address), all of which must be given; for tests.
// `hook` may be null. Calls in flight finish with the table that they started with.
void install(const std::map<std::string, void*>& entry_points, CallHook hook);
void uninstall();

}  // namespace jaxfp8::driver
