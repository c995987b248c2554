"""FP8 block-scaled products for JAX, with kernels for Hopper GPUs.

Names are loaded at first use, so that the import costs a program that does not use them next to nothing. What cannot
work, such as an extension built for a newer JAX, fails at import all the same.
"""

import importlib
from typing import TYPE_CHECKING, Any

from . import _ffi as _ffi

__version__ = "0.1.0"

if TYPE_CHECKING:
    from . import checkpoint_policies as checkpoint_policies
    from . import equinox as equinox
    from . import export as export
    from . import flax as flax
    from . import maxtext as maxtext
    from . import qwix as qwix
    from . import safetensors as safetensors
    from . import testing as testing
    from . import tokamax as tokamax
    from . import validate as validate
    from ._arrays.quantized_array import QuantizedArray as QuantizedArray
    from ._arrays.quantized_array import dequantize as dequantize
    from ._arrays.quantized_weight import QuantizedWeight as QuantizedWeight
    from ._arrays.recipe import Recipe as Recipe
    from ._autocast.autocast import autocast as autocast
    from ._autocast.policy import AutocastPolicy as AutocastPolicy
    from ._tools.explain import explain as explain
    from ._tools.explanation import Explanation as Explanation
    from ._tools.tune import products_of as products_of
    from ._tools.tune import tune as tune
    from .kernels.configurations import Product as Product
    from .kernels.configurations import load_tuned as load_tuned
    from .kernels.gemm import gemm as gemm
    from .kernels.gemm import wgrad_gemm as wgrad_gemm
    from .kernels.grouped_gemm import grouped_gemm as grouped_gemm
    from .kernels.grouped_gemm import grouped_wgrad_gemm as grouped_wgrad_gemm
    from .kernels.grouped_gemm import masked_grouped_gemm as masked_grouped_gemm
    from .kernels.quantize import quantize as quantize
    from .kernels.quantize import quantize_both as quantize_both
    from .kernels.quantize import quantize_weight as quantize_weight
    from .ops.dot_general import dot_general as dot_general
    from .ops.einsum import einsum as einsum
    from .ops.expert_parallel import combine as combine
    from .ops.expert_parallel import dispatch as dispatch
    from .ops.linear import linear as linear
    from .ops.mlp import mlp as mlp
    from .ops.mlp import ragged_mlp as ragged_mlp
    from .ops.moe import moe as moe
    from .ops.prequantize import all_gather_weight as all_gather_weight
    from .ops.prequantize import prequantize as prequantize
    from .ops.ragged_dot import ragged_dot as ragged_dot

_MODULES = {
    "AutocastPolicy": "_autocast.policy",
    "Explanation": "_tools.explanation",
    "Product": "kernels.configurations",
    "QuantizedArray": "_arrays.quantized_array",
    "QuantizedWeight": "_arrays.quantized_weight",
    "Recipe": "_arrays.recipe",
    "all_gather_weight": "ops.prequantize",
    "autocast": "_autocast.autocast",
    "checkpoint_policies": "checkpoint_policies",
    "combine": "ops.expert_parallel",
    "dequantize": "_arrays.quantized_array",
    "dispatch": "ops.expert_parallel",
    "dot_general": "ops.dot_general",
    "einsum": "ops.einsum",
    "explain": "_tools.explain",
    "export": "export",
    "gemm": "kernels.gemm",
    "grouped_gemm": "kernels.grouped_gemm",
    "grouped_wgrad_gemm": "kernels.grouped_gemm",
    "linear": "ops.linear",
    "load_tuned": "kernels.configurations",
    "masked_grouped_gemm": "kernels.grouped_gemm",
    "mlp": "ops.mlp",
    "moe": "ops.moe",
    "prequantize": "ops.prequantize",
    "products_of": "_tools.tune",
    "quantize": "kernels.quantize",
    "quantize_both": "kernels.quantize",
    "quantize_weight": "kernels.quantize",
    "ragged_dot": "ops.ragged_dot",
    "testing": "testing",
    "ragged_mlp": "ops.mlp",
    "tune": "_tools.tune",
    "validate": "validate",
    "wgrad_gemm": "kernels.gemm",
}

__all__ = [*sorted(_MODULES), "__version__"]

# Not in __all__: each needs a package of others (the extras `frameworks` and, for safetensors, `models`).
_INTEGRATIONS = ("equinox", "flax", "maxtext", "qwix", "safetensors", "tokamax")


def __getattr__(name: str) -> Any:
    if name in _INTEGRATIONS:
        return importlib.import_module(f".{name}", __name__)
    if name not in _MODULES:
        raise AttributeError(f"module 'jaxfp8' has no attribute {name!r}")
    module = importlib.import_module(f".{_MODULES[name]}", __name__)
    value = module if name == _MODULES[name] else getattr(module, name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
