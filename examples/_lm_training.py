"""Training of train_lm: sizes, settings, a run of one model, and the job of all runs side by side."""

from __future__ import annotations

import dataclasses
import math
import pathlib
import time
from collections.abc import Callable
from typing import Any

import _lm_data as data
import _lm_report as report
import jax
import jax.numpy as jnp
import numpy as np
import optax
from _lm_model import Model, Params, generate, init, init_nearby, losses
from _lm_parallel import BATCH, ONE_DEVICE, Parallel, divisor, repeat_rows
from _lm_products import Products, bf16_products, fp8_products
from jax import Array
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import jaxfp8

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

PROMPTS = (b"import ", b"def ", b"class ", b"    return ")
PRODUCT_NAMES = ("qkv", "attention", "out", "router", "feed_forward", "head")


class Job:
    """The runs, the text that they read, and how far they are.

    `text`: the directory whose text is read; None for the standard library's source.
    """

    def __init__(self, settings: Settings, parallel: Parallel, text: pathlib.Path | None = None):
        self.settings, self.parallel = settings, parallel
        self.corpus = data.standard_library() if text is None else data.directory(text)
        self.windows = data.Windows(self.corpus.train, settings.sequence, settings.seed)
        # The same windows for every seed, so that seeds compare; in larger batches: no gradients.
        batch = divisor(settings.validation_windows, 4 * settings.batch, parallel.shards)
        parallel.check(settings.model, settings.batch, batch)
        self.validation = data.spread_windows(
            self.corpus.validation, settings.sequence, settings.validation_windows
        ).reshape(-1, batch, settings.sequence + 1)
        self.runs = {
            "bf16": Run("bf16", bf16_products(), settings, parallel),
            "fp8": Run("fp8", fp8_products(settings.recipe), settings, parallel),
        }
        if settings.twin:
            twin = Run(report.TWIN, bf16_products(), settings, parallel, init_nearby)
            self.runs[report.TWIN] = twin
        self.parameters = sum(x.size for x in jax.tree.leaves(self.runs["bf16"].state[0]))
        self.step = self.position = 0
        self._checkpoints: Any = None

    @property
    def histories(self) -> dict[str, report.History]:
        return {name: run.history for name, run in self.runs.items()}

    def __str__(self) -> str:
        settings, corpus = self.settings, self.corpus
        kind = f"{settings.model.experts} experts, 2 a token" if settings.moe else "dense"
        return (
            f"{self.parameters / 1e6:.2f} M parameters, {kind}; "
            f"to train on, {corpus.train.size / 1e6:.1f} MB of text in {corpus.files[0]} files; "
            f"to validate on, {self.validation[:, :, 1:].size:,} bytes of {corpus.files[1]} others\n"
            f"{settings.steps} steps of {settings.batch} x {settings.sequence} bytes, "
            f"seed {settings.seed}, {settings.recipe} on {jax.devices()[0].device_kind}, "
            f"{self.parallel}"
        )

    def keep_in(self, directory: pathlib.Path, resume: bool) -> None:
        """Saves there from now on, and with `resume` continues from the newest checkpoint there."""
        from _lm_checkpoint import Checkpoints  # Orbax takes seconds to import

        identity = dataclasses.asdict(self.settings) | {"text": self.corpus.checksum}
        self._checkpoints = Checkpoints(directory, identity)
        if resume:
            states, saved = self._checkpoints.restore({n: r.state for n, r in self.runs.items()})
            self.step, self.position = saved["step"], saved["position"]
            for name, run in self.runs.items():
                run.state = states[name]
                run.history = report.History(saved["histories"][name])
            report.console.print(f"resumed after step {self.step}")
        elif self._checkpoints.latest_step is not None:
            raise data.InputError(
                f"{directory} already has a checkpoint of step {self._checkpoints.latest_step}; "
                "pass --resume to continue it, or another --checkpoint directory"
            )

    def compile(self) -> None:
        """Compiles every run, and lists the products of the FP8 model's training step."""
        first = self.parallel.place(self.windows.batch(0, self.settings.batch))
        self._validation = self.parallel.place(self.validation, axis=1)
        fp8 = self.runs["fp8"]
        self.products = report.list_products(fp8.gradients, PRODUCT_NAMES, fp8.state[0], first)
        for name, run in self.runs.items():
            with report.console.status(f"compiling {name}"):
                seconds = run.compile(first, self._validation)
            report.console.print(f"{name} compiled in {seconds:.1f} s")

    def train(self, until: int) -> None:
        """Trains every run on the same batches up to a step."""
        batches = []
        while self.step < until:
            windows = self.windows.batch(self.position, self.settings.batch)
            batches.append(self.parallel.place(windows))
            self.position += self.settings.batch
            self.step += 1
        for run in self.runs.values():
            run.train(batches)

    def evaluate(self) -> None:
        """Evaluates every run, shows the losses and saves."""
        for run in self.runs.values():
            run.evaluate(self._validation)
        report.print_evaluation(self.step, self.histories)
        self.save()

    def save(self) -> None:
        """Saves what continues the job, if there is a directory for it."""
        if self._checkpoints is not None and self._checkpoints.latest_step != self.step:
            state = {name: run.state for name, run in self.runs.items()}
            histories = {name: history.to_json() for name, history in self.histories.items()}
            progress = {"step": self.step, "position": self.position, "histories": histories}
            self._checkpoints.save(self.step, state, progress)

    def close(self) -> None:
        """Saves, and waits for what is being saved."""
        self.save()
        if self._checkpoints is not None:
            self._checkpoints.close()

    def summary(self) -> dict[str, Any]:
        steps, unigram = self.settings.evaluation_steps, data.unigram_loss(self.corpus)
        return {
            "settings": dataclasses.asdict(self.settings),
            "parameters": self.parameters,
            **report.environment(),
            **report.compare(steps, self.histories, unigram, self.products),
        }

    def sample(self) -> np.ndarray:
        """A window of text after each of PROMPTS, by the FP8 model."""
        prompts = np.zeros((len(PROMPTS), self.settings.sequence), np.int32)
        for row, prompt in zip(prompts, PROMPTS, strict=True):
            row[: len(prompt)] = list(prompt)
        return self.runs["fp8"].sample(prompts, np.array([len(p) for p in PROMPTS]))
