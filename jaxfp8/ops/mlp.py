"""mlp and ragged_mlp: two products with an activation between, which is never stored in high precision.

    h  = quantize(x) . quantize(w_up)                  h in bfloat16 or float32
    y  = quantize(a(h)) . quantize(w_down)             one kernel reads h and writes both copies of a(h)
    dh = a'(h) (quantize(dy) . quantize(w_down)^T)     one kernel reads h and da and writes both copies of dh
    dx = quantize(dh) . quantize(w_up)^T
    dw_down = columns(a(h)) . columns(dy), dw_up = columns(x) . columns(dh)

Straight-through gradients of DeepSeek-V3's recipe (arXiv 2412.19437, section 3.3), as of two `linear`; but the
activation and its gradient are quantized from float32, not from bfloat16.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from .._arrays import checks
from .._arrays.blocks import BLOCK
from .._arrays.recipe import Recipe, current_recipe
from .._primitives.leaf import once
from .._primitives.mesh import explicit_axes, like_primal, place
from .._primitives.once import differentiable_once
from .._primitives.operation import Call, Operation
from .._primitives.partition import Kernel
from ..kernels import activation as act
from ..kernels import quantize as qt
from ..kernels.activation import ACTIVATIONS, TWO, gated
from ..kernels.gemm import gemm_kernel, product
from ..kernels.grouped_gemm import grouped_kernel, grouped_product, grouped_wgrad_kernel
from ._dot import out_spec, quantized_weight, result_dtype, sum_to, weight_dims
from ._residuals import PRE_ACTIVATION_NAME, load, save
from .prequantize import parts, prequantize

# --------------------------------------------------------------------------------------------------
# Kernels of gate and up: the same products and the same quantizer, where both are one f
# --------------------------------------------------------------------------------------------------


def _gated(kernel: Kernel, name) -> Kernel:
    pinned = (*kernel.pinned, TWO)
    return Kernel(name, gated(kernel.local), pinned=pinned, together=kernel.together)


gated_gemm_kernel = _gated(gemm_kernel, "jaxfp8_gemm_gated")
gated_grouped_kernel = _gated(grouped_kernel, "jaxfp8_grouped_gemm_gated")
gated_grouped_wgrad_kernel = _gated(grouped_wgrad_kernel, "jaxfp8_grouped_wgrad_gemm_gated")
gated_weight_kernel = _gated(qt.weight_kernel, "jaxfp8_quantize_weight_gated")


def _up_dims(dims):
    """Dimensions of the transpose of w_up (..., k, [two,] f)."""
    at = dims.index("k")
    return dims[:at] + dims[at + 1 :] + ("k",)


def _up_scale_dims(dims):
    return tuple(d + "/" if d in ("k", "f") else d for d in dims)


def _quantized_up_dims(dims):
    """Dimensions of what `quantized` gives of w_up: data and scales of (..., [two,] f, k), then of w_up's own order."""
    nt = _up_dims(dims)
    return nt, _up_scale_dims(nt), dims, _up_scale_dims(dims)


def _quantize_up(w, dims, quantized, fmt: qt.Format):
    """w_up (..., k, [two,] f) in both orientations, with 128x128 blocks of k and f; quantized here, or ahead."""
    if quantized:
        nt, nt_scale, nn, nn_scale = quantized
        nt_dims, nt_scale_dims, _, nn_scale_dims = _quantized_up_dims(dims)
        return (
            qt.Named(qt.QuantizedArray(nt, nt_scale, qt.SQUARE), nt_dims, nt_scale_dims),
            qt.Named(qt.QuantizedArray(nn, nn_scale, qt.SQUARE), dims, nn_scale_dims),
        )
    if TWO not in dims:
        return qt.weight(w, dims, fmt)
    nt = _up_dims(dims)
    outs = (dims, _up_scale_dims(dims), nt, _up_scale_dims(nt))
    call = Call((dims,), outs, (("dtype", fmt.dtype), ("pow2", fmt.pow2)))
    nn_data, nn_scale, nt_data, nt_scale = gated_weight_kernel(w, call=call)
    return (
        qt.Named(qt.QuantizedArray(nt_data, nt_scale, qt.SQUARE), nt, outs[3]),
        qt.Named(qt.QuantizedArray(nn_data, nn_scale, qt.SQUARE), dims, outs[1]),
    )


