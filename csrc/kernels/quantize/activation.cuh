// Activations fused with quantization: x (G, M, A, F), gate and up side by side where A is 2, to
// y = a(gate) * up (A = 2) or y = a(x) (A = 1) in FP8, and the gradient of x from x and that of y.
// The activation is computed in float32 and never stored: what is quantized is the float32 value.
//
//   a(x) = x s,  s = 1 / (1 + exp(-z)),  z = x (linear + cubic min(x^2, 10^4))
//   silu: linear 1, cubic 0.
//   gelu: x / 2 (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))) is the same with linear 2 sqrt(2 / pi),
//         cubic 0.044715 linear (arXiv 1606.08415, section 2; tanh(u) = 2 / (1 + exp(-2 u)) - 1).
//
// Beyond |x| = 100 the logistic function is 0 or 1, so the minimum changes nothing but keeps every
// factor finite. Functions here are single instructions of csrc/ptx in a fixed order, so that no
// compiler contracts them otherwise.
#pragma once
#include <type_traits>

#include "quantize_tile.cuh"

namespace jaxfp8::activation {

using namespace quantize;

// The float32 values of an input's vector.
template <class In>
using Value = std::conditional_t<Vector<In>::kSize == 8, F32x8, F32>;

struct Activation {
  float linear, cubic;

  __device__ explicit Activation(int32_t index)  // csrc/host/activation.h numbers them
      : linear(index == 0 ? 1.0f : 1.5957691216f), cubic(index == 0 ? 0.0f : 0.07135481627f) {}

  struct Point {
    float x, square, s;
  };
  __device__ Point at(float x) const {
    constexpr float kMinusLog2E = -1.4426950409f;
    float square = ptx::min_f32(ptx::mul_rn_f32(x, x), 1e4f);
    float z = ptx::mul_rn_f32(x, ptx::fma_rn_f32(cubic, square, linear));
    float e = ptx::ex2_approx_ftz_f32(ptx::mul_rn_f32(z, kMinusLog2E));
    return {x, square, ptx::rcp_approx_ftz_f32(ptx::add_rn_f32(1.0f, e))};
  }
  static __device__ float value(const Point& p) { return ptx::mul_rn_f32(p.x, p.s); }
  // s + x s (1 - s) z'(x), in an order in which a saturated s makes the second term zero.
  __device__ float slope(const Point& p) const {
    float tail = ptx::mul_rn_f32(p.s, ptx::add_rn_f32(1.0f, -p.s));
    float z_slope = ptx::fma_rn_f32(3.0f * cubic, p.square, linear);
    return ptx::fma_rn_f32(ptx::mul_rn_f32(p.x, tail), z_slope, p.s);
  }
};

// A factor for each of R neighbouring rows, which `kLanes` neighbouring lanes share: each lane
// loads one, and lanes of the warp ask one another. Without weights (null) it is not used.
template <int R, int kLanes>
struct RowWeights {
  static_assert(R <= kLanes);
  float own = 1.0f;  // of row threadIdx.x % R

  RowWeights() = default;
  // `rows` of them exist from `weight` on.
  __device__ RowWeights(const float* weight, int rows) {
    int lane = threadIdx.x % R;
    if (lane < rows) own = __ldg(weight + lane);
  }
  __device__ float operator[](int i) const { return __shfl_sync(kFullWarp, own, i, kLanes); }
};

// Loads vectors from R rows of x (rows of A * F elements) and computes their activation, times the
// row's weight with kWeighted. Rows are taken `kAtOnce` at a time: all their loads are issued
// before the first use.
template <class In, bool kGated, bool kWeighted = false, int R>
__device__ void load_activations(Vector<Value<In>> (&v)[R], const uint8_t* source, int64_t f,
                                 int rows, int columns, int alignment, const Activation& activation,
                                 const RowWeights<R, Vector<In>::kLanes>& weights = {}) {
  constexpr int kAtOnce = 8;
  static_assert(R % kAtOnce == 0);
  int64_t half = f * sizeof(typename In::Bits), pitch = kGated ? 2 * half : half;
#pragma unroll
  for (int r = 0; r < R; r += kAtOnce) {
    Vector<In> gate[kAtOnce], up[kAtOnce];
    load_rows(gate, source + r * pitch, pitch, rows - r, columns, alignment);
    if constexpr (kGated) {
      load_rows(up, source + r * pitch + half, pitch, rows - r, columns, alignment);
    }
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      float weight = 1.0f;
      if constexpr (kWeighted) weight = weights[r + i];
#pragma unroll
      for (int j = 0; j < Vector<In>::kSize; ++j) {
        float y = Activation::value(activation.at(gate[i].element(j)));
        if constexpr (kGated) y = ptx::mul_rn_f32(y, up[i].element(j));
        if constexpr (kWeighted) y = ptx::mul_rn_f32(y, weight);
        v[r + i].words[j] = __float_as_uint(y);
      }
    }
  }
}

