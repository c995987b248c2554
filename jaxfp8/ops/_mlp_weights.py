"""The weights of an MLP, quantized, kept and loaded."""

from __future__ import annotations

from .._arrays.blocks import BLOCK, SQUARE
from .._arrays.quantized_weight import parts
from .._arrays.recipe import Format, forward_format
from .._primitives.call import Call
from ..kernels import quantize as qt
from ..kernels.activation import TWO
from ..kernels.gated import gated_weight_kernel
from ..kernels.named import Named
from ._dot import quantized_weight
from ._residuals import load
from .prequantize import prequantize


def _up_dims(dims):
    """Dimensions of the transpose of w_up (..., k, [two,] f)."""
    at = dims.index("k")
    return dims[:at] + dims[at + 1 :] + ("k",)


def _up_scale_dims(dims):
    return tuple(d + "/" if d in ("k", "f") else d for d in dims)


def quantized_up_dims(dims):
    """Dimensions of what `quantized` gives of w_up: data and scales of (..., [two,] f, k), then of w_up's own order."""
    nt = _up_dims(dims)
    return nt, _up_scale_dims(nt), dims, _up_scale_dims(dims)


def _quantize_up(w, dims, quantized, fmt: Format):
    """w_up (..., k, [two,] f) in both orientations, with 128x128 blocks of k and f; quantized here, or ahead."""
    if quantized:
        nt, nt_scale, nn, nn_scale = quantized
        nt_dims, nt_scale_dims, _, nn_scale_dims = quantized_up_dims(dims)
        return (
            Named(qt.QuantizedArray(nt, nt_scale, SQUARE), nt_dims, nt_scale_dims),
            Named(qt.QuantizedArray(nn, nn_scale, SQUARE), dims, nn_scale_dims),
        )
    if TWO not in dims:
        return qt.weight(w, dims, fmt)
    nt = _up_dims(dims)
    outs = (dims, _up_scale_dims(dims), nt, _up_scale_dims(nt))
    call = Call((dims,), outs, (("dtype", fmt.dtype), ("pow2", fmt.pow2)))
    nn_data, nn_scale, nt_data, nt_scale = gated_weight_kernel(w, call=call)
    return (
        Named(qt.QuantizedArray(nt_data, nt_scale, SQUARE), nt, outs[3]),
        Named(qt.QuantizedArray(nn_data, nn_scale, SQUARE), dims, outs[1]),
    )


def quantize_weights(w_up, w_down, quantized, call: Call):
    """Both orientations of both weights: of w_up, then of w_down.

    `quantized`: data and scale of each orientation of each, if they were quantized ahead.
    """
    fmt = forward_format(call.get("recipe"))
    up = _quantize_up(w_up, call.ins[1], quantized[:4], fmt)
    return *up, *quantized_weight(w_down, call.ins[2], quantized[4:], fmt)


def load_weights(saved_up, saved_down, quantized, call: Call):
    """The orientations of the input gradients' products. `quantized`: types of those quantized ahead."""
    up_dims, down_dims = call.ins[1:3]
    here = forward_format(call.get("recipe")).dtype
    up, down = (quantized[2].dtype, quantized[6].dtype) if quantized else (here, here)
    return (
        load(saved_up, up, up_dims, _up_scale_dims(up_dims), SQUARE),
        load(saved_down, down, down_dims, down_dims[:-2] + ("f/", "n/"), SQUARE),
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
        flat = w_up.reshape(*w_up.shape[:lead], k, -1)
        quantized_up = parts(function, "w_up", prequantize(flat, recipe=recipe))
    if not quantized_down:
        quantized_down = parts(function, "w_down", prequantize(w_down, recipe=recipe))
    if halves:
        # (..., 2 F, K) and (..., K, 2 F), each with its scales: both halves are whole blocks.
        nt, nn = quantized_up[:2], quantized_up[2:]
        quantized_up = (
            *(v.reshape(*v.shape[:lead], 2, -1, v.shape[-1]) for v in nt),
            *(v.reshape(*v.shape[:-1], 2, -1) for v in nn),
        )
    return *quantized_up, *quantized_down
