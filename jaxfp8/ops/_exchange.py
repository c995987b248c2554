"""Rows between devices: the tokens of an axis to the devices of their experts, and sums of what they gave back.

Every strategy is one linear map and its transpose:

    spread    rows of this device's T tokens        ->  rows of the S tokens that are present on each device
    collect   sums for the S tokens present here    ->  this device's T tokens, added over devices

Between the two, a device has an ordinary mixture of S tokens and its own experts. Gradients take the same ways.

    gather      everybody's tokens are present everywhere: S = devices * T. No index, no bound.
    all_to_all  a token goes once to each peer that has one of its experts, in blocks of `max_sent` tokens a peer:
                S = peers * max_sent. The fewest bytes where there are more peers than choices.
    ragged      the same tokens without blocks: `jax.lax.ragged_all_to_all`, S = devices * T. Only on request: XLA's
                moves 3 GB/s between two H200s (openxla/xla#33386).

On an axis of two levels, ("node", "gpu"), peers are the devices of equal rank of other nodes: a token crosses to a
node once, and is gathered inside it (DeepSeek-V3, arXiv 2412.19437, 3.2.2).

Collecting is a reduce-scatter written as an all-to-all of each device's sums, in the dtype they have, and a float32
sum in order of devices, rounded once: a ring's bytes, and the same bits each time, whoever adds.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
from jax import lax

from .._primitives.mesh import match_varying

Strategy = Literal["gather", "all_to_all", "ragged"]
STRATEGIES: tuple[Strategy, ...] = get_args(Strategy)


class Blocks(NamedTuple):
    """Where the rows for each peer lie, int32 (peers,): where they start, and how many there are."""

    start: Any
    size: Any


class Sent(NamedTuple):
    """Which tokens go to which peer; None where all tokens go to all.

    - `token`: int32, the token in each row of what is sent; T where there is none.
    - `back`: int32 (T, min(peers, k)), the rows of what comes back that belong to each token, in order of peers; past
      the end where there is none.
    - `lost`: bool (T, k), choices whose peer had no place for the token.
    - `here`, `there`, `arrivals`, `origin`: of a ragged exchange. The rows for each peer and where they start there;
      the rows of each peer here and where they start among those that it sends.
    """

    token: Any
    back: Any
    lost: Any
    here: Blocks | None = None
    there: Any = None
    arrivals: Blocks | None = None
    origin: Any = None


@dataclasses.dataclass(frozen=True)
class Levels:
    """The axes of an exchange: `outer` between peers, `inner` inside a node; () where there is none."""

    outer: tuple[str, ...]
    inner: tuple[str, ...]
    peers: int
    inside: int

    @property
    def devices(self) -> int:
        return self.peers * self.inside


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Exchange:
    """How the tokens of an axis reach their experts. A pytree.

    **Arguments:**

    - `sent`: which tokens go where; None where all go to all.
    - `levels`: the axes. `strategy`: between peers.
    - `own`: T, this device's tokens. `block`: tokens of one peer that are present here, at most.
    - `experts`: of this device.
    """

    sent: Sent | None
    levels: Levels = dataclasses.field(metadata={"static": True})
    strategy: Strategy = dataclasses.field(metadata={"static": True})
    own: int = dataclasses.field(metadata={"static": True})
    block: int = dataclasses.field(metadata={"static": True})
    experts: int = dataclasses.field(metadata={"static": True})

    @property
    def devices(self) -> int:
        return self.levels.devices

    @property
    def tokens(self) -> int:
        """S, the tokens present on a device; static."""
        return self.levels.devices * self.block

    @property
    def moves(self) -> bool:
        """Whether there is anything to move; collectives refuse arrays without rows."""
        return self.devices > 1 and self.own > 0

    @property
    def overflow(self) -> jax.Array:
        """int32 (), choices of this device's tokens whose peer had no place for them."""
        if self.sent is None:
            return jnp.zeros((), jnp.int32)
        return jnp.sum(self.sent.lost, dtype=jnp.int32)

    def present(self, token: Any) -> jax.Array:
        """The row of `spread`'s results for tokens by number (source device, then token); S stays S."""
        levels, block = self.levels, self.block
        if not levels.inner:
            return token
        device, within = token // block, token % block
        device = device % levels.inside * levels.peers + device // levels.inside
        return jnp.where(token < self.tokens, device * block + within, token)

    def by_presence(self, rows: Any) -> jax.Array:
        """Rows (S, ...) in order of the tokens' numbers, in the order of `spread`'s results."""
        return self._swap(rows, self.levels.peers, self.levels.inside)

    def by_number(self, rows: Any) -> jax.Array:
        """Rows (S, ...) of `spread`, in order of the tokens' numbers."""
        return self._swap(rows, self.levels.inside, self.levels.peers)

    def _swap(self, rows, major, minor):
        if not self.levels.inner:
            return rows
        parts = rows.reshape(major, minor, self.block, *rows.shape[1:])
        return parts.swapaxes(0, 1).reshape(rows.shape)


