// Rows of x (S, K) gathered by source (M) and quantized, with group_sizes (G), to the transpose of
// the group-padded token axis (quantize_columns.cu): data (K, T), scale[tb * K + k]; and from the
// same read to rows, data (M, K), scale[kb * M + m].
//
// A CTA takes one 128x128 tile of the token axis, which stays in registers (quantize_tile.cuh has
// the barriers). BandedTile has the order of the tiles.
#include "gather.cuh"

namespace jaxfp8::moe {

// As many as their shared memory lets share a multiprocessor's registers without spilling.
template <class In>
constexpr int kCtasPerSm = Vector<In>::kSize == 8 ? 4 : 2;

template <class In, class Out>
__device__ void gather_quantize(const uint8_t* x, const int32_t* source, const int32_t* group_sizes,
                                const Outputs& out, int64_t g, int64_t s, int64_t m, int64_t k,
                                int32_t band, bool pow2) {
  constexpr int kElementBytes = sizeof(typename In::Bits);
  constexpr int kRows = Tile<In>::kRows;
  __shared__ SharedTile<In> shared;
  __shared__ TokenBlock found;
  int64_t t = (m + kBlock - 1) / kBlock * kBlock + kBlock * g;
  BandedTile tile(t, k, band);
  if (threadIdx.x < 32) find_token_block(group_sizes, g, m, tile.row, found);
  __syncthreads();  // `found` is written

  Region region = gathered_region(tile, found, out, m, k, t);
  if (region.rows == 0) {  // many tiles, when groups are small
    store_empty(region, row_alignment(out.column_data, t));
    return;
  }
  int row = Tile<In>::row(), column = Tile<In>::column();
  int64_t pitch = k * kElementBytes;
  Vector<In> v[kRows];
  load_gathered(v, x + (tile.column * kBlock + column) * kElementBytes, pitch,
                {source + found.row + row, region.rows - row, s}, region.columns - column,
                row_alignment(x, pitch));
  quantize_tile<In, Out, true>(v, region, out, pow2, shared);
}

}  // namespace jaxfp8::moe

#define JAXFP8_BOUNDS(In) __launch_bounds__(256, (jaxfp8::moe::kCtasPerSm<jaxfp8::quantize::In>))

#define JAXFP8_GATHER_QUANTIZE_BOTH(in, In, out, Out)                                            \
  extern "C" __global__ void JAXFP8_BOUNDS(In) gather_quantize_both_##in##_##out(                \
      const uint8_t* x, const int32_t* source, const int32_t* group_sizes, uint8_t* row_data,    \
      float* row_scale, uint8_t* column_data, float* column_scale, int64_t g, int64_t s,         \
      int64_t m, int64_t k, int32_t band, int32_t pow2) {                                        \
    using namespace jaxfp8::moe;                                                                 \
    gather_quantize<In, Out>(x, source, group_sizes,                                             \
                             {row_data, row_scale, column_data, column_scale}, g, s, m, k, band, \
                             pow2 != 0);                                                         \
  }

JAXFP8_QUANTIZER_FORMATS(JAXFP8_GATHER_QUANTIZE_BOTH)
