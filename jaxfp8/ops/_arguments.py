"""Arguments that the differentiable operations share."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
from jax import lax

from .._arrays import checks
from .._primitives.mesh import full_spec


def result_dtype(function: str, preferred_element_type: Any, default) -> np.dtype:
    """The dtype of a result: what is preferred, else `default`."""
    if preferred_element_type is None:
        return np.dtype(default)
    return checks.output_dtype(
        function, "preferred_element_type", preferred_element_type, checks.INPUT_DTYPES
    )


def check_precision(function: str, precision: Any) -> None:
    """FP8 products have one precision: what asks for more is refused, not ignored."""
    both = precision if isinstance(precision, (tuple, list)) else (precision,)
    for p in both:
        try:
            known = p is None or lax.Precision(p) == lax.Precision.DEFAULT
        except ValueError:
            known = False
        if not known:
            raise ValueError(
                f"{function}: precision is {precision!r}; allowed: None or DEFAULT, since an FP8 product has "
                "no higher one (use jax.lax for this product)"
            )


def out_spec(function: str, out_sharding: Any, rank: int):
    """The mesh axes of each dimension that `out_sharding`, a PartitionSpec or NamedSharding, asks for."""
    if out_sharding is None:
        return None
    spec = getattr(out_sharding, "spec", out_sharding)
    if not isinstance(spec, jax.sharding.PartitionSpec):
        raise TypeError(
            f"{function}: out_sharding is {out_sharding!r}; allowed: a PartitionSpec, a NamedSharding or None"
        )
    if len(spec) > rank:
        raise ValueError(
            f"{function}: out_sharding {spec} names {len(spec)} dimensions; the result has {rank}"
        )
    return full_spec(spec, rank)
