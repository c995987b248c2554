"""Blocks of mixtures of experts, forward and backward: FP8 from router to output beside today's pieces and BF16.

    python benchmarks/moe.py [OUT] [--only TEXT] [--sides pieces,bf16] [--peer benchmarks/tokamax_peer.py]

Writes OUT/moe-DEVICE-DATE.json. Tokens choose experts by skewed random scores; x and weights are bfloat16, gates
float32. All sides of a block take turns in one process. `ms`, `forward_ms`: wall time of queued calls. `kernels_ms`,
`products_ms`: time of all kernels, and of the products alone, in a trace of the profiler. Memory is what XLA's plan
of the forward and backward program needs at its peak, arguments included.

    moe         jaxfp8.moe
    pieces      jaxfp8.dispatch, ragged_mlp, combine
    bf16        sort, take, jax.lax.ragged_dot, SwiGLU, gated sum of each token's rows; with a peer's product for each
                that a `--peer` file gives (see speed.py)
"""

import argparse
import dataclasses
import datetime
import functools
import json
import pathlib
import tempfile

import jax
import jax.numpy as jnp
import step
from layer_bench import swiglu, time_sides
from speed import load_peers, machine_state
from step_profile import breakdown, read_trace

import jaxfp8
from jaxfp8.ops._routing import plan

ROOT = pathlib.Path(__file__).resolve().parents[1]


@dataclasses.dataclass(frozen=True)
class Block:
    experts: int
    width: int
    hidden: int
    choices: int
    tokens: int

    @property
    def flops(self) -> int:
        """Forward and backward."""
        return 3 * 6 * self.tokens * self.choices * self.width * self.hidden


BLOCKS = {
    "32 experts 4096x2048, top 8": Block(32, 4096, 2048, 8, 16384),
    "64 experts 2048x1408, top 6": Block(64, 2048, 1408, 6, 16384),
    "DeepSeek-V3, 32 experts of one device 7168x2048": Block(32, 7168, 2048, 8, 4096),
    "Mixtral, 8 experts 4096x14336, top 2": Block(8, 4096, 14336, 2, 8192),
}
TINY = {"8 experts 128x128, top 2": Block(8, 128, 128, 2, 256)}
"""For a machine without a GPU: the programs, not their speed."""


def operands(block: Block):
    """expert, x, gate, w_up, w_down."""
    keys = jax.random.split(jax.random.key(0), 5)

    def normal(key, *shape, scale=1.0):
        return (jax.random.normal(key, shape) * scale).astype(jnp.bfloat16)

    skew = 0.5 * jax.random.normal(keys[0], (block.experts,))
    scores = jax.random.normal(keys[1], (block.tokens, block.experts)) + skew
    score, expert = jax.lax.top_k(scores, block.choices)
    up = normal(keys[3], block.experts, block.width, 2, block.hidden, scale=block.width**-0.5)
    down = normal(keys[4], block.experts, block.hidden, block.width, scale=block.hidden**-0.5)
    x = normal(keys[2], block.tokens, block.width)
    return expert.astype(jnp.int32), x, jax.nn.softmax(score, -1), up, down


# ---- Sides: f(expert, x, gate, w_up, w_down)


def moe(expert, x, gate, w_up, w_down):
    return jaxfp8.moe(x, expert, gate, w_up, w_down)


def pieces(expert, x, gate, w_up, w_down):
    rows, sizes, route = jaxfp8.dispatch(x, expert, w_up.shape[0])
    return jaxfp8.combine(jaxfp8.ragged_mlp(rows, w_up, w_down, sizes), gate, route)


