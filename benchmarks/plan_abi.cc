// Plans as JSON through a C ABI, for benchmark harnesses: the very plans that the handlers execute.
#include <cstdio>
#include <cstring>
#include <string>

#include "../csrc/host/gemm.h"

namespace {

std::string quoted(const std::string& text) { return '"' + text + '"'; }

template <class T>
std::string list(const T& values) {
  std::string out;
  for (auto v : values) out += (out.empty() ? "" : ", ") + std::to_string(v);
  return "[" + out + "]";
}

struct ToJson {
  std::string operator()(const jaxfp8::TensorMap& map) const {
    return "{\"type\": " + std::to_string(static_cast<int>(map.type)) +
           ", \"base\": " + std::to_string(reinterpret_cast<uintptr_t>(map.base)) +
           ", \"dims\": " + list(map.dims) + ", \"strides\": " + list(map.strides) +
           ", \"box\": " + list(map.box) +
           ", \"swizzle\": " + std::to_string(static_cast<int>(map.swizzle)) + "}";
  }
  std::string operator()(const jaxfp8::ParamBlock& block) const {
    std::string out;
    for (uint32_t i = 0; i < block.size; ++i) {
      out += (i == 0 ? "" : ", ") + std::to_string(static_cast<int>(block.bytes[i]));
    }
    return "{\"bytes\": [" + out + "]}";
  }
  std::string operator()(void* pointer) const {
    return "[8, " + std::to_string(reinterpret_cast<uintptr_t>(pointer)) + "]";
  }
  template <class T>
  std::string operator()(T value) const {
    return "[" + std::to_string(sizeof(T)) + ", " + std::to_string(value) + "]";
  }
};

}  // namespace

// sizes: m, n, k, groups. dtypes: of lhs, rhs, out. addresses: lhs, its scale, rhs, its scale,
// group_sizes, out. Writes JSON, or the error's text and returns 1.
extern "C" int plan_gemm_json(int kind, const int64_t* sizes, const int* dtypes, int lhs_shared,
                              int accum, void* const* addresses, int config, int num_sms,
                              int device_sms, char* out, int out_size) {
  jaxfp8::GemmProblem p;
  p.kind = static_cast<jaxfp8::GemmProblem::Kind>(kind);
  p.m = sizes[0], p.n = sizes[1], p.k = sizes[2], p.groups = sizes[3];
  p.lhs = static_cast<jaxfp8::DType>(dtypes[0]);
  p.rhs = static_cast<jaxfp8::DType>(dtypes[1]);
  p.out = static_cast<jaxfp8::DType>(dtypes[2]);
  p.lhs_shared = lhs_shared, p.accum = accum;
  p.lhs_data = addresses[0], p.lhs_scale = addresses[1];
  p.rhs_data = addresses[2], p.rhs_scale = addresses[3];
  p.group_sizes = addresses[4], p.out_data = addresses[5];
  try {
    const jaxfp8::LaunchPlan plan = jaxfp8::plan_gemm(p, config, num_sms, device_sms);
    std::string args;
    for (const auto& arg : plan.args) {
      args += (args.empty() ? "" : ", ") + std::visit(ToJson{}, arg);
    }
    const std::string json =
        "{\"image\": " + quoted(plan.image) + ", \"kernel\": " + quoted(plan.kernel) +
        ", \"grid\": " + std::to_string(plan.grid.x) +
        ", \"block\": " + std::to_string(plan.block.x) +
        ", \"config\": " + std::to_string(plan.config) +
        ", \"cluster\": " + std::to_string(plan.cluster.x) +
        ", \"smem\": " + std::to_string(plan.dynamic_smem) + ", \"args\": [" + args + "]}";
    std::snprintf(out, out_size, "%s", json.c_str());
    return 0;
  } catch (const std::exception& error) {
    std::snprintf(out, out_size, "%s", error.what());
    return 1;
  }
}

extern "C" int num_configs(int kind) {
  return jaxfp8::num_gemm_configs(static_cast<jaxfp8::GemmProblem::Kind>(kind));
}

extern "C" void config_name(int kind, int config, char* out, int out_size) {
  std::snprintf(
      out, out_size, "%s",
      jaxfp8::gemm_config_name(static_cast<jaxfp8::GemmProblem::Kind>(kind), config).c_str());
}
