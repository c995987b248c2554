"""mlp and ragged_mlp: two products with an activation between, which is never stored in high precision.

    h  = quantize(x) . quantize(w_up)                  h in bfloat16 or float32
    y  = quantize(a(h)) . quantize(w_down)             one kernel reads h and writes both copies of a(h)
    dh = a'(h) (quantize(dy) . quantize(w_down)^T)     one kernel reads h and da and writes both copies of dh
    dx = quantize(dh) . quantize(w_up)^T
    dw_down = columns(a(h)) . columns(dy), dw_up = columns(x) . columns(dh)

Straight-through gradients of DeepSeek-V3's recipe (arXiv 2412.19437, section 3.3), as of two `linear`; but the
activation and its gradient are quantized from float32, not from bfloat16.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .._arrays import checks
from .._arrays.blocks import BLOCK, ceil_blocks
from .._arrays.quantized_weight import parts, value_of, with_copies
from .._arrays.recipe import Recipe, current_recipe
from .._primitives.call import Call
from .._primitives.mesh import place
from ..kernels.activation import ACTIVATIONS, TWO
from ._arguments import out_spec, result_dtype
from ._dot import weight_dims
from ._mlp_dense import mlp_operation
from ._mlp_ragged import ragged_mlp_operation
from ._mlp_weights import both_quantized, quantized_up_dims


def check_mlp(function, x, w_up, w_down, activation, preferred_element_type, recipe, groups=""):
    """x, both weights with F padded to whole blocks, their quantized copies, dimensions and attributes of the call."""
    if activation not in ACTIVATIONS:
        allowed, product = ", ".join(map(repr, ACTIVATIONS)), "ragged_dot" if groups else "linear"
        raise ValueError(
            f"{function}: activation is {activation!r}; allowed: {allowed} (gelu by its tanh approximation); for "
            f"others, jax.nn.gelu(approximate=False) included, call jaxfp8.{product} twice with the activation between"
        )
    x = checks.array(function, "x", x, "(M, K)" if groups else "(..., K)")
    w_up, w_down = (
        with_copies(function, name, w, "(G, N, K)" if groups else "(N, K)")
        for name, w in (("w_up", w_up), ("w_down", w_down))
    )
    quantized_up, quantized_down = (
        parts(function, name, w) for name, w in (("w_up", w_up), ("w_down", w_down))
    )
    w_down = value_of(function, "w_down", w_down, f"({groups}F, N)")
    shapes = f"({groups}K, F)", f"({groups}K, 2, F)"
    if quantized_up:
        w_up = value_of(function, "w_up", w_up, f"({groups}K, F or 2 F)")
        if w_up.shape[-1] == 2 * w_down.shape[-2]:
            w_up = w_up.reshape(*w_up.shape[:-1], 2, w_down.shape[-2])
    else:
        w_up = checks.array(function, "w_up", w_up, "(...)")
    at = w_up.ndim - len(shapes[0].split(","))
    if at not in (0, 1) or (at and w_up.shape[-2] != 2):
        raise ValueError(
            f"{function}: w_up has shape {w_up.shape}; allowed: {shapes[0]}, or {shapes[1]}: gate and up"
        )
    checks.same(function, "K", "x", x.shape[-1], "w_up", w_up.shape[-2 - at])
    checks.same(function, "F", "w_up", w_up.shape[-1], "w_down", w_down.shape[-2])
    if groups:
        checks.same(function, "G", "w_up", w_up.shape[0], "w_down", w_down.shape[0])
        if w_up.shape[0] == 0:
            raise ValueError(f"{function}: w_up has G=0; allowed: at least one group")
    out_dtype = result_dtype(function, preferred_element_type, x.dtype)
    quantized = ()
    if quantized_up or quantized_down:
        quantized = both_quantized(function, w_up, w_down, quantized_up, quantized_down, recipe)
    # Hidden units without weights: a(0) is 0. Else blocks of gate and of up would not line up in a product over both.
    elif pad := ceil_blocks(w_up.shape[-1]) * BLOCK - w_up.shape[-1]:
        w_up = jnp.pad(w_up, [(0, 0)] * (w_up.ndim - 1) + [(0, pad)])
        w_down = jnp.pad(w_down, [(0, 0)] * (w_down.ndim - 2) + [(0, pad), (0, 0)])
    group = ("g",) if groups else ()
    up_dims = (*group, "k", TWO, "f") if at else (*group, "k", "f")
    down_dims = (*group, "f", "n")
    copies = *quantized_up_dims(up_dims), *weight_dims(down_dims, quantized)
    bf16 = np.dtype(jnp.bfloat16)
    attributes = (
        ("activation", activation),
        ("out_dtype", out_dtype),
        ("hidden_dtype", bf16 if bf16 in (x.dtype, out_dtype) else np.dtype(np.float32)),
        ("recipe", recipe),
    )
    dims = up_dims, down_dims, copies if quantized else ()
    return x, w_up, w_down, quantized, dims, attributes


def mlp(
    x: Any,
    w_up: Any,
    w_down: Any,
    *,
    activation: str = "silu",
    recipe: Recipe | None = None,
    preferred_element_type: Any = None,
    out_sharding: Any = None,
) -> jax.Array:
    """The MLP of a transformer with FP8 products, forward and backward: `a(x . w_up) . w_down`.

    With a gate, `(a(x . w_up[:, 0]) * (x . w_up[:, 1])) . w_down`: SwiGLU for silu, GeGLU for gelu (arXiv 2002.05202).

    On a GPU one kernel reads the hidden layer and writes the FP8 rows and columns of its activation, and one reads it
    and the gradient of the activation and writes those of its own gradient. The activation is computed in float32 and
    quantized from there. Under `vmap` with shared weights it stays one MLP, also its weight gradients.

    **Arguments:**

    - `x`: float32, bfloat16 or float16 `(..., K)`.
    - `w_up`: likewise, `(K, F)`, or `(K, 2, F)` with a gate, `w_up[:, 0]`. (Not `(K, 2 F)`: so F can be sharded.) Or a
      `QuantizedWeight` (see `jaxfp8.prequantize`) of `(K, F)`, or with a gate of `(K, 2 F)`, F a multiple of 128.
    - `w_down`: likewise, `(F, N)`, or a `QuantizedWeight` of that. Either may be FP8 alone, for which no gradient is
      made: a `QuantizedArray` in 128x128 blocks, `(F, K)` or `(2 F, K)` (gate, then up), and `(N, F)`.
    - `activation`: `"silu"`, or `"gelu"`: the tanh approximation, as `jax.nn.gelu`'s default. The exact gelu,
      `jax.nn.gelu(approximate=False)`, and other activations run unfused, in high precision, between two products:
      `linear(jax.nn.gelu(linear(x, w_up), approximate=False), w_down)`; of experts, `ragged_dot` likewise.
    - `recipe`: a `jaxfp8.Recipe`; None is the one in force.
    - `preferred_element_type`: dtype of the result; None is x's, also of bfloat16 x with float32 weights. The
      hidden layer, which is kept for the backward pass, is bfloat16 if x or the result is, else float32.
    - `out_sharding`: a PartitionSpec or NamedSharding of the result, on meshes with explicit axes.

    **Returns:** `(..., N)`. Gradients have the dtypes of their primals.

    **Raises:** TypeError or ValueError for operands that do not fit.
    """
    recipe = current_recipe("mlp", recipe)
    x, w_up, w_down, quantized, (up_dims, down_dims, copies), attributes = check_mlp(
        "mlp", x, w_up, w_down, activation, preferred_element_type, recipe
    )
    spec = out_spec("mlp", out_sharding, x.ndim)
    with jax.named_scope("jaxfp8.mlp"):
        vector = x.ndim == 1
        if vector:
            x = x[None]
            spec = None if spec is None else ((), *spec)
        tokens = tuple(f"m{i}" for i in range(x.ndim - 1))
        out = (*tokens, "n")
        wanted = () if spec is None else tuple(zip(out, spec, strict=True))
        call = Call(((*tokens, "k"), up_dims, down_dims, *copies), (out,), attributes, wanted)
        (y,) = mlp_operation(x, w_up, w_down, *quantized, call=call)
        y = place(y, spec)
        return y[0] if vector else y


def ragged_mlp(
    x: Any,
    w_up: Any,
    w_down: Any,
    group_sizes: Any,
    *,
    activation: str = "silu",
    recipe: Recipe | None = None,
    preferred_element_type: Any = None,
    out_sharding: Any = None,
) -> jax.Array:
    """`mlp` with weights for each group of rows: the experts of a mixture.

    Groups of any size follow one another from row 0 on; no padding, no host synchronization, no capacity.

    **Arguments:** as `mlp`, but

    - `x`: tokens sorted by group, `(M, K)`.
    - `w_up`: `(G, K, F)`, or `(G, K, 2, F)` with a gate, or a `QuantizedWeight` of `(G, K, F)` or `(G, K, 2 F)`.
    - `w_down`: `(G, F, N)`, or a `QuantizedWeight` of that. FP8 alone as in `mlp`, with a leading G.
    - `group_sizes`: int32 `(G,)`, rows of each group. Negative counts as zero; groups are clipped to M.

    **Returns:** `(M, N)`. Rows past the last group are zero and contribute nothing to gradients; empty groups have
    zero weight gradients.

    **Raises:** TypeError or ValueError for operands that do not fit.
    """
    function = "ragged_mlp"
    recipe = current_recipe(function, recipe)
    x, w_up, w_down, quantized, (up_dims, down_dims, copies), attributes = check_mlp(
        function, x, w_up, w_down, activation, preferred_element_type, recipe, "G, "
    )
    sizes = checks.group_sizes(function, "group_sizes", group_sizes)
    checks.same(function, "G", "w_up", w_up.shape[0], "group_sizes", sizes.shape[0])
    spec = out_spec(function, out_sharding, 2)
    ins = (("m", "k"), up_dims, down_dims, ("g",), *copies)
    call = Call(ins, (("m", "n"),), attributes)
    with jax.named_scope("jaxfp8.ragged_mlp"):
        (y,) = ragged_mlp_operation(x, w_up, w_down, sizes, *quantized, call=call)
        return y if spec is None else jax.sharding.reshard(y, out_sharding)
