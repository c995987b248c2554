"""Products and quantizers of arrays with gate and up."""

from __future__ import annotations

from .._primitives.sharded_operation import ShardedOperation
from . import quantize as qt
from .activation import TWO, gated
from .gemm import gemm_operation
from .grouped_gemm import grouped_operation, grouped_wgrad_operation


def _gated(operation: ShardedOperation, name) -> ShardedOperation:
    pinned = (*operation.pinned, TWO)
    together, agreed = operation.together, operation.agreed
    return ShardedOperation(
        name, gated(operation.local), pinned=pinned, together=together, agreed=agreed
    )


gated_gemm_operation = _gated(gemm_operation, "jaxfp8_gemm_gated")
gated_grouped_operation = _gated(grouped_operation, "jaxfp8_grouped_gemm_gated")
gated_grouped_wgrad_operation = _gated(grouped_wgrad_operation, "jaxfp8_grouped_wgrad_gemm_gated")
gated_weight_operation = _gated(qt.weight_operation, "jaxfp8_quantize_weight_gated")
