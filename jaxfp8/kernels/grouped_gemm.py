"""Products with a matrix per group of rows: grouped_gemm, masked_grouped_gemm and grouped_wgrad_gemm."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from .._arrays import checks
from .._arrays.blocks import (
    BLOCK,
    ROW,
    SQUARE,
    ceil_blocks,
    dequantize_blocks,
    group_at,
    group_bounds,
    padded_starts,
    running_sum,
)
from .._arrays.quantized_array import QuantizedArray, quantized
from .._primitives.call import Call
from .._primitives.leaf import once
from .._primitives.mesh import match_varying
from .._primitives.sharded_operation import ShardedOperation
from ._mapped import mapped
from .configurations import check_config
from .gemm import (
    add_accum,
    check_accum,
    contract,
    product_attributes,
    product_leaf,
    resolve_num_sms,
)
from .named import Named

# --------------------------------------------------------------------------------------------------
# References: loops over tiles with work, in memory that does not grow with groups times tokens
# --------------------------------------------------------------------------------------------------


def _walk_tiles(tiles, body, init, operands):
    """`body(group, index of the tile in its group, carry)` for each of `tiles[g]` tiles of each group, in order.

    In shard_map the carry varies over devices as the operands that the body reads do.
    """
    init, tiles, *_ = match_varying([init, tiles, *operands])
    ends = running_sum(tiles)

    def step(i, carry):
        group = group_at(ends, i) + 1
        return body(group, i - (ends - tiles)[group], carry)

    return lax.fori_loop(jnp.int32(0), ends[-1], step, init)


def _reference_grouped(lhs, lhs_scale, rhs, rhs_scale, sizes, *, out_dtype, num_sms, config):
    """(M, K) . (G, N, K) -> (M, N); a row uses the matrix of its group, rows past the last group are zero."""
    m = lhs.shape[0]
    groups, n, _ = rhs.shape
    # Larger tiles are faster where groups are large; of symbolic numbers nothing is known.
    known = isinstance(m, int) and isinstance(groups, int)
    tile = BLOCK * max(1, min(4, m // (groups * BLOCK))) if known else BLOCK
    starts, ends = group_bounds(sizes, m)
    lhs = jnp.pad(dequantize_blocks(lhs, lhs_scale, ROW), [(0, tile), (0, 0)])

    def body(group, index, y):
        row = starts[group] + index * tile
        x = lax.dynamic_slice_in_dim(lhs, row, tile)
        product = contract(x, dequantize_blocks(rhs[group], rhs_scale[group], SQUARE))
        inside = (row + jnp.arange(tile, dtype=jnp.int32) < ends[group])[:, None]
        others = lax.dynamic_slice_in_dim(y, row, tile)
        kept = jnp.where(inside, product.astype(out_dtype), others)
        return lax.dynamic_update_slice_in_dim(y, kept, row, 0)

    tiles = (ends - starts + tile - 1) // tile
    y = _walk_tiles(tiles, body, jnp.zeros((m + tile, n), out_dtype), (lhs, rhs, rhs_scale))
    return [y[:m]]


def _reference_masked(lhs, lhs_scale, rhs, rhs_scale, sizes, *, out_dtype, num_sms, config):
    """(G, M, K) . (G, N, K) -> (G, M, N); rows past `sizes[g]` are zero."""
    lhs = dequantize_blocks(lhs, lhs_scale, ROW)
    rhs = dequantize_blocks(rhs, rhs_scale, SQUARE)
    inside = jnp.arange(lhs.shape[1], dtype=jnp.int32) < sizes[:, None]
    return [jnp.where(inside[:, :, None], contract(lhs, rhs), 0).astype(out_dtype)]


def _reference_wgrad(lhs, lhs_scale, rhs, rhs_scale, sizes, *accum, out_dtype, num_sms, config):
    """(N, T) . (K, T) -> (G, N, K); T is the group-padded token axis."""
    n, padded = lhs.shape
    k = rhs.shape[0]
    groups = sizes.shape[0]
    starts, ends = group_bounds(sizes, padded - BLOCK * groups)
    first = padded_starts(starts, ends)

    def body(group, index, y):
        block = first[group] // BLOCK + index

        def tokens(data, scale):
            data = lax.dynamic_slice_in_dim(data, block * BLOCK, BLOCK, 1)
            scale = lax.dynamic_slice_in_dim(scale, block, 1, 1)
            return dequantize_blocks(data, scale, ROW)

        product = contract(tokens(lhs, lhs_scale), tokens(rhs, rhs_scale))
        return y.at[group].add(product)

    tiles = (ends - starts + BLOCK - 1) // BLOCK
    operands = lhs, lhs_scale, rhs, rhs_scale
    y = _walk_tiles(tiles, body, jnp.zeros((groups, n, k), jnp.float32), operands)
    return [add_accum(y, accum, out_dtype)]


grouped_gemm_leaf = product_leaf("grouped_gemm", _reference_grouped, (1,))
masked_grouped_gemm_leaf = product_leaf("masked_grouped_gemm", _reference_masked, (1,))
grouped_wgrad_gemm_leaf = product_leaf("grouped_wgrad_gemm", _reference_wgrad, (1, 3))


# --------------------------------------------------------------------------------------------------
# Kernels: named dimensions
# --------------------------------------------------------------------------------------------------


def _local(leaf):
    return mapped(lambda *arrays, call: leaf(*arrays, **dict(call.attributes)))


_TOGETHER = ((0, 1), (2, 3))
grouped_operation = ShardedOperation(
    "jaxfp8_grouped_gemm", _local(grouped_gemm_leaf), pinned=("m", "g"), together=_TOGETHER
)
masked_operation = ShardedOperation(
    "jaxfp8_masked_grouped_gemm",
    _local(masked_grouped_gemm_leaf),
    pinned=("m",),
    together=_TOGETHER,
)
grouped_wgrad_operation = ShardedOperation(
    "jaxfp8_grouped_wgrad_gemm",
    _local(grouped_wgrad_gemm_leaf),
    pinned=("t", "g"),
    together=_TOGETHER,
)


def grouped_product(
    operation,
    lhs: Named,
    rhs: Named,
    sizes,
    sizes_dims,
    out,
    out_dtype,
    *,
    num_sms=None,
    config=None,
    accum=None,
    sum_dtype=np.float32,
):
    """The product of two named quantized arrays and group sizes; over devices summed in `sum_dtype`."""
    ins: tuple[tuple[str, ...], ...]
    ins = (lhs.dims, lhs.scale_dims, rhs.dims, rhs.scale_dims, sizes_dims)
    operands = [lhs.array.data, lhs.array.scale, rhs.array.data, rhs.array.scale, sizes]
    if accum is not None:
        ins, operands = (*ins, out), [*operands, accum]
    kernel_dtype = out_dtype if out_dtype in checks.OUTPUT_DTYPES else jnp.float32
    call = Call(ins, (out,), product_attributes(kernel_dtype, num_sms, config))
    call = call._replace(sum_dtype=np.dtype(sum_dtype))
    return operation(*operands, call=call)[0].astype(out_dtype)


# --------------------------------------------------------------------------------------------------
# Public functions
# --------------------------------------------------------------------------------------------------


def _operands(function, lhs, lhs_shape, rhs):
    lhs = quantized(function, "lhs", lhs, lhs_shape, (ROW,))
    rhs = quantized(function, "rhs", rhs, "(G, N, K)", (SQUARE,))
    checks.same(function, "K", "lhs", lhs.shape[-1], "rhs", rhs.shape[-1])
    return lhs, rhs


def grouped_gemm(
    lhs: QuantizedArray,
    rhs: QuantizedArray,
    group_sizes: Any,
    *,
    out_dtype: Any = jnp.bfloat16,
    num_sms: int | None = None,
    config: str | None = None,
) -> jax.Array:
    """A product in which each group of rows has its own matrix: the experts of a mixture.

    Groups follow one another from row 0 on, at any row, of any size; no padding, no host synchronization.

    **Arguments:**

    - `lhs`: `(M, K)` in 1x128 blocks.
    - `rhs`: `(G, N, K)` in 128x128 blocks.
    - `group_sizes`: int32 `(G,)` on the device: rows of each group. Negative counts as zero; groups are clipped to M.
    - `out_dtype`: bfloat16 or float32.
    - `num_sms`: multiprocessors to use on a GPU; None takes the recipe's.
    - `config`: the kernel's configuration by name, such as `"m128n128 cluster 2x1"` (`jaxfp8.Product(...).configs`
      lists them); None takes the measured one (`jaxfp8.tune`), else the heuristic's.

    **Returns:** `(M, N)`. Rows past the last group are zero.

    **Raises:** TypeError or ValueError for operands that do not fit.
    """
    lhs, rhs = _operands("grouped_gemm", lhs, "(M, K)", rhs)
    sizes = checks.group_sizes("grouped_gemm", "group_sizes", group_sizes, rhs.shape[0])
    out_dtype = checks.output_dtype("grouped_gemm", "out_dtype", out_dtype)
    num_sms = resolve_num_sms("grouped_gemm", num_sms)
    check_config("grouped_gemm", config, "grouped_gemm")
    left = Named(lhs, ("m", "k"))
    right = Named(rhs, ("g", "n", "k"))
    y = grouped_product(
        grouped_operation,
        left,
        right,
        sizes,
        ("g",),
        ("m", "n"),
        out_dtype,
        num_sms=num_sms,
        config=config,
    )
    return once(y)


def masked_grouped_gemm(
    lhs: QuantizedArray,
    rhs: QuantizedArray,
    masked_m: Any,
    *,
    out_dtype: Any = jnp.bfloat16,
    num_sms: int | None = None,
    config: str | None = None,
) -> jax.Array:
    """A batched product that computes only the first rows of each batch: decoding with a fixed capacity.

    **Arguments:**

    - `lhs`: `(G, M, K)` in 1x128 blocks.
    - `rhs`: `(G, N, K)` in 128x128 blocks.
    - `masked_m`: int32 `(G,)` on the device: rows of each batch that count. Clipped to 0 .. M.
    - `out_dtype`: bfloat16 or float32.
    - `num_sms`: multiprocessors to use on a GPU; None takes the recipe's.
    - `config`: the kernel's configuration by name, such as `"m128n128 cluster 2x1"` (`jaxfp8.Product(...).configs`
      lists them); None takes the measured one (`jaxfp8.tune`), else the heuristic's.

    **Returns:** `(G, M, N)`. Rows past `masked_m[g]` are zero.

    **Raises:** TypeError or ValueError for operands that do not fit.
    """
    lhs, rhs = _operands("masked_grouped_gemm", lhs, "(G, M, K)", rhs)
    checks.same("masked_grouped_gemm", "G", "lhs", lhs.shape[0], "rhs", rhs.shape[0])
    sizes = checks.group_sizes("masked_grouped_gemm", "masked_m", masked_m, rhs.shape[0])
    out_dtype = checks.output_dtype("masked_grouped_gemm", "out_dtype", out_dtype)
    num_sms = resolve_num_sms("masked_grouped_gemm", num_sms)
    check_config("masked_grouped_gemm", config, "masked_grouped_gemm")
    left = Named(lhs, ("g", "m", "k"))
    right = Named(rhs, ("g", "n", "k"))
    out = ("g", "m", "n")
    return grouped_product(
        masked_operation,
        left,
        right,
        sizes,
        ("g",),
        out,
        out_dtype,
        num_sms=num_sms,
        config=config,
    )


def grouped_wgrad_gemm(
    lhs: QuantizedArray,
    rhs: QuantizedArray,
    group_sizes: Any,
    *,
    out_dtype: Any = None,
    accum: Any = None,
    num_sms: int | None = None,
    config: str | None = None,
) -> jax.Array:
    """The weight gradient of each group: contracted over its tokens, both operands in 1x128 blocks along them.

    **Arguments:**

    - `lhs`: `(N, T)`, the columns of `jaxfp8.quantize_both(x, group_sizes=...)`; `T = 128 * (ceil(M/128) + G)`.
    - `rhs`: `(K, T)`, likewise, of the same group sizes.
    - `group_sizes`: int32 `(G,)` on the device, those that both were quantized with.
    - `out_dtype`: float32 (default) or bfloat16; with `accum`, its dtype.
    - `accum`: a `(G, N, K)` array to add; its buffer becomes the result's if donated.
    - `num_sms`: multiprocessors to use on a GPU; None takes the recipe's.
    - `config`: the kernel's configuration by name, such as `"m128n128 cluster 2x1"` (`jaxfp8.Product(...).configs`
      lists them); None takes the measured one (`jaxfp8.tune`), else the heuristic's.

    **Returns:** `(G, N, K)`; zeros (plus `accum`) for an empty group.

    **Raises:** TypeError or ValueError for operands that do not fit.
    """
    function = "grouped_wgrad_gemm"
    lhs = quantized(function, "lhs", lhs, "(N, T)", (ROW,))
    rhs = quantized(function, "rhs", rhs, "(K, T)", (ROW,))
    checks.same(function, "T", "lhs", lhs.shape[-1], "rhs", rhs.shape[-1])
    sizes = checks.group_sizes(function, "group_sizes", group_sizes)
    groups, padded = sizes.shape[0], lhs.shape[1]
    if padded % BLOCK or ceil_blocks(padded) < groups:
        raise ValueError(
            f"{function}: lhs has T={padded}; allowed: 128 * (ceil(M/128) + G) with G={groups} groups, "
            "as quantize_both(x, group_sizes=...) gives"
        )
    shape = (groups, lhs.shape[0], rhs.shape[0])
    accum, out_dtype = check_accum(function, accum, shape, out_dtype, jnp.float32)
    num_sms = resolve_num_sms(function, num_sms)
    check_config(function, config, function)
    left, right = Named(lhs, ("n", "t")), Named(rhs, ("k", "t"))
    return grouped_product(
        grouped_wgrad_operation,
        left,
        right,
        sizes,
        ("g",),
        ("g", "n", "k"),
        out_dtype,
        num_sms=num_sms,
        config=config,
        accum=accum,
    )
