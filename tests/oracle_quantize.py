"""Block quantization to FP8 in plain NumPy: what every implementation must equal, bit for bit.

Written from the arithmetic of docs/architecture.md ("Quantization, exactly") and sharing no code
with the library: no JAX, no bit tricks. Scales multiply: ``value = data * scale``.
"""

import ml_dtypes
import numpy as np

BLOCK = 128
E4M3 = np.dtype(ml_dtypes.float8_e4m3fn)
E5M2 = np.dtype(ml_dtypes.float8_e5m2)

_LARGEST = {E4M3: np.float32(448), E5M2: np.float32(57344)}
_SMALLEST_NORMAL = np.float32(2.0**-126)
_NAN_BYTE = np.uint8(0x7F)
_NAN_SCALE = np.array(0x7FC00000, np.uint32).view(np.float32)[()]


def cdiv(a, b):
    """The quotient a / b of two non-negative integers, rounded up."""
    return -(-a // b)


def padded_tokens(tokens, groups):
    """Length T of the group-padded token axis: room for every group rounded up to 128."""
    return cdiv(tokens, BLOCK) * BLOCK + BLOCK * groups


def clipped_groups(group_sizes, tokens):
    """``(start, size)`` of each group, negative sizes as zero, clipped to the tokens that exist."""
    groups, start = [], 0
    for size in group_sizes:
        size = min(max(int(size), 0), tokens - start)
        groups.append((start, size))
        start += size
    return groups


def quantize_blocks(x, block=(1, BLOCK), dtype=E4M3, pow2=False):
    """Quantizes the last two axes of x in blocks of ``block`` elements, the last ones shorter.

    Shapes: x (..., M, K) in float32, float16 or bfloat16; data (..., M, K) in ``dtype``;
    scale (..., ceil(M / block[0]), ceil(K / block[1])) in float32.
    """
    dtype = np.dtype(dtype)
    rows, cols = block
    *lead, m, k = x.shape
    mb, kb = cdiv(m, rows), cdiv(k, cols)

    value = np.zeros((*lead, mb * rows, kb * cols), np.float32)
    value[..., :m, :k] = x.astype(np.float32)
    value = value.reshape(*lead, mb, rows, kb, cols)
    # Also turns -0 into +0.
    value = np.where(np.abs(value) < _SMALLEST_NORMAL, np.float32(0), value)

    invalid = ~np.isfinite(value).all(axis=(-3, -1), keepdims=True)
    magnitude = np.where(invalid, np.float32(0), np.abs(value))
    amax = magnitude.max(axis=(-3, -1), keepdims=True)
    scale = np.maximum(amax * (np.float32(1) / _LARGEST[dtype]), _SMALLEST_NORMAL)
    if pow2:
        fraction, exponent = np.frexp(scale)  # fraction in [0.5, 1)
        scale = np.ldexp(np.float32(1), exponent - (fraction == 0.5)).astype(np.float32)
    scale = np.where(amax == 0, np.float32(1), scale)

    product = np.where(invalid, np.float32(0), value) * (np.float32(1) / scale)
    product = np.clip(product, -_LARGEST[dtype], _LARGEST[dtype])  # the cast does not saturate
    data = np.where(invalid, _NAN_BYTE, product.astype(dtype).view(np.uint8)).view(dtype)
    data = data.reshape(*lead, mb * rows, kb * cols)[..., :m, :k]
    scale = np.where(invalid, _NAN_SCALE, scale).reshape(*lead, mb, kb)
    return np.ascontiguousarray(data), scale


def quantize_columns(x, dtype=E4M3, pow2=False):
    """x (..., M, K) to data (..., K, M) and scale (..., K, ceil(M / 128)): blocks along M."""
    return quantize_blocks(np.swapaxes(x, -1, -2), (1, BLOCK), dtype, pow2)


def quantize_weight(w, dtype=E4M3, pow2=False):
    """w (..., K, N) to data_nn (..., K, N), scale (..., KB, NB), data_nt (..., N, K)."""
    data, scale = quantize_blocks(w, (BLOCK, BLOCK), dtype, pow2)
    return data, scale, np.ascontiguousarray(np.swapaxes(data, -1, -2))


def ragged_columns(x, group_sizes, dtype=E4M3, pow2=False):
    """x (M, K) to data (K, T) and scale (K, T / 128) over the group-padded token axis.

    Every group is quantized on its own and starts at a multiple of 128; what no group covers holds
    data 0 and, where a whole block is uncovered, scale 1.
    """
    m, k = x.shape
    t = padded_tokens(m, len(group_sizes))
    data = np.zeros((k, t), np.uint8).view(dtype)
    scale = np.ones((k, t // BLOCK), np.float32)
    at = 0
    for start, size in clipped_groups(group_sizes, m):
        if size:
            block_data, block_scale = quantize_columns(x[start : start + size], dtype, pow2)
            data[:, at : at + size] = block_data
            scale[:, at // BLOCK : at // BLOCK + block_scale.shape[1]] = block_scale
            at += cdiv(size, BLOCK) * BLOCK
    return data, scale


def dequantize(data, scale, block=(1, BLOCK)):
    """data (..., M, K) and its block scales to float64 (..., M, K)."""
    m, k = data.shape[-2:]
    spread = np.repeat(np.repeat(scale, block[0], axis=-2), block[1], axis=-1)
    return data.astype(np.float64) * spread[..., :m, :k].astype(np.float64)


def m_major(scale):
    """A row scale (..., M, KB) as it lies in memory: (KB, all leading axes and M folded)."""
    return np.ascontiguousarray(np.moveaxis(scale, -1, 0).reshape(scale.shape[-1], -1))


def outputs(kind, x, *, dtype=E4M3, pow2=False, group_sizes=None):
    """What a custom call must give, in the order of its results, as it lies in memory."""
    if kind in ("blocks", "weight"):
        results = quantize_weight(x, dtype, pow2)
        return list(results if kind == "weight" else results[:2])
    results = []
    if kind in ("rows", "both", "ragged_both"):
        data, scale = quantize_blocks(x, (1, BLOCK), dtype, pow2)
        results += [data, m_major(scale)]
    if kind in ("columns", "both"):
        data, scale = quantize_columns(x, dtype, pow2)
        results += [data, m_major(scale)]
    if group_sizes is not None:
        data, scale = ragged_columns(x, group_sizes, dtype, pow2)
        results += [data, m_major(scale)]
    return results
