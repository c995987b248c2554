"""The arithmetic of Hopper's tensor cores on FP8 operands, to the bit.

NVIDIA does not document it. What is here was worked out from an H100's results and reproduces all of those in
`tests/data/h100_fp8_products.npz` (`benchmarks/gpu_errors.py --dump`). In one instruction (32 products and the
accumulator), for each element:

1. every term is aligned to the largest exponent among the terms; a product's is the sum of its factors' exponents, so
   its significand lies in [1, 4);
2. each keeps 13 bits below that exponent, the rest is cut off (toward zero);
3. they are summed exactly, and the sum keeps 14 significant bits, the rest is cut off.
"""

import contextlib

import numpy as np

FRACTION = 13
_NONE = -(1 << 20)  # the exponent of zero
_LOWEST = {"e4m3": -6, "e5m2": -14}  # subnormals have the exponent of the smallest normal

_in_use = False


@contextlib.contextmanager
def hopper_arithmetic():
    """Inside, the emulator's FP8 wgmmas round as an H100; outside, once, from float64."""
    global _in_use
    before, _in_use = _in_use, True
    try:
        yield
    finally:
        _in_use = before


def in_use() -> bool:
    return _in_use


def _exponent(value: np.ndarray, lowest: int) -> np.ndarray:
    exponent = np.maximum(np.frexp(value)[1] - 1, lowest)
    return np.where(value == 0, _NONE, exponent)


def _cut(value: np.ndarray, unit_exponent: np.ndarray) -> np.ndarray:
    unit = np.exp2(np.maximum(unit_exponent, -300).astype(np.float64))
    return np.trunc(value / unit) * unit


def multiply(a, b, accumulator=None, types=("e4m3", "e4m3")) -> np.ndarray:
    """a (M, 32) . b (N, 32)^T + accumulator (M, N), of finite values in float64."""
    terms = a[:, None, :] * b[None, :, :]
    exponents = (
        _exponent(a, _LOWEST[types[0]])[:, None, :] + _exponent(b, _LOWEST[types[1]])[None, :, :]
    )
    if accumulator is not None:
        terms = np.concatenate([terms, accumulator[..., None]], -1)
        exponents = np.concatenate([exponents, _exponent(accumulator, -126)[..., None]], -1)
    largest = exponents.max(-1, keepdims=True)
    total = _cut(terms, largest - FRACTION).sum(-1)
    return _cut(total, _exponent(total, -126) - FRACTION)
