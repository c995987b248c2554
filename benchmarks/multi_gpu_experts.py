"""A mixture of experts on N GPUs against one GPU with all of the tokens: forward, and forward and backward."""

import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import PartitionSpec as P
from layer_bench import swiglu, time_sides
from multi_gpu_common import communication, on_mesh, place, queued
from speed import load_peers

import jaxfp8

AXIS = "gpu"
TOKENS, SLACK = 8192, 1.25
"""Tokens a GPU; rows of an even share that a GPU has room for. Copies that find none are counted."""

SHAPES = {  # experts, width, hidden, choices
    "32 experts 4096x2048, top 8": (32, 4096, 2048, 8),
    "DeepSeek-V3-like, 32 experts 7168x2048, top 8": (32, 7168, 2048, 8),
}
TINY = {"8 experts 256x128, top 2": (8, 256, 128, 2)}


def routing(key, tokens, experts, choices):
    """Each token's experts, whose shares are uneven, U(0.7, 1.3), and their gates."""
    share = jax.random.uniform(jax.random.key(key), (experts,), minval=0.7, maxval=1.3)
    noise = jax.random.gumbel(jax.random.key(key + 1), (tokens, experts))
    score, expert = lax.top_k(jnp.log(share) + noise, choices)
    return expert.astype(jnp.int32), jax.nn.softmax(score)


def composed(products, quantized=True):
    """dispatch, products, combine."""

    def layer(x, expert, gate, up, down, axis_name=None, max_rows=None):
        rows, sizes, route = jaxfp8.dispatch(
            x, expert, up.shape[0] * devices_of(axis_name), axis_name=axis_name,
            max_rows=max_rows, quantized=quantized,
        )  # fmt: skip
        return jaxfp8.combine(products(rows, up, down, sizes), gate, route), route.overflow[None]

    return layer


def in_chunks(products, chunks=4):
    """`composed` in chunks of tokens: one is multiplied while one goes there and one comes back (docs/scaling.md)."""

    def layer(x, expert, gate, up, down, axis_name=None, max_rows=None):
        xs, experts, gates = (jnp.split(v, chunks) for v in (x, expert, gate))
        send = functools.partial(
            jaxfp8.dispatch, num_experts=up.shape[0] * devices_of(axis_name), axis_name=axis_name,
            max_rows=max_rows and max_rows // chunks,
        )  # fmt: skip
        there, back, sums, overflow = send(xs[0], experts[0]), None, [], 0
        for i in range(chunks):
            rows, sizes, route = there
            there = send(xs[i + 1], experts[i + 1]) if i + 1 < chunks else None
            y = products(rows, up, down, sizes)
            total = jaxfp8.combine(*back) if back else None
            there, y, total = lax.optimization_barrier((there, y, total))
            sums, back, overflow = [*sums, total], (y, gates[i], route), overflow + route.overflow
        return jnp.concatenate([*sums[1:], jaxfp8.combine(*back)]), overflow[None]

    return layer


def devices_of(axis_name):
    return 1 if axis_name is None else lax.axis_size(axis_name)


def fused(x, expert, gate, up, down, axis_name=None, max_rows=None):
    y = jaxfp8.moe(x, expert, gate, up, down, axis_name=axis_name, max_rows=max_rows)
    return y, jnp.zeros(1, jnp.int32)


def bf16_products(ragged_dot):
    def products(rows, up, down, sizes):
        hidden = ragged_dot(rows, up.reshape(*up.shape[:2], -1), sizes)
        return ragged_dot(swiglu(hidden), down, sizes)

    return products


def variants(peer):
    found = {
        "fp8": composed(jaxfp8.ragged_mlp),
        "fp8 4 chunks": in_chunks(jaxfp8.ragged_mlp),
    }
    if "axis_name" in inspect.signature(jaxfp8.moe).parameters:
        found["fp8 moe"] = fused
    if peer is not None:
        for name, ragged_dot in load_peers([peer])[0].ragged_dots().items():
            found[f"bf16 {name}"] = composed(bf16_products(ragged_dot), quantized=False)
    return found


