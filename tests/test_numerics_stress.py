"""Numbers that training meets and that hurt other formats: outliers, heavy tails, silence, spikes.

Errors are against float64 products of the unquantized operands, norm-wise; a product of normal data has 3.7 %.
"""

import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest

import jaxfp8
from tests.programs import assert_same_bits, train

ORDINARY = 0.045  # error of a product of ordinary data, at most


def rng(seed):
    return np.random.default_rng(seed)


def normal(seed, *shape):
    return rng(seed).standard_normal(shape, np.float32)


def errors(x, w, dy, f=jaxfp8.linear):
    """Norm-wise errors of y, dx and dw."""
    got = [np.asarray(v, np.float64) for v in jax.jit(train(f))(x, w, dy)]
    x, w, dy = (v.astype(np.float64) for v in (x, w, dy))
    want = (x @ w, dy @ w.T, x.T @ dy)
    assert all(np.isfinite(v).all() for v in got)
    return [np.linalg.norm(a - b) / np.linalg.norm(b) for a, b in zip(got, want, strict=True)]


def with_outliers(seed, *shape, share=1e-4, size=1000):
    """Normal values, of which a share is `size` times as large; and where those are."""
    at = rng(seed + 1).random(shape) < share
    return np.where(at, size, 1).astype(np.float32) * normal(seed, *shape), at


# --- outliers and heavy tails ---------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_outliers_in_activations_cost_nothing_norm_wise(dtype):
    x, at = with_outliers(0, 512, 1024)
    assert 20 < at.sum() < 100
    w, dy = normal(2, 1024, 256) / 32, normal(3, 512, 256)
    for error in errors(*(v.astype(dtype) for v in (x, w, dy))):
        assert error < ORDINARY


def test_an_outlier_stays_in_its_block():
    """Rows without one have the bits they had; the rest of a row with one is as exact as E4M3's range allows."""
    x, at = with_outliers(0, 512, 1024)
    calm, w, dy = np.where(at, 0, x), normal(2, 1024, 256) / 32, normal(3, 512, 256)
    f = jax.jit(train(jaxfp8.linear))
    y, dx, _ = f(x, w, dy)
    y0, dx0, _ = f(calm, w, dy)
    rows = ~at.any(1)
    assert 0 < (~rows).sum() < 100
    assert_same_bits(y[rows], y0[rows])
    assert_same_bits(dx, dx0)
    # What remains beside a value 1000 times as large: half of E4M3's smallest step, 1000 * 2^-10 / 448, absolute.
    beside = jaxfp8.quantize(x).dequantize() - x
    largest = np.abs(x).reshape(512, 8, 128).max(-1).repeat(128, -1)
    bound = np.maximum(np.abs(x) * 2.0**-4, largest * 2.0**-10 / 448)
    assert (np.abs(beside) <= bound * 1.0001).all()


@pytest.mark.parametrize("recipe", [{}, {"grad_dtype": jnp.float8_e5m2}], ids=["e4m3", "e5m2"])
@pytest.mark.parametrize("freedom", [1, 2, 3])
@pytest.mark.representatives(cases=2)
def test_heavy_tailed_gradients_keep_their_norm(freedom, recipe):
    """Student's t with infinite variance (2) and without a mean (1)."""
    dy = rng(0).standard_t(freedom, (512, 256)).astype(np.float32)
    x, w = normal(1, 512, 512), normal(2, 512, 256) / 22
    f = functools.partial(jaxfp8.linear, recipe=jaxfp8.Recipe(**recipe))
    _, dx, dw = errors(x, w, dy, f)
    assert max(dx, dw) < ORDINARY * (2 if recipe else 1)  # E5M2 has a bit less


def test_small_gradients_beside_a_spike_are_lost_only_in_its_block():
    """One cotangent 10^6 times the others: its row of dx is coarse, and a block of its column of dw; no other."""
    dy = normal(0, 256, 256)
    dy[5, 7] = 1e6
    x, w = normal(1, 256, 128), normal(2, 256, 128).T.copy()
    f = jax.jit(train(jaxfp8.linear))
    dy0 = dy.copy()
    dy0[5, 7] = 0
    (_, dx, dw), (_, dx0, dw0) = f(x, w, dy), f(x, w, dy0)
    assert_same_bits(np.delete(dx, 5, 0), np.delete(dx0, 5, 0))
    assert_same_bits(np.delete(dw, 7, 1), np.delete(dw0, 7, 1))


# --- silence --------------------------------------------------------------------------------------

SIZES = np.int32([40, 0, 60, 28])


@pytest.mark.parametrize("what", ["w", "x", "dy"])
def test_an_expert_that_is_all_zero_is_zero_and_learns_what_it_should(what):
    x, dy, w = normal(0, 128, 128), normal(1, 128, 72), normal(2, 4, 128, 72)
    part = slice(40, 100)  # the third expert's tokens
    arrays = {"x": x, "w": w, "dy": dy}
    arrays[what][2 if what == "w" else part] = 0
    f = jax.jit(train(lambda x, w: jaxfp8.ragged_dot(x, w, SIZES)))
    y, dx, dw = map(np.asarray, f(**arrays))
    assert all(np.isfinite(v).all() for v in (y, dx, dw))
    assert y[part].any() == (what == "dy")
    assert dx[part].any() == (what == "x")
    assert dw[2].any() == (what == "w")
    assert not dw[1].any() and dw[0].any() and dw[3].any()


