"""mlp and ragged_mlp, with their gradients, in NumPy float64; and arrays to compare them on."""

import jax
import numpy as np

from tests import oracle_activation
from tests import oracle_gradients as og
from tests import oracle_quantize as oq

# A step of FP8 that a platform's exponential takes otherwise, in a few elements of a thousand.
FLIPS = 2e-3


def weights(k, f, n, gated, groups=()):
    r = np.random.default_rng(k + f)
    up = r.standard_normal((*groups, k, *((2,) if gated else ()), f)) / np.sqrt(k)
    down = r.standard_normal((*groups, f, n)) / np.sqrt(f)
    return up.astype(np.float32), down.astype(np.float32)


def tokens(m, k, n):
    r = np.random.default_rng(m)
    return r.standard_normal((m, k)).astype(np.float32), r.standard_normal((m, n)).astype(
        np.float32
    )


def reference(x, w_up, w_down, dy, activation, formats=og.DEFAULT):
    """y, dx, dw_up, dw_down in float64, each product of freshly quantized operands."""
    forward, gradient = formats
    k, *halves, f = w_up.shape
    pad = -f % 128
    flat = np.pad(w_up.reshape(k, -1, f), [(0, 0), (0, 0), (0, pad)])
    f, down = f + pad, np.pad(w_down, [(0, pad), (0, 0)])
    up_blocks, down_blocks = og.blocks(flat.reshape(k, -1), forward), og.blocks(down, forward)
    h = (og.rows(x, forward) @ up_blocks).astype(np.float32).reshape(len(x), -1, f)
    a = oracle_activation.activate(h, activation).astype(np.float32)
    da = (og.rows(dy, gradient) @ down_blocks.T).astype(np.float32)
    dh = oracle_activation.gradient(h, da, activation).astype(np.float32).reshape(len(x), -1)
    dw_up = og.columns(x, forward) @ og.columns(dh, gradient).T
    dw_up = dw_up.reshape(k, -1, f)[..., : f - pad].reshape(w_up.shape)
    dw_down = (og.columns(a, forward) @ og.columns(dy, gradient).T)[: f - pad]
    return og.rows(a, forward) @ down_blocks, og.rows(dh, gradient) @ up_blocks.T, dw_up, dw_down


def ragged_reference(x, w_up, w_down, dy, sizes, activation, formats=og.DEFAULT):
    """The same for each group; rows past the last one are zero."""
    results = [np.zeros(v.shape) for v in (dy, x, w_up, w_down)]
    for g, (start, size) in enumerate(oq.clipped_groups(sizes, len(x))):
        if size:
            part = slice(start, start + size)
            of_group = reference(x[part], w_up[g], w_down[g], dy[part], activation, formats)
            for result, at, value in zip(results, (part, part, g, g), of_group, strict=True):
                result[at] = value
    return results


def run(f, x, w_up, w_down, dy, **options):
    @jax.jit
    def both(x, w_up, w_down, dy):
        y, pull = jax.vjp(lambda *arrays: f(*arrays, **options), x, w_up, w_down)
        return y, *pull(dy)

    return [np.asarray(v) for v in both(x, w_up, w_down, dy)]
