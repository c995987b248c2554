#include "driver/driver.h"

#include <dlfcn.h>

#include <array>
#include <fstream>
#include <functional>
#include <iterator>
#include <mutex>
#include <shared_mutex>
#include <sstream>
#include <string_view>
#include <utility>
#include <vector>

#include "build_info.h"
#include "driver/image.h"
#include "host/plan_print.h"

namespace jaxfp8::driver {
namespace {

// A kernel of one plan has at most this many parameters and tensor maps.
constexpr size_t kMaxArgs = 32;
constexpr size_t kMaxTensorMaps = 8;
constexpr uint32_t kDefaultDynamicSmem = 48 * 1024;  // more must be asked for

using Resolve = std::function<void*(const char* symbol)>;

cuda::Table fill(const char* source, const Resolve& resolve) {
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
  return fill("libcuda.so.1", [library](const char* symbol) { return dlsym(library, symbol); });
}

// What a caller can do about an error, to follow the driver's own text.
const char* advice(cuda::Result result) {
  switch (result) {
    case cuda::kOutOfMemory:
      return "; free device memory, or lower XLA_PYTHON_CLIENT_MEM_FRACTION: the kernels' code "
             "lies "
             "outside of JAX's pool";
    case cuda::kNotInitialized:
    case cuda::kDeinitialized:
      return "; a process forked after CUDA's first use cannot use it: start workers with the "
             "spawn "
             "method";
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

struct KernelName {
  std::string_view image, kernel;
  bool operator<(const KernelName& other) const {
    return std::tie(image, kernel) < std::tie(other.image, other.kernel);
  }
};

struct LoadedKernel {
  std::string image, name;  // what its key in the map points to
  cuda::Kernel handle = nullptr;
  std::map<cuda::Device, uint32_t> dynamic_smem;  // allowed so far, by device it was prepared for
};

}  // namespace

class Driver {
 public:
  Driver(cuda::Table table, CallHook hook, bool emulated)
      : table(table), hook(hook), emulated(emulated) {
    check(table.cuInit(0), [] { return "cuInit"; });
  }

  // Throws DriverError "<call>: <name>: <text>" unless `result` is success.
  template <class Call>
  void check(cuda::Result result, Call call) const {
    if (result != cuda::kSuccess) {
      throw DriverError(call() + (": " + error_text(result) + advice(result)), result);
    }
  }

  std::string error_text(cuda::Result result) const {
    const char* name = nullptr;
    const char* text = nullptr;
    table.cuGetErrorName(result, &name);
    table.cuGetErrorString(result, &text);
    if (name == nullptr) return "CUDA driver error " + std::to_string(result);
    return std::string(name) + (text == nullptr ? "" : std::string(": ") + text);
  }

  int num_sms(cuda::Device device) {
    {
      std::shared_lock lock(mutex_);
      if (auto found = num_sms_.find(device); found != num_sms_.end()) return found->second;
    }
    const auto attribute = [&](const char* name, int attribute) {
      int value = 0;
      check(table.cuDeviceGetAttribute(&value, attribute, device), [&] {
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

  // The plan's kernel, loaded and allowed its shared memory on `device`.
  cuda::Kernel kernel(const LaunchPlan& plan, cuda::Device device) {
    const auto prepared = [&](const LoadedKernel& loaded) {
      auto allowed = loaded.dynamic_smem.find(device);
      return allowed != loaded.dynamic_smem.end() && allowed->second >= plan.dynamic_smem;
    };
    KernelName key{plan.image, plan.kernel};
    {
      std::shared_lock lock(mutex_);
      auto found = kernels_.find(key);
      if (found != kernels_.end() && prepared(*found->second)) return found->second->handle;
    }
    std::unique_lock lock(mutex_);
    auto found = kernels_.find(key);
    if (found == kernels_.end()) {
      auto loaded = std::make_unique<LoadedKernel>();
      loaded->image = plan.image;
      loaded->name = plan.kernel;
      RelaxedCapture relaxed(*this);
      check(table.cuLibraryGetKernel(&loaded->handle, library(plan.image), plan.kernel.c_str()),
            [&] { return "cuLibraryGetKernel(" + plan.kernel + " of " + plan.image + ".cubin)"; });
      KernelName owned{loaded->image, loaded->name};
      found = kernels_.emplace(owned, std::move(loaded)).first;
    }
    LoadedKernel& loaded = *found->second;
    if (!prepared(loaded)) {
      RelaxedCapture relaxed(*this);
      if (plan.dynamic_smem > kDefaultDynamicSmem) {
        check(
            table.cuKernelSetAttribute(cuda::kMaxDynamicSharedSizeBytes,
                                       static_cast<int>(plan.dynamic_smem), loaded.handle, device),
            [&] {
              return "cuKernelSetAttribute(" + plan.kernel + ", dynamic shared memory of " +
                     std::to_string(plan.dynamic_smem) + " bytes, device " +
                     std::to_string(device) + ")";
            });
      }
      // Loads the code into the context now: left to the launch, it could happen during a capture.
      cuda::Function function = nullptr;
      check(table.cuKernelGetFunction(&function, loaded.handle),
            [&] { return "cuKernelGetFunction(" + plan.kernel + ")"; });
      loaded.dynamic_smem[device] = plan.dynamic_smem;
    }
    return loaded.handle;
  }

  const cuda::Table table;
  const CallHook hook;
  const bool emulated;

 private:
  // A thread that captures a CUDA graph may not load code unless it says so.
  class RelaxedCapture {
   public:
    explicit RelaxedCapture(const Driver& driver) : driver_(driver) {
      driver.check(driver.table.cuThreadExchangeStreamCaptureMode(&mode_),
                   [] { return "cuThreadExchangeStreamCaptureMode(relaxed)"; });
    }
    ~RelaxedCapture() { driver_.table.cuThreadExchangeStreamCaptureMode(&mode_); }

   private:
    const Driver& driver_;
    int mode_ = cuda::kCaptureModeRelaxed;  // after the exchange, the thread's own
  };

  // Under the unique lock.
  cuda::Library library(const std::string& image);

  std::shared_mutex mutex_;
  std::map<cuda::Device, int> num_sms_;
  std::map<std::string, cuda::Library> libraries_;
  std::map<KernelName, std::unique_ptr<LoadedKernel>> kernels_;
};

namespace {

struct State {
  std::shared_mutex mutex;
  std::shared_ptr<Driver> driver;  // null until the first call
  std::string image_directory;
};

State& state() {
  static State* state = new State;  // never destroyed: XLA's threads may outlive static objects
  return *state;
}

std::shared_ptr<Driver> current_driver() {
  State& s = state();
  {
    std::shared_lock lock(s.mutex);
    if (s.driver != nullptr) return s.driver;
  }
  std::unique_lock lock(s.mutex);
  if (s.driver == nullptr) {
    s.driver = std::make_shared<Driver>(load_libcuda(), nullptr, /*emulated=*/false);
  }
  return s.driver;
}

}  // namespace

cuda::Library Driver::library(const std::string& image) {
  if (auto found = libraries_.find(image); found != libraries_.end()) return found->second;
  std::string directory;
  {
    std::shared_lock lock(state().mutex);
    directory = state().image_directory;
  }
  std::string path = directory + "/" + image + ".cubin";
  std::ifstream file(path, std::ios::binary);
  std::vector<char> code{std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>()};
  if (code.empty()) {
    throw UnavailableError("the compiled kernels " + image + ".cubin are not in " + directory +
                           (*build::kNvccVersion == '\0' ? ": this package was built without nvcc"
                                                         : ": the installation is incomplete"));
  }
  if (!is_whole_elf(code)) {
    throw UnavailableError("the compiled kernels " + path + " are damaged, " +
                           std::to_string(code.size()) +
                           " bytes that are no whole ELF file; reinstall the package");
  }
  cuda::Library library = nullptr;
  cuda::Result result =
      table.cuLibraryLoadData(&library, code.data(), nullptr, nullptr, 0, nullptr, nullptr, 0);
  check(result, [&] {
    int version = 0;
    table.cuDriverGetVersion(&version);
    return "cuLibraryLoadData(" + path + ", compiled by nvcc " + build::kNvccVersion +
           ", driver of CUDA " + std::to_string(version / 1000) + "." +
           std::to_string(version % 1000 / 10) + ")";
  });
  return libraries_[image] = library;
}

void set_image_directory(std::string path) {
  std::unique_lock lock(state().mutex);
  state().image_directory = std::move(path);
}

void install(const std::map<std::string, void*>& entry_points, CallHook hook) {
  cuda::Table table = fill("the installed driver", [&](const char* symbol) -> void* {
    auto found = entry_points.find(symbol);
    return found == entry_points.end() ? nullptr : found->second;
  });
  auto driver = std::make_shared<Driver>(table, hook, /*emulated=*/true);
  std::unique_lock lock(state().mutex);
  state().driver = std::move(driver);
}

void uninstall() {
  std::unique_lock lock(state().mutex);
  state().driver = nullptr;
}

CurrentContext::CurrentContext(const Driver& driver, cuda::Stream stream) : driver_(driver) {
  if (stream == nullptr) return;
  cuda::Context wanted = nullptr, present = nullptr;
  driver.check(driver.table.cuStreamGetCtx(stream, &wanted), [] { return "cuStreamGetCtx"; });
  driver.check(driver.table.cuCtxGetCurrent(&present), [] { return "cuCtxGetCurrent"; });
  if (wanted == present) return;
  driver.check(driver.table.cuCtxPushCurrent_v2(wanted), [] { return "cuCtxPushCurrent"; });
  pushed_ = true;
}

CurrentContext::~CurrentContext() {
  cuda::Context popped = nullptr;
  if (pushed_) driver_.table.cuCtxPopCurrent_v2(&popped);
}

Device::Device(cuda::Stream stream)
    : driver_(current_driver()), stream_(stream), context_(*driver_, stream) {
  if (stream == nullptr && !driver_->emulated) {
    throw UnavailableError(
        "there is no stream: on a CPU the custom calls run only under emulation");
  }
  driver_->check(driver_->table.cuCtxGetDevice(&ordinal_), [] { return "cuCtxGetDevice"; });
  num_sms_ = driver_->num_sms(ordinal_);
}

bool Device::emulated() const { return driver_->emulated; }

CallHook Device::hook() const { return driver_->hook; }

namespace {

template <class Label>
void encode(const Driver& driver, const TensorMap& map, cuda::TensorMap* out, Label label) {
  static constexpr uint32_t kUnitStrides[] = {1, 1};
  int type = map.type == TensorMap::Type::kUint8      ? cuda::kTensorMapUint8
             : map.type == TensorMap::Type::kBfloat16 ? cuda::kTensorMapBfloat16
                                                      : cuda::kTensorMapFloat32;
  int swizzle = map.swizzle == TensorMap::Swizzle::kNone  ? cuda::kSwizzleNone
                : map.swizzle == TensorMap::Swizzle::k32B ? cuda::kSwizzle32B
                : map.swizzle == TensorMap::Swizzle::k64B ? cuda::kSwizzle64B
                                                          : cuda::kSwizzle128B;
  driver.check(driver.table.cuTensorMapEncodeTiled(
                   out, type, map.dims.size(), map.base, map.dims.data(), map.strides.data(),
                   map.box.data(), kUnitStrides, cuda::kInterleaveNone, swizzle,
                   cuda::kL2Promotion256B, cuda::kOutOfBoundsZeros),
               [&] {
                 std::ostringstream base;
                 base << map.base;
                 return "cuTensorMapEncodeTiled(" + label() + ": base " + base.str() + ", dims " +
                        to_string(map.dims) + ", strides " + to_string(map.strides) + ", box " +
                        to_string(map.box) + ", swizzle " + std::to_string(swizzle) + ")";
               });
}

}  // namespace

void Device::execute(const LaunchPlan& plan) const {
  const Driver& driver = *driver_;
  const auto label = [&](size_t i) {
    return "argument " + std::to_string(i) + " of kernel " + plan.kernel;
  };
  if (plan.args.size() > kMaxArgs) {
    throw DriverError(plan.kernel + " has more than " + std::to_string(kMaxArgs) + " parameters");
  }
  std::array<cuda::TensorMap, kMaxTensorMaps> maps;
  std::array<void*, kMaxArgs> args;
  size_t num_maps = 0;
  for (size_t i = 0; i < plan.args.size(); ++i) {
    const auto* map = std::get_if<TensorMap>(&plan.args[i]);
    if (map == nullptr) {
      // The driver reads the value, and does so before the launch returns.
      args[i] =
          std::visit([](const auto& v) { return const_cast<void*>(static_cast<const void*>(&v)); },
                     plan.args[i]);
      continue;
    }
    if (num_maps == kMaxTensorMaps) {
      throw DriverError(plan.kernel + " has more than " + std::to_string(kMaxTensorMaps) +
                        " tensor maps");
    }
    encode(driver, *map, &maps[num_maps], [&] { return label(i); });
    args[i] = &maps[num_maps++];
  }

  // Also for clusters of one: without it barrier.cluster.wait is a barrier of the CTA, which a
  // kernel's warps reach at several places (compute-sanitizer's synccheck refuses that).
  cuda::LaunchAttribute cluster{};
  cluster.id = cuda::kLaunchClusterDimension;
  cluster.value.cluster = {plan.cluster.x, plan.cluster.y, plan.cluster.z};
  cuda::LaunchConfig config{
      plan.grid.x,  plan.grid.y,       plan.grid.z, plan.block.x, plan.block.y,
      plan.block.z, plan.dynamic_smem, stream_,     &cluster,     1};
  auto function = reinterpret_cast<cuda::Function>(driver_->kernel(plan, ordinal_));
  driver.check(driver.table.cuLaunchKernelEx(&config, function, args.data(), nullptr), [&] {
    return "cuLaunchKernelEx(" + plan.kernel + ", grid " + to_string(plan.grid) + ", block " +
           to_string(plan.block) + ", cluster " + to_string(plan.cluster) +
           ", dynamic shared memory " + std::to_string(plan.dynamic_smem) + " bytes)";
  });
}

}  // namespace jaxfp8::driver
