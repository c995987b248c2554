"""Quantization to FP8 with one scale per 1x128 or 128x128 block.

The arithmetic is fixed to the bit (docs/architecture.md, "Quantization, exactly"): the CUDA kernels, the operations
below and NumPy agree.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .. import _ffi
from .._arrays import checks
from .._arrays.blocks import BLOCK, ROW, SQUARE, ceil_blocks, quantize_blocks
from .._arrays.quantized_array import QuantizedArray
from .._arrays.recipe import Format, Recipe, current_recipe, fp8_dtype, scale_format_name
from .._primitives.call import Call, arrange
from .._primitives.leaf import Leaf, once, timed_call
from .._primitives.mesh import call_types, is_explicit
from .._primitives.sharded_operation import ShardedOperation
from ._mapped import mapped
from .agreed import agreed_quantizer
from .named import ROW_SCALE, Named, named, scale_dims_of
from .tokens import cuts_blocks, order_tokens, ragged_dims, reference_ragged_columns


def _reference_rows(x, *, dtype, pow2):
    return list(quantize_blocks(x, ROW, dtype, pow2))


def _reference_columns(x, *, dtype, pow2):
    return list(quantize_blocks(jnp.swapaxes(x, -1, -2), ROW, dtype, pow2))


def _reference_both(x, *, dtype, pow2):
    return _reference_rows(x, dtype=dtype, pow2=pow2) + _reference_columns(
        x, dtype=dtype, pow2=pow2
    )


def _reference_blocks(x, *, dtype, pow2):
    return list(quantize_blocks(x, SQUARE, dtype, pow2))


def _reference_weight(w, *, dtype, pow2):
    data, scale = quantize_blocks(w, SQUARE, dtype, pow2)
    return [data, scale, jnp.swapaxes(data, -1, -2)]


def _reference_ragged_both(x, sizes, *, dtype, pow2):
    rows = _reference_rows(x, dtype=dtype, pow2=pow2)
    return rows + reference_ragged_columns(x, sizes, dtype=dtype, pow2=pow2)


def _quantizer(name, reference, row_scales):
    """The leaf of a quantizer; `row_scales`: positions of results with M-major scales."""

    def custom_call(*arrays, dtype, pow2):
        def run(*arrays):
            return reference(*arrays, dtype=dtype, pow2=pow2)

        results = jax.eval_shape(run, *arrays)
        if any(0 in v.shape for v in (*arrays, *results)):
            return run(*arrays)
        layouts = [
            ROW_SCALE[v.ndim] if i in row_scales else tuple(range(v.ndim))
            for i, v in enumerate(results)
        ]
        call = timed_call(_ffi.target(name), call_types(results, arrays), output_layouts=layouts)
        return call(*arrays, pow2=np.bool_(pow2))

    return Leaf(f"jaxfp8_{name}_leaf", reference, custom_call)


quantize_rows_leaf = _quantizer("quantize_rows", _reference_rows, (1,))
quantize_columns_leaf = _quantizer("quantize_columns", _reference_columns, (1,))
quantize_both_leaf = _quantizer("quantize_both", _reference_both, (1, 3))
quantize_blocks_leaf = _quantizer("quantize_blocks", _reference_blocks, ())
quantize_weight_leaf = _quantizer("quantize_weight", _reference_weight, ())
quantize_ragged_columns_leaf = _quantizer("quantize_ragged_columns", reference_ragged_columns, (1,))
quantize_ragged_both_leaf = _quantizer("quantize_ragged_both", _reference_ragged_both, (1, 3))


# --------------------------------------------------------------------------------------------------
# Kernels: any rank, named dimensions
# --------------------------------------------------------------------------------------------------


def _rows_local(x, *, call):
    flat = x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
    data, scale = quantize_rows_leaf(flat, **dict(call.attributes))
    return [data.reshape(x.shape), scale.reshape(*x.shape[:-1], ceil_blocks(x.shape[-1]))]


def _token_groups(call, out):
    """Batch and token names of a column quantizer: column data is (batch, k, tokens)."""
    k = call.ins[0][-1]
    return out[: out.index(k)], out[out.index(k) + 1 :], k


def _columns_local(x, *, call):
    """(batch, tokens, k) -> (batch, k, tokens). Several token dimensions only if the last one is of whole blocks."""
    out = call.outs[0]
    batch, tokens, k = _token_groups(call, out)
    x3 = arrange(x, call.ins[0], [batch, tokens, (k,)])
    data, scale = quantize_columns_leaf(x3, **dict(call.attributes))
    return _unfold_columns(data, scale, out, call.sizes([x]))


def _unfold_columns(data, scale, out, sizes):
    shape = [sizes[n] for n in out]
    return [data.reshape(shape), scale.reshape(*shape[:-1], ceil_blocks(shape[-1]))]


def _both_local(x, *, call):
    rows, _, out, _ = call.outs
    batch, tokens, k = _token_groups(call, out)
    if rows != batch + tokens + (k,):
        raise AssertionError(f"quantize_both: rows are {rows}, not {batch + tokens + (k,)}")
    x3 = arrange(x, call.ins[0], [batch, tokens, (k,)])
    row, row_scale, column, column_scale = quantize_both_leaf(x3, **dict(call.attributes))
    sizes = call.sizes([x])
    shape = [sizes[n] for n in rows]
    row_scale = row_scale.reshape(*shape[:-1], ceil_blocks(shape[-1]))
    return [row.reshape(shape), row_scale, *_unfold_columns(column, column_scale, out, sizes)]


def _fold_batch(x):
    return x.reshape(math.prod(x.shape[:-2]), *x.shape[-2:])


def _blocks_local(x, *, call):
    *lead, m, k = x.shape
    data, scale = quantize_blocks_leaf(_fold_batch(x), **dict(call.attributes))
    return [data.reshape(x.shape), scale.reshape(*lead, ceil_blocks(m), ceil_blocks(k))]


def _weight_local(w, *, call):
    *lead, k, n = w.shape
    nn, scale, nt = quantize_weight_leaf(_fold_batch(w), **dict(call.attributes))
    scale = once(scale).reshape(*lead, ceil_blocks(k), ceil_blocks(n))  # of both orientations
    return [nn.reshape(w.shape), scale, nt.reshape(*lead, n, k), jnp.swapaxes(scale, -1, -2)]


def _leaf_local(leaf):
    return lambda *arrays, call: leaf(*arrays, **dict(call.attributes))


rows_operation = ShardedOperation(
    "jaxfp8_quantize_rows", _rows_local, agreed=agreed_quantizer, function="quantize"
)
columns_operation = ShardedOperation(
    "jaxfp8_quantize_columns", _columns_local, agreed=agreed_quantizer, function="quantize_both"
)
both_operation = ShardedOperation("jaxfp8_quantize_both", _both_local, agreed=agreed_quantizer)
blocks_operation = ShardedOperation(
    "jaxfp8_quantize_blocks", _blocks_local, agreed=agreed_quantizer, function="quantize"
)
weight_operation = ShardedOperation(
    "jaxfp8_quantize_weight", _weight_local, agreed=agreed_quantizer
)
ragged_columns_operation = ShardedOperation(
    "jaxfp8_quantize_ragged_columns",
    mapped(_leaf_local(quantize_ragged_columns_leaf)),
    pinned=("m", "g", "t"),
    function="quantize_both",
)
ragged_both_operation = ShardedOperation(
    "jaxfp8_quantize_ragged_both",
    mapped(_leaf_local(quantize_ragged_both_leaf)),
    pinned=("m", "g", "t"),
    function="quantize_both",
)


def _bind(kernel, fmt: Format, ins, outs, *arrays):
    call = Call(ins, outs, (("dtype", fmt.dtype), ("pow2", fmt.pow2)))
    return kernel(*arrays, call=call)


def rows(x, dims, fmt: Format) -> Named:
    """1x128 along the last dimension."""
    data, scale = _bind(rows_operation, fmt, (dims,), (dims, scale_dims_of(dims)), x)
    return named(data, scale, dims)


def columns(x, dims, tokens, fmt: Format) -> Named:
    """(..., k) with token dimensions -> (batch, k, tokens): 1x128 along the tokens, in order.

    Token dimensions stay apart (and may be sharded apart) while blocks do not straddle them; else they are merged,
    which gives the same blocks.
    """
    x, dims, tokens = order_tokens(x, dims, tokens, merge=True)
    out = tuple(d for d in dims[:-1] if d not in tokens) + (dims[-1],) + tokens
    data, scale = _bind(columns_operation, fmt, (dims,), (out, scale_dims_of(out)), x)
    return named(data, scale, out)


def rows_and_columns(
    x, dims, tokens, fmt: Format, *, with_rows=True, with_columns=True
) -> tuple[Any, Any]:
    """`rows` and `columns` of one array; from one read, unless its dimensions come in another order.

    Without one of them: None in its place, and the same bits of the other.
    """
    if not (with_rows and with_columns):
        return (
            rows(x, dims, fmt) if with_rows else None,
            columns(x, dims, tokens, fmt) if with_columns else None,
        )
    merged, order, merged_tokens = order_tokens(x, dims, tokens, merge=True)
    _, in_place, _ = order_tokens(x, dims, tokens, merge=False)
    loses_sharding = is_explicit(jax.typeof(x)) and (order != in_place or cuts_blocks(merged))
    if in_place != dims or loses_sharding:
        return rows(x, dims, fmt), columns(x, dims, tokens, fmt)
    out = tuple(d for d in order[:-1] if d not in merged_tokens) + (order[-1],) + merged_tokens
    outs = (order, scale_dims_of(order), out, scale_dims_of(out))
    row, row_scale, column, column_scale = _bind(both_operation, fmt, (order,), outs, merged)
    row, row_scale = (
        row.reshape(x.shape),
        row_scale.reshape(*x.shape[:-1], ceil_blocks(x.shape[-1])),
    )
    return named(row, row_scale, dims), named(column, column_scale, out)


def weight(w, dims, fmt: Format) -> tuple[Named, Named]:
    """Both orientations of a weight (..., k, n) from one read, with the same scales: (..., n, k) and (..., k, n)."""
    nt = dims[:-2] + (dims[-1], dims[-2])
    outs = (dims, scale_dims_of(dims, BLOCK), nt, scale_dims_of(nt, BLOCK))
    nn_data, nn_scale, nt_data, nt_scale = _bind(weight_operation, fmt, (dims,), outs, w)
    return named(nt_data, nt_scale, nt, SQUARE), named(nn_data, nn_scale, dims, SQUARE)


def ragged_columns(x, dims, sizes, sizes_dims, fmt: Format) -> Named:
    """(m, k) -> (k, t): 1x128 along the group-padded token axis."""
    out = ragged_dims(dims, sizes_dims)
    ins, outs = (dims, sizes_dims), (out, scale_dims_of(out))
    data, scale = _bind(ragged_columns_operation, fmt, ins, outs, x, sizes)
    return named(data, scale, out)


def ragged_rows_and_columns(
    x, dims, sizes, sizes_dims, fmt: Format, *, with_rows=True, with_columns=True
) -> tuple[Any, Any]:
    """`rows` and `ragged_columns` of one array, from one read; without one of them, None in its place."""
    if not (with_rows and with_columns):
        return (
            rows(x, dims, fmt) if with_rows else None,
            ragged_columns(x, dims, sizes, sizes_dims, fmt) if with_columns else None,
        )
    out = ragged_dims(dims, sizes_dims)
    row_dims = out[:-2] + dims[-2:]
    outs = (row_dims, scale_dims_of(row_dims), out, scale_dims_of(out))
    row, row_scale, data, scale = _bind(
        ragged_both_operation, fmt, (dims, sizes_dims), outs, x, sizes
    )
    return named(row, row_scale, row_dims), named(data, scale, out)


# --------------------------------------------------------------------------------------------------
# Public functions
# --------------------------------------------------------------------------------------------------


def _format(function, dtype, scale_format, recipe) -> Format:
    resolved = current_recipe(function, recipe)
    dtype = resolved.dtype if dtype is None else fp8_dtype(f"{function}: dtype", dtype)
    if scale_format is None:
        scale_format = resolved.scale_format
    return Format(dtype, scale_format_name(f"{function}: scale_format", scale_format) == "pow2")


def _lead(x, *last) -> tuple[str, ...]:
    return tuple(f"b{i}" for i in range(x.ndim - len(last))) + last


def quantize(
    x: Any,
    block: tuple[int, int] = ROW,
    *,
    dtype: Any = None,
    scale_format: str | None = None,
    recipe: Recipe | None = None,
) -> QuantizedArray:
    """Quantizes an array to FP8, one scale per block.

    `scale = amax / 448` (57344 for E5M2) of each block, `data = round(x / scale)`; DeepSeek-V3, arXiv 2412.19437,
    section 3.3. A block with a NaN or an infinity becomes NaN; a block of zeros has scale 1.

    **Arguments:**

    - `x`: float32, bfloat16 or float16 `(..., K)` for `block=(1, 128)`, `(..., M, K)` for `block=(128, 128)`. Any
      sizes; leading axes are kept.
    - `block`: `(1, 128)` for activations and gradients, `(128, 128)` for weights.
    - `dtype`: float8_e4m3fn or float8_e5m2; None takes the recipe's.
    - `scale_format`: `"float32"` or `"pow2"`; None takes the recipe's.
    - `recipe`: the `jaxfp8.Recipe` to take them from; None is the one in force.

    **Returns:** a `QuantizedArray` of x's shape with scales `(..., ceil(K/128))` or `(..., ceil(M/128), ceil(K/128))`.

    **Raises:** TypeError for a wrong dtype, ValueError for a wrong rank, block or scale format.
    """
    fmt = _format("quantize", dtype, scale_format, recipe)
    if not isinstance(block, (tuple, list)) or tuple(block) not in (ROW, SQUARE):
        raise ValueError(f"quantize: block is {block!r}; allowed: (1, 128), (128, 128)")
    if tuple(block) == ROW:
        x = checks.array("quantize", "x", x, "(..., K)")
        return rows(x, _lead(x, "k"), fmt).array
    x = checks.array("quantize", "x", x, "(..., M, K)")
    dims = _lead(x, "m", "k")
    data, scale = _bind(blocks_operation, fmt, (dims,), (dims, scale_dims_of(dims, BLOCK)), x)
    return QuantizedArray(data, scale, SQUARE)


def quantize_both(
    x: Any,
    *,
    group_sizes: Any = None,
    dtype: Any = None,
    scale_format: str | None = None,
    recipe: Recipe | None = None,
) -> tuple[QuantizedArray, QuantizedArray]:
    """Quantizes the rows of an array and those of its transpose, from one read on a GPU.

    Both are quantized from x itself: the columns are not a transposed copy of the quantized rows.

    **Arguments:**

    - `x`: float32, bfloat16 or float16 `(..., M, K)`; `(M, K)` with `group_sizes`.
    - `group_sizes`: int32 `(G,)`, rows of each group, or None. Negative sizes count as zero; groups are clipped to M.
    - `dtype`, `scale_format`, `recipe`: as `jaxfp8.quantize`.

    **Returns:** `row`, data `(..., M, K)` in 1x128 blocks along K; `column`, data `(..., K, M)` in 1x128 blocks along
    M.
    With `group_sizes` the token axis of `column` is group-padded for `jaxfp8.grouped_wgrad_gemm`: data `(K, T)`,
    `T = 128 * (ceil(M/128) + G)`, each group starting at a multiple of 128, zeros between.

    **Raises:** TypeError for a wrong dtype, ValueError for a wrong rank or scale format.
    """
    fmt = _format("quantize_both", dtype, scale_format, recipe)
    if group_sizes is None:
        x = checks.array("quantize_both", "x", x, "(..., M, K)")
        row, column = rows_and_columns(x, _lead(x, "m", "k"), ("m",), fmt)
    else:
        x = checks.array("quantize_both", "x", x, "(M, K)")
        sizes = checks.group_sizes("quantize_both", "group_sizes", group_sizes)
        row, column = ragged_rows_and_columns(x, ("m", "k"), sizes, ("g",), fmt)
    return row.array, column.array


def quantize_weight(
    w: Any,
    *,
    dtype: Any = None,
    scale_format: str | None = None,
    recipe: Recipe | None = None,
) -> tuple[QuantizedArray, QuantizedArray]:
    """Quantizes a weight in 128x128 blocks in both orientations, from one read on a GPU.

    **Arguments:**

    - `w`: float32, bfloat16 or float16 `(..., K, N)`, such as `(K, N)` or experts `(G, K, N)`.
    - `dtype`, `scale_format`, `recipe`: as `jaxfp8.quantize`.

    **Returns:** `w_nt`, data `(..., N, K)`, the right-hand operand of the forward product, and `w_nn`, data
    `(..., K, N)`, that of the input gradient's. They hold the same numbers: each one's scales are the other's,
    transposed.

    **Raises:** TypeError for a wrong dtype, ValueError for a wrong rank or scale format.
    """
    fmt = _format("quantize_weight", dtype, scale_format, recipe)
    w = checks.array("quantize_weight", "w", w, "(..., K, N)")
    nt, nn = weight(w, _lead(w, "k", "n"), fmt)
    return nt.array, nn.array
