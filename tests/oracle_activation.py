"""Activations fused with quantization, in NumPy float64, written from docs/architecture.md ("Activations").

Pre-activations are (..., A, F): gate and up where A is 2. Shares no code with the library.
"""

import numpy as np

from tests import oracle_quantize as oq

LINEAR = {"silu": 1.0, "gelu": 2 * np.sqrt(2 / np.pi)}
CUBIC = {"silu": 0.0, "gelu": 2 * np.sqrt(2 / np.pi) * 0.044715}
ACTIVATIONS = tuple(LINEAR)
"""By the number that the custom calls take."""


def logistic(z):
    """1 / (1 + exp(-z)), of full relative precision on both sides."""
    with np.errstate(over="ignore", invalid="ignore"):
        e = np.exp(-np.abs(z))
        return np.where(z < 0, e, 1) / (1 + e)


def argument(x, activation):
    """z of a(x) = x logistic(z), and its derivative."""
    square = np.minimum(x * x, 1e4)  # beyond, the logistic function is 0 or 1 in any precision
    linear, cubic = LINEAR[activation], CUBIC[activation]
    return x * (linear + cubic * square), linear + 3 * cubic * square


def activate(x, activation):
    """(..., A, F) -> (..., F)."""
    x = x.astype(np.float64)
    gate = x[..., 0, :]
    with np.errstate(over="ignore", invalid="ignore"):
        y = gate * logistic(argument(gate, activation)[0])
        return y * x[..., 1, :] if x.shape[-2] == 2 else y


def gradient(x, dy, activation):
    """Of x (..., A, F), from dy (..., F)."""
    x, dy = x.astype(np.float64), dy.astype(np.float64)
    gate = x[..., 0, :]
    with np.errstate(over="ignore", invalid="ignore"):
        z, slope = argument(gate, activation)
        s, rest = logistic(z), logistic(-z)
        da = s + gate * (s * rest) * slope
        if x.shape[-2] == 1:
            return (dy * da)[..., None, :]
        return np.stack([dy * x[..., 1, :] * da, dy * gate * s], axis=-2)


def block_sums(terms):
    """float64 (M, FB) of (M, F): the sum over each block of 128 columns."""
    m, f = terms.shape
    padded = np.zeros((m, oq.cdiv(f, oq.BLOCK) * oq.BLOCK))
    padded[:, :f] = terms
    with np.errstate(invalid="ignore"):
        return padded.reshape(m, -1, oq.BLOCK).sum(-1)


def weight_gradient(x, dy, activation):
    """The gradient of each row's weight by block of F, (M, FB), and the sum of its terms' magnitudes."""
    with np.errstate(over="ignore", invalid="ignore"):
        terms = dy.astype(np.float64) * activate(x, activation)
    return block_sums(terms), block_sums(np.abs(terms))


def assert_weight_gradient(got, x, dy, activation):
    """Within the error of a float32 sum in any order; `got` (M, FB) as it lies in memory."""
    want, magnitude = weight_gradient(x, dy, activation)
    got = got.reshape(want.shape[::-1]).T
    np.testing.assert_array_equal(np.isfinite(got), np.isfinite(want))
    finite = np.isfinite(want)
    assert (np.abs(got - want)[finite] <= 130 * 2.0**-24 * magnitude[finite]).all()


def error_bounds(x, dy, activation):
    """Bounds on the float32 error of `activate` and of `gradient` before quantization.

    docs/architecture.md: (5 + 3 |z|) 2^-23 relative, of each of the terms whose sum is the result, and 2^-125 of the
    factors, where the logistic function is flushed to zero.
    """
    x = x.astype(np.float64)
    gate = x[..., 0, :]
    up = np.abs(x[..., 1, :]) if x.shape[-2] == 2 else 1.0
    with np.errstate(over="ignore", invalid="ignore"):
        z, slope = argument(gate, activation)
        s, rest = logistic(z), logistic(-z)
        relative = (5 + 3 * np.minimum(np.abs(z), 200)) * 2.0**-23
        value = np.abs(gate) * (s * relative + 2.0**-125)
        if dy is None:
            return value * up
        dy = np.abs(dy.astype(np.float64))
        terms = s + np.abs(gate) * s * np.minimum(rest + 2.0**-23, 1) * slope
        da = (
            terms * relative
            + 2.0**-125 * (1 + np.abs(gate) * slope)
            + np.abs(gate) * s * slope * 2.0**-22
        )
        if x.shape[-2] == 1:
            return (dy * da)[..., None, :]
        return np.stack([dy * up * da, dy * value], axis=-2)


