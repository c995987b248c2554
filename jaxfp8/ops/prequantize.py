"""Weights that are quantized ahead of their products, and gathered in FP8."""

from __future__ import annotations

import math
from typing import Any

import jax.numpy as jnp
from jax import lax

from .._arrays import checks
from .._arrays.blocks import BLOCK
from .._arrays.quantized_array import QuantizedArray
from .._arrays.quantized_weight import QuantizedWeight
from .._arrays.recipe import Recipe, current_recipe, forward_format
from ..kernels.agreed import quantize_agreed
from ..kernels.quantize import quantize, quantize_weight


def prequantize(w: Any, *, recipe: Recipe | None = None, frozen: bool = False) -> QuantizedWeight:
    """Quantizes a weight once, for as many products as follow: microbatches, or the devices of an FSDP axis.

    `jaxfp8.linear`, `ragged_dot`, `mlp` and `ragged_mlp` take the result in place of the weight, with the same numbers.
    Gradients go to the weight as if it had been passed itself. A sharded weight is quantized where its shards live.

    **Arguments:**

    - `w`: float32, bfloat16 or float16 `(..., K, N)`: `(K, N)`, experts `(G, K, N)`, or layers stacked for `scan`.
    - `recipe`: a `jaxfp8.Recipe`, for the FP8 type and the scale format; None is the one in force.
    - `frozen`: FP8 alone, in one orientation: one byte a parameter, and no gradient.

    **Returns:** a `QuantizedWeight`.

    **Raises:** TypeError or ValueError for a wrong dtype or rank.
    """
    w = checks.array("prequantize", "w", w, "(..., K, N)")
    nt, nn = quantize_weight(lax.stop_gradient(w), recipe=recipe)
    bits_nt, bits_nn = (lax.bitcast_convert_type(q.data, jnp.uint8) for q in (nt, nn))
    if frozen:
        return QuantizedWeight(None, bits_nt, None, lax.stop_gradient(nn.scale), nn.dtype)
    return QuantizedWeight(w, bits_nt, bits_nn, nn.scale, nn.dtype)


def frozen_operand(w: Any, recipe: Recipe | None) -> QuantizedArray:
    """A weight (N, K), as it lies, in FP8 alone."""
    return quantize(lax.stop_gradient(w), (BLOCK, BLOCK), recipe=recipe)


def all_gather_weight(
    w: Any, axis_name: Any, *, axis: int, recipe: Recipe | None = None
) -> QuantizedWeight:
    """Gathers a weight from its shards in FP8, in `shard_map`: FSDP.

    The shard is quantized where it lives; one byte an element and the scales move. Of the whole weight only the FP8
    copies exist. The gradient is summed over the axis and scattered to the shards (one reduce-scatter, in the recipe's
    `wgrad_dtype`). Blocks have the bits of the whole weight's: devices whose shards cut one agree on its scale.

    **Arguments:**

    - `w`: the shard: an array `(..., K, N)`, or a `QuantizedWeight`.
    - `axis_name`: mesh axes of `shard_map`, a name or a tuple of them.
    - `axis`: the axis of w that they cut: -2 (K), -1 (N), or an axis before.
    - `recipe`: as `jaxfp8.prequantize`.

    **Returns:** the `QuantizedWeight` of the whole weight.

    **Raises:** TypeError or ValueError for a wrong dtype, rank or axis, or if shards of a `QuantizedWeight`, whose
    scales are given, cut a block of 128.
    """
    function = "all_gather_weight"
    made_here = not isinstance(w, QuantizedWeight)
    if made_here:
        w = checks.array(function, "w", w, "(..., K, N)")
    if not -w.ndim <= axis < w.ndim:
        raise ValueError(f"{function}: axis is {axis}; allowed: {-w.ndim} to {w.ndim - 1}")
    axis %= w.ndim
    names = axis_name if isinstance(axis_name, tuple) else (axis_name,)
    devices = math.prod(lax.axis_size(a) for a in names)
    dimension = {w.ndim - 2: "K", w.ndim - 1: "N"}.get(axis)
    cut = bool(dimension) and devices > 1 and w.shape[axis] % BLOCK != 0
    if cut and not made_here:
        raise ValueError(
            f"{function}: the shard has {dimension}={w.shape[axis]} on each of {devices} devices, which cuts blocks "
            f"of {BLOCK} whose scales a QuantizedWeight has already; allowed: a multiple of {BLOCK}, or an array"
        )
    recipe = current_recipe(function, recipe)

    def gather(x, axis):
        return lax.all_gather(x, axis_name, axis=axis, tiled=True)

    if cut:
        bits_nn, scale, fp8_dtype = _quantize_cut(w, axis, names, recipe)
        value = w
    else:
        w = prequantize(w, recipe=recipe) if made_here else w
        value, bits_nn, scale, fp8_dtype = w.value, w.bits_nn, gather(w.scale, axis), w.fp8_dtype
    # One orientation moves, in which shards lie behind one another; a transpose then costs less than a second gather.
    if dimension == "N":
        bits_nt = gather(jnp.swapaxes(bits_nn, -1, -2) if cut else w.bits_nt, w.ndim - 2)
        bits_nn = jnp.swapaxes(bits_nt, -1, -2)
    else:
        bits_nn = gather(bits_nn, axis)
        bits_nt = jnp.swapaxes(bits_nn, -1, -2)
    # Read by no product: dead code, whose transpose is the reduce-scatter.
    value = gather(value.astype(recipe.made_in(value.dtype)), axis).astype(value.dtype)
    return QuantizedWeight(value, bits_nt, bits_nn, scale, fp8_dtype)


def _quantize_cut(w, axis: int, names, recipe: Recipe):
    """Bits (..., K, N) of this device's shard and the scales of the whole weight, whose blocks the shards cut."""
    fmt = forward_format(recipe)
    blocked = {a: names if a == axis else () for a in (w.ndim - 2, w.ndim - 1)}
    data, scale = quantize_agreed(lax.stop_gradient(w), blocked, fmt.dtype, fmt.pow2)
    return lax.bitcast_convert_type(data, jnp.uint8), scale, fmt.dtype