def by_sort(ragged_dot, expert, x, gate, w_up, w_down):
    experts, width, *_ = w_up.shape
    tokens, choices = expert.shape
    order = jnp.argsort(expert.reshape(-1), stable=True)
    sizes = jnp.bincount(expert.reshape(-1), length=experts).astype(jnp.int32)
    h = swiglu(ragged_dot(x[order // choices], w_up.reshape(experts, width, -1), sizes))
    y = ragged_dot(h, w_down, sizes) * gate.reshape(-1)[order][:, None].astype(x.dtype)
    back = y[jnp.argsort(order)].reshape(tokens, choices, -1)
    return back.astype(jnp.float32).sum(1).astype(x.dtype)


def train(f):
    """The result and the gradients of x, gate and both weights."""

    @jax.jit
    def run(expert, *arrays):
        *arrays, dy = arrays
        y, pull = jax.vjp(functools.partial(f, expert), *arrays)
        return y, pull(dy)

    return run


def traced(run, steps=4):
    """Time by kind of kernel, milliseconds a call; {} without a GPU."""

    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            for _ in range(steps):
                out = run()
            jax.block_until_ready(out)
        kernels, *_ = read_trace(folder)
    return breakdown(kernels, steps) if kernels else {}


def measure(name, block: Block, peers, wanted=""):
    expert, *arrays = operands(block)
    dy = jax.random.normal(jax.random.key(9), arrays[0].shape, jnp.bfloat16)
    sides = {"moe": moe, "pieces": pieces, "bf16": functools.partial(by_sort, jax.lax.ragged_dot)}
    sides |= {f"bf16 {k}": functools.partial(by_sort, f) for k, f in peers.items()}
    sides = {k: f for k, f in sides.items() if k == "moe" or not wanted or k in wanted.split(",")}
    row = {"name": name, "block": dataclasses.asdict(block), "peak_gib": {}, "refused": {}}
    times = {}
    for mode, prepare, inputs in (("forward", jax.jit, arrays), ("train", train, [*arrays, dy])):
        runs = {}
        for side, f in sides.items():
            try:
                compiled = prepare(f).lower(expert, *inputs).compile()
                runs[side] = functools.partial(compiled, expert, *inputs)
                jax.block_until_ready(runs[side]())
            except Exception as error:  # a peer that refuses a block is named, and left out
                if side == "moe":
                    raise
                runs.pop(side, None)
                row["refused"][side] = f"{type(error).__name__} {str(error)[:200]}"
                continue
            if mode == "train":
                row["peak_gib"][side] = step.peak_bytes(compiled) / 2**30
        times[mode] = {side: 1e3 * s for side, s in time_sides(runs).items()}
    row["kernels"] = {side: traced(runs[side]) for side in ("moe", "pieces") if side in runs}
    planning = jax.jit(plan, static_argnums=1)
    row["plan_ms"] = 1e3 * time_sides({"": lambda: planning(expert, block.experts)})[""]
    row["plan_kernels_ms"] = kernels_ms(traced(lambda: planning(expert, block.experts)))
    return row | summary(row, times)


def kernels_ms(kernels):
    return sum(k["ms"] for k in kernels["by_kernel"]) if kernels else None


def products_ms(kernels):
    found = [k["ms"] for k in kernels.get("by_kernel", []) if k["kernel"].startswith("gemm_")]
    return sum(found) if found else None


def summary(row, times):
    train, ours = times["train"], row["kernels"]["moe"]
    bf16 = {side: ms for side, ms in train.items() if side.startswith("bf16")}
    products = products_ms(ours)
    return {
        "ms": train["moe"],
        "forward_ms": times["forward"]["moe"],
        "kernels_ms": kernels_ms(ours),
        "products_ms": products,
        "over_products": train["moe"] / products if products else None,
        "pieces_ms": train.get("pieces"),
        "bf16_ms": min(bf16.values(), default=None),
        "bf16_side": min(bf16, key=bf16.get, default=None),
        "all_ms": times,
    }


def show(row):
    def text(value, unit=" ms"):
        return "-" if value is None else f"{value:.2f}{unit}"

    print(
        f"{row['name']:48} {text(row['ms'])}, kernels {text(row['kernels_ms'])}, products {text(row['products_ms'])} "
        f"({text(row['over_products'], 'x')}), pieces {text(row['pieces_ms'])}, {row['bf16_side']} "
        f"{text(row['bf16_ms'])}; plan {text(row['plan_kernels_ms'])}; peak GiB "
        + ", ".join(f"{side} {gib:.2f}" for side, gib in row["peak_gib"].items())
    )
    for kernel in row["kernels"]["moe"].get("by_kernel", [])[:16]:
        print(f"    {kernel['ms']:9.3f} ms {kernel['launches']:6.1f}x  {kernel['kernel']}")
    for side, why in row["refused"].items():
        print(f"    no {side}: {why}")


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=pathlib.Path, nargs="?", default=ROOT / "benchmarks/results")
    parser.add_argument("--only", default="", help="blocks whose name contains this")
    parser.add_argument("--sides", default="", help="of these sides beside moe, by commas; all")
    parser.add_argument("--peer", action="append", default=[], help="a file as speed.py takes them")
    parser.add_argument("--tiny", action="store_true", help="a small block, for a CPU")
    arguments = parser.parse_args(arguments)
    peers = {}
    for module in load_peers(arguments.peer):
        peers |= module.ragged_dots() if hasattr(module, "ragged_dots") else {}
    gpu = jax.default_backend() == "gpu"
    result = {
        "device": jax.devices()[0].device_kind,
        "date": datetime.date.today().isoformat(),
        "jax": jax.__version__,
        "jaxfp8": jaxfp8.__version__,
        "machine": machine_state() if gpu else {},
        "blocks": [],
    }
    path = arguments.out / f"moe-{result['device'].replace(' ', '-')}-{result['date']}.json"
    arguments.out.mkdir(parents=True, exist_ok=True)
    for name, block in (TINY if arguments.tiny else BLOCKS).items():
        if arguments.only in name:
            row = measure(name, block, peers, arguments.sides)
            result["blocks"].append(row)
            show(row)
            path.write_text(json.dumps(result, indent=1) + "\n")
    if gpu:
        result["machine after"] = machine_state()
        path.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
