"""Products of train_lm: the only difference between the two models."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

import jaxfp8


@dataclasses.dataclass(frozen=True)
class Products:
    """The products of a layer.

    linear:      x (..., K) bfloat16, w (K, N), dtype -> (..., N) of that dtype
    mlp:         SwiGLU: x (..., K) bfloat16, gate and up (K, 2, F), down (F, N), dtype -> (..., N)
    ragged_mlp:  x (M, K) bfloat16, gate and up (G, K, 2, F), down (G, F, N), group_sizes int32
                 (G,), dtype -> (M, N); a row goes through the SwiGLU of its group
    gather:      this device's part of a float32 weight, axis -> the whole weight, cut along that
                 axis over the mesh axis "data", for the products above (gate and up: (..., K, 2 F))
    dispatch:    jaxfp8.dispatch, in the precision in which tokens travel
    """

    linear: Callable[..., Array]
    mlp: Callable[..., Array]
    ragged_mlp: Callable[..., Array]
    gather: Callable[[Array, int], Any]
    dispatch: Callable[..., Any]


def bf16_products() -> Products:
    def gather(w, axis):
        w = w.astype(jnp.bfloat16)
        return jax.lax.all_gather(w, "data", axis=axis % w.ndim, tiled=True)

    def linear(x, w, dtype=jnp.bfloat16):
        return jnp.dot(x, w.astype(jnp.bfloat16), preferred_element_type=dtype)

    def ragged_dot(x, w, sizes, dtype=jnp.bfloat16):
        w = w.astype(jnp.bfloat16)
        return jax.lax.ragged_dot(x, w, sizes, preferred_element_type=dtype)

    def mlp(x, gate_up, down, dtype=jnp.bfloat16):
        hidden = linear(x, gate_up.reshape(x.shape[-1], -1))
        return linear(swiglu(hidden), down, dtype)

    def ragged_mlp(x, gate_up, down, sizes, dtype=jnp.bfloat16):
        hidden = ragged_dot(x, gate_up.reshape(-1, x.shape[-1], 2 * down.shape[-2]), sizes)
        return ragged_dot(swiglu(hidden), down, sizes, dtype)

    dispatch = functools.partial(jaxfp8.dispatch, quantized=False)
    return Products(linear, mlp, ragged_mlp, gather, dispatch)


def swiglu(gate_up: Array) -> Array:
    gate, up = jnp.split(gate_up, 2, axis=-1)
    return jax.nn.silu(gate) * up


def fp8_products(recipe: jaxfp8.Recipe) -> Products:
    # Forward, dgrad and wgrad run in FP8. The weights are quantized from their float32 masters.
    def gather(w, axis):
        return jaxfp8.all_gather_weight(w, "data", axis=axis, recipe=recipe)

    def linear(x, w, dtype=jnp.bfloat16):
        return jaxfp8.linear(x, w, recipe=recipe, preferred_element_type=dtype)

    def mlp(x, gate_up, down, dtype=jnp.bfloat16):
        return jaxfp8.mlp(x, gate_up, down, recipe=recipe, preferred_element_type=dtype)

    def ragged_mlp(x, gate_up, down, sizes, dtype=jnp.bfloat16):
        return jaxfp8.ragged_mlp(
            x, gate_up, down, sizes, recipe=recipe, preferred_element_type=dtype
        )

    dispatch = functools.partial(jaxfp8.dispatch, recipe=recipe)
    return Products(linear, mlp, ragged_mlp, gather, dispatch)
