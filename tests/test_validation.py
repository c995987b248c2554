"""What FP8 does to arrays, losses and gradients is found and named."""

import functools
import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxfp8
from jaxfp8.kernels import activation
from jaxfp8.testing import assert_fp8_close
from tests import oracle
from tests.frameworks import normal

SEPARATE = [0.02, 0.06]  # the error of one product of normal data, in its bounds


def f32(seed, *shape):
    return normal(seed, *shape, dtype=jnp.float32)


def test_the_report_is_what_numpy_computes():
    x = np.array(f32(0, 40, 256))
    x[3, :5] = 1e-7  # underflow beside values around 1
    x[7, 0] = np.nan
    tree = {"w": jnp.asarray(x), "step": jnp.int32(3), "bias": jnp.zeros(8)}
    report = jaxfp8.validate.quantization_report(tree)
    zero, leaf = report.leaves
    assert (zero.path, zero.snr_db, zero.saturated, zero.underflowed) == ("bias", np.inf, 0, 0)
    q = jaxfp8.quantize(x)
    value, data = oracle.dequantize(q), np.asarray(q.data).astype(np.float64)
    fine = np.isfinite(value)
    noise = ((x[fine].astype(np.float64) - value[fine]) ** 2).sum()
    assert leaf.snr_db == pytest.approx(
        10 * np.log10((x[fine].astype(np.float64) ** 2).sum() / noise), rel=1e-6
    )
    assert 25 < leaf.snr_db < 35
    assert leaf.saturated == (np.abs(data[fine]) == 448).mean() >= 1 / 128
    assert leaf.underflowed == ((data == 0) & (x != 0))[fine].sum() / fine.sum() >= 5 / fine.sum()
    assert leaf.non_finite == 1 and leaf.shape == (40, 256)
    assert report.worst == leaf and "w" in str(report) and "SNR" in str(report)


def test_a_vector_is_dequantized():
    x = f32(0, 200)
    q = jaxfp8.quantize(x)
    oracle.assert_close(q.dequantize(), oracle.dequantize(q), 1e-7)


def test_the_report_follows_block_and_recipe():
    x = f32(0, 256, 256).at[0, 0].set(1e6)
    rows = jaxfp8.validate.quantization_report(x)
    square = jaxfp8.validate.quantization_report(x, (128, 128))
    e5m2 = jaxfp8.validate.quantization_report(x, recipe=jaxfp8.Recipe(dtype=jnp.float8_e5m2))
    assert rows.worst.underflowed < square.worst.underflowed  # one outlier costs a block
    assert e5m2.worst.underflowed < rows.worst.underflowed
    with pytest.raises(ValueError, match="each floating-point array of .* is empty"):
        jaxfp8.validate.quantization_report({"w": jnp.zeros((0, 128)), "steps": jnp.arange(3)})
    with pytest.raises(ValueError, match="no floating-point array of 2 or more axes"):
        jaxfp8.validate.quantization_report({"bias": jnp.ones(4)}, (128, 128))


def test_assert_fp8_close_passes_what_fp8_gives_and_no_more():
    x, w = f32(0, 72, 256), f32(1, 256, 128)
    want = {"y": x @ w, "again": [x @ w]}
    got = {"y": jaxfp8.linear(x, w), "again": [jaxfp8.linear(x, w)]}
    assert_fp8_close(got, want)
    with pytest.raises(AssertionError, match=r"\['y'\] is .* off, norm-wise; allowed: 0.01"):
        assert_fp8_close({**got, "again": want["again"]}, want, rtol=0.01)
    with pytest.raises(AssertionError, match="is 0.1 off.*at \\(3, 5\\): 0, expected 1"):
        assert_fp8_close(jnp.ones((10, 10)).at[3, 5].set(0), jnp.ones((10, 10)))
    with pytest.raises(AssertionError, match="1 of 4 elements of actual are not finite"):
        assert_fp8_close(jnp.array([1, jnp.nan, 1, 1]), jnp.ones(4))
    with pytest.raises(AssertionError, match="1 of 4 elements of expected are not finite"):
        assert_fp8_close(jnp.ones(4), jnp.array([1, jnp.inf, 1, 1]))
    with pytest.raises(AssertionError, match="shape"):
        assert_fp8_close(jnp.ones(4), jnp.ones((4, 1)))
    with pytest.raises(AssertionError, match="structures differ"):
        assert_fp8_close([jnp.ones(4)], jnp.ones(4))


