"""MaxText: a quantization for its dense layers and its mixture of experts.

MaxText has no registry of quantizations; docs/frameworks.md has the three changes (a name, a branch of
`configure_quantization`, a branch of the experts' grouped product). MaxText itself is not imported here.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, ClassVar

import flax.linen as nn
import jax

from ._arrays.recipe import Recipe
from .flax import Einsum
from .ops.dot_general import dot_general
from .ops.ragged_dot import ragged_dot

__all__ = ["Fp8Quantization"]


class DotGeneral(nn.Module):
    """`jaxfp8.dot_general` as the linen module that MaxText bridges into its layers; it has no variables."""

    recipe: Recipe | None = None

    def __call__(self, lhs: Any, rhs: Any, dimension_numbers: Any, **kwargs: Any) -> jax.Array:
        """As `jaxfp8.dot_general`."""
        return dot_general(lhs, rhs, dimension_numbers, recipe=self.recipe, **kwargs)


@dataclasses.dataclass(frozen=True)
class Fp8Quantization:
    """What MaxText's layers take as `quant`: the interface of `maxtext.layers.quantizations.Quantization`.

    Dense layers, attention's projections and the experts' products run in FP8 with block scaling, forward and
    backward. Nothing is kept between steps, so checkpoints are those of the unquantized model. MaxText itself gives no
    `quant` to its embedding, its output head and its router.

    **Arguments:**

    - `recipe`: a `jaxfp8.Recipe`; None is the one in force when the model is called.
    """

    recipe: Recipe | None = None

    quant_mode: ClassVar[str] = "train"
    needs_apply_rngs: ClassVar[bool] = False

    def dot_general_cls(self, mesh_axes: tuple[str | None, ...] = ()) -> Any:
        """A factory of the linen module that a dense layer calls; products need no mesh axes."""
        return functools.partial(DotGeneral, self.recipe)

    def einsum(self, dtype: Any = None, mesh_axes: tuple[str | None, ...] = ()) -> Einsum:
        """The einsum of the experts with a capacity factor; its second operand is the weight."""
        return Einsum(self.recipe)

    def ragged_dot(
        self,
        lhs: Any,
        rhs: Any,
        group_sizes: Any,
        *,
        preferred_element_type: Any = None,
        group_offset: Any = None,
        partial_sum: Any = None,
    ) -> jax.Array:
        """The experts' product without a capacity factor: `(M, K)` sorted by expert, `(G, K, N)` -> `(M, N)`.

        **Arguments:**

        - `partial_sum`: `(M, N)` or None; added to the product.
        - `group_offset`: must be None.

        **Raises:** as `jaxfp8.ragged_dot`.
        """
        y = ragged_dot(
            lhs,
            rhs,
            group_sizes,
            preferred_element_type=preferred_element_type,
            group_offset=group_offset,
            recipe=self.recipe,
        )
        return y if partial_sum is None else y + partial_sum.astype(y.dtype)
