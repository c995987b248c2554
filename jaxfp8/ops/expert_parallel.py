"""Expert parallelism: tokens go to the devices of their experts in FP8 and come back in the dtype they have.

    tokens, group_sizes, route = dispatch(x, expert, num_experts, axis_name="expert")
    y = ragged_dot(tokens, w, group_sizes)          # any computation that keeps rows apart
    out = combine(y, gate, route)

A copy of a token for each of its experts, in order of expert ("sorted"), is sent as FP8 data and scales in one
all-to-all. Rows arrive in order of source device, then expert ("arrived"), and are brought into order of expert, then
source ("grouped"), which is the order that one device alone would give them: so every expert multiplies the same rows
in the same order on any number of devices.

The gradient of combine is a dispatch in FP8, that of dispatch a combine: DeepSeek-V3 (arXiv 2412.19437, 3.3.3).
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from .._arrays import checks
from .._arrays.blocks import ceil_blocks
from .._arrays.recipe import Recipe, current_recipe
from .._primitives.mesh import match_varying
from ..kernels import quantize as qt

# --------------------------------------------------------------------------------------------------
# Who sends what to whom
# --------------------------------------------------------------------------------------------------


class Blocks(NamedTuple):
    """Where the rows of each device lie, int32 (devices,): where they start, and how many there are."""

    start: Any
    size: Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Route:
    """What `dispatch` did with the rows, for `combine`. All indices are rows; a pytree.

    **Arguments:**

    - `order`: int32 (T * k,), the copy (token * k + choice) at each sorted row.
    - `lost`: bool (T * k,), copies, by sorted row, that found no place within `max_rows`.
    - `arrived`, `grouped`: int32 (R,), the arrived row of each grouped one, and the grouped row of each arrived one;
      R where there is none.
    - `here`: the sorted rows for each device, and `there`: where they start on it.
    - `arrivals`: the arrived rows of each device, and `origin`: where they start among its sorted ones.
    - `shape`: (T, k). `axis_name`: the expert axis, or None. `recipe`: the recipe in force, None for rows that travel
      in their own dtype.
    """

    order: Any
    lost: Any
    arrived: Any
    grouped: Any
    here: Blocks
    there: Any
    arrivals: Blocks
    origin: Any
    shape: tuple[int, int] = dataclasses.field(metadata={"static": True})
    axis_name: Any = dataclasses.field(metadata={"static": True})
    recipe: Recipe | None = dataclasses.field(metadata={"static": True})


def _exclusive_sum(x, axis=-1):
    return jnp.cumsum(x, axis) - x


def _plan(expert, num_experts, axis_name, devices, max_rows, recipe):
    """The route of `expert` (T, k), and the rows of each of this device's experts."""
    copies = expert.size
    flat = expert.reshape(copies)
    flat = jnp.where((flat >= 0) & (flat < num_experts), flat, num_experts).astype(jnp.int32)
    order = jnp.argsort(flat, stable=True).astype(jnp.int32)
    counts = jnp.bincount(flat, length=num_experts + 1)[:num_experts].astype(jnp.int32)
    rows = devices * copies if max_rows is None else max_rows

    # (source, destination, expert of the destination); every device knows all of it
    me: Any = 0
    if axis_name is not None:
        counts, me = lax.all_gather(counts, axis_name), lax.axis_index(axis_name)
    counts = counts.reshape(devices, devices, num_experts // devices)
    sent = counts.sum(-1, dtype=jnp.int32)
    start = _exclusive_sum(sent, 1)  # among the sorted rows of the source
    place = _exclusive_sum(sent, 0)  # among the arrived rows of the destination
    kept = jnp.clip(rows - place, 0, sent)

    sorted_row = jnp.arange(copies, dtype=jnp.int32)
    destination, within, inside = _find(start[me], sent[me], sorted_row)
    lost = inside & (within >= kept[me][destination])

    mine = counts[:, me]  # (source, expert)
    arrival = place[:, me, None] + _exclusive_sum(mine, 1)
    mine = jnp.clip(rows - arrival, 0, mine)
    grouped_start = _exclusive_sum(mine.T.reshape(-1)).reshape(mine.T.shape).T
    row = jnp.arange(rows, dtype=jnp.int32)
    arrived = _renumber(grouped_start.T, arrival.T, mine.T, row)
    grouped = _renumber(arrival, grouped_start, mine, row)
    route = Route(
        order,
        lost,
        arrived,
        grouped,
        Blocks(start[me], kept[me]),
        place[me],
        Blocks(place[:, me], kept[:, me]),
        start[:, me],
        expert.shape,
        axis_name,
        recipe,
    )
    return route, mine.sum(0, dtype=jnp.int32)


def _find(start, size, row):
    """Which block each row is in, its place within, and whether it is inside at all. Blocks are in order."""
    block = jnp.searchsorted(start, row, side="right").astype(jnp.int32) - 1
    within = row - start[block]
    return block, within, within < size[block]


def _renumber(start, other, size, row):
    """For rows in blocks that start at `start`: the same row in blocks that start at `other`, else len(row)."""
    block, within, inside = _find(start.reshape(-1), size.reshape(-1), row)
    return jnp.where(inside, other.reshape(-1)[block] + within, row.size)


# --------------------------------------------------------------------------------------------------
# Moving rows
# --------------------------------------------------------------------------------------------------


def _take(rows, index):
    """rows[index], zero where the index is past the end."""
    return rows.at[index].get(mode="fill", fill_value=0)


def _exchange(rows, out_rows, send: Blocks, place, receive: Blocks, axis_name):
    """Rows of every device to every other: `send` says which of ours, `place` where they land there.

    `receive` says where those of each device land here; the rest is zero.
    """
    devices = lax.axis_size(axis_name)
    operands = match_varying(
        [jnp.zeros((out_rows, *rows.shape[1:]), rows.dtype), rows, *send, place, *receive]
    )

    def ragged(out, rows, send_start, send_size, place, receive_start, receive_size):
        return lax.ragged_all_to_all(
            rows, out, send_start, send_size, place, receive_size, axis_name=axis_name
        )

    def padded(out, rows, send_start, send_size, place, receive_start, receive_size):
        # XLA:CPU has no ragged all-to-all (jax-ml/jax#34755): the largest block a device can send, for each.
        most = min(rows.shape[0], out_rows)
        within = jnp.arange(most, dtype=jnp.int32)
        index = jnp.where(within < send_size[:, None], send_start[:, None] + within, rows.shape[0])
        blocks = lax.all_to_all(_take(rows, index), axis_name, 0, 0)
        blocks = blocks.reshape(devices * most, *rows.shape[1:])
        source, at, inside = _find(
            receive_start, receive_size, jnp.arange(out_rows, dtype=jnp.int32)
        )
        return _take(blocks, jnp.where(inside, source * most + at, devices * most))

    return lax.platform_dependent(*operands, cuda=ragged, rocm=ragged, tpu=ragged, default=padded)


def _send(rows, route: Route):
    """Sorted rows to their experts: grouped rows."""
    if route.axis_name is None:
        return _take(rows, route.arrived)
    out_rows = route.arrived.size
    arrived = _exchange(rows, out_rows, route.here, route.there, route.arrivals, route.axis_name)
    return _take(arrived, route.arrived)


def _send_back(rows, route: Route):
    """Grouped rows back to where they came from: sorted rows."""
    arrived = _take(rows, route.grouped)
    if route.axis_name is None:
        copies = route.order.size
        return (
            arrived[:copies] if arrived.shape[0] >= copies else _take(arrived, jnp.arange(copies))
        )
    return _exchange(
        arrived, route.order.size, route.arrivals, route.origin, route.here, route.axis_name
    )


def _pack(q, scale):
    """FP8 data (T, K) and its float32 scales as bytes (T, K + 4 * ceil(K/128)): one array moves."""
    bits = lax.bitcast_convert_type(q, jnp.uint8)
    scale_bits = lax.bitcast_convert_type(scale, jnp.uint8).reshape(scale.shape[0], -1)
    return jnp.concatenate([bits, scale_bits], axis=1)


def _unpack(packed, k, dtype):
    bits, scale = packed[:, :k], packed[:, k:]
    scale = lax.bitcast_convert_type(scale.reshape(-1, ceil_blocks(k), 4), jnp.float32)
    return lax.bitcast_convert_type(bits, dtype), scale


def _send_rows(x, copies, route: Route, format_of):
    """The rows of x (..., K) that `copies` gives for the sorted rows, to their experts, in x's dtype; through FP8."""
    if route.recipe is None:
        return _send(_take(x, copies), route)
    fmt = format_of(route.recipe)
    q = qt.rows(x, ("m", "k"), fmt).array
    packed = _send(_take(_pack(q.data, q.scale), copies), route)
    data, scale = _unpack(packed, x.shape[1], fmt.dtype)
    return qt.dequantize_blocks(data, scale, qt.ROW).astype(x.dtype)


def _inverse(route: Route):
    """The sorted row of each copy."""
    return (
        jnp.zeros_like(route.order)
        .at[route.order]
        .set(jnp.arange(route.order.size, dtype=jnp.int32), unique_indices=True)
    )


# --------------------------------------------------------------------------------------------------
# Both ways, each the other's gradient
# --------------------------------------------------------------------------------------------------


@jax.custom_vjp
def _to_experts(x, route: Route):
    """x (T, K) -> grouped rows (R, K)."""
    copies = route.order // route.shape[1]
    return _send_rows(x, copies, route, qt.forward_format)


def _to_experts_fwd(x, route):
    return _to_experts(x, route), route


def _to_experts_bwd(route, ct):
    tokens, choices = route.shape
    rows = _take(_send_back(ct, route), _inverse(route))
    rows = rows.reshape(tokens, choices, -1).astype(jnp.float32)
    return rows.sum(1).astype(ct.dtype), None


_to_experts.defvjp(_to_experts_fwd, _to_experts_bwd)


@jax.custom_vjp
def _from_experts(y, route: Route):
    """Grouped rows (R, N) -> sorted rows (T * k, N)."""
    return _send_back(y, route)


def _from_experts_fwd(y, route):
    return _from_experts(y, route), route


def _from_experts_bwd(route, ct):
    identity = jnp.arange(ct.shape[0], dtype=jnp.int32)
    return _send_rows(ct, identity, route, qt.gradient_format), None


_from_experts.defvjp(_from_experts_fwd, _from_experts_bwd)


# --------------------------------------------------------------------------------------------------
# Public functions
# --------------------------------------------------------------------------------------------------


def dispatch(
    x: Any,
    expert: Any,
    num_experts: int,
    *,
    axis_name: str | None = None,
    max_rows: int | None = None,
    quantized: bool = True,
    recipe: Recipe | None = None,
) -> tuple[jax.Array, jax.Array, Route]:
    """Sends each token to the devices of its experts, as FP8 data and scales.

    One all-to-all of bytes (ragged on GPUs and TPUs, where only the rows that exist move; padded blocks elsewhere).
    Tokens of any number an expert, none too: no capacity, no padding of groups. Without an axis, or on one device, the
    same numbers result: tokens are quantized all the same, and every expert sees the same rows in the same order.

    Quantizing the result once more in the same format, as `ragged_dot` does, gives back the same FP8 data, and scales
    that are equal (`scale_format="pow2"`) or within the rounding of x's dtype.

    **Arguments:**

    - `x`: float32, bfloat16 or float16 `(T, K)`: this device's tokens.
    - `expert`: integers `(T, k)`: each token's experts. Below 0 or past the last: to none, for masked tokens.
    - `num_experts`: of all devices; a multiple of the axis's size. Device i has the i-th run of `num_experts / size`.
    - `axis_name`: the mesh axis of `shard_map` over which experts (and tokens) are cut; None for one device.
    - `max_rows`: rows of the result. None is what always suffices: the axis's size times `T * k`. With fewer, memory
      is saved, and tokens that find no place on an overfull device come out of `combine` as NaN.
    - `quantized`: False sends tokens, and gradients of results, in their own dtype: what FP8 is compared with.
    - `recipe`: a `jaxfp8.Recipe`: `dtype` and `scale_format` of tokens, `grad_dtype` and `grad_scale_format` of
      gradients; None is the one in force.

    **Returns:**

    - tokens `(max_rows, K)` in x's dtype, sorted by expert; zero past the last group. The gradient passes straight
      through the quantization.
    - int32 `(num_experts / size,)`, the tokens of each of this device's experts: `group_sizes` of `ragged_dot`.
    - the `Route`, for `combine`.

    **Raises:** TypeError or ValueError for operands that do not fit, or an axis that is not one of `shard_map`'s.
    """
    function = "dispatch"
    recipe = current_recipe(function, recipe) if quantized else None
    x = checks.array(function, "x", x, "(T, K)")
    if not (hasattr(expert, "shape") and jnp.issubdtype(expert.dtype, jnp.integer)):
        got = getattr(expert, "dtype", type(expert).__name__)
        raise TypeError(f"{function}: expert is {got}; allowed: integers (T, k)")
    expert = jnp.asarray(expert)
    if expert.ndim != 2 or expert.shape[0] != x.shape[0] or expert.shape[1] == 0:
        raise ValueError(
            f"{function}: expert has shape {expert.shape}; allowed: ({x.shape[0]}, k), k at least 1, for x {x.shape}"
        )
    devices = 1 if axis_name is None else _axis_size(function, axis_name)
    if num_experts < 1 or num_experts % devices:
        raise ValueError(
            f"{function}: num_experts is {num_experts}; allowed: a positive multiple of the {devices} devices of "
            f"axis {axis_name!r}"
        )
    if max_rows is not None and max_rows < 1:
        raise ValueError(f"{function}: max_rows is {max_rows}; allowed: a positive int, or None")
    with jax.named_scope("jaxfp8.dispatch"):
        x, expert = match_varying([x, expert])
        route, group_sizes = _plan(expert, num_experts, axis_name, devices, max_rows, recipe)
        return _to_experts(x, route), group_sizes, route


def combine(y: Any, gate: Any, route: Route) -> jax.Array:
    """Brings the experts' results back to their tokens and adds them, weighted.

    Rows move in y's dtype, so give it bfloat16; their gradients move in FP8, as `dispatch` moves tokens.

    **Arguments:**

    - `y`: float32, bfloat16 or float16 `(max_rows, N)`: a row for each that `dispatch` returned.
    - `gate`: a floating-point array `(T, k)`: the weight of each of a token's experts.
    - `route`: what `dispatch` returned.

    **Returns:** `(T, N)` in y's dtype; the sum is float32. NaN where an expert had no place for the token.

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
    checks.same(function, "rows", "dispatch's result", route.arrived.size, "y", y.shape[0])
    with jax.named_scope("jaxfp8.combine"):
        rows = _from_experts(y, route)
        rows = jnp.where(route.lost[:, None], jnp.nan, rows)
        rows = _take(rows, _inverse(route)).reshape(*route.shape, -1).astype(jnp.float32)
        # A copy that was sent nowhere is a row of zeros.
        return jnp.sum(rows * gate.astype(jnp.float32)[..., None], axis=1).astype(y.dtype)


def _axis_size(function, axis_name) -> int:
    try:
        return math.prod(
            lax.axis_size(a) for a in (axis_name if isinstance(axis_name, tuple) else (axis_name,))
        )
    except NameError:
        raise ValueError(
            f"{function}: axis_name is {axis_name!r}; allowed: a mesh axis of the shard_map that this is called in"
        ) from None
