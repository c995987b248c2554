"""Products and quantizers of arrays with gate and up."""

from __future__ import annotations

from .._primitives.sharded_operation import ShardedOperation
from . import quantize as qt
from .activation import TWO
from .gemm import gemm_operation
from .grouped_gemm import grouped_operation, grouped_wgrad_operation


def _merged(local):
    """`local` of the product or quantizer of named dimensions, for arrays with gate and up: both become one f.

    Needs a shard's f to be whole 128-blocks, where the arrays have scales for blocks of it.
    """

    def run(*arrays, call):
        def merge(x, dims):
            if TWO not in dims:
                return x
            at = dims.index(TWO)
            return x.reshape(*x.shape[:at], 2 * x.shape[at + 1], *x.shape[at + 2 :])

        def split(y, dims):
            if TWO not in dims:
                return y
            at = dims.index(TWO)
            return y.reshape(*y.shape[:at], 2, y.shape[at] // 2, *y.shape[at + 1 :])

        def without(all_dims):
            return tuple(tuple(d for d in dims if d != TWO) for dims in all_dims)

        merged = [merge(x, dims) for x, dims in zip(arrays, call.ins, strict=True)]
        inner = call._replace(ins=without(call.ins), outs=without(call.outs))
        ys = local(*merged, call=inner)
        return [split(y, dims) for y, dims in zip(ys, call.outs, strict=True)]

    return run


def _gated(operation: ShardedOperation, name) -> ShardedOperation:
    pinned = (*operation.pinned, TWO)
    together, agreed = operation.together, operation.agreed
    return ShardedOperation(
        name, _merged(operation.local), pinned=pinned, together=together, agreed=agreed
    )


gated_gemm_operation = _gated(gemm_operation, "jaxfp8_gemm_gated")
gated_grouped_operation = _gated(grouped_operation, "jaxfp8_grouped_gemm_gated")
gated_grouped_wgrad_operation = _gated(grouped_wgrad_operation, "jaxfp8_grouped_wgrad_gemm_gated")
gated_weight_operation = _gated(qt.weight_operation, "jaxfp8_quantize_weight_gated")
