"""Situations that users of libraries like this one reported; docs/reliability.md has them as a table."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import jaxfp8
from tests.programs import assert_close, assert_same_bits

pytestmark = pytest.mark.full

TOLERANCE = 0.045
"""Of a product or a gradient, norm-wise, on normal data."""


def normal(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def groups_of(x, sizes):
    ends = np.cumsum(sizes)
    return [x[end - size : end] for end, size in zip(ends, sizes, strict=True)]


@pytest.mark.parametrize("k", [192, 576, 1040, 1152, 4544, 8096, 10944])
def test_widths_of_published_models_that_no_block_divides(k):
    x, w, v = normal(0, 5, k), normal(1, k, 16), normal(2, 16, k)
    assert_close(jaxfp8.linear(x, w), x @ w, TOLERANCE)
    assert_close(jaxfp8.linear(x[:, :16], v), x[:, :16] @ v, TOLERANCE)


def test_a_wide_product_of_few_blocks():
    x, w, dy = normal(0, 5, 1152), normal(1, 1152, 7168), normal(2, 5, 7168)
    y, pull = jax.vjp(jaxfp8.linear, x, w)
    assert_close([y, *pull(dy)], [x @ w, dy @ w.T, x.T @ dy], TOLERANCE)


@pytest.mark.parametrize("formats", [("pow2", "float32"), ("float32", "pow2")])
def test_operands_whose_scales_have_different_formats(formats):
    x, w = normal(0, 40, 300), normal(1, 300, 72)
    left, right = formats
    a = jaxfp8.quantize(x, scale_format=left)
    b = jaxfp8.quantize_weight(w, scale_format=right)[0]
    assert {a.scale.dtype, b.scale.dtype} == {np.dtype(np.float32)}
    powers = [np.all(np.frexp(np.asarray(q.scale))[0] == 0.5) for q in (a, b)]
    assert powers == [f == "pow2" for f in formats]
    assert_close(jaxfp8.gemm(a, b, out_dtype=jnp.float32), x @ w, TOLERANCE)
    want = np.asarray(a.dequantize(), np.float64) @ np.asarray(b.dequantize(), np.float64).T
    assert_close(jaxfp8.gemm(a, b, out_dtype=jnp.float32), want, 1e-5)


@pytest.mark.parametrize("k, n", [(100, 72), (17, 9), (128, 8)])
def test_weight_gradients_of_any_width(k, n):
    x, dy = normal(0, 37, k), normal(1, 37, n)
    got = jax.grad(lambda w: (jaxfp8.linear(x, w) * dy).sum())(np.ones((k, n), np.float32))
    assert_close(got, x.T @ dy, TOLERANCE)


def test_a_channel_of_zeros_in_a_group_of_one_block():
    sizes = [256, 128, 128, 256]
    x, dy = normal(0, 768, 256), normal(1, 768, 128)
    x[256:384, 5] = 0
    got = jax.grad(lambda w: (jaxfp8.ragged_dot(x, w, jnp.array(sizes)) * dy).sum())(
        normal(2, 4, 256, 128)
    )
    parts = zip(groups_of(x, sizes), groups_of(dy, sizes), strict=True)
    assert_close(got, np.stack([a.T @ b for a, b in parts]), TOLERANCE)
    np.testing.assert_array_equal(got[1, 5], 0)


@pytest.mark.parametrize("sizes", [[8, 16, 64], [1, 0, 6], [0, 0, 5], [129, 1, 127]])
def test_groups_of_any_size(sizes):
    x, w = normal(0, sum(sizes), 128), normal(1, 3, 128, 16)
    want = np.concatenate([a @ b for a, b in zip(groups_of(x, sizes), w, strict=True)])
    assert_close(jaxfp8.ragged_dot(x, w, jnp.array(sizes)), want, TOLERANCE)


def test_what_lies_past_the_groups_reaches_nothing():
    x, w, sizes = normal(0, 300, 128), normal(1, 2, 128, 64), jnp.array([90, 110])
    x[200:] = np.nan
    y, pull = jax.vjp(lambda x, w: jaxfp8.ragged_dot(x, w, sizes), x, w)
    np.testing.assert_array_equal(y[200:], 0)
    dy = np.full(y.shape, np.nan, np.float32)
    dy[:200] = 1
    assert all(np.isfinite(np.asarray(g)).all() for g in pull(dy))


def test_rows_do_not_see_one_another_or_padding():
    x, w = normal(0, 33, 128), normal(1, 128, 64)
    y = np.asarray(jaxfp8.linear(x, w))
    for m in (1, 7, 31, 32):
        assert_close(jaxfp8.linear(x[:m], w), y[:m], 1e-6)  # XLA:CPU orders sums by shape
    x[3, 4] = np.nan
    assert_same_bits(np.delete(jaxfp8.linear(x, w), 3, 0), np.delete(y, 3, 0))


def test_zeros_train():
    x, w = np.zeros((8, 128), np.float32), normal(1, 128, 64)
    grads = jax.grad(lambda x, w: (jaxfp8.linear(x, w) ** 2).sum(), (0, 1))(x, w)
    for g in grads:
        np.testing.assert_array_equal(g, 0)


def test_what_is_too_large_for_fp8_is_scaled_and_infinity_stays_visible():
    large = np.full((1, 128), 1e30, np.float32)
    np.testing.assert_allclose(jaxfp8.quantize(large).dequantize(), large, rtol=1e-6)
    x = np.full((1, 128), np.inf, np.float32)
    assert np.isnan(np.asarray(jaxfp8.quantize(x).dequantize())).all()


def test_an_adapter_beside_a_frozen_weight_trains():
    x, w, a, b = normal(0, 64, 128), normal(1, 128, 128), normal(2, 128, 8), normal(3, 8, 128)
    dy = normal(4, 64, 128)

    def loss(product, a, b):
        return ((product(x, w) + product(product(x, a), b)) * dy).sum()

    got = jax.grad(functools.partial(loss, jaxfp8.linear), (0, 1))(a, b)
    assert_close(got, jax.grad(functools.partial(loss, jnp.dot), (0, 1))(a, b), 0.08)


@pytest.mark.parametrize("weight", [lambda w: w, jaxfp8.prequantize])
def test_recomputation_changes_no_bit(weight):
    x, w = normal(0, 2, 32, 128), normal(1, 3, 128, 128) / 12

    def gradient(layer):
        def loss(w):
            quantized = jax.vmap(weight)(w)
            return sum(
                jax.lax.scan(lambda x, w: (layer(x, w), None), part, quantized)[0].sum()
                for part in x
            )

        return jax.grad(loss)(w)

    layer = lambda x, w: jnp.tanh(jaxfp8.linear(x, w))  # noqa: E731
    assert_same_bits(gradient(jax.checkpoint(layer)), gradient(layer))


def test_a_gradient_taken_outside_a_recipe_is_that_of_the_forward_pass():
    x, w = normal(0, 8, 128), normal(1, 128, 64)
    recipe = jaxfp8.Recipe(scale_format="pow2", grad_dtype=jnp.float8_e5m2)
    f = jax.checkpoint(lambda x, w: jaxfp8.linear(x, w))
    with recipe:
        y, pull = jax.vjp(f, x, w)
        inside = pull(y)
    assert_same_bits(pull(y), inside)


@pytest.mark.parametrize("how", [AxisType.Auto, AxisType.Explicit])
def test_gradients_of_each_example_on_a_mesh(how):
    mesh = jax.make_mesh((1,), ("d",), axis_types=(how,))
    x, w = normal(0, 3, 40, 128), normal(1, 128, 64)
    f = jax.vmap(jax.grad(lambda w, x: jaxfp8.linear(x, w).sum()), (None, 0))
    want = np.broadcast_to(x.sum(1)[:, :, None], (3, 128, 64))
    with jax.set_mesh(mesh):
        assert_close(jax.jit(f)(w, jax.device_put(x, P("d"))), want, TOLERANCE)


@pytest.mark.parametrize("scale_spec", [P("k", "n"), P(), P(None, "n")])
def test_a_weight_quantized_ahead_on_an_explicit_mesh(scale_spec):
    mesh = jax.make_mesh((2, 2), ("k", "n"), axis_types=(AxisType.Explicit,) * 2)
    x, w, dy = normal(0, 8, 256), normal(1, 256, 512), normal(2, 8, 512)

    with jax.set_mesh(mesh):
        placed = jax.device_put(w, P("k", "n"))

        def f(x, w):
            q = jaxfp8.prequantize(w)
            q = dataclasses.replace(q, scale=jax.sharding.reshard(q.scale, scale_spec))
            return jaxfp8.linear(x, q, out_sharding=P(None, "n"))

        y = jax.jit(f)(x, placed)
        grads = jax.jit(jax.grad(lambda x, w: (f(x, w) * dy).sum(), (0, 1)))(x, placed)
        assert jax.typeof(y).sharding.spec == P(None, "n")
        assert jax.typeof(grads[1]).sharding.spec == P("k", "n")
    assert_close([y, *grads], [x @ w, dy @ w.T, x.T @ dy], TOLERANCE)


def test_a_scan_inside_shard_map_keeps_what_varies():
    mesh = jax.make_mesh((1,), ("d",), axis_types=(AxisType.Auto,))
    x, w = normal(0, 8, 128), normal(1, 128, 128) / 12

    def repeat(x, w):
        return jax.lax.scan(lambda x, _: (jaxfp8.linear(x, w), None), x, None, length=2)[0]

    f = jax.shard_map(repeat, mesh=mesh, in_specs=(P("d"), P()), out_specs=P("d"))
    assert_same_bits(jax.jit(f)(x, w), jax.jit(repeat)(x, w))
    got = jax.jit(jax.grad(lambda w: f(x, w).sum()))(w)
    assert_close(got, jax.grad(lambda w: repeat(x, w).sum())(w), 1e-6)


def test_sizes_whose_sum_overflows_are_clipped_to_the_rows():
    x, w = np.ones((8, 128), np.float32), np.ones((3, 128, 16), np.float32)
    sizes = jnp.array([2**31 - 1, 2**31 - 1, 5], jnp.int32)
    np.testing.assert_array_equal(jaxfp8.ragged_dot(x, w, sizes), np.full((8, 16), 128))


def test_other_sizes_of_groups_do_not_compile_again():
    f, x, w = jax.jit(jaxfp8.ragged_dot), normal(0, 8, 128), normal(1, 2, 128, 16)
    for sizes in ([3, 5], [1, 7], [0, 8]):
        f(x, w, np.array(sizes, np.int32))
    assert f._cache_size() == 1


def test_a_token_may_choose_one_expert_twice():
    x, up, down = normal(0, 8, 128), normal(1, 4, 128, 2, 128) / 12, normal(2, 4, 128, 64) / 12
    twice = jaxfp8.moe(x, np.full((8, 2), 1), np.full((8, 2), 0.5, np.float32), up, down)
    once = jaxfp8.moe(x, np.full((8, 1), 1), np.ones((8, 1), np.float32), up, down)
    assert_close(twice, once, 1e-6)


def test_a_mixture_without_groups_is_a_batched_einsum():
    x, w, dy = normal(0, 2, 3, 40, 128), normal(1, 3, 128, 72), normal(2, 2, 3, 40, 72)
    y, pull = jax.vjp(lambda x, w: jaxfp8.einsum("gech,ehf->gecf", x, w), x, w)
    want = [x @ w, dy @ w.swapaxes(1, 2), np.einsum("gech,gecf->ehf", x, dy)]
    assert_close([y, *pull(dy)], want, TOLERANCE)


@pytest.mark.parametrize(
    "mode", [lambda: jax.debug_nans(True), jax.checking_leaks, jax.disable_jit]
)
def test_debugging_modes_of_jax(mode):
    x, w = normal(0, 8, 128), normal(1, 2, 128, 64)
    with mode():
        g = jax.grad(lambda w: jaxfp8.ragged_dot(x, w, jnp.array([0, 3])).sum())(w)
    assert np.isfinite(np.asarray(g)).all()


def test_weak_types_in_a_scan_with_recomputation():
    x, w = jnp.broadcast_to(0.5, (8, 128)), normal(0, 128, 128) / 12
    assert x.weak_type

    @jax.checkpoint
    def layer(x, _):
        y = jaxfp8.linear(x, w)
        assert (y.dtype, y.weak_type) == (x.dtype, False)
        return 0.5 * y, None

    def loss(x):
        return jax.lax.scan(layer, x, None, length=3)[0].sum()

    want = np.ones((8, 128)) / 8
    for _ in range(3):
        want = want @ w.T
    assert_close(jax.grad(loss)(x), want, 2 * TOLERANCE)


def test_strict_promotion_of_dtypes_and_ranks():
    x, w = normal(0, 2, 8, 128), normal(1, 128, 64)
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        y, pull = jax.vjp(jaxfp8.linear, x.astype(jnp.bfloat16), w)
        assert [g.dtype for g in pull(y)] == [jnp.bfloat16, jnp.float32]


@pytest.mark.parametrize(
    "error, match, call",
    [
        (TypeError, "x has dtype float8", lambda x, w: jaxfp8.linear(x.astype("float8_e4m3fn"), w)),
        (TypeError, "w has dtype int8", lambda x, w: jaxfp8.linear(x, w.astype(jnp.int8))),
        (ValueError, "w has K=64", lambda x, w: jaxfp8.linear(x, w.T)),
        (TypeError, "group_sizes has dtype bool", lambda x, w: jaxfp8.ragged_dot(x, w[None], jnp.array([True]))),
        (ValueError, "group_sizes has 2 entries", lambda x, w: jaxfp8.ragged_dot(x, w[None], jnp.array([3, 5]))),
    ],
)  # fmt: skip
def test_what_others_take_silently_is_named(error, match, call):
    with pytest.raises(error, match=match):
        call(jnp.ones((8, 128)), jnp.ones((128, 64)))
