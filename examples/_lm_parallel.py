"""Meshes of train_lm: which device holds which part of what, and what moves between them.

The training step is one `jax.shard_map`: every device runs the model on its windows with its part
of the weights, and the sums between devices are written out.

    data    windows are cut over it; with `fsdp`, the layers' matrices too, which are gathered in
            front of their products (in FP8 for the FP8 model) and their gradients scattered
    expert  windows are cut over it too; each device holds some of the experts, and tokens travel
    model   attention heads and the feed-forward layer's hidden units are cut over it
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import jax
import numpy as np
from _lm_data import InputError
from jax import Array
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

AXES = ("data", "expert", "model")
BATCH = ("data", "expert")
BLOCK = 128

# What is cut of a layer's matrix (..., K, N) or matrices side by side (..., K, 2 or 3, N): over
# "model" the heads or hidden units, over "data" the model's width.
MODEL_AXIS = {"qkv": -1, "out": -2, "gate_up": -1, "down": -2}
FSDP_AXIS = {"qkv": -3, "out": -1, "gate_up": -3, "down": -1}


@dataclasses.dataclass(frozen=True)
class Parallel:
    """Devices along each axis of the mesh. On one device there is no mesh and nothing moves."""

    data: int = 1
    expert: int = 1
    model: int = 1
    fsdp: bool = False

    @classmethod
    def parse(cls, text: str, fsdp: bool) -> Parallel:
        """From "data=4,model=2". **Raises:** ValueError for anything else."""
        sizes: dict[str, int] = {}
        for part in text.split(","):
            name, _, size = part.partition("=")
            if name not in AXES or name in sizes or not size.isdecimal() or int(size) < 1:
                raise ValueError(
                    f"{part!r} in {text!r}; allowed: data=N, expert=N and model=N, each at most "
                    "once, N a positive int"
                )
            sizes[name] = int(size)
        return cls(**sizes, fsdp=fsdp)

    @property
    def devices(self) -> int:
        return self.data * self.expert * self.model

    @property
    def active(self) -> bool:
        return self.devices > 1

    @property
    def shards(self) -> int:
        """Into how many parts a batch is cut."""
        return self.data * self.expert

    def __str__(self) -> str:
        sizes = [f"{n}={getattr(self, n)}" for n in AXES if getattr(self, n) > 1]
        return f"mesh {','.join(sizes) or 'of one device'}{', FSDP' if self.fsdp else ''}"

    def check(self, model: Any, batch: int, validation: int) -> None:
        """**Raises:** InputError if a model or batch cannot be cut like this, or devices lack."""
        found = jax.device_count()
        if self.devices > found or (jax.process_count() > 1 and self.devices != found):
            raise InputError(
                f"--mesh wants {self.devices} devices; there are {found} "
                "(JAX_NUM_CPU_DEVICES=N makes a CPU look like N)"
            )
        cuts = [
            ("data times expert", self.shards, "--batch", batch),
            ("data times expert", self.shards, "a batch of validation windows,", validation),
            ("model", self.model, "the number of heads,", model.heads),
            ("model", self.model, "the feed-forward layer's width,", model.hidden),
        ]
        if self.fsdp:
            parts = f"{BLOCK} times data"
            cuts.append((parts, BLOCK * self.data, "the model's width,", model.width))
            parts = f"{BLOCK} times model"  # blocks of a gate, and of what it multiplies
            cuts.append(
                (parts, BLOCK * self.model, "the feed-forward layer's width,", model.hidden)
            )
        if self.expert > 1:
            cuts.append(("expert", self.expert, "--experts", model.experts))
        for axis, devices, what, size in cuts:
            if size % devices or size == 0:
                raise InputError(f"{axis} is {devices}; it must divide {what} which is {size}")

    @functools.cached_property
    def mesh(self) -> jax.sharding.Mesh:
        shape = tuple(getattr(self, n) for n in AXES)
        devices = jax.devices()[: self.devices]
        return jax.make_mesh(shape, AXES, axis_types=(AxisType.Auto,) * 3, devices=devices)

    # ---- where things live -----------------------------------------------------------------------

    def specs(self, params: Any) -> Any:
        """A PartitionSpec for each parameter."""

        def spec(path, x):
            name = path[-1].key
            axes: list[Any] = [None] * x.ndim
            if name in MODEL_AXIS:
                if self.model > 1:
                    axes[MODEL_AXIS[name]] = "model"
                if self.fsdp:
                    axes[FSDP_AXIS[name]] = "data"
                if self.expert > 1 and name in ("gate_up", "down"):
                    axes[1] = "expert"  # after the layers
            return P(*axes)

        return jax.tree_util.tree_map_with_path(spec, params)

    def place(self, windows: np.ndarray, axis: int = 0) -> Array:
        """Windows, which every process has, cut along `axis`: each process places its own part."""
        if not self.active:
            return windows
        sharding = NamedSharding(self.mesh, P(*[None] * axis, BATCH))
        return jax.make_array_from_callback(windows.shape, sharding, windows.__getitem__)

    # ---- what moves, inside the step -------------------------------------------------------------

    def mean(self, x: Array) -> Array:
        """Mean over the parts of a batch."""
        return jax.lax.pmean(x, BATCH) if self.active else x

    def own_key(self, key: Array) -> Array:
        """A key of its own for each part of a batch."""
        return jax.random.fold_in(key, jax.lax.axis_index(BATCH)) if self.active else key

    def sum_parts(self, y: Array) -> Array:
        """The sum of what each device's hidden units or heads contribute: float32, rounded once."""
        return jax.lax.psum(y, "model") if self.active else y


ONE_DEVICE = Parallel()


def divisor(size: int, most: int, parts: int) -> int:
    """The largest divisor of `size` up to `most` that `parts` divides; 0 if there is none."""
    return max((n for n in range(1, most + 1) if size % n == 0 and n % parts == 0), default=0)


def repeat_rows(rows: np.ndarray, parts: int) -> np.ndarray:
    """The rows, over and over, until `parts` divides their number."""
    return np.tile(rows, (math.lcm(len(rows), parts) // len(rows), 1))
