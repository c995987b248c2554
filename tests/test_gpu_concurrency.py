"""On a Hopper GPU: everything that runs at the same time as something else.

Command buffers (CUDA graphs), threads, processes, the profiler. `tests/gpu_check.sh` runs this file beside others.
"""

import concurrent.futures
import hashlib
import os
import pathlib
import re
import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxfp8

pytestmark = pytest.mark.gpu

ROOT = pathlib.Path(__file__).resolve().parents[1]
GRAPHS = "FUSION,CUBLAS,CUBLASLT,CUSTOM_CALL,CUDNN,CONDITIONAL,WHILE"
OURS = ("gemm_1d", "quantize_")


@pytest.fixture(autouse=True, scope="module")
def gpu():
    if jax.default_backend() != "gpu":
        pytest.skip("needs a GPU that JAX can use")


def normal(key, *shape):
    return jax.random.normal(jax.random.key(key), shape, jnp.bfloat16)


def network(width, depth, tokens):
    """A jitted value-and-gradient with many independent FP8 products, and its arguments."""
    x = normal(0, tokens, width)
    keys = jax.random.split(jax.random.key(1), depth)
    # Weights of their own: XLA puts a slice of one array into a fusion that it captures only if asked to.
    ws = [jax.random.normal(k, (width, width), jnp.float32) / width**0.5 for k in keys]
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
from tests import test_gpu_concurrency as t
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
    ours = [name for name in kernels(events) if name.startswith(OURS)]
    # 4 linear layers and a ragged_dot, each forward and weight gradient; x needs no gradient.
    assert len([name for name in ours if name.startswith("gemm_")]) == 10, sorted(set(ours))


def test_a_replayed_command_buffer_launches_no_kernel_of_its_own(tmp_path):
    """The custom calls are captured: a replay is graph launches only."""
    f, args = network(512, 4, 1111)
    options = {"xla_gpu_enable_command_buffer": GRAPHS, "xla_gpu_graph_min_graph_size": 1}
    step = f.lower(*args).compile(compiler_options=options)
    for _ in range(4):
        jax.block_until_ready(step(*args))
    _, events = traced(tmp_path, lambda: step(*args))
    names = [name for _, _, name in events]
    assert any("GraphLaunch" in name for name in names), sorted(set(names))
    on_host = [name for plane, _, name in events if "CPU" in plane]
    # A launch by the host is traced under its kernel's name.
    assert not [name for name in on_host if name.startswith(OURS)]


FIRST_USE = """
    import os
    import jax, jax.numpy as jnp, numpy as np
    import jaxfp8
"""


def run_alone(code, **options):
    """In a process that has loaded no kernel yet."""
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(FIRST_USE) + textwrap.dedent(code)],
        check=True, text=True, capture_output=True, timeout=240, cwd=ROOT,
        env={**os.environ, "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}, **options,
    ).stdout.split()  # fmt: skip


def test_first_use_inside_a_capture():
    """The first execution of the process's first program captures a command buffer: kernels are there before."""
    out = run_alone(
        f"""
        x = jnp.ones((512, 512), jnp.bfloat16)
        w = jnp.ones((512, 256), jnp.bfloat16) / 512
        step = jax.jit(lambda x, w: jaxfp8.linear(jnp.tanh(x), w)).lower(x, w).compile(
            compiler_options={{
                "xla_gpu_enable_command_buffer": "{GRAPHS}", "xla_gpu_graph_min_graph_size": 1,
            }}
        )
        for _ in range(4):
            y = np.asarray(step(x, w), np.float32)
            assert abs(y / np.tanh(1) - 1).max() < 0.05, y
        print("right")
        """
    )
    assert out == ["right"]


@pytest.mark.skipif(jax.device_count() < 2, reason="needs two GPUs")
def test_a_new_kernel_after_a_collective_on_two_gpus():
    """One device is in a collective while its peer's thread comes to a kernel that is not loaded yet."""
    out = run_alone(
        """
        from jax.sharding import NamedSharding, PartitionSpec as P
        mesh = jax.make_mesh((2,), ("d",), devices=jax.devices()[:2])
        put = lambda x, spec: jax.device_put(x, NamedSharding(mesh, spec))
        x = put(jnp.ones((4096, 1024), jnp.bfloat16), P("d"))
        def program(k):  # each width is another kernel
            def body(x, w):
                for _ in range(20):
                    x = jax.lax.psum(x, "d") / 2
                return jax.lax.psum(jaxfp8.linear(x, w), "d")
            w = put(jnp.ones((1024, k), jnp.bfloat16) / 1024, P())
            return jax.jit(jax.shard_map(body, mesh=mesh, in_specs=(P("d"), P()), out_specs=P()))(x, w)
        results = [program(k) for k in (16, 32, 64, 128, 192, 256, 1024, 4096)]  # none is awaited
        for y in results:
            assert abs(np.asarray(y, np.float32) - 2).max() < 0.1
        print("right")
        """
    )
    assert out == ["right"]
