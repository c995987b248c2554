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
  if (target.quantizes()) call.pow2 = attribute<bool>(target, attributes, "pow2", "i1");
  if (target.is<GemmProblem>()) {
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

void initialize(Call call, cuda::Stream stream) {
  driver::Device device(stream);
  // Addresses are the execute stage's; which kernel it is does not depend on them.
  void* const somewhere = reinterpret_cast<void*>(uintptr_t{1} << 20);
  for (auto* arrays : {&call.operands, &call.results}) {
    for (Array& array : *arrays) array.data = somewhere;
  }
  device.prepare(plan_call(call, device.num_sms()));
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

// What tells calls apart but their addresses, in 64 bits (FNV-1a of words), without decoding them.
uint64_t fingerprint(const XLA_FFI_CallFrame& frame, size_t target) {
  uint64_t hash = 0xcbf29ce484222325;
  const auto add = [&hash](uint64_t word) { hash = (hash ^ word) * 0x100000001b3; };
  const auto add_buffers = [&add](void* const* buffers, int64_t count) {
    for (int64_t i = 0; i < count; ++i) {
      const auto& buffer = *static_cast<const XLA_FFI_Buffer*>(buffers[i]);
      add(static_cast<uint64_t>(buffer.dtype) << 32 | static_cast<uint32_t>(buffer.rank));
      for (int64_t d = 0; d < buffer.rank; ++d) add(buffer.dims[d]);
    }
  };
  add(target);
  add_buffers(frame.args.args, frame.args.size);
  add_buffers(frame.rets.rets, frame.rets.size);
  for (int64_t i = 0; i < frame.attrs.size; ++i) {
    if (frame.attrs.types[i] != XLA_FFI_AttrType_SCALAR) continue;  // the contract refuses others
    const auto& scalar = *static_cast<const XLA_FFI_Scalar*>(frame.attrs.attrs[i]);
    if (scalar.dtype == XLA_FFI_DataType_S32) add(*static_cast<const uint32_t*>(scalar.value));
    if (scalar.dtype == XLA_FFI_DataType_PRED) add(*static_cast<const uint8_t*>(scalar.value));
  }
  return hash;
}

// The stream of a call, null where there is none.
cuda::Stream stream_of(const XLA_FFI_CallFrame& frame) {
  XLA_FFI_Stream_Get_Args get{XLA_FFI_Stream_Get_Args_STRUCT_SIZE, nullptr, frame.ctx, nullptr};
  if (XLA_FFI_Error* error = frame.api->XLA_FFI_Stream_Get(&get)) {
    XLA_FFI_Error_Destroy_Args destroy{XLA_FFI_Error_Destroy_Args_STRUCT_SIZE, nullptr, error};
    frame.api->XLA_FFI_Error_Destroy(&destroy);
    return nullptr;
  }
  return static_cast<cuda::Stream>(get.stream);
}

// XLA initializes before every execution, also of a command buffer: a call that was prepared is
// known by its fingerprint. If two should share one, the second's kernel is left to its launch.
template <size_t kTarget>
XLA_FFI_Error* initialize_once(const ffi::Ffi& handler, XLA_FFI_CallFrame* frame) {
  if (frame->extension_start != nullptr)
    return handler.Call(frame);  // a question about the handler
  const cuda::Stream stream = stream_of(*frame);
  const uint64_t known_as = fingerprint(*frame, kTarget);
  if (driver::is_prepared(stream, known_as)) return nullptr;
  XLA_FFI_Error* error = handler.Call(frame);
  if (error == nullptr) driver::remember_prepared(stream, known_as);
  return error;
}

template <Stage kStage, size_t kTarget>
XLA_FFI_Error* handle(XLA_FFI_CallFrame* frame) {
  // Never destroyed: XLA's threads may outlive static objects.
  static const ffi::Ffi* handler = make_handler<kStage>(targets()[kTarget]).release();
  if constexpr (kStage == Stage::kCudaInitialize) return initialize_once<kTarget>(*handler, frame);
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
