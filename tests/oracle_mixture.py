"""A mixture of experts and its gradients in NumPy float64, each product of freshly quantized operands."""

from typing import NamedTuple

import numpy as np

from tests import oracle_activation
from tests import oracle_gradients as og


class Mixture(NamedTuple):
    """Arguments of `jaxfp8.moe`, and the gradient of its result."""

    x: np.ndarray
    expert: np.ndarray
    gate: np.ndarray
    w_up: np.ndarray
    w_down: np.ndarray
    dy: np.ndarray


def mixture(tokens, choices, experts, k, f, n, gated=True, expert=None):
    r = np.random.default_rng(tokens + k)

    def normal(*shape):
        return r.standard_normal(shape, np.float32)

    if expert is None:
        expert = r.integers(-1, experts + 1, (tokens, choices))  # some of none
    up = normal(experts, k, *((2,) if gated else ()), f) / np.float32(np.sqrt(k))
    down = normal(experts, f, n) / np.float32(np.sqrt(f))
    gate = r.random((tokens, choices), np.float32) + np.float32(0.1)
    return Mixture(normal(tokens, k), expert, gate, up, down, normal(tokens, n))


def reference(
    m: Mixture, activation="silu", formats=og.DEFAULT, hidden=np.float32, travelled=False
):
    """y, dx, dgate, dw_up, dw_down. The gate multiplies the activation, which is quantized after that.

    `hidden`: what h, its activation's gradient, and the rows that are summed are rounded to. `travelled`: x and dy came
    as FP8 rows, of which their columns are made.
    """

    def rounded(v):
        return v.astype(np.float32).astype(hidden).astype(np.float32)

    forward, gradient = formats
    y, dx, dgate = np.zeros(m.dy.shape), np.zeros(m.x.shape), np.zeros(m.gate.shape)
    dw_up, dw_down = np.zeros(m.w_up.shape), np.zeros(m.w_down.shape)
    for e in range(len(m.w_up)):
        token, choice = np.nonzero(m.expert == e)
        if not len(token):
            continue
        k, *halves, f = m.w_up[e].shape
        pad = -f % 128
        up = np.pad(m.w_up[e].reshape(k, -1, f), [(0, 0), (0, 0), (0, pad)]).reshape(k, -1)
        up, down = (
            og.blocks(up, forward),
            og.blocks(np.pad(m.w_down[e], [(0, pad), (0, 0)]), forward),
        )
        x, dy, gate = m.x[token], m.dy[token], m.gate[token, choice][:, None].astype(np.float64)

        h = rounded(og.rows(x, forward) @ up).reshape(len(x), -1, f + pad)
        a = oracle_activation.activate(h, activation)
        weighted = (a * gate).astype(np.float32)
        np.add.at(y, token, rounded(og.rows(weighted, forward) @ down))

        dz = rounded(og.rows(dy, gradient) @ down.T).astype(np.float64)
        dgate[token, choice] = (dz * a).sum(1)
        dh = oracle_activation.gradient(h, dz * gate, activation)
        dh = dh.astype(np.float32).reshape(len(x), -1)
        np.add.at(dx, token, rounded(og.rows(dh, gradient) @ up.T))

        if travelled:
            x, dy = (og.rows(v, f).astype(np.float32) for v, f in ((x, forward), (dy, gradient)))
        dup = (og.columns(x, forward) @ og.columns(dh, gradient).T).reshape(k, -1, f + pad)
        dw_up[e] = dup[..., :f].reshape(m.w_up[e].shape)
        dw_down[e] = (og.columns(weighted, forward) @ og.columns(dy, gradient).T)[:f]
    return y, dx, dgate, dw_up, dw_down
