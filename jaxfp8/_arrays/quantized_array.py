"""The quantized array that users hold."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from . import checks
from .blocks import BLOCK, ROW, SQUARE, ceil_blocks, dequantize_blocks
from .recipe import FP8_DTYPES


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


def quantized(function: str, name: str, q: Any, shape: str, blocks) -> QuantizedArray:
    """A QuantizedArray of FP8 data with the rank of `shape`, one of `blocks`, and scales that fit."""
    if not isinstance(q, QuantizedArray):
        raise TypeError(
            f"{function}: {name} is a {type(q).__name__}; allowed: a QuantizedArray (see jaxfp8.quantize)"
        )
    data = checks.array(function, f"{name}.data", q.data, shape, FP8_DTYPES)
    if q.block not in blocks:
        allowed = " or ".join(f"{r}x{c}" for r, c in blocks)
        got = "x".join(map(str, q.block)) if isinstance(q.block, tuple) else repr(q.block)
        raise ValueError(f"{function}: {name} has blocks of {got}; allowed: {allowed}")
    rows, _ = q.block
    want = data.shape[:-1] + (ceil_blocks(data.shape[-1]),)
    if rows != 1:
        want = data.shape[:-2] + (ceil_blocks(data.shape[-2]), want[-1])
    scale = checks.array(function, f"{name}.scale", q.scale, shape, (np.dtype("float32"),))
    if scale.shape != want:
        raise ValueError(
            f"{function}: {name}.scale has shape {scale.shape}; allowed: {want} for data {data.shape} "
            f"in blocks of {rows}x{BLOCK}"
        )
    return QuantizedArray(data, scale, q.block)


def transpose_blocks(q: QuantizedArray) -> QuantizedArray:
    """An array in 128x128 blocks with its last two axes swapped."""
    return QuantizedArray(jnp.swapaxes(q.data, -1, -2), jnp.swapaxes(q.scale, -1, -2), q.block)


def dequantize(q: QuantizedArray, dtype: Any = jnp.float32) -> jax.Array:
    """`data * scale`: computed in float32, then rounded to `dtype`.

    **Arguments:**

    - `q`: a QuantizedArray, data `(..., M, K)`; `(..., K)` in 1x128 blocks.
    - `dtype`: float32, bfloat16 or float16. With power-of-two scales bfloat16 is exact.

    **Returns:** an array of q's shape.

    **Raises:** TypeError or ValueError if `q` is not a consistent QuantizedArray or `dtype` another type.
    """
    dtype = checks.output_dtype("dequantize", "dtype", dtype, checks.INPUT_DTYPES)
    shape = "(..., K)" if getattr(q, "block", None) == ROW else "(..., M, K)"
    q = quantized("dequantize", "q", q, shape, (ROW, SQUARE))
    if q.ndim == 1:
        return dequantize_blocks(q.data[None], q.scale[None], q.block)[0].astype(dtype)
    return dequantize_blocks(q.data, q.scale, q.block).astype(dtype)
