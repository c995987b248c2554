"""The sum of the rows that belong to one token, optionally weighted: how a mixture of experts combines its results.

A gather in a fixed order, no scatter: results are the same bits in every run.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from .. import _ffi
from .._arrays import checks
from .._primitives.call import Call
from .._primitives.leaf import Leaf, timed_call
from .._primitives.mesh import match_varying
from .._primitives.sharded_operation import ShardedOperation
from ._mapped import mapped
from .gather import take_rows

# --------------------------------------------------------------------------------------------------
# Reference numerics
# --------------------------------------------------------------------------------------------------


def _reference(rows, position, *weight, out_dtype):
    """Starts from +0 and adds in float32, choice by choice; with weights by one fused or two roundings a term."""
    sum_ = jnp.zeros((position.shape[0], rows.shape[1]), jnp.float32)
    lost = jnp.zeros(position.shape[:1], bool)

    def add(carry, choice):
        sum_, lost = carry
        index, *factor = choice
        term = take_rows(rows, index).astype(jnp.float32)
        if factor:
            term = term * factor[0][:, None]
        there = (index >= 0) & (index < rows.shape[0])
        return (jnp.where(there[:, None], sum_ + term, sum_), lost | (index >= rows.shape[0])), None

    if isinstance(position.shape[1], int):
        for choice in range(position.shape[1]):
            (sum_, lost), _ = add((sum_, lost), [v[:, choice] for v in (position, *weight)])
    else:
        sum_, lost, *_ = match_varying([sum_, lost, rows, position, *weight])
        (sum_, lost), _ = lax.scan(add, (sum_, lost), [v.T for v in (position, *weight)])
    return [jnp.where(lost[:, None], np.float32(np.nan), sum_).astype(out_dtype)]


# --------------------------------------------------------------------------------------------------
# Custom calls: docs/architecture.md has the contract
# --------------------------------------------------------------------------------------------------


def _custom_call(rows, position, *weight, out_dtype):
    results = jax.eval_shape(
        functools.partial(_reference, out_dtype=out_dtype), rows, position, *weight
    )
    if not position.size or not rows.size:
        return _reference(rows, position, *weight, out_dtype=out_dtype)
    name = "sum_weighted_rows" if weight else "sum_rows"
    return timed_call(_ffi.target(name), results)(rows, position, *weight)


sum_rows_leaf = Leaf("jaxfp8_sum_rows_leaf", _reference, _custom_call)


# --------------------------------------------------------------------------------------------------
# Kernels: named dimensions
# --------------------------------------------------------------------------------------------------


sum_rows_operation = ShardedOperation(
    "jaxfp8_sum_rows",
    mapped(lambda *arrays, call: sum_rows_leaf(*arrays, **dict(call.attributes))),
    pinned=("m", "j"),
)


def sum_rows(rows, dims, position, position_dims, out_dtype, weight=None, weight_dims=None):
    """Rows (m, k), positions (s, j) -> (s, k): for each s the sum over j of `weight[s, j] * rows[position[s, j]]`.

    A position below 0 stands for no row. One from M on makes its token NaN: a row that found no place. Sums are
    float32, in the order of j, rounded once to `out_dtype`; without `weight` (float32, of any dimensions that the
    positions have) rows are added as they are.
    """
    arrays, ins = [rows, position], [dims, position_dims]
    if weight is not None:
        arrays.append(weight.astype(jnp.float32))
        ins.append(weight_dims or position_dims)
    new = tuple(dict.fromkeys(d for dims in ins for d in dims if d[0] == "v"))
    if rows.dtype not in checks.OUTPUT_DTYPES:
        arrays[0] = rows.astype(jnp.float32)
    kernel_dtype = np.dtype(out_dtype if out_dtype in checks.OUTPUT_DTYPES else jnp.float32)
    out = (*new, "s", dims[-1])
    call = Call(tuple(ins), (out,), (("out_dtype", kernel_dtype),))
    return sum_rows_operation(*arrays, call=call)[0].astype(out_dtype)
