"""Train a language model in FP8 beside the same model in BF16, and compare.

    python examples/train_lm.py            # dense: RMSNorm, rotary attention, SwiGLU
    python examples/train_lm.py --moe      # the feed-forward layer is a mixture of experts, top 2
    JAX_NUM_CPU_DEVICES=8 python examples/train_lm.py --mesh data=4,model=2 [--fsdp]
    JAX_NUM_CPU_DEVICES=8 python examples/train_lm.py --mesh expert=8 --experts 8

The text is the Python source of the running interpreter's standard library, or what is below --text
DIR, read byte by byte. Both
models start from the same parameters and see the same batches. Only the products of the layers
differ: jnp.dot and jax.lax.ragged_dot on bfloat16, or jaxfp8.linear, jaxfp8.mlp and
jaxfp8.ragged_mlp, which quantize an activation where they compute it. As in DeepSeek-V3 (arXiv
2412.19437, 3.3), embedding, head, router, norms and the products inside attention keep a high
precision, and the master weights are float32.

The file reads from top to bottom: the products, the model, a training step, the loop, the command
line. `_lm_parallel.py` has the meshes, `_lm_data.py` the text, `_lm_report.py` what is shown and
written, `_lm_checkpoint.py` saving and resuming.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import math
import pathlib
import sys
import time
from collections.abc import Callable
from typing import Any

import _lm_data as data
import _lm_report as report
import jax
import jax.numpy as jnp
import numpy as np
import optax
from _lm_parallel import BATCH, FSDP_AXIS, ONE_DEVICE, Parallel, divisor, repeat_rows
from jax import Array
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import jaxfp8

# ------------------------------------------------------------------------------------------------
# The products: the only difference between the two models
# ------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Products:
    """The products of a layer.

    linear:      x (..., K) bfloat16, w (K, N), dtype -> (..., N) of that dtype
    mlp:         SwiGLU: x (..., K) bfloat16, gate and up (K, 2, F), down (F, N), dtype -> (..., N)
    ragged_mlp:  x (M, K) bfloat16, gate and up (G, K, 2, F), down (G, F, N), group_sizes int32
                 (G,), dtype -> (M, N); a row goes through the SwiGLU of its group
    gather:      this device's part of a float32 weight, axis -> the whole weight, cut along that
                 axis over the mesh axis "data", for the products above (gate and up: (..., K, 2 F))
    dispatch:    jaxfp8.dispatch, in the precision in which tokens travel
    """

    linear: Callable[..., Array]
    mlp: Callable[..., Array]
    ragged_mlp: Callable[..., Array]
    gather: Callable[[Array, int], Any]
    dispatch: Callable[..., Any]


def bf16_products() -> Products:
    def gather(w, axis):
        w = w.astype(jnp.bfloat16)
        return jax.lax.all_gather(w, "data", axis=axis % w.ndim, tiled=True)

    def linear(x, w, dtype=jnp.bfloat16):
        return jnp.dot(x, w.astype(jnp.bfloat16), preferred_element_type=dtype)

    def ragged_dot(x, w, sizes, dtype=jnp.bfloat16):
        w = w.astype(jnp.bfloat16)
        return jax.lax.ragged_dot(x, w, sizes, preferred_element_type=dtype)

    def mlp(x, gate_up, down, dtype=jnp.bfloat16):
        hidden = linear(x, gate_up.reshape(x.shape[-1], -1))
        return linear(swiglu(hidden), down, dtype)

    def ragged_mlp(x, gate_up, down, sizes, dtype=jnp.bfloat16):
        hidden = ragged_dot(x, gate_up.reshape(-1, x.shape[-1], 2 * down.shape[-2]), sizes)
        return ragged_dot(swiglu(hidden), down, sizes, dtype)

    dispatch = functools.partial(jaxfp8.dispatch, quantized=False)
    return Products(linear, mlp, ragged_mlp, gather, dispatch)


def swiglu(gate_up: Array) -> Array:
    gate, up = jnp.split(gate_up, 2, axis=-1)
    return jax.nn.silu(gate) * up


def fp8_products(recipe: jaxfp8.Recipe) -> Products:
    # Forward, dgrad and wgrad run in FP8. The weights are quantized from their float32 masters.
    def gather(w, axis):
        return jaxfp8.all_gather_weight(w, "data", axis=axis, recipe=recipe)

    def linear(x, w, dtype=jnp.bfloat16):
        return jaxfp8.linear(x, w, recipe=recipe, preferred_element_type=dtype)

    def mlp(x, gate_up, down, dtype=jnp.bfloat16):
        return jaxfp8.mlp(x, gate_up, down, recipe=recipe, preferred_element_type=dtype)

    def ragged_mlp(x, gate_up, down, sizes, dtype=jnp.bfloat16):
        return jaxfp8.ragged_mlp(
            x, gate_up, down, sizes, recipe=recipe, preferred_element_type=dtype
        )

    dispatch = functools.partial(jaxfp8.dispatch, recipe=recipe)
    return Products(linear, mlp, ragged_mlp, gather, dispatch)


# ------------------------------------------------------------------------------------------------
# The model: parameters are a dict, the layers' stacked along a first axis for lax.scan
# ------------------------------------------------------------------------------------------------


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
        "embedding": jax.random.normal(next(keys), (data.VOCABULARY, width)),
        "layers": layers,
        "norm": jnp.ones(width),
        "head": weight(width, data.VOCABULARY, scale=0.1),
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

    The tokens, sorted by expert, are the groups of a ragged product: no capacity, no padding.
    """
    batch, length, width = x.shape
    tokens = x.reshape(batch * length, width)
    with jax.named_scope("router"):
        logits = jnp.dot(tokens.astype(jnp.float32), p["router"], precision="highest")
    probability = jax.nn.softmax(logits)
    gate, expert = jax.lax.top_k(probability, 2)  # (tokens, 2)
    gate = gate / jnp.sum(gate, axis=-1, keepdims=True)
    counts = jnp.bincount(expert.reshape(-1), length=model.experts).astype(jnp.int32)

    if parallel.expert > 1:  # to the devices of the experts and back
        rows, group_sizes, route = products.dispatch(
            tokens, expert, model.experts, axis_name="expert"
        )
        y = experts_of(rows, group_sizes, p, products, parallel)
        y = jaxfp8.combine(y, gate, route)
    else:
        order = jnp.argsort(expert.reshape(-1), stable=True)
        rows = permute(jnp.repeat(tokens, 2, axis=0), order)
        y = experts_of(rows, counts, p, products, parallel)
        y = permute(y, jnp.argsort(order)).reshape(batch * length, 2, width)
        y = jnp.sum(y * gate[..., None], axis=1).astype(x.dtype)

    # Load balance (Switch Transformer, arXiv 2101.03961, 2.2): 1 when every expert gets its share.
    share = parallel.mean(counts / expert.size)
    balance = model.experts * jnp.sum(share * parallel.mean(jnp.mean(probability, axis=0)))
    return y.reshape(x.shape), balance


