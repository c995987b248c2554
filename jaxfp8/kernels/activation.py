"""Activations of an MLP fused with quantization, and their gradients.

Pre-activations are `(..., F)`, or gated `(..., 2, F)`: the gate, then what it multiplies. (Not `(..., 2 F)`: cutting F
over devices then cuts both alike, and no FP8 block holds numbers of both.) The activation is computed in float32 and
quantized from there; it is stored nowhere. docs/architecture.md, "Activations", has the formula and its error.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from .. import _ffi
from .._arrays.blocks import BLOCK, ROW, ceil_blocks, quantize_blocks
from .._arrays.recipe import Format
from .._primitives.call import Call
from .._primitives.leaf import Leaf, timed_call
from .._primitives.mesh import call_types, is_explicit
from .._primitives.sharded_operation import ShardedOperation
from ._mapped import mapped
from .named import Named, named, scale_dims_of
from .quantize import columns, rows
from .tokens import cuts_blocks, order_tokens, reference_ragged_columns

ACTIVATIONS = ("silu", "gelu")
"""By the number that the custom calls take."""

TWO = "two"
"""Name of the dimension of gate and up; always next to `"f"`."""

# --------------------------------------------------------------------------------------------------
# Reference numerics
# --------------------------------------------------------------------------------------------------

# gelu by its tanh approximation, x / 2 (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3))), is x logistic(2 sqrt(2/pi) (...)).
_LINEAR = {"silu": np.float32(1), "gelu": np.float32(1.5957691216)}
_CUBIC = {"silu": np.float32(0), "gelu": np.float32(0.07135481627)}


def _logistic(x, activation):
    """s(z) of an activation a(x) = x s(z), and the derivative of z.

    Beyond |x| = 100 s is 0 or 1; the minimum keeps every factor finite.
    """
    square = jnp.minimum(x * x, np.float32(1e4))
    z = x * (_CUBIC[activation] * square + _LINEAR[activation])
    slope = np.float32(3) * _CUBIC[activation] * square + _LINEAR[activation]
    return 1 / (1 + jnp.exp(-z)), slope


def _split(x):
    """Gate and up of `(..., A, F)` in float32; up is None where A is 1."""
    x = lax.optimization_barrier(x).astype(jnp.float32)
    return x[..., 0, :], x[..., 1, :] if x.shape[-2] == 2 else None


def activate(x, activation):
    """float32 `(..., F)` of pre-activations `(..., A, F)`."""
    x, up = _split(x)
    s, _ = _logistic(x, activation)
    y = x * s
    # Computed once, whatever reads it: a block's scale belongs to the values that it scales.
    return lax.optimization_barrier(y if up is None else y * up)


def activate_weighted(x, weight, activation):
    """`activate` with a factor `(...)` for each row: what a router gives an expert's row."""
    return lax.optimization_barrier(activate(x, activation) * weight[..., None])


def activate_grad(x, dy, activation):
    """float32 gradient `(..., A, F)` of pre-activations from that of `activate`."""
    x, up = _split(x)
    dy = lax.optimization_barrier(dy).astype(jnp.float32)
    s, z_slope = _logistic(x, activation)
    slope = s + x * (s * (1 - s)) * z_slope
    if up is None:
        halves = [dy * slope]
    else:
        halves = [dy * up * slope, dy * (x * s)]
    return lax.optimization_barrier(jnp.stack(halves, axis=-2))


def activate_weighted_grad(x, dy, weight, activation):
    """The gradients of `activate_weighted`: of x `(..., A, F)`, and of the weights by 128-block of F, `(..., FB)`."""
    dy = lax.optimization_barrier(dy).astype(jnp.float32)
    products = dy * activate(x, activation)
    f = products.shape[-1]
    products = jnp.pad(products, [(0, 0)] * (products.ndim - 1) + [(0, -f % BLOCK)])
    dweight = products.reshape(*products.shape[:-1], ceil_blocks(f), BLOCK).sum(-1)
    return activate_grad(x, dy * weight[..., None], activation), dweight


