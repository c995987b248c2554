"""moe: a mixture of experts from the router's choice to the output, in FP8 all the way.

    rows of x            gathered in order of expert and quantized, one primitive
    h  = rows . w_up                          of each row's expert, bfloat16 or float32
    z  = quantize(gate * a(h))                the gate multiplies in float32, before the only rounding
    y  = sum of a token's rows of z . w_down  in the order of its choices, float32

    rows of dy           gathered and quantized likewise, without gates
    dz = rows . w_down^T
    dh = quantize(gate * a'(h) dz), dgate = dz . a(h)         one kernel
    dx = sum of a token's rows of dh . w_up^T
    dw_down = columns(gate * a(h)) . columns(dy), dw_up = columns(x) . columns(dh)

DeepSeek-V3's recipe (arXiv 2412.19437, section 3.3) as `ragged_mlp` has it. The gate is inside the quantized rows,
where a block's scale takes it up, so the second product gives rows that only need to be added, and nothing of the size
of the output's rows is kept for the gates' gradient.
"""

from __future__ import annotations

import contextlib
import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from .._arrays.blocks import ROW
from .._arrays.recipe import forward_format, gradient_format, result_options
from .._primitives.call import Call
from .._primitives.leaf import once
from .._primitives.mesh import like_primal, match_varying, whole
from .._primitives.once import first_derivative
from .._primitives.operation import Operation
from ..kernels import activation as act
from ..kernels import gather
from ..kernels import quantize as qt
from ..kernels.gated import gated_grouped_operation, gated_grouped_wgrad_operation
from ..kernels.gather import take_rows
from ..kernels.grouped_gemm import grouped_operation, grouped_product, grouped_wgrad_operation
from ..kernels.named import Named, named
from ..kernels.sum_rows import sum_rows
from ._exchange import collect, plan_exchange, spread
from ._mlp_dense import DOWN, UP, X, saved_weights
from ._mlp_weights import load_weights, quantize_weights, weight_operands
from ._residuals import PRE_ACTIVATION_NAME, RESIDUAL_NAME, load, save
from ._routing import plan
from ._traffic import explained

# Dimensions: s tokens with j choices each, m rows in g groups, t the group-padded token axis; k, f, n as in mlp.
SIZES, ROWS, POSITION = ("g",), ("m",), ("s", "j")


class _Rows(NamedTuple):
    """Where each row comes from and goes to, and its gate."""

    source: jax.Array
    position: jax.Array
    sizes: jax.Array
    gate: jax.Array  # float32 (m,)


def _hidden_dims(call: Call):
    up_dims = call.ins[1]
    return ("m", *up_dims[up_dims.index("k") + 1 :])


def _exchange(expert, call: Call):
    """How tokens reach other devices, None for one device; and the experts of each token that is present here."""
    if call.get("axis_name") is None:
        return None, expert
    return plan_exchange(
        "moe",
        expert,
        call.get("experts"),
        call.get("axis_name"),
        call.get("strategy"),
        call.get("max_sent"),
    )


def _tokens(x, dims, exchange, fmt, *more):
    """What rows are gathered from: x, or with an exchange the FP8 rows of all tokens present here; and `more` of them.

    A token is then quantized once and sent once, and its columns are made from the row that came.
    """
    if exchange is None:
        return x, *more
    q = qt.rows(x, dims, fmt).array
    bits = lax.bitcast_convert_type(q.data, jnp.uint8)
    bits, scale, *others = spread(exchange, bits, q.scale, *more)
    return named(lax.bitcast_convert_type(bits, fmt.dtype), scale, dims), *others


def _rows(tokens, dims, at: _Rows, fmt) -> Named:
    if isinstance(tokens, Named):
        return gather.fp8_rows(tokens, at.source, ROWS)
    return gather.rows(tokens, dims, at.source, ROWS, fmt)


def _copies(tokens, dims, at: _Rows, fmt, *, with_columns):
    """Rows and columns of the tokens' rows, from one read; None in the columns' place where they are not wanted."""
    if not with_columns:
        return _rows(tokens, dims, at, fmt), None
    if isinstance(tokens, Named):
        return gather.fp8_rows_and_columns(tokens, at.source, ROWS, at.sizes, SIZES, fmt.pow2)
    return gather.rows_and_columns(tokens, dims, at.source, ROWS, at.sizes, SIZES, fmt)


def _plan(exchange, expert, gate, call: Call) -> _Rows:
    """The rows of the tokens present here, whose experts and gates are (s, j)."""
    experts = call.get("experts") if exchange is None else exchange.experts
    rows = plan(expert, experts, call.get("max_rows"))
    source, position, copy = rows.source, rows.position, rows.copy
    if exchange is not None:
        source, position = exchange.present(source), exchange.by_presence(position)
        copy = source * expert.shape[1] + copy % expert.shape[1]
    return _Rows(source, position, rows.group_sizes, take_rows(gate.reshape(-1), copy))