def _weights(w_up, w_down, quantized, call: Call):
    """Both orientations of both weights: of w_up, then of w_down.

    `quantized`: data and scale of each orientation of each, if they were quantized ahead.
    """
    fmt = qt.forward_format(call.get("recipe"))
    up = _quantize_up(w_up, call.ins[1], quantized[:4], fmt)
    return *up, *quantized_weight(w_down, call.ins[2], quantized[4:], fmt)


def _load_weights(saved_up, saved_down, quantized, call: Call):
    """The orientations of the input gradients' products. `quantized`: types of those quantized ahead."""
    up_dims, down_dims = call.ins[1:3]
    here = qt.forward_format(call.get("recipe")).dtype
    up, down = (quantized[2].dtype, quantized[6].dtype) if quantized else (here, here)
    return (
        load(saved_up, up, up_dims, _up_scale_dims(up_dims), qt.SQUARE),
        load(saved_down, down, down_dims, down_dims[:-2] + ("f/", "n/"), qt.SQUARE),
    )


def _weight_operands(first):
    """Positions of each weight and of its quantized copies, of which the first is at `first`."""
    return (1, *range(first, first + 4)), (2, *range(first + 4, first + 8))


# --------------------------------------------------------------------------------------------------
# Dense
# --------------------------------------------------------------------------------------------------


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


def _hidden(x_rows, up_nt, call: Call):
    num_sms = call.get("recipe").num_sms
    dims, dtype = _hidden_dims(call), call.get("hidden_dtype")
    h = product(x_rows, up_nt, dims, dtype, num_sms=num_sms, kernel=gated_gemm_kernel)
    return once(h)


def _result(rows, down_nt, call: Call):
    num_sms, dtype = call.get("recipe").num_sms, call.get("out_dtype")
    y = product(rows, down_nt, call.outs[0], dtype, num_sms=num_sms, wanted=call.wanted)
    return [once(y)]


def _mlp_body(x, w_up, w_down, *quantized, call: Call):
    fmt = qt.forward_format(call.get("recipe"))
    up_nt, _, down_nt, _ = _weights(w_up, w_down, quantized, call)
    h = _hidden(qt.rows(x, call.ins[0], fmt), up_nt, call)
    rows = act.activation_rows(h, _hidden_dims(call), fmt, call.get("activation"))
    return _result(rows, down_nt, call)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _mlp(call: Call, types, x, w_up, w_down, *quantized):
    return _mlp_body(x, w_up, w_down, *quantized, call=call)


def _mlp_fwd(call: Call, types, x, w_up, w_down, *quantized):
    fmt = qt.forward_format(call.get("recipe"))
    up_nt, up_nn, down_nt, down_nn = _weights(w_up, w_down, quantized, call)
    x_rows, x_columns = qt.rows_and_columns(x, call.ins[0], _up_tokens(call), fmt)
    h = checkpoint_name(_hidden(x_rows, up_nt, call), PRE_ACTIVATION_NAME)
    rows, columns = act.activation_rows_and_columns(
        h, _hidden_dims(call), _down_tokens(call), fmt, call.get("activation")
    )
    weights = (save(w, named=not quantized) for w in (up_nn, down_nn))
    residuals = *weights, save(x_columns), save(columns), h
    return _result(rows, down_nt, call), residuals


def _columns_of(saved, dtype, batch, last, tokens_like: qt.Named):
    """Saved columns, whose token dimensions are those of the columns that they are multiplied with."""
    dims = tokens_like.dims
    at = max(i for i, d in enumerate(dims) if d in ("k", "f", "n"))
    dims = batch + last + dims[at + 1 :]
    return load(saved, dtype, dims, dims[:-1] + (dims[-1] + "/",), qt.ROW)


