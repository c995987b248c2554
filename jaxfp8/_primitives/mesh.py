"""What the type of a result says about meshes.

Only public JAX modules; one code for every supported version.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import AxisType, ManualAxisType, NamedSharding
from jax.sharding import PartitionSpec as P


def axes_of(entry) -> tuple:
    """Mesh axes of one entry of a PartitionSpec."""
    return () if entry is None else entry if isinstance(entry, tuple) else (entry,)


def full_spec(spec, rank: int) -> tuple:
    """The mesh axes of each of `rank` dimensions."""
    return tuple(axes_of(e) for e in spec) + ((),) * (rank - len(spec))


def to_spec(axes) -> P:
    """The PartitionSpec of per-dimension mesh axes."""
    return P(*[a[0] if len(a) == 1 else (a or None) for a in axes])


def mesh_of(arrays):
    """The mesh in the arrays' types, else the ambient one."""
    meshes = (jax.typeof(x).sharding.mesh for x in arrays)
    return next((m for m in meshes if not m.empty), jax.sharding.get_abstract_mesh())


def varying(*types) -> frozenset:
    """Manual mesh axes in which a value of any of these types differs between devices."""
    return frozenset().union(*[t.manual_axis_type.varying for t in types])


def mapped_axes(mesh, explicit) -> frozenset:
    """The explicit axes that an enclosing vmap maps over: those that shard_map refuses. JAX has no public list."""

    def refused(axis):
        where = NamedSharding(mesh, P(axis))
        x = jax.ShapeDtypeStruct((mesh.shape[axis],), jnp.float32, sharding=where)
        try:
            jax.eval_shape(
                jax.shard_map(lambda x: x, mesh=mesh, in_specs=P(axis), out_specs=P(axis)), x
            )
        except ValueError:
            return True
        return False

    return frozenset(filter(refused, explicit))


def result_type(shape, dtype, operands, summed=()):
    """Type of a local result: replicated over what the mesh still shards, varying in what any operand varies in."""
    mesh = next((t.sharding.mesh for t in operands if not t.sharding.mesh.empty), None)
    if mesh is None:
        return jax.core.ShapedArray(shape, dtype)
    sharding = NamedSharding(mesh, P(*[None] * len(shape)))
    # ShapedArray asserts unless manual_axis_type comes together with sharding.
    manual = ManualAxisType(varying=varying(*operands) - set(summed))
    return jax.core.ShapedArray(shape, dtype, sharding=sharding, manual_axis_type=manual)


def call_types(results, operands) -> list:
    """Types of a call's results: `jax.eval_shape` forgets the sharding without which JAX takes no manual axes."""
    types = [jax.typeof(x) for x in operands]
    return [result_type(r.shape, r.dtype, types) for r in results]


def match_varying(arrays) -> list:
    """The arrays, cast to vary in the same manual axes, as shard_map(check_vma=True) asks of operands."""
    union = varying(*map(jax.typeof, arrays))
    missing = [tuple(sorted(union - varying(jax.typeof(x)))) for x in arrays]
    return [lax.pcast(x, m, to="varying") if m else x for x, m in zip(arrays, missing, strict=True)]


def is_explicit(type_) -> bool:
    return AxisType.Explicit in type_.sharding.mesh.axis_types


def whole(x):
    """x on all devices of an explicit mesh: rows of any token may be needed anywhere."""
    return place(x, ((),) * x.ndim)


def place(y, spec):
    """y in the sharding asked for, as mesh axes per dimension: a product that would cut blocks has a coarser one."""
    if spec is None or not is_explicit(jax.typeof(y)):
        return y
    return jax.sharding.reshard(y, NamedSharding(jax.typeof(y).sharding.mesh, to_spec(spec)))


def explicit_axes(type_, dims) -> tuple:
    """(name, mesh axes) of each dimension of a type on an explicit mesh; () on others."""
    if not is_explicit(type_):
        return ()
    return tuple(zip(dims, full_spec(type_.sharding.spec, len(dims)), strict=True))


def like_primal(cotangent, primal):
    """A cotangent in its primal's type. What it varies in agrees already: Operation matched the operands."""
    cotangent = cotangent.astype(primal.dtype)
    if is_explicit(primal):
        cotangent = jax.sharding.reshard(cotangent, primal.sharding)
    return cotangent
