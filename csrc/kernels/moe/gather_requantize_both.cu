// FP8 rows by index, with group_sizes (G), to the transpose of the group-padded token axis
// (quantize_columns.cu): data (K, T) and scale[tb * K + k] are quantized from float32
// x * x_scale; and from the same read the rows as they are, data (M, K) and scale[kb * M + m]
// (gather_rows.cu).
//
// x (S, K) with scales x_scale[kb * S + s]. Under power-of-two scales a value keeps all its bits,
// unless it is tiny beside its column's largest: then it is rounded to the column's subnormals.
//
// A CTA takes one 128x128 tile of the token axis, its float32 values in registers
// (quantize_tile.cuh has the barriers). Two CTAs share a multiprocessor, so that one loads while
// the other computes.
#include "bytes.cuh"
#include "gather.cuh"

namespace jaxfp8::moe {

template <class Format>
struct Decoder;
template <>
struct Decoder<E4M3> {
  static __device__ uint32_t f16x2(uint16_t bytes) { return ptx::cvt_rn_f16x2_e4m3x2(bytes); }
};
template <>
struct Decoder<E5M2> {
  static __device__ uint32_t f16x2(uint16_t bytes) { return ptx::cvt_rn_f16x2_e5m2x2(bytes); }
};

// The float32 values of eight bytes of one row.
template <class Format>
__device__ Vector<F32x8> values(const Bytes<8>& bytes, float scale) {
  Vector<F32x8> v;
#pragma unroll
  for (int j = 0; j < 8; j += 2) {
    uint32_t pair =
        Decoder<Format>::f16x2(static_cast<uint16_t>(bytes.words[j / 4] >> (j % 4 * 8)));
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      float value = ptx::cvt_f32_f16(static_cast<uint16_t>(pair >> (16 * h)));
      v.words[j + h] = __float_as_uint(ptx::mul_rn_f32(value, scale));
    }
  }
  return v;
}

using In = F32x8;
using Source = SourceRows<Tile<In>::kRows, Vector<In>::kLanes>;

// Loads the thread's bytes of each of its rows.
template <int W>
__device__ void load_tile(Bytes<8> (&bytes)[Tile<In>::kRows], const uint8_t* x, int64_t k,
                          const Source& source, int columns) {
#pragma unroll
  for (int i = 0; i < Tile<In>::kRows; ++i) {
    int32_t row = source[i];
    bytes[i] = load_bytes<8, W>(x + row * k, row < 0 ? 0 : columns);
  }
}

template <class Format>
__device__ void gather_requantize(const uint8_t* x, const float* x_scale,
                                  const int32_t* source_rows, const int32_t* group_sizes,
                                  const Outputs& out, int64_t g, int64_t s, int64_t m, int64_t k,
                                  int32_t band, bool pow2) {
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
  int rows = region.rows - row, columns = region.columns - column;
  Source source(source_rows + found.row + row, rows, s);
  float scale = 1.0f;  // of row Source::lane()
  if (source.own >= 0) scale = __ldg(x_scale + tile.column * s + source.own);

  Bytes<8> bytes[kRows];
  const uint8_t* from = x + tile.column * kBlock + column;
  int alignment = row_alignment(x, k);
  if (alignment >= 8) {
    load_tile<8>(bytes, from, k, source, columns);
  } else if (alignment >= 4) {
    load_tile<4>(bytes, from, k, source, columns);
  } else {
    load_tile<1>(bytes, from, k, source, columns);
  }
  alignment = row_alignment(out.row_data, k);
#pragma unroll
  for (int i = 0; i < kRows; ++i) {
    if (i < rows) {
      store_bytes(region.out.row_data + (row + i) * k + column, bytes[i], columns, alignment);
    }
  }
  const int lane = threadIdx.x % Vector<In>::kLanes;  // signed, as `rows` may be negative
  if (lane < min(rows, kRows)) region.out.row_scale[row + lane] = scale;
  Vector<In> v[kRows];
#pragma unroll
  for (int i = 0; i < kRows; ++i) {
    v[i] = values<Format>(bytes[i], __shfl_sync(kFullWarp, scale, i, Vector<In>::kLanes));
  }
  quantize_tile<In, Format, false>(v, region, out, pow2, shared);
}

}  // namespace jaxfp8::moe

#define JAXFP8_GATHER_REQUANTIZE_BOTH(format, Format)                                             \
  extern "C" __global__ void __launch_bounds__(256, 2) gather_requantize_both_##format(           \
      const uint8_t* x, const float* x_scale, const int32_t* source, const int32_t* group_sizes,  \
      uint8_t* row_data, float* row_scale, uint8_t* column_data, float* column_scale, int64_t g,  \
      int64_t s, int64_t m, int64_t k, int32_t band, int32_t pow2) {                              \
    using namespace jaxfp8::moe;                                                                  \
    gather_requantize<Format>(x, x_scale, source, group_sizes,                                    \
                              {row_data, row_scale, column_data, column_scale}, g, s, m, k, band, \
                              pow2 != 0);                                                         \
  }

JAXFP8_GATHER_REQUANTIZE_BOTH(e4m3, E4M3)
JAXFP8_GATHER_REQUANTIZE_BOTH(e5m2, E5M2)
