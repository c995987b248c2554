"""dot_general with the signature of jax.lax.dot_general."""

from __future__ import annotations

import math
import operator
from typing import Any

import jax
import jax.numpy as jnp

from .._arrays import checks
from .._arrays.quantized_array import transpose_blocks
from .._arrays.quantized_weight import QuantizedWeight, frozen_weight
from .._arrays.recipe import Recipe, current_recipe
from ._arguments import check_precision, out_spec, result_dtype
from ._dot import dot
from ._frozen import frozen_dot


def _axes(function, name, axes, rank) -> tuple[int, ...]:
    """Axes as non-negative ints within the rank, each once."""
    try:
        axes = tuple(operator.index(a) for a in axes)
    except TypeError:
        raise TypeError(
            f"{function}: {name} is {axes!r}; allowed: a sequence of axis numbers"
        ) from None
    for a in axes:
        if not 0 <= a < rank:
            raise ValueError(f"{function}: {name} has axis {a}; allowed: 0 to {rank - 1}")
    if len(set(axes)) != len(axes):
        raise ValueError(f"{function}: {name} is {axes}; each axis may occur once")
    return axes


def _dimension_numbers(function, dimension_numbers, lhs, rhs):
    try:
        (lhs_contract, rhs_contract), (lhs_batch, rhs_batch) = dimension_numbers
    except (TypeError, ValueError):
        raise TypeError(
            f"{function}: dimension_numbers is {dimension_numbers!r}; allowed: "
            "((lhs_contracting, rhs_contracting), (lhs_batch, rhs_batch))"
        ) from None
    named = {
        "lhs_contracting": (lhs_contract, lhs),
        "rhs_contracting": (rhs_contract, rhs),
        "lhs_batch": (lhs_batch, lhs),
        "rhs_batch": (rhs_batch, rhs),
    }
    axes = [
        _axes(function, f"dimension_numbers: {name}", a, x.ndim) for name, (a, x) in named.items()
    ]
    for side, contracting, batch in (("lhs", axes[0], axes[2]), ("rhs", axes[1], axes[3])):
        if both := set(contracting) & set(batch):
            raise ValueError(
                f"{function}: dimension_numbers: {side} axes {sorted(both)} are contracting and batch axes at once"
            )
    for kind, left, right in (("contracting", axes[0], axes[1]), ("batch", axes[2], axes[3])):
        sizes = tuple(lhs.shape[a] for a in left), tuple(rhs.shape[a] for a in right)
        if sizes[0] != sizes[1]:
            raise ValueError(
                f"{function}: the {kind} axes of lhs have sizes {sizes[0]} but those of rhs {sizes[1]}; they must match"
            )
    if not axes[0]:
        raise ValueError(
            f"{function}: dimension_numbers contract no axis; allowed: at least one contracting axis"
        )
    return axes


