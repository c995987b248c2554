"""The programs in the artifacts, and their arguments: what a later build must compute from an old file."""

import jax
import jax.numpy as jnp
import numpy as np

import jaxfp8
from jaxfp8.kernels.quantize import quantize_columns_leaf, quantize_ragged_columns_leaf

E4M3 = np.dtype(jnp.float8_e4m3fn)
SIZES = np.array([40, 0, 23], np.int32)


def normal(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


def _train(f, x, w, dy):
    y, pull = jax.vjp(f, x, w)
    return y, *pull(dy)


def train(x, w, experts, dy):
    """Forward and backward of linear and ragged_dot."""
    dense = _train(jaxfp8.linear, x, w, dy)
    ragged = _train(lambda x, e: jaxfp8.ragged_dot(x, e, SIZES), x, experts, dy)
    return *dense, *ragged


def train_arguments():
    return normal(0, 70, 136), normal(1, 136, 72), normal(2, 3, 136, 72), normal(3, 70, 72)


def _bits(arrays):
    data, scale = arrays
    return jax.lax.bitcast_convert_type(data, jnp.uint8), scale


def every_target(x, w, experts, accum):
    """Every custom call that a program can hold: products, stored and accumulated, and quantizers."""
    rows, columns = jaxfp8.quantize_both(x)
    _, ragged = jaxfp8.quantize_both(x, group_sizes=SIZES)
    nt, _ = jaxfp8.quantize_weight(w)
    groups, _ = jaxfp8.quantize_weight(experts)
    batch = jaxfp8.quantize(jnp.stack([x] * 3))
    square = jaxfp8.quantize(x, (128, 128))
    f32 = {"out_dtype": jnp.float32}
    grouped = jaxfp8.grouped_wgrad_gemm(ragged, ragged, SIZES)
    return (
        jaxfp8.gemm(jaxfp8.quantize(x), nt, accum=accum),
        jaxfp8.gemm(rows, nt, **f32),
        jaxfp8.gemm(rows, square, **f32),
        jaxfp8.wgrad_gemm(columns, columns),
        jaxfp8.wgrad_gemm(columns, columns, accum=x[:1].T * x[:1]),
        jaxfp8.grouped_gemm(rows, groups, SIZES, **f32),
        jaxfp8.masked_grouped_gemm(batch, groups, SIZES, **f32),
        grouped,
        jaxfp8.grouped_wgrad_gemm(ragged, ragged, SIZES, accum=grouped),
        *_bits(quantize_columns_leaf(x[None], dtype=E4M3, pow2=True)),
        *_bits(quantize_ragged_columns_leaf(x, SIZES, dtype=E4M3, pow2=False)),
    )


def every_target_arguments():
    return normal(0, 70, 136), normal(1, 136, 72), normal(2, 3, 136, 72), normal(3, 70, 72)


def quantized_array():
    """A QuantizedArray of a fixed ramp: what the files of saved arrays hold."""
    x = np.linspace(-3, 5, 5 * 200, dtype=np.float32).reshape(5, 200)
    return {
        "rows": jaxfp8.quantize(x),
        "square": jaxfp8.quantize(x, (128, 128), scale_format="pow2"),
    }
