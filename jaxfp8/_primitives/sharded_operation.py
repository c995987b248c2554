"""Operations that compute a shard, on any mesh.

Explicit mesh axes go through shard_map (specs come from the types), manual ones are already a shard, automatic ones go
through custom_partitioning with a Shardy rule made of the same names.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental.custom_partitioning import custom_partitioning
from jax.sharding import AxisType, NamedSharding

from .leaf import Leaf
from .mesh import full_spec, mapped_axes, match_varying, mesh_of, result_type
from .operation import Operation
from .partition import axes_by_name, plan_shards, sharding_rule
from .tiles import in_axes


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


class ShardedOperation(Operation):
    """An operation on quantized data: `local(*arrays, call=...)` computes one shard, the rest follows from the names.

    **Arguments:** as `Operation`, and

    - `pinned`: names that are never sharded.
    - `agreed`: `(*arrays, call=..., cut=...)`, a quantizer's shard where shards cut blocks: `cut` has the mesh axes
      that cut a name, over which the devices agree on scales. None gathers such operands.
    """

    def __init__(self, name, local, *, pinned=(), together=(), agreed=None, function=None):
        self.local, self.pinned, self.agreed = local, frozenset(pinned), agreed

        def whole(call, *arrays):
            return tuple(local(*arrays, call=call))

        self.partitioned = custom_partitioning(whole, static_argnums=(0,))
        self.partitioned.def_partition(
            partition=self._partition, sharding_rule=self._sharding_rule, decode_shardings=False
        )
        super().__init__(name, self._dispatch, together=together, function=function)

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
        """The function of one shard: the local kernel, then the sum over shards."""

        def run(*arrays):
            if plan.cut:
                return tuple(self.agreed(*match_varying(arrays), call=call, cut=plan.cut))
            if not (plan.sum or plan.scatter):
                return tuple(self.local(*match_varying(arrays), call=call))
            exact = call.with_attribute("out_dtype", call.sum_dtype)
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

    def _plan(self, mesh, call, operands, given, wanted):
        cuts = self.agreed is not None
        return plan_shards(mesh, call, call.sizes(operands), given, wanted, self.pinned, cuts)

    def _by_type(self, mesh, explicit, arrays, call):
        try:
            return self._sharded(mesh, explicit, arrays, call)
        except ValueError:
            # One example of a vmap over an explicit axis, by which an unmapped operand is cut as well: what is made of
            # it gives types alone, before all examples are one call.
            mapped = mapped_axes(mesh, explicit)
            if not mapped:
                raise
            return self._sharded(mesh, explicit, arrays, call, mapped)

    def _sharded(self, mesh, explicit, arrays, call, mapped=frozenset()):
        def unmapped(axes):
            return tuple(a for a in axes if a not in mapped)

        specs = [
            [unmapped(axes) for axes in full_spec(jax.typeof(x).sharding.spec, x.ndim)]
            for x in arrays
        ]
        given = axes_by_name(call.ins, specs)
        wanted = {n: [unmapped(axes)] for n, axes in call.wanted}
        plan = self._plan(mesh, call, arrays, given, wanted)
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
        types = [*operands, *results]
        mesh, specs = in_axes(mesh, [t.sharding for t in types], [len(t.shape) for t in types])
        given = axes_by_name(call.ins, specs[: len(operands)])
        wanted = axes_by_name(call.outs, specs[len(operands) :])
        plan = self._plan(mesh, call, operands, given, wanted)
        ins, outs = ([NamedSharding(mesh, s) for s in side] for side in (plan.ins, plan.outs))
        return mesh, self._shard(mesh, plan, call), tuple(outs), tuple(ins)

    def _sharding_rule(self, call, mesh, operands, results):
        return sharding_rule(call, call.sizes(operands), tuple(mesh.shape.values()))