def _mlp_bwd(call: Call, types, residuals, cotangents):
    (x_dims, up_dims, down_dims), (out,) = call.ins[:3], call.outs
    recipe: Recipe = call.get("recipe")
    forward, gradient = qt.forward_format(recipe), qt.gradient_format(recipe)
    (x_type, up_type, down_type, *quantized), (dy,) = types, cotangents
    saved_up, saved_down, saved_x, saved_columns, h = residuals
    lead, h_dims = _lead(call), _hidden_dims(call)
    up_nn, down_nn = _load_weights(saved_up, saved_down, quantized, call)
    multiply = functools.partial(product, num_sms=recipe.num_sms)

    # A weight-only batch dimension is summed here; every other sum is a contraction of the kernel.
    tokens = _down_tokens(call)
    dy_rows, dy_columns = qt.rows_and_columns(dy, out, tokens, gradient)
    da_dims = lead + ("f",)
    wanted = tuple(w for w in explicit_axes(jax.typeof(h), h_dims) if w[0] != TWO)
    da = multiply(dy_rows, down_nn, out[:-1] + ("f",), call.get("hidden_dtype"), wanted=wanted)
    da = sum_to(da, out[:-1] + ("f",), da_dims)

    batch = tuple(d for d in lead if d in down_dims)
    columns = _columns_of(saved_columns, forward.dtype, batch, ("f",), dy_columns)
    wanted = explicit_axes(down_type, down_dims)
    dw_down = multiply(columns, dy_columns, down_dims, down_type.dtype, wanted=wanted)

    dh_rows, dh_columns = act.activation_grad(
        h, h_dims, da, _up_tokens(call), gradient, call.get("activation")
    )
    dx_dims = lead + ("k",)
    multiply = functools.partial(multiply, kernel=gated_gemm_kernel)
    dx = multiply(dh_rows, up_nn, dx_dims, x_type.dtype, wanted=explicit_axes(x_type, x_dims))
    dx = sum_to(dx, dx_dims, x_dims)

    batch = tuple(d for d in x_dims[:-1] if d in up_dims)
    x_columns = _columns_of(saved_x, forward.dtype, batch, ("k",), dh_columns)
    wanted = explicit_axes(up_type, up_dims)
    dw_up = multiply(x_columns, dh_columns, up_dims, up_type.dtype, wanted=wanted)
    return (
        like_primal(dx, x_type),
        like_primal(dw_up, up_type),
        like_primal(dw_down, down_type),
        *(None for _ in quantized),
    )


_mlp.defvjp(*differentiable_once("mlp", _mlp_fwd, _mlp_bwd))

mlp_operation = Operation(
    "jaxfp8_mlp",
    _mlp_body,
    together=_weight_operands(3),
    derivative=lambda call, *arrays: _mlp(call, tuple(map(jax.typeof, arrays)), *arrays),
)


# --------------------------------------------------------------------------------------------------
# Ragged
# --------------------------------------------------------------------------------------------------


def _ragged_product(kernel, lhs, rhs, sizes, call: Call, out, out_dtype):
    num_sms = call.get("recipe").num_sms
    return grouped_product(kernel, lhs, rhs, sizes, call.ins[3], out, out_dtype, num_sms=num_sms)


def _ragged_hidden(x_rows, up_nt, sizes, call: Call):
    dims, dtype = _hidden_dims_ragged(call), call.get("hidden_dtype")
    return once(_ragged_product(gated_grouped_kernel, x_rows, up_nt, sizes, call, dims, dtype))


def _hidden_dims_ragged(call: Call):
    x_dims, up_dims, _, sizes_dims = call.ins[:4]
    new = (*x_dims[:-2], *up_dims[: up_dims.index("g")], *sizes_dims[:-1])
    lead = tuple(d for d in call.outs[0][:-2] if d in new)
    return lead + ("m",) + up_dims[up_dims.index("k") + 1 :]


def _ragged_result(rows, down_nt, sizes, call: Call):
    out, dtype = call.outs[0], call.get("out_dtype")
    return [once(_ragged_product(grouped_kernel, rows, down_nt, sizes, call, out, dtype))]


def _ragged_body(x, w_up, w_down, sizes, *quantized, call: Call):
    fmt = qt.forward_format(call.get("recipe"))
    up_nt, _, down_nt, _ = _weights(w_up, w_down, quantized, call)
    h = _ragged_hidden(qt.rows(x, call.ins[0], fmt), up_nt, sizes, call)
    rows = act.activation_rows(h, _hidden_dims_ragged(call), fmt, call.get("activation"))
    return _ragged_result(rows, down_nt, sizes, call)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _ragged_mlp(call: Call, types, x, w_up, w_down, sizes, *quantized):
    return _ragged_body(x, w_up, w_down, sizes, *quantized, call=call)


