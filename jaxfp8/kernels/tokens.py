"""The token axis of a quantizer: which dimensions are tokens, in what order, and in which groups."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

from .._arrays.blocks import (
    BLOCK,
    ROW,
    group_at,
    group_bounds,
    padded_starts,
    padded_tokens,
    quantize_blocks,
)
from .._primitives.call import arrange
from .._primitives.mesh import full_spec, to_spec


def token_axis(sizes, tokens):
    """The row behind each token of the group-padded axis, `tokens` where there is none: int32 (T,)."""
    groups = sizes.shape[0]
    starts, ends = group_bounds(sizes, tokens)
    first = padded_starts(starts, ends)
    t = jnp.arange(padded_tokens(tokens, groups), dtype=jnp.int32)
    group = group_at(first, t)
    row = starts[group] + t - first[group]
    return jnp.where(row < ends[group], row, tokens)


def quantize_token_axis(spread, inside, dtype, pow2):
    """Columns (K, T) of rows (T, K) that lie along the group-padded axis, of which some are none."""
    data, scale = quantize_blocks(spread.T, ROW, dtype, pow2)
    return [jnp.where(inside, data, jnp.zeros((), dtype)), scale]  # a gap is zero also beside a NaN


def reference_ragged_columns(x, sizes, *, dtype, pow2):
    """(M, K) -> (K, T): the transpose of x, each group starting at a multiple of 128, zeros between."""
    tokens, _ = x.shape
    row = token_axis(sizes, tokens)
    x = jnp.pad(x, [(0, 1), (0, 0)])  # the row that stands for none
    return quantize_token_axis(x[row], row < tokens, dtype, pow2)


def cuts_blocks(x, tail=1) -> bool:
    """Whether the type of (..., tokens, *tail) has shards of tokens that are not whole blocks: columns gather them."""
    type_ = jax.typeof(x)
    axes = full_spec(type_.sharding.spec, x.ndim)[-1 - tail]
    shards = math.prod(type_.sharding.mesh.shape[a] for a in axes)
    return shards > 1 and x.shape[-1 - tail] % (shards * BLOCK) != 0


def order_tokens(x, dims, tokens, merge, tail=1):
    """x as (batch, tokens, *tail), with token dimensions merged from the last on while blocks straddle them."""
    batch, last = tuple(d for d in dims[:-tail] if d not in tokens), dims[-tail:]
    x, dims = arrange(x, dims, [(d,) for d in batch + tokens + last]), batch + tokens + last
    while merge and len(tokens) > 1 and x.shape[-1 - tail] % BLOCK:
        type_ = jax.typeof(x)
        spec = full_spec(type_.sharding.spec, x.ndim)
        if spec[-1 - tail]:  # a merged axis can only be sharded as its major part is
            whole = jax.sharding.NamedSharding(
                type_.sharding.mesh, to_spec(spec[: -1 - tail] + ((),) + spec[-tail:])
            )
            x = jax.sharding.reshard(x, whole)
        *lead, major, minor = x.shape[:-tail]
        x = x.reshape(*lead, major * minor, *x.shape[-tail:])
        tokens = tokens[:-2] + (tokens[-2] + tokens[-1],)
        dims = batch + tokens + last
    return x, dims, tokens


def ragged_dims(dims, sizes_dims):
    """Dimensions of the columns of (m, k): (..., k, t), t the group-padded token axis."""
    new = tuple(dict.fromkeys(sizes_dims[:-1] + dims[:-2]))
    return new + (dims[-1], "t")
