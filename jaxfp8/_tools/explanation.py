"""The table that explain returns."""

from __future__ import annotations

import collections
import dataclasses
import html
import re
from collections.abc import Iterable, Sequence
from typing import Any

from .roofline import Device


@dataclasses.dataclass(frozen=True)
class Line:
    """One product of a program.

    **Arguments:**

    - `name`: its weight's path if autocast chose it, else its name scopes.
    - `role`: `"forward"`, `"recomputed"` (under remat), `"input gradient"` or `"weight gradient"`.
    - `operation`: the JAX operation, or the kernel's.
    - `groups`, `m`, `n`, `k`: sizes; `groups` products of `(m, k) . (k, n)`, or `m` rows in `groups` ragged groups (in
      a ragged weight gradient, `k` tokens).
    - `dtype`: `"fp8"`, or the operands' dtype.
    - `reason`: why it does not run in FP8; empty if it does.
    - `kernel`, `configuration`, `grid`: what a Hopper GPU launches; empty for XLA's own products.
    - `repeats`: how often it runs; None inside a while loop.
    - `flops`, `bytes`: of one run, and of the memory that it reads and writes once.
    - `seconds`, `bf16_seconds`: of one run at the roofline, and of the same product in bfloat16.
    """

    name: str
    role: str
    operation: str
    groups: int
    m: int
    n: int
    k: int
    dtype: str
    reason: str
    kernel: str
    configuration: str
    grid: tuple[int, ...]
    repeats: int | None
    flops: int
    bytes: int
    seconds: float
    bf16_seconds: float

    @property
    def fp8(self) -> bool:
        """Whether it runs in FP8."""
        return self.dtype == "fp8"


@dataclasses.dataclass(frozen=True)
class Explanation:
    """The products of a program; prints as a table, in notebooks too.

    **Arguments:**

    - `lines`: one for each product, in program order.
    - `device`: whose configurations and peaks are shown.
    - `quantizations`: how often a quantizer runs; `quantization_bytes`, `quantization_seconds`: of all of them.
    - `notes`: what the table cannot show.
    """

    lines: tuple[Line, ...]
    device: Device
    quantizations: int
    quantization_bytes: int
    quantization_seconds: float
    notes: tuple[str, ...] = ()

    @property
    def flops(self) -> int:
        """Floating-point operations of all products; a while loop's count once."""
        return sum(line.flops * (line.repeats or 1) for line in self.lines)

    @property
    def fp8_share(self) -> float:
        """The share of `flops` that runs in FP8."""
        ours = sum(line.flops * (line.repeats or 1) for line in self.lines if line.fp8)
        return ours / self.flops if self.flops else 0.0

    @property
    def seconds(self) -> float:
        """Of all products and quantizers at the roofline."""
        own = sum(line.seconds * (line.repeats or 1) for line in self.lines)
        return own + self.quantization_seconds

    @property
    def bf16_seconds(self) -> float:
        """Of the same products, those in FP8 taken in bfloat16, at the roofline."""
        return sum(line.bf16_seconds * (line.repeats or 1) for line in self.lines)

    def to_dicts(self) -> list[dict[str, Any]]:
        """The lines as dictionaries, such as `pandas.DataFrame` takes."""
        return [dataclasses.asdict(line) for line in self.lines]

    def totals(self) -> list[str]:
        """The sums under the table."""
        ours = sum(line.fp8 for line in self.lines)
        text = [
            f"{ours} of {len(self.lines)} products in FP8: {self.fp8_share:.1%} of {engineering(self.flops)}FLOP",
            f"roofline on {self.device.name}: {readable_time(self.seconds)}, of which quantization "
            f"{readable_time(self.quantization_seconds)} ({self.quantizations} passes, "
            f"{engineering(self.quantization_bytes)}B); "
            f"all in bfloat16: {readable_time(self.bf16_seconds)}",
        ]
        return text + list(self.notes)

    def table(self) -> tuple[list[str], list[list[str]]]:
        """Headings, and cells; equal products share a row."""
        equal: dict[Any, list[Line]] = collections.defaultdict(list)
        for line in self.lines:
            key = dataclasses.replace(line, name=re.sub(r"\d+", "#", line.name))
            equal[key].append(line)
        head = ["product", "role", "G x M x N x K", "runs", "FLOP", "kernel, or why not FP8"]
        head += ["bytes", "roofline", "bf16"]
        return head, [self._row(lines) for lines in equal.values()]

    @staticmethod
    def _row(lines: Sequence[Line]) -> list[str]:
        line, count = lines[0], len(lines)
        names = list(dict.fromkeys(li.name for li in lines))
        sizes = f"{line.m} x {line.n} x {line.k}"
        what = (
            f"{line.kernel}, {line.configuration}" if line.fp8 else f"{line.dtype}: {line.reason}"
        )
        runs = "while" if line.repeats is None else str(count * line.repeats)
        return [
            (names[0] or "-") + (f" (and {len(names) - 1} alike)" if len(names) > 1 else ""),
            line.role,
            f"{line.groups} x {sizes}" if line.groups > 1 else sizes,
            runs,
            engineering(line.flops),
            what,
            engineering(line.bytes),
            readable_time(line.seconds),
            readable_time(line.bf16_seconds),
        ]

    def __str__(self) -> str:
        head, rows = self.table()
        widths = [max(len(r[i]) for r in [head, *rows]) for i in range(len(head))]
        right = {3, 4, 6, 7, 8}

        def write(row):
            cells = (
                c.rjust(w) if i in right else c.ljust(w)
                for i, (c, w) in enumerate(zip(row, widths, strict=True))
            )
            return "  ".join(cells).rstrip()

        rule = "-" * len(write(head))
        return "\n".join([write(head), rule, *map(write, rows), rule, *self.totals()])

    __repr__ = __str__

    def _repr_html_(self) -> str:
        head, rows = self.table()

        def cells(row, tag):
            return "<tr>" + "".join(f"<{tag}>{html.escape(c)}</{tag}>" for c in row) + "</tr>"

        body = "".join(cells(r, "td") for r in rows)
        totals = "".join(f"<p>{html.escape(t)}</p>" for t in self.totals())
        return f"<table><thead>{cells(head, 'th')}</thead><tbody>{body}</tbody></table>{totals}"

    def __rich_console__(self, console: Any, options: Any) -> Iterable[Any]:
        from rich.table import Table
        from rich.text import Text

        head, rows = self.table()
        table = Table(header_style="bold")
        for i, h in enumerate(head):
            wide = i in (0, 5)
            table.add_column(h, justify="left" if i in (0, 1, 2, 5) else "right", no_wrap=not wide)
        for row in rows:
            ours = not re.match(r"(float|bfloat|int|uint|complex)\d+: ", row[5])
            table.add_row(*row[:5], Text(row[5], "green" if ours else "yellow"), *row[6:])
        yield table
        yield from (Text(t) for t in self.totals())


def engineering(value: float) -> str:
    """Three digits and the prefix of a unit."""
    for factor, unit in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= factor:
            return f"{value / factor:.3g} {unit}"
    return f"{value:.0f} "


def readable_time(seconds: float) -> str:
    """Three digits and a unit."""
    if seconds >= 1e-3:
        return f"{seconds * 1e3:.3g} ms"
    return f"{seconds * 1e6:.3g} us" if seconds >= 1e-6 else f"{seconds * 1e9:.3g} ns"
