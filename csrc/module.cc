// The Python module jaxfp8._C: handlers to register, plans to print, and the seam for tests.
#include <nanobind/nanobind.h>
#include <nanobind/stl/array.h>
#include <nanobind/stl/map.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <cstring>

#include "build_info.h"
#include "driver/driver.h"
#include "ffi/contract.h"
#include "ffi/handlers.h"
#include "host/plan_print.h"
#include "xla/ffi/api/c_api.h"

namespace nb = nanobind;

namespace jaxfp8 {
namespace {

nb::dict build_info() {
  nb::list images;
  for (const char* image : build::kImages) {
    if (image != nullptr) images.append(image);
  }
  nb::dict info;
  info["version"] = build::kVersion;
  info["nvcc"] = build::kNvccVersion;
  info["ffi"] = nb::make_tuple(XLA_FFI_API_MAJOR, XLA_FFI_API_MINOR);
  info["images"] = images;
  return info;
}

// As the operating system has it, which need not be UTF-8.
std::string file_system_path(nb::handle path) {
  PyObject* bytes = nullptr;
  if (!PyUnicode_FSConverter(path.ptr(), &bytes)) throw nb::python_error();
  const auto owner = nb::steal(bytes);
  return {PyBytes_AsString(bytes), static_cast<size_t>(PyBytes_Size(bytes))};
}

nb::dict handlers(const std::string& platform, const std::string& stage) {
  if (platform != "CUDA" && platform != "cpu") {
    throw nb::value_error(("platform is " + platform + "; allowed are CUDA and cpu").c_str());
  }
  const bool initialize = stage == "initialize" && platform == "CUDA";
  if (!initialize && stage != "execute") {
    throw nb::value_error(
        ("stage is " + stage + "; allowed are execute, and initialize on CUDA").c_str());
  }
  std::vector<Handler> all = initialize           ? cuda_initializers()
                             : platform == "CUDA" ? cuda_handlers()
                                                  : emulated_handlers();
  nb::dict named;
  for (size_t i = 0; i < all.size(); ++i) {
    named[targets()[i].name.c_str()] = nb::capsule(reinterpret_cast<void*>(all[i]));
  }
  return named;
}

// A plan without arrays: each gets a made-up address, by which it is found again in the plan.
struct NamedPlan {
  LaunchPlan plan;
  std::vector<std::string> arrays;

