// The lhs scales of a stage, common to every kind of scales.
#pragma once
#include <cstdint>

#include "../../ptx/copy.cuh"
#include "../../ptx/sync.cuh"

namespace jaxfp8 {

// The lhs scales of a stage: row r of the tile at float 16 (r / 16) + 2 (r % 8) + (r / 8) % 2, so
// that the two rows of a wgmma lane lie together. Rows past the operand's end get zero. A lane
// takes rows lane, lane + 32, ...: with constant distances both here and there, a copy is one
// instruction.
template <int kBlockM>
struct RowScales {
  const float* source;  // of this lane's first row
  int64_t stride;
  uint32_t target;
  int rows;  // from the lane's first on

  __device__ RowScales(const float* scale, int all_rows, int first_row, int k_block, int lane)
      : source(scale + int64_t{k_block} * all_rows + first_row + lane),
        stride(all_rows),
        target(4 * (lane / 16 * 16 + lane % 8 * 2 + lane / 8 % 2)),
        rows(all_rows - first_row - lane) {}

  // Into the stage at this shared address, then on to the next block.
  __device__ void load_next(uint32_t stage) {
#pragma unroll
    for (int i = 0; i < kBlockM; i += 32) {
      ptx::cp_async_4(stage + target + 4 * i, source + i, i < rows ? 4 : 0);
    }
    source += stride;
  }

  // The scales of rows `row` + lane / 4 and 8 further; `row` is a multiple of 16.
  __device__ static __forceinline__ float2 read(uint32_t stage, int row, int lane) {
    return ptx::load_shared_f2(stage + 4 * row + lane / 4 * 8);
  }
};

}  // namespace jaxfp8
