"""The named dimensions of a call, and arrays merged and split by them."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np


class Call(NamedTuple):
    """The static part of an operation: names of the dimensions of operands and results, and attributes.

    `"k"` names a dimension, `"k/"` counts its 128-blocks. vmap adds the names `"v0"`, `"v1"`, ...
    """

    ins: tuple[tuple[str, ...], ...]
    outs: tuple[tuple[str, ...], ...]
    attributes: tuple[tuple[str, object], ...] = ()
    wanted: tuple = ()  # explicit meshes: (name, mesh axes) that the result should have
    sum_dtype: np.dtype = np.dtype(np.float32)  # in which devices sum a product's results

    @property
    def names(self) -> list[str]:
        return list(dict.fromkeys(d.rstrip("/") for dims in self.ins + self.outs for d in dims))

    @property
    def blocked(self) -> set[str]:
        """Names of which a shard must own whole 128-blocks."""
        return {d[:-1] for dims in self.ins + self.outs for d in dims if d.endswith("/")}

    @property
    def contracted(self) -> list[str]:
        kept = {d.rstrip("/") for dims in self.outs for d in dims}
        return [d for d in self.names if d not in kept]

    @property
    def has_accumulator(self) -> bool:
        """Whether the last operand of a product is added to it."""
        return bool(self.contracted) and self.ins[-1] == self.outs[0]

    def get(self, attribute: str):
        return dict(self.attributes)[attribute]

    def with_attribute(self, name: str, value) -> Call:
        return self._replace(attributes=tuple({**dict(self.attributes), name: value}.items()))

    def sizes(self, arrays) -> dict[str, int]:
        return {
            d: n
            for dims, x in zip(self.ins, arrays, strict=True)
            for d, n in zip(dims, x.shape, strict=True)
            if not d.endswith("/")
        }

    def batched(self, mapped) -> Call:
        """This call with a new leading dimension on the mapped operands and on every result."""
        new = (f"v{sum(n[0] == 'v' for n in self.names)}",)
        ins = tuple(new + dims if m else dims for dims, m in zip(self.ins, mapped, strict=True))
        return self._replace(ins=ins, outs=tuple(new + dims for dims in self.outs))


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
