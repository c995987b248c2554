"""On a Hopper GPU: sizes that only a GPU can run.

Takes up to 30 GB of the device's memory: `tests/gpu_check.sh` runs this file in one process, beside the others.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxfp8
from tests import oracle
from tests import oracle_quantize as oq
from tests.test_gpu import BF16, F32

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True, scope="module")
def gpu():
    if jax.default_backend() != "gpu":
        pytest.skip("needs a GPU that JAX can use")


def normal(key, *shape):
    return jax.random.normal(jax.random.key(key), shape, jnp.bfloat16)


def uniform(key, *shape):
    """Cheaper to draw than normal values: for arrays of gigabytes."""
    return jax.random.uniform(jax.random.key(key), shape, jnp.bfloat16, -1, 1)


def value(q, rows):
    """Some rows of a 1x128 QuantizedArray in float64."""
    return oq.dequantize(np.asarray(q.data[rows]), np.asarray(q.scale[rows]))


def edges(n, *more):
    """Rows where tiles, and 32-bit offsets, begin and end."""
    return np.unique([0, 1, 127, 128, n // 2, n - 129, n - 128, n - 1, *more])


# ---- Large shapes


@pytest.mark.parametrize("m, n, k", [(32768, 2048, 16384), (32769, 4104, 7168), (131, 8192, 16384)])
@pytest.mark.parametrize("block", [(128, 128), (1, 128)], ids=str)
def test_products_up_to_32768_rows_and_16384_deep(m, n, k, block):
    lhs = jaxfp8.quantize(normal(0, m, k))
    rhs = jaxfp8.quantize(normal(1, n, k), block)
    y = jax.jit(lambda a, b: jaxfp8.gemm(a, b, out_dtype=jnp.float32))(lhs, rhs)
    rows = edges(m) if m > 300 else np.arange(m)
    assert np.isfinite(float(jnp.sum(y)))
    assert oracle.error(y[rows], value(lhs, rows) @ oracle.dequantize(rhs).T) < F32


def test_a_weight_gradient_of_more_than_2_31_elements():
    n, k, tokens = 65537, 32784, 256
    dy = jaxfp8.quantize(uniform(0, n, tokens))
    x = jaxfp8.quantize(uniform(1, k, tokens))
    dw = jax.jit(jaxfp8.wgrad_gemm)(dy, x)
    assert dw.size > 2**31 and dw.dtype == jnp.float32
    rows = edges(n, 2**31 // k, 2**31 // k + 1)
    assert oracle.error(dw[rows], value(dy, rows) @ oracle.dequantize(x).T) < F32


def test_a_ragged_product_of_more_than_2_31_elements():
    sizes = np.array([40_000, 0, 1, 59_999, 129, 30_000], np.int32)
    m, k, n = 132_000, 128, 16400
    lhs = jaxfp8.quantize(uniform(0, m, k))
    rhs = jaxfp8.quantize(uniform(1, len(sizes), n, k), (128, 128))
    y = jax.jit(jaxfp8.grouped_gemm)(lhs, rhs, jnp.asarray(sizes))
    assert y.size > 2**31
    ends = np.cumsum(sizes)
    rows = edges(m, *(ends - 1), *ends, 2**31 // n, 2**31 // n + 1)
    group = np.searchsorted(ends, rows, side="right")
    weight = np.concatenate([oracle.dequantize(rhs), np.zeros((1, n, k))])  # rows past the last
    want = np.einsum("rk,rnk->rn", value(lhs, rows), weight[group])
    assert oracle.error(np.asarray(y[rows]).astype(np.float32), want) < BF16


def test_a_masked_product_of_more_than_2_31_elements():
    masked = np.array([33_000, 0, 20_000, 129], np.int32)
    m, k, n = 33_000, 128, 16400
    lhs = jaxfp8.quantize(uniform(0, 4, m, k))
    rhs = jaxfp8.quantize(uniform(1, 4, n, k), (128, 128))
    y = jax.jit(jaxfp8.masked_grouped_gemm)(lhs, rhs, jnp.asarray(masked))
    assert y.size > 2**31
    weights = oracle.dequantize(rhs)
    for g, size in enumerate(masked):
        rows = edges(m, min(size, m - 1), max(0, size - 1))
        one = jaxfp8.QuantizedArray(lhs.data[g], lhs.scale[g], lhs.block)
        want = np.where((rows < size)[:, None], value(one, rows) @ weights[g].T, 0)
        assert oracle.error(np.asarray(y[g, rows]).astype(np.float32), want) < BF16


def test_a_ragged_weight_gradient_of_many_large_groups():
    groups, tokens, n, k = 64, 32768, 7168, 2048
    share = np.random.default_rng(0).zipf(1.5, groups).clip(0, 50)
    share[3] = 0
    sizes = np.floor(share / share.sum() * tokens).astype(np.int32)
    dy, x = normal(0, tokens, n), normal(1, tokens, k)
    columns = jax.jit(lambda v, s: jaxfp8.quantize_both(v, group_sizes=s)[1])
    device_sizes = jnp.asarray(sizes)
    dw = jax.jit(jaxfp8.grouped_wgrad_gemm)(
        columns(dy, device_sizes), columns(x, device_sizes), device_sizes
    )
    starts = np.cumsum(sizes) - sizes
    for g in (0, 3, 17, 63, int(sizes.argmax()), int(sizes.argmin())):
        span = slice(int(starts[g]), int(starts[g] + sizes[g]))
        rows = edges(n)
        if not sizes[g]:
            assert not np.asarray(dw[g]).any()
            continue
        a = oq.quantize_blocks(np.asarray(dy[span][:, rows]).T)
        b = oq.quantize_blocks(np.asarray(x[span]).T)
        assert oracle.error(dw[g, rows], oq.dequantize(*a) @ oq.dequantize(*b).T) < F32


def test_quantizers_of_more_than_2_31_elements():
    m, k = 131_077, 16_392
    x = uniform(0, m, k)
    assert x.size > 2**31
    rows = edges(m, 2**31 // k, 2**31 // k + 1)
    row, column = jax.jit(jaxfp8.quantize_both)(x)
    data, scale = oq.quantize_blocks(np.asarray(x[rows]))
    np.testing.assert_array_equal(np.asarray(row.data[rows]).view(np.uint8), data.view(np.uint8))
    np.testing.assert_array_equal(row.scale[rows], scale)
    columns = edges(k)
    data, scale = oq.quantize_columns(np.asarray(x[:, columns]))
    got = np.asarray(column.data[columns])
    np.testing.assert_array_equal(got.view(np.uint8), data.view(np.uint8))
    np.testing.assert_array_equal(column.scale[columns], scale)


def test_linear_trains_at_the_size_of_a_real_layer():
    """Rows of y and dx, and of dw, of a layer that fills the device."""
    tokens, k, n = 15872, 4096, 16384
    x, w, dy = normal(0, tokens, k), normal(1, k, n), normal(2, tokens, n)

    @jax.jit
    def run(x, w, dy):
        y, pull = jax.vjp(jaxfp8.linear, x, w)
        return y, *pull(dy)

    y, dx, dw = (v.astype(jnp.float32) for v in run(x, w, dy))
    rows = edges(tokens)
    weight = oq.dequantize(*oq.quantize_blocks(np.asarray(w), (128, 128)), (128, 128))
    exact = oq.dequantize(*oq.quantize_blocks(np.asarray(x[rows])))
    assert oracle.error(y[rows], exact @ weight) < BF16
    exact = oq.dequantize(*oq.quantize_blocks(np.asarray(dy[rows])))
    assert oracle.error(dx[rows], exact @ weight.T) < BF16
    rows = edges(k)
    a = oq.dequantize(*oq.quantize_columns(np.asarray(x[:, rows])))
    b = oq.dequantize(*oq.quantize_columns(np.asarray(dy)[:, :2048]))
    assert oracle.error(dw[rows, :2048], a @ b.T) < BF16
