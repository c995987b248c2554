"""Layers at the level of JAX, forward and backward, quantization included, against XLA's bfloat16 in the same run.

    python benchmarks/layer_bench.py OUT.json

Wall time of many queued calls divided by their number, so host time hides where the device is busy; medians of rounds
that alternate between the two sides, on fresh random normal data larger than the L2 cache.
"""

import functools
import json
import pathlib
import statistics
import subprocess
import sys
import time

import jax
import jax.numpy as jnp

import jaxfp8

ROUNDS, CALLS = 7, 10


def time_sides(sides):
    """Median seconds a call of each side; rounds alternate, so drift of the clocks hits all alike."""
    for run in sides.values():
        jax.block_until_ready(run())
    times = {name: [] for name in sides}
    for _ in range(ROUNDS):
        for name, run in sides.items():
            start = time.perf_counter()
            for _ in range(CALLS):
                out = run()
            jax.block_until_ready(out)
            times[name].append((time.perf_counter() - start) / CALLS)
    return {name: statistics.median(v) for name, v in times.items()}


def train(f, *args):
    """y and the gradients of f for a given dy, compiled."""
    y = jax.eval_shape(f, *args)
    dy = jax.random.normal(jax.random.key(9), y.shape, y.dtype)

    @jax.jit
    def run(args, dy):
        y, pull = jax.vjp(f, *args)
        return y, pull(dy)

    return functools.partial(run, args, dy)


def forward(f, *args):
    return functools.partial(jax.jit(f), *args)


def normal(key, *shape):
    return jax.random.normal(jax.random.key(key), shape, jnp.bfloat16)


def linear_case(tokens, k, n):
    x, w = normal(0, tokens, k), normal(1, k, n)
    flops = 2 * tokens * k * n
    return flops, (x, w), {"fp8": lambda x, w: jaxfp8.linear(x, w), "bf16": jnp.dot}


def ragged_case(tokens, experts, k, n):
    x, w = normal(0, tokens, k), normal(1, experts, k, n)
    share = jax.random.uniform(jax.random.key(3), (experts,), minval=0.7, maxval=1.3)
    sizes = jnp.floor(share / share.sum() * tokens).astype(jnp.int32)
    sizes = sizes.at[0].add(tokens - sizes.sum())
    flops = 2 * tokens * k * n
    sides = {
        "fp8": lambda x, w: jaxfp8.ragged_dot(x, w, sizes),
        "bf16": lambda x, w: jax.lax.ragged_dot(x, w, sizes),
    }
    return flops, (x, w), sides


CASES = {
    "linear 15872x4096x16384": linear_case(15872, 4096, 16384),
    "linear 15872x16384x4096": linear_case(15872, 16384, 4096),
    "linear 8192x4096x4096": linear_case(8192, 4096, 4096),
    "linear 4096x7168x2048": linear_case(4096, 7168, 2048),
    "ragged_dot 8 experts 16384x4096x2048": ragged_case(16384, 8, 4096, 2048),
    "ragged_dot 32 experts 16384x2048x1408": ragged_case(16384, 32, 2048, 1408),
}


def main():
    device = jax.devices()[0]
    rows = []
    for name, (flops, args, sides) in CASES.items():
        for mode, make, products in (("forward", forward, 1), ("train", train, 3)):
            seconds = time_sides({side: make(f, *args) for side, f in sides.items()})
            row = {"case": name, "mode": mode}
            row |= {f"{side}_ms": 1e3 * s for side, s in seconds.items()}
            row |= {f"{side}_tflops": products * flops / s / 1e12 for side, s in seconds.items()}
            row["speedup"] = seconds["bf16"] / seconds["fp8"]
            rows.append(row)
            print(
                f"{name:40s} {mode:8s} fp8 {row['fp8_ms']:8.3f} ms {row['fp8_tflops']:6.0f} TF/s   "
                f"bf16 {row['bf16_ms']:8.3f} ms {row['bf16_tflops']:6.0f} TF/s   {row['speedup']:.2f}x",
                flush=True,
            )
    query = ["nvidia-smi", "--query-gpu=name,driver_version,clocks.sm,power.draw,temperature.gpu"]
    state = subprocess.run([*query, "--format=csv,noheader"], capture_output=True, text=True).stdout
    result = {
        "device": device.device_kind,
        "jax": jax.__version__,
        "gpu_after": state.strip(),
        "rows": rows,
    }
    pathlib.Path(sys.argv[1]).write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