def parameters():
    shapes = {"first": (128, 256), "second": (256, 128), "third": (128, 64)}
    return {n: f32(i, *s) / s[0] ** 0.5 for i, (n, s) in enumerate(shapes.items())}


def model(params, x, spikes=1.0):
    h = jnp.tanh(jaxfp8.linear(x, params["first"]))
    h = jax.jit(lambda h: h * jnp.where(jnp.arange(256) % 128 == 0, spikes, 1.0))(h)
    h = jnp.tanh(jaxfp8.linear(h, params["second"]))
    return jnp.mean(jaxfp8.linear(h, params["third"]) ** 2)


def test_comparison_of_a_healthy_model(tmp_path):
    params, x = parameters(), f32(9, 72, 128)
    found = jaxfp8.validate.compare(model, params, x)
    assert [p.shape for p in found.products] == [(72, 128, 256), (72, 256, 128), (72, 128, 64)]
    for product in found.products:
        for error in (product.forward, product.wgrad):
            assert SEPARATE[0] < error < SEPARATE[1]
    assert found.products[0].name.startswith("0: test_validation.py:")

    def reference(params, x):
        h = jnp.tanh(x @ params["first"])
        h = jnp.tanh(h @ params["second"])
        return jnp.mean((h @ params["third"]) ** 2)

    loss, grads = jax.value_and_grad(reference)(params, x)
    np.testing.assert_allclose(found.reference_loss, loss, rtol=1e-5)
    assert found.loss == float(jax.jit(model)(params, x)) != found.reference_loss
    for g, want in zip(found.gradients, jax.tree.leaves(grads), strict=True):
        np.testing.assert_allclose(g.reference_norm, np.linalg.norm(want), rtol=1e-4)
        assert 0.01 < g.error < 0.2 and g.cosine > 0.98
    assert [g.path for g in found.gradients] == ["first", "second", "third"]
    assert all(name in str(found) for name in ("first", "wgrad", "loss", "72x128x256"))
    figure = found.plot(tmp_path / "comparison.png")
    assert len(figure.axes) == 2 and (tmp_path / "comparison.png").stat().st_size > 10_000


def test_the_layer_that_suffers_is_found():
    params = parameters()
    # One input in 128 is a million times the others, and its weights are zero: what counts underflows beside it.
    params["second"] = params["second"].at[jnp.arange(256) % 128 == 0].set(0)
    found = jaxfp8.validate.compare(lambda p, x: model(p, x, 1e6), params, f32(9, 72, 128))
    worst = found.worst_product
    assert worst is found.products[1] and worst.forward > 0.5
    assert all(p.forward < SEPARATE[1] for p in found.products if p is not worst)


@pytest.mark.slow
def test_comparison_through_scan_remat_vmap_weights_quantized_ahead_and_experts():
    stack = f32(0, 3, 128, 128) / 11
    experts = f32(1, 4, 128, 72) / 11
    sizes = jnp.array([20, 0, 47, 5])

    def loss(params, x):
        @jax.checkpoint
        def layer(h, w):
            return jax.vmap(lambda row: jnp.tanh(jaxfp8.linear(row, w)))(h), None

        h, _ = jax.lax.scan(layer, x, params["stack"])
        h = jnp.tanh(jaxfp8.linear(h, jaxfp8.prequantize(params["ahead"])))
        return jnp.mean(jaxfp8.ragged_dot(h, params["experts"], sizes) ** 2)

    params = {"ahead": f32(2, 128, 128) / 11, "stack": stack, "experts": experts}
    found = jaxfp8.validate.compare(loss, params, f32(9, 72, 128))
    assert [p.shape for p in found.products] == [(72, 128, 128)] * 2 + [(72, 128, 72)]
    assert all(SEPARATE[0] < p.forward < SEPARATE[1] for p in found.products)
    assert all(g.error < 0.25 for g in found.gradients)


def test_a_comparison_leaves_no_trace_and_needs_a_product():
    params, x = parameters(), f32(9, 72, 128)
    f = jax.jit(model)
    before = f(params, x)
    with pytest.raises(ValueError, match="no FP8 product"):
        jaxfp8.validate.compare(lambda p, x: jnp.sum(x @ p["first"]), params, x)
    assert f(params, x) == before == jax.jit(lambda p, x: model(p, x))(params, x)


def mlp_of(params, x):
    return jaxfp8.mlp(x, params["up"], params["down"])


