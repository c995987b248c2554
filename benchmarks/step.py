"""A training step as it is written for a Llama: milliseconds, tokens a second and memory of FP8 beside BF16.

    python benchmarks/step.py [OUT.json] [--variants mlp,linear] [--remat none,full] [--layers 4]

The model is as wide as Llama-3-8B (arXiv 2407.21783): layers in `lax.scan`, cuDNN's attention, a head of 32000 and
the embedding in bfloat16, AdamW on float32 masters. Plain JAX, one file; a variant says only how a layer's products
are made. All variants are compiled first and then take turns in one process, so that clocks and heat hit all alike;
the time is the median over the turns. Memory is what XLA's plan of the program needs at its peak, arguments included.

`--compiler-option xla_gpu_...=value` compiles every variant with it once more, under "VARIANT, OPTION".
"""

import argparse
import dataclasses
import datetime
import functools
import json
import pathlib
import statistics
import tempfile
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
import step_profile
from jax import lax

import jaxfp8
from jaxfp8 import checkpoint_policies

# ---- The model


@dataclasses.dataclass(frozen=True)
class Model:
    width: int = 4096
    hidden: int = 14336
    heads: int = 32
    kv_heads: int = 8
    head: int = 128
    layers: int = 4
    vocabulary: int = 32000
    batch: int = 4
    sequence: int = 4096
    attention: str | None = "cudnn"


TINY = Model(256, 384, 2, 1, 128, 2, 512, 2, 128, None)
"""For a machine without a GPU: the program, not its speed."""


def init(model: Model, key):
    """Float32 masters; each layer's weights stacked along the first axis."""
    shapes = {
        "q": (model.width, model.heads * model.head),
        "kv": (model.width, 2 * model.kv_heads * model.head),
        "o": (model.heads * model.head, model.width),
        "up": (model.width, 2, model.hidden),  # gate and up
        "down": (model.hidden, model.width),
    }
    keys = iter(jax.random.split(key, len(shapes) + 2))

    def normal(shape, fan_in):
        return jax.random.normal(next(keys), shape, jnp.float32) * fan_in**-0.5

    return {
        "embedding": normal((model.vocabulary, model.width), 1),
        "layers": {
            **{k: normal((model.layers, *s), s[0]) for k, s in shapes.items()},
            "norm_attention": jnp.ones((model.layers, model.width)),
            "norm_mlp": jnp.ones((model.layers, model.width)),
        },
        "norm": jnp.ones(model.width),
        "head": normal((model.width, model.vocabulary), model.width),
    }


def rms_norm(x, gain):
    x32 = x.astype(jnp.float32)
    return (x32 * lax.rsqrt(jnp.mean(x32 * x32, -1, keepdims=True) + 1e-5) * gain).astype(x.dtype)


def rotate(x):
    """Rotary positions (arXiv 2104.09864) of (batch, sequence, heads, head)."""
    half = x.shape[-1] // 2
    angle = jnp.arange(x.shape[1])[:, None] * 500000.0 ** (-jnp.arange(half) / half)
    cos, sin = (f(angle)[:, None].astype(x.dtype) for f in (jnp.cos, jnp.sin))
    a, b = x[..., :half], x[..., half:]
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1)


def attention(model: Model, dot, out_dot, x, w):
    q = dot(x, w["q"]).reshape(*x.shape[:2], model.heads, model.head)
    kv = dot(x, w["kv"]).reshape(*x.shape[:2], model.kv_heads, 2, model.head)
    y = jax.nn.dot_product_attention(
        rotate(q),
        rotate(kv[:, :, :, 0]),
        kv[:, :, :, 1],
        is_causal=True,
        implementation=model.attention,
    )
    return out_dot(y.reshape(x.shape[:2] + (-1,)), w["o"])


def loss(model: Model, dot, mlp, policy, params, tokens, out_dot=None):
    """Mean cross entropy of the next token. `policy`: None keeps everything, else as `jax.checkpoint` takes it.

    `out_dot` makes attention's last product, `dot` unless given.
    """

    def layer(x, w):
        x = x + attention(model, dot, out_dot or dot, rms_norm(x, w["norm_attention"]), w)
        return x + mlp(rms_norm(x, w["norm_mlp"]), w["up"], w["down"]), None

    if policy is not None:
        layer = jax.checkpoint(layer, policy=policy, prevent_cse=False)
    x = params["embedding"][tokens[:, :-1]].astype(jnp.bfloat16)
    x, _ = lax.scan(layer, x, params["layers"])
    logits = bf16_dot(rms_norm(x, params["norm"]), params["head"]).astype(jnp.float32)
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]))


# ---- Variants: how a layer's products are made


def bf16_dot(x, w):
    return jnp.dot(x, w.astype(x.dtype))


def swiglu(dot, x, up, down):
    gate, value = jnp.split(dot(x, up.reshape(up.shape[0], -1)), 2, -1)
    return dot(jax.nn.silu(gate) * value, down)


linear = functools.partial(jaxfp8.linear, preferred_element_type=jnp.bfloat16)
mlp = functools.partial(jaxfp8.mlp, preferred_element_type=jnp.bfloat16)
bf16_mlp = functools.partial(swiglu, bf16_dot)

VARIANTS: dict[str, tuple[Callable, Callable, Callable]] = {  # dot, mlp, what wraps the loss
    "bf16": (bf16_dot, bf16_mlp, lambda f: f),
    "linear": (linear, functools.partial(swiglu, linear), lambda f: f),
    "mlp": (linear, mlp, lambda f: f),
    "autocast": (bf16_dot, bf16_mlp, jaxfp8.autocast),
}
POLICIES = {
    "none": None,
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.dots_saveable,
    "fp8": checkpoint_policies.save_fp8_residuals(),
    "dots and fp8": checkpoint_policies.save_dots_and_fp8_residuals(),
}


