"""Quantization where shards cut blocks: devices that share a block agree on its scale, then each quantizes its own.

What moves to agree is a maximum a block, 4 bytes of 128 or 16384 elements, in one all-reduce over the axes that cut;
the data has the bits that quantizing the whole array gives, and any width of shard keeps its place. XLA operations on
every platform.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from .._arrays.blocks import (
    BLOCK,
    block_scales,
    ceil_blocks,
    encode,
    to_float32,
    top_magnitudes,
)
from .._primitives.call import Call


class Window(NamedTuple):
    """Where a shard's part of a dimension lies among the blocks of the whole.

    `first`: the block of its first element, which is the block's element `phase`; `touched`: as many blocks as a part
    of this size can touch; `total`: of the whole.
    """

    first: jax.Array | int
    phase: jax.Array | int
    touched: int
    total: int


def window(size: int, axes) -> Window:
    """Of a part of `size` elements on each device of these mesh axes; of no axes, the whole."""
    if not axes:
        return Window(0, 0, ceil_blocks(size), ceil_blocks(size))
    start = lax.axis_index(axes) * size
    devices = math.prod(lax.axis_size(a) for a in axes)
    touched = ceil_blocks(size + BLOCK - 1)
    return Window(start // BLOCK, start % BLOCK, touched, ceil_blocks(size * devices))


def quantize_agreed(x, blocked, dtype, pow2):
    """FP8 data like x, and the scales of the whole array's blocks.

    `blocked`: the mesh axes by which the devices cut each blocked axis of x, by its number; () where they do not.
    """
    x = to_float32(x)
    windows = {axis: window(x.shape[axis], axes) for axis, axes in blocked.items()}

    def sizes(default, get):
        return [get(windows[a]) if a in windows else d for a, d in enumerate(default)]

    padded = sizes(x.shape, lambda w: w.touched * BLOCK)
    phases, firsts = (sizes([0] * x.ndim, get) for get in (lambda w: w.phase, lambda w: w.first))
    x_padded = lax.dynamic_update_slice(jnp.zeros(padded, x.dtype), x, phases)
    split, within = [], []
    for axis, size in enumerate(padded):
        split += [size // BLOCK, BLOCK] if axis in windows else [size]
        within += [len(split) - 1] if axis in windows else []
    x_padded = x_padded.reshape(split)

    here = top_magnitudes(x_padded, tuple(within))
    room = sizes(here.shape, lambda w: w.touched + w.total)
    tops = lax.dynamic_update_slice(jnp.zeros(room, here.dtype), here, firsts)
    cut = sum(blocked.values(), ())
    scale = block_scales(lax.pmax(tops, cut) if cut else tops, dtype, pow2)
    own = lax.dynamic_slice(scale, firsts, here.shape)
    data = encode(x_padded, jnp.expand_dims(own, within), dtype).reshape(padded)
    whole = tuple(slice(n) for n in sizes(scale.shape, lambda w: w.total))
    return lax.dynamic_slice(data, phases, x.shape), scale[whole]


def quantize_named(x, dims, call: Call, cut):
    """The results of a quantizer of x, in pairs of data and scales as `call` names them; `cut`: mesh axes by name."""
    attributes = dict(call.attributes)
    results, done = [], {}
    for data_dims, scale_dims in zip(call.outs[::2], call.outs[1::2], strict=True):
        names = frozenset(d[:-1] for d in scale_dims if d.endswith("/"))
        if names not in done:
            blocked = {dims.index(n): cut.get(n, ()) for n in names}
            done[names] = quantize_agreed(x, blocked, attributes["dtype"], attributes["pow2"])
        for v, order in zip(done[names], (data_dims, scale_dims), strict=True):
            results.append(v.transpose([dims.index(d.rstrip("/")) for d in order]))
    return results


def agreed_quantizer(x, *, call: Call, cut):
    """`ShardedOperation.agreed` of the quantizers of one array."""
    return quantize_named(x, call.ins[0], call, cut)
