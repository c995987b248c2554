"""linear: x . w + b."""

from __future__ import annotations

from typing import Any

import jax

from .._arrays import checks
from .._arrays.quantized_weight import parts
from .._arrays.recipe import Recipe, current_recipe
from ._arguments import out_spec, result_dtype
from ._dot import dot


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
    - `w`: float32, bfloat16 or float16 `(K, N)`, or a `QuantizedWeight` of that (see `jaxfp8.prequantize`).
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
    quantized = parts("linear", "w", w)
    w = checks.array("linear", "w", w.value if quantized else w, "(K, N)")
    checks.same("linear", "K", "x", x.shape[-1], "w", w.shape[0])
    if b is not None:
        b = checks.array("linear", "b", b, "(N,)")
        checks.same("linear", "N", "w", w.shape[1], "b", b.shape[0])
    out_dtype = result_dtype("linear", preferred_element_type, x.dtype)
    spec = out_spec("linear", out_sharding, x.ndim)
    with jax.named_scope("jaxfp8.linear"):
        vector = x.ndim == 1
        if vector:
            x = x[None]
            spec = None if spec is None else ((), *spec)
        tokens = tuple(f"m{i}" for i in range(x.ndim - 1))
        y = dot(
            x,
            w,
            (*tokens, "k"),
            ("k", "n"),
            (*tokens, "n"),
            recipe=recipe,
            out_dtype=out_dtype,
            out_spec=spec,
            quantized=quantized,
        )
        y = y[0] if vector else y
        return y if b is None else y + b.astype(y.dtype)
