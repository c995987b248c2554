"""Results and gradients of the differentiable operations, in NumPy float64.

DESIGN 3.8 written out with the independent quantizers of `oracle_quantize`: each of the three
products has freshly quantized operands, and columns are quantized from the high-precision arrays.
"""

from typing import NamedTuple

import numpy as np

from tests import oracle_quantize as oq

SQUARE = (oq.BLOCK, oq.BLOCK)


class Formats(NamedTuple):
    """What a recipe quantizes to: (dtype, power-of-two scales) of activations and weights, of gradients."""

    forward: tuple = (oq.E4M3, False)
    gradient: tuple = (oq.E4M3, False)


DEFAULT = Formats()


def rows(x, fmt=DEFAULT.forward):
    return oq.dequantize(*oq.quantize_blocks(x, (1, oq.BLOCK), *fmt))


def blocks(w, fmt=DEFAULT.forward):
    return oq.dequantize(*oq.quantize_blocks(w, SQUARE, *fmt), SQUARE)


def columns(x, fmt=DEFAULT.forward):
    return oq.dequantize(*oq.quantize_columns(x, *fmt))


def dense(x, w, dy, formats=DEFAULT):
    """x (T, K), w (K, N), dy (T, N) -> y, dx, dw."""
    forward, gradient = formats
    weight = blocks(w, forward)
    y, dx = rows(x, forward) @ weight, rows(dy, gradient) @ weight.T
    return y, dx, columns(x, forward) @ columns(dy, gradient).T


def ragged(x, w, dy, group_sizes):
    """x (M, K), w (G, K, N), dy (M, N) -> y, dx, dw; rows past the last group are zero."""
    y, dx, dw = np.zeros(dy.shape), np.zeros(x.shape), np.zeros(w.shape)
    for g, (start, size) in enumerate(oq.clipped_groups(group_sizes, len(x))):
        if size:
            part = slice(start, start + size)
            y[part], dx[part], dw[g] = dense(x[part], w[g], dy[part])
    return y, dx, dw
