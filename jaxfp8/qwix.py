"""qwix: a provider whose rules put a Flax model's products into our kernels, and conversion of its quantized arrays.

    rules = [
        qwix.QuantizationRule(module_path=".*(router|head).*"),          # no type: left as it is
        qwix.QuantizationRule(weight_qtype="float8_e4m3fn", act_qtype="float8_e4m3fn"),
    ]
    model = qwix.quantize_model(model, jaxfp8.qwix.Fp8Provider(rules))   # nnx: and the model's example inputs

The model's code does not change. While the model is called, qwix replaces `jax.lax.dot_general`, `jax.numpy.einsum` and
`jax.lax.ragged_dot`, finds the first rule whose pattern matches the path of the calling module, and asks the provider.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import qwix
from qwix._src.utils import (
    flax_util,  # find_param, by which qwix's own providers tell weights apart
)

from ._arrays import checks
from ._arrays.blocks import BLOCK, ROW, SQUARE
from ._arrays.quantized_array import QuantizedArray, quantized
from ._arrays.recipe import FP8_DTYPES, Recipe, current_recipe
from .kernels.gemm import gemm
from .kernels.quantize import quantize
from .ops.dot_general import dot_general
from .ops.einsum import einsum
from .ops.ragged_dot import ragged_dot

__all__ = ["Fp8Provider", "dot", "from_qarray", "to_qarray"]


class Fp8Provider(qwix.QuantizationProvider):
    """Runs the products that its rules choose in FP8, forward and backward, with block scaling.

    A rule without `weight_qtype` leaves what it matches to XLA, as does the absence of a rule. Any other must ask for
    what block-scaled FP8 is, and for nothing it is not:

    - `weight_qtype` and `act_qtype`: the same FP8 type. `bwd_qtype` of a `qwix.QtRule`: that of gradients; None takes
      the recipe's.
    - `tile_size` and `bwd_weight_grad_tile_size`: 128 or None.
    - calibration `"absmax"`; no static scales, stochastic rounding or other settings of `qwix.QtRule`.

    A product's weight is the operand that is a parameter of the calling module; the second, if neither is.

    **Arguments:**

    - `rules`: `qwix.QuantizationRule` or `qwix.QtRule`, in order of precedence.
    - `recipe`: a `jaxfp8.Recipe` for what rules cannot say, such as the scale format; None is the one in force when the
      model is called.

    **Raises:** ValueError for a rule that asks for something else.
    """

    def __init__(
        self, rules: Sequence[qwix.QuantizationRule], *, recipe: Recipe | None = None, **kwargs: Any
    ):
        self.recipe = recipe
        super().__init__(rules, **kwargs)

    def _init_rule(self, rule: qwix.QuantizationRule) -> qwix.QuantizationRule:
        rule = super()._init_rule(rule)
        if rule.weight_qtype is not None:
            _check_rule(rule)
        return rule

    def _recipe(self, operation: str) -> Recipe | None:
        """The recipe of the product that is being called, or None if no rule asks for FP8."""
        rule, _ = self._get_current_rule_and_op_id(operation)
        if rule is None or rule.weight_qtype is None:
            return None
        recipe = current_recipe("Fp8Provider", self.recipe)
        grad_dtype = getattr(rule, "bwd_qtype", None)
        return dataclasses.replace(
            recipe,
            dtype=rule.weight_qtype,
            grad_dtype=recipe.grad_dtype if grad_dtype is None else grad_dtype,
        )

    def dot_general(
        self,
        lhs: Any,
        rhs: Any,
        dimension_numbers: Any,
        precision: Any = None,
        preferred_element_type: Any = None,
        *,
        out_sharding: Any = None,
    ) -> jax.Array:
        """`jax.lax.dot_general` under the rules."""
        recipe = self._recipe("dot_general")
        if recipe is None or not _weight_first(lhs, rhs):
            ours = functools.partial(dot_general, recipe=recipe)
            product = jax.lax.dot_general if recipe is None else ours
            return product(
                lhs,
                rhs,
                dimension_numbers,
                precision,
                preferred_element_type,
                out_sharding=out_sharding,
            )
        (left, right), (left_batch, right_batch) = dimension_numbers
        batch, columns = len(left_batch), lhs.ndim - len(left) - len(left_batch)
        y = dot_general(
            rhs,
            lhs,
            ((right, left), (right_batch, left_batch)),
            precision,
            preferred_element_type,
            recipe=recipe,
        )
        rows = y.ndim - batch - columns
        order = [*range(batch), *range(batch + rows, y.ndim), *range(batch, batch + rows)]
        y = jnp.transpose(y, order)
        return y if out_sharding is None else jax.sharding.reshard(y, out_sharding)

    def einsum(
        self,
        subscripts: Any,
        /,
        *operands: Any,
        precision: Any = None,
        preferred_element_type: Any = None,
        out_sharding: Any = None,
        **kwargs: Any,
    ) -> jax.Array:
        """`jax.numpy.einsum` under the rules; of two operands where they ask for FP8."""
        recipe = self._recipe("einsum")
        if recipe is None:
            return jnp.einsum(
                subscripts,
                *operands,
                precision=precision,
                preferred_element_type=preferred_element_type,
                out_sharding=out_sharding,
                **kwargs,
            )
        if len(operands) != 2 or not isinstance(subscripts, str):
            raise ValueError(
                f"Fp8Provider: einsum {subscripts!r} has {len(operands)} operands; allowed where a rule asks for FP8: "
                "subscripts as a str and two operands"
            )
        lhs, rhs = operands
        if _weight_first(lhs, rhs):
            inputs, arrow, output = subscripts.partition("->")
            left, _, right = inputs.partition(",")
            subscripts, lhs, rhs = f"{right},{left}{arrow}{output}", rhs, lhs
        return einsum(
            subscripts,
            lhs,
            rhs,
            precision=precision,
            preferred_element_type=preferred_element_type,
            out_sharding=out_sharding,
            recipe=recipe,
        )

    def ragged_dot(
        self,
        lhs: Any,
        rhs: Any,
        group_sizes: Any,
        precision: Any = None,
        preferred_element_type: Any = None,
        group_offset: Any = None,
        **kwargs: Any,
    ) -> jax.Array:
        """`jax.lax.ragged_dot` under the rules."""
        recipe = self._recipe("ragged_dot")
        if recipe is None:
            return jax.lax.ragged_dot(
                lhs, rhs, group_sizes, precision, preferred_element_type, group_offset, **kwargs
            )
        return ragged_dot(
            lhs,
            rhs,
            group_sizes,
            precision,
            preferred_element_type,
            group_offset,
            recipe=recipe,
            **kwargs,
        )

    def get_intercept_map(self) -> dict[str, Any]:
        """The functions that qwix replaces while the model is called."""
        return super().get_intercept_map() | {
            "jax.lax.dot_general": self.dot_general,
            "jax.numpy.einsum": self.einsum,
            "jax.lax.ragged_dot": self.ragged_dot,
        }


def _check_rule(rule: qwix.QuantizationRule) -> None:
    def refuse(field, allowed):
        raise ValueError(
            f"Fp8Provider: rule {rule.module_path!r} has {field} {getattr(rule, field)!r}; allowed: {allowed}"
        )

    for field in ("weight_qtype", "act_qtype", "bwd_qtype"):
        dtype = getattr(rule, field, None)
        if dtype is None and field != "act_qtype":
            continue
        try:
            known = np.dtype(dtype) in FP8_DTYPES
        except TypeError:
            known = False
        if not known:
            refuse(field, checks.names(FP8_DTYPES))
    if np.dtype(rule.act_qtype) != np.dtype(rule.weight_qtype):
        refuse("act_qtype", f"{np.dtype(rule.weight_qtype).name}, the type of its weights")
    for field in ("tile_size", "bwd_weight_grad_tile_size"):
        if getattr(rule, field, None) not in (None, BLOCK):
            refuse(field, f"{BLOCK} or None")
    plain = {
        "weight_calibration_method": "absmax",
        "act_calibration_method": "absmax",
        "bwd_calibration_method": "absmax",
        "act_static_scale": False,
        "disable_channelwise_axes": False,
        "bwd_stochastic_rounding": None,
        "additional_qt_config": None,
    }
    for field, value in plain.items():
        if getattr(rule, field, value) != value:
            refuse(field, repr(value))


def _weight_first(lhs: Any, rhs: Any) -> bool:
    """Whether the first operand, and not the second, is a parameter of the calling module."""
    return flax_util.find_param(rhs) is None and flax_util.find_param(lhs) is not None


# --------------------------------------------------------------------------------------------------
# Quantized arrays
# --------------------------------------------------------------------------------------------------


def to_qarray(q: QuantizedArray) -> qwix.QArray:
    """A QuantizedArray as a `qwix.QArray`: the same data and scales, which both multiply.

    **Arguments:**

    - `q`: data `(..., M, K)` in blocks of 1x128 or 128x128. A qwix array has whole tiles only, so K, and for 128x128
      also M, must be a multiple of 128 or be covered by one block.

    **Returns:** a QArray of q's shape with scales of q's shape.

    **Raises:** TypeError if q is not a QuantizedArray, ValueError if blocks at its edges are short.
    """
    shape = "(..., K)" if getattr(q, "block", None) == ROW else "(..., M, K)"
    q = quantized("to_qarray", "q", q, shape, (ROW, SQUARE))
    rows, _ = q.block
    for name, size in (("K", q.shape[-1]), ("M", q.shape[-2] if rows != 1 else BLOCK)):
        if size > BLOCK and size % BLOCK:
            raise ValueError(
                f"to_qarray: q has {name}={size}, a short last block; allowed: a multiple of {BLOCK}, or one block"
            )
    return qwix.QArray(qvalue=q.data, scale=q.scale)


def from_qarray(array: qwix.QArray, block: tuple[int, int] = ROW) -> QuantizedArray:
    """A `qwix.QArray` of an FP8 type as a QuantizedArray, without another rounding.

    **Arguments:**

    - `array`: FP8 values `(..., M, K)`, symmetric. A scale must hold for whole blocks: tiles may be larger than blocks
      (a scale a channel, a scale an array), not smaller. For a weight that qwix holds as (K, N), pass `array.mT`:
      products take their right-hand operand as (N, K).
    - `block`: `(1, 128)` or `(128, 128)`.

    **Returns:** a QuantizedArray with the same data, each scale written out for the blocks that it covers, in float32.

    **Raises:** TypeError or ValueError for an array that does not fit.
    """
    if not isinstance(array, qwix.QArray):
        raise TypeError(f"from_qarray: array is a {type(array).__name__}; allowed: a qwix.QArray")
    if np.dtype(array.qvalue.dtype) not in FP8_DTYPES or array.zero_point is not None:
        kind = array.qvalue.dtype.name + (
            " with a zero point" if array.zero_point is not None else ""
        )
        raise TypeError(
            f"from_qarray: array has values of {kind}; allowed: symmetric {checks.names(FP8_DTYPES)}"
        )
    if tuple(block) not in (ROW, SQUARE):
        raise ValueError(f"from_qarray: block is {block!r}; allowed: {ROW}, {SQUARE}")
    if array.ndim < (1 if tuple(block) == ROW else 2):
        raise ValueError(f"from_qarray: array has shape {array.shape}; allowed: (..., M, K)")
    scale = array.scale.astype(jnp.float32)
    steps = (1,) * (array.ndim - 2) + tuple(block)
    for axis, step in enumerate(steps[-array.ndim :]):
        size, tiles = array.shape[axis], scale.shape[axis]
        tile, blocks = size // max(tiles, 1), -(-size // step)
        if tile % step and tiles > 1:
            raise ValueError(
                f"from_qarray: array {array.shape} has tiles of {tile} along axis {axis}; allowed: multiples of {step}"
            )
        if tiles != blocks:
            scale = jnp.repeat(scale, blocks if tiles == 1 else tile // step, axis)
    return QuantizedArray(array.qvalue, scale, (block[0], block[1]))


def dot(
    lhs: Any,
    rhs: qwix.QArray,
    *,
    preferred_element_type: Any = jnp.bfloat16,
    recipe: Recipe | None = None,
) -> jax.Array:
    """`lhs . rhs` with a weight that qwix has quantized, as `qwix.dot`: for inference, without a gradient.

    **Arguments:**

    - `lhs`: float32, bfloat16 or float16 `(..., K)`, which is quantized here; or an FP8 QArray whose scales hold for
      1x128 blocks.
    - `rhs`: an FP8 QArray `(K, N)` whose scales hold for 128x128 blocks (tiles of 128 along both axes, or larger).
    - `preferred_element_type`: bfloat16 or float32.
    - `recipe`: how lhs is quantized.

    **Returns:** `(..., N)`.

    **Raises:** TypeError or ValueError for operands that do not fit.
    """
    if not isinstance(rhs, qwix.QArray) or rhs.ndim != 2:
        kind = (
            f"QArray of shape {rhs.shape}" if isinstance(rhs, qwix.QArray) else type(rhs).__name__
        )
        raise TypeError(f"dot: rhs is a {kind}; allowed: a qwix.QArray (K, N)")
    left = from_qarray(lhs) if isinstance(lhs, qwix.QArray) else quantize(lhs, recipe=recipe)
    return gemm(left, from_qarray(rhs.mT, SQUARE), out_dtype=preferred_element_type)
