"""Quantization equals the NumPy oracle to the bit, on the portable lowering."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import jaxfp8
from tests import oracle, oracle_quantize

FORMATS = [
    (dtype, scale_format)
    for dtype in (jnp.float8_e4m3fn, jnp.float8_e5m2)
    for scale_format in ("float32", "pow2")
]
INPUTS = (np.float32, ml_dtypes.bfloat16, np.float16)


def bits(x):
    x = np.asarray(x)
    return x.view({1: np.uint8, 4: np.uint32}[x.dtype.itemsize])


def assert_same(got, want):
    data, scale = want
    np.testing.assert_array_equal(bits(got.data), bits(data))
    np.testing.assert_array_equal(bits(got.scale), bits(scale))


def draw(seed, shape, kind, dtype=np.float32):
    """Arrays that stress a quantizer: magnitudes, zeros, subnormals, non-finite values."""
    r = np.random.default_rng(seed)
    x = r.standard_normal(shape)
    if kind == "magnitudes":
        x = x * 10.0 ** r.integers(-30, 31, shape)
    elif kind == "tiny":
        x = x * 1e-9
    elif kind == "zeros":
        x = np.where(r.random(shape) < 0.9, 0.0, x) * (r.random(shape[:-1])[..., None] < 0.5)
    elif kind == "subnormal":
        x = x * np.where(r.random(shape) < 0.5, 1e-39, 1e-37)
    elif kind == "nonfinite":
        x = np.where(r.random(shape) < 0.01, r.choice([np.nan, np.inf, -np.inf, -np.nan], shape), x)
    elif kind == "halves":  # ties of the rounding, and the largest value itself
        x = r.integers(-480, 481, shape) / r.choice([1, 2, 4, 8, 16, 32], shape)
    with np.errstate(over="ignore"):
        return x.astype(np.float32).astype(dtype)


KINDS = ("normal", "magnitudes", "tiny", "zeros", "subnormal", "nonfinite", "halves")


@settings(max_examples=30, deadline=None)
@given(
    shape=st.tuples(st.integers(1, 1000), st.integers(1, 1000)).filter(
        lambda s: s[0] * s[1] < 90_000
    ),
    kind=st.sampled_from(KINDS),
    dtype=st.sampled_from(INPUTS),
    fmt=st.sampled_from(FORMATS),
    square=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_quantize_equals_numpy_bit_for_bit(shape, kind, dtype, fmt, square, seed):
    x = draw(seed, shape, kind, dtype)
    block = (128, 128) if square else (1, 128)
    got = jaxfp8.quantize(x, block=block, dtype=fmt[0], scale_format=fmt[1])
    assert_same(got, oracle_quantize.quantize_blocks(x, block, fmt[0], fmt[1] == "pow2"))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", INPUTS)
@pytest.mark.parametrize("fmt", FORMATS, ids=str)
@pytest.mark.representatives(cases=14)
def test_every_quantizer_equals_numpy_bit_for_bit(kind, dtype, fmt):
    x = draw(5, (2, 131, 259), kind, dtype)
    kwargs = dict(dtype=fmt[0], scale_format=fmt[1])
    args = (fmt[0], fmt[1] == "pow2")
    row, column = jaxfp8.quantize_both(x, **kwargs)
    assert_same(row, oracle_quantize.quantize_blocks(x, (1, 128), *args))
    assert_same(column, oracle_quantize.quantize_columns(x, *args))
    nt, nn = jaxfp8.quantize_weight(x, **kwargs)
    data_nn, scale, data_nt = oracle_quantize.quantize_weight(x, *args)
    assert_same(nn, (data_nn, scale))
    assert_same(nt, (data_nt, np.swapaxes(scale, -1, -2)))


@pytest.mark.parametrize(
    "sizes",
    [
        [131],
        [0, 131, 0],
        [1, 127, 0, 2, 1],
        [128, 3],
        [20, 30],
        [100, 100, 100],
        [-5, 40, 9],
        [0, 0],
    ],
    ids=str,
)
@pytest.mark.parametrize("kind", ["normal", "nonfinite"])
@pytest.mark.representatives(cases=6)
def test_ragged_columns_equal_numpy_bit_for_bit(sizes, kind):
    x = draw(1, (131, 200), kind)
    row, column = jaxfp8.quantize_both(x, group_sizes=np.array(sizes, np.int32))
    assert_same(row, oracle_quantize.quantize_blocks(x))
    assert_same(column, oracle_quantize.ragged_columns(x, sizes))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.representatives(cases=3)
def test_jit_equals_eager_bit_for_bit(kind):
    x = draw(2, (70, 300), kind)
    for dtype in (jnp.float32, jnp.bfloat16, jnp.float16):

        def f(x, dtype=dtype):
            return jaxfp8.quantize(x.astype(dtype))

        # XLA may not drop the rounding to bfloat16 that comes before.
        want = oracle_quantize.quantize_blocks(np.asarray(jnp.asarray(x).astype(dtype)))
        assert_same(f(jnp.asarray(x)), want)
        assert_same(jax.jit(f)(x), want)


@pytest.mark.parametrize("magnitude", [1e-30, 1e-9, 1.0, 1e9, 1e30])
def test_relative_error_does_not_depend_on_magnitude(magnitude):
    x = (draw(3, (64, 512), "normal").astype(np.float64) * magnitude).astype(np.float32)
    reference = draw(3, (64, 512), "normal")
    got = oracle.error(jaxfp8.quantize(x).dequantize(), x)
    want = oracle.error(jaxfp8.quantize(reference).dequantize(), reference)
    assert abs(got - want) < 0.01 * want
    assert 0.01 < want < 0.04  # three bits of mantissa


def test_nonfinite_blocks_are_nan_and_others_are_not():
    x = draw(4, (3, 256), "normal")
    x[0, 5], x[1, 200] = np.inf, np.nan
    y = np.asarray(jaxfp8.quantize(x).dequantize())
    bad = np.zeros((3, 256), bool)
    bad[0, :128] = bad[1, 128:] = True
    np.testing.assert_array_equal(np.isnan(y), bad)


def test_zero_blocks_have_scale_one():
    q = jaxfp8.quantize(np.zeros((2, 130), np.float32))
    assert (np.asarray(q.scale) == 1).all() and not bits(q.data).any()


@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (0, 0), (2, 0, 3), (0,)])
def test_empty_arrays(shape):
    q = jaxfp8.quantize(np.zeros(shape, np.float32))
    assert q.shape == shape and q.scale.shape == (*shape[:-1], -(-shape[-1] // 128))
    if len(shape) > 1:
        row, column = jaxfp8.quantize_both(np.zeros(shape, np.float32))
        assert column.shape == (*shape[:-2], shape[-1], shape[-2])


def test_pow2_scales_are_powers_of_two_and_dequantize_exactly_in_bfloat16():
    q = jaxfp8.quantize(draw(6, (50, 400), "magnitudes"), scale_format="pow2")
    fraction, _ = np.frexp(np.asarray(q.scale))
    assert (fraction == 0.5).all()
    exact = oracle.dequantize(q)
    np.testing.assert_array_equal(np.asarray(q.dequantize(jnp.bfloat16)).astype(np.float64), exact)


def test_dequantize_rounds_once():
    q = jaxfp8.quantize(draw(7, (50, 400), "normal"), block=(128, 128))
    want = oracle.dequantize(q)
    np.testing.assert_array_equal(np.asarray(q.dequantize()), want.astype(np.float32))


def test_leading_axes_are_kept():
    x = draw(8, (2, 3, 50, 200), "normal")
    q, flat = jaxfp8.quantize(x), jaxfp8.quantize(x.reshape(-1, 200))
    assert q.shape == x.shape and q.scale.shape == (2, 3, 50, 2)
    np.testing.assert_array_equal(bits(q.data).reshape(-1, 200), bits(flat.data))
    vector = jaxfp8.quantize(x[0, 0, 0])
    np.testing.assert_array_equal(bits(vector.data), bits(q.data)[0, 0, 0])


def test_recipe_gives_the_format_and_an_argument_wins():
    x = draw(9, (4, 128), "normal")
    recipe = jaxfp8.Recipe(dtype=jnp.float8_e5m2, scale_format="pow2")
    want = oracle_quantize.quantize_blocks(x, (1, 128), jnp.float8_e5m2, True)
    assert_same(jaxfp8.quantize(x, recipe=recipe), want)
    with recipe:
        assert_same(jaxfp8.quantize(x), want)
        want = oracle_quantize.quantize_blocks(x, (1, 128), jnp.float8_e4m3fn, True)
        assert_same(jaxfp8.quantize(x, dtype="float8_e4m3fn"), want)


def test_quantized_array_is_a_pytree_with_a_helpful_repr():
    q = jaxfp8.quantize(draw(10, (300, 257), "normal"))
    assert repr(q) == "QuantizedArray(float8_e4m3fn[300,257], scale=float32[300,3], block=1x128)"
    leaves, tree = jax.tree.flatten(q)
    assert len(leaves) == 2
    assert jax.tree.unflatten(tree, leaves).block == (1, 128)
    assert q.shape == (300, 257) and q.ndim == 2 and q.dtype == jnp.float8_e4m3fn
    assert q.nbytes == 300 * 257 + 4 * 300 * 3
    shapes = jax.eval_shape(lambda x: jaxfp8.quantize(x), jnp.zeros((300, 257)))
    assert repr(shapes) == repr(q)
    assert "None" in repr(jax.tree.map(lambda _: None, q))


def test_numpy_sees_the_values_of_a_quantized_array():
    q = jaxfp8.quantize(np.random.default_rng(0).standard_normal((3, 200)).astype(np.float32))
    values = np.asarray(q)
    assert values.dtype == np.float32
    np.testing.assert_array_equal(values, q.dequantize())
    assert np.asarray(q, np.float64).dtype == np.float64
    with pytest.raises(ValueError, match="copy=False"):
        np.array(q, copy=False)
