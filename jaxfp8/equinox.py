"""Equinox: `eqx.nn.Linear` with an FP8 product.

    model = jaxfp8.equinox.convert(model, lambda path, linear: "head" not in path)

Equinox layers act on one example and are mapped with `jax.vmap`. However many maps lie over it, a converted layer is
one product over all examples, and so is its weight gradient.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp

from ._arrays.quantized_array import QuantizedArray
from ._arrays.recipe import Recipe
from .ops.dot_general import dot_general
from .ops.prequantize import frozen_operand

__all__ = ["Linear", "convert"]

T = TypeVar("T")


class Linear(eqx.nn.Linear):
    """`eqx.nn.Linear` whose product, forward and backward, is in FP8: weight `(out, in)`, input `(in,)`.

    It has the leaves of an `eqx.nn.Linear`, in the same order, so checkpoints written with `eqx.tree_serialise_leaves`
    fit either. The weight may be a `QuantizedArray` in 128x128 blocks: FP8 alone, for which no gradient is made.

    **Arguments:** those of `eqx.nn.Linear`, and

    - `recipe`: a `jaxfp8.Recipe`; None is the one in force when the layer is called.
    """

    recipe: Recipe | None = eqx.field(static=True, default=None)

    def __init__(
        self,
        in_features: Any,
        out_features: Any,
        use_bias: bool = True,
        dtype: Any = None,
        *,
        recipe: Recipe | None = None,
        key: Any,
    ):
        super().__init__(in_features, out_features, use_bias, dtype, key=key)
        self.recipe = recipe

    @jax.named_scope("jaxfp8.equinox.Linear")
    def __call__(self, x: Any, *, key: Any = None) -> jax.Array:
        """`weight . x + bias`.

        **Arguments:**

        - `x`: float32, bfloat16 or float16 `(in_features,)`; `()` if in_features is "scalar".
        - `key`: ignored, as in `eqx.nn.Linear`.

        **Returns:** `(out_features,)`; `()` if out_features is "scalar".

        **Raises:** ValueError for another shape.
        """
        want = () if self.in_features == "scalar" else (self.in_features,)
        if jnp.shape(x) != want:
            raise ValueError(
                f"Linear: x has shape {jnp.shape(x)}; allowed: {want} (map over batch axes with jax.vmap)"
            )
        x = jnp.reshape(x, self.weight.shape[1:])
        y = dot_general(x, self.weight, (((0,), (1,)), ((), ())), recipe=self.recipe)
        if self.bias is not None:
            y = y + self.bias
        return jnp.squeeze(y) if self.out_features == "scalar" else y


def convert(
    model: T,
    where: Callable[[str, eqx.nn.Linear], bool] | None = None,
    *,
    recipe: Recipe | None = None,
    frozen: bool = False,
) -> T:
    """The model with its `eqx.nn.Linear` layers in FP8; `eqx.nn.MLP` and `eqx.nn.MultiheadAttention` are made of them.

    **Arguments:**

    - `model`: any pytree of Equinox modules.
    - `where`: `(path, linear) -> bool`, the layers to convert, such as `lambda path, linear: "head" not in path`. A
      path is the attributes and indices from the model to the layer: `"layers.0.attention.query_proj"`. None takes
      all. Subclasses of `eqx.nn.Linear` are left alone: what they compute is theirs.
    - `recipe`: a `jaxfp8.Recipe`; None is the one in force when the model is called.
    - `frozen`: quantizes the weights here, by the recipe or the one in force, and keeps nothing else of them: a
      `QuantizedArray` of one byte a parameter, for which no gradient is made.

    **Returns:** a new model with the same leaves, or with FP8 ones for frozen weights. Make the optimizer's state from
    it: the layers' type is part of the tree's structure.

    **Raises:** ValueError if no layer is chosen.
    """
    seen, chosen = [], 0

    def swap(path, node):
        nonlocal chosen
        if not _is_linear(node):
            return node
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        seen.append(name)
        if where is not None and not where(name, node):
            return node
        chosen += 1
        new = object.__new__(Linear)
        for field in ("weight", "bias", "in_features", "out_features", "use_bias"):
            object.__setattr__(new, field, getattr(node, field))
        object.__setattr__(new, "recipe", recipe)
        if frozen and not isinstance(node.weight, QuantizedArray):
            object.__setattr__(new, "weight", frozen_operand(node.weight, recipe))
        return new

    converted = jax.tree_util.tree_map_with_path(swap, model, is_leaf=_is_linear)
    if not chosen:
        raise ValueError(
            f"convert: no layer is chosen; the model has {', '.join(seen) or 'no eqx.nn.Linear'}"
        )
    return converted


def _is_linear(node: Any) -> bool:
    return type(node) in (eqx.nn.Linear, Linear)
