"""Arithmetic of 128-wide blocks and of the group-padded token axis, shared by shapes, references and checks."""

from __future__ import annotations

import jax.numpy as jnp
from jax import lax

BLOCK = 128
"""Width of a quantization block along the contraction (DeepSeek-V3, arXiv 2412.19437, section 3.3)."""


def ceil_blocks(size: int) -> int:
    """Blocks of 128 that cover `size` elements; the last may be short."""
    return -(-size // BLOCK)


def padded_tokens(tokens: int, groups: int) -> int:
    """Length of the group-padded token axis: enough for any `groups` sizes whose sum is at most `tokens`."""
    return (ceil_blocks(tokens) + groups) * BLOCK


def group_ends(group_sizes, tokens: int):
    """End row of each group, int32 (G,). Negative sizes count as zero; groups are clipped to `tokens` rows.

    The sum saturates instead of overflowing: every partial sum is at most `tokens`.
    """
    sizes = jnp.clip(group_sizes.astype(jnp.int32), 0, tokens)
    return lax.associative_scan(lambda a, b: jnp.minimum(a + b, tokens), sizes)


def group_bounds(group_sizes, tokens: int):
    """Start and end row of each group, two int32 (G,)."""
    ends = group_ends(group_sizes, tokens)
    starts = jnp.concatenate([jnp.zeros(1, jnp.int32), ends])[:-1]
    return starts, ends


def padded_starts(starts, ends):
    """First token of each group in the group-padded token axis, int32 (G,)."""
    padded = (ends - starts + BLOCK - 1) // BLOCK * BLOCK
    return jnp.cumsum(padded, dtype=jnp.int32) - padded


def group_at(starts, position):
    """The last group that starts at or before each position: int32 of position's shape, -1 before the first group.

    Counted by comparison: `jnp.searchsorted` fails in a partly manual mesh and mixes integer widths under x64.
    """
    return jnp.sum(starts <= position[..., None], axis=-1, dtype=jnp.int32) - 1