// Rows only, by warps that share nothing: each takes 8 rows of 256 columns of F (128 for float32),
// as in quantize_rows.cu. `weight` (M) with kWeighted.
template <class In, class Out, bool kGated, bool kWeighted = false>
__device__ void activation_rows(const uint8_t* x, uint8_t* data, float* scale, int64_t m, int64_t f,
                                const Activation& activation, bool pow2,
                                const float* weight = nullptr) {
  constexpr int kRows = 8;
  constexpr int kColumns = 32 * Vector<In>::kSize;

  int lane = threadIdx.x % 32;
  uint32_t tile = blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32;
  uint32_t tiles_per_row = static_cast<uint32_t>((f + kColumns - 1) / kColumns);
  int64_t row = static_cast<int64_t>(tile / tiles_per_row) * kRows;
  int64_t column = static_cast<int64_t>(tile % tiles_per_row) * kColumns + lane * Vector<In>::kSize;
  if (row >= m) return;  // the whole warp

  int rows = static_cast<int>(min(static_cast<int64_t>(kRows), m - row));
  int columns = static_cast<int>(min(static_cast<int64_t>(Vector<In>::kSize), f - column));
  int64_t half = f * sizeof(typename In::Bits);
  RowWeights<kRows, Vector<In>::kLanes> weights;
  if constexpr (kWeighted) weights = {weight + row, rows};
  Vector<Value<In>> v[kRows];
  load_activations<In, kGated, kWeighted>(
      v, x + row * (kGated ? 2 : 1) * half + column * sizeof(typename In::Bits), f, rows, columns,
      row_alignment(x, half), activation, weights);
  store_row_blocks<Value<In>, Out>(v, data, scale, row, column, m, f, pow2);
}

// A tile's values in shared memory, each thread's own: no barrier, no bank conflict.
template <class In>
struct ParkedTile {
  static constexpr int kRows = Tile<In>::kRows;
  static constexpr int kQuads = Vector<Value<In>>::kWords / 4;
  uint4 quads[kRows * kQuads][Tile<In>::kThreads];

  __device__ void put(int row, const Vector<Value<In>>& v) {
#pragma unroll
    for (int q = 0; q < kQuads; ++q) {
      quads[row * kQuads + q][threadIdx.x] =
          make_uint4(v.words[4 * q], v.words[4 * q + 1], v.words[4 * q + 2], v.words[4 * q + 3]);
    }
  }
  __device__ void get(Vector<Value<In>> (&v)[kRows]) const {
#pragma unroll
    for (int i = 0; i < kRows * kQuads; ++i) {
      uint4 u = quads[i][threadIdx.x];
      uint32_t* words = v[i / kQuads].words + i % kQuads * 4;
      words[0] = u.x, words[1] = u.y, words[2] = u.z, words[3] = u.w;
    }
  }
};

