"""An MLP for each group of rows and its gradient."""

from __future__ import annotations

import functools

import jax
from jax.ad_checkpoint import checkpoint_name

from .._arrays.blocks import ROW
from .._arrays.recipe import Recipe, forward_format, gradient_format, result_options
from .._primitives.call import Call
from .._primitives.leaf import once
from .._primitives.mesh import like_primal
from .._primitives.once import differentiable_once
from .._primitives.operation import Operation
from ..kernels import activation as act
from ..kernels import quantize as qt
from ..kernels.gated import gated_grouped_operation, gated_grouped_wgrad_operation
from ..kernels.grouped_gemm import grouped_operation, grouped_product, grouped_wgrad_operation
from ._dot import sum_to
from ._mlp_weights import load_weights, quantize_weights, weight_operands
from ._residuals import PRE_ACTIVATION_NAME, load, save


def _ragged_product(operation, lhs, rhs, sizes, call: Call, out, out_dtype):
    options = result_options(call.get("recipe"))
    return grouped_product(operation, lhs, rhs, sizes, call.ins[3], out, out_dtype, **options)


def _ragged_hidden(x_rows, up_nt, sizes, call: Call):
    dims, dtype = _hidden_dims_ragged(call), call.get("hidden_dtype")
    return once(_ragged_product(gated_grouped_operation, x_rows, up_nt, sizes, call, dims, dtype))


def _hidden_dims_ragged(call: Call):
    x_dims, up_dims, _, sizes_dims = call.ins[:4]
    new = (*x_dims[:-2], *up_dims[: up_dims.index("g")], *sizes_dims[:-1])
    lead = tuple(d for d in call.outs[0][:-2] if d in new)
    return lead + ("m",) + up_dims[up_dims.index("k") + 1 :]


def _ragged_result(rows, down_nt, sizes, call: Call):
    out, dtype = call.outs[0], call.get("out_dtype")
    return [once(_ragged_product(grouped_operation, rows, down_nt, sizes, call, out, dtype))]


def _ragged_body(x, w_up, w_down, sizes, *quantized, call: Call):
    fmt = forward_format(call.get("recipe"))
    up_nt, _, down_nt, _ = quantize_weights(w_up, w_down, quantized, call)
    h = _ragged_hidden(qt.rows(x, call.ins[0], fmt), up_nt, sizes, call)
    rows = act.activation_rows(h, _hidden_dims_ragged(call), fmt, call.get("activation"))
    return _ragged_result(rows, down_nt, sizes, call)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _ragged_mlp(call: Call, types, x, w_up, w_down, sizes, *quantized):
    return _ragged_body(x, w_up, w_down, sizes, *quantized, call=call)


def _ragged_fwd(call: Call, types, x, w_up, w_down, sizes, *quantized):
    x_dims, _, _, sizes_dims = call.ins[:4]
    fmt = forward_format(call.get("recipe"))
    up_nt, up_nn, down_nt, down_nn = quantize_weights(w_up, w_down, quantized, call)
    x_rows, x_columns = qt.ragged_rows_and_columns(x, x_dims, sizes, sizes_dims, fmt)
    h = checkpoint_name(_ragged_hidden(x_rows, up_nt, sizes, call), PRE_ACTIVATION_NAME)
    rows, columns = act.ragged_activation(
        h, _hidden_dims_ragged(call), sizes, sizes_dims, fmt, call.get("activation")
    )
    weights = (save(w, keep=not quantized) for w in (up_nn, down_nn))
    residuals = *weights, save(x_columns), save(columns), h, sizes
    return _ragged_result(rows, down_nt, sizes, call), residuals


def _ragged_bwd(call: Call, types, residuals, cotangents):
    (x_dims, up_dims, down_dims, sizes_dims), (out,) = call.ins[:4], call.outs
    recipe: Recipe = call.get("recipe")
    forward, gradient = forward_format(recipe), gradient_format(recipe)
    (x_type, up_type, down_type, _, *quantized), (dy,) = types, cotangents
    saved_up, saved_down, saved_x, saved_columns, h, sizes = residuals
    h_dims = _hidden_dims_ragged(call)
    lead = h_dims[: h_dims.index("m")]
    up_nn, down_nn = load_weights(saved_up, saved_down, quantized, call)
    multiply = functools.partial(_ragged_product, sizes=sizes, call=call)

    def saved_tokens(saved, *dims):
        new = tuple(dict.fromkeys(sizes_dims[:-1] + dims[:-1]))
        dims = new + (dims[-1], "t")
        return load(saved, forward.dtype, dims, ROW)

    dy_rows, dy_columns = qt.ragged_rows_and_columns(dy, out, sizes, sizes_dims, gradient)
    dims = out[:-1] + ("f",)
    da = multiply(grouped_operation, dy_rows, down_nn, out=dims, out_dtype=call.get("hidden_dtype"))
    da = sum_to(da, dims, lead + ("m", "f"))

    # The results of a vmapped kernel have every batch dimension; those that a weight lacks are summed.
    batch = tuple(d for d in out if d[0] == "v")
    columns = saved_tokens(saved_columns, *lead, "f")
    dims = batch + ("g", "f", "n")
    made = recipe.made_in(down_type.dtype)
    dw_down = multiply(grouped_wgrad_operation, columns, dy_columns, out=dims, out_dtype=made)
    dw_down = sum_to(dw_down, dims, down_dims)

    dh_rows, dh_columns = act.ragged_activation_grad(
        h, h_dims, da, sizes, sizes_dims, gradient, call.get("activation")
    )
    dims = lead + ("m", "k")
    dx = multiply(gated_grouped_operation, dh_rows, up_nn, out=dims, out_dtype=x_type.dtype)
    dx = sum_to(dx, dims, x_dims)

    x_columns = saved_tokens(saved_x, *x_dims[:-2], "k")
    dims = lead + ("g", "k") + up_dims[up_dims.index("k") + 1 :]
    made = recipe.made_in(up_type.dtype)
    dw_up = multiply(gated_grouped_wgrad_operation, x_columns, dh_columns, out=dims, out_dtype=made)
    dw_up = sum_to(dw_up, dims, up_dims)
    return (
        like_primal(dx, x_type),
        like_primal(dw_up, up_type),
        like_primal(dw_down, down_type),
        None,
        *(None for _ in quantized),
    )


_ragged_mlp.defvjp(*differentiable_once("ragged_mlp", _ragged_fwd, _ragged_bwd))

ragged_mlp_operation = Operation(
    "jaxfp8_ragged_mlp",
    _ragged_body,
    together=weight_operands(4),
    derivative=lambda call, *arrays: _ragged_mlp(call, tuple(map(jax.typeof, arrays)), *arrays),
)
