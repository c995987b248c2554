"""Quantized products equal float64 products of the dequantized inputs, on the portable lowering."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import jaxfp8
from tests import oracle

F32 = 2e-6  # of float32 results, norm-wise and per group
BF16 = 4e-3  # one rounding to bfloat16: 2**-8 at most for an element
SIZES = st.sampled_from([0, 1, 2, 31, 127, 128, 129, 200, 257])
FP8 = st.sampled_from([jnp.float8_e4m3fn, jnp.float8_e5m2])


def normal(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


def operands(m, n, k, square=True, dtypes=(None, None), seed=0):
    lhs = jaxfp8.quantize(normal(seed, m, k), dtype=dtypes[0])
    block = (128, 128) if square else (1, 128)
    return lhs, jaxfp8.quantize(normal(seed + 1, n, k), block=block, dtype=dtypes[1])


# DeepGEMM's own test shapes (reference: its tests/generators.py), sizes divided by 16.
DENSE = [
    (m, n // 16, k // 16)
    for m in (1, 8, 256)
    for n, k in [
        (2112, 7168),
        (576, 7168),
        (24576, 1536),
        (32768, 512),
        (7168, 16384),
        (4096, 7168),
        (7168, 2048),
    ]
]


@pytest.mark.parametrize("m, n, k", DENSE)
@pytest.mark.parametrize("square", [True, False], ids=["128x128", "1x128"])
@pytest.mark.representatives("square", cases=6)
def test_gemm_equals_float64(m, n, k, square):
    lhs, rhs = operands(m, n, k, square)
    got = jaxfp8.gemm(lhs, rhs, out_dtype=jnp.float32)
    oracle.assert_close(got, oracle.gemm(lhs, rhs), F32)
    oracle.assert_elements_close(got, lhs, rhs, F32)
    oracle.assert_close(jaxfp8.gemm(lhs, rhs), oracle.gemm(lhs, rhs), BF16)


def test_gemm_keeps_its_accuracy_at_k_16384():
    lhs, rhs = operands(8, 40, 16384)
    got = jaxfp8.gemm(lhs, rhs, out_dtype=jnp.float32)
    oracle.assert_elements_close(got, lhs, rhs, F32)


@settings(max_examples=20, deadline=None)
@given(m=SIZES, n=SIZES, k=SIZES, square=st.booleans(), dtypes=st.tuples(FP8, FP8))
def test_gemm_of_any_size_equals_float64(m, n, k, square, dtypes):
    lhs, rhs = operands(m, n, k, square, dtypes)
    got = jaxfp8.gemm(lhs, rhs, out_dtype=jnp.float32)
    oracle.assert_close(got, oracle.gemm(lhs, rhs), F32)


@settings(max_examples=12, deadline=None)
@given(g=st.integers(1, 4), m=SIZES, n=SIZES, k=SIZES, square=st.booleans())
@pytest.mark.full
def test_batched_gemm_equals_float64(g, m, n, k, square):
    lhs = jaxfp8.quantize(normal(0, g, m, k))
    rhs = jaxfp8.quantize(normal(1, g, n, k), block=(128, 128) if square else (1, 128))
    got = jaxfp8.gemm(lhs, rhs, out_dtype=jnp.float32)
    oracle.assert_close(got, oracle.gemm(lhs, rhs), F32)


def test_gemm_keeps_leading_axes():
    lhs = jaxfp8.quantize(normal(0, 2, 3, 5, 200))
    rhs = jaxfp8.quantize(normal(1, 70, 200), block=(128, 128))
    got = jaxfp8.gemm(lhs, rhs, out_dtype=jnp.float32)
    assert got.shape == (2, 3, 5, 70)
    oracle.assert_close(got, oracle.gemm(lhs, rhs), F32)


@pytest.mark.parametrize("magnitude", [1e-15, 1e-9, 1e9, 1e15])
@pytest.mark.representatives(cases=2)
def test_products_keep_their_accuracy_at_any_magnitude(magnitude):
    lhs = jaxfp8.quantize(normal(0, 64, 300) * np.float32(magnitude))
    rhs = jaxfp8.quantize(normal(1, 80, 300), block=(128, 128))
    got = jaxfp8.gemm(lhs, rhs, out_dtype=jnp.float32)
    oracle.assert_close(got, oracle.gemm(lhs, rhs), F32)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_accum_is_added_in_float32(dtype):
    lhs, rhs = operands(100, 70, 300, square=False)
    accum = jnp.asarray(normal(2, 100, 70), dtype) * 100
    want = oracle.gemm(lhs, rhs) + np.asarray(accum, np.float64)
    for product in (jaxfp8.gemm, jaxfp8.wgrad_gemm):
        got = product(lhs, rhs, accum=accum)
        assert got.dtype == dtype
        oracle.assert_close(got, want, F32 if dtype == jnp.float32 else BF16)


def test_wgrad_gemm_equals_float64_of_the_columns():
    x, dy = normal(0, 300, 130), normal(1, 300, 70)
    (_, columns), (_, dy_columns) = jaxfp8.quantize_both(x), jaxfp8.quantize_both(dy)
    got = jaxfp8.wgrad_gemm(columns, dy_columns)
    assert got.shape == (130, 70) and got.dtype == jnp.float32
    oracle.assert_close(got, oracle.gemm(columns, dy_columns), F32)
    assert oracle.error(got, x.T @ dy) < 0.05


GROUPS = {
    "equal": (256, [64, 64, 64, 64]),
    "unequal": (300, [0, 1, 127, 128, 44, 0]),
    "tails": (131, [129, 2]),
    "one": (257, [257]),
    "all in one": (300, [0, 300, 0]),
    "fewer than M": (300, [10, 100, 30]),
    "more than M": (100, [60, 60, 60]),
    "negative": (100, [-7, 60, -1, 20]),
    "none": (100, [0, 0]),
    "huge": (100, [2**31 - 1, 2**31 - 1]),
    "one row each": (5, [1, 1, 1, 1, 1]),
    "M = 0": (0, [0, 3]),
}


def assert_groups_close(got, want, sizes, tolerance):
    """Norm-wise for the rows of each group; what lies past the groups is exactly zero."""
    at = 0
    for start, size in oracle.oracle_quantize.clipped_groups(sizes, want.shape[0]):
        group = slice(start, start + size)
        assert oracle.error(got[group], want[group]) <= tolerance
        at = start + size
    assert not np.asarray(got[at:]).any()


@pytest.mark.parametrize("groups", GROUPS)
@pytest.mark.parametrize("k, n", [(256, 128), (200, 72)])
@pytest.mark.representatives("k", cases=4)
def test_grouped_gemm_equals_float64_per_group(groups, k, n):
    m, sizes = GROUPS[groups]
    lhs = jaxfp8.quantize(normal(0, m, k))
    rhs = jaxfp8.quantize(normal(1, len(sizes), n, k), block=(128, 128))
    want = oracle.grouped_gemm(lhs, rhs, sizes)
    device_sizes = jnp.asarray(sizes, jnp.int32)
    got = jaxfp8.grouped_gemm(lhs, rhs, device_sizes, out_dtype=jnp.float32)
    assert_groups_close(got, want, sizes, F32)
    assert_groups_close(jaxfp8.grouped_gemm(lhs, rhs, device_sizes), want, sizes, BF16)


@settings(max_examples=12, deadline=None)
@given(data=st.data())
@pytest.mark.full
def test_grouped_gemm_of_any_groups_equals_float64(data):
    m = data.draw(st.integers(1, 700))
    groups = data.draw(st.integers(1, 9))
    sizes = data.draw(st.lists(st.integers(0, 200), min_size=groups, max_size=groups))
    lhs = jaxfp8.quantize(normal(0, m, 136))
    rhs = jaxfp8.quantize(normal(1, groups, 24, 136), block=(128, 128))
    got = jaxfp8.grouped_gemm(lhs, rhs, jnp.asarray(sizes, jnp.int32), out_dtype=jnp.float32)
    assert_groups_close(got, oracle.grouped_gemm(lhs, rhs, sizes), sizes, F32)


@pytest.mark.parametrize("masked", [[0, 1, 127], [128, 129, 130], [500, -3, 64]])
def test_masked_grouped_gemm_equals_float64_and_is_zero_past_the_mask(masked):
    lhs = jaxfp8.quantize(normal(0, 3, 130, 200))
    rhs = jaxfp8.quantize(normal(1, 3, 72, 200), block=(128, 128))
    got = jaxfp8.masked_grouped_gemm(lhs, rhs, jnp.asarray(masked), out_dtype=jnp.float32)
    oracle.assert_close(got, oracle.masked_grouped_gemm(lhs, rhs, masked), F32)
    for rows, block in zip(masked, np.asarray(got), strict=True):
        assert not block[max(0, rows) :].any()


@pytest.mark.parametrize("groups", GROUPS)
@pytest.mark.representatives(cases=3)
def test_grouped_wgrad_gemm_equals_float64_per_group(groups):
    m, sizes = GROUPS[groups]
    device_sizes = jnp.asarray(sizes, jnp.int32)
    x, dy = normal(0, m, 130), normal(1, m, 72)
    (_, columns), (_, dy_columns) = (
        jaxfp8.quantize_both(v, group_sizes=device_sizes) for v in (x, dy)
    )
    want = oracle.grouped_wgrad_gemm(columns, dy_columns, sizes, m)
    got = jaxfp8.grouped_wgrad_gemm(columns, dy_columns, device_sizes)
    assert got.dtype == jnp.float32
    oracle.assert_close(got, want, F32)
    # The right tokens met: the plain product of each group, to the error of quantization.
    for (start, size), block in zip(
        oracle.oracle_quantize.clipped_groups(sizes, m), np.asarray(got), strict=True
    ):
        tokens = slice(start, start + size)
        assert oracle.error(block, x[tokens].T @ dy[tokens]) < 0.06
    accum = normal(2, *want.shape)
    got = jaxfp8.grouped_wgrad_gemm(columns, dy_columns, device_sizes, accum=accum)
    oracle.assert_close(got, want + accum, F32)
    got = jaxfp8.grouped_wgrad_gemm(columns, dy_columns, device_sizes, out_dtype=jnp.bfloat16)
    oracle.assert_close(got, want, BF16)


def test_nonfinite_blocks_make_every_product_that_uses_them_nonfinite():
    x, w = normal(0, 6, 300), normal(1, 300, 260)
    x[2, 5], w[290, 130] = np.inf, np.nan
    lhs, (rhs, _) = jaxfp8.quantize(x), jaxfp8.quantize_weight(w)
    got = np.asarray(jax.jit(jaxfp8.gemm)(lhs, rhs)).astype(np.float32)
    bad = np.zeros((6, 260), bool)
    bad[2], bad[:, 128:256] = True, True
    np.testing.assert_array_equal(~np.isfinite(got), bad)
    sizes = jnp.array([2, 4])
    experts = jax.tree.map(lambda v: jnp.stack([v, v]), rhs)
    got = np.asarray(jaxfp8.grouped_gemm(lhs, experts, sizes)).astype(np.float32)
    np.testing.assert_array_equal(~np.isfinite(got), bad)


def test_products_are_the_same_bits_every_time():
    lhs, rhs = operands(130, 140, 500)
    f = jax.jit(jaxfp8.gemm)
    first = np.asarray(f(lhs, rhs)).view(np.uint16)
    for _ in range(3):
        np.testing.assert_array_equal(np.asarray(f(lhs, rhs)).view(np.uint16), first)
