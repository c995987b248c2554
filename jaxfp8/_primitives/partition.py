"""Partitioning over a mesh, from the names of the dimensions.

A `Kernel` computes one shard; the plan says which mesh axes cut which dimension and what is summed afterwards.
Explicit mesh axes go through shard_map (specs come from the types), manual ones are already a shard, automatic ones go
through custom_partitioning with a Shardy rule made of the same names.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental.custom_partitioning import (
    ArrayMapping,
    CompoundFactor,
    SdyShardingRule,
    custom_partitioning,
)
from jax.sharding import AxisType, NamedSharding

from .._arrays.blocks import BLOCK
from .leaf import Leaf
from .mesh import full_spec, match_varying, mesh_of, result_type, to_spec
from .operation import Call, Operation


class Plan(NamedTuple):
    ins: list  # specs that the operands must have
    outs: list  # specs that the results then have
    sum: tuple  # mesh axes to sum the local result over
    scatter: tuple  # (dimension, mesh axes): the sum that leaves the result sharded; () for none


def axes_by_name(all_dims, specs) -> dict[str, list[tuple]]:
    """The mesh axes of each name in each array that has it, scales aside."""
    found: dict[str, list[tuple]] = {}
    for dims, spec in zip(all_dims, specs, strict=True):
        for name, axes in zip(dims, spec, strict=True):
            if not name.endswith("/"):
                found.setdefault(name, []).append(axes)
    return found


def make_plan(mesh, call: Call, sizes, given, wanted, pinned) -> Plan:
    """Mesh axes for every name: results first, then contractions; a shard owns whole 128-blocks.

    `given`: axes by name in the operands. `wanted`: axes by name in the result; what it does not name follows `given`.
    """

    def first(found):
        return next(filter(None, found), ())

    def fits(name, axes):
        shards = math.prod(mesh.shape[a] for a in axes)
        unit = BLOCK if name in call.blocked else 1
        return name not in pinned and sizes[name] % (shards * unit) == 0

    axes: dict[str, tuple] = {}
    used: set = set()
    for name in call.names:
        if name in call.contracted:
            continue
        want = first(wanted.get(name, given.get(name, ())))
        want = tuple(a for a in want if a not in used)
        axes[name] = want if want and fits(name, want) else ()
        used.update(axes[name])

    total: tuple = ()
    scatter: tuple = ()
    for name in call.contracted:
        want = first(given[name])
        taken = tuple(a for a in want if a in used)
        if taken:
            # The result is sharded over some of these axes. If both operands are cut along the contraction, multiply
            # what is here and reduce-scatter (FSDP weight gradient, sequence parallelism); else gather the cut operand.
            both_cut = len(set(given[name])) == 1 and fits(name, want)
            target = [n for n in wanted if axes.get(n) == taken and both_cut]
            if target and not scatter:
                scatter = (call.outs[0].index(target[0]), taken)
            else:
                want = tuple(a for a in want if a not in used)
        axes[name] = want if want and fits(name, want) else ()
        total += tuple(a for a in axes[name] if a not in used)
        used.update(axes[name])

    whole = call.outs[0][scatter[0]] if scatter else None  # sharded in the result only

    def spec(dims, whole=None):
        return to_spec([() if d.rstrip("/") == whole else axes[d.rstrip("/")] for d in dims])

    outs = [spec(d) for d in call.outs]
    ins = [spec(d) if d in call.outs else spec(d, whole) for d in call.ins]  # accum is like out
    return Plan(ins, outs, total, scatter)


def _splits_an_axis(blocks: int, axis_sizes) -> bool:
    """Whether some mesh axes, in the mesh's order, would cut this many blocks with a part of an axis.

    Four devices over two blocks: Shardy gives the scales half of the axis, which JAX cannot express as a spec.
    """
    left = {blocks}
    for size in axis_sizes:
        common = {n: math.gcd(n, size) for n in left}
        if any(1 < c < size for c in common.values()):
            return True
        left |= {n // c for n, c in common.items()}
    return False


def sharding_rule(call: Call, sizes, axis_sizes) -> SdyShardingRule:
    """The same names as a Shardy rule. A blocked name is block count x 128, if it is made of whole blocks.

    (Of more than one: Shardy rejects a factor of size 1 next to another.) Else its scales are on their own.
    """
    whole = {
        n
        for n in call.blocked
        if n in sizes
        and sizes[n] > BLOCK
        and sizes[n] % BLOCK == 0
        and not _splits_an_axis(sizes[n] // BLOCK, axis_sizes)
    }
    factor = {n: f"f{i}" for i, n in enumerate(call.names)}

    def one(d):
        n = d.rstrip("/")
        if n in whole:
            block_count = f"{factor[n]}b"
            return block_count if d.endswith("/") else CompoundFactor(block_count, f"{factor[n]}i")
        return f"{factor[n]}s" if d.endswith("/") else factor[n]

    def mapping(all_dims):
        return tuple(ArrayMapping(*map(one, dims)) for dims in all_dims)

    block_sizes = {f"{factor[n]}i": BLOCK for n in whole}
    return SdyShardingRule(mapping(call.ins), mapping(call.outs), **block_sizes)  # type: ignore[arg-type]


def _reduce(y, *, axes, scatter, shards):
    if scatter is None:
        return [lax.psum(y, axes)]
    return [lax.psum_scatter(y, axes, scatter_dimension=scatter, tiled=True)]


def _reduce_types(y, *, axes, scatter, shards):
    shape = list(y.shape)
    if scatter is not None:
        shape[scatter] //= shards
    return [result_type(tuple(shape), y.dtype, [y], axes if scatter is None else ())]


# The sum over shards of a contraction. A primitive of its own, so that its whole lowering runs outside of the mesh.
reduce_shards = Leaf("jaxfp8_reduce_shards", _reduce, types=_reduce_types)


class Kernel(Operation):
    """An operation on quantized data: `local(*arrays, call=...)` computes one shard, the rest follows from the names.

    **Arguments:** as `Operation`, and `pinned`: names that are never sharded.
    """

    def __init__(self, name, local, *, pinned=(), together=()):
        self.local, self.pinned = local, frozenset(pinned)

        def whole(call, *arrays):
            return tuple(local(*arrays, call=call))

        self.partitioned = custom_partitioning(whole, static_argnums=(0,))
        self.partitioned.def_partition(partition=self._partition, sharding_rule=self._sharding_rule)
        super().__init__(name, self._dispatch, together=together)

    def _batch(self, arrays, axes, *, call, jaxpr):
        """An accumulator has the result's dimensions, always: it is added once to each example's product."""
        if call.has_accumulator:
            *factors, accum = arrays
            *factor_axes, axis = axes
            if all(a is None for a in factor_axes):
                exact = call.with_attribute("out_dtype", np.dtype("float32"))
                (y,) = self(*factors, call=exact._replace(ins=call.ins[:-1]))
                y = jnp.expand_dims(y, axis) + accum.astype(y.dtype)
                return [y.astype(accum.dtype)], [axis]
            if axis is None:
                sizes = (
                    x.shape[a] for x, a in zip(factors, factor_axes, strict=True) if a is not None
                )
                accum, axis = jnp.broadcast_to(accum, (next(sizes), *accum.shape)), 0
            arrays, axes = [*factors, accum], [*factor_axes, axis]
        return super()._batch(arrays, axes, call=call, jaxpr=jaxpr)

    def _dispatch(self, *arrays, call):
        mesh = mesh_of(arrays)
        axis_types = zip(mesh.axis_names, mesh.axis_types, strict=True)
        explicit = {a for a, t in axis_types if t == AxisType.Explicit}
        if explicit:
            return self._by_type(mesh, explicit, arrays, call)
        if mesh.manual_axes:
            # Inside shard_map the arrays are shards. (custom_partitioning fails in a partially manual mesh.)
            return self.local(*match_varying(arrays), call=call)
        return list(self.partitioned(call, *arrays))

    def _shard(self, mesh, plan, call):
        """The function of one shard: the local kernel, then the sum over shards, in float32."""

        def run(*arrays):
            if not (plan.sum or plan.scatter):
                return tuple(self.local(*match_varying(arrays), call=call))
            exact = call.with_attribute("out_dtype", np.dtype("float32"))
            factors, accum = list(arrays), []
            if call.has_accumulator:  # added after the sum, once
                exact, accum = exact._replace(ins=exact.ins[:-1]), [factors.pop()]
            (y,) = self.local(*match_varying(factors), call=exact)
            if plan.scatter:
                dim, axes = plan.scatter
                shards = math.prod(mesh.shape[a] for a in axes)
                (y,) = reduce_shards(y, axes=axes, scatter=dim, shards=shards)
            if plan.sum:
                (y,) = reduce_shards(y, axes=plan.sum, scatter=None, shards=1)
            for c in accum:
                y, c = match_varying([y, c])
                y = y + c.astype(y.dtype)
            return (y.astype(call.get("out_dtype")),)

        return run

    def _by_type(self, mesh, explicit, arrays, call):
        specs = [full_spec(jax.typeof(x).sharding.spec, x.ndim) for x in arrays]
        given = axes_by_name(call.ins, specs)
        wanted = {n: [axes] for n, axes in call.wanted}
        plan = make_plan(mesh, call, call.sizes(arrays), given, wanted, self.pinned)
        placed = [
            jax.sharding.reshard(x, NamedSharding(mesh, s))
            for x, s in zip(arrays, plan.ins, strict=True)
        ]
        # No names means all axes, less those that an enclosing vmap maps over.
        names = explicit if mesh.manual_axes else set()
        run = jax.shard_map(
            self._shard(mesh, plan, call),
            mesh=mesh,
            in_specs=tuple(plan.ins),
            out_specs=tuple(plan.outs),
            axis_names=names,
        )
        return list(run(*placed))

    def _partition(self, call, mesh, operands, results):
        results = results if isinstance(results, (tuple, list)) else [results]

        def specs_of(types):
            return [full_spec(t.sharding.spec, len(t.shape)) for t in types]

        given = axes_by_name(call.ins, specs_of(operands))
        wanted = axes_by_name(call.outs, specs_of(results))
        plan = make_plan(mesh, call, call.sizes(operands), given, wanted, self.pinned)
        ins, outs = ([NamedSharding(mesh, s) for s in side] for side in (plan.ins, plan.outs))
        return mesh, self._shard(mesh, plan, call), tuple(outs), tuple(ins)

    def _sharding_rule(self, call, mesh, operands, results):
        return sharding_rule(call, call.sizes(operands), tuple(mesh.shape.values()))


def arrange(x, dims, groups):
    """Transpose x to the order of `groups` and merge each group into one axis. Free where the order already fits."""
    position = {d.rstrip("/"): i for i, d in enumerate(dims)}
    order = [position[n] for g in groups for n in g]
    if order != list(range(x.ndim)):
        x = x.transpose(order)
    sizes = iter(x.shape)
    return x.reshape([math.prod(next(sizes) for _ in g) for g in groups])


def restore(y, dims, groups, sizes):
    """Undo `arrange` for a result: split the merged axes and transpose to `dims`."""
    names = [n for g in groups for n in g]
    y = y.reshape([sizes[n] for n in names])
    order = [names.index(d) for d in dims]
    return y if order == list(range(y.ndim)) else y.transpose(order)
