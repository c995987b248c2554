"""FP8 block-scaled products for JAX, with kernels for Hopper GPUs."""

from . import checkpoint_policies as checkpoint_policies
from ._quantized_array import QuantizedArray as QuantizedArray
from ._recipe import Recipe as Recipe
from .kernels.gemm import gemm as gemm
from .kernels.gemm import wgrad_gemm as wgrad_gemm
from .kernels.grouped_gemm import grouped_gemm as grouped_gemm
from .kernels.grouped_gemm import grouped_wgrad_gemm as grouped_wgrad_gemm
from .kernels.grouped_gemm import masked_grouped_gemm as masked_grouped_gemm
from .kernels.quantize import dequantize as dequantize
from .kernels.quantize import quantize as quantize
from .kernels.quantize import quantize_both as quantize_both
from .kernels.quantize import quantize_weight as quantize_weight
from .ops.dot_general import dot_general as dot_general
from .ops.einsum import einsum as einsum
from .ops.linear import linear as linear
from .ops.ragged_dot import ragged_dot as ragged_dot

__version__ = "0.1.0"
