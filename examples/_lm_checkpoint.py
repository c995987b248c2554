"""Saving and resuming train_lm with Orbax: both models' states, step, data position, losses."""

from __future__ import annotations

import pathlib
from typing import Any

import jax
import orbax.checkpoint as ocp
from _lm_data import InputError


class Checkpoints:
    """The checkpoints in a directory, newest two kept.

    A checkpoint has two items: `state`, a pytree of arrays, and `progress`, JSON: whatever else
    continues the run, and the `settings` that it was made with. A run resumes only with equal
    settings, or its curve would not continue.
    """

    def __init__(self, directory: pathlib.Path, settings: dict[str, Any]):
        self.directory, self.settings = directory.absolute(), settings
        options = ocp.CheckpointManagerOptions(
            max_to_keep=2, create=True, enable_async_checkpointing=False
        )
        self._manager = ocp.CheckpointManager(
            self.directory, options=options, item_names=("state", "progress")
        )

    @property
    def latest_step(self) -> int | None:
        return self._manager.latest_step()

    def save(self, step: int, state: Any, progress: dict[str, Any]) -> None:
        self._manager.save(
            step,
            args=ocp.args.Composite(
                state=ocp.args.StandardSave(state),
                progress=ocp.args.JsonSave({**progress, "settings": self.settings}),
            ),
        )

    def restore(self, like: Any) -> tuple[Any, dict[str, Any]]:
        """State and progress of the newest checkpoint.

        `like` is a state of the same shapes, dtypes and shardings.

        **Raises:** InputError if there is none, or if it was made with other settings.
        """
        step = self.latest_step
        if step is None:
            raise InputError(f"{self.directory} has no checkpoint to resume")
        progress = self._manager.restore(
            step, args=ocp.args.Composite(progress=ocp.args.JsonRestore())
        )["progress"]
        different = [
            f"{name} was {value!r} and is {self.settings.get(name)!r}"
            for name, value in progress["settings"].items()
            if self.settings.get(name) != value
        ]
        if different:
            raise InputError(
                f"the checkpoint in {self.directory} was made with other settings: "
                + "; ".join(different)
            )
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
        state = self._manager.restore(
            step, args=ocp.args.Composite(state=ocp.args.StandardRestore(abstract))
        )["state"]
        return state, progress

    def close(self) -> None:
        self._manager.close()
