"""tokamax: an implementation of its `ragged_dot` and `ragged_dot_general`.

    y = tokamax.ragged_dot(x, experts, group_sizes, implementation=jaxfp8.tokamax.RaggedDot())

tokamax takes the first of its implementations that does not raise NotImplementedError; this one raises it, with the
reason, for what an FP8 product is not: a higher precision, operands quantized in other ways, other dimensions.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import qwix

from ._arrays import checks
from ._arrays.blocks import ROW, SQUARE
from ._arrays.quantized_array import QuantizedArray
from ._arrays.recipe import FP8_DTYPES, Recipe, current_recipe, gradient_recipe
from ._primitives.mesh import match_varying
from .kernels.grouped_gemm import grouped_gemm, grouped_wgrad_gemm
from .kernels.quantize import quantize, quantize_both
from .ops._arguments import check_precision
from .ops.ragged_dot import ragged_dot
from .qwix import from_qarray

__all__ = ["RaggedDot"]

_FORWARD = (((1,), (1,)), ((), ()), (0,), (0,))  # (M, K) . (G, K, N) -> (M, N)
_TRANSPOSED = (((1,), (2,)), ((), ()), (0,), (0,))  # (M, K) . (G, N, K) -> (M, N)
_WGRAD = (((0,), (0,)), ((), ()), (0,), ())  # (M, K) . (M, N) -> (G, K, N)


@dataclasses.dataclass(frozen=True)
class RaggedDot:
    """`jaxfp8.ragged_dot` as an `implementation=` of `tokamax.ragged_dot` and `tokamax.ragged_dot_general`.

    Differentiable for arrays. Takes the dimension numbers of the forward product, of the input gradient (the second
    operand transposed) and of the weight gradient (ragged contraction).

    An operand that is quantized already, a `qwix.QArray` or tokamax's `AsQArray`, is used as it is if it is FP8 with
    scales that hold for our blocks: 1x128 of the first operand, 128x128 of the second (tiles of that size, or larger).
    Such a product has no gradient.

    **Arguments:**

    - `recipe`: a `jaxfp8.Recipe`; None is the one in force when the product is called.
    """

    recipe: Recipe | None = None

    def __call__(
        self,
        lhs: Any,
        rhs: Any,
        *,
        group_sizes: Any,
        ragged_dot_dimension_numbers: jax.lax.RaggedDotDimensionNumbers | None = None,
        precision: Any = None,
        preferred_element_type: Any = None,
        activation: Callable[[jax.Array], jax.Array] | None = None,
        manual_axis_type: Any = None,
    ) -> jax.Array:
        """The product, then the activation in float32, rounded to the preferred element type.

        **Raises:** NotImplementedError for what tokamax's next implementation should be asked for; TypeError or
        ValueError for operands that fit nothing.
        """
        del manual_axis_type  # a shard's type follows from its operands'
        recipe = current_recipe("RaggedDot", self.recipe)
        try:
            check_precision("RaggedDot", precision)
        except (ValueError, TypeError) as e:
            raise NotImplementedError(str(e)) from None
        # tokamax's GroupSizes adds a distribution to tune for, which a kernel without host-side choices does not need.
        sizes = jnp.asarray(group_sizes)
        lhs, rhs = (_taken_as_is(name, x) for name, x in (("lhs", lhs), ("rhs", rhs)))
        out_dtype = _out_dtype(lhs, rhs, preferred_element_type)
        inner = out_dtype if activation is None else jnp.dtype(jnp.float32)
        numbers = _dimension_numbers(ragged_dot_dimension_numbers)
        if numbers == _WGRAD:
            y = self._ragged_contraction(lhs, rhs, sizes, inner, recipe)
        elif numbers in (_FORWARD, _TRANSPOSED):
            if numbers == _TRANSPOSED:
                rhs = rhs.mT
            y = self._forward(lhs, rhs, sizes, inner, recipe)
        else:
            raise NotImplementedError(
                f"RaggedDot: ragged_dot_dimension_numbers is {ragged_dot_dimension_numbers}; implemented: ragged "
                "rows of (M, K) . (G, K, N) or (G, N, K), and ragged contraction of (M, K) . (M, N)"
            )
        return y if activation is None else activation(y).astype(out_dtype)

    @staticmethod
    def _forward(lhs, rhs, sizes, out_dtype, recipe):
        if not isinstance(lhs, qwix.QArray) and not isinstance(rhs, qwix.QArray):
            return ragged_dot(lhs, rhs, sizes, preferred_element_type=out_dtype, recipe=recipe)
        left = _quantized("lhs", lhs, ROW, recipe)
        right = _quantized("rhs", rhs.mT, SQUARE, recipe)
        return grouped_gemm(left, right, sizes, out_dtype=out_dtype, num_sms=recipe.num_sms)

    @staticmethod
    def _ragged_contraction(lhs, rhs, sizes, out_dtype, recipe):
        if isinstance(lhs, qwix.QArray) or isinstance(rhs, qwix.QArray):
            raise NotImplementedError(
                "RaggedDot: a ragged contraction of quantized operands; implemented: of arrays, since its operands are "
                "quantized along the rows of each group"
            )
        checks.array("RaggedDot", "lhs", lhs, "(M, K)")
        checks.array("RaggedDot", "rhs", rhs, "(M, N)")
        # In shard_map a custom_vjp's cotangents must vary as its operands do.
        return _ragged_wgrad((recipe, out_dtype), *match_varying((lhs, rhs, sizes)))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _ragged_wgrad(static, lhs, rhs, sizes):
    """lhs (M, K), rhs (M, N) -> (G, K, N): of each group's rows, lhs^T . rhs."""
    recipe, out_dtype = static
    _, left = quantize_both(lhs, group_sizes=sizes, recipe=recipe)
    _, right = quantize_both(rhs, group_sizes=sizes, recipe=gradient_recipe(recipe))
    return grouped_wgrad_gemm(left, right, sizes, out_dtype=out_dtype, num_sms=recipe.num_sms)


