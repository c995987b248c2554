"""moe: a mixture of experts from the router's choice to the output."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp

from .._arrays import checks
from .._arrays.recipe import Recipe, current_recipe
from .._primitives.call import Call
from .._primitives.mesh import whole
from ._arguments import out_spec
from ._exchange import Strategy, levels_of
from ._moe import POSITION, moe_operation
from .expert_parallel import check_exchange, check_positive
from .mlp import check_mlp


def _check_choices(function, x, expert, gate):
    """expert and gate as arrays (..., choices) of x's leading axes."""
    if not (hasattr(expert, "shape") and jnp.issubdtype(expert.dtype, jnp.integer)):
        got = getattr(expert, "dtype", type(expert).__name__)
        raise TypeError(f"{function}: expert is {got}; allowed: integers (..., k)")
    expert = jnp.asarray(expert)
    gate = checks.array(function, "gate", gate, "(..., k)")
    if expert.shape[:-1] != x.shape[:-1] or expert.ndim != x.ndim or expert.shape[-1] == 0:
        lead = ", ".join(map(str, (*x.shape[:-1], "k")))
        raise ValueError(
            f"{function}: expert has shape {expert.shape}; allowed: ({lead}), k at least 1, for x {x.shape}"
        )
    if gate.shape != expert.shape:
        raise ValueError(
            f"{function}: gate has shape {gate.shape}; allowed: {expert.shape}, as expert has"
        )
    return expert, gate


def moe(
    x: Any,
    expert: Any,
    gate: Any,
    w_up: Any,
    w_down: Any,
    *,
    activation: str = "silu",
    axis_name: str | tuple[str, ...] | None = None,
    max_rows: int | None = None,
    strategy: Strategy | None = None,
    max_sent: int | None = None,
    recipe: Recipe | None = None,
    preferred_element_type: Any = None,
    out_sharding: Any = None,
) -> jax.Array:
    """A mixture of experts from the router's choice to the output: `sum_j gate[j] * mlp_of_expert[j](x)`.

    The experts are those of `ragged_mlp`; groups have any size, without capacity or padding, and nothing waits for the
    host. What is kept for the backward pass is FP8 but for the hidden layer, and sums are gathers in a fixed order: the
    same bits in every run. On a mesh call it inside `shard_map`; elsewhere tokens are gathered.

    With `axis_name` experts are cut over an axis of `shard_map`, tokens too: a token is quantized once and sent once,
    as by `dispatch`, and sums come back as by `combine`, in the result's dtype. Columns for weight gradients are then
    made from the rows that travelled (a second rounding, which power-of-two scales spare), and each expert has the same
    rows in the same order on any number of devices.

    A shared expert is an `mlp` beside it, a router's auxiliary losses are computed from its own outputs.

    **Arguments:**

    - `x`: tokens, float32, bfloat16 or float16 `(..., K)`.
    - `expert`: the experts of each token, integers `(..., k)` of any type. Below 0 or past the last: none, for masked
      tokens or choices.
    - `gate`: the weights of their results, float32, bfloat16 or float16 `(..., k)`. They multiply in float32.
    - `w_up`: float32, bfloat16 or float16 `(G, K, F)`, or `(G, K, 2, F)` with a gate, or a `QuantizedWeight` of
      `(G, K, F)` or `(G, K, 2 F)` (see `jaxfp8.prequantize`).
    - `w_down`: likewise, `(G, F, N)`, or a `QuantizedWeight` of that. FP8 alone as in `mlp`, with a leading G.
    - `activation`: `"silu"`, or `"gelu"`: the tanh approximation.
    - `axis_name`: mesh axes of `shard_map` over which experts and tokens are cut, one or two levels; `w_up` and
      `w_down` are then this device's experts, `expert` counts those of all. None for experts that are all here.
    - `strategy`, `max_sent`: as of `jaxfp8.dispatch`.
    - `max_rows`: how many copies of tokens there is memory for; None is for all `k` of every token (of all
      devices). A token of which a copy finds no place is NaN.
    - `recipe`: a `jaxfp8.Recipe`; None is the one in force.
    - `preferred_element_type`: dtype of the result; None is x's. Hidden layer and rows before the sum are bfloat16 if
      x or the result is, else float32.
    - `out_sharding`: a PartitionSpec or NamedSharding of the result, on meshes with explicit axes.

    **Returns:** `(..., N)`; zeros for a token of no expert. Gradients of x, gate and the weights have the dtypes of
    their primals.

    **Raises:** TypeError or ValueError for operands that do not fit.
    """
    function = "moe"
    recipe = current_recipe(function, recipe)
    x = checks.array(function, "x", x, "(..., K)")
    expert, gate = _check_choices(function, x, expert, gate)
    check_exchange(function, strategy, max_sent, axis_name)
    check_positive(function, "max_rows", max_rows)
    devices = levels_of(function, axis_name, strategy or "gather").devices
    dtype = x.dtype if preferred_element_type is None else preferred_element_type
    spec, lead = out_spec(function, out_sharding, x.ndim), x.shape[:-1]
    with jax.named_scope("jaxfp8.moe"):
        tokens = math.prod(lead)
        x, expert, gate = (whole(v).reshape(tokens, v.shape[-1]) for v in (x, expert, gate))
        x, w_up, w_down, quantized, (up_dims, down_dims, copies), attributes = check_mlp(
            function, x, w_up, w_down, activation, dtype, recipe, "G, "
        )
        ins = (("s", "k"), up_dims, down_dims, POSITION, POSITION, *copies)
        own = {
            "experts": devices * w_up.shape[0],
            "max_rows": max_rows,
            "axis_name": axis_name,
            "strategy": strategy,
            "max_sent": max_sent,
        }
        call = Call(ins, (("s", "n"),), (*attributes, *own.items()))
        (y,) = moe_operation(x, w_up, w_down, expert, gate, *quantized, call=call)
        y = y.reshape(*lead, y.shape[-1])
        return y if spec is None else jax.sharding.reshard(y, out_sharding)
