// A CUDA driver that launches nothing: it checks what it is asked against the driver API's rules,
// counts calls, and fails on command. Also the part of XLA's FFI API that handlers use, and threads
// that call handlers at once, so that a whole call runs without Python.
//
// Stream s is context s of device s - 1. No locks: they would order the threads whose races
// ThreadSanitizer looks for.
#include <atomic>
#include <chrono>
#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <thread>
#include <vector>

#include "driver/cuda_abi.h"
#include "xla/ffi/api/c_api.h"

namespace {

namespace cuda = jaxfp8::cuda;

constexpr int kMaxDevices = 16;
constexpr int kInvalidValue = 1, kInvalidImage = 200, kInvalidContext = 201, kNotFound = 500;

enum Entry {
#define JAXFP8_ENTRY(name, parameters) k##name,
  JAXFP8_DRIVER_ENTRY_POINTS(JAXFP8_ENTRY)
#undef JAXFP8_ENTRY
      kNumEntries
};

const char* const kEntryNames[] = {
#define JAXFP8_ENTRY(name, parameters) #name,
    JAXFP8_DRIVER_ENTRY_POINTS(JAXFP8_ENTRY)
#undef JAXFP8_ENTRY
};

std::atomic<int> num_devices{1}, capability_major{9}, capability_minor{0}, num_sms{132};
std::atomic<int> driver_version{13000};
std::atomic<int64_t> calls[kNumEntries], failure[kNumEntries], skips[kNumEntries];
std::atomic<int64_t> complaints{0};
std::atomic<int> jitter_us{0};
std::atomic<int> held{-1};  // the entry point whose calls do not return

thread_local std::vector<uintptr_t> contexts;
thread_local int capture_mode = 0;
thread_local char complaint[512];

struct Launch {
  char kernel[96];
  uint32_t grid[3], block[3], cluster[3], dynamic_smem;
  int32_t device;
};
thread_local Launch last_launch;

struct Copied {
  uint64_t target, source, bytes;
};
thread_local Copied last_copy;

std::atomic<uint32_t> generation{0};  // of every context

struct LoadedKernel {
  char name[96];
  std::atomic<uint32_t> dynamic_smem[kMaxDevices];
  std::atomic<int64_t> ready[kMaxDevices];  // 1 + the generation of the context
};

// A rule of the driver API that a call broke.
int refuse(int code, const char* format, ...) {
  va_list values;
  va_start(values, format);
  vsnprintf(complaint, sizeof(complaint), format, values);
  va_end(values);
  complaints.fetch_add(1, std::memory_order_relaxed);
  return code;
}

// Counts a call; the code with which it shall fail, or 0.
int enter(Entry entry) {
  calls[entry].fetch_add(1, std::memory_order_relaxed);
  if (int most = jitter_us.load(std::memory_order_relaxed)) {
    thread_local uint32_t state = static_cast<uint32_t>(reinterpret_cast<uintptr_t>(&state) >> 8);
    state = state * 1664525 + 1013904223;
    if (state >> 30 == 0) std::this_thread::sleep_for(std::chrono::microseconds(state % most));
  }
  while (held.load(std::memory_order_relaxed) == entry) {
    std::this_thread::sleep_for(std::chrono::milliseconds(1));
  }
  int64_t code = failure[entry].load(std::memory_order_relaxed);
  if (code == 0) return 0;
  if (skips[entry].fetch_sub(1, std::memory_order_relaxed) > 0) return 0;
  return static_cast<int>(code);
}

#define ENTER(name) \
  if (int code = enter(k##name)) return code

int current_device() { return contexts.empty() ? 0 : static_cast<int>(contexts.back()) - 1; }

}  // namespace

extern "C" {

int cuInit(unsigned flags) {
  ENTER(cuInit);
  return flags == 0 ? 0 : kInvalidValue;
}

int cuDriverGetVersion(int* version) {
  ENTER(cuDriverGetVersion);
  *version = driver_version;
  return 0;
}

int cuGetErrorName(int error, const char** name) {
  ENTER(cuGetErrorName);
  struct {
    int code;
    const char* name;
  } static const kNames[] = {
      {1, "CUDA_ERROR_INVALID_VALUE"},
      {2, "CUDA_ERROR_OUT_OF_MEMORY"},
      {3, "CUDA_ERROR_NOT_INITIALIZED"},
      {100, "CUDA_ERROR_NO_DEVICE"},
      {200, "CUDA_ERROR_INVALID_IMAGE"},
      {201, "CUDA_ERROR_INVALID_CONTEXT"},
      {209, "CUDA_ERROR_NO_BINARY_FOR_GPU"},
      {500, "CUDA_ERROR_NOT_FOUND"},
      {700, "CUDA_ERROR_ILLEGAL_ADDRESS"},
      {719, "CUDA_ERROR_LAUNCH_FAILED"},
      {803, "CUDA_ERROR_SYSTEM_DRIVER_MISMATCH"},
  };
  *name = nullptr;
  for (const auto& known : kNames) {
    if (known.code == error) *name = known.name;
  }
  return *name == nullptr ? kInvalidValue : 0;
}

int cuGetErrorString(int error, const char** text) {
  ENTER(cuGetErrorString);
  *text = error == kInvalidValue && complaint[0] != 0 ? complaint : "text of the driver";
  return 0;
}

int cuDeviceGetAttribute(int* value, int attribute, int device) {
  ENTER(cuDeviceGetAttribute);
  if (device < 0 || device >= num_devices) return refuse(kInvalidValue, "device %d", device);
  switch (attribute) {
    case cuda::kMultiprocessorCount:
      *value = num_sms;
      return 0;
    case cuda::kComputeCapabilityMajor:
      *value = capability_major;
      return 0;
    case cuda::kComputeCapabilityMinor:
      *value = capability_minor;
      return 0;
  }
  return refuse(kInvalidValue, "attribute %d", attribute);
}

int cuStreamGetCtx(void* stream, void** context) {
  ENTER(cuStreamGetCtx);
  auto s = reinterpret_cast<uintptr_t>(stream);
  if (s < 1 || s > static_cast<uintptr_t>(num_devices)) return refuse(kInvalidContext, "stream");
  *context = stream;
  return 0;
}

int cuCtxGetCurrent(void** context) {
  ENTER(cuCtxGetCurrent);
  *context = reinterpret_cast<void*>(contexts.empty() ? 0 : contexts.back());
  return 0;
}

int cuCtxPushCurrent_v2(void* context) {
  ENTER(cuCtxPushCurrent_v2);
  contexts.push_back(reinterpret_cast<uintptr_t>(context));
  return 0;
}

int cuCtxPopCurrent_v2(void** context) {
  ENTER(cuCtxPopCurrent_v2);
  if (contexts.empty()) return refuse(kInvalidContext, "a pop without a push");
  *context = reinterpret_cast<void*>(contexts.back());
  contexts.pop_back();
  return 0;
}

int cuCtxGetDevice(int* device) {
  ENTER(cuCtxGetDevice);
  *device = current_device();
  return 0;
}

int cuCtxGetId(void* context, uint64_t* number) {
  ENTER(cuCtxGetId);
  *number = reinterpret_cast<uintptr_t>(context) + (uint64_t{generation} << 32);
  return 0;
}

int cuMemcpyDtoDAsync_v2(uint64_t target, uint64_t source, size_t bytes, void* stream) {
  ENTER(cuMemcpyDtoDAsync_v2);
  if (target < source + bytes && source < target + bytes) return refuse(kInvalidValue, "overlap");
  if (stream != nullptr &&
      (contexts.empty() || contexts.back() != reinterpret_cast<uintptr_t>(stream))) {
    return refuse(kInvalidContext, "a copy on a stream of another context");
  }
  last_copy = {target, source, bytes};
  return 0;
}

int cuThreadExchangeStreamCaptureMode(int* mode) {
  ENTER(cuThreadExchangeStreamCaptureMode);
  if (*mode < 0 || *mode > 2) return refuse(kInvalidValue, "capture mode %d", *mode);
  std::swap(*mode, capture_mode);
  return 0;
}

int cuLibraryLoadData(void** library, const void* image, int*, void**, unsigned, int*, void**,
                      unsigned) {
  ENTER(cuLibraryLoadData);
  if (capture_mode != cuda::kCaptureModeRelaxed) {
    return refuse(kInvalidValue, "a load in capture mode %d", capture_mode);
  }
  if (std::memcmp(image,
                  "\x7f"
                  "ELF",
                  4) != 0)
    return kInvalidImage;
  static char any;
  *library = &any;
  return 0;
}

int cuLibraryGetKernel(void** kernel, void*, const char* name) {
  ENTER(cuLibraryGetKernel);
  auto* loaded = new LoadedKernel{};  // as long as the process, like the driver's
  snprintf(loaded->name, sizeof(loaded->name), "%s", name);
  *kernel = loaded;
  return 0;
}

int cuKernelSetAttribute(int attribute, int value, void* kernel, int device) {
  ENTER(cuKernelSetAttribute);
  constexpr int kMaxOfHopper = 227 * 1024;
  if (attribute != cuda::kMaxDynamicSharedSizeBytes || value < 0 || value > kMaxOfHopper) {
    return refuse(kInvalidValue, "attribute %d of %d", attribute, value);
  }
  if (device < 0 || device >= num_devices) return refuse(kInvalidValue, "device %d", device);
  static_cast<LoadedKernel*>(kernel)->dynamic_smem[device] = value;
  return 0;
}

int cuKernelGetFunction(void** function, void* kernel) {
  ENTER(cuKernelGetFunction);
  static_cast<LoadedKernel*>(kernel)->ready[current_device()] = 1 + int64_t{generation};
  *function = kernel;
  return 0;
}

// CUDA driver API, 6.31 "Tensor Map Object Management".
int cuTensorMapEncodeTiled(void* map, int type, unsigned rank, void* base, const uint64_t* dims,
                           const uint64_t* strides, const uint32_t* box,
                           const uint32_t* element_strides, int interleave, int swizzle,
                           int l2_promotion, int out_of_bounds) {
  ENTER(cuTensorMapEncodeTiled);
  if (reinterpret_cast<uintptr_t>(map) % 64 != 0) return refuse(kInvalidValue, "map's alignment");
  uint64_t size = type == cuda::kTensorMapUint8      ? 1
                  : type == cuda::kTensorMapBfloat16 ? 2
                  : type == cuda::kTensorMapFloat32  ? 4
                                                     : 0;
  if (size == 0) return refuse(kInvalidValue, "tensor map type %d", type);
  if (rank < 1 || rank > 5) return refuse(kInvalidValue, "rank %u", rank);
  if (base == nullptr || reinterpret_cast<uintptr_t>(base) % 16 != 0) {
    return refuse(kInvalidValue, "base %p", base);
  }
  for (unsigned i = 0; i < rank; ++i) {
    if (dims[i] < 1 || dims[i] > uint64_t{1} << 32) {
      return refuse(kInvalidValue, "dims[%u] = %llu", i, static_cast<unsigned long long>(dims[i]));
    }
    if (box[i] < 1 || box[i] > 256) return refuse(kInvalidValue, "box[%u] = %u", i, box[i]);
    if (element_strides[i] != 1) return refuse(kInvalidValue, "element stride");
  }
  for (unsigned i = 0; i + 1 < rank; ++i) {
    uint64_t least = i == 0 ? dims[0] * size : strides[i - 1] * dims[i];
    if (strides[i] % 16 != 0 || strides[i] >= uint64_t{1} << 40 || strides[i] < least) {
      return refuse(kInvalidValue, "strides[%u] = %llu", i,
                    static_cast<unsigned long long>(strides[i]));
    }
  }
  static constexpr uint64_t kSpan[] = {~uint64_t{0}, 32, 64, 128};
  if (swizzle < 0 || swizzle > 3 || box[0] * size > kSpan[swizzle] || box[0] * size % 16 != 0) {
    return refuse(kInvalidValue, "swizzle %d of a box %u wide", swizzle, box[0]);
  }
  if (interleave != 0 || l2_promotion < 0 || l2_promotion > 3 || out_of_bounds != 0) {
    return refuse(kInvalidValue, "modes");
  }
  std::memset(map, 0x5A, sizeof(cuda::TensorMap));
  return 0;
}

int cuLaunchKernelEx(const cuda::LaunchConfig* config, void* function, void**, void**) {
  ENTER(cuLaunchKernelEx);
  auto* kernel = static_cast<LoadedKernel*>(function);
  auto stream = reinterpret_cast<uintptr_t>(config->stream);
  int device = current_device();
  if (stream != 0 && (contexts.empty() || contexts.back() != stream)) {
    return refuse(kInvalidContext, "a launch on stream %d in another context", int(stream));
  }
  if (kernel->ready[device] != 1 + int64_t{generation})
    return refuse(kInvalidValue, "%s was not loaded", kernel->name);
  Launch launch{};
  std::memcpy(launch.kernel, kernel->name, sizeof(launch.kernel));
  launch.device = device;
  launch.dynamic_smem = config->dynamic_smem;
  const uint32_t grid[] = {config->grid_x, config->grid_y, config->grid_z};
  const uint32_t block[] = {config->block_x, config->block_y, config->block_z};
  uint32_t cluster[] = {0, 0, 0};  // a launch says it, also of clusters of one (driver.cc)
  for (unsigned i = 0; i < config->num_attributes; ++i) {
    const cuda::LaunchAttribute& attribute = config->attributes[i];
    if (attribute.id != cuda::kLaunchClusterDimension) return refuse(kInvalidValue, "attribute");
    cluster[0] = attribute.value.cluster.x;
    cluster[1] = attribute.value.cluster.y;
    cluster[2] = attribute.value.cluster.z;
  }
  static constexpr uint32_t kMaxGrid[] = {0x7fffffff, 65535, 65535};
  for (int i = 0; i < 3; ++i) {
    if (grid[i] < 1 || grid[i] > kMaxGrid[i] || cluster[i] < 1 || grid[i] % cluster[i] != 0) {
      return refuse(kInvalidValue, "grid[%d] = %u of clusters of %u", i, grid[i], cluster[i]);
    }
    launch.grid[i] = grid[i];
    launch.block[i] = block[i];
    launch.cluster[i] = cluster[i];
  }
  uint64_t threads = uint64_t{block[0]} * block[1] * block[2];
  if (threads < 1 || threads > 1024) return refuse(kInvalidValue, "%d threads", int(threads));
  if (uint64_t{cluster[0]} * cluster[1] * cluster[2] > 8) return refuse(kInvalidValue, "cluster");
  if (config->dynamic_smem > 48 * 1024 && config->dynamic_smem > kernel->dynamic_smem[device]) {
    return refuse(kInvalidValue, "%u bytes of shared memory", config->dynamic_smem);
  }
  last_launch = launch;
  return 0;
}

// --- for tests
// ------------------------------------------------------------------------------------

// Every device's context is destroyed and made anew, at the same address.
void recording_renew_contexts() { generation.fetch_add(1); }

// Calls of an entry point do not return until another is held, or none: "".
void recording_hold(const char* name) {
  int found = -1;
  for (int i = 0; i < kNumEntries; ++i) {
    if (std::strcmp(name, kEntryNames[i]) == 0) found = i;
  }
  held = found;
}

const Copied* recording_last_copy() { return &last_copy; }

// Everything as at the start; what is loaded stays.
void recording_reset() {
  num_devices = 1, capability_major = 9, capability_minor = 0, num_sms = 132;
  driver_version = 13000;
  complaints = 0;
  for (int i = 0; i < kNumEntries; ++i) calls[i] = failure[i] = skips[i] = 0;
  complaint[0] = 0;
  last_copy = {};
  jitter_us = 0;
  contexts.clear();
  capture_mode = 0;
  last_launch = {};
}

void recording_set_devices(int count, int major, int minor, int sms, int version) {
  num_devices = count, capability_major = major, capability_minor = minor, num_sms = sms;
  driver_version = version;
}

// A quarter of the calls sleep up to `most` microseconds, so that threads meet inside of calls also
// where there are few processors.
void recording_jitter(int most) { jitter_us = most; }

// Calls of an entry point fail with `code` after `skip` more; 0: no longer.
int recording_fail(const char* entry, int code, int skip) {
  for (int i = 0; i < kNumEntries; ++i) {
    if (std::strcmp(kEntryNames[i], entry) != 0) continue;
    skips[i] = skip;
    failure[i] = code;
    return 0;
  }
  return kNotFound;
}

int64_t recording_calls(const char* entry) {
  for (int i = 0; i < kNumEntries; ++i) {
    if (std::strcmp(kEntryNames[i], entry) == 0) return calls[i];
  }
  return -1;
}

// Rules of the driver API that were broken so far, by all threads; the last of this thread.
int64_t recording_complaints() { return complaints; }
const char* recording_complaint() { return complaint; }

// Of this thread: its last launch, contexts on its stack, and capture mode.
const Launch* recording_last_launch() { return &last_launch; }
int recording_depth() { return static_cast<int>(contexts.size()); }
int recording_capture_mode() { return capture_mode; }

// --- XLA's side
// -----------------------------------------------------------------------------------

namespace {

struct Error {
  XLA_FFI_Error_Code code;
  char message[1024];
};

XLA_FFI_Error* create_error(XLA_FFI_Error_Create_Args* args) {
  auto* error = new Error{args->errc, {}};
  snprintf(error->message, sizeof(error->message), "%s", args->message);
  return reinterpret_cast<XLA_FFI_Error*>(error);
}

// A frame carries its stream in place of a context.
XLA_FFI_Error* get_stream(XLA_FFI_Stream_Get_Args* args) {
  args->stream = args->ctx;
  return nullptr;
}

}  // namespace

const XLA_FFI_Api* recording_api() {
  static const XLA_FFI_Api* api = [] {
    auto* made = new XLA_FFI_Api{};
    made->struct_size = XLA_FFI_Api_STRUCT_SIZE;
    made->XLA_FFI_Error_Create = create_error;
    made->XLA_FFI_Stream_Get = get_stream;
    return made;
  }();
  return api;
}

int recording_error_code(const Error* error) { return error->code; }
const char* recording_error_message(const Error* error) { return error->message; }
void recording_error_free(Error* error) { delete error; }

// `threads` threads at once, each calling every one of `count` handlers on its frame, `rounds`
// times, from another start. Returns how many calls failed; the first message of one is copied.
int64_t recording_hammer(XLA_FFI_Handler** handlers, XLA_FFI_CallFrame** frames, int count,
                         int threads, int rounds, char* message, int message_size) {
  std::atomic<int> waiting{threads};
  std::atomic<int64_t> failed{0};
  std::atomic<bool> told{false};
  std::vector<std::thread> running;
  for (int t = 0; t < threads; ++t) {
    running.emplace_back([&, t] {
      waiting.fetch_sub(1);
      while (waiting.load() > 0) std::this_thread::yield();
      for (int i = 0; i < count * rounds; ++i) {
        int which = (i + t * 7) % count;
        XLA_FFI_Error* returned = handlers[which](frames[which]);
        if (returned == nullptr) continue;
        auto* error = reinterpret_cast<Error*>(returned);
        failed.fetch_add(1, std::memory_order_relaxed);
        if (!told.exchange(true)) snprintf(message, message_size, "%s", error->message);
        delete error;
      }
    });
  }
  for (std::thread& thread : running) thread.join();
  return failed;
}

}  // extern "C"