  static constexpr int kAddressBits = 48;
  static void* address(size_t array) {
    return reinterpret_cast<void*>(static_cast<uintptr_t>(array + 1) << kAddressBits);
  }
  std::string name_address(void* p) const {
    auto value = reinterpret_cast<uintptr_t>(p);
    if (value == 0) return "null";
    size_t array = (value >> kAddressBits) - 1;
    uintptr_t offset = value & ((uintptr_t{1} << kAddressBits) - 1);
    std::string text = array < arrays.size() ? arrays[array] : "?";
    return offset == 0 ? text : text + "+" + std::to_string(offset);
  }
  std::string text() const {
    return to_string(plan, [this](void* p) { return name_address(p); });
  }
  nb::list args() const {
    nb::list all;
    for (const KernelArg& arg : plan.args) {
      if (const auto* map = std::get_if<TensorMap>(&arg)) {
        nb::dict fields;
        fields["base"] = name_address(map->base);
        fields["type"] = name(map->type);
        fields["dims"] = map->dims;
        fields["strides"] = map->strides;
        fields["box"] = map->box;
        fields["swizzle"] = name(map->swizzle);
        all.append(fields);
      } else if (const auto* block = std::get_if<ParamBlock>(&arg)) {
        nb::dict addresses;  // by the byte at which they lie
        for (uint32_t i = 0; i < block->num_addresses; ++i) {
          addresses[nb::int_(i * sizeof(void*))] = name_address(block->address(i));
        }
        nb::dict fields;
        fields["bytes"] = nb::bytes(block->bytes.data(), block->size);
        fields["addresses"] = addresses;
        all.append(fields);
      } else if (const auto* pointer = std::get_if<void*>(&arg)) {
        all.append(name_address(*pointer));
      } else {
        std::visit(
            [&](const auto& value) {
              if constexpr (std::is_arithmetic_v<std::decay_t<decltype(value)>>) all.append(value);
            },
            arg);
      }
    }
    return all;
  }
};

using ArrayType = std::pair<std::string, std::vector<int64_t>>;

NamedPlan plan(const std::string& target_name, const std::vector<ArrayType>& operands,
               const std::vector<ArrayType>& results, bool pow2, int config, int num_sms,
               int device_sms, const std::map<std::string, uintptr_t>& offsets, int activation) {
  Call call;
  call.target = &find_target(target_name);
  call.pow2 = pow2;
  call.activation = activation;
  call.config = config;
  call.num_sms = num_sms;
  NamedPlan named;
  const auto add = [&](std::vector<Array>& arrays, const std::vector<ArrayType>& types,
                       const std::vector<ArraySpec>& specs) {
    for (size_t i = 0; i < types.size(); ++i) {
      Array array;
      array.data = NamedPlan::address(named.arrays.size());
      array.dtype_name = types[i].first.c_str();
      for (DType dtype : {DType::kF8E4M3FN, DType::kF8E5M2, DType::kBFloat16, DType::kFloat16,
                          DType::kFloat32, DType::kInt32}) {
        if (types[i].first == name(dtype)) array.dtype = dtype;
      }
      array.dims = types[i].second.data();
      array.rank = types[i].second.size();
      arrays.push_back(array);
      named.arrays.push_back(i < specs.size() ? specs[i].name : "?");
    }
  };
  add(call.operands, operands, call.target->operands);
  add(call.results, results, call.target->results);
  if (call.target->accum && !call.operands.empty() && !call.results.empty()) {
    call.operands.back().data = call.results.front().data;
  }
  const auto displace = [&](std::vector<Array>& arrays, size_t first) {
    for (size_t i = 0; i < arrays.size(); ++i) {
      auto offset = offsets.find(named.arrays[first + i]);
      if (offset != offsets.end()) {
        arrays[i].data = static_cast<char*>(arrays[i].data) + offset->second;
      }
    }
  };
  displace(call.operands, 0);
  displace(call.results, call.operands.size());
  named.plan = plan_call(call, device_sms);
  return named;
}

// Launches a plan with its made-up addresses, which only an installed driver may see.
void launch(const NamedPlan& named, uintptr_t stream) {
  driver::Device device(reinterpret_cast<cuda::Stream>(stream));
  if (!device.emulated()) throw driver::UnavailableError("no driver is installed");
  device.execute(named.plan);
}

std::vector<std::string> configs(const std::string& target_name) {
  const Target& target = find_target(target_name);
  std::vector<std::string> names;
  if (const auto* kind = std::get_if<GemmProblem::Kind>(&target.kind)) {
    for (int i = 0; i < num_gemm_configs(*kind); ++i) {
      names.push_back(gemm_config_name(*kind, i));
    }
  }
  return names;
}

nb::tuple to_tuple(const Dim3& d) { return nb::make_tuple(d.x, d.y, d.z); }

void install_driver(const std::map<std::string, uintptr_t>& entry_points, uintptr_t hook) {
  std::map<std::string, void*> addresses;
  for (const auto& [name, address] : entry_points) {
    addresses[name] = reinterpret_cast<void*>(address);
  }
  driver::install(addresses, reinterpret_cast<driver::CallHook>(hook));
}

}  // namespace
}  // namespace jaxfp8

NB_MODULE(_C, m) {
  using namespace jaxfp8;
  // A plan that a cache still holds when the interpreter ends is no leak.
  nb::set_leak_warnings(false);
  m.def("build_info", &build_info);
  m.def(
      "set_image_directory",
      [](nb::handle path, bool built) {
        driver::set_image_directory({file_system_path(path), built});
      },
      nb::arg("path"), nb::kw_only(), nb::arg("built") = true);
  m.def("handlers", &handlers, nb::arg("platform"), nb::arg("stage") = "execute");

  nb::class_<NamedPlan>(m, "LaunchPlan")
      .def_prop_ro("image", [](const NamedPlan& p) { return p.plan.image; })
      .def_prop_ro("kernel", [](const NamedPlan& p) { return p.plan.kernel; })
      .def_prop_ro("grid", [](const NamedPlan& p) { return to_tuple(p.plan.grid); })
      .def_prop_ro("block", [](const NamedPlan& p) { return to_tuple(p.plan.block); })
      .def_prop_ro("cluster", [](const NamedPlan& p) { return to_tuple(p.plan.cluster); })
      .def_prop_ro("dynamic_smem", [](const NamedPlan& p) { return p.plan.dynamic_smem; })
      .def_prop_ro("config", [](const NamedPlan& p) { return p.plan.config; })
      .def_prop_ro("args", &NamedPlan::args)
      .def("__str__", &NamedPlan::text);
  m.def("plan", &plan, nb::arg("target"), nb::arg("operands"), nb::arg("results"), nb::kw_only(),
        nb::arg("pow2") = false, nb::arg("config") = -1, nb::arg("num_sms") = 0,
        nb::arg("device_sms") = 132, nb::arg("offsets") = std::map<std::string, uintptr_t>(),
        nb::arg("activation") = 0);
  m.def("configs", &configs, nb::arg("target"));

  m.def("_install_driver", &install_driver, nb::arg("entry_points"), nb::arg("hook") = 0,
        nb::call_guard<nb::gil_scoped_release>());
  m.def("_launch", &launch, nb::arg("plan"), nb::arg("stream"),
        nb::call_guard<nb::gil_scoped_release>());
  m.def("_uninstall_driver", &driver::uninstall, nb::call_guard<nb::gil_scoped_release>());
}