def _ragged_fwd(call: Call, types, x, w_up, w_down, sizes, *quantized):
    x_dims, _, _, sizes_dims = call.ins[:4]
    fmt = qt.forward_format(call.get("recipe"))
    up_nt, up_nn, down_nt, down_nn = _weights(w_up, w_down, quantized, call)
    x_rows, x_columns = qt.ragged_rows_and_columns(x, x_dims, sizes, sizes_dims, fmt)
    h = checkpoint_name(_ragged_hidden(x_rows, up_nt, sizes, call), PRE_ACTIVATION_NAME)
    rows, columns = act.ragged_activation(
        h, _hidden_dims_ragged(call), sizes, sizes_dims, fmt, call.get("activation")
    )
    weights = (save(w, named=not quantized) for w in (up_nn, down_nn))
    residuals = *weights, save(x_columns), save(columns), h, sizes
    return _ragged_result(rows, down_nt, sizes, call), residuals


def _ragged_bwd(call: Call, types, residuals, cotangents):
    (x_dims, up_dims, down_dims, sizes_dims), (out,) = call.ins[:4], call.outs
    recipe: Recipe = call.get("recipe")
    forward, gradient = qt.forward_format(recipe), qt.gradient_format(recipe)
    (x_type, up_type, down_type, _, *quantized), (dy,) = types, cotangents
    saved_up, saved_down, saved_x, saved_columns, h, sizes = residuals
    h_dims = _hidden_dims_ragged(call)
    lead = h_dims[: h_dims.index("m")]
    up_nn, down_nn = _load_weights(saved_up, saved_down, quantized, call)
    multiply = functools.partial(_ragged_product, sizes=sizes, call=call)

    def saved_tokens(saved, *dims):
        new = tuple(dict.fromkeys(sizes_dims[:-1] + dims[:-1]))
        dims = new + (dims[-1], "t")
        return load(saved, forward.dtype, dims, dims[:-1] + ("t/",), qt.ROW)

    dy_rows, dy_columns = qt.ragged_rows_and_columns(dy, out, sizes, sizes_dims, gradient)
    dims = out[:-1] + ("f",)
    da = multiply(grouped_kernel, dy_rows, down_nn, out=dims, out_dtype=call.get("hidden_dtype"))
    da = sum_to(da, dims, lead + ("m", "f"))

    # The results of a vmapped kernel have every batch dimension; those that a weight lacks are summed.
    batch = tuple(d for d in out if d[0] == "v")
    columns = saved_tokens(saved_columns, *lead, "f")
    dims = batch + ("g", "f", "n")
    dw_down = multiply(
        grouped_wgrad_kernel, columns, dy_columns, out=dims, out_dtype=down_type.dtype
    )
    dw_down = sum_to(dw_down, dims, down_dims)

    dh_rows, dh_columns = act.ragged_activation_grad(
        h, h_dims, da, sizes, sizes_dims, gradient, call.get("activation")
    )
    dims = lead + ("m", "k")
    dx = multiply(gated_grouped_kernel, dh_rows, up_nn, out=dims, out_dtype=x_type.dtype)
    dx = sum_to(dx, dims, x_dims)

    x_columns = saved_tokens(saved_x, *x_dims[:-2], "k")
    dims = lead + ("g", "k") + up_dims[up_dims.index("k") + 1 :]
    dw_up = multiply(
        gated_grouped_wgrad_kernel, x_columns, dh_columns, out=dims, out_dtype=up_type.dtype
    )
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
    together=_weight_operands(4),
    derivative=lambda call, *arrays: _ragged_mlp(call, tuple(map(jax.typeof, arrays)), *arrays),
)


# --------------------------------------------------------------------------------------------------
# Public functions
# --------------------------------------------------------------------------------------------------


