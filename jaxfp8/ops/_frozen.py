"""Products with a weight that is FP8 alone: one byte a parameter, no gradient for it.

    y  = quantize(x) . w           x 1x128 along k, w 128x128 as it came
    dx = quantize(dy) . w^T        the same blocks, transposed on the fly

Nothing is kept for the backward pass but the caller's own weight.
"""

from __future__ import annotations

import jax.numpy as jnp
from jax import lax

from .._arrays.blocks import BLOCK, SQUARE
from .._arrays.quantized_array import QuantizedArray
from .._arrays.recipe import Recipe, forward_format, gradient_format, result_options
from .._primitives.call import Call
from .._primitives.leaf import once
from .._primitives.mesh import explicit_axes, like_primal, place
from .._primitives.once import first_derivative
from .._primitives.operation import Operation
from ..kernels import quantize as qt
from ..kernels.gemm import product
from ..kernels.grouped_gemm import grouped_operation, grouped_product
from ..kernels.named import named, scale_dims_of
from ._dot import sum_to


def _product(call: Call, rows, weight, sizes, out, out_dtype, wanted=()):
    options = result_options(call.get("recipe"))
    if not sizes:
        return product(rows, weight, out, out_dtype, wanted=wanted, **options)
    return grouped_product(
        grouped_operation, rows, weight, sizes[0], call.ins[3], out, out_dtype, **options
    )


def _frozen_body(x, bits, scale, *sizes, call: Call):
    x_dims, w_dims = call.ins[:2]
    weight = named(lax.bitcast_convert_type(bits, call.get("fp8_dtype")), scale, w_dims, SQUARE)
    rows = qt.rows(x, x_dims, forward_format(call.get("recipe")))
    wanted = call.wanted
    return [once(_product(call, rows, weight, sizes, call.outs[0], call.get("out_dtype"), wanted))]


def _frozen_fwd(call: Call, types, moving, x, bits, scale, *sizes):
    return _frozen_body(x, bits, scale, *sizes, call=call), (bits, scale, *sizes)


def _frozen_bwd(call: Call, types, moving, residuals, cotangents):
    x_type, (x_dims, w_dims), (out,), (dy,) = types[0], call.ins[:2], call.outs, cotangents
    bits, scale, *sizes = residuals
    n, k = w_dims[-2:]
    data = lax.bitcast_convert_type(jnp.swapaxes(bits, -1, -2), call.get("fp8_dtype"))
    weight = named(data, jnp.swapaxes(scale, -1, -2), (*w_dims[:-2], k, n), SQUARE)
    rows = qt.rows(dy, out, gradient_format(call.get("recipe")))
    dx_dims = (*out[:-1], k)
    wanted = explicit_axes(x_type, x_dims)
    dx = _product(call, rows, weight, sizes, dx_dims, x_type.dtype, wanted)
    return like_primal(sum_to(dx, dx_dims, x_dims), x_type), None, None, *(None for _ in sizes)


frozen_operation = Operation(
    "jaxfp8_frozen_dot",
    _frozen_body,
    together=((1, 2),),
    derivative=first_derivative(
        "linear, dot_general, einsum and ragged_dot", _frozen_body, _frozen_fwd, _frozen_bwd
    ),
)


def frozen_dot(
    x,
    w: QuantizedArray,
    x_dims,
    w_dims,
    out,
    *,
    recipe: Recipe,
    out_dtype,
    out_spec=None,
    group_sizes=None,
):
    """x (..., k) . w (..., n, k) -> out, of named dimensions; with group sizes, w is (g, n, k)."""
    wanted = () if out_spec is None else tuple(zip(out, out_spec, strict=True))
    attributes = (("out_dtype", out_dtype), ("recipe", recipe), ("fp8_dtype", w.dtype))
    sizes = () if group_sizes is None else (group_sizes,)
    ins = (x_dims, w_dims, scale_dims_of(w_dims, BLOCK), *(("g",) for _ in sizes))
    # As integers the data has no tangent, and remat does not round it.
    bits = lax.bitcast_convert_type(w.data, jnp.uint8)
    scale = lax.stop_gradient(w.scale)
    call = Call(ins, (out,), attributes, wanted)
    (y,) = frozen_operation(x, bits, scale, *sizes, call=call)
    return place(y, out_spec)