def dot_general(
    lhs: Any,
    rhs: Any,
    dimension_numbers: Any,
    precision: Any = None,
    preferred_element_type: Any = None,
    *,
    out_sharding: Any = None,
    recipe: Recipe | None = None,
) -> jax.Array:
    """`jax.lax.dot_general` with FP8 products, forward and backward.

    **Arguments:**

    - `lhs`: the activation: float32, bfloat16 or float16, quantized in 1x128 blocks along its contracting axes, which
      are flattened in the order given.
    - `rhs`: the weight: likewise, in 128x128 blocks of its flattened contracting and free axes. Or FP8 alone, for which
      no gradient is made: a `QuantizedArray` in 128x128 blocks or a `QuantizedWeight` without value, whose last two
      axes are one contracting and one free axis, in either order, and its others the batch axes, in order.
    - `dimension_numbers`: `((lhs_contracting, rhs_contracting), (lhs_batch, rhs_batch))`; at least one axis is
      contracted.
    - `precision`: None or DEFAULT. More is refused: an FP8 product has no higher precision.
    - `preferred_element_type`: dtype of the result; None is what lhs and rhs promote to; lhs's if rhs is FP8 alone.
    - `out_sharding`: a PartitionSpec or NamedSharding of the result, on meshes with explicit axes.
    - `recipe`: a `jaxfp8.Recipe`; None is the one in force.

    **Returns:** batch axes, then lhs's free axes, then rhs's, as `jax.lax.dot_general`.

    **Raises:** TypeError or ValueError for operands that do not fit.
    """
    function = "dot_general"
    recipe = current_recipe(function, recipe)
    lhs = checks.array(function, "lhs", lhs, "(...)")
    frozen = frozen_weight(function, "rhs", rhs, "(..., N, K)")
    if frozen is None:
        rhs = checks.array(function, "rhs", rhs, "(...)")
    check_precision(function, precision)
    made = jnp.result_type(lhs, rhs) if frozen is None else lhs.dtype
    out_dtype = result_dtype(function, preferred_element_type, made)
    left, right, left_batch, right_batch = _dimension_numbers(function, dimension_numbers, lhs, rhs)
    rows = [a for a in range(lhs.ndim) if a not in left + left_batch]
    columns = [a for a in range(rhs.ndim) if a not in right + right_batch]
    rank = len(left_batch) + len(rows) + len(columns)
    spec = out_spec(function, out_sharding, rank)
    if frozen is not None:
        _check_frozen(function, rhs, right, right_batch)
        as_it_lies = (right[0] == rhs.ndim - 1) != isinstance(rhs, QuantizedWeight)

    with jax.named_scope("jaxfp8.dot_general"):
        batch_sizes = tuple(lhs.shape[a] for a in left_batch)
        row_sizes = tuple(lhs.shape[a] for a in rows)
        column_sizes = tuple(rhs.shape[a] for a in columns)
        k = math.prod(lhs.shape[a] for a in left)
        x = _transpose(lhs, [*left_batch, *rows, *left])
        x = _reshape(x, (*batch_sizes, *(row_sizes or (1,)), k))
        batch = tuple(f"b{i}" for i in range(len(batch_sizes)))
        tokens = tuple(f"m{i}" for i in range(len(row_sizes) or 1))
        merged = spec is not None and not (row_sizes and len(column_sizes) == 1)
        dims, out = (*batch, *tokens, "k"), (*batch, *tokens, "n")
        out_spec_ = None if merged else spec
        options: dict[str, Any] = {"recipe": recipe, "out_dtype": out_dtype, "out_spec": out_spec_}
        if frozen is None:
            w = _transpose(rhs, [*right_batch, *right, *columns])
            w = _reshape(w, (*batch_sizes, k, math.prod(column_sizes)))
            y = dot(x, w, dims, (*batch, "k", "n"), out, **options)
        else:
            w = frozen if as_it_lies else transpose_blocks(frozen)
            y = frozen_dot(x, w, dims, (*batch, "n", "k"), out, **options)
        y = _reshape(y, (*batch_sizes, *row_sizes, *column_sizes))
        if merged:
            y = jax.sharding.reshard(y, out_sharding)
        return y


def _check_frozen(function, rhs, contracting, batch) -> None:
    """The axes of a weight that is FP8 alone: its blocks lie on the last two, which cannot be merged with others."""
    last = rhs.ndim - 2, rhs.ndim - 1
    if batch != tuple(range(rhs.ndim - 2)) or len(contracting) != 1 or contracting[0] not in last:
        raise ValueError(
            f"{function}: rhs is FP8 alone, of shape {rhs.shape}, with contracting axes {contracting} and batch axes "
            f"{batch}; allowed: one contracting axis, {last[0]} or {last[1]}, and batch axes {tuple(range(last[0]))}"
        )


def _transpose(x, order):
    return x if order == list(range(x.ndim)) else jnp.transpose(x, order)


def _reshape(x, shape):
    return x if x.shape == tuple(shape) else jnp.reshape(x, shape)
