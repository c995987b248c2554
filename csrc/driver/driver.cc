#include "driver/driver.h"

#include <array>
#include <sstream>
#include <string>
#include <variant>

#include "host/plan_print.h"

namespace jaxfp8::driver {
namespace {

// A kernel of one plan has at most this many parameters and tensor maps.
constexpr size_t kMaxArgs = 32;
constexpr size_t kMaxTensorMaps = 8;

template <class Label>
void encode(const Api& api, const TensorMap& map, cuda::TensorMap* out, Label label) {
  static constexpr uint32_t kUnitStrides[] = {1, 1};
  int type = map.type == TensorMap::Type::kUint8      ? cuda::kTensorMapUint8
             : map.type == TensorMap::Type::kBfloat16 ? cuda::kTensorMapBfloat16
                                                      : cuda::kTensorMapFloat32;
  int swizzle = map.swizzle == TensorMap::Swizzle::kNone  ? cuda::kSwizzleNone
                : map.swizzle == TensorMap::Swizzle::k32B ? cuda::kSwizzle32B
                : map.swizzle == TensorMap::Swizzle::k64B ? cuda::kSwizzle64B
                                                          : cuda::kSwizzle128B;
  api.check(api.table.cuTensorMapEncodeTiled(out, type, map.dims.size(), map.base, map.dims.data(),
                                             map.strides.data(), map.box.data(), kUnitStrides,
                                             cuda::kInterleaveNone, swizzle, cuda::kL2Promotion256B,
                                             cuda::kOutOfBoundsZeros),
            [&] {
              std::ostringstream base;
              base << map.base;
              return "cuTensorMapEncodeTiled(" + label() + ": base " + base.str() + ", dims " +
                     to_string(map.dims) + ", strides " + to_string(map.strides) + ", box " +
                     to_string(map.box) + ", swizzle " + std::to_string(swizzle) + ")";
            });
}

}  // namespace

CurrentContext::CurrentContext(const Api& api, cuda::Stream stream) : api_(api) {
  if (stream == nullptr) return;
  cuda::Context wanted = nullptr, present = nullptr;
  api.check(api.table.cuStreamGetCtx(stream, &wanted), [] { return "cuStreamGetCtx"; });
  api.check(api.table.cuCtxGetId(wanted, &number_), [] { return "cuCtxGetId"; });
  api.check(api.table.cuCtxGetCurrent(&present), [] { return "cuCtxGetCurrent"; });
  if (wanted == present) return;
  api.check(api.table.cuCtxPushCurrent_v2(wanted), [] { return "cuCtxPushCurrent"; });
  pushed_ = true;
}

CurrentContext::~CurrentContext() {
  cuda::Context popped = nullptr;
  if (pushed_) api_.table.cuCtxPopCurrent_v2(&popped);
}

Device::Device(cuda::Stream stream)
    : driver_(current_driver()), stream_(stream), context_(driver_->api, stream) {
  if (stream == nullptr && !driver_->emulated) {
    throw UnavailableError(
        "there is no stream: on a CPU the custom calls run only under emulation");
  }
  const Api& api = driver_->api;
  api.check(api.table.cuCtxGetDevice(&ordinal_), [] { return "cuCtxGetDevice"; });
  num_sms_ = driver_->num_sms(ordinal_);
}

void Device::prepare(const LaunchPlan& plan) const {
  driver_->loader.ready(plan, context_.number(), ordinal_);
}

void Device::execute(const LaunchPlan& plan) const {
  const Api& api = driver_->api;
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
    encode(api, *map, &maps[num_maps], [&] { return label(i); });
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
  auto function =
      reinterpret_cast<cuda::Function>(driver_->loader.ready(plan, context_.number(), ordinal_));
  if (plan.copy) {
    const Copy& copy = *plan.copy;
    api.check(api.table.cuMemcpyDtoDAsync_v2(reinterpret_cast<uint64_t>(copy.target),
                                             reinterpret_cast<uint64_t>(copy.source), copy.bytes,
                                             stream_),
              [&] { return "cuMemcpyDtoDAsync(" + std::to_string(copy.bytes) + " bytes)"; });
  }
  api.check(api.table.cuLaunchKernelEx(&config, function, args.data(), nullptr), [&] {
    return "cuLaunchKernelEx(" + plan.kernel + ", grid " + to_string(plan.grid) + ", block " +
           to_string(plan.block) + ", cluster " + to_string(plan.cluster) +
           ", dynamic shared memory " + std::to_string(plan.dynamic_smem) + " bytes)";
  });
}

namespace {

// The driver and the number of the stream's context, to `use`; false where there is neither.
template <class Use>
bool in_context_of(cuda::Stream stream, Use use) noexcept {
  try {
    const std::shared_ptr<Driver> driver = current_driver();
    cuda::Context context = nullptr;
    uint64_t number = 0;
    const cuda::Table& table = driver->api.table;
    if (stream == nullptr || table.cuStreamGetCtx(stream, &context) != cuda::kSuccess ||
        table.cuCtxGetId(context, &number) != cuda::kSuccess) {
      return false;
    }
    return use(driver->loader, number);
  } catch (const std::exception&) {
    return false;  // the call itself meets the error again, and reports it
  }
}

}  // namespace

bool is_prepared(cuda::Stream stream, uint64_t known_as) noexcept {
  return in_context_of(stream, [known_as](Loader& loader, uint64_t context) {
    return loader.remembers(context, known_as);
  });
}

void remember_prepared(cuda::Stream stream, uint64_t known_as) noexcept {
  in_context_of(stream, [known_as](Loader& loader, uint64_t context) {
    loader.remember(context, known_as);
    return true;
  });
}

}  // namespace jaxfp8::driver