# --------------------------------------------------------------------------------------------------
# The plan
# --------------------------------------------------------------------------------------------------


def axis_names(axis_name: Any) -> tuple[str, ...]:
    return () if axis_name is None else axis_name if isinstance(axis_name, tuple) else (axis_name,)


def choose(strategy: Any, tokens: int, max_sent: int | None) -> Strategy:
    """The strategy that moves the fewest bytes: blocks of `max_sent` tokens a peer, or all T of them."""
    if strategy is not None:
        return strategy
    return "all_to_all" if max_sent is not None and max_sent < tokens else "gather"


def levels_of(function: str, axis_name: Any, strategy: Strategy) -> Levels:
    """**Raises:** ValueError for a name that is no axis of the shard_map in force."""
    axes = axis_names(axis_name)
    try:
        sizes = [lax.axis_size(a) for a in axes]
    except NameError:
        raise ValueError(
            f"{function}: axis_name is {axis_name!r}; allowed: a mesh axis of the shard_map that this is called in, "
            "or a tuple of them"
        ) from None
    flat = len(axes) if strategy == "ragged" else 1
    return Levels(axes[:flat], axes[flat:], math.prod(sizes[:flat]), math.prod(sizes[flat:]))


def plan_exchange(
    function: str,
    expert: Any,
    num_experts: int,
    axis_name: Any,
    strategy: Strategy | None = None,
    max_sent: int | None = None,
) -> tuple[Exchange, jax.Array]:
    """The exchange for `expert` (T, k), and each present token's experts on this device.

    The experts are int32 (S, k), by number of token (source device, then token): 0 to `experts` - 1, or `experts` for
    one that is elsewhere. A stable sort of them gives each expert the same tokens in the same order on any number of
    devices.

    **Raises:** ValueError for an axis that is not there, or experts that do not divide.
    """
    tokens, choices = expert.shape
    strategy = choose(strategy, tokens, max_sent)
    levels = levels_of(function, axis_name, strategy)
    if num_experts < 1 or num_experts % levels.devices:
        raise ValueError(
            f"{function}: num_experts is {num_experts}; allowed: a positive multiple of the {levels.devices} devices "
            f"of axis {axis_name!r}"
        )
    experts = num_experts // levels.devices
    inside = (expert >= 0) & (expert < num_experts)
    addressed = strategy != "gather" and levels.peers > 1 and tokens > 0
    block = tokens if max_sent is None or not addressed else min(max_sent, tokens)
    sent = None
    if addressed:
        peer = jnp.where(inside, expert // (experts * levels.inside), levels.peers)
        sent = (_blocks if strategy == "all_to_all" else _compact)(peer, levels, block)
    exchange = Exchange(sent, levels, strategy, tokens, block, experts)
    # One more than the expert: a row that nobody sent is zero, and asks for none.
    (here,) = spread(exchange, jnp.where(inside, expert + 1, 0))
    me = lax.axis_index(axis_names(axis_name)) if axis_name is not None else 0
    here = exchange.by_number(here) - 1 - me * experts
    return exchange, jnp.where((here >= 0) & (here < experts), here, experts)


def _places(peer, peers):
    """For choices of peers (T, k): each one's place among the peer's tokens, and whether it is the token's first there.

    Also how many tokens each peer gets.
    """
    needed = (peer[:, :, None] == jnp.arange(peers)).any(1).T  # (peers, T)
    place = jnp.cumsum(needed, 1, dtype=jnp.int32) - needed
    token = jnp.arange(peer.shape[0])[:, None]
    place = place.at[peer, token].get(mode="fill", fill_value=0)
    earlier = jnp.tri(peer.shape[1], k=-1, dtype=bool)
    first = ~((peer[:, :, None] == peer[:, None, :]) & earlier).any(2) & (peer < peers)
    return place, first, needed.sum(1, dtype=jnp.int32)


def _by_peer(peer, first, row, none, most):
    """`row` of each token's first choice of each peer, (T, most) in order of peers; `none` past those there are."""
    before = (first[:, None, :] & (peer[:, None, :] < peer[:, :, None])).sum(2)
    at = jnp.where(first, before, most)[:, :, None] == jnp.arange(most)
    return jnp.where(at, row[:, :, None], none).min(1)


def _blocks(peer, levels, block) -> Sent:
    """Blocks of `block` tokens for each peer."""
    tokens, choices = peer.shape
    peers = levels.peers
    place, first, _ = _places(peer, peers)
    kept = first & (place < block)
    row = jnp.where(kept, peer * block + place, peers * block)
    number = jnp.broadcast_to(jnp.arange(tokens, dtype=jnp.int32)[:, None], row.shape)
    token = jnp.full((peers * block,), tokens, jnp.int32).at[row].set(number, mode="drop")
    back = _by_peer(peer, first, row, peers * block, min(peers, choices))
    return Sent(token, back, (peer < peers) & (place >= block))


def _compact(peer, levels, block) -> Sent:
    """The tokens for each peer one after the other, and who has how many for whom."""
    tokens, choices = peer.shape
    peers, most = levels.peers, min(levels.peers, choices)
    place, first, counts = _places(peer, peers)
    start = jnp.cumsum(counts) - counts
    row = start.at[peer].get(mode="fill", fill_value=0) + place
    row = jnp.where(first, row, tokens * most).astype(jnp.int32)
    number = jnp.broadcast_to(jnp.arange(tokens, dtype=jnp.int32)[:, None], row.shape)
    token = jnp.full((tokens * most,), tokens, jnp.int32).at[row].set(number, mode="drop")
    back = _by_peer(peer, first, row, tokens * most, most)

    me = lax.axis_index(levels.outer)
    counts = lax.all_gather(counts, levels.outer)  # (source, destination)
    starts = (jnp.cumsum(counts, 1) - counts).astype(jnp.int32)  # among what the source sends
    places = (jnp.cumsum(counts, 0) - counts).astype(jnp.int32)  # among what the destination gets
    return Sent(
        token,
        back,
        jnp.zeros(peer.shape, bool),
        Blocks(starts[me], counts[me]),
        places[me],
        Blocks(places[:, me], counts[:, me]),
        starts[:, me],
    )


# --------------------------------------------------------------------------------------------------
# Moving rows
# --------------------------------------------------------------------------------------------------


def take(rows, index):
    """rows[index], zero where the index is past the end."""
    return rows.at[index].get(mode="fill", fill_value=0)


def spread(exchange: Exchange, *arrays: Any) -> list[jax.Array]:
    """Rows (T, ...) of each array to the devices where their tokens are present: (S, ...), zero where none is.

    Arrays of four bytes an element travel as one.
    """
    rows = match_varying(arrays) if len(arrays) > 1 else list(arrays)
    if not exchange.moves:
        return rows
    words = [i for i, a in enumerate(rows) if a.dtype.itemsize == 4 and a.ndim == 2]
    if len(words) < 2:
        return [_spread(exchange, a) for a in rows]
    bits = [lax.bitcast_convert_type(rows[i], jnp.int32) for i in words]
    widths = [b.shape[1] for b in bits]
    packed = _spread(exchange, jnp.concatenate(bits, 1))
    found = dict(zip(words, jnp.split(packed, list(_starts(widths))[1:], 1), strict=True))
    return [
        lax.bitcast_convert_type(found[i], a.dtype) if i in found else _spread(exchange, a)
        for i, a in enumerate(rows)
    ]


def _starts(sizes):
    at = 0
    for size in sizes:
        yield at
        at += size


def _spread(exchange, rows):
    levels, sent = exchange.levels, exchange.sent
    if levels.peers > 1:
        if sent is None:
            rows = lax.all_gather(rows, levels.outer, tiled=True)
        else:
            rows = take(rows, sent.token)
            if exchange.strategy == "ragged":
                rows = _ragged(
                    rows, exchange.tokens, sent.here, sent.there, sent.arrivals, levels.outer
                )
            else:
                rows = lax.all_to_all(rows, levels.outer, 0, 0, tiled=True)
    return lax.all_gather(rows, levels.inner, tiled=True) if levels.inside > 1 else rows


def collect(exchange: Exchange, *arrays: Any, lost: float = 0.0) -> list[jax.Array]:
    """Sums for the tokens present here (S, ...) back to their devices, added: (T, ...) in their dtype.

    Over devices the sum is float32, in order of devices, and rounded once at each level of the axis. Tokens that found
    no place with a peer get `lost`.
    """
    return [_collect(exchange, a, lost) if exchange.moves else a for a in arrays]


def _collect(exchange, rows, lost):
    levels, sent = exchange.levels, exchange.sent
    if levels.inside > 1:
        rows = _reduce_scatter(rows, levels.inner, levels.inside)
    if levels.peers == 1:
        return rows
    if sent is None:
        return _reduce_scatter(rows, levels.outer, levels.peers)
    if exchange.strategy == "ragged":
        size = sent.token.shape[0]
        rows = _ragged(rows, size, sent.arrivals, sent.origin, sent.here, levels.outer)
    else:
        rows = lax.all_to_all(rows, levels.outer, 0, 0, tiled=True)
    total = _ordered_sum([take(rows, at) for at in sent.back.T]).astype(rows.dtype)
    none = sent.lost.any(1).reshape(-1, *[1] * (rows.ndim - 1))
    return jnp.where(none, jnp.asarray(lost, rows.dtype), total)


def _reduce_scatter(rows, axes, devices):
    parts = lax.all_to_all(rows, axes, 0, 0, tiled=True)
    parts = parts.reshape(devices, rows.shape[0] // devices, *rows.shape[1:])
    return _ordered_sum(parts).astype(rows.dtype)


def _ordered_sum(parts):
    """float32, from zero, one part after the other."""
    total = jnp.zeros((), jnp.float32)
    for part in parts:
        total = total + part.astype(jnp.float32)
    return total


def _ragged(rows, out_rows, send: Blocks, place, receive: Blocks, axes):
    """Rows of every peer to every other: `send` says which of ours, `place` where they land there.

    `receive` says where those of each peer land here; the rest is zero.
    """
    peers = lax.axis_size(axes)
    operands = match_varying(
        [jnp.zeros((out_rows, *rows.shape[1:]), rows.dtype), rows, *send, place, *receive]
    )

    def ragged(out, rows, send_start, send_size, place, receive_start, receive_size):
        return lax.ragged_all_to_all(
            rows, out, send_start, send_size, place, receive_size, axis_name=axes
        )

    def padded(out, rows, send_start, send_size, place, receive_start, receive_size):
        # XLA:CPU has no ragged all-to-all (jax-ml/jax#34755): the largest block a device can send, for each.
        most = min(rows.shape[0], out_rows)
        within = jnp.arange(most, dtype=jnp.int32)
        index = jnp.where(within < send_size[:, None], send_start[:, None] + within, rows.shape[0])
        blocks = lax.all_to_all(take(rows, index), axes, 0, 0)
        blocks = blocks.reshape(peers * most, *rows.shape[1:])
        row = jnp.arange(out_rows, dtype=jnp.int32)
        source = jnp.searchsorted(receive_start, row, side="right").astype(jnp.int32) - 1
        at = row - receive_start[source]
        return take(blocks, jnp.where(at < receive_size[source], source * most + at, peers * most))

    return lax.platform_dependent(*operands, cuda=ragged, rocm=ragged, tpu=ragged, default=padded)
