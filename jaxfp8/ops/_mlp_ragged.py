"""An MLP for each group of rows and its gradient."""

from __future__ import annotations

from jax.ad_checkpoint import checkpoint_name

from .._arrays.blocks import ROW
from .._arrays.recipe import forward_format, gradient_format, result_options
from .._primitives.call import Call
from .._primitives.leaf import once
from .._primitives.mesh import like_primal
from .._primitives.once import first_derivative
from .._primitives.operation import Operation
from ..kernels import activation as act
from ..kernels import quantize as qt
from ..kernels.activation import TWO
from ..kernels.gated import gated_grouped_operation, gated_grouped_wgrad_operation
from ..kernels.grouped_gemm import grouped_operation, grouped_product, grouped_wgrad_operation
from ._dot import sum_to
from ._mlp_dense import DOWN, UP, X, saved_weights
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


def _ragged_fwd(call: Call, types, moving, x, w_up, w_down, sizes, *quantized):
    x_dims, _, _, sizes_dims = call.ins[:4]
    fmt = forward_format(call.get("recipe"))
    up_nt, up_nn, down_nt, down_nn = quantize_weights(w_up, w_down, quantized, call)
    x_rows, x_columns = qt.ragged_rows_and_columns(
        x, x_dims, sizes, sizes_dims, fmt, with_columns=UP in moving
    )
    h = checkpoint_name(_ragged_hidden(x_rows, up_nt, sizes, call), PRE_ACTIVATION_NAME)
    h_dims, activation = _hidden_dims_ragged(call), call.get("activation")
    if DOWN in moving:
        rows, columns = act.ragged_activation(h, h_dims, sizes, sizes_dims, fmt, activation)
    else:
        rows, columns = act.activation_rows(h, h_dims, fmt, activation), None
    inner = moving & {X, UP}
    weights = saved_weights(up_nn, down_nn, moving, quantized, inner)
    residuals = *weights, save(x_columns), save(columns), h if inner else None, sizes
    return _ragged_result(rows, down_nt, sizes, call), residuals


def _saved_columns(call: Call, saved, lead, last):
    dims = tuple(dict.fromkeys(call.ins[3][:-1] + lead)) + (last, "t")
    return load(saved, forward_format(call.get("recipe")).dtype, dims, ROW)


def _weight_gradient(call: Call, operation, columns, grad_columns, sizes, dims, w_dims, type_):
    """The results of a vmapped kernel have every batch dimension; those that a weight lacks are summed."""
    made = call.get("recipe").made_in(type_.dtype)
    dw = _ragged_product(operation, columns, grad_columns, sizes, call, dims, made)
    return like_primal(sum_to(dw, dims, w_dims), type_)


def _hidden_gradient(call: Call, dy_rows, down_nn, sizes):
    """Gradient of the activation, in high precision."""
    dims, dtype = call.outs[0][:-1] + ("f",), call.get("hidden_dtype")
    da = _ragged_product(grouped_operation, dy_rows, down_nn, sizes, call, dims, dtype)
    return sum_to(da, dims, tuple(d for d in _hidden_dims_ragged(call) if d != TWO))


def _ragged_bwd(call: Call, types, moving, residuals, cotangents):
    (x_dims, up_dims, down_dims, sizes_dims), (out,) = call.ins[:4], call.outs
    gradient = gradient_format(call.get("recipe"))
    (x_type, up_type, down_type, _, *quantized), (dy,) = types, cotangents
    saved_up, saved_down, saved_x, saved_columns, h, sizes = residuals
    h_dims = _hidden_dims_ragged(call)
    lead = h_dims[: h_dims.index("m")]
    up_nn, down_nn = load_weights(saved_up, saved_down, quantized, call)
    dx = dw_up = dw_down = None

    inner = bool(moving & {X, UP})
    which = {"with_rows": inner, "with_columns": DOWN in moving}
    dy_rows, dy_columns = qt.ragged_rows_and_columns(dy, out, sizes, sizes_dims, gradient, **which)
    if DOWN in moving:
        columns = _saved_columns(call, saved_columns, lead, "f")
        dims = tuple(d for d in out if d[0] == "v") + ("g", "f", "n")
        of_down = columns, dy_columns, sizes, dims, down_dims, down_type
        dw_down = _weight_gradient(call, grouped_wgrad_operation, *of_down)
    if inner:
        da = _hidden_gradient(call, dy_rows, down_nn, sizes)
        dh_rows, dh_columns = act.ragged_activation_grad(
            h, h_dims, da, sizes, sizes_dims, gradient, call.get("activation")
        )
    if X in moving:
        dims, dtype = lead + ("m", "k"), x_type.dtype
        dx = _ragged_product(gated_grouped_operation, dh_rows, up_nn, sizes, call, dims, dtype)
        dx = like_primal(sum_to(dx, dims, x_dims), x_type)
    if UP in moving:
        columns = _saved_columns(call, saved_x, x_dims[:-2], "k")
        dims = lead + ("g", "k") + up_dims[up_dims.index("k") + 1 :]
        of_up = columns, dh_columns, sizes, dims, up_dims, up_type
        dw_up = _weight_gradient(call, gated_grouped_wgrad_operation, *of_up)
    return dx, dw_up, dw_down, None, *(None for _ in quantized)


ragged_mlp_operation = Operation(
    "jaxfp8_ragged_mlp",
    _ragged_body,
    together=weight_operands(4),
    derivative=first_derivative("ragged_mlp", _ragged_body, _ragged_fwd, _ragged_bwd),
)
