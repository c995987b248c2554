// The parameters of every GEMM kernel, after its three tensor maps: one struct, which
// csrc/host/gemm.cc fills by name. No device code.
#pragma once
#include <cstdint>

#include "layout.h"

namespace jaxfp8 {

struct GemmParams {
  // Addresses come first: plan.h, ParamBlock.
  const float* lhs_scale;      // (K blocks, lhs rows)
  const float* rhs_scale;      // 1d2d: (groups, N blocks, K blocks); 1d1d: (K blocks, rhs rows)
  const int32_t* group_sizes;  // (groups), or null
  void* out;
  int32_t mode;
  int32_t m;               // of the output: (groups, m, n), grouped (m, n)
  int32_t n;               //
  int32_t groups;          //
  int32_t k_blocks;        // of the operands, the last one maybe short
  int32_t lhs_rows;        // of all groups together
  int32_t rhs_rows;        // of all groups together
  int32_t lhs_group_rows;  // from one group's lhs to the next; 0: all share one
  int32_t rhs_group_rows;
  int32_t cluster_m;  // CTAs of a cluster along M
  int32_t cluster_n;  // and N
  int32_t band;       // tiles (of a cluster) along N that are walked together
  int32_t flags;
};

}  // namespace jaxfp8
