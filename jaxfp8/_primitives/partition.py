"""Partitioning over a mesh, from the names of the dimensions.

A plan says which mesh axes cut which dimension and what is summed afterwards; a Shardy rule says the same to XLA.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from jax.experimental.custom_partitioning import ArrayMapping, CompoundFactor, SdyShardingRule

from .._arrays.blocks import BLOCK
from .call import Call
from .mesh import to_spec


class ShardPlan(NamedTuple):
    ins: list  # specs that the operands must have
    outs: list  # specs that the results then have
    sum: tuple  # mesh axes to sum the local result over
    scatter: tuple  # (dimension, mesh axes): the sum that leaves the result sharded; () for none
    cut: dict  # mesh axes by name, where shards cut blocks: their scales are everywhere


def axes_by_name(all_dims, specs) -> dict[str, list[tuple]]:
    """The mesh axes of each name in each array that has it, scales aside."""
    found: dict[str, list[tuple]] = {}
    for dims, spec in zip(all_dims, specs, strict=True):
        for name, axes in zip(dims, spec, strict=True):
            if not name.endswith("/"):
                found.setdefault(name, []).append(axes)
    return found


def plan_shards(mesh, call: Call, sizes, given, wanted, pinned, cuts=False) -> ShardPlan:
    """Mesh axes for every name: results first, then contractions; a shard owns whole 128-blocks, unless it `cuts` them.

    `given`: axes by name in the operands. `wanted`: axes by name in the result; what it does not name follows `given`.
    """

    def first(found):
        return next(filter(None, found), ())

    def divides(name, axes, unit):
        return sizes[name] % (unit * math.prod(mesh.shape[a] for a in axes)) == 0

    def fits(name, axes):
        unit = BLOCK if name in call.blocked and not cuts else 1
        return name not in pinned and divides(name, axes, unit)

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

    cut = {n: a for n, a in axes.items() if n in call.blocked and a and not divides(n, a, BLOCK)}

    def spec(dims, whole=None):
        uncut = {whole, *(f"{n}/" for n in cut)}
        return to_spec([() if uncut & {d, d.rstrip("/")} else axes[d.rstrip("/")] for d in dims])

    outs = [spec(d) for d in call.outs]
    ins = [spec(d) if d in call.outs else spec(d, whole) for d in call.ins]  # accum is like out
    return ShardPlan(ins, outs, total, scatter, cut)


def _cuts_blocks(blocks: int, axis_sizes, together: bool) -> bool:
    """Whether a mesh axis would cut this many blocks; `together`: or several would, each taking a part of what is left.

    Four devices over two blocks: Shardy would give their scales half of the axis, of which no spec of JAX's tells.
    """
    left = {blocks}
    for size in axis_sizes:
        common = {n: math.gcd(n, size) for n in left}
        if any(c < size and (c > 1 or together or n == blocks) for n, c in common.items()):
            return True
        left |= {n // c for n, c in common.items()}
    return False


def sharding_rule(call: Call, sizes, axis_sizes) -> SdyShardingRule:
    """The same names as a Shardy rule. A blocked name is block count x 128, if it is made of whole blocks.

    (Of more than one: Shardy rejects a factor of size 1 next to another.) Else, and where an axis could cut blocks,
    which block counts would not let it, its scales are on their own: square blocks' are a 4096th of the data.
    """
    square = any(sum(d.endswith("/") for d in dims) > 1 for dims in call.outs)
    whole = {
        n
        for n in call.blocked
        if n in sizes
        and sizes[n] > BLOCK
        and sizes[n] % BLOCK == 0
        and not _cuts_blocks(sizes[n] // BLOCK, axis_sizes, square)
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
