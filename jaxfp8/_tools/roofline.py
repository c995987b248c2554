"""What a Hopper GPU could do at best: peak rates, and the time of a product that they bound."""

from __future__ import annotations

import dataclasses
import math

import numpy as np

from .._arrays.blocks import BLOCK, ceil_blocks, padded_tokens


@dataclasses.dataclass(frozen=True)
class Device:
    """Peaks of a GPU, without sparsity, at boost clocks: NVIDIA's data sheets.

    **Arguments:**

    - `name`: as in `device_kind` below.
    - `sms`: multiprocessors.
    - `fp8`, `bf16`, `tf32`: TFLOP/s of the tensor cores.
    - `bandwidth`: of the memory, TB/s.
    """

    name: str
    sms: int
    fp8: float
    bf16: float
    tf32: float
    bandwidth: float

    def seconds(self, flops: float, nbytes: float, dtype: str) -> float:
        """The roofline's time: bounded by the tensor cores or by the memory, whichever takes longer."""
        rate = {"fp8": self.fp8, "bf16": self.bf16, "tf32": self.tf32}[dtype]
        return max(flops / (rate * 1e12), nbytes / (self.bandwidth * 1e12))


DEVICES = {
    "h100": Device("H100 SXM", 132, 1979, 989.5, 494.5, 3.35),
    "h100-pcie": Device("H100 PCIe", 114, 1513, 756.5, 378, 2.0),
    "h100-nvl": Device("H100 NVL", 132, 1670.5, 835.5, 417.5, 3.9),
    "h200": Device("H200 SXM", 132, 1979, 989.5, 494.5, 4.8),
    "h200-nvl": Device("H200 NVL", 132, 1670.5, 835.5, 417.5, 4.8),
    "h800": Device("H800 SXM", 132, 1979, 989.5, 494.5, 3.35),
    "h20": Device("H20", 78, 296, 148, 74, 4.0),
    "gh200": Device("GH200 96GB", 132, 1979, 989.5, 494.5, 4.0),
}
"""By the names that `device` arguments take."""


def device(function: str, name: str | Device | None) -> Device:
    """A device by its name, or by what `jax.Device.device_kind` says of it; None is the first of JAX's devices.

    **Raises:** ValueError for a GPU that is not in the table.
    """
    if isinstance(name, Device):
        return name
    if name is None:
        name = here() or "h100"
    key = name.lower()
    if key in DEVICES:
        return DEVICES[key]
    words = key.replace("-", " ").split()
    for model in ("gh200", "h200", "h100", "h800", "h20"):
        if model in words:
            variant = next((f"{model}-{v}" for v in ("pcie", "nvl") if v in words), model)
            if variant in DEVICES:
                return DEVICES[variant]
    raise ValueError(f"{function}: device is {name!r}; allowed: {', '.join(DEVICES)}")


def here() -> str | None:
    """The kind of the first of JAX's devices if it is a GPU of compute capability 9.0."""
    import jax

    first = jax.devices()[0]
    capability = str(getattr(first, "compute_capability", ""))
    return first.device_kind if first.platform == "gpu" and capability == "9.0" else None


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes of a product and of what it needs: `fp8` with quantized operands, `bf16` without."""

    fp8: dict[str, int]
    bf16: dict[str, int]


def memory(m: int, n: int, k: int, groups: int = 1, *, ragged: bool = False) -> Memory:
    """Bytes of `(M, K) . (K, N)`, of `groups` of them, or of M rows in `groups` ragged groups.

    FP8 data is a byte an element, its scales are float32: one for 1x128 of the activation, one for 128x128 of the
    weight (docs/architecture.md). Kernels need no workspace. For training, a weight is kept in both orientations with
    the same scales, and an activation as columns (`quantize_both`); for ragged groups these are padded to whole blocks.
    """
    rows = m if ragged else groups * m
    kb, nb, mb = ceil_blocks(k), ceil_blocks(n), ceil_blocks(m)
    tokens = padded_tokens(m, groups) if ragged else m
    columns, blocks = (1, tokens // BLOCK) if ragged else (groups, mb)
    fp8 = {
        "activation": rows * k,
        "activation scales": rows * kb * 4,
        "weight": groups * n * k,
        "weight scales": groups * nb * kb * 4,
        "result (bfloat16)": rows * n * 2,
        "workspace": 0,
        "kept for the backward pass: activation columns": columns * k * tokens,
        "kept for the backward pass: column scales": columns * k * blocks * 4,
        "kept for the backward pass: weight": groups * n * k,
        "kept for the backward pass: weight scales": groups * nb * kb * 4,
    }
    bf16 = {
        "activation": rows * k * 2,
        "weight": groups * n * k * 2,
        "result (bfloat16)": rows * n * 2,
        "kept for the backward pass: activation columns": rows * k * 2,
        "kept for the backward pass: weight": groups * n * k * 2,
    }
    return Memory(fp8, bf16)


def nbytes(shape: tuple[int, ...], dtype: np.dtype) -> int:
    """Bytes of an array."""
    return math.prod(shape) * np.dtype(dtype).itemsize