def experts_of(
    rows: Array, group_sizes: Array, p: Params, products: Products, parallel: Parallel
) -> Array:
    """The SwiGLU of each group of rows, by its expert."""
    with jax.named_scope("feed_forward"):
        weights = (part_of(p, name, products, parallel) for name in ("gate_up", "down"))
        return by_parts(products.ragged_mlp, rows, *weights, group_sizes, parallel=parallel)


def permute(rows: Array, order: Array) -> Array:
    return rows.at[order].get(unique_indices=True, mode="promise_in_bounds")


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


# ------------------------------------------------------------------------------------------------
# Training
# ------------------------------------------------------------------------------------------------

BALANCE_WEIGHT = 0.01


@dataclasses.dataclass(frozen=True)
class Size:
    """A model and how it is trained by default.

    `sequence` is the bytes a window predicts. A mixture of experts takes `moe_steps`: on a CPU
    jax.lax.ragged_dot multiplies every row by every expert.
    """

    model: Model
    sequence: int
    batch: int
    steps: int
    moe_steps: int
    learning_rate: float


SIZES = {
    "tiny": Size(Model(layers=2, width=128, heads=2, feed_forward=256), 64, 4, 60, 60, 3e-3),
    "small": Size(Model(layers=2, width=256, heads=4, feed_forward=512), 128, 8, 320, 208, 3e-4),
    "medium": Size(
        Model(layers=8, width=512, heads=8, feed_forward=1536), 512, 32, 2000, 2000, 1e-3
    ),
    "large": Size(
        Model(layers=16, width=1024, heads=16, feed_forward=3072), 1024, 32, 5000, 5000, 6e-4
    ),
}