def test_a_batch_of_zeros_gives_zeros():
    x, w = np.zeros((128, 128), np.float32), normal(0, 128, 64)
    for v in jax.jit(train(jaxfp8.linear))(x, w, np.zeros((128, 64), np.float32)):
        np.testing.assert_array_equal(v, 0)


# --- training -------------------------------------------------------------------------------------


def model(params, x, sizes, product, ragged):
    h = jnp.tanh(product(x, params["first"]))
    h = h + jnp.tanh(ragged(h, params["experts"], sizes))
    return product(h, params["last"])


IMPLEMENTATIONS = {
    "fp8": (jaxfp8.linear, jaxfp8.ragged_dot),
    "float32": (jnp.dot, jax.lax.ragged_dot),
}


def loss(params, x, target, product, ragged):
    y = model(params, x, jnp.array([40, 0, 60, 28]), product, ragged)
    return jnp.mean((y - target) ** 2)


def parameters():
    shapes = {"first": (128, 128), "experts": (4, 128, 128), "last": (128, 16)}
    return {n: jnp.asarray(normal(i, *s)) / s[-2] ** 0.5 for i, (n, s) in enumerate(shapes.items())}


def batch(step, heavy=False):
    x = normal(step + 1000, 128, 128)
    target = np.tanh(x @ normal(7, 128, 16) / 11)
    if heavy:
        x, _ = with_outliers(step + 2000, 128, 128)
        target = target + 0.1 * rng(step).standard_t(2, target.shape).astype(np.float32)
    return x, target


@functools.cache
def stepper(kind, scale=1.0):
    """One step of Adam, skipped where a gradient is not finite."""
    optimizer = optax.apply_if_finite(optax.adam(3e-3), max_consecutive_errors=5)

    @jax.jit
    def step(params, state, x, target):
        value, grads = jax.value_and_grad(
            lambda p: scale * loss(p, x, target, *IMPLEMENTATIONS[kind])
        )(params)
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state, value / scale, grads

    return optimizer, step


def run(kind, steps, spike=None, heavy=False):
    """Losses of each step; `spike(step, x, target)` may change a batch."""
    optimizer, step = stepper(kind)
    params = parameters()
    state, losses, skipped = optimizer.init(params), [], []
    for i in range(steps):
        x, target = batch(i, heavy)
        if spike is not None:
            x, target = spike(i, x, target)
        before = params
        params, state, value, _ = step(params, state, x, target)
        losses.append(float(value))
        if int(state.total_notfinite) > len(skipped):
            skipped.append(i)
            assert_same_bits(params, before)
    return np.array(losses), skipped, params


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf], ids=str)
@pytest.mark.parametrize("where", ["x", "target"])
@pytest.mark.representatives(cases=2)
def test_a_spike_that_is_not_finite_is_seen_and_skipped_and_training_goes_on(bad, where):
    def spike(step, x, target):
        if step in (3, 4, 9):
            {"x": x, "target": target}[where][64, 5] = bad
        return x, target

    losses, skipped, params = run("fp8", 16, spike)
    assert skipped == [3, 4, 9]
    assert not np.isfinite(losses[skipped]).any()
    assert np.isfinite(np.delete(losses, skipped)).all()
    assert losses[-1] < 0.7 * losses[0]
    assert all(np.isfinite(v).all() for v in jax.tree.leaves(params))


def test_a_product_that_overflows_is_infinite_and_its_neighbours_are_not():
    """Nothing in FP8 saturates it out of sight."""
    x, w = np.ones((4, 128), np.float32), np.full((128, 16), 2, np.float32)
    x[1] = 3e38
    y = np.asarray(jaxfp8.linear(x, w))
    assert np.isposinf(y[1]).all()
    np.testing.assert_array_equal(np.delete(y, 1, 0), 256)


@pytest.mark.parametrize("exponent", [-60, 40])
def test_the_scale_of_a_loss_changes_no_bit_of_a_gradient(exponent):
    """Why there is no loss scaling: blocks follow their gradients, of any magnitude."""
    x, target = batch(0)
    scale = 2.0**exponent
    _, step = stepper("fp8", 1.0)
    _, scaled_step = stepper("fp8", scale)
    optimizer, _ = stepper("fp8")
    params = parameters()
    state = optimizer.init(params)
    grads, scaled = step(params, state, x, target)[3], scaled_step(params, state, x, target)[3]
    assert_same_bits(scaled, jax.tree.map(lambda g: g * np.float32(scale), grads))


@pytest.mark.parametrize("steps", [40, pytest.param(500, marks=pytest.mark.slow)])
def test_training_on_outliers_and_heavy_tails_follows_float32(steps):
    got, skipped, _ = run("fp8", steps, heavy=True)
    want, _, _ = run("float32", steps, heavy=True)
    assert not skipped and np.isfinite(got).all()
    last = slice(-steps // 4, None)
    assert abs(got[last].mean() / want[last].mean() - 1) < 0.02
    # The target's noise has no variance: the mean of 125 losses is that of its worst batch.
    assert np.median(want[last]) < 0.9 * np.median(want[: steps // 8])
