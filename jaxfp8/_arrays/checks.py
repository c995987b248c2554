"""Checks of what a caller passes. Each names the function, the argument, what it was and what is allowed."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

INPUT_DTYPES = tuple(np.dtype(d) for d in (jnp.float32, jnp.bfloat16, jnp.float16))
OUTPUT_DTYPES = tuple(np.dtype(d) for d in (jnp.bfloat16, jnp.float32))


def names(dtypes) -> str:
    return ", ".join(np.dtype(d).name for d in dtypes)


def _is_array(x: Any) -> bool:
    # A class of scalars, np.float32 itself, has the attributes too; so has a QuantizedArray.
    is_other = isinstance(x, type) or dataclasses.is_dataclass(x)
    return hasattr(x, "shape") and hasattr(x, "dtype") and not is_other


def array(function: str, name: str, x: Any, shape: str, dtypes=INPUT_DTYPES) -> jax.Array:
    """`x` as a JAX array with the rank of `shape`, such as "(M, K)"; "(..., M, K)" is a least rank."""
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


def integers(function: str, name: str, x: Any, shape: str) -> jax.Array:
    """`x`, of any integer dtype, as int32 with the rank of `shape`, such as "(T, k)".

    What int32 cannot hold saturates, so that an index out of range does not wrap into it. In narrower types than int32
    later arithmetic would wrap.
    """
    if not _is_array(x):
        raise TypeError(f"{function}: {name} is a {type(x).__name__}; allowed: integers {shape}")
    x = jnp.asarray(x)
    if not jnp.issubdtype(x.dtype, jnp.integer):
        raise TypeError(f"{function}: {name} has dtype {x.dtype.name}; allowed: integers {shape}")
    if x.ndim != shape.count(",") + (not shape.endswith(",)")):
        raise ValueError(f"{function}: {name} has shape {x.shape}; allowed: {shape}")
    if x.dtype == jnp.int32:
        return x
    narrow, wide = jnp.iinfo(x.dtype), np.iinfo(np.int32)
    return jnp.clip(x, max(narrow.min, wide.min), min(narrow.max, wide.max)).astype(jnp.int32)


def group_sizes(function: str, name: str, sizes: Any, groups: int | None = None) -> jax.Array:
    """int32 (G,)."""
    sizes = integers(function, name, sizes, "(G,)")
    if sizes.shape[0] == 0:
        raise ValueError(f"{function}: {name} has no entries; allowed: at least one group")
    if groups is not None and sizes.shape[0] != groups:
        raise ValueError(
            f"{function}: {name} has {sizes.shape[0]} entries but rhs has {groups} groups; they must match"
        )
    return sizes


def output_dtype(function: str, name: str, dtype: Any, allowed=OUTPUT_DTYPES) -> np.dtype:
    try:
        dtype = np.dtype(dtype)
    except (TypeError, ValueError):
        raise TypeError(f"{function}: {name} is {dtype!r}; allowed: {names(allowed)}") from None
    if dtype not in allowed:
        raise TypeError(f"{function}: {name} is {dtype.name}; allowed: {names(allowed)}")
    return dtype


def same(function: str, what: str, left: str, left_size: int, right: str, right_size: int) -> None:
    """`gemm: rhs has K=384 but lhs has K=512; they must match`."""
    if left_size != right_size:
        raise ValueError(
            f"{function}: {right} has {what}={right_size} but {left} has {what}={left_size}; they must match"
        )
