// Kernels, loaded and allowed their shared memory, each once for each context.
//
// Maps are looked into under a lock; the driver is called under none, so that a launch of a kernel
// that is ready waits for nobody's load. Libraries are context-independent; a kernel is made ready
// in each context. Contexts are told apart by their number, which no later one shares.
#pragma once
#include <cstdint>
#include <map>
#include <memory>
#include <set>
#include <shared_mutex>
#include <string>
#include <string_view>
#include <tuple>

#include "driver/api.h"
#include "driver/once.h"
#include "host/plan.h"

namespace jaxfp8::driver {

class Loader {
 public:
  explicit Loader(const Api& api) : api_(api) {}

  // Calls whose kernels are ready in a context, by numbers that the caller gives them.
  void remember(uint64_t context, uint64_t call);
  bool remembers(uint64_t context, uint64_t call);

  // The plan's kernel, ready in the current context, which has this number, of `device`.
  cuda::Kernel ready(const LaunchPlan& plan, uint64_t context, cuda::Device device);

 private:
  struct Image {
    Once once;
    cuda::Library library = nullptr;
  };
  struct Kernel {
    std::string image, name;  // what keys point to
    Once once;
    cuda::Kernel handle = nullptr;
  };
  struct Readiness {
    Once once;
    Kernel* kernel = nullptr;
  };
  using KernelKey = std::pair<std::string_view, std::string_view>;  // image, kernel
  using ReadyKey = std::tuple<std::string_view, std::string_view, uint64_t>;

  cuda::Library library(const std::string& image);
  Kernel& kernel(const LaunchPlan& plan);
  void load(const LaunchPlan& plan, Kernel& kernel);
  void make_ready(const LaunchPlan& plan, cuda::Kernel handle, cuda::Device device);

  const Api& api_;
  std::shared_mutex mutex_;  // of the maps; what they point to lives as long as this
  std::map<std::string, std::unique_ptr<Image>> images_;
  std::map<KernelKey, std::unique_ptr<Kernel>> kernels_;
  std::map<ReadyKey, std::unique_ptr<Readiness>> ready_;
  std::set<std::pair<uint64_t, uint64_t>> remembered_;
};

}  // namespace jaxfp8::driver
