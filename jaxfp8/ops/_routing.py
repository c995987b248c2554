"""Which rows each expert multiplies: the copies of all tokens in order of expert, without a sort.

A counting sort in three levels: a copy's rank is the number of earlier copies for its expert in its block of 128, in
earlier blocks of its chunk of 128 blocks, and in earlier chunks, after all copies for lower experts. Each count is one
reduction over comparisons, which XLA fuses into one kernel; sorts and cumulative sums over all copies take many.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

WIDTH = 128
"""Copies in a block, and blocks in a chunk."""


class Routing(NamedTuple):
    """R rows in order of expert, within one in order of token and choice; copies for no expert are left out.

    **Arguments:**

    - `source`: int32 `(R,)`, the token of each row; T past the last group.
    - `copy`: int32 `(R,)`, token * k + choice of each row; `T * k` past the last group.
    - `position`: int32 `(T, k)`, the row of each copy; -1 of one for no expert, R of one that found no row among R.
    - `group_sizes`: int32 `(E,)`, rows of each expert; clipped to R in all.
    """

    source: jax.Array
    copy: jax.Array
    position: jax.Array
    group_sizes: jax.Array


def _earlier(counts):
    """For (..., n, E), the sum over the entries before each along axis n, which is short."""
    n = counts.shape[-2]
    before = jnp.arange(n)[:, None] > jnp.arange(n)
    return jnp.sum(jnp.where(before[..., None], counts[..., None, :, :], 0), -2, dtype=jnp.int32)


def plan(expert, num_experts: int, rows: int | None = None) -> Routing:
    """The routing of `expert` (T, k), integers; below 0 or past the last: for no expert.

    `rows` is R; None is T * k, which always suffices. With fewer, the last ones of all are lost.
    """
    total, choices = expert.size, expert.shape[1]
    rows = total if rows is None else rows
    # Compared before the cast: it would wrap large values into experts. Small types may not reach num_experts.
    if expert.dtype.itemsize < 4:
        expert = expert.astype(jnp.int32)
    inside = ((expert >= 0) & (expert < num_experts)).reshape(total)
    flat = jnp.where(inside, expert.reshape(total), num_experts).astype(jnp.int32)
    chunks = -(-total // WIDTH**2)
    if isinstance(chunks, int):  # a symbolic one is at least 1 by JAX's rules
        chunks = max(1, chunks)
    padded = jnp.pad(flat, (0, chunks * WIDTH**2 - total), constant_values=num_experts)
    blocks = padded.reshape(chunks, WIDTH, WIDTH)

    experts = jnp.arange(num_experts, dtype=jnp.int32)
    per_block = jnp.sum(blocks[..., None] == experts, axis=2, dtype=jnp.int32)
    per_chunk = per_block.sum(1, dtype=jnp.int32)
    sizes = per_chunk.sum(0, dtype=jnp.int32)
    first = jnp.sum(jnp.where(experts[:, None] > experts, sizes, 0), 1, dtype=jnp.int32)
    start = first + _earlier(per_chunk)[:, None] + _earlier(per_block)  # (chunk, block, expert)

    at = jnp.arange(WIDTH)
    same = blocks[..., :, None] == blocks[..., None, :]
    rank = jnp.sum(same & (at[:, None] > at), axis=-1, dtype=jnp.int32)
    index = jnp.minimum(blocks, num_experts - 1)
    position = jnp.take_along_axis(start, index, axis=-1, mode="promise_in_bounds") + rank
    position = position.reshape(-1)[:total]

    # Copies without a row get one of their own past the end, which is dropped: indices are unique.
    kept = inside & (position < rows)
    number = jnp.arange(total, dtype=jnp.int32)
    copy = jnp.full(rows, total, jnp.int32)
    place = jnp.where(kept, position, rows + number)
    copy = copy.at[place].set(number, mode="drop", unique_indices=True)
    position = jnp.where(inside, jnp.minimum(position, rows), -1)
    sizes = jnp.minimum(first + sizes, rows) - jnp.minimum(first, rows)
    return Routing(copy // choices, copy, position.reshape(expert.shape), sizes)
