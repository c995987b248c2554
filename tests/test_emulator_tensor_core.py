"""The emulator's FP8 arithmetic against products that an H100 computed (tests/data, gpu_errors.py --dump)."""

import pathlib

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import jaxfp8
from jaxfp8 import _ffi
from tests import oracle
from tests.emulated_platform import emulated_platform
from tests.emulator import tensor_core

PRODUCTS = np.load(pathlib.Path(__file__).parent / "data/h100_fp8_products.npz")
NAMES = sorted({name.rsplit("_", 1)[0] for name in PRODUCTS})


def case(name):
    """E4M3 operands (32, K) as bytes, and what the H100 gave for their product, scales being one."""
    return (PRODUCTS[f"{name}_{part}"] for part in ("lhs", "rhs", "out"))


@pytest.mark.parametrize("name", NAMES)
def test_a_chain_of_multiplications_has_the_bits_of_an_h100(name):
    lhs, rhs, want = case(name)
    a, b = (v.view(ml_dtypes.float8_e4m3fn).astype(np.float64) for v in (lhs, rhs))
    total = None
    for at in range(0, a.shape[1], 32):
        total = tensor_core.multiply(a[:, at : at + 32], b[:, at : at + 32], total)
    np.testing.assert_array_equal(total.astype(np.float32), want)
    assert (a @ b.T != want).any()  # else the data could not tell exact sums from these


@pytest.mark.emulated
@pytest.mark.skipif(not _ffi.images(), reason="this build of jaxfp8 holds no kernels")
@pytest.mark.parametrize("name", NAMES)
def test_an_emulated_kernel_has_the_bits_of_an_h100(name):
    lhs, rhs, want = case(name)
    lhs, rhs = (jnp.asarray(v).view(jnp.float8_e4m3fn) for v in (lhs, rhs))
    lhs = jaxfp8.QuantizedArray(lhs, jnp.ones((32, 1), jnp.float32))
    rhs = jaxfp8.QuantizedArray(rhs, jnp.ones((1, 1), jnp.float32), (128, 128))
    with emulated_platform(), tensor_core.hopper_arithmetic():
        got = np.asarray(jaxfp8.gemm(lhs, rhs, out_dtype=jnp.float32))
    np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("types", [("e4m3", "e4m3"), ("e5m2", "e4m3")], ids=str)
def test_the_error_stays_within_what_the_cut_bits_allow(types):
    """33 terms lose less than one unit each, and the sum loses one of its own: so much of the largest term."""
    r = np.random.default_rng(0)
    kinds = {"e4m3": ml_dtypes.float8_e4m3fn, "e5m2": ml_dtypes.float8_e5m2}
    a, b = (
        (r.standard_normal((64, 32)) * np.exp2(r.integers(-5, 5, (64, 32)))).astype(kinds[t])
        for t in types
    )
    a, b = a.astype(np.float64), b.astype(np.float64)
    c = (r.standard_normal((64, 64)) * 8).astype(np.float32).astype(np.float64)
    c = tensor_core.multiply(a * 0, b, c, types)  # what an accumulator can hold
    got = tensor_core.multiply(a, b, c, types)
    terms = np.concatenate([np.abs(a[:, None] * b[None]), np.abs(c)[..., None]], -1)
    exact = a @ b.T + c
    largest, total = terms.max(-1), np.abs(exact)
    assert (np.abs(got - exact) <= 2.0**-13 * (33 * largest + total)).all()
    assert oracle.error(got, exact) > 1e-6
