"""Rows gathered by index into FP8: what a mixture of experts makes of its tokens, in one pass.

`source` holds, for each of M result rows, the row of x (S, K) that it is a copy of; below 0 or from S on: a row of
zeros. Rows of high precision are quantized on the way (as `quantize.rows` and `quantize.ragged_columns` quantize the
gathered array, to the bit). Rows that are FP8 already keep their data and scales; their columns are quantized from
`data * scale`:

- With power-of-two scales nothing is lost of a value of at least 2^-13 (E5M2: 2^-28) of the largest of its column's
  block: its bits are the same under any of these scales. Smaller ones are rounded to a multiple of the block's smallest
  subnormal, as in any quantization.
- With float32 scales every value is rounded a second time: it differs from x by at most twice 2^-4 (E5M2: 2^-3) of
  itself, where columns quantized from x differ by once that; in the mean square by about 1.4 times as much.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from .. import _ffi
from .._arrays.blocks import ROW, dequantize_blocks, quantize_blocks
from .._arrays.recipe import Format
from .._primitives.call import Call
from .._primitives.leaf import Leaf, timed_call
from .._primitives.sharded_operation import ShardedOperation
from ._mapped import mapped
from .named import ROW_SCALE, Named, named, scale_dims_of
from .tokens import quantize_token_axis, token_axis

# --------------------------------------------------------------------------------------------------
# Reference numerics
# --------------------------------------------------------------------------------------------------


def take_rows(x, source):
    """x[source] along the first axis; zeros where `source` is below 0 or past the end."""
    if not x.shape[0]:
        return jnp.zeros((*source.shape, *x.shape[1:]), x.dtype)
    source = jnp.where(source < 0, x.shape[0], source)  # a negative index would count from the end
    return x.at[source].get(mode="fill", fill_value=0)


def _take_words(data, source):
    """`take_rows` of one-byte data: four bytes at a time, for gathers of bytes are half as fast on a GPU."""
    _, k = data.shape
    bits = lax.bitcast_convert_type(data, jnp.uint8)
    bits = jnp.pad(bits, [(0, 0), (0, -k % 4)]).reshape(data.shape[0], -1, 4)
    words = take_rows(lax.bitcast_convert_type(bits, jnp.int32), source)
    bits = lax.bitcast_convert_type(words, jnp.uint8).reshape(source.shape[0], -1)[:, :k]
    return lax.bitcast_convert_type(bits, data.dtype)


def _reference_rows(x, source, *, dtype, pow2):
    return list(quantize_blocks(take_rows(x, source), ROW, dtype, pow2))


def _along_tokens(source, sizes):
    """The row of x behind each token of the group-padded axis, and whether there is a row of the group."""
    rows = source.shape[0]
    row = token_axis(sizes, rows)
    return jnp.pad(source, (0, 1), constant_values=-1)[row], row < rows


def _reference_columns(x, source, sizes, *, dtype, pow2):
    source, inside = _along_tokens(source, sizes)
    return quantize_token_axis(take_rows(x, source), inside, dtype, pow2)


def _reference_both(x, source, sizes, *, dtype, pow2):
    rows = _reference_rows(x, source, dtype=dtype, pow2=pow2)
    return rows + _reference_columns(x, source, sizes, dtype=dtype, pow2=pow2)


def _reference_fp8_rows(data, scale, source):
    inside = (source >= 0) & (source < data.shape[0])
    scale = jnp.where(inside[:, None], take_rows(scale, source), 1)
    return [_take_words(data, source), scale]


def _reference_fp8_columns(data, scale, source, sizes, *, pow2):
    source, inside = _along_tokens(source, sizes)
    row, row_scale = _reference_fp8_rows(data, scale, source)
    rows = dequantize_blocks(row, row_scale, ROW)
    # What is quantized are these float32 values, not a product with one more factor.
    rows = lax.optimization_barrier(rows)
    return quantize_token_axis(rows, inside, data.dtype, pow2)


def _reference_fp8_both(data, scale, source, sizes, *, pow2):
    rows = _reference_fp8_rows(data, scale, source)
    return rows + _reference_fp8_columns(data, scale, source, sizes, pow2=pow2)


# --------------------------------------------------------------------------------------------------
# Custom calls: docs/architecture.md has the contract
# --------------------------------------------------------------------------------------------------


def _layout(array, m_major):
    return ROW_SCALE[2] if m_major else tuple(range(array.ndim))


def _gather(name, reference):
    """The leaf of a gather; its scales, every second result, lie M-major."""

    def custom_call(*arrays, **params):
        results = jax.eval_shape(functools.partial(reference, **params), *arrays)
        if any(0 in v.shape for v in (*arrays, *results)):
            return reference(*arrays, **params)
        of_fp8 = arrays[0].dtype.itemsize == 1  # then its scales come second
        call = timed_call(
            _ffi.target(name),
            results,
            input_layouts=[_layout(v, of_fp8 and i == 1) for i, v in enumerate(arrays)],
            output_layouts=[_layout(v, i % 2 == 1) for i, v in enumerate(results)],
        )
        return call(*arrays, **{k: np.bool_(v) for k, v in params.items() if k == "pow2"})

    return Leaf(f"jaxfp8_{name}_leaf", reference, custom_call)


gather_quantize_rows_leaf = _gather("gather_quantize_rows", _reference_rows)
gather_quantize_both_leaf = _gather("gather_quantize_both", _reference_both)
gather_rows_leaf = _gather("gather_rows", _reference_fp8_rows)
gather_requantize_both_leaf = _gather("gather_requantize_both", _reference_fp8_both)


# --------------------------------------------------------------------------------------------------
# Kernels: named dimensions
# --------------------------------------------------------------------------------------------------


def _gather_operation(name, leaf, pinned):
    local = mapped(lambda *arrays, call: leaf(*arrays, **dict(call.attributes)))
    return ShardedOperation(f"jaxfp8_{name}", local, pinned=("s", *pinned))


_PINNED = ("m", "g", "t")
_rows_operation = _gather_operation("gather_quantize_rows", gather_quantize_rows_leaf, ())
_both_operation = _gather_operation("gather_quantize_both", gather_quantize_both_leaf, _PINNED)
_fp8_rows_operation = _gather_operation("gather_rows", gather_rows_leaf, ())
_fp8_both_operation = _gather_operation(
    "gather_requantize_both", gather_requantize_both_leaf, _PINNED
)


def _new(*all_dims):
    """Dimensions that vmap added to any operand."""
    return tuple(dict.fromkeys(d for dims in all_dims for d in dims if d[0] == "v"))


def _bind(operation, arrays, ins, outs, **attributes):
    outs = tuple(d for dims in outs for d in (dims, scale_dims_of(dims)))
    call = Call(ins, outs, tuple(attributes.items()))
    results = operation(*arrays, call=call)
    pairs = zip(results[::2], results[1::2], outs[::2], strict=True)
    return [named(data, scale, dims) for data, scale, dims in pairs]


def rows(x, dims, source, source_dims, fmt: Format) -> Named:
    """x (s, k) gathered by `source` (m) -> (m, k): 1x128 along k."""
    out = (*_new(dims, source_dims), "m", dims[-1])
    (row,) = _bind(_rows_operation, (x, source), (dims, source_dims), (out,), **fmt._asdict())
    return row


def rows_and_columns(
    x, dims, source, source_dims, sizes, sizes_dims, fmt: Format
) -> tuple[Named, Named]:
    """`rows` and `columns`, from one read of the gathered rows."""
    ins = (dims, source_dims, sizes_dims)
    new = _new(*ins)
    outs = ((*new, "m", dims[-1]), (*new, dims[-1], "t"))
    row, column = _bind(_both_operation, (x, source, sizes), ins, outs, **fmt._asdict())
    return row, column


def _parts(q: Named):
    return (q.array.data, q.array.scale), (q.dims, q.scale_dims)


def fp8_rows(q: Named, source, source_dims) -> Named:
    """Data and scales of q (s, k), 1x128 along k, gathered by `source` (m) -> (m, k)."""
    arrays, ins = _parts(q)
    out = (*_new(q.dims, source_dims), "m", q.dims[-1])
    (row,) = _bind(_fp8_rows_operation, (*arrays, source), (*ins, source_dims), (out,))
    return row


def fp8_rows_and_columns(
    q: Named, source, source_dims, sizes, sizes_dims, pow2: bool
) -> tuple[Named, Named]:
    """`fp8_rows` and `fp8_columns`, from one read of the gathered rows."""
    arrays, ins = _parts(q)
    ins = (*ins, source_dims, sizes_dims)
    new = _new(*ins)
    outs = ((*new, "m", q.dims[-1]), (*new, q.dims[-1], "t"))
    row, column = _bind(_fp8_both_operation, (*arrays, source, sizes), ins, outs, pow2=pow2)
    return row, column
