"""Quantized arrays with the names of their dimensions: what kernels take and return."""

from __future__ import annotations

from typing import NamedTuple

from .._arrays.blocks import BLOCK, ROW
from .._arrays.quantized_array import QuantizedArray

ROW_SCALE = {2: (1, 0), 3: (2, 0, 1)}
"""M-major layouts of row scales by rank, major to minor."""


class Named(NamedTuple):
    """A quantized array with the names of its dimensions; `"k/"` counts the 128-blocks of `"k"`."""

    array: QuantizedArray
    dims: tuple[str, ...]
    scale_dims: tuple[str, ...]


def scale_dims_of(dims, rows=1):
    """Dimensions of the scales of row blocks, or of square blocks."""
    last = (dims[-1] + "/",)
    return dims[:-1] + last if rows == 1 else dims[:-2] + (dims[-2] + "/",) + last


def named(data, scale, dims, block=ROW) -> Named:
    """Data and scales of a kernel, with the names of their dimensions."""
    return Named(QuantizedArray(data, scale, block), dims, scale_dims_of(dims, block[0]))


def name_dims(q: QuantizedArray, dims) -> Named:
    """A user's quantized array with names for its dimensions."""
    last = (dims[-1] + "/",)
    square = q.block[0] == BLOCK
    scale_dims = dims[:-2] + (dims[-2] + "/",) + last if square else dims[:-1] + last
    return Named(q, dims, scale_dims)
