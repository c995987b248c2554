"""Weights quantized ahead of their products: once a step, and gathered in FP8."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import jaxfp8
from tests.programs import (
    assert_close,
    assert_same_bits,
    count,
    largest,
    rounded_to_fewer_bits,
    traffic,
    train,
    walk,
)

BF16 = jnp.bfloat16
RNG = np.random.default_rng(0)
SIZES = np.array([60, 0, 130, 40], np.int32)


def normal(*shape):
    return RNG.standard_normal(shape, np.float32)


X, W, DY = normal(256, 256), normal(256, 384) / 16, normal(256, 384)
EXPERTS = normal(4, 256, 384) / 16


def ragged(x, w):
    return jaxfp8.ragged_dot(x, w, SIZES)


PRODUCTS = {"linear": (jaxfp8.linear, W), "ragged_dot": (ragged, EXPERTS)}
SLOW = pytest.mark.slow
each_product = pytest.mark.parametrize("name", PRODUCTS)


# ------------------------------------------------------------------------------------------------
# prequantize
# ------------------------------------------------------------------------------------------------


OTHER = {"scale_format": "pow2", "grad_dtype": jnp.float8_e5m2}


@pytest.mark.parametrize(
    "name, recipe",
    [("linear", OTHER), ("ragged_dot", {}), pytest.param("ragged_dot", OTHER, marks=SLOW)],
)
def test_values_and_gradients_have_the_bits_of_the_plain_weights(name, recipe):
    f, w = PRODUCTS[name]
    with jaxfp8.Recipe(**recipe):
        want = jax.jit(train(f))(X, w, DY)
        got = jax.jit(train(lambda x, w: f(x, jaxfp8.prequantize(w))))(X, w, DY)
    assert_same_bits(got, want)


def test_the_weight_keeps_its_own_format_under_another_recipe():
    w = jaxfp8.prequantize(W, recipe=jaxfp8.Recipe(dtype=jnp.float8_e5m2))
    got = train(lambda x, w_: jaxfp8.linear(x, w.with_value(w_)))(X, W, DY)
    y = jaxfp8.gemm(jaxfp8.quantize(X), w.nt, out_dtype=jnp.float32)
    dx = jaxfp8.gemm(jaxfp8.quantize(DY), w.nn, out_dtype=jnp.float32)
    assert_same_bits(got[:2], (y, dx))


@each_product
def test_a_weight_quantized_before_is_read_only_for_its_type(name):
    f, w = PRODUCTS[name]
    quantized = jaxfp8.prequantize(w)
    run = jax.jit(train(lambda x, w: f(x, quantized.with_value(w))))
    empty = jnp.full_like(w, jnp.nan)
    want = jax.jit(train(f))(X, w, DY) if name == "linear" else run(X, w, DY)
    assert_same_bits(run(X, empty, DY), want)


@pytest.mark.parametrize(
    "remat", ["names", *[pytest.param(r, marks=SLOW) for r in (None, "everything")]]
)
def test_microbatches_and_layers_quantize_a_weight_once(remat):
    """Layers by scan, microbatches by scan, with gradients accumulated: one quantization a step, outside of both."""
    weights, batches = jnp.asarray(normal(2, 256, 256) / 16), jnp.asarray(normal(3, 128, 256))
    policy = {"names": jaxfp8.checkpoint_policies.save_fp8_residuals()}.get(remat)

    def loss(weights, x):
        def layer(x, w):
            return jnp.tanh(jaxfp8.linear(x, w)), None

        layer = layer if remat is None else jax.checkpoint(layer, policy=policy)
        return jnp.mean(jax.lax.scan(layer, x, weights)[0] ** 2)

    def step(weights, batches, once):
        quantized = jaxfp8.prequantize(weights)

        def objective(weights, x):
            return loss(quantized.with_value(weights) if once else weights, x)

        def accumulate(grads, x):
            return grads + jax.grad(objective)(weights, x), None

        return jax.lax.scan(accumulate, jnp.zeros_like(weights), batches)[0]

    once = jax.make_jaxpr(functools.partial(step, once=True))(weights, batches)
    assert count(once, "quantize_weight") == 1
    assert "float8_e4m3fn" not in rounded_to_fewer_bits(once)
    run = jax.jit(step, static_argnames="once")
    assert_same_bits(run(weights, batches, True), run(weights, batches, False))


def test_vmapped_weights_and_shared_weights():
    x, w, dy = normal(3, 128, 256), normal(3, 256, 128) / 16, normal(3, 128, 128)
    plain, ahead = jaxfp8.linear, lambda x, w: jaxfp8.linear(x, jaxfp8.prequantize(w))
    assert_same_bits(train(jax.vmap(ahead))(x, w, dy), train(jax.vmap(plain))(x, w, dy))

    quantized = jaxfp8.prequantize(w)  # mapped ahead of its products
    got = jax.vmap(train(lambda x, w: jaxfp8.linear(x, w)), (0, 0, 0))(x, quantized, dy)
    want = jax.vmap(train(plain))(x, w, dy)
    assert_same_bits((got[0], got[1], got[2].value), want)

    shared = jaxfp8.prequantize(w[0])
    f = jax.vmap(lambda x, w: jaxfp8.linear(x, shared.with_value(w)), (0, None))
    want = train(jax.vmap(plain, (0, None)))(x, w[0], dy)
    assert_same_bits(train(f)(x, w[0], dy), want)


def test_what_does_not_fit_is_named():
    w = jaxfp8.prequantize(W)
    with pytest.raises(ValueError, match=r"with_value: value has shape \(2, 2\); allowed: \(256"):
        w.with_value(jnp.zeros((2, 2)))
    with pytest.raises(TypeError, match="with_value: value has dtype bfloat16; allowed: float32"):
        w.with_value(jnp.zeros(W.shape, BF16))
    with pytest.raises(TypeError, match="dot_general: rhs is a QuantizedWeight; allowed: an array"):
        jaxfp8.dot_general(X, w, (((1,), (0,)), ((), ())))
    with pytest.raises(ValueError, match=r"linear: w has shape \(4, 256, 384\); allowed: \(K, N\)"):
        jaxfp8.linear(X, jaxfp8.prequantize(EXPERTS))
    with pytest.raises(ValueError, match="linear: w.nt.scale has shape"):
        jaxfp8.linear(X, jax.tree.map(lambda v: v, w).__class__(W, w.bits_nt, w.bits_nn, X))
    swapped = jaxfp8.QuantizedWeight(W, w.bits_nn, w.bits_nt, w.scale.T)
    with pytest.raises(ValueError, match="linear: w has copies of shapes"):
        jaxfp8.linear(X, swapped)


# ------------------------------------------------------------------------------------------------
# all_gather_weight: FSDP in shard_map
# ------------------------------------------------------------------------------------------------

MESHES = {
    "2": ((2,), ("d",)),
    "4": ((4,), ("d",)),
    "2x2": ((2, 2), ("d", "t")),
    "4x2": ((4, 2), ("d", "t")),
}


def mesh_of(name, axis_type=AxisType.Auto):
    shape, axes = MESHES[name]
    return jax.make_mesh(
        shape, axes, devices=jax.devices()[: np.prod(shape)], axis_types=(axis_type,) * len(axes)
    )


LAYERS, WIDTH = 2, 512
MODEL = normal(LAYERS, WIDTH, WIDTH) / 24
BATCH, TARGET = normal(512, WIDTH), normal(512, WIDTH)


def loss_of(weights, x, target, matmul):
    def layer(x, w):
        return jnp.tanh(matmul(x, w)), None

    y, _ = jax.lax.scan(jax.checkpoint(layer, policy=POLICY), x, weights)
    return jnp.mean((y - target).astype(jnp.float32) ** 2)


POLICY = jaxfp8.checkpoint_policies.save_fp8_residuals()


def fsdp(mesh, axis, matmul, dtype=jnp.float32):
    """Loss and gradients; the batch and one axis of each weight are cut over d."""
    spec = [None, None, None]
    spec[axis] = "d"

    def local(weights, x, target):
        loss, grads = jax.value_and_grad(loss_of)(weights, x, target, matmul)
        devices = jax.lax.axis_size("d")
        return jax.lax.pmean(loss, "d"), grads / devices

    return jax.jit(
        jax.shard_map(
            local,
            mesh=mesh,
            in_specs=(P(*spec), P("d"), P("d")),
            out_specs=(P(), P(*spec)),
        )
    )


def fp8_matmul(axis):
    return lambda x, w: jaxfp8.linear(x, jaxfp8.all_gather_weight(w, "d", axis=axis))


def bf16_matmul(axis):
    def matmul(x, w):
        whole = jax.lax.all_gather(w.astype(BF16), "d", axis=axis % 2, tiled=True)
        return jnp.dot(x, whole, preferred_element_type=jnp.float32).astype(x.dtype)

    return matmul


@pytest.mark.parametrize(
    "name, axis",
    [("4", -2), ("4x2", -1), *[pytest.param(*c, marks=SLOW) for c in (("2", -1), ("2x2", -2))]],
)
@pytest.mark.representatives()
def test_gathered_weights_train_as_whole_ones(name, axis):
    """Two layers by scan, under remat. Only the sum over devices of loss and gradients has another order."""
    want = jax.jit(jax.value_and_grad(loss_of), static_argnums=3)(
        MODEL, BATCH, TARGET, jaxfp8.linear
    )
    got = fsdp(mesh_of(name), axis, fp8_matmul(axis))(MODEL, BATCH, TARGET)
    assert_close(got, want, 1e-6)


@pytest.mark.parametrize("axis", [-1, pytest.param(-2, marks=SLOW)])
def test_only_fp8_is_gathered_and_half_the_bytes_of_bf16(axis):
    mesh = mesh_of("4")
    arrays = MODEL, BATCH, TARGET
    fp8 = traffic(fsdp(mesh, axis, fp8_matmul(axis)).lower(*arrays).compile().as_text())
    bf16 = traffic(fsdp(mesh, axis, bf16_matmul(axis)).lower(*arrays).compile().as_text())

    gathers = [m for m in fp8 if m.kind == "all-gather"]
    assert all(m.dtype == "u8" or m.elements == WIDTH * WIDTH / 128**2 for m in gathers), gathers
    assert sum(m.dtype == "u8" for m in gathers) == 2  # forward, and again under remat
    assert [m.dtype for m in fp8 if m.kind == "reduce-scatter"] == ["f32"]
    assert {m.kind for m in fp8} == {"all-gather", "reduce-scatter", "all-reduce"}

    baseline = [m for m in bf16 if m.kind == "all-gather"]
    assert len(baseline) == 2
    ratio = sum(m.bytes for m in gathers) / sum(2 * m.elements for m in baseline)
    assert ratio <= 0.55, ratio


def test_gathered_weights_are_not_kept_for_the_backward_pass():
    mesh = mesh_of("4")
    step = fsdp(mesh, -1, fp8_matmul(-1))
    jaxpr = jax.make_jaxpr(step)(MODEL, BATCH, TARGET)
    scans = [e for e in walk(jaxpr) if e.primitive.name == "scan"]
    stacked = [v.aval for e in scans for v in e.outvars if v.aval.shape[:1] == (LAYERS,)]
    assert stacked
    assert all(v.size < LAYERS * WIDTH * WIDTH for v in stacked)
    assert largest(jaxpr) <= LAYERS * WIDTH * WIDTH


def test_experts_are_gathered_over_any_axis():
    def f(by_expert, by_k):
        return [
            jaxfp8.all_gather_weight(w, "d", axis=axis) for w, axis in ((by_expert, 0), (by_k, -2))
        ]

    mesh = mesh_of("2")
    specs = P("d"), P(None, "d")
    gathered = jax.shard_map(f, mesh=mesh, in_specs=specs, out_specs=P(), check_vma=False)
    want = jax.jit(jaxfp8.prequantize)(EXPERTS)
    assert_same_bits(jax.jit(gathered)(EXPERTS, EXPERTS), [want, want])


def test_a_gather_of_quantized_shards_that_cut_blocks_is_refused():
    f = jax.shard_map(
        lambda w: jaxfp8.all_gather_weight(jaxfp8.prequantize(w), "d", axis=-1).bits_nn,
        mesh=mesh_of("2"),
        in_specs=P(None, "d"),
        out_specs=P(),
        check_vma=False,
    )
    message = r"N=192 on each of 2 devices, which cuts blocks of 128 whose scales a QuantizedWeight has already"
    with pytest.raises(ValueError, match=message):
        f(W)
