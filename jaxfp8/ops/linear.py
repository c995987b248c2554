"""linear: x . w + b."""

from __future__ import annotations

from typing import Any

import jax

from .._arrays import checks
from .._arrays.quantized_weight import frozen_weight, parts
from .._arrays.recipe import Recipe, current_recipe
from ._arguments import out_spec, result_dtype
from ._dot import dot
from ._frozen import frozen_dot


def linear(
    x: Any,
    w: Any,
    b: Any = None,
    *,
    recipe: Recipe | None = None,
    preferred_element_type: Any = None,
    out_sharding: Any = None,
) -> jax.Array:
    """`x . w + b` with FP8 products, forward and backward.

    Under `vmap` with a shared weight it stays one product, also its weight gradient.

    **Arguments:**

    - `x`: float32, bfloat16 or float16 `(..., K)`.
    - `w`: float32, bfloat16 or float16 `(K, N)`, or a `QuantizedWeight` of that (see `jaxfp8.prequantize`). Or FP8
      alone, for which no gradient is made: a `QuantizedArray` `(N, K)` in 128x128 blocks, or a `QuantizedWeight`
      without value.
    - `b`: `(N,)` or None; added after the product, in high precision.
    - `recipe`: a `jaxfp8.Recipe`; None is the one in force.
    - `preferred_element_type`: dtype of the result; None is x's, also of bfloat16 x with a float32 w (`dot_general` and
      `einsum` promote, as JAX's do).
    - `out_sharding`: a PartitionSpec or NamedSharding of the result, on meshes with explicit axes.

    **Returns:** `(..., N)`. Gradients have the dtypes of their primals.

    **Raises:** TypeError or ValueError for operands that do not fit.
    """
    recipe = current_recipe("linear", recipe)
    x = checks.array("linear", "x", x, "(..., K)")
    frozen = frozen_weight("linear", "w", w, "(N, K)")
    quantized = () if frozen is not None else parts("linear", "w", w)
    if frozen is None:
        w = checks.array("linear", "w", w.value if quantized else w, "(K, N)")
    k, n = w.shape if frozen is None else frozen.shape[::-1]
    checks.same("linear", "K", "x", x.shape[-1], "w", k)
    if b is not None:
        b = checks.array("linear", "b", b, "(N,)")
        checks.same("linear", "N", "w", n, "b", b.shape[0])
    out_dtype = result_dtype("linear", preferred_element_type, x.dtype)
    spec = out_spec("linear", out_sharding, x.ndim)
    with jax.named_scope("jaxfp8.linear"):
        vector = x.ndim == 1
        if vector:
            x = x[None]
            spec = None if spec is None else ((), *spec)
        tokens = tuple(f"m{i}" for i in range(x.ndim - 1))
        dims, out = (*tokens, "k"), (*tokens, "n")
        options = {"recipe": recipe, "out_dtype": out_dtype, "out_spec": spec}
        if frozen is None:
            y = dot(x, w, dims, ("k", "n"), out, quantized=quantized, **options)
        else:
            y = frozen_dot(x, frozen, dims, ("n", "k"), out, **options)
        y = y[0] if vector else y
        return y if b is None else y + b.astype(y.dtype)
