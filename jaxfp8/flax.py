"""Flax: the operations in the places where linen and nnx take a product, and conversion of a whole nnx model.

    nn.Dense(4096, dot_general=jaxfp8.flax.DotGeneral())             # linen
    nnx.Linear(1024, 4096, dot_general=jaxfp8.flax.DotGeneral(), rngs=rngs)
    nnx.Einsum("btd,dhk->bthk", (1024, 16, 64), einsum_op=jaxfp8.flax.Einsum(), rngs=rngs)
    jaxfp8.flax.convert(model, lambda path, module: path != "head")   # an nnx model that exists

Both are frozen dataclasses, equal if their recipes are: nnx compares what a module holds to decide whether it has
compiled for it before, and two lambdas or partials are never equal.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, TypeVar

import jax
from flax import nnx
from flax.nnx.nn import dtypes

from ._arrays.quantized_weight import QuantizedWeight
from ._arrays.recipe import Recipe
from .ops.dot_general import dot_general
from .ops.einsum import einsum
from .ops.prequantize import prequantize

__all__ = ["DotGeneral", "Einsum", "Factory", "FrozenWeight", "convert"]

M = TypeVar("M", bound=nnx.Module)


@dataclasses.dataclass(frozen=True)
class Factory:
    """Gives the same operation at every call: what Flax's `*_cls` arguments take, for one with a recipe."""

    operation: Any

    def __call__(self) -> Any:
        """The operation."""
        return self.operation


@dataclasses.dataclass(frozen=True)
class DotGeneral:
    """`jaxfp8.dot_general` with a recipe of its own, for `dot_general=` arguments of linen and nnx.

    The second operand, a layer's kernel, is the weight. The class itself goes where Flax takes a class
    (`dot_general_cls=DotGeneral`), `DotGeneral(recipe).cls` where that needs a recipe.

    **Arguments:**

    - `recipe`: a `jaxfp8.Recipe`; None is the one in force when the layer is called.
    """

    recipe: Recipe | None = None

    @property
    def cls(self) -> Factory:
        """A factory of this operation, for `dot_general_cls=`."""
        return Factory(self)

    def __call__(
        self,
        lhs: Any,
        rhs: Any,
        dimension_numbers: Any,
        precision: Any = None,
        preferred_element_type: Any = None,
        *,
        out_sharding: Any = None,
    ) -> jax.Array:
        """As `jaxfp8.dot_general`."""
        return dot_general(
            lhs,
            rhs,
            dimension_numbers,
            precision,
            preferred_element_type,
            out_sharding=out_sharding,
            recipe=self.recipe,
        )


@dataclasses.dataclass(frozen=True)
class Einsum:
    """`jaxfp8.einsum` with a recipe of its own, for `einsum_op=` of nnx and the einsum classes of linen's attention.

    **Arguments:**

    - `recipe`: a `jaxfp8.Recipe`; None is the one in force when the layer is called.
    """

    recipe: Recipe | None = None

    @property
    def cls(self) -> Factory:
        """A factory of this operation, for `qk_attn_weights_einsum_cls=` and its like."""
        return Factory(self)

    def __call__(
        self,
        subscripts: str,
        lhs: Any,
        rhs: Any,
        /,
        *,
        precision: Any = None,
        preferred_element_type: Any = None,
        out_sharding: Any = None,
    ) -> jax.Array:
        """As `jaxfp8.einsum`."""
        return einsum(
            subscripts,
            lhs,
            rhs,
            precision=precision,
            preferred_element_type=preferred_element_type,
            out_sharding=out_sharding,
            recipe=self.recipe,
        )


class FrozenWeight(nnx.Variable):
    """A weight that is FP8 alone, a `QuantizedWeight` without value. No `nnx.Param`: optimizers pass it over."""

    def __getitem__(self, key: Any) -> Any:
        """The weight, by `[...]` as layers read their kernels."""
        return self.get_value() if key is ... else super().__getitem__(key)


def _promote_beside_frozen(args: Any, /, **options: Any) -> Any:
    """Flax's promotion of inputs, kernel and bias, of which the kernel, being FP8, takes no part."""
    inputs, kernel, bias = args
    inputs, bias = dtypes.promote_dtype((inputs, bias), **options)
    return inputs, kernel, bias


def _freeze(layer: Any, recipe: Recipe | None) -> None:
    kernel = layer.kernel[...]
    if not isinstance(kernel, QuantizedWeight):
        layer.kernel = FrozenWeight(prequantize(kernel, recipe=recipe, frozen=True))
    layer.promote_dtype = _promote_beside_frozen


def convert(
    model: M,
    where: Callable[[str, nnx.Module], bool] | None = None,
    *,
    recipe: Recipe | None = None,
    frozen: bool = False,
) -> M:
    """Puts the products of an nnx model's layers in FP8, in place.

    Layers are `nnx.Linear`, `nnx.LinearGeneral` (so attention's projections too) and `nnx.Einsum`, and their
    subclasses. Parameters are untouched: optimizer states and checkpoints stay valid.

    **Arguments:**

    - `model`: an `nnx.Module`.
    - `where`: `(path, layer) -> bool`, the layers to convert, such as `lambda path, layer: "head" not in path`. A path
      is the attributes and indices from the model to the layer: `"blocks.0.attention.query"`. None takes all. Routers
      and output heads are better left out (DeepSeek-V3, arXiv 2412.19437, section 3.3.1).
    - `recipe`: a `jaxfp8.Recipe`; None is the one in force when the model is called.
    - `frozen`: quantizes the kernels here, by the recipe or the one in force, and keeps nothing else of them: a
      `FrozenWeight` of one byte a parameter, for which no gradient is made. Of `nnx.Linear` alone: the kernels of the
      others have axes that blocks cannot lie on.

    **Returns:** the same model.

    **Raises:** TypeError if `model` is no nnx module (linen modules are immutable: pass `dot_general=`, or use
    `jaxfp8.qwix`), or if a layer to freeze is no `nnx.Linear`; ValueError if no layer is chosen.
    """
    if not isinstance(model, nnx.Module):
        raise TypeError(f"convert: model is a {type(model).__name__}; allowed: an nnx.Module")
    layers = {
        ".".join(map(str, path)): module
        for path, module in nnx.iter_modules(model)
        if isinstance(module, (nnx.Linear, nnx.LinearGeneral, nnx.Einsum))
    }
    chosen = [m for path, m in layers.items() if where is None or where(path, m)]
    if not chosen:
        raise ValueError(
            f"convert: no layer is chosen; the model has {', '.join(layers) or 'none of the kinds it converts'}"
        )
    for layer in chosen:
        if frozen and not isinstance(layer, nnx.Linear):
            raise TypeError(
                f"convert: frozen: a layer that is chosen is a {type(layer).__name__}; allowed: nnx.Linear"
            )
    for layer in chosen:
        if frozen:
            _freeze(layer, recipe)
        if isinstance(layer, nnx.Einsum):
            layer.einsum_op = Einsum(recipe)
        else:
            layer.dot_general = DotGeneral(recipe)
            if isinstance(layer, nnx.LinearGeneral):
                layer.dot_general_cls = None  # it would win over dot_general
    return model
