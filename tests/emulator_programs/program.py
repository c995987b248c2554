"""A PTX program of the emulator's own tests: text, launch, and what must come out."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from tests.emulator import Report, launch

HEADER = ".version 8.7\n.target sm_90a\n.address_size 64\n"
REGISTERS = """
    .reg .pred %p<16>;
    .reg .b16 %h<32>;
    .reg .b32 %r<160>;
    .reg .b64 %d<64>;
    .reg .f32 %f<160>;
    .reg .f64 %g<16>;
"""


def kernel(
    parameters: str,
    body: str,
    *,
    module: str = "",
    directives: str = "",
    name: str = "test",
) -> str:
    """PTX of one kernel. `parameters` is a list of types, such as `"u64 u64 u32 map"`.

    Parameters are called p0, p1, ...; a `map` is a tensor map.
    """
    declared = [
        f".param .align 128 .b8 p{i}[128]" if kind == "map" else f".param .{kind} p{i}"
        for i, kind in enumerate(parameters.split())
    ]
    return (
        f"{HEADER}{module}\n.visible .entry {name}(\n    "
        + ",\n    ".join(declared)
        + f"\n)\n{directives}\n{{{REGISTERS}{body}\n    ret;\n}}\n"
    )


@dataclass(frozen=True)
class Program:
    """One launch of one PTX program.

    arguments: gives fresh arguments for a launch.
    check: gets the arguments after the launch, and asserts what they hold.
    """

    name: str
    ptx: str
    arguments: Callable[[], list[Any]]
    check: Callable[..., None]
    block: Any = 32
    grid: Any = 1
    cluster: Any = 1
    dynamic_smem: int = 0
    entry: str = "test"
    seeds: tuple[int, ...] = field(default=(0,))

    def launch(self, arguments: list[Any], **options) -> Report:
        """With these arguments, which are not checked; `options` are the emulator's."""
        return launch(
            self.ptx,
            self.entry,
            grid=self.grid,
            block=self.block,
            cluster=self.cluster,
            dynamic_smem=self.dynamic_smem,
            args=arguments,
            **options,
        )

    def run(self, seed: int = 0) -> Report:
        arguments = self.arguments()
        report = self.launch(arguments, seed=seed)
        with np.errstate(all="ignore"):
            self.check(*arguments)
        return report


def same_bits(got: np.ndarray, want: np.ndarray, message: str = ""):
    """Equality of every byte, with the first difference in the message."""
    got, want = np.ascontiguousarray(got), np.ascontiguousarray(want)
    assert got.dtype == want.dtype and got.shape == want.shape, (got.dtype, want.dtype)
    different = got.view(f"u{got.itemsize}") != want.view(f"u{got.itemsize}")
    if different.any():
        at = tuple(int(i[0]) for i in np.nonzero(different))
        raise AssertionError(
            f"{message} {int(different.sum())} differ; first at {at}: {got[at]} for {want[at]}"
        )


def read_only(array: np.ndarray) -> np.ndarray:
    array.flags.writeable = False
    return array


def pairs(values) -> tuple[np.ndarray, np.ndarray]:
    """All pairs of some values, as two arrays padded to a multiple of 32."""
    left, right = zip(*itertools.product(values, values), strict=True)
    return np.array(left), np.array(right)