def _check(function, x, w_up, w_down, activation, preferred_element_type, recipe, groups=""):
    """x, both weights with F padded to whole blocks, their quantized copies, dimensions and attributes of the call."""
    if activation not in ACTIVATIONS:
        allowed, product = ", ".join(map(repr, ACTIVATIONS)), "ragged_dot" if groups else "linear"
        raise ValueError(
            f"{function}: activation is {activation!r}; allowed: {allowed} (the tanh approximation); for others, "
            f"jax.nn.gelu(approximate=False) included, call jaxfp8.{product} twice with the activation between"
        )
    x = checks.array(function, "x", x, "(M, K)" if groups else "(..., K)")
    quantized_up, quantized_down = (
        parts(function, name, w) for name, w in (("w_up", w_up), ("w_down", w_down))
    )
    w_down = w_down.value if quantized_down else w_down
    w_down = checks.array(function, "w_down", w_down, f"({groups}F, N)")
    shapes = f"({groups}K, F)", f"({groups}K, 2, F)"
    if quantized_up:
        w_up = checks.array(function, "w_up", w_up.value, f"({groups}K, F or 2 F)")
        if w_up.shape[-1] == 2 * w_down.shape[-2]:
            w_up = w_up.reshape(*w_up.shape[:-1], 2, w_down.shape[-2])
    w_up = checks.array(function, "w_up", w_up, "(...)")
    at = w_up.ndim - len(shapes[0].split(","))
    if at not in (0, 1) or (at and w_up.shape[-2] != 2):
        raise ValueError(
            f"{function}: w_up has shape {w_up.shape}; allowed: {shapes[0]}, or {shapes[1]}: gate and up"
        )
    checks.same(function, "K", "x", x.shape[-1], "w_up", w_up.shape[-2 - at])
    checks.same(function, "F", "w_up", w_up.shape[-1], "w_down", w_down.shape[-2])
    if groups:
        checks.same(function, "G", "w_up", w_up.shape[0], "w_down", w_down.shape[0])
    out_dtype = result_dtype(function, preferred_element_type, x.dtype)
    quantized = ()
    if quantized_up or quantized_down:
        quantized = _both_quantized(function, w_up, w_down, quantized_up, quantized_down, recipe)
    # Hidden units without weights: a(0) is 0. Else blocks of gate and of up would not line up in a product over both.
    elif pad := -w_up.shape[-1] % BLOCK:
        w_up = jnp.pad(w_up, [(0, 0)] * (w_up.ndim - 1) + [(0, pad)])
        w_down = jnp.pad(w_down, [(0, 0)] * (w_down.ndim - 2) + [(0, pad), (0, 0)])
    group = ("g",) if groups else ()
    up_dims = (*group, "k", TWO, "f") if at else (*group, "k", "f")
    down_dims = (*group, "f", "n")
    copies = *_quantized_up_dims(up_dims), *weight_dims(down_dims, quantized)
    bf16 = np.dtype(jnp.bfloat16)
    attributes = (
        ("activation", activation),
        ("out_dtype", out_dtype),
        ("hidden_dtype", bf16 if bf16 in (x.dtype, out_dtype) else np.dtype(np.float32)),
        ("recipe", recipe),
    )
    dims = up_dims, down_dims, copies if quantized else ()
    return x, w_up, w_down, quantized, dims, attributes


def _both_quantized(function, w_up, w_down, quantized_up, quantized_down, recipe):
    """Data and scale of both orientations of both weights, of which one was quantized ahead, or both."""
    f = w_down.shape[-2]
    if f % BLOCK:
        raise ValueError(
            f"{function}: w_down has F={f}; allowed beside a QuantizedWeight: a multiple of {BLOCK}"
        )
    lead = w_down.ndim - 2
    k, *halves = w_up.shape[lead:-1]
    if not quantized_up:
        flat = w_up.reshape(*w_up.shape[:lead], k, -1)
        quantized_up = parts(function, "w_up", prequantize(flat, recipe=recipe))
    if not quantized_down:
        quantized_down = parts(function, "w_down", prequantize(w_down, recipe=recipe))
    if halves:
        # (..., 2 F, K) and (..., K, 2 F), each with its scales: both halves are whole blocks.
        nt, nn = quantized_up[:2], quantized_up[2:]
        quantized_up = (
            *(v.reshape(*v.shape[:lead], 2, -1, v.shape[-1]) for v in nt),
            *(v.reshape(*v.shape[:-1], 2, -1) for v in nn),
        )
    return *quantized_up, *quantized_down


