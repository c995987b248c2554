"""On a Hopper GPU: sizes that only a GPU can run, and everything that runs at the same time as something else.

Takes up to 40 GB of the device's memory: `tests/gpu_check.sh` runs this file in one process, beside the others.
"""

import concurrent.futures
import hashlib
import os
import pathlib
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxfp8
from tests import oracle
from tests import oracle_quantize as oq
from tests.test_gpu import BF16, F32

pytestmark = pytest.mark.gpu

ROOT = pathlib.Path(__file__).resolve().parents[1]
GRAPHS = "FUSION,CUBLAS,CUBLASLT,CUSTOM_CALL,CUDNN,CONDITIONAL,WHILE"


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


@pytest.mark.parametrize(
    "m, n, k", [(32768, 2048, 16384), (32769, 4104, 7168), (131, 32768, 16384)]
)
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


# ---- At the same time as something else


def network(width, depth, tokens):
    """A jitted value-and-gradient with many independent FP8 products, and its arguments."""
    x = normal(0, tokens, width)
    ws = jax.random.normal(jax.random.key(1), (depth, width, width), jnp.float32) / width**0.5
    experts = jax.random.normal(jax.random.key(2), (4, width, width), jnp.float32) / width**0.5
    sizes = jnp.array([tokens // 2, 0, tokens // 4, tokens - tokens // 2 - tokens // 4], jnp.int32)

    def loss(ws, experts, x):
        branches = [jaxfp8.linear(x, w) for w in ws]  # independent of one another
        y = sum(jnp.tanh(b) for b in branches) + jaxfp8.ragged_dot(x, experts, sizes)
        return (y.astype(jnp.float32) ** 2).mean()

    return jax.jit(jax.value_and_grad(loss, argnums=(0, 1))), (ws, experts, x)


def digest(tree):
    h = hashlib.sha256()
    for leaf in jax.tree.leaves(tree):
        h.update(np.asarray(leaf).tobytes())
    return h.hexdigest()


@pytest.mark.parametrize("scheduling", ["SERIALIZE", "CONCURRENT", "LHS"])
def test_a_step_in_a_command_buffer_equals_one_outside(scheduling):
    """With CONCURRENT, independent products are branches of one graph and run side by side."""
    f, args = network(640, 6, 1000)
    lowered = f.lower(*args)
    want = digest(lowered.compile(compiler_options={"xla_gpu_enable_command_buffer": ""})(*args))
    step = lowered.compile(
        compiler_options={
            "xla_gpu_enable_command_buffer": GRAPHS,
            "xla_gpu_graph_min_graph_size": 1,
            "xla_gpu_command_buffer_scheduling_mode": scheduling,
        }
    )
    for _ in range(8):
        copies = jax.tree.map(jnp.copy, args)  # other buffers: the graph is updated, then replayed
        assert digest(step(*copies)) == want


def test_threads_that_dispatch_at_the_same_time_get_what_one_thread_gets():
    programs = [network(width, 3, tokens) for width, tokens in ((256, 700), (384, 333), (640, 1))]
    want = [digest(f(*args)) for f, args in programs]

    def work(i):
        f, args = programs[i % 3]
        return [digest(f(*args)) == want[i % 3] for _ in range(10)]

    with concurrent.futures.ThreadPoolExecutor(12) as pool:
        assert all(all(same) for same in pool.map(work, range(12)))


PROCESS = """
import sys
from tests import test_gpu_scale as t
f, args = t.network(512, 4, 1111)
digests = {t.digest(f(*args)) for _ in range(40)}
print(*digests)
"""


def test_processes_that_share_the_gpu_get_what_one_process_gets():
    f, args = network(512, 4, 1111)
    want = digest(f(*args))
    environment = os.environ | {"XLA_PYTHON_CLIENT_PREALLOCATE": "false", "PYTHONPATH": str(ROOT)}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", PROCESS],
            cwd=ROOT,
            env=environment,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )  # fmt: skip
        for _ in range(4)
    ]
    for process in processes:
        out, errors = process.communicate(timeout=300)
        assert process.returncode == 0, errors[-2000:]
        assert out.split() == [want]


def events_of(folder):
    """(plane, line, name) of every event of the trace that jax.profiler wrote into folder."""
    (path,) = pathlib.Path(folder).rglob("*.xplane.pb")
    for plane in jax.profiler.ProfileData.from_file(str(path)).planes:
        for line in plane.lines:
            for event in line.events:
                yield plane.name, line.name, event.name


def traced(folder, run):
    """What `run` gives under the profiler, and the trace's events."""
    with jax.profiler.trace(str(folder)):
        result = jax.block_until_ready(run())
    return result, list(events_of(folder))


def kernels(events):
    return [name for plane, _, name in events if re.search(r"GPU:\d", plane)]


def test_under_the_profiler_results_are_equal_and_kernels_have_names(tmp_path):
    f, args = network(512, 4, 1111)
    want = digest(f(*args))
    result, events = traced(tmp_path, lambda: f(*args))
    assert digest(result) == want
    ours = [name for name in kernels(events) if name.startswith(("gemm_", "quantize_"))]
    # 4 linear layers and a ragged_dot: 3 products each.
    assert len([name for name in ours if name.startswith("gemm_")]) == 15, sorted(set(ours))


def test_a_replayed_command_buffer_launches_no_kernel_of_its_own(tmp_path):
    """The custom calls are captured: a replay is graph launches only."""
    f, args = network(512, 4, 1111)
    options = {"xla_gpu_enable_command_buffer": GRAPHS, "xla_gpu_graph_min_graph_size": 1}
    step = f.lower(*args).compile(compiler_options=options)
    for _ in range(4):
        jax.block_until_ready(step(*args))
    _, events = traced(tmp_path, lambda: step(*args))
    names = [name for _, _, name in events]
    assert [n for n in names if "GraphLaunch" in n], sorted(set(names))[:200]
    launches = [n for n in names if re.search(r"cu(da)?LaunchKernel", n)]
    assert not launches, launches
