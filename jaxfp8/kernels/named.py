"""Quantized arrays with the names of their dimensions: what kernels take and return."""

from __future__ import annotations

from typing import NamedTuple

from .._arrays.blocks import ROW
from .._arrays.quantized_array import QuantizedArray

ROW_SCALE = {2: (1, 0), 3: (2, 0, 1)}
"""M-major layouts of row scales by rank, major to minor."""


def scale_dims_of(dims, rows=1, blocked=()):
    """Dimensions of the scales of data: `"k/"` counts the 128-blocks of `"k"`.

    Blocked is the last dimension, of square blocks the last two; or those that `blocked` names.
    """
    blocked = blocked or (dims[-1:] if rows == 1 else dims[-2:])
    return tuple(d + "/" if d in blocked else d for d in dims)


class Named(NamedTuple):
    """A quantized array with the names of its dimensions; `blocked` as in `scale_dims_of`."""

    array: QuantizedArray
    dims: tuple[str, ...]
    blocked: tuple[str, ...] = ()

    @property
    def scale_dims(self) -> tuple[str, ...]:
        """Dimensions of the scales."""
        return scale_dims_of(self.dims, self.array.block[0], self.blocked)


def named(data, scale, dims, block=ROW, blocked=()) -> Named:
    """Data and scales of a kernel, with the names of their dimensions."""
    return Named(QuantizedArray(data, scale, block), dims, blocked)
