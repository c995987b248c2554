// Sums of rows by index: out (S, K), out[s] = sum over j of weight[s, j] * rows[position[s, j]],
// j below J. A position below 0 adds nothing; one that is not a row of rows (M, K) makes the whole
// row NaN. Without weights (null) the rows are added as they are.
//
// The order is fixed: float32, from +0 on, by j; a weighted row is added by one fma. A warp takes
// 256 columns (128 of float32 rows) of one row of the result and shares nothing.
#include "gather.cuh"

namespace jaxfp8::moe {

constexpr int kAtOnce = 8;  // rows whose loads are issued before the first is added

// Stores N sums as float32 or bfloat16, those before `valid`; by 16 bytes, or the 8 that four
// bfloat16 are, where `alignment`, that of every row, allows it.
template <int N>
__device__ void store_sums(float* target, const float (&sum)[N], int valid, int alignment) {
  if (alignment == 16) {
    if (valid <= 0) return;
#pragma unroll
    for (int i = 0; i < N; i += 4) {
      if (i < valid) {
        reinterpret_cast<float4*>(target)[i / 4] =
            make_float4(sum[i], sum[i + 1], sum[i + 2], sum[i + 3]);
      }
    }
  } else {
#pragma unroll
    for (int i = 0; i < N; ++i) {
      if (i < valid) target[i] = sum[i];
    }
  }
}

template <int N>
__device__ void store_sums(uint16_t* target, const float (&sum)[N], int valid, int alignment) {
  uint32_t words[N / 2];
#pragma unroll
  for (int i = 0; i < N / 2; ++i) words[i] = ptx::cvt_rn_bf16x2_f32(sum[2 * i + 1], sum[2 * i]);
  if (alignment >= 2 * N) {
    if (valid <= 0) return;
    if constexpr (N == 8) {
      *reinterpret_cast<uint4*>(target) = make_uint4(words[0], words[1], words[2], words[3]);
    } else {
      *reinterpret_cast<uint2*>(target) = make_uint2(words[0], words[1]);
    }
  } else if (alignment >= 4) {
#pragma unroll
    for (int i = 0; i < N / 2; ++i) {
      if (2 * i < valid) reinterpret_cast<uint32_t*>(target)[i] = words[i];
    }
  } else {
#pragma unroll
    for (int i = 0; i < N; ++i) {
      if (i < valid) target[i] = static_cast<uint16_t>(words[i / 2] >> (i % 2 * 16));
    }
  }
}

template <class In, class Out>
__device__ void sum_rows(const uint8_t* rows, const int32_t* position, const float* weight,
                         Out* out, int64_t s, int64_t j, int64_t m, int64_t k) {
  constexpr int kSize = Vector<In>::kSize;
  constexpr int kColumns = 32 * kSize;
  constexpr int kElementBytes = sizeof(typename In::Bits);

  int lane = threadIdx.x % 32;
  uint32_t tile = blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32;
  uint32_t tiles_per_row = static_cast<uint32_t>((k + kColumns - 1) / kColumns);
  int64_t row = tile / tiles_per_row;
  int64_t column = static_cast<int64_t>(tile % tiles_per_row) * kColumns + lane * kSize;
  if (row >= s) return;  // the whole warp

  int columns = static_cast<int>(min(static_cast<int64_t>(kSize), k - column));
  int alignment = row_alignment(rows, k * kElementBytes);
  const uint8_t* from = rows + column * kElementBytes;
  float sum[kSize] = {};
  bool lost = false;
  for (int64_t first = 0; first < j; first += kAtOnce) {
    const int64_t here = row * j + first;
    int choices = static_cast<int>(min(static_cast<int64_t>(kAtOnce), j - first));
    SourceRows<kAtOnce, Vector<In>::kLanes> source(position + here, choices, m);
    lost |= source.past;
    float own_weight = 1.0f;
    if (weight != nullptr && source.lane() < choices) {
      own_weight = __ldg(weight + here + source.lane());
    }
    Vector<In> v[kAtOnce];
    load_gathered(v, from, k * kElementBytes, source, columns, alignment);
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      float factor = __shfl_sync(kFullWarp, own_weight, i);
      if (source[i] < 0) continue;  // the whole warp
#pragma unroll
      for (int c = 0; c < kSize; ++c) {
        float x = v[i].element(c);
        sum[c] =
            weight == nullptr ? ptx::add_rn_f32(sum[c], x) : ptx::fma_rn_f32(factor, x, sum[c]);
      }
    }
  }
  if (__any_sync(kFullWarp, lost)) {
#pragma unroll
    for (int c = 0; c < kSize; ++c) sum[c] = __uint_as_float(0x7fc00000u);
  }
  store_sums(out + row * k + column, sum, columns, row_alignment(out, k * sizeof(Out)));
}

}  // namespace jaxfp8::moe

#define JAXFP8_SUM_ROWS(in, In, out_, Out)                                                      \
  extern "C" __global__ void __launch_bounds__(256)                                             \
      sum_rows_##in##_##out_(const uint8_t* rows, const int32_t* position, const float* weight, \
                             Out* out, int64_t s, int64_t j, int64_t m, int64_t k) {            \
    using namespace jaxfp8::moe;                                                                \
    sum_rows<In, Out>(rows, position, weight, out, s, j, m, k);                                 \
  }

JAXFP8_SUM_ROWS(bf16, BF16, bf16, uint16_t)
JAXFP8_SUM_ROWS(bf16, BF16, f32, float)
JAXFP8_SUM_ROWS(f32, F32, bf16, uint16_t)
JAXFP8_SUM_ROWS(f32, F32, f32, float)
