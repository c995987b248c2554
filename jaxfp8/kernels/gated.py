"""Products and quantizers of arrays with gate and up."""

from __future__ import annotations

from .._primitives.sharded_operation import Kernel
from . import quantize as qt
from .activation import TWO, gated
from .gemm import gemm_kernel
from .grouped_gemm import grouped_kernel, grouped_wgrad_kernel


def _gated(kernel: Kernel, name) -> Kernel:
    pinned = (*kernel.pinned, TWO)
    together, agreed = kernel.together, kernel.agreed
    return Kernel(name, gated(kernel.local), pinned=pinned, together=together, agreed=agreed)


gated_gemm_kernel = _gated(gemm_kernel, "jaxfp8_gemm_gated")
gated_grouped_kernel = _gated(grouped_kernel, "jaxfp8_grouped_gemm_gated")
gated_grouped_wgrad_kernel = _gated(grouped_wgrad_kernel, "jaxfp8_grouped_wgrad_gemm_gated")
gated_weight_kernel = _gated(qt.weight_kernel, "jaxfp8_quantize_weight_gated")
