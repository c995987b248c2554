#include "driver/state.h"

#include <pthread.h>

#include <atomic>
#include <mutex>
#include <optional>

namespace jaxfp8::driver {
namespace {

struct Entries {
  cuda::Table table;
  CallHook hook;
};

// A driver to be: made by the first call.
struct Installation {
  std::optional<Entries> entries;  // empty: libcuda's
  Once once;
  std::shared_ptr<Driver> driver;
};

struct State {
  std::shared_mutex mutex;  // of what follows; no driver is called under it
  std::shared_ptr<Installation> installation = std::make_shared<Installation>();
  ImageDirectory images;
};

// Never destroyed: XLA's threads may outlive static objects.
std::atomic<State*> process_state{nullptr};

// A child gets a state of its own: what another thread was making at the fork would never be made
// there, and its locks never be free. What was installed and where images lie stay as they were.
void before_fork() { process_state.load()->mutex.lock(); }
void after_fork_in_parent() { process_state.load()->mutex.unlock(); }
void after_fork_in_child() {
  const State& parents = *process_state.load();
  auto* own = new State;
  own->images = parents.images;
  own->installation->entries = parents.installation->entries;
  process_state.store(own);
}

State& state() {
  static std::once_flag once;
  std::call_once(once, [] {
    process_state.store(new State);
    pthread_atfork(&before_fork, &after_fork_in_parent, &after_fork_in_child);
  });
  return *process_state.load(std::memory_order_acquire);
}

std::shared_ptr<Driver> make_driver(const std::optional<Entries>& entries) {
  if (!entries) return std::make_shared<Driver>(load_libcuda(), nullptr, /*emulated=*/false);
  return std::make_shared<Driver>(entries->table, entries->hook, /*emulated=*/true);
}

void replace(std::shared_ptr<Installation> installation) {
  State& s = state();
  std::unique_lock lock(s.mutex);
  s.installation.swap(installation);
}

}  // namespace

Driver::Driver(cuda::Table table, CallHook hook, bool emulated)
    : api{table}, hook(hook), emulated(emulated), loader(api) {
  api.check(api.table.cuInit(0), [] { return "cuInit"; });
}

int Driver::num_sms(cuda::Device device) {
  {
    std::shared_lock lock(mutex_);
    if (auto found = num_sms_.find(device); found != num_sms_.end()) return found->second;
  }
  const auto attribute = [&](const char* name, int attribute) {
    int value = 0;
    api.check(api.table.cuDeviceGetAttribute(&value, attribute, device), [&] {
      return "cuDeviceGetAttribute(" + std::string(name) + ", device " + std::to_string(device) +
             ")";
    });
    return value;
  };
  int major = attribute("COMPUTE_CAPABILITY_MAJOR", cuda::kComputeCapabilityMajor);
  int minor = attribute("COMPUTE_CAPABILITY_MINOR", cuda::kComputeCapabilityMinor);
  if (major != 9 || minor != 0) {
    throw UnavailableError("device " + std::to_string(device) + " has compute capability " +
                           std::to_string(major) + "." + std::to_string(minor) +
                           "; the kernels are for Hopper (9.0)");
  }
  int count = attribute("MULTIPROCESSOR_COUNT", cuda::kMultiprocessorCount);
  std::unique_lock lock(mutex_);
  return num_sms_[device] = count;
}

std::shared_ptr<Driver> current_driver() {
  std::shared_ptr<Installation> installation;
  {
    State& s = state();
    std::shared_lock lock(s.mutex);
    installation = s.installation;
  }
  installation->once.run([&] { installation->driver = make_driver(installation->entries); });
  return installation->driver;
}

ImageDirectory image_directory() {
  State& s = state();
  std::shared_lock lock(s.mutex);
  return s.images;
}

void set_image_directory(ImageDirectory directory) {
  State& s = state();
  std::unique_lock lock(s.mutex);
  s.images = std::move(directory);
}

void install(const std::map<std::string, void*>& entry_points, CallHook hook) {
  auto made = std::make_shared<Installation>();
  made->entries = {fill_table("the installed driver",
                              [&](const char* symbol) -> void* {
                                auto found = entry_points.find(symbol);
                                return found == entry_points.end() ? nullptr : found->second;
                              }),
                   hook};
  made->once.run([&] { made->driver = make_driver(made->entries); });
  replace(std::move(made));
}

void uninstall() { replace(std::make_shared<Installation>()); }

}  // namespace jaxfp8::driver
