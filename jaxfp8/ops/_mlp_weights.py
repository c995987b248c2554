"""The weights of an MLP, quantized, kept and loaded."""

from __future__ import annotations

import math

from .._arrays.blocks import BLOCK, SQUARE
from .._arrays.quantized_weight import WeightCopies, parts
from .._arrays.recipe import Format, forward_format
from .._primitives.call import Call
from ..kernels import quantize as qt
from ..kernels.activation import TWO
from ..kernels.gated import gated_weight_operation
from ..kernels.named import named, scale_dims_of
from ._dot import quantized_weight
from ._residuals import load
from .prequantize import prequantize


def _up_dims(dims):
    """Dimensions of the transpose of w_up (..., k, [two,] f)."""
    at = dims.index("k")
    return dims[:at] + dims[at + 1 :] + ("k",)


BLOCKED = ("k", "f")
"""The dimensions of w_up that its blocks cut."""


def quantized_up_dims(dims) -> WeightCopies:
    """Dimensions of the copies of w_up: (..., [two,] f, k), and w_up's own."""
    nt = _up_dims(dims)
    return WeightCopies(
        nt, scale_dims_of(nt, blocked=BLOCKED), dims, scale_dims_of(dims, blocked=BLOCKED)
    )


def split_copies(quantized):
    """What was quantized ahead of w_up, and of w_down; () for neither."""
    up, down = quantized[: len(quantized) // 2], quantized[len(quantized) // 2 :]
    return (WeightCopies(*up), WeightCopies(*down)) if quantized else ((), ())


def _quantize_up(w, dims, quantized, fmt: Format):
    """w_up (..., k, [two,] f) in both orientations, with 128x128 blocks of k and f; quantized here, or ahead."""
    of = quantized_up_dims(dims)
    if quantized:
        copies = quantized
    elif TWO not in dims:
        return qt.weight(w, dims, fmt)
    else:
        outs = (of.nn, of.nn_scale, of.nt, of.nt_scale)
        call = Call((dims,), outs, (("dtype", fmt.dtype), ("pow2", fmt.pow2)))
        nn, nn_scale, nt, nt_scale = gated_weight_operation(w, call=call)
        copies = WeightCopies(nt, nt_scale, nn, nn_scale)
    return (
        named(copies.nt, copies.nt_scale, of.nt, SQUARE, BLOCKED),
        named(copies.nn, copies.nn_scale, of.nn, SQUARE, BLOCKED),
    )


def quantize_weights(w_up, w_down, quantized, call: Call):
    """Both orientations of both weights: of w_up, then of w_down.

    `quantized`: data and scale of each orientation of each, if they were quantized ahead.
    """
    fmt = forward_format(call.get("recipe"))
    up, down = split_copies(quantized)
    return (
        *_quantize_up(w_up, call.ins[1], up, fmt),
        *quantized_weight(w_down, call.ins[2], down, fmt),
    )


def load_weights(saved_up, saved_down, quantized, call: Call):
    """The orientations of the input gradients' products, where kept. `quantized`: types of those quantized ahead."""
    up_dims, down_dims = call.ins[1:3]
    here = forward_format(call.get("recipe")).dtype
    up, down = (copies.nn.dtype if copies else here for copies in split_copies(quantized))
    return (
        load(saved_up, up, up_dims, SQUARE, BLOCKED) if saved_up else None,
        load(saved_down, down, down_dims, SQUARE) if saved_down else None,
    )


def weight_operands(first):
    """Positions of each weight and of its quantized copies, of which the first is at `first`."""
    return (1, *range(first, first + 4)), (2, *range(first + 4, first + 8))


def both_quantized(function, w_up, w_down, quantized_up, quantized_down, recipe):
    """Data and scale of both orientations of both weights, of which one was quantized ahead, or both."""
    f = w_down.shape[-2]
    if f % BLOCK:
        raise ValueError(
            f"{function}: w_down has F={f}; allowed beside a QuantizedWeight: a multiple of {BLOCK}"
        )
    lead = w_down.ndim - 2
    k, *halves = w_up.shape[lead:-1]
    if not quantized_up:
        flat = w_up.reshape(*w_up.shape[:lead], k, math.prod(halves) * f)
        quantized_up = parts(function, "w_up", prequantize(flat, recipe=recipe))
    if not quantized_down:
        quantized_down = parts(function, "w_down", prequantize(w_down, recipe=recipe))
    if halves:
        # (..., 2 F, K) and (..., K, 2 F), each with its scales: both halves are whole blocks.
        copies = WeightCopies(*quantized_up)
        nt = (
            v.reshape(*v.shape[:lead], 2, v.shape[lead] // 2, v.shape[-1])
            for v in (copies.nt, copies.nt_scale)
        )
        nn = (v.reshape(*v.shape[:-1], 2, v.shape[-1] // 2) for v in (copies.nn, copies.nn_scale))
        quantized_up = WeightCopies(*nt, *nn)
    return *quantized_up, *quantized_down
