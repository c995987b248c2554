"""An MLP of dense rows and its gradient."""

from __future__ import annotations

import functools

import jax
from jax.ad_checkpoint import checkpoint_name

from .._arrays.blocks import ROW
from .._arrays.recipe import (
    Recipe,
    forward_format,
    gradient_format,
    result_options,
    weight_gradient_options,
)
from .._primitives.call import Call
from .._primitives.leaf import once
from .._primitives.mesh import explicit_axes, like_primal
from .._primitives.once import first_derivative
from .._primitives.operation import Operation
from ..kernels import activation as act
from ..kernels import quantize as qt
from ..kernels.activation import TWO
from ..kernels.gated import gated_gemm_operation
from ..kernels.gemm import product
from ..kernels.named import Named
from ._dot import sum_to
from ._mlp_weights import load_weights, quantize_weights, weight_operands
from ._residuals import PRE_ACTIVATION_NAME, load, save


def _lead(call: Call):
    """The leading dimensions of h: those that x or w_up has."""
    x_dims, up_dims = call.ins[:2]
    return tuple(d for d in call.outs[0][:-1] if d in x_dims or d in up_dims)


def _hidden_dims(call: Call):
    up_dims = call.ins[1]
    return _lead(call) + up_dims[up_dims.index("k") + 1 :]


def _up_tokens(call: Call):
    return tuple(d for d in _lead(call) if d not in call.ins[1])


def _down_tokens(call: Call):
    return tuple(d for d in _lead(call) if d not in call.ins[2])


def _product(call: Call, *operands, **options):
    """A product of activations or of their gradients."""
    options |= result_options(call.get("recipe"))
    return product(*operands, **options)


def _weight_gradient(call: Call, lhs, rhs, dims, type_, **options):
    recipe: Recipe = call.get("recipe")
    options |= weight_gradient_options(recipe)
    wanted = explicit_axes(type_, dims)
    dw = product(lhs, rhs, dims, recipe.made_in(type_.dtype), wanted=wanted, **options)
    return like_primal(dw, type_)


def _hidden(x_rows, up_nt, call: Call):
    multiply = functools.partial(_product, call, operation=gated_gemm_operation)
    return once(multiply(x_rows, up_nt, _hidden_dims(call), call.get("hidden_dtype")))


def _result(rows, down_nt, call: Call):
    dtype = call.get("out_dtype")
    return [once(_product(call, rows, down_nt, call.outs[0], dtype, wanted=call.wanted))]


def _mlp_body(x, w_up, w_down, *quantized, call: Call):
    fmt = forward_format(call.get("recipe"))
    up_nt, _, down_nt, _ = quantize_weights(w_up, w_down, quantized, call)
    h = _hidden(qt.rows(x, call.ins[0], fmt), up_nt, call)
    rows = act.activation_rows(h, _hidden_dims(call), fmt, call.get("activation"))
    return _result(rows, down_nt, call)


X, UP, DOWN = 0, 1, 2
"""Positions of the operands whose gradients may be asked for."""


def saved_weights(up_nn, down_nn, moving, quantized, inner):
    """What input gradients multiply with: w_up for x, w_down for the hidden layer (`inner`)."""
    keep = not quantized
    up = save(up_nn, keep=keep) if X in moving else None
    return up, save(down_nn, keep=keep) if inner else None


def _mlp_fwd(call: Call, types, moving, x, w_up, w_down, *quantized):
    fmt = forward_format(call.get("recipe"))
    up_nt, up_nn, down_nt, down_nn = quantize_weights(w_up, w_down, quantized, call)
    x_rows, x_columns = qt.rows_and_columns(
        x, call.ins[0], _up_tokens(call), fmt, with_columns=UP in moving
    )
    h = checkpoint_name(_hidden(x_rows, up_nt, call), PRE_ACTIVATION_NAME)
    h_dims, activation = _hidden_dims(call), call.get("activation")
    if DOWN in moving:
        tokens = _down_tokens(call)
        rows, columns = act.activation_rows_and_columns(h, h_dims, tokens, fmt, activation)
    else:
        rows, columns = act.activation_rows(h, h_dims, fmt, activation), None
    inner = moving & {X, UP}
    weights = saved_weights(up_nn, down_nn, moving, quantized, inner)
    residuals = *weights, save(x_columns), save(columns), h if inner else None
    return _result(rows, down_nt, call), residuals


