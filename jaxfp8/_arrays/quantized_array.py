"""The quantized array that users hold."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .blocks import BLOCK


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, repr=False)
class QuantizedArray:
    """FP8 data and the scales of its blocks: `value = data * scale`, the scale of an element being its block's.

    A pytree of two leaves, so it passes through jit, vmap, scan, donation, sharding and checkpoints.

    **Arguments:**

    - `data`: float8_e4m3fn or float8_e5m2, `(..., M, K)`: the logical shape, never padded.
    - `scale`: float32, `(..., ceil(M/r), ceil(K/128))` for blocks of `(r, 128)`. It multiplies; it is never an inverse.
    - `block`: `(1, 128)` or `(128, 128)`. Blocks at the edges may be short.
    """

    __module__ = "jaxfp8"  # pickles name no private file

    data: Any
    scale: Any
    block: tuple[int, int] = dataclasses.field(default=(1, BLOCK), metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        """Logical shape: that of the data."""
        return self.data.shape

    @property
    def ndim(self) -> int:
        return self.data.ndim

    @property
    def size(self) -> int:
        return self.data.size

    @property
    def dtype(self) -> Any:
        """FP8 type of the data."""
        return self.data.dtype

    @property
    def nbytes(self) -> int:
        """Bytes of data and scales."""
        return self.data.size + 4 * self.scale.size

    def dequantize(self, dtype: Any = jnp.float32) -> jax.Array:
        """`data * scale` in `dtype`; see `jaxfp8.dequantize`."""
        from ..kernels.quantize import dequantize

        return dequantize(self, dtype=dtype)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        """NumPy's view of it: the values, `data * scale`, in float32 unless told otherwise; always a copy.

        **Raises:** ValueError if asked not to copy.
        """
        if copy is False:
            raise ValueError(
                "QuantizedArray: its values are computed, so copy=False is not possible"
            )
        return np.array(self.dequantize(), dtype)

    def __repr__(self) -> str:
        def text(x: Any) -> str:
            if not (hasattr(x, "dtype") and hasattr(x, "shape")):
                return repr(x)
            return f"{jnp.dtype(x.dtype).name}[{','.join(map(str, x.shape))}]"

        # Also of what a check is about to refuse: its message shows it.
        block = "x".join(map(str, self.block)) if isinstance(self.block, tuple) else self.block
        return f"QuantizedArray({text(self.data)}, scale={text(self.scale)}, block={block})"