def jnp_mlp(params, x):
    gate, up = jnp.moveaxis(jnp.einsum("mk,khf->mhf", x, params["up"]), 1, 0)
    return (jax.nn.silu(gate) * up) @ params["down"]


def test_an_mlp_is_compared_as_its_two_products():
    params = {"up": f32(0, 128, 2, 256) / 11, "down": f32(1, 256, 72) / 16}
    x = f32(9, 72, 128)

    def loss(f):
        return lambda params, x: jnp.mean(jnp.tanh(f(params, x)) ** 2)

    found = jaxfp8.validate.compare(loss(mlp_of), params, x)
    assert [p.shape for p in found.products] == [(72, 128, 512), (72, 256, 72)]
    assert [p.name.split(", ")[1] for p in found.products] == ["w_up", "w_down"]
    assert found.products[0].name.startswith("0: test_validation.py:")
    for product in found.products:
        for error in (product.forward, product.dgrad, product.wgrad):
            assert SEPARATE[0] < error < SEPARATE[1]
    want, grads = jax.value_and_grad(loss(jnp_mlp))(params, x)
    np.testing.assert_allclose(found.reference_loss, want, rtol=1e-5)
    assert abs(found.relative_loss_difference) > 1e-4
    for g, like in zip(found.gradients, jax.tree.leaves(grads), strict=True):
        np.testing.assert_allclose(g.reference_norm, np.linalg.norm(like), rtol=1e-4)
        assert 0.01 < g.error < 0.2


@pytest.mark.slow
@pytest.mark.parametrize(
    ("gated", "ahead"), [(True, "none"), (True, "both"), (False, "up"), (False, "down")]
)
def test_experts_and_weights_quantized_ahead_are_compared(gated, ahead):
    """Under vmap of an MLP in a scan with remat, then experts: each as plain JAX computes it."""
    halves = (2,) if gated else ()
    params = {
        "up": f32(0, 2, 128, *halves, 128) / 11,
        "down": f32(1, 2, 128, 128) / 11,
        "experts up": f32(2, 3, 128, *halves, 128) / 11,
        "experts down": f32(3, 3, 128, 72) / 11,
    }
    sizes = jnp.array([20, 0, 47])

    def loss(ours, params, x):
        def weights(up, down):
            if ours and ahead in ("up", "both"):
                up = jaxfp8.prequantize(up.reshape(*up.shape[: -2 if gated else -1], -1))
            if ours and ahead in ("down", "both"):
                down = jaxfp8.prequantize(down)
            return up, down

        def plain(x, up, down):
            h = jnp.tensordot(x, up, 1)
            h = jax.nn.gelu(h[..., 0, :]) * h[..., 1, :] if gated else jax.nn.gelu(h)
            return h @ down

        def dense(x, up, down):
            if not ours:
                return plain(x, up, down)
            up, down = weights(up, down)
            return jax.vmap(lambda row: jaxfp8.mlp(row, up, down, activation="gelu"))(x)

        @jax.checkpoint
        def layer(h, w):
            return jnp.tanh(dense(h, *w)), None

        h, _ = jax.lax.scan(layer, x, (params["up"], params["down"]))
        up, down = params["experts up"], params["experts down"]
        if ours:
            y = jaxfp8.ragged_mlp(h, *weights(up, down), sizes, activation="gelu")
        else:
            each = jnp.split(h[:67], [20, 20])
            y = jnp.concatenate([plain(h, *w) for h, *w in zip(each, up, down, strict=True)])
            y = jnp.pad(y, ((0, 5), (0, 0)))
        return jnp.mean(y**2)

    x = f32(9, 72, 128)
    found = jaxfp8.validate.compare(functools.partial(loss, True), params, x)
    up = 128 * (1 + gated)
    assert [p.shape for p in found.products] == [(72, 128, n) for n in (up, 128, up, 72)]
    assert all(SEPARATE[0] < p.forward < SEPARATE[1] for p in found.products)
    want, grads = jax.value_and_grad(functools.partial(loss, False))(params, x)
    np.testing.assert_allclose(found.reference_loss, want, rtol=1e-4)
    for g, like in zip(found.gradients, jax.tree.leaves(grads), strict=True):
        np.testing.assert_allclose(g.reference_norm, np.linalg.norm(like), rtol=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("flags", [[], ["--moe"]], ids=["dense", "mixture"])
def test_the_language_model_of_the_examples_is_compared(flags):
    sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1] / "examples"))
    import _lm_model
    import _lm_products
    import train_lm
    from _lm_parallel import ONE_DEVICE

    settings, _ = train_lm.parse_arguments(["--tiny", *flags])
    products = _lm_products.fp8_products(settings.recipe)
    windows = np.random.default_rng(0).integers(0, 256, (2, settings.sequence + 1), np.int32)
    params = _lm_model.init(settings.model, jax.random.key(0))

    def loss(params, windows):
        return _lm_model.losses(params, windows, settings.model, products, ONE_DEVICE)[0]

    found = jaxfp8.validate.compare(loss, params, windows)
    assert len(found.products) == 4  # qkv, out, gate and up, down of the layers' scan
    assert found.worst_product.largest < SEPARATE[1]
    assert abs(found.relative_loss_difference) < 1e-3
    bf16 = _lm_products.bf16_products()
    plain = _lm_model.losses(params, windows, settings.model, bf16, ONE_DEVICE)[0]
    np.testing.assert_allclose(found.reference_loss, plain, rtol=1e-3)