def _columns_of(saved, dtype, batch, last, tokens_like: Named):
    """Saved columns, whose token dimensions are those of the columns that they are multiplied with."""
    dims = tokens_like.dims
    at = max(i for i, d in enumerate(dims) if d in ("k", "f", "n"))
    dims = batch + last + dims[at + 1 :]
    return load(saved, dtype, dims, ROW)


def _hidden_gradient(call: Call, h, dy_rows, down_nn):
    """Gradient of the activation, in high precision."""
    out, dims = call.outs[0][:-1] + ("f",), _lead(call) + ("f",)
    # A weight-only batch dimension is summed here; every other sum is a contraction of the kernel.
    wanted = explicit_axes(jax.typeof(h), _hidden_dims(call))
    wanted = tuple(w for w in wanted if w[0] != TWO)
    da = _product(call, dy_rows, down_nn, out, call.get("hidden_dtype"), wanted=wanted)
    return sum_to(da, out, dims)


def _input_gradient(call: Call, x_type, dh_rows, up_nn):
    dims, x_dims = _lead(call) + ("k",), call.ins[0]
    options = {"wanted": explicit_axes(x_type, x_dims), "operation": gated_gemm_operation}
    dx = _product(call, dh_rows, up_nn, dims, x_type.dtype, **options)
    return like_primal(sum_to(dx, dims, x_dims), x_type)


def _mlp_bwd(call: Call, types, moving, residuals, cotangents):
    (x_dims, up_dims, down_dims), (out,) = call.ins[:3], call.outs
    recipe: Recipe = call.get("recipe")
    forward, gradient = forward_format(recipe).dtype, gradient_format(recipe)
    (x_type, up_type, down_type, *quantized), (dy,) = types, cotangents
    saved_up, saved_down, saved_x, saved_columns, h = residuals
    up_nn, down_nn = load_weights(saved_up, saved_down, quantized, call)
    dx = dw_up = dw_down = None

    inner = bool(moving & {X, UP})
    dy_rows, dy_columns = qt.rows_and_columns(
        dy, out, _down_tokens(call), gradient, with_rows=inner, with_columns=DOWN in moving
    )
    if DOWN in moving:
        batch = tuple(d for d in _lead(call) if d in down_dims)
        columns = _columns_of(saved_columns, forward, batch, ("f",), dy_columns)
        dw_down = _weight_gradient(call, columns, dy_columns, down_dims, down_type)
    if inner:
        da = _hidden_gradient(call, h, dy_rows, down_nn)
        dh_rows, dh_columns = act.activation_grad(
            h, _hidden_dims(call), da, _up_tokens(call), gradient, call.get("activation")
        )
    if X in moving:
        dx = _input_gradient(call, x_type, dh_rows, up_nn)
    if UP in moving:
        batch = tuple(d for d in x_dims[:-1] if d in up_dims)
        columns = _columns_of(saved_x, forward, batch, ("k",), dh_columns)
        of_up = {"operation": gated_gemm_operation}
        dw_up = _weight_gradient(call, columns, dh_columns, up_dims, up_type, **of_up)
    return dx, dw_up, dw_down, *(None for _ in quantized)


mlp_operation = Operation(
    "jaxfp8_mlp",
    _mlp_body,
    together=weight_operands(3),
    derivative=first_derivative("mlp", _mlp_body, _mlp_fwd, _mlp_bwd),
)
