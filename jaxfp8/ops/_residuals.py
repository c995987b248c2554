"""What a differentiable operation keeps for its backward pass."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from ..kernels.named import Named, named

RESIDUAL_NAME = "jaxfp8_residual"
PRE_ACTIVATION_NAME = "jaxfp8_pre_activation"
"""The hidden layer of an MLP before its activation, in bfloat16 or float32: a product, which FP8 policies recompute."""


def save(q: Named | None, keep: bool = True):
    """A residual, its data as uint8; with a name for remat policies, unless the caller had it before. None stays.

    Remat puts reduce_precision(4, 3) on float residuals, for which 448 is infinite; integers it leaves alone.
    """
    if q is None:
        return None
    bits = lax.bitcast_convert_type(q.array.data, jnp.uint8)
    if not keep:
        return bits, q.array.scale
    return checkpoint_name(bits, RESIDUAL_NAME), checkpoint_name(q.array.scale, RESIDUAL_NAME)


def load(saved, dtype, dims, block, blocked=()) -> Named:
    """What `save` kept, with the names of its dimensions."""
    bits, scale = saved
    return named(lax.bitcast_convert_type(bits, dtype), scale, dims, block, blocked)


def save_fp8_residuals():
    """A remat policy that keeps the FP8 copies of the differentiable operations and recomputes all else.

    Costs one byte for an element of each input and weight (and scales), and saves the backward pass from quantizing
    them again. Products are not kept. For `jax.checkpoint(f, policy=...)`.
    """
    return jax.checkpoint_policies.save_only_these_names(RESIDUAL_NAME)


def save_dots_and_fp8_residuals():
    """As `save_fp8_residuals`, and keeps the results of XLA's own dots (`jax.checkpoint_policies.dots_saveable`)."""
    return jax.checkpoint_policies.save_from_both_policies(
        jax.checkpoint_policies.dots_saveable, save_fp8_residuals()
    )


def offload_fp8_residuals(src: str = "device", dst: str = "pinned_host"):
    """As `save_fp8_residuals`, with the copies held in host memory between the passes."""
    return jax.checkpoint_policies.save_and_offload_only_these_names(
        names_which_can_be_saved=[],
        names_which_can_be_offloaded=[RESIDUAL_NAME],
        offload_src=src,
        offload_dst=dst,
    )
