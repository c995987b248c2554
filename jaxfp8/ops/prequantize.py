"""Weights that are quantized ahead of their products, and gathered in FP8."""

from __future__ import annotations

import math
from typing import Any

import jax.numpy as jnp
from jax import lax

from .._arrays import checks
from .._arrays.blocks import BLOCK
from .._arrays.quantized_weight import QuantizedWeight
from .._arrays.recipe import Recipe
from ..kernels.quantize import quantize_weight


def prequantize(w: Any, *, recipe: Recipe | None = None) -> QuantizedWeight:
    """Quantizes a weight once, for as many products as follow: microbatches, or the devices of an FSDP axis.

    `jaxfp8.linear`, `ragged_dot`, `mlp` and `ragged_mlp` take the result in place of the weight, with the same numbers.
    Gradients go to the weight as if it had been passed itself. A sharded weight is quantized where its shards live.

    **Arguments:**

    - `w`: float32, bfloat16 or float16 `(..., K, N)`: `(K, N)`, experts `(G, K, N)`, or layers stacked for `scan`.
    - `recipe`: a `jaxfp8.Recipe`, for the FP8 type and the scale format; None is the one in force.

    **Returns:** a `QuantizedWeight`.

    **Raises:** TypeError or ValueError for a wrong dtype or rank.
    """
    w = checks.array("prequantize", "w", w, "(..., K, N)")
    nt, nn = quantize_weight(lax.stop_gradient(w), recipe=recipe)
    bits_nt, bits_nn = (lax.bitcast_convert_type(q.data, jnp.uint8) for q in (nt, nn))
    return QuantizedWeight(w, bits_nt, bits_nn, nn.scale, nn.dtype)


def all_gather_weight(
    w: Any, axis_name: Any, *, axis: int, recipe: Recipe | None = None
) -> QuantizedWeight:
    """Gathers a weight from its shards in FP8, in `shard_map`: FSDP.

    The shard is quantized where it lives; one byte an element and the scales move. Of the whole weight only the FP8
    copies exist. The gradient is summed over the axis and scattered to the shards (one reduce-scatter). Blocks have
    the bits of the whole weight's, since a shard owns whole ones.

    **Arguments:**

    - `w`: the shard: an array `(..., K, N)`, or a `QuantizedWeight`.
    - `axis_name`: mesh axes of `shard_map`, a name or a tuple of them.
    - `axis`: the axis of w that they cut: -2 (K), -1 (N), or an axis before.
    - `recipe`: as `jaxfp8.prequantize`.

    **Returns:** the `QuantizedWeight` of the whole weight.

    **Raises:** TypeError or ValueError for a wrong dtype, rank or axis, or if shards cut a block of 128.
    """
    function = "all_gather_weight"
    if not isinstance(w, QuantizedWeight):
        w = prequantize(checks.array(function, "w", w, "(..., K, N)"), recipe=recipe)
    if not -w.ndim <= axis < w.ndim:
        raise ValueError(f"{function}: axis is {axis}; allowed: {-w.ndim} to {w.ndim - 1}")
    axis %= w.ndim
    dimension = {w.ndim - 2: "K", w.ndim - 1: "N"}.get(axis)
    names = axis_name if isinstance(axis_name, tuple) else (axis_name,)
    devices = math.prod(lax.axis_size(a) for a in names)
    if dimension and devices > 1 and w.shape[axis] % BLOCK:
        raise ValueError(
            f"{function}: the shard has {dimension}={w.shape[axis]} on each of {devices} devices, which cuts blocks "
            f"of {BLOCK}; allowed: a multiple of {BLOCK}: shard the other axis, over fewer devices, or pad {dimension}"
        )

    def gather(x, axis):
        return lax.all_gather(x, axis_name, axis=axis, tiled=True)

    transposed = {w.ndim - 2: w.ndim - 1, w.ndim - 1: w.ndim - 2}.get(axis, axis)
    # One orientation moves: a transpose reads and writes memory, which costs less than a second gather.
    bits_nt = gather(w.bits_nt, transposed)
    return QuantizedWeight(
        gather(
            w.value, axis
        ),  # read by no product: dead code, whose transpose is the reduce-scatter
        bits_nt,
        jnp.swapaxes(bits_nt, -1, -2),
        gather(w.scale, axis),
        w.fp8_dtype,
    )