def _explained(x, exchange, expert, call: Call):
    if exchange is None:
        return contextlib.nullcontext()
    return explained("moe", exchange, x.shape[1], 1, expert.shape[1], max_rows=call.get("max_rows"))


def _arrive(x, expert, gate, fmt, call: Call):
    """The exchange, what rows are gathered from, and the rows."""
    exchange, here = _exchange(expert, call)
    with _explained(x, exchange, here, call):
        tokens, gate = _tokens(x, ("s", "k"), exchange, fmt, gate.astype(jnp.float32))
    at = _plan(exchange, here, gate, call)
    return exchange, tokens, at


def _multiply(call: Call, sizes):
    options = result_options(call.get("recipe"))
    return functools.partial(grouped_product, sizes=sizes, sizes_dims=SIZES, **options)


def _result(rows: Named, down_nt, at: _Rows, exchange, call: Call):
    dtype = call.get("hidden_dtype")
    y = _multiply(call, at.sizes)(grouped_operation, rows, down_nt, out=("m", "n"), out_dtype=dtype)
    y = sum_rows(y, ("m", "n"), at.position, POSITION, call.get("out_dtype"))
    if exchange is not None:
        (y,) = collect(exchange, y, lost=math.nan)
    return [once(y)]


def _hidden(x_rows, up_nt, at: _Rows, call: Call):
    dims, dtype = _hidden_dims(call), call.get("hidden_dtype")
    multiply = _multiply(call, at.sizes)
    return once(multiply(gated_grouped_operation, x_rows, up_nt, out=dims, out_dtype=dtype))


def _body(x, w_up, w_down, expert, gate, *quantized, call: Call):
    fmt = forward_format(call.get("recipe"))
    up_nt, _, down_nt, _ = quantize_weights(w_up, w_down, quantized, call)
    exchange, tokens, at = _arrive(x, expert, gate, fmt, call)
    x_rows = _rows(tokens, ("s", "k"), at, fmt)
    h = _hidden(x_rows, up_nt, at, call)
    rows = act.weighted_activation_rows(
        h, _hidden_dims(call), at.gate, ROWS, fmt, call.get("activation")
    )
    return _result(rows, down_nt, at, exchange, call)


GATE = 4
"""Position of the gates, whose gradient may be asked for beside those of `X`, `UP` and `DOWN`."""


def _fwd(call: Call, types, moving, x, w_up, w_down, expert, gate, *quantized):
    fmt = forward_format(call.get("recipe"))
    up_nt, up_nn, down_nt, down_nn = quantize_weights(w_up, w_down, quantized, call)
    exchange, tokens, at = _arrive(x, expert, gate, fmt, call)
    at = _Rows(*(checkpoint_name(v, RESIDUAL_NAME) for v in at))
    x_rows, x_columns = _copies(tokens, ("s", "k"), at, fmt, with_columns=UP in moving)
    h = checkpoint_name(_hidden(x_rows, up_nt, at, call), PRE_ACTIVATION_NAME)
    weighted = h, _hidden_dims(call), at.gate, ROWS
    if DOWN in moving:
        rows, columns = act.ragged_weighted_activation(
            *weighted, at.sizes, SIZES, fmt, call.get("activation")
        )
    else:
        rows, columns = act.weighted_activation_rows(*weighted, fmt, call.get("activation")), None
    inner = moving & {X, UP, GATE}
    weights = saved_weights(up_nn, down_nn, moving, quantized, inner)
    residuals = *weights, save(x_columns), save(columns), h if inner else None, at, exchange
    return _result(rows, down_nt, at, exchange, call), residuals


def _hidden_gradient(call: Call, h, dy_rows, down_nn, at: _Rows):
    """Gradients of the hidden layer, rows and columns, and of the gates of rows."""
    dims, dtype = ("m", "f"), call.get("hidden_dtype")
    dz = _multiply(call, at.sizes)(grouped_operation, dy_rows, down_nn, out=dims, out_dtype=dtype)
    return act.ragged_weighted_activation_grad(
        h,
        _hidden_dims(call),
        dz,
        dims,
        at.gate,
        ROWS,
        at.sizes,
        SIZES,
        gradient_format(call.get("recipe")),
        call.get("activation"),
    )


