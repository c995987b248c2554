"""Dense and batched products of quantized arrays: gemm and wgrad_gemm."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from .. import _ffi
from .._arrays import checks
from .._arrays.blocks import ROW, SQUARE, dequantize_blocks
from .._arrays.quantized_array import QuantizedArray, quantized
from .._arrays.recipe import check_num_sms, current_recipe
from .._ffi import CONTRACTION_STEP
from .._primitives.call import Call, arrange, restore
from .._primitives.leaf import Leaf, once, timed_call
from .._primitives.mesh import call_types
from .._primitives.sharded_operation import ShardedOperation
from .configurations import check_config, config_index, product_of_call
from .named import ROW_SCALE, Named

# --------------------------------------------------------------------------------------------------
# Leaves: (1 or G, M, K) . (G, N, K) -> (G, M, N)
# --------------------------------------------------------------------------------------------------


def contract(lhs, rhs):
    """float32 product over the last axes: (M, K) . (N, K), or with a common leading axis."""
    batch = (0,) if lhs.ndim == rhs.ndim == 3 else ()
    dims = (((lhs.ndim - 1,), (rhs.ndim - 1,)), (batch, batch))
    return lax.dot_general(lhs, rhs, dims, lax.Precision.HIGHEST, jnp.float32)


def add_accum(product, accum, out_dtype):
    """`accum + product` in float32, rounded once."""
    for c in accum:
        product = c.astype(jnp.float32) + product
    return product.astype(out_dtype)


def _reference(rhs_block):
    def reference(lhs, lhs_scale, rhs, rhs_scale, *accum, out_dtype, num_sms, config):
        lhs = dequantize_blocks(lhs, lhs_scale, ROW)
        rhs = dequantize_blocks(rhs, rhs_scale, rhs_block)
        if lhs.shape[0] == 1:
            y = jnp.swapaxes(contract(lhs[0], rhs), 0, 1)  # (M, G, N): one product
        else:
            y = contract(lhs, rhs)
        return [add_accum(y, accum, out_dtype)]

    return reference


def _pad_rows(data):
    """FP8 data with zeros after each row, up to the copy engine's stride."""
    pad = -data.shape[-1] % CONTRACTION_STEP
    if not pad:
        return data
    bits = lax.bitcast_convert_type(data, jnp.uint8)
    bits = jnp.pad(bits, [(0, 0)] * (data.ndim - 1) + [(0, pad)])
    return lax.bitcast_convert_type(bits, data.dtype)


def product_call(name, reference, scale_operands):
    """The custom call of a product.

    Operands 0 and 2 are FP8 data, `scale_operands` the positions of M-major scales; an accumulator comes last.
    """

    def custom_call(*operands, out_dtype, num_sms, config):
        accum = [v for v in operands[4:] if not jnp.issubdtype(v.dtype, jnp.integer)]
        params = {"out_dtype": out_dtype, "num_sms": num_sms, "config": config}
        (result,) = jax.eval_shape(lambda *xs: reference(*xs, **params), *operands)
        if any(0 in v.shape for v in (*operands, result)):
            return [add_accum(jnp.zeros(result.shape, jnp.float32), accum, out_dtype)]
        padded = [_pad_rows(v) if i in (0, 2) else v for i, v in enumerate(operands)]
        layouts = [
            ROW_SCALE[v.ndim] if i in scale_operands else tuple(range(v.ndim))
            for i, v in enumerate(padded)
        ]
        lhs, _, rhs, *_ = operands
        call = timed_call(
            _ffi.target(f"{name}_accum" if accum else name),
            call_types([result], operands),
            # Each element of the lhs meets each row of the rhs, of one group.
            flops=2 * lhs.size * rhs.shape[-2],
            input_layouts=layouts,
            input_output_aliases={len(padded) - 1: 0} if accum else {},
        )
        index = config_index(product_of_call(name, operands, out_dtype, num_sms), name, config)
        attributes = {"config": np.int32(index), "num_sms": np.int32(num_sms)}
        if not accum:
            return call(*padded, **attributes)
        # XLA's dynamic-slice fusion would take the call in with a slice that it reads, or a stack that its result goes
        # to, and forget that accum is the result's buffer: the call could only copy it. Barriers keep the call out.
        (y,) = call(*lax.optimization_barrier(padded), **attributes)
        return [once(y)]

    return custom_call


def product_leaf(name, reference, scale_operands):
    """The leaf of a product; see `product_call`."""
    custom_call = product_call(name, reference, scale_operands)
    return Leaf(f"jaxfp8_{name}_leaf", reference, custom_call)


gemm_1d2d_leaf = product_leaf("gemm_1d2d", _reference(SQUARE), (1,))
gemm_1d1d_leaf = product_leaf("gemm_1d1d", _reference(ROW), (1, 3))


