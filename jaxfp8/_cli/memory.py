"""memory M N K: bytes of a product's arrays, in FP8 and in BF16."""

from __future__ import annotations

import click
from rich.console import Console
from rich.table import Table

from .._tools.roofline import memory
from .models import Shape
from .shapes import grouped, product_arguments


@click.command("memory")
@product_arguments
@click.pass_obj
def command(console: Console, shape: Shape, groups: int | None, ragged: bool) -> None:
    """Bytes of (M, K) . (K, N): operands, scales, result, workspace, and what training keeps.

    The FP8 copies come on top of the high-precision arrays that they are made from, for as long as those live.
    """
    m, n, k = shape.m, shape.n, shape.k
    groups, ragged = grouped(shape, groups, ragged)
    sizes = memory(m, n, k, groups, ragged=ragged)
    title = f"{m} x {n} x {k}" + (
        f", {groups} {'ragged ' if ragged else ''}groups" if groups > 1 else ""
    )
    table = Table(title=title)
    table.add_column("array")
    for heading in ("FP8", "BF16", "FP8 / BF16"):
        table.add_column(heading, justify="right")
    prefix = "kept for the backward pass: "
    for heading, kept in (("forward product", False), ("kept for the backward pass", True)):
        mine, theirs = (
            {a.removeprefix(prefix): b for a, b in side.items() if a.startswith(prefix) == kept}
            for side in (sizes.fp8, sizes.bf16)
        )
        for array in dict.fromkeys([*mine, *theirs]):
            table.add_row(f"  {array}", *_cells(mine.get(array), theirs.get(array)))
        table.add_row(heading, *_cells(sum(mine.values()), sum(theirs.values())), style="bold")
        table.add_section()
    console.print(table)


def _cells(fp8: int | None, bf16: int | None) -> tuple[str, str, str]:
    ratio = f"{fp8 / bf16:.3f}" if fp8 and bf16 else ""
    return _bytes(fp8), _bytes(bf16), ratio


def _bytes(size: int | None) -> str:
    if size is None:
        return "-"
    return f"{size / 2**20:,.2f} MiB" if size >= 2**14 else f"{size:,} B"