def mlp(
    x: Any,
    w_up: Any,
    w_down: Any,
    *,
    activation: str = "silu",
    recipe: Recipe | None = None,
    preferred_element_type: Any = None,
    out_sharding: Any = None,
) -> jax.Array:
    """The MLP of a transformer with FP8 products, forward and backward: `a(x . w_up) . w_down`.

    With a gate, `(a(x . w_up[:, 0]) * (x . w_up[:, 1])) . w_down`: SwiGLU for silu, GeGLU for gelu (arXiv 2002.05202).

    On a GPU one kernel reads the hidden layer and writes the FP8 rows and columns of its activation, and one reads it
    and the gradient of the activation and writes those of its own gradient. The activation is computed in float32 and
    quantized from there. Under `vmap` with shared weights it stays one MLP, also its weight gradients.

    **Arguments:**

    - `x`: float32, bfloat16 or float16 `(..., K)`.
    - `w_up`: likewise, `(K, F)`, or `(K, 2, F)` with a gate, `w_up[:, 0]`. (Not `(K, 2 F)`: so F can be sharded.) Or a
      `QuantizedWeight` (see `jaxfp8.prequantize`) of `(K, F)`, or with a gate of `(K, 2 F)`, F a multiple of 128.
    - `w_down`: likewise, `(F, N)`, or a `QuantizedWeight` of that.
    - `activation`: `"silu"`, or `"gelu"`: the tanh approximation, as `jax.nn.gelu`'s default. The exact gelu,
      `jax.nn.gelu(approximate=False)`, and other activations run unfused, in high precision, between two products:
      `linear(jax.nn.gelu(linear(x, w_up), approximate=False), w_down)`; of experts, `ragged_dot` likewise.
    - `recipe`: a `jaxfp8.Recipe`; None is the one in force.
    - `preferred_element_type`: dtype of the result; None is x's, also of bfloat16 x with float32 weights. The
      hidden layer, which is kept for the backward pass, is bfloat16 if x or the result is, else float32.
    - `out_sharding`: a PartitionSpec or NamedSharding of the result, on meshes with explicit axes.

    **Returns:** `(..., N)`. Gradients have the dtypes of their primals.

    **Raises:** TypeError or ValueError for operands that do not fit.
    """
    recipe = current_recipe("mlp", recipe)
    x, w_up, w_down, quantized, (up_dims, down_dims, copies), attributes = _check(
        "mlp", x, w_up, w_down, activation, preferred_element_type, recipe
    )
    spec = out_spec("mlp", out_sharding, x.ndim)
    with jax.named_scope("jaxfp8.mlp"):
        vector = x.ndim == 1
        if vector:
            x = x[None]
            spec = None if spec is None else ((), *spec)
        tokens = tuple(f"m{i}" for i in range(x.ndim - 1))
        out = (*tokens, "n")
        wanted = () if spec is None else tuple(zip(out, spec, strict=True))
        call = Call(((*tokens, "k"), up_dims, down_dims, *copies), (out,), attributes, wanted)
        (y,) = mlp_operation(x, w_up, w_down, *quantized, call=call)
        y = place(y, spec)
        return y[0] if vector else y


def ragged_mlp(
    x: Any,
    w_up: Any,
    w_down: Any,
    group_sizes: Any,
    *,
    activation: str = "silu",
    recipe: Recipe | None = None,
    preferred_element_type: Any = None,
    out_sharding: Any = None,
) -> jax.Array:
    """`mlp` with weights for each group of rows: the experts of a mixture.

    Groups of any size follow one another from row 0 on; no padding, no host synchronization, no capacity.

    **Arguments:** as `mlp`, but

    - `x`: tokens sorted by group, `(M, K)`.
    - `w_up`: `(G, K, F)`, or `(G, K, 2, F)` with a gate, or a `QuantizedWeight` of `(G, K, F)` or `(G, K, 2 F)`.
    - `w_down`: `(G, F, N)`, or a `QuantizedWeight` of that.
    - `group_sizes`: int32 `(G,)`, rows of each group. Negative counts as zero; groups are clipped to M.

    **Returns:** `(M, N)`. Rows past the last group are zero and contribute nothing to gradients; empty groups have
    zero weight gradients.

    **Raises:** TypeError or ValueError for operands that do not fit.
    """
    function = "ragged_mlp"
    recipe = current_recipe(function, recipe)
    x, w_up, w_down, quantized, (up_dims, down_dims, copies), attributes = _check(
        function, x, w_up, w_down, activation, preferred_element_type, recipe, "G, "
    )
    sizes = checks.group_sizes(function, "group_sizes", group_sizes)
    checks.same(function, "G", "w_up", w_up.shape[0], "group_sizes", sizes.shape[0])
    spec = out_spec(function, out_sharding, 2)
    ins = (("m", "k"), up_dims, down_dims, ("g",), *copies)
    call = Call(ins, (("m", "n"),), attributes)
    with jax.named_scope("jaxfp8.ragged_mlp"):
        (y,) = ragged_mlp_operation(x, w_up, w_down, sizes, *quantized, call=call)
        return y if spec is None else jax.sharding.reshard(y, out_sharding)
