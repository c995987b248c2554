"""The differentiable product that linear, dot_general and einsum are spellings of.

    y  = quantize(x) . quantize(w)        x 1x128 along k, w 128x128
    dx = quantize(dy) . quantize(w)^T     dy 1x128 along n, the same weight blocks
    dw = columns(x) . columns(dy)         both 1x128 along the tokens, quantized from the high-precision arrays

DESIGN: straight-through gradients of DeepSeek-V3's recipe (arXiv 2412.19437, section 3.3).
"""

from __future__ import annotations

import jax.numpy as jnp

from .._arrays.blocks import BLOCK, ROW, SQUARE
from .._arrays.quantized_weight import WeightCopies
from .._arrays.recipe import (
    Recipe,
    forward_format,
    gradient_format,
    result_options,
    weight_gradient_options,
)
from .._primitives.call import Call
from .._primitives.leaf import once
from .._primitives.mesh import explicit_axes, like_primal, place
from .._primitives.once import first_derivative
from .._primitives.operation import Operation
from ..kernels import quantize as qt
from ..kernels.gemm import product
from ..kernels.named import Named, named, scale_dims_of
from ._residuals import load, save


def _forward(x, weight, call: Call):
    out, dtype = call.outs[0], call.get("out_dtype")
    options = result_options(call.get("recipe"))
    return [once(product(x, weight, out, dtype, wanted=call.wanted, **options))]


def quantized_weight(w, w_dims, quantized, fmt):
    """Both orientations of a weight: quantized here, or ahead (data and scale of each)."""
    if not quantized:
        return qt.weight(w, w_dims, fmt)
    copies, dims = WeightCopies(*quantized), WeightCopies(*weight_dims(w_dims, quantized))
    return (
        named(copies.nt, copies.nt_scale, dims.nt, SQUARE),
        named(copies.nn, copies.nn_scale, dims.nn, SQUARE),
    )


def weight_dims(w_dims, quantized):
    """Dimensions of the operands that `quantized` adds to a call."""
    if not quantized:
        return ()
    nt = w_dims[:-2] + (w_dims[-1], w_dims[-2])
    return WeightCopies(nt, scale_dims_of(nt, BLOCK), w_dims, scale_dims_of(w_dims, BLOCK))


def _dot_body(x, w, *quantized, call: Call):
    x_dims, w_dims = call.ins[:2]
    fmt = forward_format(call.get("recipe"))
    # Only one orientation is used here; XLA removes what is not, and a kernel writes both from one read.
    weight, _ = quantized_weight(w, w_dims, quantized, fmt)
    return _forward(qt.rows(x, x_dims, fmt), weight, call)


def _tokens(call: Call):
    """The dimensions that a weight gradient sums over: those of x that the weight does not have."""
    x_dims, w_dims = call.ins[:2]
    return tuple(d for d in x_dims[:-1] if d not in w_dims)


X, W = 0, 1
"""Positions of the operands whose gradients may be asked for."""


def _dot_fwd(call: Call, types, moving, x, w, *quantized):
    x_dims, w_dims = call.ins[:2]
    fmt = forward_format(call.get("recipe"))
    nt, nn = quantized_weight(w, w_dims, quantized, fmt)
    rows, columns = qt.rows_and_columns(x, x_dims, _tokens(call), fmt, with_columns=W in moving)
    residuals = save(nn, keep=not quantized) if X in moving else None, save(columns)
    return _forward(rows, nt, call), residuals


def input_gradient(call: Call, x_type, dy_rows: Named, nn: Named):
    """The gradient of x from that of the result and the weight (..., k, n)."""
    (x_dims, w_dims), (out,) = call.ins[:2], call.outs
    # A weight-only batch dimension is summed here; every other sum is a contraction of the kernel.
    dx_dims = out[:-1] + (w_dims[-2],)
    wanted = explicit_axes(x_type, x_dims)
    options = result_options(call.get("recipe"))
    dx = product(dy_rows, nn, dx_dims, x_type.dtype, wanted=wanted, **options)
    return like_primal(sum_to(dx, dx_dims, x_dims), x_type)


def _weight_gradient(call: Call, w_type, saved_columns, dy_columns: Named):
    x_dims, w_dims = call.ins[:2]
    recipe: Recipe = call.get("recipe")
    k, n = w_dims[-2:]
    tokens = dy_columns.dims[dy_columns.dims.index(n) + 1 :]
    dims = tuple(d for d in x_dims[:-1] if d in w_dims) + (k,) + tokens
    columns = load(saved_columns, forward_format(recipe).dtype, dims, ROW)
    wanted = explicit_axes(w_type, w_dims)
    made, options = recipe.made_in(w_type.dtype), weight_gradient_options(recipe)
    dw = product(columns, dy_columns, w_dims, made, wanted=wanted, **options)
    return like_primal(dw, w_type)


def _dot_bwd(call: Call, types, moving, residuals, cotangents):
    (x_type, w_type, *quantized), (dy,) = types, cotangents
    saved_nn, saved_columns = residuals
    recipe: Recipe = call.get("recipe")
    which = {"with_rows": X in moving, "with_columns": W in moving}
    dy_rows, dy_columns = qt.rows_and_columns(
        dy, call.outs[0], _tokens(call), gradient_format(recipe), **which
    )
    dx = dw = None
    if X in moving:
        dtype = WeightCopies(*quantized).nn.dtype if quantized else forward_format(recipe).dtype
        nn = load(saved_nn, dtype, call.ins[1], SQUARE)
        dx = input_gradient(call, x_type, dy_rows, nn)
    if W in moving:
        dw = _weight_gradient(call, w_type, saved_columns, dy_columns)
    return dx, dw, *(None for _ in quantized)


def sum_to(y, dims, wanted):
    """y summed over the dimensions that are not wanted, transposed to those that are."""
    if extra := tuple(i for i, d in enumerate(dims) if d not in wanted):
        y = jnp.sum(y, extra)
    dims = tuple(d for d in dims if d in wanted)
    order = [dims.index(d) for d in wanted]
    return y if order == list(range(y.ndim)) else jnp.transpose(y, order)


dot_operation = Operation(
    "jaxfp8_dot",
    _dot_body,
    together=((1, 2, 3, 4, 5),),
    derivative=first_derivative("linear, dot_general and einsum", _dot_body, _dot_fwd, _dot_bwd),
)


def dot(x, w, x_dims, w_dims, out, *, recipe: Recipe, out_dtype, out_spec=None, quantized=()):
    """x (..., k) . w (..., k, n) -> out, of named dimensions; n is the last of out.

    `quantized`: data and scale of w as (..., n, k), and as (..., k, n), if w was quantized ahead.
    """
    wanted = () if out_spec is None else tuple(zip(out, out_spec, strict=True))
    attributes = (("out_dtype", out_dtype), ("recipe", recipe))
    ins = (x_dims, w_dims, *weight_dims(w_dims, quantized))
    (y,) = dot_operation(x, w, *quantized, call=Call(ins, (out,), attributes, wanted))
    return place(y, out_spec)
