"""Arithmetic of 128-wide blocks and of the group-padded token axis, shared by shapes, references and checks."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
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


ROW = (1, BLOCK)
SQUARE = (BLOCK, BLOCK)


SMALLEST_NORMAL = np.float32(2.0**-126)
NAN_CODE = np.uint8(0x7F)  # in both FP8 types


def quantize_blocks(x, block, dtype, pow2):
    """FP8 data and float32 scales of blocks over the last two axes; blocks at the edges may be short.

    One reduction over the magnitudes as integers orders finite values, then infinity, then NaN; a floating-point
    maximum may lose NaN (XLA:CPU's does).
    """
    top = float(jnp.finfo(dtype).max)
    *lead, m, k = x.shape
    rows, columns = block
    blocks_m, blocks_k = -(-m // rows), -(-k // columns)
    if x.dtype != jnp.float32:
        # Else XLA may drop a rounding to bfloat16 just before, and jit would differ from eager.
        x = lax.optimization_barrier(x).astype(jnp.float32)
    pad = [(0, 0)] * len(lead) + [(0, blocks_m * rows - m), (0, blocks_k * columns - k)]
    x = jnp.pad(x, pad).reshape(*lead, blocks_m, rows, blocks_k, columns)
    magnitude = lax.bitcast_convert_type(x, jnp.int32) & 0x7FFFFFFF
    subnormal = magnitude < 0x00800000
    x = jnp.where(subnormal, 0.0, x)
    top_bits = jnp.max(jnp.where(subnormal, 0, magnitude), axis=(-3, -1), initial=0)
    amax = lax.bitcast_convert_type(top_bits, jnp.float32)

    scale = jnp.maximum(amax * (np.float32(1) / np.float32(top)), SMALLEST_NORMAL)
    if pow2:
        bits = lax.bitcast_convert_type(scale, jnp.uint32)
        bits = (bits + np.uint32(0x007FFFFF)) & np.uint32(0xFF800000)
        scale = lax.bitcast_convert_type(bits, jnp.float32)
    nonfinite = top_bits >= 0x7F800000
    scale = jnp.where(top_bits == 0, np.float32(1), scale)
    scale = jnp.where(nonfinite, np.float32(np.nan), scale)

    def spread(v):
        return v[..., :, None, :, None]

    # Clip first: a JAX cast to float8_e4m3fn overflows to NaN.
    data = jnp.clip(x * spread(1 / scale), -top, top).astype(dtype)
    data = lax.bitcast_convert_type(data, jnp.uint8)
    data = jnp.where(spread(nonfinite), NAN_CODE, data)
    data = lax.bitcast_convert_type(data, dtype)
    return data.reshape(*lead, blocks_m * rows, blocks_k * columns)[..., :m, :k], scale


def dequantize_blocks(data, scale, block):
    """float32 `data * scale`, exact to one rounding."""
    *_, m, k = data.shape
    rows, columns = block
    scale = jnp.repeat(scale, columns, -1)[..., :k]
    if rows != 1:
        scale = jnp.repeat(scale, rows, -2)[..., :m, :]
    return data.astype(jnp.float32) * scale
