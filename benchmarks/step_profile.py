"""Where the time of a step goes on a GPU: kernels, gaps between them, launches by the host, command buffers.

    python benchmarks/step_profile.py OUT.json [--traces DIR]

Programs: a layer's forward and backward pass, the training step of examples/train_lm.py, and a chain of 200 products
that each add to the last one's result. Each is compiled with command buffers (CUDA graphs) and without, timed, and
traced with jax.profiler for the kernels' own times.
"""

import argparse
import collections
import gzip
import json
import pathlib
import re
import statistics
import sys
import tempfile
import time

import jax
import jax.numpy as jnp
import numpy as np

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "examples"))

import jaxfp8  # noqa: E402

GRAPHS = "FUSION,CUBLAS,CUBLASLT,CUSTOM_CALL,CUDNN,CONDITIONAL,WHILE"
MODES = {
    "launches": {"xla_gpu_enable_command_buffer": ""},
    "command buffers": {
        "xla_gpu_enable_command_buffer": GRAPHS,
        "xla_gpu_graph_min_graph_size": 1,
    },
    "XLA's default": {},
}
STEPS = 4


# ---- Traces


def read_trace(folder, keep=None):
    """Kernels (name, start and duration in nanoseconds); launches of kernels and of graphs by the host."""
    (path,) = pathlib.Path(folder).rglob("*.xplane.pb")
    if keep is not None:
        keep.write_bytes(gzip.compress(path.read_bytes()))
    kernels, calls = [], collections.Counter()
    for plane in jax.profiler.ProfileData.from_file(str(path)).planes:
        for line in plane.lines:
            if re.search(r"GPU:\d", plane.name) and "Stream" in line.name:
                kernels += [(e.name, e.start_ns, e.duration_ns) for e in line.events]
            elif "CPU" in plane.name:
                calls.update(e.name for e in line.events)
    # A launch by the host is traced under its kernel's name.
    names = {name for name, _, _ in kernels}
    launches = sum(n for name, n in calls.items() if name in names)
    graphs = sum(n for name, n in calls.items() if name.startswith("cuGraphLaunch"))
    return sorted(kernels, key=lambda k: k[1]), launches, graphs


def kernel_kind(name):
    """The kernel's name without what tells instances of a template apart."""
    if match := re.match(r"(quantize_\w+|gemm_\w+)", name):
        return match.group(1)
    return re.sub(r"[<(].*", "", name)[:60]


def breakdown(kernels, steps):
    """Milliseconds and launches a step by kind of kernel, the time with no kernel running, and the span."""
    by_kind = collections.defaultdict(lambda: [0, 0.0])
    for name, _, duration in kernels:
        by_kind[kernel_kind(name)][0] += 1
        by_kind[kernel_kind(name)][1] += duration
    end, idle = kernels[0][1], 0
    for _, start, duration in kernels:
        idle += max(0, start - end)
        end = max(end, start + duration)
    rows = [
        {"kernel": kind, "launches": count / steps, "ms": total / steps / 1e6}
        for kind, (count, total) in by_kind.items()
    ]
    return {
        "kernels": len(kernels) / steps,
        "custom_calls": sum(r["launches"] for r in rows if is_ours(r["kernel"])),
        "span_ms": (end - kernels[0][1]) / steps / 1e6,
        "idle_ms": idle / steps / 1e6,
        "by_kernel": sorted(rows, key=lambda r: -r["ms"]),
    }


def is_ours(kernel):
    return kernel.startswith(("gemm_1d", "quantize_")) or "jaxfp8" in kernel


def profile(name, lowered, make_args, keep_folder=None, calls=20, step=None, modes=tuple(MODES)):
    """One row a mode. `make_args()` gives arguments; `step(compiled, args)` what comes next."""
    step = step or (lambda compiled, args: (compiled(*args), args))
    rows = []
    for mode in modes:
        options = MODES[mode]
        compiled = lowered.compile(compiler_options=options)
        args = make_args()
        for _ in range(4):
            out, args = step(compiled, args)
        jax.block_until_ready(out)
        walls, cpu = [], time.process_time()
        for _ in range(5):
            start = time.perf_counter()
            for _ in range(calls):
                out, args = step(compiled, args)
            jax.block_until_ready(out)
            walls.append((time.perf_counter() - start) / calls)
        cpu = (time.process_time() - cpu) / (5 * calls)
        with tempfile.TemporaryDirectory() as folder:
            with jax.profiler.trace(folder):
                for _ in range(STEPS):
                    out, args = step(compiled, args)
                jax.block_until_ready(out)
            label = f"{name}-{mode}".replace(" ", "_").replace("'", "")
            keep = keep_folder / f"{label}.xplane.pb.gz" if keep_folder else None
            kernels, launches, graphs = read_trace(folder, keep)
        row = {
            "program": name,
            "mode": mode,
            "wall_ms": 1e3 * statistics.median(walls),
            "cpu_ms": 1e3 * cpu,
            "kernel_launches": launches / STEPS,
            "graph_launches": graphs / STEPS,
        }
        if kernels:
            row |= breakdown(kernels, STEPS)
        rows.append(row)
        print_row(row)
    return rows