def _token_gradients(call: Call, types, moving, dh_rows, dgate, up_nn, at: _Rows, exchange):
    """Gradients of x and of the gates, None where none is asked for."""
    # A copy that found no row has no gradient; its token is NaN already.
    position = jnp.where(at.position < at.source.size, at.position, -1)
    found = {}
    if X in moving:
        multiply, dtype = _multiply(call, at.sizes), call.get("hidden_dtype")
        dx = multiply(gated_grouped_operation, dh_rows, up_nn, out=("m", "k"), out_dtype=dtype)
        found[X] = sum_rows(dx, ("m", "k"), position, POSITION, types[X].dtype)
    if GATE in moving:
        found[GATE] = take_rows(dgate, position.reshape(-1)).reshape(position.shape)
    if exchange is not None and found:
        found = dict(zip(found, collect(exchange, *found.values()), strict=True))
    return tuple(
        like_primal(found[i].astype(types[i].dtype), types[i]) if i in found else None
        for i in (X, GATE)
    )


def _weight_gradient(call: Call, operation, saved, dim, grad_columns, at: _Rows, out, type_):
    columns = load(saved, forward_format(call.get("recipe")).dtype, (dim, "t"), ROW)
    multiply = _multiply(call, at.sizes)
    dw = multiply(operation, columns, grad_columns, out=out, out_dtype=type_.dtype)
    return like_primal(dw, type_)


def _bwd(call: Call, types, moving, residuals, cotangents):
    gradient = gradient_format(call.get("recipe"))
    (_, up_type, down_type, _, _, *quantized), (dy,) = types, cotangents
    saved_up, saved_down, saved_x, saved_columns, h, at, exchange = residuals
    up_nn, down_nn = load_weights(saved_up, saved_down, quantized, call)
    dx = dw_up = dw_down = dgate = None

    inner = bool(moving & {X, UP, GATE})
    (tokens,) = _tokens(dy, ("s", "n"), exchange, gradient)
    dy_rows, dy_columns = _copies(tokens, ("s", "n"), at, gradient, with_columns=DOWN in moving)
    if DOWN in moving:
        of_down = saved_columns, "f", dy_columns, at, call.ins[2], down_type
        dw_down = _weight_gradient(call, grouped_wgrad_operation, *of_down)
    if inner:
        dh_rows, dh_columns, dgate = _hidden_gradient(call, h, dy_rows, down_nn, at)
        gradients = dh_rows, dgate, up_nn, at, exchange
        dx, dgate = _token_gradients(call, types, moving, *gradients)
    if UP in moving:
        of_up = saved_x, "k", dh_columns, at, call.ins[1], up_type
        dw_up = _weight_gradient(call, gated_grouped_wgrad_operation, *of_up)
    return dx, dw_up, dw_down, None, dgate, *(None for _ in quantized)


class _MoeOperation(Operation):
    """vmap makes one larger mixture: of more tokens, and where it maps weights, of more experts."""

    def _batch(self, arrays, axes, *, call, jaxpr):
        size = next(x.shape[a] for x, a in zip(arrays, axes, strict=True) if a is not None)
        if size == 0:
            empty = [jnp.zeros((0, *v.shape), v.dtype) for v in jaxpr.out_avals]
            return match_varying([*empty, *arrays])[: len(empty)], [0] * len(empty)
        mapped_weights = any(a is not None for a in (*axes[1:3], *axes[5:]))
        folded = []
        for i, (x, axis) in enumerate(zip(arrays, axes, strict=True)):
            if i not in (0, 3, 4) and not mapped_weights:
                folded.append(x)
                continue
            x = jnp.moveaxis(x, axis, 0) if axis is not None else x
            x = whole(x if axis is not None else jnp.broadcast_to(x, (size, *x.shape)))
            if i == 3 and mapped_weights:
                # Each device has its experts of each example side by side.
                experts, own = call.get("experts"), arrays[1].shape[1 if axes[1] is not None else 0]
                example = jnp.arange(size, dtype=jnp.int32)[:, None, None]
                inside = (x >= 0) & (x < experts)
                x = jnp.where(inside, x, 0).astype(jnp.int32)
                x = jnp.where(inside, (x // own * size + example) * own + x % own, -1)
            folded.append(x.reshape(size * x.shape[1], *x.shape[2:]))
        if mapped_weights:
            call = call.with_attribute("experts", size * call.get("experts"))
        if call.get("max_rows") is not None:
            call = call.with_attribute("max_rows", size * call.get("max_rows"))
        (y,) = self(*folded, call=call)
        return [y.reshape(size, y.shape[0] // size, *y.shape[1:])], [0]


moe_operation = _MoeOperation(
    "jaxfp8_moe",
    _body,
    together=weight_operands(5),
    derivative=first_derivative("moe", _body, _fwd, _bwd),
)
