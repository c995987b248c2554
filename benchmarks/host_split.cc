// Stamps at the entry and exit of a handler and of every driver entry point that it calls:
// benchmarks/host_split.py builds and loads this.
#include <dlfcn.h>

#include <atomic>
#include <cstdint>
#include <cstring>
#include <ctime>
#include <initializer_list>

#include "driver/cuda_abi.h"
#include "xla/ffi/api/c_api.h"

namespace {

namespace cuda = jaxfp8::cuda;

enum Entry {
#define JAXFP8_ENTRY(name, parameters) k##name,
  JAXFP8_DRIVER_ENTRY_POINTS(JAXFP8_ENTRY)
#undef JAXFP8_ENTRY
      kNumEntries
};
const char* const kNames[] = {
#define JAXFP8_ENTRY(name, parameters) #name,
    JAXFP8_DRIVER_ENTRY_POINTS(JAXFP8_ENTRY)
#undef JAXFP8_ENTRY
};

struct Stamp {
  std::atomic<int64_t> calls{0}, nanoseconds{0};
};
Stamp entries[kNumEntries], stages[2];  // initialize, execute
void* real[kNumEntries];
XLA_FFI_Handler* handlers[2];

int64_t now() {
  timespec time;
  clock_gettime(CLOCK_MONOTONIC, &time);
  return time.tv_sec * 1'000'000'000 + time.tv_nsec;
}

template <class Call>
auto timed(Stamp& stamp, Call call) {
  const int64_t start = now();
  auto result = call();
  stamp.nanoseconds.fetch_add(now() - start, std::memory_order_relaxed);
  stamp.calls.fetch_add(1, std::memory_order_relaxed);
  return result;
}

template <int kEntry, class Function>
struct Wrapper;
template <int kEntry, class... Args>
struct Wrapper<kEntry, cuda::Result (*)(Args...)> {
  static cuda::Result call(Args... args) {
    return timed(entries[kEntry], [&] {
      return reinterpret_cast<cuda::Result (*)(Args...)>(real[kEntry])(args...);
    });
  }
};

void* const wrappers[] = {
#define JAXFP8_ENTRY(name, parameters) \
  reinterpret_cast<void*>(&Wrapper<k##name, decltype(cuda::Table::name)>::call),
    JAXFP8_DRIVER_ENTRY_POINTS(JAXFP8_ENTRY)
#undef JAXFP8_ENTRY
};

template <int kStage>
XLA_FFI_Error* stamped(XLA_FFI_CallFrame* frame) {
  const bool query = frame->extension_start != nullptr &&
                     frame->extension_start->type == XLA_FFI_Extension_Metadata;
  if (query) return handlers[kStage](frame);
  return timed(stages[kStage], [&] { return handlers[kStage](frame); });
}

}  // namespace

extern "C" {

int num_entries() { return kNumEntries; }
const char* entry_name(int i) { return kNames[i]; }

// The wrapper of an entry point of libcuda; null if that has none.
void* open_entry(int i) {
  static void* library = dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL);
  real[i] = library == nullptr ? nullptr : dlsym(library, kNames[i]);
  return real[i] == nullptr ? nullptr : wrappers[i];
}

// The handlers that are called between stamps, and what stands for them.
void set_handlers(void* initialize, void* execute) {
  handlers[0] = reinterpret_cast<XLA_FFI_Handler*>(initialize);
  handlers[1] = reinterpret_cast<XLA_FFI_Handler*>(execute);
}
XLA_FFI_Error* stamped_initialize(XLA_FFI_CallFrame* frame) { return stamped<0>(frame); }
XLA_FFI_Error* stamped_execute(XLA_FFI_CallFrame* frame) { return stamped<1>(frame); }

void reset() {
  for (auto* all : {&entries[0], &stages[0]}) {
    for (int i = 0; i < (all == entries ? static_cast<int>(kNumEntries) : 2); ++i) {
      all[i].calls = all[i].nanoseconds = 0;
    }
  }
}
int64_t entry_nanoseconds(int i) { return entries[i].nanoseconds; }
int64_t stage_nanoseconds(int i) { return stages[i].nanoseconds; }
int64_t stage_calls(int i) { return stages[i].calls; }

}  // extern "C"