def print_row(row):
    print(
        f"{row['program']}, {row['mode']}: {row['wall_ms']:.3f} ms a step ({row['cpu_ms']:.3f} of a CPU), "
        f"{row.get('kernels', 0):.0f} kernels ({row.get('custom_calls', 0):.0f} ours), busy "
        f"{row.get('span_ms', 0) - row.get('idle_ms', 0):.3f} of {row.get('span_ms', 0):.3f} ms; "
        f"{row['kernel_launches']:.0f} kernel and {row['graph_launches']:.0f} graph launches by the host",
        flush=True,
    )
    for kernel in row.get("by_kernel", [])[:12]:
        print(f"    {kernel['ms']:9.4f} ms {kernel['launches']:6.1f}x  {kernel['kernel']}")


# ---- Programs


def normal(key, *shape):
    return jax.random.normal(jax.random.key(key), shape, jnp.bfloat16)


def layer(linear, tokens, k, n):
    x, w, dy = normal(0, tokens, k), normal(1, k, n), normal(2, tokens, n)

    def run(x, w, dy):
        y, pull = jax.vjp(linear, x, w)
        return y, *pull(dy)

    return jax.jit(run).lower(x, w, dy), lambda: (x, w, dy)


def train_step(moe):
    import _lm_products
    import _lm_training
    import train_lm

    arguments = ["--size", "medium"] + ["--moe"] * moe
    settings, _ = train_lm.parse_arguments(arguments)
    run = _lm_training.Run("fp8", _lm_products.fp8_products(settings.recipe), settings)
    shape = (settings.batch, settings.sequence + 1)
    windows = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    lowered = jax.jit(run._step, donate_argnums=0).lower(run.state, windows)

    def step(compiled, args):
        state, loss = compiled(*args)
        return loss, (state, args[1])

    return lowered, lambda: (jax.tree.map(jnp.copy, run.state), windows), step


def chain(n=200):
    """n products on one tile, each adding to the last one's result in place: one custom call each."""
    q = jaxfp8.quantize(normal(0, 128, 128))

    def run(q, c):
        for _ in range(n):
            c = jaxfp8.wgrad_gemm(q, q, accum=c)
        return c

    lowered = jax.jit(run, donate_argnums=1).lower(q, jnp.zeros((128, 128)))

    def step(compiled, args):
        c = compiled(*args)
        return c, (args[0], c)

    return lowered, lambda: (q, jnp.zeros((128, 128))), step


def fusions(n=200):
    """n small kernels of XLA's own, each on the last one's result: what a launch costs the host without us."""

    def run(x):
        for _ in range(n):
            x = jax.lax.optimization_barrier(x * 0.5 + 1)
        return x

    x = jnp.zeros((128, 128))
    return jax.jit(run).lower(x), lambda: (x,)


def quantizations(n=200):
    """n independent quantizations of one tile: custom calls without tensor maps."""
    xs = [normal(i, 128, 128) for i in range(n)]
    return jax.jit(lambda xs: [jaxfp8.quantize(x) for x in xs]).lower(xs), lambda: (xs,)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=pathlib.Path)
    parser.add_argument("--traces", type=pathlib.Path, help="keep the traces here")
    parser.add_argument("--only", default="", help="programs whose name contains this")
    arguments = parser.parse_args()
    if arguments.traces:
        arguments.traces.mkdir(parents=True, exist_ok=True)

    def bf16(x, w):
        return jnp.dot(x, w)

    programs = {
        "chain of 200 products": chain,
        "chain of 200 XLA fusions": fusions,
        "200 quantizations": quantizations,
        "linear 15872x4096x16384": lambda: layer(jaxfp8.linear, 15872, 4096, 16384),
        "bf16 15872x4096x16384": lambda: layer(bf16, 15872, 4096, 16384),
        "linear 512x1024x1024": lambda: layer(jaxfp8.linear, 512, 1024, 1024),
        "train_lm medium": lambda: train_step(False),
        "train_lm medium mixture": lambda: train_step(True),
    }
    rows = []
    for name, make in programs.items():
        if arguments.only not in name:
            continue
        lowered, make_args, *step = make()
        train = name.startswith("train")
        rows += profile(
            name,
            lowered,
            make_args,
            arguments.traces,
            calls=5 if train else 20,
            step=step[0] if step else None,
            modes=("launches", "command buffers") if train else tuple(MODES),
        )
    result = {"device": jax.devices()[0].device_kind, "jax": jax.__version__, "rows": rows}
    arguments.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