def _ragged_wgrad_fwd(static, lhs, rhs, sizes):
    return _ragged_wgrad(static, lhs, rhs, sizes), (lhs, rhs, sizes)


def _ragged_wgrad_bwd(static, residuals, cotangent):
    recipe, _ = static
    lhs, rhs, sizes = residuals
    dlhs = ragged_dot(rhs, cotangent.mT, sizes, preferred_element_type=lhs.dtype, recipe=recipe)
    drhs = ragged_dot(lhs, cotangent, sizes, preferred_element_type=rhs.dtype, recipe=recipe)
    return dlhs, drhs, None


_ragged_wgrad.defvjp(_ragged_wgrad_fwd, _ragged_wgrad_bwd)


def _dimension_numbers(numbers):
    if numbers is None:
        return _FORWARD
    (left, right), (left_batch, right_batch) = numbers.dot_dimension_numbers
    return (
        (tuple(left), tuple(right)),
        (tuple(left_batch), tuple(right_batch)),
        tuple(numbers.lhs_ragged_dimensions),
        tuple(numbers.rhs_group_dimensions),
    )


def _taken_as_is(name, x):
    """An array, or a QArray of FP8 values."""
    if hasattr(x, "as_qarray"):  # tokamax's AsQArray: an array to be quantized as it says
        x = x.as_qarray()
    if isinstance(x, qwix.QArray) and (
        np.dtype(x.qvalue.dtype) not in FP8_DTYPES or x.zero_point is not None
    ):
        raise NotImplementedError(
            f"RaggedDot: {name} is a QArray of {x.qvalue.dtype.name}; implemented: {checks.names(FP8_DTYPES)}"
        )
    return x


def _quantized(name, x, block, recipe) -> QuantizedArray:
    if not isinstance(x, qwix.QArray):
        return quantize(x, block, recipe=recipe)
    try:
        return from_qarray(x, block)
    except ValueError as e:
        raise NotImplementedError(f"RaggedDot: {name}: {e}") from None


def _out_dtype(lhs, rhs, preferred_element_type):
    if preferred_element_type is None:
        return jnp.dtype(jnp.result_type(lhs.dtype, rhs.dtype))
    return jnp.dtype(preferred_element_type)