def _rows(y, dtype, pow2):
    """1x128 blocks along the last axis."""
    flat = y.reshape(math.prod(y.shape[:-1]), y.shape[-1])
    data, scale = quantize_blocks(flat, ROW, dtype, pow2)
    return [data.reshape(y.shape), scale.reshape(*y.shape[:-1], ceil_blocks(y.shape[-1]))]


def _reference_rows(x, *, activation, dtype, pow2):
    return _rows(activate(x, activation), dtype, pow2)


def _reference_both(x, *, activation, dtype, pow2):
    y = activate(x, activation)
    return _rows(y, dtype, pow2) + _rows(jnp.swapaxes(y, -1, -2), dtype, pow2)


def _reference_grad_both(x, dy, *, activation, dtype, pow2):
    dx = activate_grad(x, dy, activation)  # (G, M, A, F)
    return _rows(dx, dtype, pow2) + _rows(jnp.moveaxis(dx, 1, -1), dtype, pow2)


def _reference_ragged_both(x, sizes, *, activation, dtype, pow2):
    y = activate(x, activation)
    return _rows(y, dtype, pow2) + reference_ragged_columns(y, sizes, dtype=dtype, pow2=pow2)


def _reference_ragged_grad_both(x, dy, sizes, *, activation, dtype, pow2):
    return _quantized_ragged_grad(activate_grad(x, dy, activation), sizes, dtype, pow2)


def _quantized_ragged_grad(dx, sizes, dtype, pow2):
    m, a, f = dx.shape
    data, scale = reference_ragged_columns(dx.reshape(m, a * f), sizes, dtype=dtype, pow2=pow2)
    columns = [v.reshape(a, f, v.shape[-1]) for v in (data, scale)]
    return _rows(dx, dtype, pow2) + columns


def _reference_weighted_rows(x, weight, *, activation, dtype, pow2):
    return _rows(activate_weighted(x, weight, activation), dtype, pow2)


def _reference_ragged_weighted_both(x, weight, sizes, *, activation, dtype, pow2):
    y = activate_weighted(x, weight, activation)
    return _rows(y, dtype, pow2) + reference_ragged_columns(y, sizes, dtype=dtype, pow2=pow2)


def _reference_ragged_weighted_grad_both(x, dy, weight, sizes, *, activation, dtype, pow2):
    dx, dweight = activate_weighted_grad(x, dy, weight, activation)
    return [*_quantized_ragged_grad(dx, sizes, dtype, pow2), dweight]


# --------------------------------------------------------------------------------------------------
# Custom calls: docs/architecture.md has the contract
# --------------------------------------------------------------------------------------------------

_M_MAJOR = {"m": (1, 0), "gm": (2, 0, 1), "ma": (1, 2, 0), "gma": (2, 3, 0, 1)}
"""Layouts of row scales, major to minor, by the axes before the blocks: the blocks are outermost, M is innermost."""
_COLUMN_MAJOR = {"f": (1, 0), "gf": (2, 0, 1), "af": (2, 0, 1), "gaf": (3, 0, 1, 2)}
"""The same for columns, whose folded rows are all axes before the blocks."""


def _activation(name, reference, row_axes, column_axes=None):
    """The leaf of an activation; the axes of its scales before the blocks."""

    def custom_call(*arrays, activation, dtype, pow2):
        def run(*arrays):
            return reference(*arrays, activation=activation, dtype=dtype, pow2=pow2)

        results = jax.eval_shape(run, *arrays)
        if any(0 in v.shape for v in (*arrays, *results)):
            return run(*arrays)
        layouts = [tuple(range(v.ndim)) for v in results]
        layouts[1] = _M_MAJOR[row_axes]
        if column_axes is not None:
            layouts[3] = _COLUMN_MAJOR[column_axes]
        if len(results) > 4:  # the weights' gradient
            layouts[4] = _M_MAJOR["m"]
        call = timed_call(_ffi.target(name), call_types(results, arrays), output_layouts=layouts)
        index = np.int32(ACTIVATIONS.index(activation))
        return call(*arrays, activation=index, pow2=np.bool_(pow2))

    return Leaf(f"jaxfp8_{name}_leaf", reference, custom_call)