@dataclasses.dataclass(frozen=True)
class Settings:
    """All that decides the loss curves; a checkpoint resumes only with equal settings."""

    size: str
    moe: bool
    experts: int
    steps: int
    batch: int
    learning_rate: float
    evaluations: int
    validation_windows: int
    seed: int
    scale_format: Any
    grad_dtype: str
    twin: bool = False

    @property
    def model(self) -> Model:
        model = SIZES[self.size].model
        return dataclasses.replace(model, experts=self.experts) if self.moe else model

    @property
    def sequence(self) -> int:
        return SIZES[self.size].sequence

    @property
    def recipe(self) -> jaxfp8.Recipe:
        return jaxfp8.Recipe(
            scale_format=self.scale_format, grad_dtype=GRAD_DTYPES[self.grad_dtype]
        )

    @property
    def evaluation_steps(self) -> list[int]:
        return [self.steps * (i + 1) // self.evaluations for i in range(self.evaluations)]


GRAD_DTYPES = {"e4m3": jnp.float8_e4m3fn, "e5m2": jnp.float8_e5m2}


def optimizer_of(settings: Settings) -> optax.GradientTransformation:
    rate = optax.warmup_cosine_decay_schedule(
        init_value=0.0,
        peak_value=settings.learning_rate,
        warmup_steps=max(1, settings.steps // 10),
        decay_steps=settings.steps,
    )

    def matrices(params):
        return jax.tree_util.tree_map_with_path(lambda path, _: "norm" not in str(path), params)

    return optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.adamw(rate, b1=0.9, b2=0.95, weight_decay=0.1, mask=matrices),
    )


class Run:
    """One of the trainings: its products, its state, its compiled steps, its history.

    `state` is (parameters, optimizer state). The step donates it, so that a model's memory is held
    once.
    """

    def __init__(
        self,
        name: str,
        products: Products,
        settings: Settings,
        parallel: Parallel = ONE_DEVICE,
        init: Callable[[Model, Array], Params] = init,
    ):
        self.name, self.products, self.settings, self._init = name, products, settings, init
        self.model, self.parallel = settings.model, parallel
        self.optimizer = optimizer_of(settings)
        self.state = self._initial_state(jax.random.key(settings.seed))
        self.history = report.History()

    def _initial_state(self, key: Array) -> Any:
        if not self.parallel.active:
            params = self._init(self.model, key)
            # Placed explicitly, as a restored state is: a resumed run is the same program.
            return jax.device_put((params, self.optimizer.init(params)), jax.devices()[0])

        def make(key):
            params = self._init(self.model, key)
            return params, self.optimizer.init(params)

        params, optimizer_state = jax.eval_shape(make, key)
        self.specs = self.parallel.specs(params)
        # Moments lie where their parameters do; counters everywhere.
        optimizer_specs = optax.tree_utils.tree_map_params(
            self.optimizer,
            lambda _, spec: spec,
            optimizer_state,
            self.specs,
            transform_non_params=lambda _: P(),
        )
        self.shardings = jax.tree.map(
            lambda spec: NamedSharding(self.parallel.mesh, spec),
            (self.specs, optimizer_specs),
            is_leaf=lambda x: isinstance(x, P),
        )
        return jax.jit(make, out_shardings=self.shardings)(key)

    def on_every_device(self, f, in_specs, out_specs):
        """`f` of parameters and what follows, on every device with its part of them."""
        if not self.parallel.active:
            return f
        in_specs = (self.specs, *in_specs)
        return jax.shard_map(f, mesh=self.parallel.mesh, in_specs=in_specs, out_specs=out_specs)

    def gradients(self, params: Params, windows: Array) -> tuple[Array, Params]:
        """The loss (cross-entropy alone) and the gradients of one batch."""

        def local(params, windows):
            def objective(params):
                entropy, balance = losses(params, windows, self.model, self.products, self.parallel)
                return entropy + BALANCE_WEIGHT * balance, entropy

            (_, entropy), grads = jax.value_and_grad(objective, has_aux=True)(params)
            return entropy, grads

        out_specs = (P(), self.specs) if self.parallel.active else None
        return self.on_every_device(local, (P(BATCH),), out_specs)(params, windows)

    def _step(self, state, windows):
        params, optimizer_state = state
        entropy, grads = self.gradients(params, windows)
        updates, optimizer_state = self.optimizer.update(grads, optimizer_state, params)
        return (optax.apply_updates(params, updates), optimizer_state), entropy

    def _evaluate(self, state, batches):
        """Mean validation loss over batches (count, batch, length + 1)."""

        def local(params, batches):
            def loss(windows):
                return losses(params, windows, self.model, self.products, self.parallel)[0]

            return jnp.mean(jax.lax.map(loss, batches))

        return self.on_every_device(local, (P(None, BATCH),), P())(state[0], batches)

    def compile(self, windows, batches) -> float:
        """Compiles ahead, so that the first step is timed like any other; returns seconds."""
        start = time.perf_counter()
        out = {"out_shardings": (self.shardings, None)} if self.parallel.active else {}
        self._compiled_step = (
            jax.jit(self._step, donate_argnums=0, **out).lower(self.state, windows).compile()
        )
        self._compiled_evaluate = jax.jit(self._evaluate).lower(self.state, batches).compile()
        return time.perf_counter() - start

    def sample(self, prompts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        """The prompts (count, length), of which the first `lengths` bytes count, continued."""
        count, shards = len(prompts), self.parallel.shards
        place = self.parallel.place

        def local(params, prompts, lengths, key):
            text = generate(params, prompts, lengths, key, self.model, self.products, self.parallel)
            return text

        run = self.on_every_device(local, (P(BATCH), P(BATCH), P()), P(BATCH))
        whole = NamedSharding(self.parallel.mesh, P()) if self.parallel.active else None
        text = jax.jit(run, out_shardings=whole)(
            self.state[0],
            place(repeat_rows(prompts, shards)),
            place(repeat_rows(lengths[:, None], shards)[:, 0]),
            jax.random.key(self.settings.seed),
        )
        return np.asarray(text)[:count]

    def train(self, batches: list[np.ndarray]) -> None:
        """A step a batch. Waits once, at the end, so that a GPU is never idle between steps."""
        start = time.perf_counter()
        entropies = []
        for windows in batches:
            self.state, entropy = self._compiled_step(self.state, windows)
            entropies.append(entropy)
        self.history.train_loss += [float(e) for e in jax.device_get(entropies)]
        self.history.seconds += time.perf_counter() - start
        self.history.tokens += sum(w.shape[0] * (w.shape[1] - 1) for w in batches)

    def evaluate(self, batches) -> None:
        loss = float(self._compiled_evaluate(self.state, batches))
        if not math.isfinite(loss):
            raise FloatingPointError(
                f"the {self.name} run diverged: validation loss {loss} after "
                f"{len(self.history.train_loss)} steps; try a lower --learning-rate"
            )
        self.history.validation_loss.append(loss)


# ------------------------------------------------------------------------------------------------
# The job: two runs, side by side
# ------------------------------------------------------------------------------------------------

STRIDE = 5  # steps that one model takes before the other has its turn
PROMPTS = (b"import ", b"def ", b"class ", b"    return ")
PRODUCT_NAMES = ("qkv", "attention", "out", "router", "feed_forward", "head")


def train(
    settings: Settings,
    out: pathlib.Path,
    checkpoint: pathlib.Path | None = None,
    resume: bool = False,
    stop_after: int | None = None,
    parallel: Parallel = ONE_DEVICE,
    text: pathlib.Path | None = None,
) -> dict[str, Any] | None:
    """Trains both models, writes the results into `out`, and returns the summary.

    None if it stopped before the last step.
    """
    out.mkdir(parents=True, exist_ok=True)
    console = report.console
    console.quiet = jax.process_index() != 0  # one process reports for all
    corpus = data.standard_library() if text is None else data.directory(text)
    unigram = data.unigram_loss(corpus)
    windows = data.Windows(corpus.train, settings.sequence, settings.seed)
    # The same windows for every seed, so that seeds compare; in larger batches: no gradients.
    batch = divisor(settings.validation_windows, 4 * settings.batch, parallel.shards)
    parallel.check(settings.model, settings.batch, batch)
    validation = data.spread_windows(
        corpus.validation, settings.sequence, settings.validation_windows
    ).reshape(-1, batch, settings.sequence + 1)

    runs = {
        "bf16": Run("bf16", bf16_products(), settings, parallel),
        "fp8": Run("fp8", fp8_products(settings.recipe), settings, parallel),
    }
    if settings.twin:
        runs[report.TWIN] = Run(report.TWIN, bf16_products(), settings, parallel, init_nearby)
    parameters = sum(x.size for x in jax.tree.leaves(runs["bf16"].state[0]))
    kind = f"{settings.model.experts} experts, 2 a token" if settings.moe else "dense"
    console.print(
        f"{parameters / 1e6:.2f} M parameters, {kind}; "
        f"to train on, {corpus.train.size / 1e6:.1f} MB of text in {corpus.files[0]} files; "
        f"to validate on, {validation[:, :, 1:].size:,} bytes of {corpus.files[1]} others\n"
        f"{settings.steps} steps of {settings.batch} x {settings.sequence} bytes, "
        f"seed {settings.seed}, {settings.recipe} on {jax.devices()[0].device_kind}, {parallel}"
    )
    step = position = 0

    checkpoints = None
    if checkpoint is not None:
        from _lm_checkpoint import Checkpoints  # Orbax takes seconds to import

        identity = dataclasses.asdict(settings) | {"text": corpus.checksum}
        checkpoints = Checkpoints(checkpoint, identity)
        if resume:
            states, saved = checkpoints.restore({n: r.state for n, r in runs.items()})
            step, position = saved["step"], saved["position"]
            for name, run in runs.items():
                run.state = states[name]
                run.history = report.History(saved["histories"][name])
            console.print(f"resumed after step {step}")
        elif checkpoints.latest_step is not None:
            raise data.InputError(
                f"{checkpoint} already has a checkpoint of step {checkpoints.latest_step}; "
                "pass --resume to continue it, or another --checkpoint directory"
            )

    first = parallel.place(windows.batch(0, settings.batch))
    placed_validation = parallel.place(validation, axis=1)
    products = report.list_products(
        runs["fp8"].gradients, PRODUCT_NAMES, runs["fp8"].state[0], first
    )

    def save() -> None:
        if checkpoints is not None and checkpoints.latest_step != step:
            state = {name: run.state for name, run in runs.items()}
            histories = {name: run.history.to_json() for name, run in runs.items()}
            checkpoints.save(
                step, state, {"step": step, "position": position, "histories": histories}
            )

    for name, run in runs.items():
        with console.status(f"compiling {name}"):
            seconds = run.compile(first, placed_validation)
        console.print(f"{name} compiled in {seconds:.1f} s")

    stop = settings.steps if stop_after is None else min(stop_after, settings.steps)
    evaluation_steps = settings.evaluation_steps
    with report.progress_bar() as bar:
        task = bar.add_task("", total=settings.steps, completed=step)
        while step < stop:
            until = min(step + STRIDE, stop, next(s for s in evaluation_steps if s > step))
            batches = []
            while step < until:
                batches.append(parallel.place(windows.batch(position, settings.batch)))
                position += settings.batch
                step += 1
            for run in runs.values():
                run.train(batches)
            bar.update(
                task,
                completed=step,
                description=report.progress_text({n: r.history for n, r in runs.items()}),
            )
            if step in evaluation_steps:
                for run in runs.values():
                    run.evaluate(placed_validation)
                report.print_evaluation(step, {n: r.history for n, r in runs.items()})
                save()
    save()
    if checkpoints is not None:
        checkpoints.close()
    if step < settings.steps:
        console.print(f"stopped after step {step} of {settings.steps}; --resume continues")
        return None

    histories = {name: run.history for name, run in runs.items()}
    summary = {
        "settings": dataclasses.asdict(settings),
        "parameters": parameters,
        "jax": jax.__version__,
        "jaxfp8": jaxfp8.__version__,
        "device": jax.devices()[0].device_kind,
        **report.compare(evaluation_steps, histories, unigram, products),
    }
    sample = report.sample_text(sample_of(runs["fp8"]))
    if jax.process_index() == 0:
        report.write(out, evaluation_steps, histories, summary, sample)
    console.print(report.product_table(products))
    console.print(report.comparison_table(summary))
    console.print("text by the FP8 model:\n", sample, sep="\n", markup=False)
    console.print(f"loss.png, curves.json, summary.json and sample.txt are in {out}")
    return summary


def sample_of(run: Run) -> np.ndarray:
    """A window of text after each of PROMPTS, by a model that trained."""
    prompts = np.zeros((len(PROMPTS), run.settings.sequence), np.int32)
    for row, prompt in zip(prompts, PROMPTS, strict=True):
        row[: len(prompt)] = list(prompt)
    return run.sample(prompts, np.array([len(p) for p in PROMPTS]))


# ------------------------------------------------------------------------------------------------
# Command line
# ------------------------------------------------------------------------------------------------


def positive(kind: type) -> Callable[[str], Any]:
    def parse(text: str) -> Any:
        value = kind(text)
        if not 0 < value < math.inf:
            raise argparse.ArgumentTypeError(f"{text} is not positive")
        return value

    parse.__name__ = f"positive {kind.__name__}"  # argparse names it in its error
    return parse


def parse_arguments(argv: list[str] | None = None) -> tuple[Settings, dict[str, Any]]:
    parser = argparse.ArgumentParser(
        description="Train a byte-level language model in BF16 and in FP8 on the source of the "
        "Python standard library, from the same parameters on the same batches, and compare.",
        epilog="Sizes: "
        + "; ".join(
            f"{name}: {s.model.layers} layers of {s.model.width}, "
            f"{s.steps} steps ({s.moe_steps} with --moe) of {s.batch} x {s.sequence} bytes"
            for name, s in SIZES.items()
        )
        + ". The medium and large models want a GPU.",
    )
    model = parser.add_argument_group("model")
    model.add_argument("--size", choices=SIZES, default="small", help="default: small")
    model.add_argument(
        "--tiny", action="store_const", const="tiny", dest="size", help="--size tiny"
    )
    model.add_argument(
        "--moe", action="store_true", help="four experts, two a token, in place of a dense SwiGLU"
    )
    model.add_argument(
        "--experts", type=positive(int), metavar="N", help="--moe with N experts in place of four"
    )

    mesh = parser.add_argument_group("several devices")
    mesh.add_argument(
        "--mesh",
        default="data=1",
        metavar="AXES",
        help="devices along each axis, such as data=4,model=2 or data=2,expert=4: windows are cut "
        "over data and expert, experts over expert, heads and hidden units over model",
    )
    mesh.add_argument(
        "--fsdp",
        action="store_true",
        help="cut the layers' matrices over data as well, and gather each for its products",
    )
    mesh.add_argument(
        "--coordinator",
        metavar="HOST:PORT",
        help="run in several processes, this one with --process of --processes; process 0 listens "
        "there. `auto` takes all three from the cluster (Slurm, Open MPI, Kubernetes, ...)",
    )
    mesh.add_argument("--processes", type=positive(int), metavar="N", help="how many there are")
    mesh.add_argument("--process", type=int, metavar="I", help="which this one is, from 0")

    training = parser.add_argument_group("training")
    training.add_argument(
        "--text",
        type=pathlib.Path,
        metavar="DIR",
        help="read all .py, .md, .rst and .txt files below it, in place of the standard library's "
        "source (about 8 MB); a long run wants more text than it reads",
    )
    training.add_argument("--steps", type=positive(int), help="default: the size's")
    training.add_argument(
        "--batch", type=positive(int), help="windows a step (default: the size's)"
    )
    training.add_argument(
        "--learning-rate", type=positive(float), help="highest rate (default: the size's)"
    )
    training.add_argument(
        "--seed", type=int, default=0, help="of the parameters and the batches (default: 0)"
    )
    training.add_argument(
        "--twin",
        action="store_true",
        help="train a second BF16 model, its first weights off by a thousandth: how far the losses "
        "of two such models lie apart by chance",
    )
    training.add_argument(
        "--evaluations",
        type=positive(int),
        default=8,
        help="how many, spread evenly (default: 8)",
    )
    training.add_argument(
        "--validation-windows",
        type=positive(int),
        default=256,
        help="windows of validation text that an evaluation reads (default: 256)",
    )

    recipe = parser.add_argument_group("FP8 recipe")
    recipe.add_argument(
        "--scale-format",
        choices=("float32", "pow2"),
        default="float32",
        help="block scales: any float32 (default) or powers of two",
    )
    recipe.add_argument(
        "--grad-dtype",
        choices=tuple(GRAD_DTYPES),
        default="e4m3",
        help="FP8 type of gradients (default: e4m3); activations and weights are e4m3",
    )

    files = parser.add_argument_group("files")
    files.add_argument(
        "--out",
        type=pathlib.Path,
        default=pathlib.Path("out/train_lm"),
        metavar="DIR",
        help="gets loss.png, curves.json, summary.json, sample.txt (default: out/train_lm)",
    )
    files.add_argument(
        "--checkpoint",
        type=pathlib.Path,
        metavar="DIR",
        help="save there after each evaluation and at the end",
    )
    files.add_argument(
        "--resume", action="store_true", help="continue from the newest checkpoint in --checkpoint"
    )
    files.add_argument(
        "--stop-after",
        type=positive(int),
        metavar="STEP",
        help="save and stop after this step; the schedule still spans --steps",
    )
    args = parser.parse_args(argv)

    size = SIZES[args.size]
    moe = args.moe or args.experts is not None
    settings = Settings(
        size=args.size,
        moe=moe,
        experts=args.experts or 4,
        steps=args.steps or (size.moe_steps if moe else size.steps),
        batch=args.batch or size.batch,
        learning_rate=args.learning_rate or size.learning_rate,
        evaluations=args.evaluations,
        validation_windows=args.validation_windows,
        seed=args.seed,
        scale_format=args.scale_format,
        grad_dtype=args.grad_dtype,
        twin=args.twin,
    )
    if settings.seed < 0:
        parser.error(f"--seed is {settings.seed}; allowed: zero or a positive int")
    if settings.evaluations > settings.steps:
        parser.error(
            f"--evaluations is {settings.evaluations}; allowed: at most --steps, {settings.steps}"
        )
    for flag in ("resume", "stop_after"):
        if getattr(args, flag) and args.checkpoint is None:
            parser.error(f"--{flag.replace('_', '-')} needs --checkpoint DIR")
    if settings.experts < 2:
        parser.error(
            f"--experts is {settings.experts}; allowed: at least two, of which a token has two"
        )
    try:
        parallel = Parallel.parse(args.mesh, args.fsdp)
    except ValueError as error:
        parser.error(f"--mesh: {error}")
    if parallel.expert > 1 and not moe:
        parser.error("--mesh: expert needs --moe or --experts")
    if parallel.fsdp and parallel.data == 1:
        parser.error("--fsdp needs --mesh data=N, N at least 2")
    numbered = args.processes is not None and args.process is not None
    if (args.coordinator not in (None, "auto")) != numbered:
        parser.error("--coordinator HOST:PORT, --processes and --process need one another")
    names = ("out", "checkpoint", "resume", "stop_after", "text")
    names += ("coordinator", "processes", "process")
    return settings, {"parallel": parallel} | {name: getattr(args, name) for name in names}


HEARTBEAT_SECONDS = 20


def join(coordinator: str | None, processes: int | None, process: int | None) -> None:
    """Joins the other processes, if there are any.

    When one of them dies, the others end with an error after two heartbeats at the latest.
    """
    if coordinator is not None:
        jax.distributed.initialize(
            None if coordinator == "auto" else coordinator,
            num_processes=processes,
            process_id=process,
            heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
        )


def main(argv: list[str] | None = None) -> None:
    settings, rest = parse_arguments(argv)
    join(*(rest.pop(name) for name in ("coordinator", "processes", "process")))
    try:
        train(settings, **rest)
    except (data.InputError, FloatingPointError) as error:
        sys.exit(f"train_lm: {error}")


if __name__ == "__main__":
    main()
