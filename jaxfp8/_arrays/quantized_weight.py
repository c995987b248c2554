"""A weight with its FP8 copies: quantized once, used by many products."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from .blocks import BLOCK
from .quantized_array import QuantizedArray, quantized


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, repr=False)
class QuantizedWeight:
    """A weight `(..., K, N)` and its FP8 copies in both orientations; see `jaxfp8.prequantize`.

    Products read the copies; the gradient goes to `value`, whose numbers no product reads. A pytree, so that stacked
    layers pass through `scan`, `vmap` and sharding. The FP8 data is held as uint8 bit patterns: they pass through
    remat unharmed and every collective moves one byte an element.

    **Arguments:**

    - `value`: float32, bfloat16 or float16 `(..., K, N)`.
    - `bits_nt`: uint8 `(..., N, K)`, the FP8 data of the forward product's operand.
    - `bits_nn`: uint8 `(..., K, N)`, that of the input gradient's.
    - `scale`: float32 `(..., ceil(K/128), ceil(N/128))`, of both.
    - `fp8_dtype`: the FP8 type of the bits.
    """

    __module__ = "jaxfp8"  # pickles name no private file

    value: Any
    bits_nt: Any
    bits_nn: Any
    scale: Any
    fp8_dtype: Any = dataclasses.field(
        default=jnp.dtype(jnp.float8_e4m3fn), metadata={"static": True}
    )

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the value, `(..., K, N)`."""
        return self.value.shape

    @property
    def ndim(self) -> int:
        return self.value.ndim

    @property
    def dtype(self) -> Any:
        """Dtype of the value, and so of the gradient."""
        return self.value.dtype

    @property
    def nt(self) -> QuantizedArray:
        """The operand of the forward product: `(..., N, K)` in 128x128 blocks."""
        data = lax.bitcast_convert_type(self.bits_nt, self.fp8_dtype)
        return QuantizedArray(data, jnp.swapaxes(self.scale, -1, -2), (BLOCK, BLOCK))

    @property
    def nn(self) -> QuantizedArray:
        """The operand of the input gradient's product: `(..., K, N)` in 128x128 blocks."""
        data = lax.bitcast_convert_type(self.bits_nn, self.fp8_dtype)
        return QuantizedArray(data, self.scale, (BLOCK, BLOCK))

    def with_value(self, value: Any) -> QuantizedWeight:
        """The same FP8 copies, with the gradient going to `value`, which must be what they were quantized from.

        For `jax.grad` of a function of the weights that are quantized outside of it.

        **Raises:** ValueError or TypeError if its shape or dtype is another.
        """
        if value.shape != self.shape:
            raise ValueError(f"with_value: value has shape {value.shape}; allowed: {self.shape}")
        if value.dtype != self.dtype:
            raise TypeError(
                f"with_value: value has dtype {jnp.dtype(value.dtype).name}; "
                f"allowed: {jnp.dtype(self.dtype).name}"
            )
        return dataclasses.replace(self, value=value)

    def __repr__(self) -> str:
        dims = ",".join(map(str, getattr(self.value, "shape", "?")))
        return f"QuantizedWeight([{dims}], {jnp.dtype(self.fp8_dtype).name})"


class WeightCopies(NamedTuple):
    """FP8 data and scales of a weight in both orientations, or what belongs to each: dimensions, types."""

    nt: Any
    nt_scale: Any
    nn: Any
    nn_scale: Any


def parts(function: str, name: str, w: Any) -> WeightCopies | tuple[()]:
    """What a product takes of a QuantizedWeight: data and scales of both orientations; () of a plain array."""
    if not isinstance(w, QuantizedWeight):
        return ()
    data = w.nt, w.nn
    for orientation, q in zip(("nt", "nn"), data, strict=True):
        quantized(function, f"{name}.{orientation}", q, "(..., K, N)", ((BLOCK, BLOCK),))
    if w.nn.shape != w.shape or w.nt.shape != (*w.shape[:-2], w.shape[-1], w.shape[-2]):
        raise ValueError(
            f"{function}: {name} has copies of shapes {w.nt.shape} and {w.nn.shape}, its value {w.shape}; "
            "they must be (..., N, K), (..., K, N) and (..., K, N)"
        )
    return WeightCopies(w.nt.data, w.nt.scale, w.nn.data, w.nn.scale)
