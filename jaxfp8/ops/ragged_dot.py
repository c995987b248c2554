"""ragged_dot with the signature of jax.lax.ragged_dot: a matrix per group of rows."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from .._arrays import checks
from .._arrays.blocks import ROW, SQUARE
from .._arrays.quantized_weight import WeightCopies, frozen_weight, parts
from .._arrays.recipe import (
    Recipe,
    current_recipe,
    forward_format,
    gradient_format,
    result_options,
    weight_gradient_options,
)
from .._primitives.call import Call
from .._primitives.leaf import once
from .._primitives.mesh import like_primal
from .._primitives.once import first_derivative
from .._primitives.operation import Operation
from ..kernels import quantize as qt
from ..kernels.grouped_gemm import grouped_operation, grouped_product, grouped_wgrad_operation
from ._arguments import check_precision, out_spec, result_dtype
from ._dot import W, X, quantized_weight, sum_to, weight_dims
from ._frozen import frozen_dot
from ._residuals import load, save


def _forward(rows, weight, sizes, call: Call):
    dims, dtype = (call.ins[2], call.outs[0]), call.get("out_dtype")
    options = result_options(call.get("recipe"))
    return [once(grouped_product(grouped_operation, rows, weight, sizes, *dims, dtype, **options))]


def _ragged_body(x, w, sizes, *quantized, call: Call):
    x_dims, w_dims, _ = call.ins[:3]
    fmt = forward_format(call.get("recipe"))
    weight, _ = quantized_weight(w, w_dims, quantized, fmt)
    return _forward(qt.rows(x, x_dims, fmt), weight, sizes, call)


def _ragged_fwd(call: Call, types, moving, x, w, sizes, *quantized):
    x_dims, w_dims, sizes_dims = call.ins[:3]
    fmt = forward_format(call.get("recipe"))
    nt, nn = quantized_weight(w, w_dims, quantized, fmt)
    rows, columns = qt.ragged_rows_and_columns(
        x, x_dims, sizes, sizes_dims, fmt, with_columns=W in moving
    )
    kept = save(nn, keep=not quantized) if X in moving else None
    return _forward(rows, nt, sizes, call), (kept, save(columns), sizes)


def _input_gradient(call: Call, x_type, dy_rows, nn, sizes):
    (x_dims, w_dims, sizes_dims), (out,) = call.ins[:3], call.outs
    dims = out[:-1] + (w_dims[-2],)
    options = {"out": dims, "out_dtype": x_type.dtype} | result_options(call.get("recipe"))
    dx = grouped_product(
        grouped_operation, dy_rows, nn, sizes=sizes, sizes_dims=sizes_dims, **options
    )
    return like_primal(sum_to(dx, dims, x_dims), x_type)


def _weight_gradient(call: Call, w_type, saved_columns, dy_columns, sizes):
    (x_dims, w_dims, sizes_dims), (out,) = call.ins[:3], call.outs
    recipe: Recipe = call.get("recipe")
    k, n = w_dims[-2:]
    dims = tuple(dict.fromkeys(sizes_dims[:-1] + x_dims[:-2])) + (k, "t")
    columns = load(saved_columns, forward_format(recipe).dtype, dims, ROW)
    dims = tuple(d for d in out if d[0] == "v") + ("g", k, n)
    options = {"out": dims, "out_dtype": recipe.made_in(w_type.dtype)}
    options |= weight_gradient_options(recipe)
    dw = grouped_product(
        grouped_wgrad_operation, columns, dy_columns, sizes=sizes, sizes_dims=sizes_dims, **options
    )
    return like_primal(sum_to(dw, dims, w_dims), w_type)


def _ragged_bwd(call: Call, types, moving, residuals, cotangents):
    (x_type, w_type, _, *quantized), (dy,) = types, cotangents
    saved_nn, saved_columns, sizes = residuals
    recipe: Recipe = call.get("recipe")
    which = {"with_rows": X in moving, "with_columns": W in moving}
    dy_rows, dy_columns = qt.ragged_rows_and_columns(
        dy, call.outs[0], sizes, call.ins[2], gradient_format(recipe), **which
    )
    dx = dw = None
    if X in moving:
        dtype = WeightCopies(*quantized).nn.dtype if quantized else forward_format(recipe).dtype
        nn = load(saved_nn, dtype, call.ins[1], SQUARE)
        dx = _input_gradient(call, x_type, dy_rows, nn, sizes)
    if W in moving:
        dw = _weight_gradient(call, w_type, saved_columns, dy_columns, sizes)
    return dx, dw, None, *(None for _ in quantized)


ragged_operation = Operation(
    "jaxfp8_ragged_dot",
    _ragged_body,
    together=((1, 3, 4, 5, 6),),
    derivative=first_derivative("ragged_dot", _ragged_body, _ragged_fwd, _ragged_bwd),
)


def ragged_dot(
    lhs: Any,
    rhs: Any,
    group_sizes: Any,
    precision: Any = None,
    preferred_element_type: Any = None,
    group_offset: Any = None,
    out_sharding: Any = None,
    *,
    recipe: Recipe | None = None,
) -> jax.Array:
    """`jax.lax.ragged_dot` with FP8 products, forward and backward: the experts of a mixture.

    Groups of any size follow one another from row 0 on; no padding, no host synchronization, no capacity.

    **Arguments:**

    - `lhs`: tokens sorted by group: float32, bfloat16 or float16 `(M, K)`.
    - `rhs`: a weight per group `(G, K, N)`, likewise, or a `QuantizedWeight` of them (see `jaxfp8.prequantize`). Or
      FP8 alone, for which no gradient is made: a `QuantizedArray` `(G, N, K)` in 128x128 blocks, or a `QuantizedWeight`
      without value.
    - `group_sizes`: int32 `(G,)`, rows of each group. Negative counts as zero; groups are clipped to M.
    - `precision`: None or DEFAULT.
    - `preferred_element_type`: dtype of the result; None is what lhs and rhs promote to; lhs's if rhs is FP8 alone.
    - `group_offset`: must be None, as in `jax.lax.ragged_dot`.
    - `out_sharding`: a PartitionSpec or NamedSharding of the result, on meshes with explicit axes.
    - `recipe`: a `jaxfp8.Recipe`; None is the one in force.

    **Returns:** `(M, N)`. Rows past the last group are zero and contribute nothing to gradients; empty groups have
    zero weight gradients.

    **Raises:** TypeError or ValueError for operands that do not fit, NotImplementedError for a group_offset.
    """
    function = "ragged_dot"
    recipe = current_recipe(function, recipe)
    lhs = checks.array(function, "lhs", lhs, "(M, K)")
    frozen = frozen_weight(function, "rhs", rhs, "(G, N, K)")
    quantized = () if frozen is not None else parts(function, "rhs", rhs)
    if frozen is None:
        rhs = checks.array(function, "rhs", rhs.value if quantized else rhs, "(G, K, N)")
    k, groups = rhs.shape[1] if frozen is None else frozen.shape[2], rhs.shape[0]
    checks.same(function, "K", "lhs", lhs.shape[1], "rhs", k)
    sizes = checks.group_sizes(function, "group_sizes", group_sizes, groups)
    check_precision(function, precision)
    if group_offset is not None:
        raise NotImplementedError(f"{function}: group_offset is {group_offset!r}; allowed: None")
    made = jnp.result_type(lhs, rhs) if frozen is None else lhs.dtype
    out_dtype = result_dtype(function, preferred_element_type, made)
    spec = out_spec(function, out_sharding, 2)
    attributes = (("out_dtype", out_dtype), ("recipe", recipe))
    w_dims = ("g", "k", "n")
    ins = (("m", "k"), w_dims, ("g",), *weight_dims(w_dims, quantized))
    call = Call(ins, (("m", "n"),), attributes)
    with jax.named_scope("jaxfp8.ragged_dot"):
        if frozen is None:
            (y,) = ragged_operation(lhs, rhs, sizes, *quantized, call=call)
        else:
            dims = ("m", "k"), ("g", "n", "k"), ("m", "n")
            options: dict[str, Any] = {
                "recipe": recipe,
                "out_dtype": out_dtype,
                "group_sizes": sizes,
            }
            y = frozen_dot(lhs, frozen, *dims, **options)
        return y if spec is None else jax.sharding.reshard(y, out_sharding)
