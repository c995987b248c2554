"""Checks of what a caller passes. Each names the function, the argument, what it was and what is allowed."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .blocks import BLOCK, ceil_blocks
from .quantized_array import QuantizedArray
from .quantized_weight import QuantizedWeight
from .recipe import FP8_DTYPES

INPUT_DTYPES = tuple(np.dtype(d) for d in (jnp.float32, jnp.bfloat16, jnp.float16))
OUTPUT_DTYPES = tuple(np.dtype(d) for d in (jnp.bfloat16, jnp.float32))


def names(dtypes) -> str:
    return ", ".join(np.dtype(d).name for d in dtypes)


def _is_array(x: Any) -> bool:
    # A class of scalars, np.float32 itself, has the attributes too.
    return hasattr(x, "shape") and hasattr(x, "dtype") and not isinstance(x, type)


def array(function: str, name: str, x: Any, shape: str, dtypes=INPUT_DTYPES) -> jax.Array:
    """`x` as a JAX array with the rank of `shape`, such as "(M, K)"; "(..., M, K)" is a least rank."""
    if isinstance(x, (QuantizedArray, QuantizedWeight)):
        raise TypeError(
            f"{function}: {name} is a {type(x).__name__}; allowed: an array of {names(dtypes)}"
        )
    if not _is_array(x):
        raise TypeError(
            f"{function}: {name} is a {type(x).__name__}; allowed: an array of {names(dtypes)}"
        )
    x = jnp.asarray(x)
    if x.dtype not in dtypes:
        raise TypeError(f"{function}: {name} has dtype {x.dtype.name}; allowed: {names(dtypes)}")
    axes = shape.strip("()").split(",")
    least = len([a for a in axes if a.strip() not in ("", "...")])
    if x.ndim < least or (x.ndim > least and "..." not in shape):
        raise ValueError(f"{function}: {name} has shape {x.shape}; allowed: {shape}")
    return x


def group_sizes(function: str, name: str, sizes: Any, groups: int | None = None) -> jax.Array:
    """int32 (G,)."""
    if not _is_array(sizes):
        raise TypeError(
            f"{function}: {name} is a {type(sizes).__name__}; allowed: an int32 array (G,)"
        )
    sizes = jnp.asarray(sizes)
    if not jnp.issubdtype(sizes.dtype, jnp.integer):
        raise TypeError(
            f"{function}: {name} has dtype {sizes.dtype.name}; allowed: an integer type"
        )
    if sizes.ndim != 1:
        raise ValueError(f"{function}: {name} has shape {sizes.shape}; allowed: (G,)")
    if sizes.shape[0] == 0:
        raise ValueError(f"{function}: {name} has no entries; allowed: at least one group")
    if groups is not None and sizes.shape[0] != groups:
        raise ValueError(
            f"{function}: {name} has {sizes.shape[0]} entries but rhs has {groups} groups; they must match"
        )
    if sizes.dtype != jnp.int32:
        # Values past int32 would wrap to small ones; every size past the number of rows means the same.
        top = np.iinfo(np.int32).max
        sizes = jnp.clip(sizes, 0, min(top, jnp.iinfo(sizes.dtype).max)).astype(jnp.int32)
    return sizes


def output_dtype(function: str, name: str, dtype: Any, allowed=OUTPUT_DTYPES) -> np.dtype:
    try:
        dtype = np.dtype(dtype)
    except (TypeError, ValueError):
        raise TypeError(f"{function}: {name} is {dtype!r}; allowed: {names(allowed)}") from None
    if dtype not in allowed:
        raise TypeError(f"{function}: {name} is {dtype.name}; allowed: {names(allowed)}")
    return dtype


def quantized(function: str, name: str, q: Any, shape: str, blocks) -> QuantizedArray:
    """A QuantizedArray of FP8 data with the rank of `shape`, one of `blocks`, and scales that fit."""
    if not isinstance(q, QuantizedArray):
        raise TypeError(
            f"{function}: {name} is a {type(q).__name__}; allowed: a QuantizedArray (see jaxfp8.quantize)"
        )
    data = array(function, f"{name}.data", q.data, shape, FP8_DTYPES)
    if q.block not in blocks:
        allowed = " or ".join(f"{r}x{c}" for r, c in blocks)
        got = "x".join(map(str, q.block)) if isinstance(q.block, tuple) else repr(q.block)
        raise ValueError(f"{function}: {name} has blocks of {got}; allowed: {allowed}")
    rows, _ = q.block
    want = data.shape[:-1] + (ceil_blocks(data.shape[-1]),)
    if rows != 1:
        want = data.shape[:-2] + (ceil_blocks(data.shape[-2]), want[-1])
    scale = array(function, f"{name}.scale", q.scale, shape, (np.dtype("float32"),))
    if scale.shape != want:
        raise ValueError(
            f"{function}: {name}.scale has shape {scale.shape}; allowed: {want} for data {data.shape} "
            f"in blocks of {rows}x{BLOCK}"
        )
    return QuantizedArray(data, scale, q.block)


def same(function: str, what: str, left: str, left_size: int, right: str, right_size: int) -> None:
    """`gemm: rhs has K=384 but lhs has K=512; they must match`."""
    if left_size != right_size:
        raise ValueError(
            f"{function}: {right} has {what}={right_size} but {left} has {what}={left_size}; they must match"
        )
