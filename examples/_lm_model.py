"""The model of train_lm: parameters are a dict, the layers' stacked along a first axis for lax.scan."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from _lm_data import VOCABULARY
from _lm_parallel import FSDP_AXIS, ONE_DEVICE, Parallel
from _lm_products import Products
from jax import Array

import jaxfp8


@dataclasses.dataclass(frozen=True)
class Model:
    """A decoder-only transformer over bytes.

    Any width works; multiples of 128 fill the blocks that share an FP8 scale.
    `experts`: 0 for a dense feed-forward layer; else each token runs through two of them, each half
    as wide, so that the work per token is that of the dense model.
    """

    layers: int
    width: int
    heads: int
    feed_forward: int
    experts: int = 0

    @property
    def hidden(self) -> int:
        """Width of one SwiGLU: of the layer, or of one expert."""
        return self.feed_forward // 2 if self.experts else self.feed_forward


Params = dict[str, Any]


def init(model: Model, key: Array) -> Params:
    """Float32 master weights: normal, 1/sqrt(fan in).

    What writes into the residual stream is 1/sqrt(2 layers) smaller. Queries, keys and values, and
    gate and up, are matrices side by side, so that each can be cut by columns.
    """
    keys = iter(jax.random.split(key, 8))
    width, hidden = model.width, model.hidden

    def weight(*shape: int, scale: float = 1.0, beside: int = 1) -> Array:
        fan_in, columns = shape[-2:]
        value = jax.random.normal(next(keys), (*shape[:-1], beside * columns))
        value = value * (scale / math.sqrt(fan_in))
        return value if beside == 1 else value.reshape(*shape[:-1], beside, columns)

    stack = (model.layers,)
    residual = 1 / math.sqrt(2 * model.layers)
    experts = stack + (model.experts,) if model.experts else stack
    layers = {
        "attention_norm": jnp.ones((*stack, width)),
        "qkv": weight(*stack, width, width, beside=3),
        "out": weight(*stack, width, width, scale=residual),
        "feed_forward_norm": jnp.ones((*stack, width)),
        "gate_up": weight(*experts, width, hidden, beside=2),
        "down": weight(*experts, hidden, width, scale=residual),
    }
    if model.experts:
        layers["router"] = weight(*stack, width, model.experts)
    return {
        "embedding": jax.random.normal(next(keys), (VOCABULARY, width)),
        "layers": layers,
        "norm": jnp.ones(width),
        "head": weight(width, VOCABULARY, scale=0.1),
    }


def init_nearby(model: Model, key: Array) -> Params:
    """As `init`, but each weight is off by about a thousandth: how much chance decides."""
    params, tree = jax.tree.flatten(init(model, key))
    keys = jax.random.split(jax.random.fold_in(key, 1), len(params))
    shifts = [1 + 1e-3 * jax.random.normal(k, p.shape) for k, p in zip(keys, params, strict=True)]
    return jax.tree.unflatten(tree, [p * s for p, s in zip(params, shifts, strict=True)])


def rms_norm(x: Array, gain: Array) -> Array:
    y = x.astype(jnp.float32)
    y = y * jax.lax.rsqrt(jnp.mean(y**2, axis=-1, keepdims=True) + 1e-6) * gain
    return y.astype(x.dtype)


def rotate(x: Array) -> Array:
    """Rotary position embedding (arXiv 2104.09864) of x (batch, length, heads, size)."""
    _, length, _, size = x.shape
    frequency = 10_000.0 ** (-jnp.arange(0, size, 2) / size)
    angle = jnp.arange(length)[:, None, None] * frequency  # (length, 1, size / 2)
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    return jnp.concatenate(
        [first * cos - second * sin, second * cos + first * sin], axis=-1
    ).astype(x.dtype)


def part_of(p: Params, name: str, products: Products, parallel: Parallel) -> Any:
    """A layer's matrix (K, N), or experts (G, K, N): all rows and columns that this device uses.

    Matrices side by side (K, n, N) become one (K, n N), except for a gate and up that are not cut.
    """
    w = p[name]
    if name == "qkv" or (name == "gate_up" and parallel.fsdp):
        w = w.reshape(*w.shape[:-2], -1)
    return products.gather(w, max(FSDP_AXIS[name], -2)) if parallel.fsdp else w


def attention(x: Array, p: Params, model: Model, products: Products, parallel: Parallel) -> Array:
    batch, length, _ = x.shape
    heads = model.heads // parallel.model
    with jax.named_scope("qkv"):
        qkv = products.linear(x, part_of(p, "qkv", products, parallel))
    q, k, v = jnp.split(qkv.reshape(batch, length, 3 * heads, -1), 3, axis=2)
    with jax.named_scope("attention"):
        y = jax.nn.dot_product_attention(rotate(q), rotate(k), v, is_causal=True)
    with jax.named_scope("out"):
        w = part_of(p, "out", products, parallel)
        return by_parts(products.linear, y.reshape(batch, length, -1), w, parallel=parallel)


def by_parts(product: Callable[..., Array], x: Array, *rest: Any, parallel: Parallel) -> Array:
    """A product, of which each device of the axis "model" has some heads or hidden units."""
    if parallel.model == 1:
        return product(x, *rest)
    return parallel.sum_parts(product(x, *rest, dtype=jnp.float32)).astype(x.dtype)


def feed_forward(
    x: Array, p: Params, model: Model, products: Products, parallel: Parallel
) -> tuple[Array, Array]:
    """The layer's output and its balance loss, which is zero for a dense layer."""
    if model.experts:
        return mixture_of_experts(x, p, model, products, parallel)
    with jax.named_scope("feed_forward"):
        weights = (part_of(p, name, products, parallel) for name in ("gate_up", "down"))
        return by_parts(products.mlp, x, *weights, parallel=parallel), jnp.float32(0)


