"""Expert parallelism: tokens go to the devices of their experts in FP8 and come back in the dtype they have.

    tokens, group_sizes, route = dispatch(x, expert, num_experts, axis_name="expert")
    y = ragged_dot(tokens, w, group_sizes)          # any computation that keeps rows apart
    out = combine(y, gate, route)

Each token is quantized once and sent once (`_exchange`: how); where it arrives, its row is copied for each of its
experts there, in order of expert, then source device, then token: the order that one device alone would give them. So
every expert multiplies the same rows in the same order on any number of devices. `combine` weights and adds a token's
results where they were made, in float32, and the sums of the devices come back.

Gradients take the same ways: those of results go out in FP8, once a token, and meet the gates where the rows are;
those of tokens, and of gates, come back as sums (DeepSeek-V3, arXiv 2412.19437, 3.3.3).
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from .._arrays import checks
from .._arrays.blocks import ROW, dequantize_blocks
from .._arrays.recipe import Recipe, current_recipe, forward_format, gradient_format
from .._primitives.mesh import match_varying, whole
from .._primitives.once import differentiable_once
from ..kernels import quantize as qt
from ..kernels.sum_rows import sum_rows
from ._exchange import (
    STRATEGIES,
    Exchange,
    Strategy,
    axis_names,
    collect,
    plan_exchange,
    spread,
    take,
)
from ._routing import Routing, plan
from ._traffic import explained

# --------------------------------------------------------------------------------------------------
# There and back
# --------------------------------------------------------------------------------------------------


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Route:
    """What `dispatch` did with the tokens, for `combine`. A pytree.

    **Arguments:**

    - `exchange`: how tokens got to the devices of their experts.
    - `source`: int32 (R,), the present token of each row, past the last where there is none.
    - `copy`: int32 (R,), present token * k + choice.
    - `position`: int32 (S, k), the row of each copy; below 0 of one for no expert here, R of one that found no place
      within `max_rows`.
    - `overflow`: int32 (), copies of tokens that found no place with this device, or with a peer of this device's
      tokens. Their sum over the axis is what training logs; 0 unless `max_rows` or `max_sent` is given.
    - `shape`: (T, k). `recipe`: the recipe in force, None for rows that travel in their own dtype.
    """

    exchange: Exchange
    source: Any
    copy: Any
    position: Any
    overflow: Any
    shape: tuple[int, int] = dataclasses.field(metadata={"static": True})
    recipe: Recipe | None = dataclasses.field(metadata={"static": True})


def _route(exchange: Exchange, rows: Routing, shape, recipe) -> Route:
    choices = shape[1]
    source = exchange.present(rows.source)
    position = exchange.by_presence(rows.position)
    lost = jnp.sum(position >= rows.source.size, dtype=jnp.int32)
    copy = source * choices + rows.copy % choices
    return Route(exchange, source, copy, position, exchange.overflow + lost, shape, recipe)


def _send_rows(x, route: Route, format_of):
    """The row of x (T, K) for each row of the experts, float32 (R, K) through FP8, or as it is."""
    if route.recipe is None:
        (rows,) = spread(route.exchange, x)
        return take(rows, route.source)
    fmt = format_of(route.recipe)
    q = qt.rows(x, ("m", "k"), fmt).array
    bits = lax.bitcast_convert_type(q.data, jnp.uint8)
    bits, scale = (take(a, route.source) for a in spread(route.exchange, bits, q.scale))
    return dequantize_blocks(lax.bitcast_convert_type(bits, fmt.dtype), scale, ROW)


@jax.custom_vjp
def _to_experts(x, route: Route):
    """x (T, K) -> rows (R, K)."""
    return _send_rows(x, route, forward_format).astype(x.dtype)


def _to_experts_fwd(x, route):
    return _to_experts(x, route), route


def _to_experts_bwd(route, ct):
    # A copy that found no place has no part in the gradient.
    position = jnp.where(route.position < ct.shape[0], route.position, -1)
    rows = sum_rows(ct, ("m", "k"), position, ("s", "j"), ct.dtype)
    return *collect(route.exchange, rows), None


_to_experts.defvjp(*differentiable_once("dispatch", _to_experts_fwd, _to_experts_bwd))


@jax.custom_vjp
def _from_experts(y, gate, route: Route):
    """Rows (R, N) and float32 gates (T, k) -> weighted sums (T, N)."""
    return _from_experts_fwd(y, gate, route)[0]


def _from_experts_fwd(y, gate, route):
    (gates,) = spread(route.exchange, gate)
    total = sum_rows(y, ("m", "k"), route.position, ("s", "j"), y.dtype, weight=gates)
    (total,) = collect(route.exchange, total, lost=jnp.nan)
    return total, (y, gates, route)


def _from_experts_bwd(residuals, ct):
    y, gates, route = residuals
    rows = _send_rows(ct, route, gradient_format).astype(jnp.float32)
    dy = (rows * take(gates.reshape(-1), route.copy)[:, None]).astype(y.dtype)
    of_row = jnp.sum(rows * y.astype(jnp.float32), axis=1)
    there = (route.position >= 0) & (route.position < y.shape[0])
    (dgate,) = collect(route.exchange, jnp.where(there, take(of_row, route.position), 0))
    return dy, dgate, None


_from_experts.defvjp(*differentiable_once("combine", _from_experts_fwd, _from_experts_bwd))


# --------------------------------------------------------------------------------------------------
# Public functions
# --------------------------------------------------------------------------------------------------


def dispatch(
    x: Any,
    expert: Any,
    num_experts: int,
    *,
    axis_name: str | tuple[str, ...] | None = None,
    max_rows: int | None = None,
    quantized: bool = True,
    recipe: Recipe | None = None,
    strategy: Strategy | None = None,
    max_sent: int | None = None,
) -> tuple[jax.Array, jax.Array, Route]:
    """Sends each token to the devices of its experts, as FP8 data and scales.

    Tokens of any number an expert, none too: no capacity, no padding of groups. Without an axis, or on one device, the
    same numbers result: tokens are quantized all the same, and every expert sees the same rows in the same order, by
    source device, then token.

    Quantizing the result once more in the same format, as `ragged_dot` does, gives back the same FP8 data, and scales
    that are equal (`scale_format="pow2"`) or within the rounding of x's dtype.

    **Arguments:**

    - `x`: float32, bfloat16 or float16 `(T, K)`: this device's tokens.
    - `expert`: integers `(T, k)`: each token's experts. Below 0 or past the last: to none, for masked tokens.
    - `num_experts`: of all devices; a multiple of the axis's size. Device i has the i-th run of `num_experts / size`.
    - `axis_name`: the mesh axis of `shard_map` over which experts (and tokens) are cut; None for one device. Of a
      tuple, as ("node", "gpu"), the first is between nodes: a token crosses it once to each node, and is gathered
      over the others.
    - `max_rows`: rows of the result. None is what always suffices: all copies of the axis's tokens (`explain` says
      their MB). With fewer, memory is saved, and a token of which a copy finds no place on an overfull device comes
      out of `combine` as NaN. Places go by expert, then source device, then token.
    - `quantized`: False sends tokens, and gradients of results, in their own dtype: what FP8 is compared with.
    - `recipe`: a `jaxfp8.Recipe`: `dtype` and `scale_format` of tokens, `grad_dtype` and `grad_scale_format` of
      gradients; None is the one in force.
    - `strategy`: how tokens travel. `"gather"`: each to all devices. `"all_to_all"`: each once to every device (of a
      tuple, node) that has one of its experts, in blocks. `"ragged"`: those without blocks, by
      `jax.lax.ragged_all_to_all`. None is what moves the fewest bytes: `"all_to_all"` where `max_sent` is below T,
      else `"gather"`; never `"ragged"`, which is slow on GPUs. Results are the same to the bit.
    - `max_sent`: tokens of a block of `"all_to_all"`: what this device may send to one (of a tuple: to one node),
      itself among them; None is T. A token that finds no place in a block comes out of `combine` as NaN.

    **Returns:**

    - tokens `(max_rows, K)` in x's dtype, sorted by expert; zero past the last group. The gradient passes straight
      through the quantization.
    - int32 `(num_experts / size,)`, the tokens of each of this device's experts: `group_sizes` of `ragged_dot`.
    - the `Route`, for `combine`. `route.overflow` counts copies of tokens that found no place.

    **Raises:** TypeError or ValueError for operands that do not fit, or an axis that is not one of `shard_map`'s.
    """
    function = "dispatch"
    recipe = current_recipe(function, recipe) if quantized else None
    x = checks.array(function, "x", x, "(T, K)")
    expert = check_expert(function, expert, x)
    check_exchange(function, strategy, max_sent, axis_name)
    check_positive(function, "max_rows", max_rows)
    with jax.named_scope("jaxfp8.dispatch"):
        x, expert = match_varying([whole(x), whole(expert)])
        exchange, here = plan_exchange(function, expert, num_experts, axis_name, strategy, max_sent)
        rows = here.size if max_rows is None else max_rows
        routing = plan(here, exchange.experts, rows)
        route = _route(exchange, routing, expert.shape, recipe)
        with explained(
            function, exchange, x.shape[1], x.dtype.itemsize, expert.shape[1], quantized, max_rows
        ):
            tokens = _to_experts(x, route)
        return tokens, routing.group_sizes, route


def combine(y: Any, gate: Any, route: Route) -> jax.Array:
    """Weights the experts' results, adds those of each token, and brings the sums back to where the tokens are from.

    A device's results for a token are added in float32, in order of the token's choices, and travel as one row in y's
    dtype, so give it bfloat16; devices' sums are added in float32, in order of devices. Gradients of results move in
    FP8, once a token, as `dispatch` moves tokens.

    **Arguments:**

    - `y`: float32, bfloat16 or float16 `(max_rows, N)`: a row for each that `dispatch` returned.
    - `gate`: a floating-point array `(T, k)`: the weight of each of a token's experts. One of no expert is not used.
    - `route`: what `dispatch` returned.

    **Returns:** `(T, N)` in y's dtype. NaN where an expert had no place for the token.

    **Raises:** TypeError or ValueError for operands that do not fit.
    """
    function = "combine"
    if not isinstance(route, Route):
        raise TypeError(
            f"{function}: route is a {type(route).__name__}; allowed: what dispatch returned"
        )
    y = checks.array(function, "y", y, "(R, N)")
    gate = checks.array(function, "gate", gate, "(T, k)")
    if gate.shape != route.shape:
        raise ValueError(f"{function}: gate has shape {gate.shape}; allowed: {route.shape}")
    checks.same(function, "rows", "dispatch's result", route.source.size, "y", y.shape[0])
    with jax.named_scope("jaxfp8.combine"):
        y, gate = match_varying([whole(y), whole(gate.astype(jnp.float32))])
        return _from_experts(y, gate, route)


# --------------------------------------------------------------------------------------------------
# Checks
# --------------------------------------------------------------------------------------------------


def check_expert(function: str, expert: Any, x: jax.Array) -> jax.Array:
    """`expert` as int32 (T, k), k at least 1."""
    expert = checks.integers(function, "expert", expert, "(T, k)")
    if expert.shape[0] != x.shape[0] or expert.shape[1] == 0:
        raise ValueError(
            f"{function}: expert has shape {expert.shape}; allowed: ({x.shape[0]}, k), k at least 1, for x {x.shape}"
        )
    return expert


def check_positive(function: str, argument: str, value: Any) -> None:
    """**Raises:** ValueError unless `value` is None or positive."""
    if value is not None and value < 1:
        raise ValueError(f"{function}: {argument} is {value}; allowed: a positive int, or None")


def check_exchange(function: str, strategy: Any, max_sent: Any, axis_name: Any) -> None:
    """**Raises:** ValueError for a strategy that there is none, or arguments that contradict it."""
    if strategy is not None and strategy not in STRATEGIES:
        raise ValueError(
            f"{function}: strategy is {strategy!r}; allowed: {', '.join(map(repr, STRATEGIES))}, or None"
        )
    check_positive(function, "max_sent", max_sent)
    if max_sent is not None and strategy not in (None, "all_to_all"):
        raise ValueError(
            f"{function}: max_sent is {max_sent} with strategy {strategy!r}; allowed: None; only all_to_all has blocks"
        )
    if len(set(axis_names(axis_name))) < len(axis_names(axis_name)):
        raise ValueError(f"{function}: axis_name is {axis_name!r}; allowed: each axis once")
