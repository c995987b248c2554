"""Products of train_lm: the only difference between the two models."""

from __future__ import annotations

import dataclasses
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
    moe:         x (T, K) bfloat16, each token's experts (T, k) and their gates (T, k), gate and up
                 (G, K, 2, F), down (G, F, N), dtype -> (T, N): the gated sum of the SwiGLU of each
                 token's experts; they live on the devices of the mesh axis `axis_name`, if given
    gather:      this device's part of a float32 weight, axis -> the whole weight, cut along that
                 axis over the mesh axis "data", for the products above (gate and up: (..., K, 2 F))
    """

    linear: Callable[..., Array]
    mlp: Callable[..., Array]
    moe: Callable[..., Array]
    gather: Callable[[Array, int], Any]


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

    def moe(x, expert, gate, gate_up, down, axis_name=None, dtype=jnp.bfloat16):
        rows, sizes, route = jaxfp8.dispatch(
            x, expert, num_experts(down, axis_name), axis_name=axis_name, quantized=False
        )
        hidden = ragged_dot(rows, gate_up.reshape(-1, x.shape[-1], 2 * down.shape[-2]), sizes)
        y = ragged_dot(swiglu(hidden), down, sizes, dtype)
        return jaxfp8.combine(y, gate, route)

    return Products(linear, mlp, moe, gather)


def num_experts(down: Any, axis_name: str | None) -> int:
    """Of all devices, of which each has `down` of its own."""
    return down.shape[0] * (1 if axis_name is None else jax.lax.axis_size(axis_name))


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

    def moe(x, expert, gate, gate_up, down, axis_name=None, dtype=jnp.bfloat16):
        options = {"recipe": recipe, "preferred_element_type": dtype}
        return jaxfp8.moe(x, expert, gate, gate_up, down, axis_name=axis_name, **options)

    return Products(linear, mlp, moe, gather)