def mixture_of_experts(
    x: Array, p: Params, model: Model, products: Products, parallel: Parallel = ONE_DEVICE
) -> tuple[Array, Array]:
    """Each token through its two best experts.

    Experts take any number of tokens: no capacity, no padding.
    """
    batch, length, width = x.shape
    tokens = x.reshape(batch * length, width)
    with jax.named_scope("router"):
        logits = jnp.dot(tokens.astype(jnp.float32), p["router"], precision="highest")
    probability = jax.nn.softmax(logits)
    gate, expert = jax.lax.top_k(probability, 2)  # (tokens, 2)
    gate = gate / jnp.sum(gate, axis=-1, keepdims=True)
    counts = jnp.bincount(expert.reshape(-1), length=model.experts).astype(jnp.int32)

    with jax.named_scope("feed_forward"):
        weights = (part_of(p, name, products, parallel) for name in ("gate_up", "down"))
        axis_name = "expert" if parallel.expert > 1 else None
        moe = functools.partial(products.moe, axis_name=axis_name)
        y = by_parts(moe, tokens, expert, gate, *weights, parallel=parallel)

    # Load balance (Switch Transformer, arXiv 2101.03961, 2.2): 1 when every expert gets its share.
    share = parallel.mean(counts / expert.size)
    balance = model.experts * jnp.sum(share * parallel.mean(jnp.mean(probability, axis=0)))
    return y.reshape(x.shape), balance


def forward(
    params: Params,
    inputs: Array,
    model: Model,
    products: Products,
    parallel: Parallel = ONE_DEVICE,
) -> tuple[Array, Array]:
    """Bytes (batch, length) -> float32 logits of the next byte (batch, length, 256).

    Beside them, the layers' mean balance loss.
    """

    def layer(x, p):
        y = attention(rms_norm(x, p["attention_norm"]), p, model, products, parallel)
        x = x + y
        normed = rms_norm(x, p["feed_forward_norm"])
        y, balance = feed_forward(normed, p, model, products, parallel)
        return x + y, balance

    if parallel.fsdp:  # whole matrices are gathered again for the backward pass, not kept
        policy = jaxfp8.checkpoint_policies.save_dots_and_fp8_residuals()
        layer = jax.checkpoint(layer, policy=policy)
    # Rows in float32: the gradient adds up thousands of them, which bfloat16 rounds, and a GPU adds
    # bfloat16 by compare and swap.
    x = params["embedding"][inputs].astype(jnp.bfloat16)
    x, balance = jax.lax.scan(layer, x, params["layers"])
    x = rms_norm(x, params["norm"])
    with jax.named_scope("head"):
        head = params["head"].astype(jnp.bfloat16)
        logits = jnp.dot(x, head, preferred_element_type=jnp.float32)
    return logits, jnp.mean(balance)


def losses(
    params: Params, windows: Array, model: Model, products: Products, parallel: Parallel
) -> tuple[Array, Array]:
    """Mean cross-entropy of the next byte, in nats, and the balance loss.

    windows: (batch, length + 1), inputs and the byte after each.
    """
    logits, balance = forward(params, windows[:, :-1], model, products, parallel)
    entropy = optax.softmax_cross_entropy_with_integer_labels(logits, windows[:, 1:])
    return parallel.mean(jnp.mean(entropy)), balance


def generate(
    params: Params,
    prompts: Array,
    lengths: Array,
    key: Array,
    model: Model,
    products: Products,
    parallel: Parallel,
) -> Array:
    """Prompts (batch, length), of which the first `lengths` bytes count, continued to the end."""

    def step(i, carry):
        text, key = carry
        key, draw = jax.random.split(key)
        logits, _ = forward(params, text, model, products, parallel)
        following = jax.random.categorical(draw, logits[:, i - 1] / 0.7)
        return text.at[:, i].set(jnp.where(i < lengths, text[:, i], following)), key

    return jax.lax.fori_loop(1, prompts.shape[1], step, (prompts, key))[0]