# --------------------------------------------------------------------------------------------------
# Any product of named dimensions
# --------------------------------------------------------------------------------------------------


def _gemm_local(lhs, lhs_scale, rhs, rhs_scale, *accum, call):
    """Any product of named dimensions as (1 or G, M, K) . (G, N, K). n is the last dimension of the result."""
    lhs_dims, _, rhs_dims, rhs_scale_dims = call.ins[:4]
    (out,) = call.outs
    n, contracted = out[-1], tuple(d for d in lhs_dims if d not in out)
    groups = tuple(d for d in out[:-1] if d in rhs_dims)
    rows = tuple(d for d in out if d not in rhs_dims)
    sizes = call.sizes([lhs, lhs_scale, rhs, rhs_scale, *accum])
    lhs_groups = groups
    if missing := [d for d in groups if d not in lhs_dims]:
        if len(missing) == len(groups):  # all groups share lhs: read it once
            lhs_groups = ()
        else:
            lead = tuple(sizes[d] for d in missing)
            lhs, lhs_scale = (jnp.broadcast_to(v, lead + v.shape) for v in (lhs, lhs_scale))
            lhs_dims = tuple(missing) + lhs_dims
    if accum:
        (c,) = accum
        accum = (arrange(c, out, [groups, rows, (n,)]),)
    leaf = gemm_1d2d_leaf if n + "/" in rhs_scale_dims else gemm_1d1d_leaf
    (y,) = leaf(
        arrange(lhs, lhs_dims, [lhs_groups, rows, contracted]),
        arrange(lhs_scale, lhs_dims, [lhs_groups, rows, contracted]),
        arrange(rhs, rhs_dims, [groups, (n,), contracted]),
        arrange(rhs_scale, rhs_dims, [groups, (n,), contracted]),
        *accum,
        **dict(call.attributes),
    )
    return [restore(y, out, [groups, rows, (n,)], sizes)]


gemm_operation = ShardedOperation(
    "jaxfp8_gemm", _gemm_local, together=((0, 1), (2, 3)), function="gemm and wgrad_gemm"
)


def product_attributes(out_dtype, num_sms, config) -> tuple:
    """Parameters of a product's leaf; `num_sms` 0: all of them; `config` None: of the tables or the heuristic."""
    return (("config", config), ("num_sms", num_sms or 0), ("out_dtype", np.dtype(out_dtype)))


def product(
    lhs: Named,
    rhs: Named,
    out,
    out_dtype,
    *,
    num_sms=None,
    config=None,
    accum=None,
    wanted=(),
    sum_dtype=np.float32,
    operation=gemm_operation,
):
    """The product of two named quantized arrays over the names that `out` lacks; devices sum in `sum_dtype`."""
    ins: tuple[tuple[str, ...], ...] = (lhs.dims, lhs.scale_dims, rhs.dims, rhs.scale_dims)
    operands = [lhs.array.data, lhs.array.scale, rhs.array.data, rhs.array.scale]
    if accum is not None:
        ins, operands = (*ins, out), [*operands, accum]
    kernel_dtype = out_dtype if np.dtype(out_dtype) in checks.OUTPUT_DTYPES else np.float32
    call = Call(ins, (out,), product_attributes(kernel_dtype, num_sms, config), wanted)
    call = call._replace(sum_dtype=np.dtype(sum_dtype))
    return operation(*operands, call=call)[0].astype(out_dtype)


# --------------------------------------------------------------------------------------------------
# Public functions
# --------------------------------------------------------------------------------------------------


def check_accum(function, accum, shape, out_dtype, default):
    """`accum` and the dtype of the output, which is that of `accum` unless given."""
    if accum is None:
        return None, checks.output_dtype(function, "out_dtype", out_dtype or default)
    accum = checks.array(function, "accum", accum, "(...)", checks.OUTPUT_DTYPES)
    out_dtype = checks.output_dtype(function, "out_dtype", out_dtype or accum.dtype)
    if accum.dtype != out_dtype:
        raise TypeError(
            f"{function}: accum has dtype {accum.dtype.name}; allowed: {out_dtype.name}"
        )
    if accum.shape != shape:
        raise ValueError(f"{function}: accum has shape {accum.shape}; allowed: {shape}")
    return accum, out_dtype


def resolve_num_sms(function, num_sms):
    """The argument, else the recipe's."""
    check_num_sms(function, num_sms)
    return current_recipe(function).num_sms if num_sms is None else num_sms