def test_an_operation_without_a_reference_is_not_compared_with_itself():
    x, w = f32(0, 24, 128), jaxfp8.quantize(f32(1, 128, 128), (128, 128))

    def loss(params, x):
        q = jaxfp8.quantize(jax.lax.stop_gradient(x))
        return jnp.sum(jaxfp8.linear(x, params) * jaxfp8.gemm(q, w))

    with pytest.raises(NotImplementedError, match="loss_fn calls quantize_rows; implemented: lin"):
        jaxfp8.validate.compare(loss, f32(3, 128, 128), x)


@pytest.mark.slow
def test_copies_of_a_weight_that_no_product_reads_are_not_taken_for_exact():
    """Else what a model does with them would be in FP8 on both sides."""

    def loss(params, x):
        _, nn = jaxfp8.quantize_weight(jax.lax.stop_gradient(params))
        return jnp.sum(jaxfp8.linear(x, params) * (x @ nn.dequantize()))

    found = jaxfp8.validate.compare(loss, f32(3, 128, 128), f32(0, 24, 128))
    assert np.isfinite(found.loss) and np.isnan(found.reference_loss)


def test_every_activation_is_known_in_all_places_that_need_it():
    known = set(activation.ACTIVATIONS)
    for table in (activation._LINEAR, activation._CUBIC, jaxfp8.validate._ACTIVATIONS):
        assert set(table) == known


@pytest.mark.parametrize(
    "ahead", [False, pytest.param(True, marks=pytest.mark.full)], ids=["weights", "quantized ahead"]
)
def test_a_mixture_is_compared_with_its_products_in_the_operands_type(ahead):
    """By both of its ragged products; of tokens of which some have no expert, also under vmap."""
    params = {"up": f32(1, 3, 128, 2, 128) / 12, "down": f32(2, 3, 128, 72) / 12}
    params["gate"] = np.abs(f32(3, 96, 2))
    expert = np.stack([np.arange(96) % 3, np.arange(96) % 4], 1)

    def ours(params, x):
        up, down = params["up"], params["down"]
        if ahead:
            up, down = jaxfp8.prequantize(up.reshape(3, 128, 256)), jaxfp8.prequantize(down)
        parts = (v.reshape(2, 48, -1) for v in (x, jnp.asarray(expert), params["gate"]))
        return jnp.mean(jax.vmap(lambda *a: jaxfp8.moe(*a, up, down))(*parts) ** 2)

    def plain(params, x):
        h = jnp.einsum("tk,gkhf->gthf", x, params["up"])
        each = jnp.einsum("gtf,gfn->gtn", jax.nn.silu(h[:, :, 0]) * h[:, :, 1], params["down"])
        weight = (params["gate"][..., None] * (expert[..., None] == np.arange(3))).sum(1)
        return jnp.mean(jnp.einsum("tg,gtn->tn", weight, each) ** 2)

    x = f32(4, 96, 128)
    found = jaxfp8.validate.compare(ours, params, x)
    assert [p.shape[1:] for p in found.products] == [(128, 256), (128, 72)]
    assert all(SEPARATE[0] < p.forward < SEPARATE[1] for p in found.products)
    want, grads = jax.value_and_grad(plain)(params, x)
    np.testing.assert_allclose(found.reference_loss, want, rtol=1e-4)
    for g, like in zip(found.gradients, jax.tree.leaves(grads), strict=True):
        np.testing.assert_allclose(g.reference_norm, np.linalg.norm(like), rtol=1e-3)
