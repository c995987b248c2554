"""A weight with its FP8 copies: quantized once, used by many products."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from . import checks
from .blocks import BLOCK
from .quantized_array import QuantizedArray, quantized


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, repr=False)
class QuantizedWeight:
    """A weight `(..., K, N)` and its FP8 copies in both orientations; see `jaxfp8.prequantize`.

    Products read the copies; the gradient goes to `value`, whose numbers no product reads. A pytree, so that stacked
    layers pass through `scan`, `vmap` and sharding. The FP8 data is held as uint8 bit patterns: they pass through
    remat unharmed and every collective moves one byte an element.

    Without value and second orientation it is a frozen weight of one byte a parameter: no gradient is made for it, and
    that of the activations makes the second orientation on the fly.

    **Arguments:**

    - `value`: float32, bfloat16 or float16 `(..., K, N)`; None of a frozen weight.
    - `bits_nt`: uint8 `(..., N, K)`, the FP8 data of the forward product's operand.
    - `bits_nn`: uint8 `(..., K, N)`, that of the input gradient's; None of a frozen weight.
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
        if self.value is None:
            *lead, n, k = self.bits_nt.shape
            return (*lead, k, n)
        return self.value.shape

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def dtype(self) -> Any:
        """Dtype of the value, and so of the gradient; of a frozen weight, its FP8 type."""
        return self.fp8_dtype if self.value is None else self.value.dtype

    @property
    def nt(self) -> QuantizedArray:
        """The operand of the forward product: `(..., N, K)` in 128x128 blocks."""
        data = lax.bitcast_convert_type(self.bits_nt, self.fp8_dtype)
        return QuantizedArray(data, jnp.swapaxes(self.scale, -1, -2), (BLOCK, BLOCK))

    @property
    def nn(self) -> QuantizedArray:
        """The operand of the input gradient's product: `(..., K, N)` in 128x128 blocks."""
        bits = jnp.swapaxes(self.bits_nt, -1, -2) if self.bits_nn is None else self.bits_nn
        data = lax.bitcast_convert_type(bits, self.fp8_dtype)
        return QuantizedArray(data, self.scale, (BLOCK, BLOCK))

    def with_value(self, value: Any) -> QuantizedWeight:
        """The same FP8 copies, with the gradient going to `value`, which must be what they were quantized from.

        For `jax.grad` of a function of the weights that are quantized outside of it.

        **Raises:** ValueError or TypeError if its shape or dtype is another, or if this weight is frozen.
        """
        if self.value is None:
            raise ValueError("with_value: the weight is frozen; allowed: one that has a value")
        if value.shape != self.shape:
            raise ValueError(f"with_value: value has shape {value.shape}; allowed: {self.shape}")
        if value.dtype != self.dtype:
            raise TypeError(
                f"with_value: value has dtype {jnp.dtype(value.dtype).name}; "
                f"allowed: {jnp.dtype(self.dtype).name}"
            )
        return dataclasses.replace(self, value=value)

    def __repr__(self) -> str:
        shown = self if self.value is None and hasattr(self.bits_nt, "shape") else self.value
        dims = ",".join(map(str, getattr(shown, "shape", "?")))
        frozen = ", frozen" if self.value is None else ""
        return f"QuantizedWeight([{dims}], {jnp.dtype(self.fp8_dtype).name}{frozen})"


class WeightCopies(NamedTuple):
    """FP8 data and scales of a weight in both orientations, or what belongs to each: dimensions, types."""

    nt: Any
    nt_scale: Any
    nn: Any
    nn_scale: Any


def frozen_weight(function: str, name: str, w: Any, shape: str) -> QuantizedArray | None:
    """The forward product's operand of a weight that is FP8 alone, of the rank of `shape`; None of any other.

    **Arguments:**

    - `w`: a QuantizedArray, the operand itself, or a QuantizedWeight without value; or another weight.
    - `shape`: such as "(N, K)".
    """
    if isinstance(w, QuantizedWeight) and w.value is None:
        if w.bits_nn is not None:
            raise ValueError(
                f"{function}: {name} has bits_nn but no value; allowed: a QuantizedWeight with both, or neither"
            )
        for field, axes in (("bits_nt", "(..., N, K)"), ("scale", "(..., K, N)")):
            dtype = np.uint8 if field == "bits_nt" else np.float32
            checks.array(function, f"{name}.{field}", getattr(w, field), axes, (np.dtype(dtype),))
        w = w.nt
    if not isinstance(w, QuantizedArray):
        return None
    return quantized(function, name, w, shape, ((BLOCK, BLOCK),))


def with_copies(function: str, name: str, w: Any, shape: str) -> Any:
    """A weight that is FP8 alone with both orientations; its value, which no product reads, is integers. Others as is.

    Integers have no tangent, so that no gradient is made for it. `shape`: the operand's, such as "(N, K)".
    """
    frozen = frozen_weight(function, name, w, shape)
    if frozen is None:
        return w
    bits = lax.bitcast_convert_type(frozen.data, jnp.uint8)
    other = jnp.swapaxes(bits, -1, -2)
    scale = lax.stop_gradient(jnp.swapaxes(frozen.scale, -1, -2))
    return QuantizedWeight(other, bits, other, scale, frozen.dtype)


def value_of(function: str, name: str, w: Any, shape: str) -> jax.Array:
    """The value of a weight, quantized ahead or not, with the rank of `shape`; integers of one that is FP8 alone."""
    if not isinstance(w, QuantizedWeight):
        return checks.array(function, name, w, shape)
    return checks.array(function, name, w.value, shape, (*checks.INPUT_DTYPES, np.dtype(np.uint8)))


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
