// Element types of the operands and results that kernels read and write.
#pragma once
#include <cstdint>

namespace jaxfp8 {

enum class DType { kF8E4M3FN, kF8E5M2, kBFloat16, kFloat16, kFloat32, kInt32 };

constexpr int64_t size_in_bytes(DType type) {
  switch (type) {
    case DType::kF8E4M3FN:
    case DType::kF8E5M2:
      return 1;
    case DType::kBFloat16:
    case DType::kFloat16:
      return 2;
    case DType::kFloat32:
    case DType::kInt32:
      return 4;
  }
  return 0;
}

constexpr const char* name(DType type) {
  switch (type) {
    case DType::kF8E4M3FN:
      return "f8e4m3fn";
    case DType::kF8E5M2:
      return "f8e5m2";
    case DType::kBFloat16:
      return "bf16";
    case DType::kFloat16:
      return "f16";
    case DType::kFloat32:
      return "f32";
    case DType::kInt32:
      return "s32";
  }
  return "?";
}

}  // namespace jaxfp8
