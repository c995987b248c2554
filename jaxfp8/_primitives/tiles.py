"""Shardings as XLA proposes them, in terms of a mesh's axes.

A partitioner may cut any dimension into any number of tiles, also with a part of a mesh axis: a weight (K, 2 F) on 8
devices that is reshaped to (K, 2, F) is cut by 2 on one dimension and by 4 on the next. No PartitionSpec of the mesh
says that, but one of the same devices with the axis in its factors does.
"""

from __future__ import annotations

import math

import numpy as np
from jax.sharding import Mesh


def tiles_of(sharding, mesh: Mesh, rank: int) -> np.ndarray:
    """Which tile of each dimension a device has: integers of shape `(rank, *mesh.devices.shape)`."""
    if sharding is None or rank == 0 or sharding.is_fully_replicated:
        return np.zeros((rank, *mesh.devices.shape), int)
    # In a shape that any sharding over these devices divides, as each one's tiles are a divisor of their number.
    slices = sharding.devices_indices_map((mesh.size,) * rank)
    starts = np.array([[s.start or 0 for s in slices[d]] for d in mesh.devices.flat])
    found = [np.unique(column, return_inverse=True)[1] for column in starts.T]
    return np.array(found).reshape(rank, *mesh.devices.shape)


def axes_of(tiles: np.ndarray, names) -> tuple | None:
    """The mesh axes that cut a dimension into these tiles, major to minor; None if no whole axes do."""
    steps = {}
    for at, (name, size) in enumerate(zip(names, tiles.shape, strict=True)):
        line = tiles[tuple(slice(None) if i == at else 0 for i in range(tiles.ndim))]
        if size > 1 and line[1] != line[0]:
            steps[name] = int(line[1] - line[0])
    order = tuple(sorted(steps, key=lambda name: -steps[name]))
    sizes = dict(zip(names, tiles.shape, strict=True))
    expected = np.zeros(tiles.shape, int)
    for i, name in enumerate(order):
        step = math.prod(sizes[minor] for minor in order[i + 1 :])
        index = np.arange(sizes[name]) * step
        expected += index.reshape([-1 if n == name else 1 for n in names])
    return order if (expected == tiles).all() else None


def factored(mesh: Mesh, ascending: bool) -> Mesh:
    """The same devices in the same order, each axis as axes of its prime factors."""
    names, sizes = [], []
    for name, size in mesh.shape.items():
        factors = _prime_factors(size)
        for i, factor in enumerate(factors if ascending else factors[::-1]):
            names.append(f"{name}.{i}")
            sizes.append(factor)
    return Mesh(mesh.devices.reshape(sizes), tuple(names))


def _prime_factors(n: int) -> list[int]:
    found = []
    for p in range(2, n + 1):
        while n % p == 0:
            found.append(p)
            n //= p
    return found or [1]


def in_axes(mesh: Mesh, shardings, ranks) -> tuple[Mesh, list[tuple]]:
    """A mesh of these devices, and the axes of each dimension of each sharding in it: the given mesh where it can.

    A dimension that no factors of the axes describe either counts as not cut, which the partitioner then arranges.
    """
    for candidate in (mesh, factored(mesh, True), factored(mesh, False), mesh):
        specs = []
        for sharding, rank in zip(shardings, ranks, strict=True):
            tiles = tiles_of(sharding, candidate, rank)
            specs.append(tuple(axes_of(t, candidate.axis_names) for t in tiles))
        if all(axes is not None for spec in specs for axes in spec):
            return candidate, specs
    return mesh, [tuple(axes or () for axes in spec) for spec in specs]
