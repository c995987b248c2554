#include "driver/loader.h"

#include "driver/image.h"
#include "driver/state.h"

namespace jaxfp8::driver {
namespace {

constexpr uint32_t kDefaultDynamicSmem = 48 * 1024;  // more must be asked for

// A thread that captures a CUDA graph may not load code unless it says so.
class RelaxedCapture {
 public:
  explicit RelaxedCapture(const Api& api) : api_(api) {
    api.check(api.table.cuThreadExchangeStreamCaptureMode(&mode_),
              [] { return "cuThreadExchangeStreamCaptureMode(relaxed)"; });
  }
  ~RelaxedCapture() { api_.table.cuThreadExchangeStreamCaptureMode(&mode_); }

 private:
  const Api& api_;
  int mode_ = cuda::kCaptureModeRelaxed;  // after the exchange, the thread's own
};

}  // namespace

cuda::Kernel Loader::ready(const LaunchPlan& plan, uint64_t context, cuda::Device device) {
  const auto find = [&]() -> Readiness* {
    auto found = ready_.find({plan.image, plan.kernel, context});
    return found == ready_.end() ? nullptr : found->second.get();
  };
  Readiness* readiness;
  {
    std::shared_lock lock(mutex_);
    readiness = find();
  }
  if (readiness == nullptr) {
    Kernel& found = kernel(plan);
    std::unique_lock lock(mutex_);
    readiness = find();
    if (readiness == nullptr) {
      auto made = std::make_unique<Readiness>();
      made->kernel = &found;
      readiness = made.get();
      ready_.emplace(ReadyKey{found.image, found.name, context}, std::move(made));
    }
  }
  Kernel& kernel = *readiness->kernel;
  readiness->once.run([&] {
    RelaxedCapture relaxed(api_);
    kernel.once.run([&] { load(plan, kernel); });
    make_ready(plan, kernel.handle, device);
  });
  return kernel.handle;
}

void Loader::remember(uint64_t context, uint64_t call) {
  std::unique_lock lock(mutex_);
  remembered_.emplace(context, call);
}

bool Loader::remembers(uint64_t context, uint64_t call) {
  std::shared_lock lock(mutex_);
  return remembered_.count({context, call}) != 0;
}

Loader::Kernel& Loader::kernel(const LaunchPlan& plan) {
  std::unique_lock lock(mutex_);
  auto found = kernels_.find({plan.image, plan.kernel});
  if (found == kernels_.end()) {
    auto made = std::make_unique<Kernel>();
    made->image = plan.image;
    made->name = plan.kernel;
    KernelKey key{made->image, made->name};
    found = kernels_.emplace(key, std::move(made)).first;
  }
  return *found->second;
}

void Loader::load(const LaunchPlan& plan, Kernel& kernel) {
  const cuda::Library from = library(plan.image);
  api_.check(api_.table.cuLibraryGetKernel(&kernel.handle, from, plan.kernel.c_str()),
             [&] { return "cuLibraryGetKernel(" + plan.kernel + " of " + plan.image + ".cubin)"; });
}

void Loader::make_ready(const LaunchPlan& plan, cuda::Kernel handle, cuda::Device device) {
  // A kernel's shared memory is its tile's: every plan of it has the same.
  if (plan.dynamic_smem > kDefaultDynamicSmem) {
    api_.check(api_.table.cuKernelSetAttribute(cuda::kMaxDynamicSharedSizeBytes,
                                               static_cast<int>(plan.dynamic_smem), handle, device),
               [&] {
                 return "cuKernelSetAttribute(" + plan.kernel + ", dynamic shared memory of " +
                        std::to_string(plan.dynamic_smem) + " bytes, device " +
                        std::to_string(device) + ")";
               });
  }
  // Loads the code into the context now: left to the launch, it could happen during a capture.
  cuda::Function function = nullptr;
  api_.check(api_.table.cuKernelGetFunction(&function, handle),
             [&] { return "cuKernelGetFunction(" + plan.kernel + ")"; });
}

cuda::Library Loader::library(const std::string& name) {
  Image* image;
  {
    std::unique_lock lock(mutex_);
    std::unique_ptr<Image>& entry = images_[name];
    if (entry == nullptr) entry = std::make_unique<Image>();
    image = entry.get();
  }
  image->once.run([&] {
    const ImageDirectory directory = image_directory();
    const std::vector<char> code = read_image(directory, name);
    cuda::Result result = api_.table.cuLibraryLoadData(&image->library, code.data(), nullptr,
                                                       nullptr, 0, nullptr, nullptr, 0);
    api_.check(result, [&] {
      int version = 0;
      api_.table.cuDriverGetVersion(&version);
      return "cuLibraryLoadData(" + directory.path + "/" + name + ".cubin, compiled by nvcc " +
             nvcc_version() + ", driver of CUDA " + std::to_string(version / 1000) + "." +
             std::to_string(version % 1000 / 10) + ")";
    });
  });
  return image->library;
}

}  // namespace jaxfp8::driver
