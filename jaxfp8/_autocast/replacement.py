"""The operation that a chosen product becomes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from .._arrays import checks
from .._arrays.recipe import (
    Recipe,
    forward_format,
    gradient_format,
    gradient_recipe,
    result_options,
    weight_gradient_options,
)
from .._primitives.mesh import full_spec, place
from .._primitives.once import undefined_tangents
from ..kernels import quantize as qt
from ..kernels.gemm import product as gemm_product
from ..kernels.grouped_gemm import grouped_gemm, grouped_wgrad_gemm
from ..kernels.quantize import quantize, quantize_both, quantize_weight
from ..ops.dot_general import dot_general
from ..ops.ragged_dot import ragged_dot
from .candidate import Candidate, Dims, dimensions

SECOND_DERIVATIVE = (
    "autocast: the function takes gradients itself, and its FP8 products have no derivative after that. Put autocast "
    "inside, around what is differentiated, or give a policy that keeps the product"
)


def replacement(eqn: Any, product: Candidate, operands: Sequence[Any], recipe: Recipe) -> jax.Array:
    """The FP8 product of an equation's operands, in the equation's result type."""
    f = jax.custom_jvp(lambda *xs: _product(eqn, product, xs, recipe))

    @f.defjvp
    def refused(primals, tangents):
        y = _product(eqn, product, primals, recipe)
        moving = [t for t in tangents if t.dtype != jax.dtypes.float0]
        return y, undefined_tangents(moving, [y], SECOND_DERIVATIVE)[0]

    y = _product(eqn, product, operands, recipe) if product.role == "forward" else f(*operands)
    return place(y, full_spec(eqn.outvars[0].aval.sharding.spec, y.ndim))


def _product(eqn: Any, product: Candidate, operands: Sequence[Any], recipe: Recipe) -> jax.Array:
    if product.kind == "ragged_dot":
        return _ragged(product, operands, recipe)
    lhs, rhs = operands
    dims = dimensions(eqn)
    sharding = eqn.params.get("out_sharding")
    if product.role == "weight gradient":
        return _weight_gradient(dims, lhs, rhs, product.out_dtype, recipe)
    if product.weight == "rhs":
        return _activation_first(product, dims, lhs, rhs, sharding, recipe)
    swapped = Dims(*((right, left) for left, right in dims))
    batch, rows, columns = len(dims.batch[0]), len(dims.free[1]), len(dims.free[0])
    order = [*range(batch), *range(batch + rows, batch + rows + columns)]
    order += range(batch, batch + rows)
    if sharding is not None:
        sharding = _permuted(sharding, [order.index(i) for i in range(len(order))])
    y = _activation_first(product, swapped, rhs, lhs, sharding, recipe)
    return jnp.transpose(y, order)


def _permuted(sharding: Any, order: Sequence[int]) -> Any:
    spec = [*sharding.spec, *[None] * (len(order) - len(sharding.spec))]
    return jax.sharding.NamedSharding(
        sharding.mesh, jax.sharding.PartitionSpec(*(spec[i] for i in order))
    )


def _activation_first(product, dims, x, w, sharding, recipe) -> jax.Array:
    if product.role == "forward":
        return dot_general(
            x,
            w,
            (dims.contract, dims.batch),
            preferred_element_type=product.out_dtype,
            out_sharding=sharding,
            recipe=recipe,
        )
    # x is a cotangent: 1x128 in the gradient's format, while the weight keeps its own.
    batch = tuple(f"b{i}" for i in range(len(dims.batch[0])))
    rows = tuple(f"m{i}" for i in range(len(dims.free[0])))
    x_sizes, w_sizes = ([v.shape[a] for a in f] for v, f in ((x, dims.free[0]), (w, dims.free[1])))
    x = _arranged(x, [[a] for a in (*dims.batch[0], *dims.free[0])] + [dims.contract[0]])
    w = _arranged(w, [[a] for a in dims.batch[1]] + [dims.contract[1], dims.free[1]])
    weight, _ = qt.weight(w, (*batch, "k", "n"), forward_format(recipe))
    y = gemm_product(
        qt.rows(x, (*batch, *rows, "k"), gradient_format(recipe)),
        weight,
        (*batch, *rows, "n"),
        product.out_dtype,
        **result_options(recipe),
    )
    return y.reshape(*x.shape[: len(batch)], *x_sizes, *w_sizes)


def _weight_gradient(dims, dy, x, out_dtype, recipe) -> jax.Array:
    """Both operands 1x128 along the tokens. JAX's transpose of a product puts the cotangent first."""
    tokens = tuple(f"t{i}" for i in range(len(dims.contract[0])))
    columns = [
        qt.columns(_arranged(v, [[a] for a in contract] + [free]), (*tokens, name), tokens, fmt)
        for v, contract, free, name, fmt in (
            (dy, dims.contract[0], dims.free[0], "n", gradient_format(recipe)),
            (x, dims.contract[1], dims.free[1], "k", forward_format(recipe)),
        )
    ]
    left, right = columns
    y = gemm_product(left, right, ("n", "k"), out_dtype, **weight_gradient_options(recipe))
    return y.reshape([v.shape[a] for v, f in ((dy, dims.free[0]), (x, dims.free[1])) for a in f])


def _arranged(x, groups: Sequence[Sequence[int]]) -> jax.Array:
    """x with each group of axes merged into one, in this order."""
    order = [a for group in groups for a in group]
    shape = [math.prod(x.shape[a] for a in group) for group in groups]
    return jnp.transpose(x, order).reshape(shape)


def _ragged(product: Candidate, operands, recipe: Recipe) -> jax.Array:
    lhs, rhs, sizes = operands
    if product.role == "forward":
        return ragged_dot(lhs, rhs, sizes, preferred_element_type=product.out_dtype, recipe=recipe)
    gradient = gradient_recipe(recipe)
    out_dtype = product.out_dtype if product.out_dtype in checks.OUTPUT_DTYPES else jnp.float32
    common: dict[str, Any] = {"out_dtype": out_dtype, "num_sms": recipe.num_sms}
    if product.role == "input gradient":
        _, weight = quantize_weight(rhs, recipe=recipe)
        y = grouped_gemm(quantize(lhs, recipe=gradient), weight, sizes, **common)
    else:
        _, x = quantize_both(lhs, group_sizes=sizes, recipe=recipe)
        _, dy = quantize_both(rhs, group_sizes=sizes, recipe=gradient)
        y = grouped_wgrad_gemm(x, dy, sizes, **common)
    return y.astype(product.out_dtype)
