"""tune: measures kernel configurations on this GPU and keeps the fastest in a file."""

from __future__ import annotations

import pathlib

import click
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from .._tools.explanation import readable_time
from .bench import operands, trained
from .models import MODELS, Shape
from .shapes import model_option, shapes_argument


@click.command("tune")
@shapes_argument
@model_option
@click.option(
    "--tokens",
    type=click.IntRange(1),
    default=8192,
    show_default=True,
    help="Rows of a model's activations.",
)
@click.option(
    "--out",
    type=click.Path(dir_okay=False, path_type=pathlib.Path),
    default=pathlib.Path("tuned.json"),
    show_default=True,
    help="The file; what it holds already stays unless measured anew.",
)
@click.option(
    "--repeats",
    type=click.IntRange(1),
    default=15,
    show_default=True,
    help="Of each configuration.",
)
@click.pass_obj
def command(
    console: Console,
    shapes: tuple[Shape, ...],
    model: str | None,
    tokens: int,
    out: pathlib.Path,
    repeats: int,
) -> None:
    """Measure the products of SHAPES (M x N x K, or M x N x K / G for G ragged groups) or of a model's layer.

    The forward product and both gradients of each. A program uses the result after `jaxfp8.load_tuned(FILE)`.
    """
    import jaxfp8

    if bool(shapes) == bool(model):
        raise click.UsageError("tune: give either SHAPES or --model")
    todo = MODELS[model].shapes(tokens) if model else shapes
    products = sorted(
        {p for s in todo for p in jaxfp8.products_of(trained(s), *operands(s, abstract=True))}
    )
    table = Table(title=str(out))
    for heading in ("product", "groups x M x N x K", "configuration"):
        table.add_column(heading)
    for heading in ("time", "slowest"):
        table.add_column(heading, justify="right")
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task("", total=len(products))

        def report(product, config, seconds):
            sizes = f"{product.groups} x {product.m} x {product.n} x {product.k}"
            times = readable_time(seconds[config]), readable_time(max(seconds.values()))
            table.add_row(product.kind, sizes, config, *times)
            progress.advance(task)

        try:
            jaxfp8.tune(products, path=out, repeats=repeats, report=report)
        except (RuntimeError, ValueError) as error:
            raise click.ClickException(
                f"tune: {str(error).splitlines()[0].removeprefix('tune: ')}"
            ) from None
    console.print(table)
    console.print(
        f"wrote {out}; jaxfp8.load_tuned({str(out)!r}) before a program's first call uses it"
    )
