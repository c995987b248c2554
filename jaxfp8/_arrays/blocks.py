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


def _one_by_one(add, counts):
    """Running results over a symbolic number of counts, of which JAX has no cumulative sum."""
    zero = counts[0] - counts[0]  # varies over devices as the counts do

    def step(total, count):
        total = add(total, count)
        return total, total

    return lax.scan(step, zero, counts)[1]


def running_sum(counts):
    """The sum up to and with each of int32 (G,)."""
    if isinstance(counts.shape[0], int):
        return jnp.cumsum(counts, dtype=jnp.int32)
    return _one_by_one(jnp.add, counts)


def group_ends(group_sizes, tokens: int):
    """End row of each group, int32 (G,). Negative sizes count as zero; groups are clipped to `tokens` rows.

    The sum saturates instead of overflowing: every partial sum is at most `tokens`.
    """
    sizes = jnp.clip(group_sizes.astype(jnp.int32), 0, tokens)
    running = lax.associative_scan if isinstance(sizes.shape[0], int) else _one_by_one
    return running(lambda a, b: jnp.minimum(a + b, tokens), sizes)


def group_bounds(group_sizes, tokens: int):
    """Start and end row of each group, two int32 (G,)."""
    ends = group_ends(group_sizes, tokens)
    starts = jnp.concatenate([jnp.zeros(1, jnp.int32), ends])[:-1]
    return starts, ends


def padded_starts(starts, ends):
    """First token of each group in the group-padded token axis, int32 (G,)."""
    padded = (ends - starts + BLOCK - 1) // BLOCK * BLOCK
    return running_sum(padded) - padded


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
    *lead, m, k = x.shape
    rows, columns = block
    blocks_m, blocks_k = -(-m // rows), -(-k // columns)
    pad = [(0, 0)] * len(lead) + [(0, blocks_m * rows - m), (0, blocks_k * columns - k)]
    x = jnp.pad(to_float32(x), pad).reshape(*lead, blocks_m, rows, blocks_k, columns)
    scale = block_scales(top_magnitudes(x, (-3, -1)), dtype, pow2)
    data = encode(x, scale[..., :, None, :, None], dtype)
    return data.reshape(*lead, blocks_m * rows, blocks_k * columns)[..., :m, :k], scale


def to_float32(x):
    """x in float32. Behind a barrier: XLA may else drop a rounding just before, and jit would differ from eager."""
    return x if x.dtype == jnp.float32 else lax.optimization_barrier(x).astype(jnp.float32)


_LEAST_NORMAL_BITS = 0x00800000


def _magnitudes(x):
    return lax.bitcast_convert_type(x, jnp.int32) & 0x7FFFFFFF


def top_magnitudes(x, axes):
    """The largest magnitude of float32 x over `axes`, as int32 bits; subnormals count as zero."""
    bits = _magnitudes(x)
    return jnp.max(jnp.where(bits < _LEAST_NORMAL_BITS, 0, bits), axis=axes, initial=0)


def block_scales(top_bits, dtype, pow2):
    """float32 scales of blocks with these largest magnitudes; NaN of a block that is not finite."""
    top = float(jnp.finfo(dtype).max)
    amax = lax.bitcast_convert_type(top_bits, jnp.float32)
    scale = jnp.maximum(amax * (np.float32(1) / np.float32(top)), SMALLEST_NORMAL)
    if pow2:
        bits = lax.bitcast_convert_type(scale, jnp.uint32)
        bits = (bits + np.uint32(0x007FFFFF)) & np.uint32(0xFF800000)
        scale = lax.bitcast_convert_type(bits, jnp.float32)
    scale = jnp.where(top_bits == 0, np.float32(1), scale)
    return jnp.where(top_bits >= 0x7F800000, np.float32(np.nan), scale)


def encode(x, scale, dtype):
    """FP8 data of float32 x, for scales of `block_scales` that broadcast to it."""
    top = float(jnp.finfo(dtype).max)
    x = jnp.where(_magnitudes(x) < _LEAST_NORMAL_BITS, 0.0, x)
    # Clip first: a JAX cast to float8_e4m3fn overflows to NaN.
    data = jnp.clip(x * (1 / scale), -top, top).astype(dtype)
    data = lax.bitcast_convert_type(data, jnp.uint8)
    data = jnp.where(jnp.isnan(scale), NAN_CODE, data)
    return lax.bitcast_convert_type(data, dtype)


def _spread(scale, width: int, size: int):
    """Each scale `width` times, `size` in all; by a reshape, in which an axis that is cut by its type stays cut."""
    spread = jnp.broadcast_to(scale[..., None], (*scale.shape, width))
    return spread.reshape(*scale.shape[:-1], scale.shape[-1] * width)[..., :size]


def dequantize_blocks(data, scale, block):
    """float32 `data * scale`, exact to one rounding."""
    *_, m, k = data.shape
    rows, columns = block
    scale = _spread(scale, columns, k)
    if rows != 1:
        scale = jnp.swapaxes(_spread(jnp.swapaxes(scale, -1, -2), rows, m), -1, -2)
    return data.astype(jnp.float32) * scale
