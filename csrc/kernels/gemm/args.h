// The parameters of every GEMM kernel, in the order in which csrc/host/gemm.cc passes them.
#pragma once
#include <cstdint>

#include "../../ptx/copy.cuh"
#include "layout.h"

namespace jaxfp8 {

struct GemmArgs {
  const ptx::TensorMap* lhs_map;  // (lhs rows, K), box (LhsCopies, 128)
  const ptx::TensorMap* rhs_map;  // (rhs rows, K), box (kBlockN / cluster_m, 128)
  const ptx::TensorMap* out_map;  // (out rows, N), box (16, a strip's columns)
  const float* lhs_scale;         // (K blocks, lhs rows)
  const float* rhs_scale;         // 1d2d: (groups, N blocks, K blocks); 1d1d: (K blocks, rhs rows)
  const int32_t* group_sizes;     // (groups), or null
  void* out;
  int32_t mode;
  int32_t m, n, groups;    // of the output: (groups, m, n), grouped (m, n)
  int32_t k_blocks;        // of the operands, the last one maybe short
  int32_t lhs_rows;        // of all groups together
  int32_t rhs_rows;        // of all groups together
  int32_t lhs_group_rows;  // from one group's lhs to the next; 0: all share one
  int32_t rhs_group_rows;
  int32_t cluster_m, cluster_n;  // CTAs of a cluster along M and N
  int32_t band;                  // tiles (of a cluster) along N that are walked together
  int32_t flags;
};

}  // namespace jaxfp8