// Stores the sums of each of two rows' values over the kLanes lanes that share the rows, those of
// `rows` that exist, in a fixed order: at first each half of the lanes takes one row.
template <int kLanes>
__device__ void store_row_sums(float first, float second, float* target, int rows) {
  bool upper = threadIdx.x & (kLanes / 2);
  float kept = upper ? second : first, sent = upper ? first : second;
  float sum = ptx::add_rn_f32(kept, __shfl_xor_sync(kFullWarp, sent, kLanes / 2));
#pragma unroll
  for (int distance = kLanes / 4; distance > 0; distance /= 2) {
    sum = ptx::add_rn_f32(sum, __shfl_xor_sync(kFullWarp, sum, distance));
  }
  if (threadIdx.x % (kLanes / 2) == 0 && upper < rows) target[upper] = sum;
}

// CTAs of a gradient's kernel that share a multiprocessor: the 16 rows a thread of float32 inputs
// with gates do not fit into half of the registers.
template <class In, bool kGated>
constexpr int kGradientCtasPerSm = kGated && Vector<In>::kSize == 4 ? 1 : 2;

// Loads a thread's part of a tile of x and of dy (rows of F elements) and computes the gradient of
// x: v gets that of the gate (or of x), `parked` that of up. With kWeighted dy is of the weighted
// activation, and weight_gradient, a place for each row, gets the sum of dy times the activation.
template <class In, bool kGated, bool kWeighted>
__device__ void load_gradients(Vector<Value<In>> (&v)[Tile<In>::kRows], ParkedTile<In>* parked,
                               const uint8_t* x, const uint8_t* dy, int64_t f, int rows,
                               int columns, int x_alignment, int dy_alignment,
                               const Activation& activation,
                               const RowWeights<Tile<In>::kRows, Vector<In>::kLanes>& weights,
                               float* weight_gradient) {
  constexpr int kAtOnce = 2;
  int64_t half = f * sizeof(typename In::Bits), pitch = kGated ? 2 * half : half;
#pragma unroll
  for (int r = 0; r < Tile<In>::kRows; r += kAtOnce) {
    Vector<In> gate[kAtOnce], up[kAtOnce], cotangent[kAtOnce];
    load_rows(gate, x + r * pitch, pitch, rows - r, columns, x_alignment);
    if constexpr (kGated) {
      load_rows(up, x + r * pitch + half, pitch, rows - r, columns, x_alignment);
    }
    load_rows(cotangent, dy + r * half, half, rows - r, columns, dy_alignment);
    float products[kAtOnce] = {};
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      Vector<Value<In>> up_gradient;
      float weight = 1.0f;
      if constexpr (kWeighted) weight = weights[r + i];
#pragma unroll
      for (int j = 0; j < Vector<In>::kSize; ++j) {
        float c = cotangent[i].element(j);
        Activation::Point point = activation.at(gate[i].element(j));
        if constexpr (kWeighted) {
          float y = Activation::value(point);
          if constexpr (kGated) y = ptx::mul_rn_f32(y, up[i].element(j));
          products[i] = ptx::fma_rn_f32(c, y, products[i]);
          c = ptx::mul_rn_f32(c, weight);
        }
        if constexpr (kGated) {
          up_gradient.words[j] = __float_as_uint(ptx::mul_rn_f32(c, Activation::value(point)));
          c = ptx::mul_rn_f32(c, up[i].element(j));
        }
        v[r + i].words[j] = __float_as_uint(ptx::mul_rn_f32(c, activation.slope(point)));
      }
      if constexpr (kGated) parked->put(r + i, up_gradient);
    }
    if constexpr (kWeighted) {
      store_row_sums<Vector<In>::kLanes>(products[0], products[1], weight_gradient + r, rows - r);
    }
  }
}

// The factor of each row (M) and the place of its gradient (M, FB), of which each block of F has
// its part: gradient[fb * M + m]. Null: none.
struct WeightArrays {
  const float* weight = nullptr;
  float* gradient = nullptr;
};