activation_rows_leaf = _activation("activation_rows", _reference_rows, "m")
activation_both_leaf = _activation("activation_both", _reference_both, "gm", "gf")
activation_grad_both_leaf = _activation("activation_grad_both", _reference_grad_both, "gma", "gaf")
activation_ragged_both_leaf = _activation(
    "activation_ragged_both", _reference_ragged_both, "m", "f"
)
activation_ragged_grad_both_leaf = _activation(
    "activation_ragged_grad_both", _reference_ragged_grad_both, "ma", "af"
)


activation_weighted_rows_leaf = _activation(
    "activation_weighted_rows", _reference_weighted_rows, "m"
)
activation_ragged_weighted_both_leaf = _activation(
    "activation_ragged_weighted_both", _reference_ragged_weighted_both, "m", "f"
)
activation_ragged_weighted_grad_both_leaf = _activation(
    "activation_ragged_weighted_grad_both", _reference_ragged_weighted_grad_both, "ma", "af"
)


# --------------------------------------------------------------------------------------------------
# Kernels: named dimensions
# --------------------------------------------------------------------------------------------------


def _halves(dims):
    """A of a pre-activation of these dimensions."""
    return 2 if TWO in dims else 1


def _scale_shape(shape):
    return (*shape[:-1], ceil_blocks(shape[-1]))


def _rows_local(x, *, call):
    lead = x.shape[: x.ndim - _halves(call.ins[0])]
    flat = x.reshape(math.prod(lead), _halves(call.ins[0]), x.shape[-1])
    data, scale = activation_rows_leaf(flat, **dict(call.attributes))
    shape = (*lead, x.shape[-1])
    return [data.reshape(shape), scale.reshape(_scale_shape(shape))]


def _batch_and_tokens(call):
    """Their names: columns are (batch, [two,] f, tokens)."""
    out = call.outs[2]
    at = out.index("f")
    return tuple(d for d in out[:at] if d != TWO), out[at + 1 :]


def _both_local(x, *rest, call):
    """y, or with dy the gradient of x: x (batch, tokens, [two,] f), dy (batch, tokens, f)."""
    batch, tokens = _batch_and_tokens(call)
    halves, f = _halves(call.ins[0]), x.shape[-1]
    sizes = call.sizes([x, *rest])
    g, m = (math.prod(sizes[d] for d in dims) for dims in (batch, tokens))
    leaf = activation_grad_both_leaf if rest else activation_both_leaf
    results = leaf(
        x.reshape(g, m, halves, f), *(v.reshape(g, m, f) for v in rest), **dict(call.attributes)
    )
    shapes = []
    for dims in (call.outs[0], call.outs[2]):
        shape = tuple(sizes[d] for d in dims)
        shapes += [shape, _scale_shape(shape)]
    return [v.reshape(shape) for v, shape in zip(results, shapes, strict=True)]


def _ragged_local(x, *rest, call):
    """As `_both_local`, of x (m, [two,] f) and [dy (m, f)], sizes."""
    *dy, sizes = rest
    halves, f = _halves(call.ins[0]), x.shape[-1]
    leaf = activation_ragged_grad_both_leaf if dy else activation_ragged_both_leaf
    results = leaf(x.reshape(x.shape[0], halves, f), *dy, sizes, **dict(call.attributes))
    if dy and halves == 1:  # the results' axis A
        results = [jnp.squeeze(v, axis) for v, axis in zip(results, (1, 1, 0, 0), strict=True)]
    return results


def _weighted_rows_local(x, weight, *, call):
    flat = x.reshape(x.shape[0], _halves(call.ins[0]), x.shape[-1])
    return activation_weighted_rows_leaf(flat, weight, **dict(call.attributes))


def _ragged_weighted_local(x, *rest, call):
    """As `_ragged_local`, of x, [dy], weight (m), sizes."""
    *dy, weight, sizes = rest
    halves, f = _halves(call.ins[0]), x.shape[-1]
    x = x.reshape(x.shape[0], halves, f)
    if not dy:
        return activation_ragged_weighted_both_leaf(x, weight, sizes, **dict(call.attributes))
    *results, dweight = activation_ragged_weighted_grad_both_leaf(
        x, *dy, weight, sizes, **dict(call.attributes)
    )
    if halves == 1:
        results = [jnp.squeeze(v, axis) for v, axis in zip(results, (1, 1, 0, 0), strict=True)]
    return [*results, dweight]


