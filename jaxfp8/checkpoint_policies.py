"""Policies for `jax.checkpoint` that know the FP8 residuals, in the manner of `jax.checkpoint_policies`.

JAX's own `dots_saveable` sees no dot in an FP8 product, so it saves nothing of these operations.
"""

from .ops._residuals import (
    RESIDUAL_NAME as RESIDUAL_NAME,
)
from .ops._residuals import (
    offload_fp8_residuals as offload_fp8_residuals,
)
from .ops._residuals import (
    save_dots_and_fp8_residuals as save_dots_and_fp8_residuals,
)
from .ops._residuals import (
    save_fp8_residuals as save_fp8_residuals,
)