// One tile of F, of y or, with `kGradient`, of both halves of the gradient of x. Without
// group_sizes the tokens are the M rows of each of G matrices; with them G is the number of groups
// of the one matrix, and the token axis is group-padded.
template <class In, class Out, bool kGated, bool kGradient, bool kWeighted = false>
__device__ void quantize_activation(const uint8_t* x, const uint8_t* dy, const int32_t* group_sizes,
                                    const Outputs& out, int64_t g, int64_t m, int64_t f,
                                    const Activation& activation, bool pow2, void* dynamic_shared,
                                    const WeightArrays& weighted = {}) {
  constexpr int kElementBytes = sizeof(typename In::Bits);
  constexpr int kHalves = kGated ? 2 : 1;                // of x
  constexpr int kResults = kGated && kGradient ? 2 : 1;  // halves of the results
  using V = Value<In>;
  __shared__ SharedTile<V> shared;
  __shared__ TokenBlock found;

  bool ragged = group_sizes != nullptr;
  int64_t matrices = ragged ? 1 : g;
  int64_t t = ragged ? (m + kBlock - 1) / kBlock * kBlock + kBlock * g : m;
  TileIndex tile(t, f);
  TokenBlock source;
  if (ragged) {
    if (threadIdx.x < 32) find_token_block(group_sizes, g, m, tile.row, found);
    __syncthreads();  // `found` is written
    source = found;
  } else {
    source.row = tile.row * kBlock;
    source.rows = source.tokens = at_most_block(m - source.row);
  }

  int64_t row = tile.group * m + source.row, column = tile.column * kBlock;
  int64_t column_blocks = (f + kBlock - 1) / kBlock;
  Region region;
  region.rows = source.rows;
  region.columns = at_most_block(f - column);
  region.row_pitch = kResults * f;
  region.tokens = source.tokens;
  region.stored_tokens = ragged ? kBlock : source.rows;
  region.column_pitch = t;

  Vector<V> v[Tile<In>::kRows];
  auto* parked = static_cast<ParkedTile<In>*>(dynamic_shared);
  bool empty = source.rows == 0;  // many tiles, when groups are small
  if (!empty) {
    int64_t half = f * kElementBytes;
    int tile_row = Tile<In>::row(), tile_column = Tile<In>::column();
    int64_t first = row + tile_row, offset = (column + tile_column) * kElementBytes;
    const uint8_t* corner = x + first * kHalves * half + offset;
    int rows = region.rows - tile_row, columns = region.columns - tile_column;
    int alignment = row_alignment(x, half);
    RowWeights<Tile<In>::kRows, Vector<In>::kLanes> weights;
    if constexpr (kWeighted) weights = {weighted.weight + first, rows};
    if constexpr (kGradient) {
      load_gradients<In, kGated, kWeighted>(v, parked, corner, dy + first * half + offset, f, rows,
                                            columns, alignment, row_alignment(dy, half), activation,
                                            weights, weighted.gradient + tile.column * m + first);
    } else {
      load_activations<In, kGated, kWeighted>(v, corner, f, rows, columns, alignment, activation,
                                              weights);
    }
  }
#pragma unroll 1
  for (int h = 0; h < kResults; ++h) {
    // Else every row's offset would be computed before the loop, and held in registers.
    region.row_pitch = ptx::opaque(region.row_pitch);
    region.column_pitch = ptx::opaque(region.column_pitch);
    Outputs arrays = out;
    arrays.row_data += h * f;
    int64_t matrix = tile.group * kResults + h;
    region.out.row_data = arrays.row_data + row * kResults * f + column;
    region.out.row_scale = out.row_scale + (h * column_blocks + tile.column) * matrices * m + row;
    region.out.column_data = out.column_data + (matrix * f + column) * t + tile.row * kBlock;
    region.out.column_scale =
        out.column_scale + (tile.row * matrices * kResults + matrix) * f + column;
    if (empty) {
      store_empty(region, row_alignment(out.column_data, t));
      continue;
    }
    if (h > 0) parked->get(v);
    quantize_tile<V, Out, true>(v, region, arrays, pow2, shared);
  }
}

}  // namespace jaxfp8::activation
