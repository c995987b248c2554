"""Weights that are FP8 alone: no gradient for them, that of the activations passes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxfp8
from tests import oracle_gradients as og
from tests import oracle_mlp
from tests import oracle_quantize as oq
from tests.programs import assert_close, assert_same_bits, walk

RNG = np.random.default_rng(27)
SIZES = np.array([60, 0, 130, 40], np.int32)
SQUARE = (128, 128)


def normal(*shape):
    return RNG.standard_normal(shape, np.float32)


def published(*shape):
    """A weight (..., N, K) and its values in float64."""
    q = jaxfp8.quantize(normal(*shape) / 16, block=SQUARE)
    data, scale = np.asarray(q.data), np.asarray(q.scale)
    return q, oq.dequantize(data, scale, SQUARE).astype(np.float64)


def as_weight(q):
    """The QuantizedWeight without value of an operand (..., N, K)."""
    bits = jax.lax.bitcast_convert_type(q.data, jnp.uint8)
    return jaxfp8.QuantizedWeight(None, bits, None, jnp.swapaxes(q.scale, -1, -2), q.dtype)


def run(f, x, w, dy):
    y, pull = jax.vjp(lambda x: f(x, w), x)
    return y, *pull(dy)


def dense_case(n, k, m=200):
    q, values = published(n, k)
    x, dy = normal(m, k), normal(m, n)
    return q, x, dy, (og.rows(x) @ values.T, og.rows(dy) @ values)


SPELLINGS = {
    "linear": (jaxfp8.linear, False),
    "linear of a QuantizedWeight": (jaxfp8.linear, True),
    "dot_general": (lambda x, w: jaxfp8.dot_general(x, w, (((1,), (1,)), ((), ()))), False),
    "dot_general of a QuantizedWeight": (
        lambda x, w: jaxfp8.dot_general(x, w, (((1,), (0,)), ((), ()))),
        True,
    ),
    "einsum": (lambda x, w: jaxfp8.einsum("mk,nk->mn", x, w), False),
    "einsum of a QuantizedWeight": (lambda x, w: jaxfp8.einsum("mk,kn->mn", x, w), True),
}


@pytest.mark.parametrize("shape", [(256, 384), (200, 304)])
@pytest.mark.parametrize("name", SPELLINGS)
def test_the_product_and_the_gradient_of_x_are_those_of_the_weights_numbers(name, shape):
    f, wrapped = SPELLINGS[name]
    q, x, dy, want = dense_case(*shape)
    got = jax.jit(lambda x, w, dy: run(f, x, w, dy))(x, as_weight(q) if wrapped else q, dy)
    for a, b in zip(got, want, strict=True):
        assert_close(a, b, 1e-5)


def test_blocks_of_a_weight_that_lies_the_other_way_are_transposed():
    q, values = published(200, 304)
    x = normal(64, 200)
    got = jaxfp8.dot_general(x, q, (((1,), (0,)), ((), ())))
    assert_close(got, og.rows(x) @ values, 1e-5)
    got = jaxfp8.einsum("mk,nk->mn", x, as_weight(q))
    assert_close(got, og.rows(x) @ values, 1e-5)


def test_a_batch_of_weights():
    q, values = published(3, 200, 256)
    x = normal(3, 64, 256)
    got = jaxfp8.einsum("gmk,gnk->gmn", x, q)
    assert_close(got, np.stack([og.rows(a) @ v.T for a, v in zip(x, values, strict=True)]), 1e-5)
    assert_close(jax.vmap(jaxfp8.linear)(x, q), got, 1e-6)


@pytest.mark.parametrize("wrapped", [False, True])
def test_experts(wrapped):
    q, values = published(4, 200, 256)
    x, dy = normal(256, 256), normal(256, 200)
    w = as_weight(q) if wrapped else q
    got = jax.jit(lambda x, w, dy: run(lambda x, w: jaxfp8.ragged_dot(x, w, SIZES), x, w, dy))(
        x, w, dy
    )
    y, dx, at = np.zeros((256, 200)), np.zeros((256, 256)), 0
    for size, v in zip(SIZES, values, strict=True):
        part = slice(at, at + size)
        y[part], dx[part] = og.rows(x)[part] @ v.T, og.rows(dy)[part] @ v
        at += size
    assert_close(got[0], y, 1e-5)
    assert_close(got[1], dx, 1e-5)


def test_it_has_the_numbers_of_the_weight_that_it_was_quantized_from():
    x, w, dy = normal(128, 256), normal(256, 384) / 16, normal(128, 384)
    want = run(jaxfp8.linear, x, w, dy)
    frozen = jaxfp8.prequantize(w, frozen=True)
    assert frozen.shape == w.shape and frozen.value is None and frozen.bits_nn is None
    assert_same_bits(run(jaxfp8.linear, x, frozen, dy), want)
    assert sum(leaf.nbytes for leaf in jax.tree.leaves(frozen)) <= 1.03 * w.size


def test_adapters_train_over_a_base_of_one_byte():
    """LoRA: gradients of both factors and of x; nothing quantizes the base or makes a gradient of it."""
    q, values = published(256, 256)
    x, a, b = normal(128, 256), normal(256, 8) / 16, normal(8, 256)

    def loss(adapter, w, x):
        y = jaxfp8.linear(jaxfp8.linear(x, w) + x @ adapter[0] @ adapter[1], w)
        return jnp.sum(y)

    grads = jax.jit(jax.grad(loss))((a, b), q, x)
    dy = og.rows(np.ones((128, 256), np.float32)) @ values
    assert_close(grads[0], x.astype(np.float64).T @ dy @ b.T.astype(np.float64), 1e-5)
    assert_close(grads[1], (x.astype(np.float64) @ a).T @ dy, 1e-5)
    names = {e.primitive.name for e in walk(jax.make_jaxpr(jax.grad(loss))((a, b), q, x))}
    assert any("quantize_rows" in n for n in names)
    assert not any("quantize_weight" in n or "both" in n or "wgrad" in n for n in names)


def test_layers_pass_through_scan_and_remat():
    """The largest FP8 value is no infinity there, as it would be where remat rounds it."""
    q, _ = published(3, 256, 256)
    x = normal(64, 256)

    def loss(x, q, remat):
        def layer(x, w):
            return jnp.tanh(jaxfp8.linear(x, w)), None

        return jnp.sum(jax.lax.scan(jax.checkpoint(layer) if remat else layer, x, q)[0])

    grads = [jax.jit(jax.grad(loss), static_argnums=2)(x, q, remat) for remat in (False, True)]
    assert np.isfinite(grads[0]).all() and np.any(grads[0])
    assert_same_bits(grads[1], grads[0])


@pytest.mark.parametrize("spec", [P("a", None), P(None, "a"), P("a", "b")])
def test_a_sharded_weight(spec):
    q, x, dy, want = dense_case(512, 512)
    mesh = jax.make_mesh((2, 2), ("a", "b"), axis_types=(AxisType.Auto,) * 2)
    q = jax.device_put(q, NamedSharding(mesh, spec))
    got = jax.jit(lambda x, w, dy: run(jaxfp8.linear, x, w, dy))(x, q, dy)
    for a, b in zip(got, want, strict=True):
        assert_close(a, b, 1e-5)


def test_a_second_derivative_is_refused():
    q, x, _, _ = dense_case(128, 128, 16)
    with pytest.raises(NotImplementedError, match="first derivatives only"):
        jax.grad(lambda x: jnp.sum(jax.grad(lambda x: jnp.sum(jaxfp8.linear(x, q) ** 2))(x)))(x)


def _rows(q):
    return jaxfp8.quantize(q.dequantize())


REFUSED = {
    "blocks of 1x128": (lambda q: jaxfp8.linear(normal(4, 256), _rows(q)), "w has blocks of 1x128"),
    "another K": (lambda q: jaxfp8.linear(normal(4, 128), q), "w has K=256 but x has K=128"),
    "a bias of K": (lambda q: jaxfp8.linear(normal(4, 256), q, normal(256)), "b has N=256"),
    "three axes": (
        lambda q: jaxfp8.linear(normal(4, 256), jax.tree.map(lambda v: v[None], q)),
        r"allowed: \(N, K\)",
    ),
    "two free axes": (
        lambda q: jaxfp8.einsum("mk,gnk->mgn", normal(4, 256), jax.tree.map(lambda v: v[None], q)),
        "rhs is FP8 alone",
    ),
    "a label of rhs alone": (lambda q: jaxfp8.einsum("mk,nk->m", normal(4, 256), q), "rhs alone"),
    "a second orientation without value": (
        lambda q: jaxfp8.linear(
            normal(4, 256),
            jaxfp8.QuantizedWeight(
                None, q.data.view(jnp.uint8), q.data.view(jnp.uint8).T, q.scale.T
            ),
        ),
        "bits_nn but no value",
    ),
    "groups": (
        lambda q: jaxfp8.ragged_dot(normal(4, 256), jax.tree.map(lambda v: v[None], q), SIZES),
        "4 entries but rhs has 1 groups",
    ),
    "a value for it": (lambda q: as_weight(q).with_value(normal(256, 384)), "the weight is frozen"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_fit_is_refused_by_name(case):
    call, words = REFUSED[case]
    with pytest.raises((ValueError, TypeError), match=words):
        call(published(384, 256)[0])


# ------------------------------------------------------------------------------------------------
# MLPs and mixtures
# ------------------------------------------------------------------------------------------------


def mlp_case(groups=(), gated=True):
    """Weights (..., K, [2,] F) and (..., F, N) in high precision, and the same in FP8 alone."""
    up, down = oracle_mlp.weights(256, 128, 384, gated, groups)
    flat = up.reshape(*up.shape[: len(groups) + 1], -1)
    frozen = [jaxfp8.quantize(jnp.swapaxes(jnp.asarray(w), -1, -2), SQUARE) for w in (flat, down)]
    return up, down, frozen


@pytest.mark.parametrize("gated", [False, True])
def test_an_mlp_is_that_of_the_weights_numbers(gated):
    up, down, frozen = mlp_case(gated=gated)
    x, dy = oracle_mlp.tokens(200, 256, 384)
    want = oracle_mlp.reference(x, up, down, dy, "silu")[:2]
    got = jax.jit(lambda x, dy, w: run(lambda x, w: jaxfp8.mlp(x, *w), x, w, dy))(x, dy, frozen)
    for a, b in zip(got, want, strict=True):
        assert_close(a, b, oracle_mlp.FLIPS)
    wrapped = [as_weight(q) for q in frozen]
    assert_same_bits(jaxfp8.mlp(x, *wrapped), jaxfp8.mlp(x, *frozen))


def test_experts_mlps_are_those_of_the_weights_numbers():
    up, down, frozen = mlp_case((4,))
    x, dy = oracle_mlp.tokens(256, 256, 384)
    want = oracle_mlp.ragged_reference(x, up, down, dy, SIZES, "silu")[:2]
    f = lambda x, w: jaxfp8.ragged_mlp(x, *w, SIZES)  # noqa: E731
    got = jax.jit(lambda x, dy, w: run(f, x, w, dy))(x, dy, frozen)
    for a, b in zip(got, want, strict=True):
        assert_close(a, b, oracle_mlp.FLIPS)


def test_a_mixture_has_the_bits_of_weights_quantized_ahead():
    up, down, frozen = mlp_case((4,))
    ahead = [jaxfp8.prequantize(w.reshape(*w.shape[:2], -1)) for w in (up, down)]
    x, dy = oracle_mlp.tokens(64, 256, 384)
    expert = RNG.integers(0, 4, (64, 2)).astype(np.int32)
    gate = RNG.uniform(0, 1, (64, 2)).astype(np.float32)

    @jax.jit
    def both(x, gate, w, dy):
        y, pull = jax.vjp(lambda x, gate: jaxfp8.moe(x, expert, gate, *w), x, gate)
        return y, *pull(dy)

    assert_same_bits(
        both(x, gate, frozen, dy), both(x, gate, [w.with_value(w.value) for w in ahead], dy)
    )


def test_one_weight_may_be_frozen_and_the_other_trained():
    up, down, frozen = mlp_case()
    x, dy = oracle_mlp.tokens(200, 256, 384)
    want = oracle_mlp.reference(x, up, down, dy, "silu")
    y, pull = jax.vjp(lambda x, down: jaxfp8.mlp(x, frozen[0], down), x, down)
    dx, ddown = pull(dy)
    for a, b in zip((y, dx, ddown), (want[0], want[1], want[3]), strict=True):
        assert_close(a, b, oracle_mlp.FLIPS)


def test_integers_are_no_weights_of_an_mlp():
    up, down, _ = mlp_case(gated=False)
    with pytest.raises(TypeError, match="w_down has dtype uint8"):
        jaxfp8.mlp(normal(4, 256), up, down.astype(np.uint8))