_PINNED = (TWO, "m", "g", "t")
rows_operation = ShardedOperation("jaxfp8_activation_rows", _rows_local, pinned=(TWO,))
both_operation = ShardedOperation("jaxfp8_activation_both", _both_local, pinned=(TWO,))
ragged_both_operation = ShardedOperation(
    "jaxfp8_activation_ragged_both", mapped(_ragged_local), pinned=_PINNED
)
weighted_rows_operation = ShardedOperation(
    "jaxfp8_activation_weighted_rows", mapped(_weighted_rows_local), pinned=(TWO,)
)
ragged_weighted_operation = ShardedOperation(
    "jaxfp8_activation_ragged_weighted", mapped(_ragged_weighted_local), pinned=_PINNED
)


# --------------------------------------------------------------------------------------------------
# Named arrays
# --------------------------------------------------------------------------------------------------


def _bind(kernel, activation, fmt: Format, ins, outs, *arrays):
    attributes = (("activation", activation), ("dtype", fmt.dtype), ("pow2", fmt.pow2))
    outs = tuple(d for dims in outs for d in (dims, scale_dims_of(dims)))
    return kernel(*arrays, call=Call(ins, outs, attributes))


def _tail(dims):
    """The last dimensions: f, with the halves before it where there are any."""
    return dims[dims.index(TWO) :] if TWO in dims else dims[-1:]


def activation_rows(x, dims, fmt: Format, activation) -> Named:
    """Pre-activations (..., [two,] f) -> (..., f): 1x128 along f."""
    out = tuple(d for d in dims if d != TWO)
    data, scale = _bind(rows_operation, activation, fmt, (dims,), (out,), x)
    return named(data, scale, out)


def _rows_and_columns(arrays, ins, out, tokens, fmt: Format, activation) -> tuple[Named, Named]:
    """Rows and columns of a value of dimensions `out`, from one read of the arrays as (batch, tokens, tail)."""
    ordered = []
    for x, dims in zip(arrays, ins, strict=True):
        tail = len(_tail(dims))
        merged, order, merged_tokens = order_tokens(x, dims, tokens, merge=True, tail=tail)
        _, in_place, _ = order_tokens(x, dims, tokens, merge=False, tail=tail)
        if is_explicit(jax.typeof(x)) and (order != in_place or cuts_blocks(merged, tail)):
            # The columns need whole blocks of tokens; the rows must keep their sharding.
            y = _compute(arrays, ins, activation)
            return rows(y, out, fmt), columns(y, out, tokens, fmt)
        ordered.append((merged, order, order[:-tail], in_place[:-tail]))
    _, _, lead, in_place = ordered[0]
    batch, last = tuple(d for d in lead if d not in merged_tokens), _tail(out)
    outs = (lead + last, batch + last + merged_tokens)
    row, row_scale, column, column_scale = _bind(
        both_operation,
        activation,
        fmt,
        tuple(order for _, order, _, _ in ordered),
        outs,
        *(x for x, _, _, _ in ordered),
    )
    sizes = dict(zip(ins[0], arrays[0].shape, strict=True))
    shape = tuple(sizes[d] for d in in_place + last)
    row, row_scale = row.reshape(shape), row_scale.reshape(_scale_shape(shape))
    return named(row, row_scale, in_place + last), named(column, column_scale, outs[1])


def _compute(arrays, ins, activation):
    """The value that the kernels quantize, in float32, with dimensions as the arrays have them."""
    x, *dy = arrays
    is_gated = TWO in ins[0]
    x = x if is_gated else jnp.expand_dims(x, -2)
    if not dy:
        return activate(x, activation)
    (dy,) = dy
    dx = activate_grad(x, dy, activation)
    return dx if is_gated else jnp.squeeze(dx, -2)


def activation_rows_and_columns(x, dims, tokens, fmt: Format, activation) -> tuple[Named, Named]:
    """Pre-activations (..., [two,] f) -> (..., f) 1x128 along f, and (batch, f, tokens) 1x128 along the tokens."""
    out = tuple(d for d in dims if d != TWO)
    return _rows_and_columns((x,), (dims,), out, tokens, fmt, activation)


