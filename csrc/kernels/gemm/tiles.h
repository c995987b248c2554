// The compiled tiles, once: kernels are made and named from these lists, and host/gemm.cc asserts
// that each of its configurations is one of them.
//
//   X(name, rows, columns, warpgroups side by side, accumulator sets, ...)
//
// A name has the rows, the columns of a warpgroup, and how many warpgroups lie side by side. What
// follows X is passed on.
#pragma once

// clang-format off
#define JAXFP8_BLOCK_SCALE_TILES(X, ...)      \
  X(m64n16, 64, 16, 1, 1, __VA_ARGS__)        \
  X(m64n32, 64, 32, 1, 1, __VA_ARGS__)        \
  X(m64n64, 64, 64, 1, 1, __VA_ARGS__)        \
  X(m64n128, 64, 128, 1, 1, __VA_ARGS__)      \
  X(m128n128, 128, 128, 1, 2, __VA_ARGS__)    \
  X(m128n192, 128, 192, 1, 1, __VA_ARGS__)    \
  X(m128n96x2, 128, 192, 2, 2, __VA_ARGS__)   \
  X(m256n128, 256, 128, 1, 1, __VA_ARGS__)

#define JAXFP8_OUTER_SCALE_TILES(X, ...)      \
  X(m64n64, 64, 64, 1, 1, __VA_ARGS__)        \
  X(m128n128, 128, 128, 1, 2, __VA_ARGS__)    \
  X(m128n192, 128, 192, 1, 1, __VA_ARGS__)    \
  X(m128n96x2, 128, 192, 2, 2, __VA_ARGS__)   \
  X(m256n128, 256, 128, 1, 1, __VA_ARGS__)
// clang-format on