def pass_of(layer, backward):
    """Forward; or forward and all gradients of half the squared result, which needs the result first."""

    def run(x, expert, gate, up, down):
        if not backward:
            return layer(x, expert, gate, up, down)

        def loss(x, gate, up, down):
            y, overflow = layer(x, expert, gate, up, down)
            return jnp.sum(jnp.square(y.astype(jnp.float32))) / 2, (y, overflow)

        gradients, (y, overflow) = jax.grad(loss, (0, 1, 2, 3), has_aux=True)(x, gate, up, down)
        return y, overflow, gradients

    return jax.jit(run)


def arrays_of(shape, tokens):
    experts, width, hidden, choices = shape

    def normal(key, *shape):
        return jax.random.normal(jax.random.key(key), shape, jnp.bfloat16)

    expert, gate = routing(3, tokens, experts, choices)
    up = normal(1, experts, width, 2, hidden) / width**0.5
    return (
        normal(0, tokens, width),
        expert,
        gate,
        up,
        normal(2, experts, hidden, width) / hidden**0.5,
    )


def agreement(many, one):
    """Norm-wise differences of the results on N GPUs from those on one: of y, and of the weights' gradients."""

    def difference(got, want):
        got, want = (np.asarray(v, np.float32).ravel() for v in (got, want))
        return float(np.linalg.norm(got - want) / np.linalg.norm(want))

    found = {"y_difference": difference(many[0], one[0])}
    if len(many) == 3:
        found["dw_difference"] = max(map(difference, many[2][2:], one[2][2:]))
    return found


def measure_case(name, shape, layer, devices, tokens, backward):
    """One variant, one pass: milliseconds on one GPU and on N, what is exposed, and whether they agree."""
    mesh = on_mesh(devices, AXIS)
    arrays = arrays_of(shape, devices * tokens)
    max_rows = int(SLACK * tokens * shape[3])
    many = functools.partial(layer, axis_name=AXIS, max_rows=max_rows)
    cut = jax.shard_map(many, mesh=mesh, in_specs=P(AXIS), out_specs=P(AXIS))
    runs = {
        "one": functools.partial(pass_of(layer, backward), *arrays),
        "many": queued(functools.partial(pass_of(cut, backward), *place(arrays, mesh, AXIS))),
    }
    results = {side: run() for side, run in runs.items()}
    row = agreement(results["many"], results["one"])
    row["overflow"] = int(np.sum(results["many"][1]))
    del results
    seconds = time_sides(runs)
    row |= {"one_ms": 1e3 * seconds["one"], "many_ms": 1e3 * seconds["many"]}
    row["speedup"] = row["one_ms"] / row["many_ms"]
    return row | (communication(runs["many"]) or {})


def print_row(row):
    text = (
        f"{row['case']:46} {row['variant']:14} {row['pass']:8} one {row['one_ms']:8.2f} ms, many {row['many_ms']:8.2f} "
        f"ms, {row['speedup']:.2f}x; y {row['y_difference']:.1e}, lost {row['overflow']}"
    )
    if "dw_difference" in row:
        text += f", dw {row['dw_difference']:.1e}"
    if "exposed_ms" in row:
        text += (
            f"; {row['communication_ms']:.2f} ms of communication, {row['exposed_ms']:.2f} exposed"
        )
    print(text, flush=True)


def measure(arguments, budget):
    rows = []
    tokens, shapes = (256, TINY) if arguments.tiny else (TOKENS, SHAPES)
    for case, shape in shapes.items():
        for variant, layer in variants(arguments.peer).items():
            for backward in (False, True):
                what = "train" if backward else "forward"
                if not budget.allows(25, f"experts, {case}, {variant}, {what}"):
                    continue
                row = {"case": case, "variant": variant, "pass": what, "tokens_a_gpu": tokens}
                row |= measure_case(case, shape, layer, arguments.devices, tokens, backward)
                rows.append(row)
                print_row(row)
    return rows
