// Weights: w (G, M, K) in blocks of 128x128, one float32 scale each, scale (G, MB, KB) row-major.
// `quantize_blocks` writes the data as w lies; `quantize_weight` also its transpose (G, K, M), with
// the same scales, from the same read.
//
// A CTA takes one block, which stays in registers. Two barriers:
//   1. each warp's maximum is written  -> all compute the scale and quantize
//   2. the transposed tile is written  -> all store it
#include "quantize.cuh"

namespace jaxfp8::quantize {

template <class In, class Out, bool kTransposed>
__device__ void quantize_weight(const uint8_t* w, uint8_t* data, float* scale, uint8_t* transposed,
                                int64_t m, int64_t k, bool pow2) {
  constexpr int kRows = Tile<In>::kRows;
  constexpr int kElementBytes = sizeof(typename In::Bits);
  __shared__ uint32_t warp_amax[Tile<In>::kWarps];

  TileIndex tile(m, k);
  int64_t first_row = tile.row * kBlock, first_column = tile.column * kBlock;
  int rows = at_most_block(m - first_row), columns = at_most_block(k - first_column);
  int row = Tile<In>::row(), column = Tile<In>::column();
  int64_t corner = (tile.group * m + first_row) * k + first_column;
  int64_t offset = corner + row * k + column;

  Vector<In> v[kRows];
  load_rows(v, w + offset * kElementBytes, k * kElementBytes, rows - row, columns - column,
            row_alignment(w, k * kElementBytes));
  uint32_t amax[1] = {0};
#pragma unroll
  for (int i = 0; i < kRows; ++i) amax[0] = max(amax[0], v[i].amax());
  amax[0] = reduce_lanes<1, 32>(amax);
  if (threadIdx.x % 32 == 0) warp_amax[threadIdx.x / 32] = amax[0];
  __syncthreads();  // 1

#pragma unroll
  for (int i = 0; i < Tile<In>::kWarps; ++i) amax[0] = max(amax[0], warp_amax[i]);
  float block_scale = scale_of<Out>(In::f32_bits(amax[0]), pow2);
  float inverse = ptx::rcp_rn_f32(block_scale);
  if (threadIdx.x == 0) scale[blockIdx.x] = block_scale;

  int alignment = row_alignment(data, k);
#pragma unroll
  for (int i = 0; i < kRows; ++i) {
    if (row + i < rows) {
      store_row<Out>(data + offset + i * k, v[i], inverse, columns - column, alignment);
    }
  }
  if constexpr (kTransposed) {
    __shared__ TransposedTile<In> tile_bytes;
    uint32_t kept[kRows / 4];
#pragma unroll
    for (int i = 0; i < kRows / 4; ++i) kept[i] = 0xffffffffu;
#pragma unroll
    for (int j = 0; j < Tile<In>::kSize; ++j) tile_bytes.template put<Out>(v, j, inverse, kept);
    __syncthreads();  // 2
    tile_bytes.store(transposed + (tile.group * k + first_column) * m + first_row, m, columns, rows,
                     row_alignment(transposed, m));
  }
}

}  // namespace jaxfp8::quantize

#define JAXFP8_QUANTIZE_WEIGHT(in, In, out, Out)                                              \
  extern "C" __global__ void __launch_bounds__(256) quantize_blocks_##in##_##out(             \
      const uint8_t* x, uint8_t* data, float* scale, int64_t m, int64_t k, int32_t pow2) {    \
    using namespace jaxfp8::quantize;                                                         \
    quantize_weight<In, Out, false>(x, data, scale, nullptr, m, k, pow2 != 0);                \
  }                                                                                           \
  extern "C" __global__ void __launch_bounds__(256)                                           \
      quantize_weight_##in##_##out(const uint8_t* w, uint8_t* data, float* scale,             \
                                   uint8_t* transposed, int64_t m, int64_t k, int32_t pow2) { \
    using namespace jaxfp8::quantize;                                                         \
    quantize_weight<In, Out, true>(w, data, scale, transposed, m, k, pow2 != 0);              \
  }

JAXFP8_QUANTIZER_FORMATS(JAXFP8_QUANTIZE_WEIGHT)
