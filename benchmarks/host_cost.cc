// Host time of one custom call: check, plan, tensor maps and launch, on a driver that does nothing.
// What a real driver adds is not in it.
//
//   g++ -std=c++20 -O3 -Icsrc -Ibuild/cp311-cp311-linux_x86_64/include benchmarks/host_cost.cc
//       csrc/driver/*.cc csrc/ffi/{targets,contract,plan_call}.cc csrc/host/*.cc -ldl
//       -o build/host_cost
//   build/host_cost <folder with the cubins>
#include <cstdio>
#include <ctime>

#include "driver/driver.h"
#include "ffi/contract.h"

using namespace jaxfp8;

namespace {

cuda::Result nothing() { return cuda::kSuccess; }
cuda::Result attribute(int* value, int which, cuda::Device) {
  *value = which == cuda::kMultiprocessorCount      ? 132
           : which == cuda::kComputeCapabilityMajor ? 9
                                                    : 0;
  return cuda::kSuccess;
}

Array array(DType dtype, const std::vector<int64_t>& dims, uintptr_t address) {
  return {reinterpret_cast<void*>(address), dtype, name(dtype), dims.data(), dims.size()};
}

void measure(const char* what, const Call& like) {
  constexpr int kCalls = 100000;
  std::clock_t start = std::clock();  // processor time: other processes do not count
  for (int i = 0; i < kCalls; ++i) {
    Call call = like;  // a handler fills one for each call
    driver::Device device(nullptr);
    device.execute(plan_call(call, device.num_sms()));
  }
  double seconds = static_cast<double>(std::clock() - start) / CLOCKS_PER_SEC;
  std::printf("%-28s %6.3f us a call\n", what, 1e6 * seconds / kCalls);
}

}  // namespace

int main(int, char** argv) {
  std::map<std::string, void*> table;
#define JAXFP8_NOTHING(name, parameters) table[#name] = reinterpret_cast<void*>(&nothing);
  JAXFP8_DRIVER_ENTRY_POINTS(JAXFP8_NOTHING)
  table["cuDeviceGetAttribute"] = reinterpret_cast<void*>(&attribute);
  driver::set_image_directory({argv[1]});
  driver::install(table, nullptr);

  const std::vector<int64_t> x{4096, 7168}, scale{4096, 56}, lhs{1, 4096, 7168},
      lhs_scale{1, 4096, 56}, rhs{1, 2048, 7168}, rhs_scale{1, 16, 56}, out{1, 4096, 2048},
      m{4096, 7168}, group{32}, grouped_rhs{32, 2048, 7168}, grouped_scale{32, 16, 56},
      grouped_out{4096, 2048};
  const DType f8 = DType::kF8E4M3FN, f32 = DType::kFloat32, bf16 = DType::kBFloat16;

  Call rows;
  rows.target = &find_target("jaxfp8_quantize_rows_v1");
  rows.operands = {array(bf16, x, 1 << 20)};
  rows.results = {array(f8, x, 2 << 20), array(f32, scale, 3 << 20)};
  measure("quantize_rows", rows);

  Call gemm;
  gemm.target = &find_target("jaxfp8_gemm_1d2d_v1");
  gemm.operands = {array(f8, lhs, 1 << 20), array(f32, lhs_scale, 2 << 20), array(f8, rhs, 3 << 20),
                   array(f32, rhs_scale, 4 << 20)};
  gemm.results = {array(bf16, out, 5 << 20)};
  measure("gemm_1d2d", gemm);

  Call grouped;
  grouped.target = &find_target("jaxfp8_grouped_gemm_v1");
  grouped.operands = {array(f8, m, 1 << 20), array(f32, scale, 2 << 20),
                      array(f8, grouped_rhs, 3 << 20), array(f32, grouped_scale, 4 << 20),
                      array(DType::kInt32, group, 5 << 20)};
  grouped.results = {array(bf16, grouped_out, 6 << 20)};
  measure("grouped_gemm, 32 groups", grouped);
}