def activation_grad(x, dims, dy, tokens, fmt: Format, activation) -> tuple[Named, Named]:
    """Gradient of pre-activations from dy (..., f), that of their activation.

    (..., [two,] f) 1x128 along f, and (batch, [two,] f, tokens) 1x128 along the tokens.
    """
    ins = (dims, tuple(d for d in dims if d != TWO))
    return _rows_and_columns((x, dy), ins, dims, tokens, fmt, activation)


def _ragged(arrays, ins, last, fmt: Format, activation) -> tuple[Named, Named]:
    dims, sizes_dims = ins[0], ins[-1]
    new = tuple(dict.fromkeys(sizes_dims[:-1] + dims[: dims.index("m")]))
    outs = (new + ("m",) + last, new + last + ("t",))
    row, row_scale, column, column_scale = _bind(
        ragged_both_operation, activation, fmt, ins, outs, *arrays
    )
    return named(row, row_scale, outs[0]), named(column, column_scale, outs[1])


def ragged_activation(x, dims, sizes, sizes_dims, fmt: Format, activation) -> tuple[Named, Named]:
    """As `activation_rows_and_columns`, of (m, [two,] f), with columns over the group-padded token axis."""
    return _ragged((x, sizes), (dims, sizes_dims), ("f",), fmt, activation)


def ragged_activation_grad(
    x, dims, dy, sizes, sizes_dims, fmt: Format, activation
) -> tuple[Named, Named]:
    """As `activation_grad`, of (m, [two,] f), with columns over the group-padded token axis."""
    ins = (dims, tuple(d for d in dims if d != TWO), sizes_dims)
    return _ragged((x, dy, sizes), ins, _tail(dims), fmt, activation)


def _new(ins):
    """Dimensions that vmap added to any operand."""
    return tuple(dict.fromkeys(d for dims in ins for d in dims if d[0] == "v"))


def weighted_activation_rows(x, dims, weight, weight_dims, fmt: Format, activation) -> Named:
    """As `activation_rows`, of (m, [two,] f), each row multiplied by its `weight` (m), float32."""
    ins = (dims, weight_dims)
    out = (*_new(ins), "m", "f")
    data, scale = _bind(weighted_rows_operation, activation, fmt, ins, (out,), x, weight)
    return named(data, scale, out)


def ragged_weighted_activation(
    x, dims, weight, weight_dims, sizes, sizes_dims, fmt: Format, activation
) -> tuple[Named, Named]:
    """As `ragged_activation`, each row multiplied by its `weight` (m), float32, before it is quantized."""
    ins = (dims, weight_dims, sizes_dims)
    new = _new(ins)
    outs = ((*new, "m", "f"), (*new, "f", "t"))
    row, row_scale, column, column_scale = _bind(
        ragged_weighted_operation, activation, fmt, ins, outs, x, weight, sizes
    )
    return named(row, row_scale, outs[0]), named(column, column_scale, outs[1])


def ragged_weighted_activation_grad(
    x, dims, dy, dy_dims, weight, weight_dims, sizes, sizes_dims, fmt: Format, activation
) -> tuple[Named, Named, jax.Array]:
    """As `ragged_activation_grad`, from dy (m, f), the gradient of the weighted activation.

    The third result is that of the weights, float32 (m): the sum over f of dy and the activation without its weight.
    """
    ins = (dims, dy_dims, weight_dims, sizes_dims)
    new, last = _new(ins), _tail(dims)
    outs = ((*new, "m", *last), (*new, *last, "t"))
    attributes = (("activation", activation), ("dtype", fmt.dtype), ("pow2", fmt.pow2))
    call_outs = tuple(d for out in outs for d in (out, scale_dims_of(out)))
    call = Call(ins, (*call_outs, (*new, "m", "f/")), attributes)
    row, row_scale, column, column_scale, dweight = ragged_weighted_operation(
        x, dy, weight, sizes, call=call
    )
    named_ = named(row, row_scale, outs[0]), named(column, column_scale, outs[1])
    return *named_, jnp.sum(dweight, axis=-1)
