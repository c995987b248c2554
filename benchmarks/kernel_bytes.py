"""Bytes that the quantizing kernels move against the least.

    python -m benchmarks.kernel_bytes > benchmarks/kernel_bytes.md

Counted by the emulator, instruction by instruction; nothing here was run on a GPU. The least: every element of the
inputs read once, every byte of the results written once. Of `ragged_columns` the rows outside every group need not be
read. Group sizes, which every CTA of a ragged kernel reads, are listed apart.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import NamedTuple

import numpy as np

from tests import kernel_launch as launch
from tests import oracle_quantize

ROWS, COLUMNS, GROUPED = 144, 48, 100  # of which 100 rows are in the one group


class Moved(NamedTuple):
    """Bytes of one launch."""

    kernel: str
    shape: tuple[int, ...]
    least_read: int
    read: int
    sizes_read: (
        int  # of `read`: at most, group sizes; of mixtures, what says which row and its factor
    )
    least_written: int
    written: int

    def line(self) -> str:
        """A row of the table."""
        read, written = self.read / self.least_read, self.written / self.least_written
        shape = " x ".join(map(str, self.shape))
        return (
            f"| {self.kernel} | {shape} | {self.least_read} | {self.read} | {read:.2f} "
            f"| {self.least_written} | {self.written} | {written:.2f} |"
        )


def assert_least(moved: Moved):
    """Nothing moves twice, and the table says so."""
    assert moved.written == moved.least_written
    assert moved.least_read <= moved.read <= moved.least_read + moved.sizes_read
    assert moved.line() in Path(__file__).with_suffix(".md").read_text().splitlines()


def _moved(plan, operands, results, least_read) -> Moved:
    _, report = launch.execute(plan, operands, results)
    written = sum(int(np.prod(shape)) * dtype.itemsize for dtype, shape in results.values())
    # A CTA reads the sizes, and those in a group the first one's once more.
    sizes = (
        2 * operands["group_sizes"].nbytes * int(plan.grid[0]) if "group_sizes" in operands else 0
    )
    shape = next(iter(operands.values())).shape
    return Moved(
        plan.kernel, shape, least_read, report.bytes_read, sizes, written, report.bytes_written
    )


@functools.cache
def quantizer(kind: str, source: np.dtype) -> Moved:
    """One quantization of a matrix in `source`."""
    x = launch.matrices(10, launch.quantizer_shape(kind, 1, ROWS, COLUMNS), source)
    sizes = None
    if kind in launch.RAGGED_QUANTIZERS:
        x, sizes = x[0], [GROUPED]
    read = GROUPED * COLUMNS * x.itemsize if kind == "ragged_columns" else x.nbytes
    return _moved(*launch.quantizer_call(kind, x, launch.E4M3, group_sizes=sizes), read)


@functools.cache
def activation(kind: str, source: np.dtype) -> Moved:
    """One gated activation of a matrix in `source`, or its gradient."""
    x, dy = launch.activation_operands(
        kind, launch.activation_shape(kind, 1, ROWS, 2, COLUMNS), 10, source
    )
    sizes = [GROUPED] if kind in launch.RAGGED_ACTIVATIONS else None
    read = x.nbytes + (0 if dy is None else dy.nbytes)
    return _moved(*launch.activation_call(kind, x, dy, launch.E4M3, group_sizes=sizes), read)


MIXTURES = (
    *(f"gather_{kind}" for kind in launch.GATHERS),
    "sum_rows",
    "sum_weighted_rows",
    *(f"activation_{kind}" for kind in launch.WEIGHTED_ACTIVATIONS),
)
CHOICES = 6


@functools.cache
def mixture(kind: str, source: np.dtype) -> Moved:
    """One kernel of a mixture, of rows in `source`; a gather takes each row once, in another order.

    Every lane of a row reads its index, weight and scale, from the same words: they are not of the least.
    """
    rng = np.random.default_rng(11)
    x, weight = launch.matrices(11, (ROWS, COLUMNS), source), launch.row_weights(11, ROWS)
    order = rng.permutation(ROWS).astype(np.int32)
    sizes = {"group_sizes": [GROUPED]} if kind.endswith("both") else {}
    if kind.startswith("gather"):
        if not kind.startswith("gather_quantize"):
            x = oracle_quantize.quantize_blocks(x)
        planned = launch.gather_call(kind.removeprefix("gather_"), x, order, **sizes)
    elif kind.startswith("sum"):
        position = order.reshape(-1, CHOICES)
        factors = rng.random(position.shape, np.float32) if "weighted" in kind else None
        planned = launch.sum_call(x, position, factors, out=source)
    else:
        x, dy = launch.activation_operands(kind, (ROWS, 2, COLUMNS), 10, source)
        name = kind.removeprefix("activation_")
        planned = launch.weighted_call(name, x, dy, weight, launch.E4M3, activation="silu", **sizes)
    plan, operands, _ = planned
    small = [name for name in ("x_scale", "source", "position", "weight") if name in operands]
    read = sum(v.nbytes for name, v in operands.items() if name not in (*small, "group_sizes"))
    moved = _moved(*planned, read)
    # Each thread reads of each at most one word.
    words = 4 * len(small) * int(plan.grid[0]) * int(plan.block[0])
    return moved._replace(sizes_read=moved.sizes_read + words)


def table() -> str:
    """Of every kernel with E4M3 results."""
    lines = [
        "Bytes moved by the quantizing kernels against the least: `python -m benchmarks.kernel_bytes`.",
        "Counted by the emulator; nothing here was run on a GPU.",
        "",
        "| kernel | input | least read | read | ratio | least written | written | ratio |",
        "|---|---|---|---|---|---|---|---|",
    ]
    quantizers = launch.DENSE_QUANTIZERS + launch.RAGGED_QUANTIZERS
    activations = launch.DENSE_ACTIVATIONS + launch.RAGGED_ACTIVATIONS
    for measure, kinds in ((quantizer, quantizers), (activation, activations)):
        lines += [
            measure(kind, source).line()
            for kind in kinds
            for source in (launch.BF16, launch.F16, launch.F32)
        ]
    lines += [
        mixture(kind, source).line() for kind in MIXTURES for source in (launch.BF16, launch.F32)
    ]
    lines += [
        "",
        f"A ragged kernel's one group has {GROUPED} of the {ROWS} rows; its CTAs read its size, too.",
        f"Gathers take each of the {ROWS} rows once; sums add {CHOICES} rows to one.",
        "Every lane of a row reads its index, weight and scale from the same word: of a mixture's the least has",
        "only the rows, and what is read past it is these words.",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