def saturated(seed, shape, dtype):
    """Pre-activations (..., A, F) whose activation is exact: gates far from zero, or zero."""
    r = np.random.default_rng(seed)
    x = (
        r.integers(4, 8, shape)
        * 2.0 ** r.integers(3, 9, shape)
        * r.choice([1, 1, 1, -64, 0], shape)
    )
    if shape[-2] == 2:
        x[..., 1, :] = few_bits(r, x[..., 1, :].shape)
    with np.errstate(over="ignore"):
        return x.astype(dtype)


def few_bits(r, shape):
    """Numbers of four bits and many magnitudes, zeros among them; a row has its own magnitude."""
    x = r.integers(-15, 16, shape) * 2.0 ** r.integers(-6, 3, shape)
    return x * 2.0 ** r.integers(-4, 5, (*shape[:-1], 1))


def cotangents(seed, shape, dtype):
    return few_bits(np.random.default_rng(seed + 1000), shape).astype(dtype)


def result_shapes(kind, shape, groups):
    """Logical shapes of the custom call's results, for x of `shape`."""
    *lead, a, f = shape
    halves = (a,) if "grad" in kind else ()
    rows = [(*lead, *halves, f), (*lead, *halves, oq.cdiv(f, oq.BLOCK))]
    if kind == "rows":
        return rows
    tokens = oq.padded_tokens(lead[-1], groups) if "ragged" in kind else lead[-1]
    columns = (*lead[:-1], *halves, f)
    return [*rows, (*columns, tokens), (*columns, oq.cdiv(tokens, oq.BLOCK))]


def outputs(kind, y, *, dtype=oq.E4M3, pow2=False, group_sizes=None):
    """What a custom call must give for the float32 values y, in the order of its results, as it lies in memory.

    y: (G, M, F), (G, M, A, F) for a gradient; (M, ...) for rows and ragged kinds.
    """
    y = np.asarray(y, np.float32)
    gradient = "grad" in kind
    data, scale = oq.quantize_blocks(y if y.ndim > 1 else y[None], (1, oq.BLOCK), dtype, pow2)
    if gradient:  # (..., M, A, FB): the blocks of both halves are outermost
        rows_last = np.moveaxis(scale, (-2, -1), (0, 1))
        row_scale = np.ascontiguousarray(rows_last)
    else:
        row_scale = oq.m_major(scale)
    results = [data, row_scale]
    if kind == "rows":
        return results
    if group_sizes is not None:
        flat = y.reshape(y.shape[0], -1)
        columns, column_scale = oq.ragged_columns(flat, group_sizes, dtype, pow2)
    else:
        flat = y.reshape(*y.shape[:2], -1)
        columns, column_scale = oq.quantize_columns(flat, dtype, pow2)
    return [*results, columns, oq.m_major(column_scale)]


def steps(data):
    """FP8 bytes as integers in the order of their values."""
    codes = data.view(np.uint8).astype(np.int32)
    return np.where(codes & 0x80, -(codes & 0x7F), codes)


def assert_within_a_step(got, want, bound):
    """Scales within the activation's error, data one FP8 step from the oracle's at most, and few of those."""
    for i in range(0, len(want), 2):
        data, scale = steps(got[i].reshape(-1)), got[i + 1].reshape(-1)
        want_data, want_scale = steps(want[i].reshape(-1)), want[i + 1].reshape(-1)
        # The oracle's scales of the bound are those of the error of a block's largest value.
        slack = bound[i + 1].reshape(-1) * 1.01 + want_scale * 2.0**-22
        assert (np.abs(scale - want_scale) <= slack).all()
        difference = np.abs(data - want_data)
        assert difference.max() <= 1
        assert np.count_nonzero(difference) <= 2 + data.size // 100