def train_step(model: Model, optimizer, variant: str, remat: str):
    """(params, optimizer's state), tokens -> the same, loss."""
    dot, mlp, wrap = VARIANTS[variant]
    run = wrap(functools.partial(loss, model, dot, mlp, POLICIES[remat]))

    def step(state, tokens):
        params, moments = state
        value, gradients = jax.value_and_grad(run)(params, tokens)
        updates, moments = optimizer.update(gradients, moments, params)
        return (optax.apply_updates(params, updates), moments), value

    return jax.jit(step, donate_argnums=0)


# ---- Measurement


def peak_bytes(compiled) -> int:
    memory = compiled.memory_analysis()
    both = memory.argument_size_in_bytes + memory.output_size_in_bytes
    return both - memory.alias_size_in_bytes + memory.temp_size_in_bytes


def kernel_times(compiled, state, tokens, steps=2):
    """Milliseconds a step by kind of kernel, from the profiler; the state afterwards."""
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            for _ in range(steps):
                state, value = compiled(state, tokens)
            jax.block_until_ready(value)
        kernels, *_ = step_profile.read_trace(folder)
    return (step_profile.breakdown(kernels, steps) if kernels else {}), state


def measure(programs, state, tokens, rounds, calls):
    """Results by name. The state wanders from program to program: they are one training."""
    times = {name: [] for name in programs}
    losses = {}
    for i in range(rounds + 1):
        for name, compiled in programs.items():
            start = time.perf_counter()
            for _ in range(calls):
                state, value = compiled(state, tokens)
            losses[name] = float(value)
            if i:  # the first turn loads and warms up
                times[name].append((time.perf_counter() - start) / calls)
    results = {}
    for name, compiled in programs.items():
        kernels, state = kernel_times(compiled, state, tokens)
        results[name] = {
            "ms": 1e3 * statistics.median(times[name]),
            "spread": (max(times[name]) - min(times[name])) / statistics.median(times[name]),
            "tokens_per_second": tokens[:, 1:].size / statistics.median(times[name]),
            "peak_gib": peak_bytes(compiled) / 2**30,
            "loss": losses[name],
            "kernels": kernels,
        }
    return results


def print_results(results):
    base = results.get("bf16")
    print(f"\n{'':44}      ms  of bf16  tokens/s  peak GiB    loss")
    for name, row in results.items():
        ratio = f"{row['speedup_over_bf16']:7.3f}x" if base else " " * 8
        print(
            f"{name:44} {row['ms']:7.2f} {ratio} {row['tokens_per_second']:9,.0f} "
            f"{row['peak_gib']:9.2f} {row['loss']:7.4f}"
        )
    for name, row in results.items():
        if row["kernels"]:
            print(f"\n{name}: {row['kernels']['idle_ms']:.2f} ms without a kernel")
        for kernel in row["kernels"].get("by_kernel", [])[:14]:
            print(f"    {kernel['ms']:9.3f} ms {kernel['launches']:6.1f}x  {kernel['kernel']}")


def parse_arguments(arguments=None):
    def names(of):
        def parse(text):
            found = text.split(",")
            if unknown := [n for n in found if n not in of]:
                raise argparse.ArgumentTypeError(f"{unknown[0]!r}; allowed: {', '.join(of)}")
            return found

        return parse

    def option(text):
        name, value = text.split("=", 1)
        return {name: {"true": True, "false": False}.get(value, value)}

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=pathlib.Path, nargs="?")
    parser.add_argument("--variants", type=names(VARIANTS), default=list(VARIANTS))
    parser.add_argument("--remat", type=names(POLICIES), default=["none"])
    parser.add_argument("--layers", type=int, default=Model.layers)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--calls", type=int, default=6, help="steps of a variant in its turn")
    parser.add_argument("--tiny", action="store_true", help="a small model, for a CPU")
    parser.add_argument(
        "--compiler-option", type=option, action="append", default=[], metavar="NAME=VALUE"
    )
    return parser.parse_args(arguments)


def compile_all(model: Model, arguments, optimizer, state, tokens):
    options = [{}, *arguments.compiler_option]
    programs = {}
    for remat in arguments.remat:
        for variant in arguments.variants:
            lowered = train_step(model, optimizer, variant, remat).lower(state, tokens)
            for option in options:
                name = variant + (f", remat {remat}" if remat != "none" else "")
                name += "".join(f", {k}={v}" for k, v in option.items())
                start = time.perf_counter()
                programs[name] = lowered.compile(compiler_options=option)
                print(f"compiled {name} in {time.perf_counter() - start:.0f} s", flush=True)
    return programs


def main(arguments=None):
    arguments = parse_arguments(arguments)
    model = TINY if arguments.tiny else Model(layers=arguments.layers)
    optimizer = optax.adamw(1e-4, b2=0.95, weight_decay=0.1)
    params = jax.jit(functools.partial(init, model))(jax.random.key(0))
    state = params, jax.jit(optimizer.init)(params)
    shape = model.batch, model.sequence + 1
    tokens = jax.random.randint(jax.random.key(1), shape, 0, model.vocabulary)
    programs = compile_all(model, arguments, optimizer, state, tokens)
    results = measure(programs, state, tokens, arguments.rounds, arguments.calls)
    for row in results.values():
        if "bf16" in results:
            row["speedup_over_bf16"] = results["bf16"]["ms"] / row["ms"]
    print_results(results)
    if arguments.out:
        report = {
            "device": jax.devices()[0].device_kind,
            "date": datetime.date.today().isoformat(),
            "jax": jax.__version__,
            "jaxfp8": jaxfp8.__version__,
            "model": dataclasses.asdict(model),
            "results": results,
        }
        arguments.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
