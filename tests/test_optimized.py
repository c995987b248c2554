"""XLA's optimizations, which most tests go without, change no bit of a quantizer and no product beyond rounding."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxfp8
from tests import oracle, oracle_quantize
from tests.optimization import OPTIMIZED
from tests.programs import train
from tests.test_products import BF16, F32, GROUPS, assert_groups_close, normal, operands
from tests.test_quantize import FORMATS, INPUTS, KINDS, assert_same, draw


def optimized(f, *args):
    return jax.jit(f, compiler_options=OPTIMIZED)(*args)


@pytest.mark.parametrize("fmt", [FORMATS[0], FORMATS[-1]], ids=str)
@pytest.mark.parametrize("dtype", INPUTS)
@pytest.mark.representatives(cases=2)
def test_quantizers_equal_numpy_bit_for_bit(dtype, fmt):
    args = (fmt[0], fmt[1] == "pow2")
    recipe = jaxfp8.Recipe(dtype=fmt[0], scale_format=fmt[1])

    @jax.jit
    def quantize(x):
        return (
            *jaxfp8.quantize_both(x, recipe=recipe),
            *jaxfp8.quantize_weight(x, recipe=recipe),
        )

    program = quantize.lower(draw(5, (2, 131, 259), "normal", dtype)).compile(OPTIMIZED)
    for kind in KINDS:
        x = draw(5, (2, 131, 259), kind, dtype)
        row, column, nt, nn = program(x)
        assert_same(row, oracle_quantize.quantize_blocks(x, (1, 128), *args))
        assert_same(column, oracle_quantize.quantize_columns(x, *args))
        data_nn, scale, data_nt = oracle_quantize.quantize_weight(x, *args)
        assert_same(nn, (data_nn, scale))
        assert_same(nt, (data_nt, np.swapaxes(scale, -1, -2)))


def test_the_ragged_quantizer_equals_numpy_bit_for_bit():
    x, sizes = draw(1, (131, 200), "magnitudes"), np.array([1, 127, 0, 2], np.int32)
    row, column = optimized(lambda x, s: jaxfp8.quantize_both(x, group_sizes=s), x, sizes)
    assert_same(row, oracle_quantize.quantize_blocks(x))
    assert_same(column, oracle_quantize.ragged_columns(x, sizes))


@pytest.mark.parametrize("square", [True, False], ids=["128x128", "1x128"])
def test_gemm_equals_float64(square):
    lhs, rhs = operands(100, 70, 300, square)
    oracle.assert_close(optimized(jaxfp8.gemm, lhs, rhs), oracle.gemm(lhs, rhs), BF16)


def test_grouped_products_equal_float64():
    m, sizes = GROUPS["unequal"]
    device_sizes = jnp.asarray(sizes, jnp.int32)
    lhs, rhs = (
        jaxfp8.quantize(normal(0, m, 200)),
        jaxfp8.quantize(normal(1, len(sizes), 72, 200), block=(128, 128)),
    )
    got = optimized(jaxfp8.grouped_gemm, lhs, rhs, device_sizes)
    assert_groups_close(got, oracle.grouped_gemm(lhs, rhs, sizes), sizes, BF16)
    columns = [jaxfp8.quantize_both(normal(i, m, 72), group_sizes=device_sizes)[1] for i in (0, 1)]
    got = optimized(jaxfp8.grouped_wgrad_gemm, *columns, device_sizes)
    oracle.assert_close(got, oracle.grouped_wgrad_gemm(*columns, sizes, m), F32)


SIZES = jnp.array([20, 0, 90])
OPERATIONS = {
    "linear": (jaxfp8.linear, (200, 72), F32),
    "ragged_dot": (lambda x, w: jaxfp8.ragged_dot(x, w, SIZES), (3, 200, 72), F32),
    # Last bits of the activation may flip FP8 roundings.
    "mlp": (lambda x, w: jaxfp8.mlp(x, w, w[:, 0, :].T), (200, 2, 72), 2e-3),
}


@pytest.mark.parametrize("name", OPERATIONS)
@pytest.mark.representatives()
def test_an_operation_and_its_gradients_are_those_of_quick_compilation(name):
    f, shape, tolerance = OPERATIONS[name]
    x, w = normal(0, 130, 200), normal(1, *shape) / 14
    dy = normal(2, *jax.eval_shape(f, x, w).shape)
    want = jax.jit(train(f))(x, w, dy)
    for a, b in zip(optimized(train(f), x, w, dy), want, strict=True):
        oracle.assert_close(a, b, tolerance)
