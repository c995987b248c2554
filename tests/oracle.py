"""Products in NumPy float64 on dequantized inputs, and how results are compared with them."""

import numpy as np

from tests import oracle_quantize

BLOCK = oracle_quantize.BLOCK


def dequantize(q):
    """float64 value of a QuantizedArray."""
    data, scale = np.asarray(q.data), np.asarray(q.scale)
    if data.ndim == 1:
        return oracle_quantize.dequantize(data[None], scale[None], q.block)[0]
    return oracle_quantize.dequantize(data, scale, q.block)


def gemm(lhs, rhs):
    """(..., M, K) . (..., N, K) -> (..., M, N)."""
    return dequantize(lhs) @ np.swapaxes(dequantize(rhs), -1, -2)


def grouped_gemm(lhs, rhs, group_sizes):
    """(M, K) . (G, N, K) -> (M, N), zero past the last group."""
    lhs, rhs = dequantize(lhs), dequantize(rhs)
    out = np.zeros((lhs.shape[0], rhs.shape[1]))
    for matrix, (start, size) in zip(
        rhs, oracle_quantize.clipped_groups(group_sizes, lhs.shape[0]), strict=True
    ):
        out[start : start + size] = lhs[start : start + size] @ matrix.T
    return out


def masked_grouped_gemm(lhs, rhs, masked_m):
    """(G, M, K) . (G, N, K) -> (G, M, N), zero past masked_m[g] rows."""
    out = gemm(lhs, rhs)
    for block, rows in zip(out, masked_m, strict=True):
        block[max(0, int(rows)) :] = 0
    return out


def grouped_wgrad_gemm(lhs, rhs, group_sizes, tokens):
    """(N, T) . (K, T) -> (G, N, K) over the group-padded token axis of `tokens` tokens."""
    lhs, rhs = dequantize(lhs), dequantize(rhs)
    out, at = [], 0
    for _, size in oracle_quantize.clipped_groups(group_sizes, tokens):
        out.append(lhs[:, at : at + size] @ rhs[:, at : at + size].T)
        at += oracle_quantize.cdiv(size, BLOCK) * BLOCK
    return np.stack(out)


def error(got, want):
    """Norm-wise relative error in float64; fails on anything that is not finite."""
    got, want = np.asarray(got).astype(np.float64), np.asarray(want).astype(np.float64)
    assert got.shape == want.shape, (got.shape, want.shape)
    assert np.isfinite(got).all()
    norm = np.linalg.norm(want)
    return np.linalg.norm(got - want) / norm if norm else np.linalg.norm(got)


def assert_close(got, want, tolerance):
    """Norm-wise, for the whole and for each row of the leading axis (a group, a token)."""
    got, want = np.asarray(got), np.asarray(want)
    assert error(got, want) <= tolerance, error(got, want)
    if got.ndim > 2:
        worst = max((error(a, b) for a, b in zip(got, want, strict=True)), default=0)
        assert worst <= tolerance, f"worst group: {worst}"


def assert_elements_close(got, lhs, rhs, tolerance):
    """Per element of lhs (M, K) . rhs (N, K): the error against sum |lhs| |rhs|, its condition."""
    lhs, rhs = dequantize(lhs), dequantize(rhs)
    bound = np.abs(lhs) @ np.abs(rhs).T
    gap = np.abs(np.asarray(got).astype(np.float64) - lhs @ rhs.T)
    assert np.isfinite(gap).all()
    assert (gap <= tolerance * bound).all(), (gap / np.maximum(bound, 1e-300)).max()
