"""Collectives between the GPUs of a host, in bytes that a GPU receives a second: JAX's own, `dispatch`'s exchange."""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec as P
from layer_bench import time_sides
from multi_gpu_common import on_mesh, place, queued

from jaxfp8.ops import _exchange

AXIS = "gpu"


def jax_collectives(devices, tokens, width):
    """(function on a device's shard, its shard's shape and dtype, bytes received): rows of `width` bytes a token."""
    others = devices - 1
    there, back = (tokens, width), (devices * tokens, width)

    def all_to_all(x):
        return lax.all_to_all(x, AXIS, 0, 0, tiled=True)

    def all_gather(x):
        return lax.all_gather(x, AXIS, tiled=True)

    def psum_scatter(x):
        return lax.psum_scatter(x, AXIS, tiled=True)

    return {
        "all_to_all uint8": (all_to_all, back, jnp.uint8, others * tokens * width),
        "all_to_all bfloat16": (all_to_all, back, jnp.bfloat16, 2 * others * tokens * width),
        "all_gather uint8": (all_gather, there, jnp.uint8, others * tokens * width),
        "psum_scatter bfloat16": (psum_scatter, back, jnp.bfloat16, 2 * others * tokens * width),
        "psum_scatter float32": (psum_scatter, back, jnp.float32, 4 * others * tokens * width),
    }


def exchange(devices, tokens, strategy):
    """A balanced one of 8 experts a device, top 8, and the blocks of all_to_all with a quarter to spare."""
    block = min(tokens, int(1.25 * tokens * (1 - (1 - 1 / devices) ** 8)))
    levels = _exchange.Levels((AXIS,), (), devices, 1)
    if strategy == "gather":
        return _exchange.Exchange(None, levels, "gather", tokens, tokens, 8), tokens
    expert = jnp.arange(tokens * 8, dtype=jnp.int32).reshape(tokens, 8) * 7 % (8 * devices)
    plan = functools.partial(_exchange.plan_exchange, "rates", expert, 8 * devices, AXIS)
    return plan("all_to_all", block)[0], block


def ours(devices, tokens, width):
    """As `jax_collectives`: FP8 rows and scales to the experts, bfloat16 sums back."""
    found = {}
    for strategy in ("gather", "all_to_all"):

        def there(x, strategy=strategy):
            ex, _ = exchange(devices, tokens, strategy)
            scales = x[:, : width // 128].astype(jnp.float32)
            return _exchange.spread(ex, x, scales)

        def back(x, strategy=strategy):
            ex, _ = exchange(devices, tokens, strategy)
            return _exchange.collect(ex, x)[0]

        block = tokens
        if strategy == "all_to_all":
            block = min(tokens, int(1.25 * tokens * (1 - (1 - 1 / devices) ** 8)))
        moved = (devices - 1) * block
        row = width + width // 32
        shape = (devices * block, width)
        found[f"dispatch {strategy}"] = (there, (tokens, width), jnp.uint8, moved * row)
        found[f"combine {strategy}"] = (back, shape, jnp.bfloat16, moved * 2 * width)
    return found


def measure(arguments, budget):
    devices = arguments.devices
    tokens, width = (256, 256) if arguments.tiny else (8192, 4096)
    mesh = on_mesh(devices, AXIS)
    runs, sizes = {}, {}
    cases = jax_collectives(devices, tokens, width) | ours(devices, tokens, width)
    if not budget.allows(40, "rates"):
        return []
    for name, (function, (rows, columns), dtype, size) in cases.items():
        f = jax.shard_map(function, mesh=mesh, in_specs=P(AXIS), out_specs=P(AXIS))
        x = place(jnp.ones((devices * rows, columns), dtype), mesh, AXIS)
        runs[name], sizes[name] = queued(functools.partial(jax.jit(f), x)), size
    rows = []
    for name, seconds in time_sides(runs).items():
        rate = sizes[name] / seconds / 1e9
        rows.append(
            {"what": name, "megabytes": sizes[name] / 1e6, "ms": 1e3 * seconds, "gb_per_s": rate}
        )
        print(
            f"{name:24} {sizes[name] / 1e6:8.1f} MB {1e3 * seconds:8.3f} ms {rate:7.0f} GB/s",
            flush=True,
        )
    return rows
