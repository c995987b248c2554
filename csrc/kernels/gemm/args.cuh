// What the warps of a GEMM kernel know of the launch.
#pragma once
#include "../../ptx/copy.cuh"
#include "args.h"

namespace jaxfp8 {

struct GemmArgs : GemmParams {
  const ptx::TensorMap* lhs_map;  // (lhs rows, K), box (LhsCopies, 128)
  const ptx::TensorMap* rhs_map;  // (rhs rows, K), box (kBlockN / cluster_m, 128)
  const ptx::TensorMap* out_map;  // (out rows, N), box (16, a strip's columns)
};

}  // namespace jaxfp8
