"""What an exchange moves and what its rows take, from static sizes; `explain` prints it."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax

from .._arrays.blocks import ceil_blocks
from ._exchange import Exchange

EXPLAINED = "jaxfp8.exchange"
"""A name scope. What stands in its brackets is one of `explain`'s notes."""

SCALE_BYTES = NUMBER_BYTES = 4


@dataclasses.dataclass(frozen=True)
class Traffic:
    """Of one pass over a device's tokens.

    **Arguments:**

    - `network`: tokens that a device receives from peers; `node`: inside a node. As many sums come back.
    - `there`: bytes of a token on its way to its experts; `back`: of a sum.
    """

    network: int
    node: int
    there: int
    back: int

    @property
    def received(self) -> int:
        """Bytes on the way to experts."""
        return (self.network + self.node) * self.there

    @property
    def returned(self) -> int:
        """Bytes on the way back."""
        return (self.network + self.node) * self.back


def traffic(
    exchange: Exchange, width: int, itemsize: int, choices: int, quantized: bool = True
) -> Traffic:
    """Of tokens `width` wide; a ragged exchange moves this much if every token has an expert with every peer.

    There go FP8 data and scales, or elements of `itemsize` bytes, and the numbers of a token's experts.
    """
    levels = exchange.levels
    data = width + SCALE_BYTES * ceil_blocks(width) if quantized else width * itemsize
    return Traffic(
        network=(levels.peers - 1) * exchange.block,
        node=(levels.inside - 1) * levels.peers * exchange.block,
        there=data + NUMBER_BYTES * choices,
        back=width * itemsize,
    )


def explained(
    function: str,
    exchange: Exchange,
    width: int,
    itemsize: int,
    choices: int,
    quantized: bool = True,
    max_rows: int | None = None,
) -> Any:
    """The name scope that tells `explain` how tokens travel, and what the rows of the experts take."""
    rows = exchange.tokens * choices if max_rows is None else max_rows
    moved = traffic(exchange, width, itemsize, choices, quantized)
    text = f"{function}: {_travel(exchange, moved)}; room for {rows} rows, {_bytes(rows * width * itemsize)}"
    text += ", so that any routing fits (max_rows bounds it)" if max_rows is None else ""
    return jax.named_scope(f"{EXPLAINED}[{text}]")


def _travel(exchange, moved):
    levels = exchange.levels
    if levels.devices == 1:
        return "one device"
    how = {
        "gather": "gather: each token once to every device",
        "all_to_all": f"all_to_all: blocks of {exchange.block} tokens a peer",
        "ragged": "ragged: each token once to the devices of its experts, at most",
    }[exchange.strategy]
    axes = " and ".join([*levels.outer, *levels.inner])
    devices = f"{levels.peers} x {levels.inside}" if levels.inside > 1 else f"{levels.peers}"
    return (
        f"{how}, over {axes} ({devices} devices), {_bytes(moved.received)} received there, "
        f"{_bytes(moved.returned)} back, a pass"
    )


def _bytes(size: int) -> str:
    if not isinstance(size, int):
        return f"{size} bytes"  # of a symbolic number of tokens
    factor, unit = next(((f, u) for f, u in ((1e9, "GB"), (1e6, "MB")) if size >= f), (1e3, "kB"))
    return f"{size / factor:.1f} {unit}"
