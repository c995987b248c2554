#include "ffi/handlers.h"

#include <exception>
#include <memory>
#include <string>

#include "driver/driver.h"
#include "ffi/contract.h"
#include "xla/ffi/api/ffi.h"

namespace jaxfp8 {
namespace {

namespace ffi = xla::ffi;

Array decode(const ffi::AnyBuffer& buffer) {
  Array array;
  array.data = buffer.untyped_data();
  array.dims = buffer.dimensions().begin();
  array.rank = buffer.dimensions().size();
  const auto known = [&](DType dtype) {
    array.dtype = dtype;
    array.dtype_name = name(dtype);
  };
  switch (buffer.element_type()) {
    case ffi::F8E4M3FN:
      known(DType::kF8E4M3FN);
      break;
    case ffi::F8E5M2:
      known(DType::kF8E5M2);
      break;
    case ffi::BF16:
      known(DType::kBFloat16);
      break;
    case ffi::F16:
      known(DType::kFloat16);
      break;
    case ffi::F32:
      known(DType::kFloat32);
      break;
    case ffi::S32:
      known(DType::kInt32);
      break;
    case ffi::S64:
      array.dtype_name = "s64";
      break;
    case ffi::U8:
      array.dtype_name = "u8";
      break;
    case ffi::F64:
      array.dtype_name = "f64";
      break;
    default:
      array.dtype_name = "of another type";
  }
  return array;
}

void tell(driver::CallHook hook, const Call& call) {
  std::vector<driver::Buffer> buffers;
  const auto add = [&](const std::vector<Array>& arrays, const std::vector<ArraySpec>& specs,
                       bool written) {
    for (size_t i = 0; i < arrays.size() && i < specs.size(); ++i) {
      buffers.push_back({specs[i].name, arrays[i].data, size_in_bytes(arrays[i]), written});
    }
  };
  add(call.operands, call.target->operands, false);
  add(call.results, call.target->results, true);
  hook(call.target->name.c_str(), buffers.data(), static_cast<int32_t>(buffers.size()));
}

// XLA's typed binding would not name the attribute.
template <class T>
T attribute(const Target& target, const ffi::Dictionary& attributes, const char* name,
            const char* type) {
  if (!attributes.contains(name)) {
    throw CallError(target.name + ": attribute " + name + " is missing; it must be " + type);
  }
  if (!attributes.contains<T>(name)) {
    throw CallError(target.name + ": attribute " + name + " is of another type; it must be " +
                    type);
  }
  return attributes.get<T>(name).value();
}

Call decode(const Target& target, const ffi::RemainingArgs& operands,
            const ffi::RemainingRets& results, const ffi::Dictionary& attributes) {
  Call call;
  call.target = &target;
  if (target.is<ActivationProblem>()) {
    call.activation = attribute<int32_t>(target, attributes, "activation", "i32");
  }
  if (!target.is<GemmProblem>()) {
    call.pow2 = attribute<bool>(target, attributes, "pow2", "i1");
  } else {
    call.config = attribute<int32_t>(target, attributes, "config", "i32");
    call.num_sms = attribute<int32_t>(target, attributes, "num_sms", "i32");
  }
  call.operands.reserve(operands.size());
  for (size_t i = 0; i < operands.size(); ++i) {
    call.operands.push_back(decode(operands.get<ffi::AnyBuffer>(i).value()));
  }
  call.results.reserve(results.size());
  for (size_t i = 0; i < results.size(); ++i) {
    call.results.push_back(decode(*results.get<ffi::AnyBuffer>(i).value()));
  }
  return call;
}

void execute(const Call& call, cuda::Stream stream) {
  driver::Device device(stream);
  if (device.hook() != nullptr) tell(device.hook(), call);
  device.execute(plan_call(call, device.num_sms()));
}

// What tells calls apart but their addresses, in 64 bits (FNV-1a of words).
uint64_t fingerprint(const Call& call) {
  uint64_t hash = 0xcbf29ce484222325;
  const auto add = [&hash](uint64_t word) { hash = (hash ^ word) * 0x100000001b3; };
  add(call.target - targets().data());
  add(call.pow2 | call.activation << 1);
  add(static_cast<uint64_t>(call.config) << 32 | static_cast<uint32_t>(call.num_sms));
  for (const auto* arrays : {&call.operands, &call.results}) {
    for (const Array& array : *arrays) {
      add(array.dtype ? static_cast<uint64_t>(*array.dtype) : ~uint64_t{0});
      for (size_t d = 0; d < array.rank; ++d) add(array.dims[d]);
      add(array.rank);
    }
  }
  return hash;
}

// XLA initializes before every execution: a call that was prepared is known by its fingerprint. If
// two should share one, the second's kernel is left to its launch.
void initialize(Call call, cuda::Stream stream) {
  driver::Device device(stream);
  const uint64_t known_as = fingerprint(call);
  if (device.was_prepared(known_as)) return;
  // Addresses are the execute stage's; which kernel it is does not depend on them.
  void* const somewhere = reinterpret_cast<void*>(uintptr_t{1} << 20);
  for (auto* arrays : {&call.operands, &call.results}) {
    for (Array& array : *arrays) array.data = somewhere;
  }
  device.prepare(plan_call(call, device.num_sms()), known_as);
}

template <class Function>
ffi::Error run(Function stage, const Target& target, cuda::Stream stream,
               const ffi::RemainingArgs& operands, const ffi::RemainingRets& results,
               const ffi::Dictionary& attributes) {
  try {
    stage(decode(target, operands, results, attributes), stream);
    return ffi::Error::Success();
  } catch (const std::invalid_argument& error) {
    return ffi::Error(ffi::ErrorCode::kInvalidArgument, error.what());
  } catch (const driver::UnavailableError& error) {
    return ffi::Error(ffi::ErrorCode::kUnavailable, target.name + ": " + error.what());
  } catch (const driver::DriverError& error) {
    bool full = error.result == cuda::kOutOfMemory;
    return ffi::Error(full ? ffi::ErrorCode::kResourceExhausted : ffi::ErrorCode::kInternal,
                      target.name + ": " + error.what());
  } catch (const std::exception& error) {
    return ffi::Error(ffi::ErrorCode::kInternal, target.name + ": " + error.what());
  }
}

enum class Stage { kCudaExecute, kCudaInitialize, kEmulated };

// The CUDA platform passes its stream; the CPU platform has none.
template <Stage kStage>
std::unique_ptr<ffi::Ffi> make_handler(const Target& target) {
  const auto on_cuda = [&target](auto stage) {
    return [&target, stage](cuda::Stream stream, ffi::RemainingArgs operands,
                            ffi::RemainingRets results, ffi::Dictionary attributes) {
      return run(stage, target, stream, operands, results, attributes);
    };
  };
  if constexpr (kStage == Stage::kCudaExecute) {
    return ffi::Ffi::Bind()
        .Ctx<ffi::PlatformStream<cuda::Stream>>()
        .RemainingArgs()
        .RemainingRets()
        .Attrs()
        .To(on_cuda(&execute), {ffi::Traits::kCmdBufferCompatible});
  } else if constexpr (kStage == Stage::kCudaInitialize) {
    return ffi::Ffi::BindInitialize()
        .Ctx<ffi::PlatformStream<cuda::Stream>>()
        .RemainingArgs()
        .RemainingRets()
        .Attrs()
        .To(on_cuda(&initialize), {ffi::Traits::kCmdBufferCompatible});
  } else {
    return ffi::Ffi::Bind().RemainingArgs().RemainingRets().Attrs().To(
        [&target](ffi::RemainingArgs operands, ffi::RemainingRets results,
                  ffi::Dictionary attributes) {
          return run(&execute, target, nullptr, operands, results, attributes);
        });
  }
}

template <Stage kStage, size_t kTarget>
XLA_FFI_Error* handle(XLA_FFI_CallFrame* frame) {
  // Never destroyed: XLA's threads may outlive static objects.
  static const ffi::Ffi* handler = make_handler<kStage>(targets()[kTarget]).release();
  return handler->Call(frame);
}

template <Stage kStage, size_t... kTarget>
std::vector<Handler> all_handlers(std::index_sequence<kTarget...>) {
  return {&handle<kStage, kTarget>...};
}

template <Stage kStage>
std::vector<Handler> all_handlers() {
  return all_handlers<kStage>(std::make_index_sequence<kNumTargets>());
}

}  // namespace

std::vector<Handler> cuda_handlers() { return all_handlers<Stage::kCudaExecute>(); }
std::vector<Handler> cuda_initializers() { return all_handlers<Stage::kCudaInitialize>(); }
std::vector<Handler> emulated_handlers() { return all_handlers<Stage::kEmulated>(); }

}  // namespace jaxfp8