def gemm(
    lhs: QuantizedArray,
    rhs: QuantizedArray,
    *,
    out_dtype: Any = None,
    accum: Any = None,
    num_sms: int | None = None,
    config: str | None = None,
) -> jax.Array:
    """The product of two quantized arrays, contracted over the last axis of both.

    FP8 products are summed exactly within a block of 128 and promoted to float32 with the blocks' scales, in order
    (DeepSeek-V3, arXiv 2412.19437, section 3.3.2). One kernel on Hopper.

    **Arguments:**

    - `lhs`: `(..., M, K)` in 1x128 blocks; `(G, M, K)` if rhs has groups.
    - `rhs`: `(N, K)` or `(G, N, K)`, in 128x128 or 1x128 blocks.
    - `out_dtype`: bfloat16 (default) or float32; with `accum`, its dtype.
    - `accum`: an array of the result's shape and dtype to add, in float32; its buffer becomes the result's if donated.
    - `num_sms`: multiprocessors to use on a GPU; None takes the recipe's.
    - `config`: the kernel's configuration by name, such as `"m128n128 cluster 2x1"` (`jaxfp8.Product(...).configs`
      lists them); None takes the measured one (`jaxfp8.tune`), else the heuristic's.

    **Returns:** `(..., M, N)` or `(G, M, N)`.

    **Raises:** TypeError or ValueError for operands that do not fit.
    """
    lhs = quantized("gemm", "lhs", lhs, "(..., M, K)", (ROW,))
    rhs = quantized("gemm", "rhs", rhs, "(..., N, K)", (ROW, SQUARE))
    checks.same("gemm", "K", "lhs", lhs.shape[-1], "rhs", rhs.shape[-1])
    if rhs.ndim > 3:
        raise ValueError(f"gemm: rhs has shape {rhs.shape}; allowed: (N, K) or (G, N, K)")
    left: tuple[str, ...]
    right: tuple[str, ...]
    if rhs.ndim == 3:
        if lhs.ndim != 3:
            raise ValueError(
                f"gemm: lhs has shape {lhs.shape}; allowed: (G, M, K), since rhs has shape {rhs.shape}"
            )
        checks.same("gemm", "G", "lhs", lhs.shape[0], "rhs", rhs.shape[0])
        left, right = ("g", "m", "k"), ("g", "n", "k")
    else:
        left, right = (*(f"m{i}" for i in range(lhs.ndim - 1)), "k"), ("n", "k")
    out = (*left[:-1], "n")
    shape = (*lhs.shape[:-1], rhs.shape[-2])
    accum, out_dtype = check_accum("gemm", accum, shape, out_dtype, jnp.bfloat16)
    num_sms = resolve_num_sms("gemm", num_sms)
    check_config("gemm", config, "gemm_1d2d" if rhs.block == SQUARE else "gemm_1d1d")
    y = product(
        Named(lhs, left),
        Named(rhs, right),
        out,
        out_dtype,
        num_sms=num_sms,
        config=config,
        accum=accum,
    )
    return y if accum is not None else once(y)


def wgrad_gemm(
    lhs: QuantizedArray,
    rhs: QuantizedArray,
    *,
    out_dtype: Any = None,
    accum: Any = None,
    num_sms: int | None = None,
    config: str | None = None,
) -> jax.Array:
    """The product of a weight gradient: contracted over tokens, both operands in 1x128 blocks along them.

    **Arguments:**

    - `lhs`: `(N, T)`, such as the columns of `jaxfp8.quantize_both`.
    - `rhs`: `(K, T)`, likewise.
    - `out_dtype`: float32 (default) or bfloat16; with `accum`, its dtype.
    - `accum`: an `(N, K)` array to add, such as the gradient of earlier microbatches; its buffer becomes the result's
      if donated.
    - `num_sms`: multiprocessors to use on a GPU; None takes the recipe's.
    - `config`: the kernel's configuration by name, such as `"m128n128 cluster 2x1"` (`jaxfp8.Product(...).configs`
      lists them); None takes the measured one (`jaxfp8.tune`), else the heuristic's.

    **Returns:** `(N, K)`.

    **Raises:** TypeError or ValueError for operands that do not fit.
    """
    lhs = quantized("wgrad_gemm", "lhs", lhs, "(N, T)", (ROW,))
    rhs = quantized("wgrad_gemm", "rhs", rhs, "(K, T)", (ROW,))
    checks.same("wgrad_gemm", "T", "lhs", lhs.shape[-1], "rhs", rhs.shape[-1])
    shape = (lhs.shape[0], rhs.shape[0])
    accum, out_dtype = check_accum("wgrad_gemm", accum, shape, out_dtype, jnp.float32)
    num_sms = resolve_num_sms("wgrad_gemm", num_sms)
    check_config("wgrad_gemm", config, "gemm_1d1d")
    left, right = Named(lhs, ("n", "t")), Named(rhs, ("k", "t"))
    return product(left, right, ("n", "k"), out_dtype, num_sms=num_sms, config=config, accum=accum)
