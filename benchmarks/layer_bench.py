"""Layers at the level of JAX, forward and backward, quantization included, against XLA's bfloat16 in the same run.

    python benchmarks/layer_bench.py OUT.json [--only TEXT]

Wall time of many queued calls divided by their number, so host time hides where the device is busy; medians of rounds
that alternate between the sides, on random normal data larger than the L2 cache. `benchmarks/speed.py` adds peers.
"""

import argparse
import functools
import json
import pathlib
import statistics
import time

import jax
import jax.numpy as jnp

import jaxfp8

ROUNDS, SECONDS = 5, 0.1


def time_sides(sides):
    """Median seconds a call of each side; rounds alternate, so drift of the clocks hits all alike."""
    calls, times = {}, {}
    for name, run in sides.items():
        jax.block_until_ready(run())
        start = time.perf_counter()
        jax.block_until_ready(run())
        calls[name] = max(1, min(50, int(SECONDS / (time.perf_counter() - start))))
        times[name] = []
    for i in range(ROUNDS):
        for name, run in sides.items():
            if calls[name] < 3 and i > 1:  # slow: two rounds
                continue
            start = time.perf_counter()
            for _ in range(calls[name]):
                out = run()
            jax.block_until_ready(out)
            times[name].append((time.perf_counter() - start) / calls[name])
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


def swiglu(gate_up):
    gate, up = jnp.split(gate_up, 2, axis=-1)
    return jax.nn.silu(gate) * up


# A case: floating-point operations forward, arguments, f(product) for a side's product, and the operation that fuses
# it all, or None.


def linear_case(tokens, k, n):
    return 2 * tokens * k * n, (normal(0, tokens, k), normal(1, k, n)), lambda dot: dot, None


def mlp_case(tokens, width, hidden):
    """SwiGLU: x . (gate, up), then down."""
    up = normal(1, width, 2, hidden) / width**0.5
    args = normal(0, tokens, width), up, normal(2, hidden, width)

    def build(dot):
        return lambda x, up, down: dot(swiglu(dot(x, up.reshape(width, -1))), down)

    return 6 * tokens * width * hidden, args, build, jaxfp8.mlp


def group_sizes(rows, experts):
    share = jax.random.uniform(jax.random.key(3), (experts,), minval=0.7, maxval=1.3)
    sizes = jnp.floor(share / share.sum() * rows).astype(jnp.int32)
    return sizes.at[0].add(rows - sizes.sum())


def ragged_case(rows, experts, k, n):
    sizes = group_sizes(rows, experts)

    def build(ragged_dot):
        return lambda x, w: ragged_dot(x, w, sizes)

    return 2 * rows * k * n, (normal(0, rows, k), normal(1, experts, k, n)), build, None


def moe_case(rows, experts, width, hidden):
    """The experts of a mixture: SwiGLU on rows sorted by expert."""
    sizes = group_sizes(rows, experts)
    args = (
        normal(0, rows, width),
        normal(1, experts, width, 2, hidden) / width**0.5,
        normal(2, experts, hidden, width),
    )

    def build(ragged_dot):
        def f(x, up, down):
            up = up.reshape(experts, width, -1)
            return ragged_dot(swiglu(ragged_dot(x, up, sizes)), down, sizes)

        return f

    def fused(x, up, down):
        return jaxfp8.ragged_mlp(x, up, down, sizes)

    return 6 * rows * width * hidden, args, build, fused


DENSE = {
    "linear 15872x4096x16384": lambda: linear_case(15872, 4096, 16384),
    "linear 15872x16384x4096": lambda: linear_case(15872, 16384, 4096),
    "linear 8192x4096x4096": lambda: linear_case(8192, 4096, 4096),
    "linear 4096x7168x2048": lambda: linear_case(4096, 7168, 2048),
    "Llama-3 8B linear 8192x4096x28672": lambda: linear_case(8192, 4096, 28672),
    "Llama-3 8B linear 8192x14336x4096": lambda: linear_case(8192, 14336, 4096),
    "Llama-3 70B linear 4096x8192x57344": lambda: linear_case(4096, 8192, 57344),
    "Llama-3 70B linear 4096x28672x8192": lambda: linear_case(4096, 28672, 8192),
    "Llama-3 8B SwiGLU 8192x4096x14336": lambda: mlp_case(8192, 4096, 14336),
    "SwiGLU 15872x4096x16384": lambda: mlp_case(15872, 4096, 16384),
}
RAGGED = {
    "ragged_dot 8 experts 16384x4096x2048": lambda: ragged_case(16384, 8, 4096, 2048),
    "ragged_dot 32 experts 16384x2048x1408": lambda: ragged_case(16384, 32, 2048, 1408),
    "DeepSeek-V3 moe 32 experts 32768x7168x2048": lambda: moe_case(32768, 32, 7168, 2048),
    "Mixtral moe 8 experts 16384x4096x14336": lambda: moe_case(16384, 8, 4096, 14336),
}


def measure(linears=None, ragged_dots=None, only="", keep=lambda rows: None):
    """Rows of every case, forward and forward + backward. Peers: callables by name.

    `jax.lax.ragged_dot` is left out of the mixtures where there is another peer: on a GPU it takes tens of times as
    long as either.
    """
    dense = {"fp8": jaxfp8.linear, "XLA bf16": jnp.dot} | (linears or {})
    ragged = {"fp8": jaxfp8.ragged_dot, "jax ragged_dot": jax.lax.ragged_dot} | (ragged_dots or {})
    rows = []
    for name, make in (DENSE | RAGGED).items():
        if only not in name:
            continue
        flops, args, build, fused = make()
        sides = {side: build(f) for side, f in (dense if name in DENSE else ragged).items()}
        if name in RAGGED and fused is not None and ragged_dots:
            sides.pop("jax ragged_dot")
        if fused is not None:
            sides = {"fp8": fused, "fp8 not fused": sides.pop("fp8")} | sides
        for mode, prepare, products in (("forward", forward, 1), ("train", train, 3)):
            runs = {}
            for side, f in sides.items():
                try:
                    run = prepare(f, *args)
                    jax.block_until_ready(run())
                    runs[side] = run
                except Exception as error:  # a peer that refuses a case is named, and left out
                    if side == "fp8":
                        raise
                    print(f"  no {side} {mode}: {type(error).__name__} {str(error)[:200]}")
            seconds = time_sides(runs)
            row = {
                "case": name,
                "mode": mode,
                "ms": {side: 1e3 * s for side, s in seconds.items()},
                "tflops": {side: products * flops / s / 1e12 for side, s in seconds.items()},
            }
            rows.append(row)
            keep(rows)
            print(
                f"{name:44s} {mode:8s}"
                + ", ".join(
                    f"{side} {1e3 * s:.3f} ms {row['tflops'][side]:.0f} TF/s"
                    + ("" if side == "fp8" else f" ({s / seconds['fp8']:.2f}x)")
                    for side, s in seconds.items()
                ),
                flush=True,
            )
        del args, sides, runs
    return rows


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=pathlib.Path)
    parser.add_argument("--only", default="", help="cases whose name contains this")
    arguments = parser.parse_args()
    result = {
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
        "rows": measure(only=arguments.only),
    }
    arguments.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
