"""The differentiable product that linear, dot_general and einsum are spellings of.

    y  = quantize(x) . quantize(w)        x 1x128 along k, w 128x128
    dx = quantize(dy) . quantize(w)^T     dy 1x128 along n, the same weight blocks
    dw = columns(x) . columns(dy)         both 1x128 along the tokens, quantized from the high-precision arrays

DESIGN: straight-through gradients of DeepSeek-V3's recipe (arXiv 2412.19437, section 3.3).
"""

from __future__ import annotations

import functools

import jax
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
from .._primitives.once import differentiable_once
from .._primitives.operation import Operation
from ..kernels import quantize as qt
from ..kernels.gemm import product
from ..kernels.named import named, scale_dims_of
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


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _dot(call: Call, types, x, w, *quantized):
    return _dot_body(x, w, *quantized, call=call)


def _dot_fwd(call: Call, types, x, w, *quantized):
    x_dims, w_dims = call.ins[:2]
    fmt = forward_format(call.get("recipe"))
    nt, nn = quantized_weight(w, w_dims, quantized, fmt)
    rows, columns = qt.rows_and_columns(x, x_dims, _tokens(call), fmt)
    residuals = save(nn, keep=not quantized), save(columns)
    return _forward(rows, nt, call), residuals


def _dot_bwd(call: Call, types, residuals, cotangents):
    (x_dims, w_dims), (out,) = call.ins[:2], call.outs
    recipe: Recipe = call.get("recipe")
    forward, gradient = forward_format(recipe), gradient_format(recipe)
    (x_type, w_type, *quantized), (dy,) = types, cotangents
    k, n = w_dims[-2:]
    nn_dtype = WeightCopies(*quantized).nn.dtype if quantized else forward.dtype
    nn = load(residuals[0], nn_dtype, w_dims, SQUARE)
    dy_rows, dy_columns = qt.rows_and_columns(dy, out, _tokens(call), gradient)

    # A weight-only batch dimension is summed here; every other sum is a contraction of the kernel.
    dx_dims = out[:-1] + (k,)
    wanted = explicit_axes(x_type, x_dims)
    options = result_options(recipe)
    dx = product(dy_rows, nn, dx_dims, x_type.dtype, wanted=wanted, **options)
    dx = sum_to(dx, dx_dims, x_dims)

    tokens = dy_columns.dims[dy_columns.dims.index(n) + 1 :]
    dims = tuple(d for d in x_dims[:-1] if d in w_dims) + (k,) + tokens
    columns = load(residuals[1], forward.dtype, dims, ROW)
    wanted = explicit_axes(w_type, w_dims)
    made, options = recipe.made_in(w_type.dtype), weight_gradient_options(recipe)
    dw = product(columns, dy_columns, w_dims, made, wanted=wanted, **options)
    return like_primal(dx, x_type), like_primal(dw, w_type), *(None for _ in quantized)


_dot.defvjp(*differentiable_once("linear, dot_general and einsum", _dot_fwd, _dot_bwd))


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
    derivative=lambda call, *arrays: _dot(call, tuple(map(jax.typeof, arrays)), *arrays),
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
