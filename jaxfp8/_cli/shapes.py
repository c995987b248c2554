"""Shapes of products as every command takes them."""

from __future__ import annotations

import re
from typing import Any

import click

from .models import MODELS, Shape

ALLOWED = "allowed: M N K, MxNxK, or MxNxK/G for G ragged groups, all positive"


def parse_shapes(words: tuple[str, ...]) -> tuple[Shape, ...]:
    """`4096x7168x2048`, `4096 7168 2048` or `16384x4096x2048/8`, as many as there are."""
    shapes, rest = [], list(words)
    while rest:
        if re.fullmatch(r"\d+", rest[0]):
            text, rest = "x".join(rest[:3]), rest[3:]
        else:
            text, rest = rest[0], rest[1:]
        found = re.fullmatch(r"(\d+)x(\d+)x(\d+)(?:/(\d+))?", text)
        sizes = [int(v) for v in found.groups() if v] if found else [0]
        if 0 in sizes:
            raise click.BadParameter(f"{text!r} is no shape; {ALLOWED}")
        shapes.append(Shape(text, *sizes))
    return tuple(shapes)


def _shapes(ctx: Any, param: Any, words: tuple[str, ...]) -> tuple[Shape, ...]:
    return parse_shapes(words)


def _one_shape(ctx: Any, param: Any, words: tuple[str, ...]) -> Shape:
    shapes = parse_shapes(words)
    if len(shapes) != 1:
        raise click.BadParameter(f"{len(shapes)} shapes are given; allowed: one, as M N K or MxNxK")
    return shapes[0]


shapes_argument = click.argument(
    "shapes", nargs=-1, callback=_shapes, metavar="[M N K | MxNxK[/G]]..."
)
"""Any number of shapes, none too."""

model_option = click.option(
    "--model", type=click.Choice(sorted(MODELS)), help="One layer of a model."
)

_shape_argument = click.argument(
    "shape", nargs=-1, required=True, callback=_one_shape, metavar="M N K | MxNxK[/G]"
)


def product_arguments(command: Any) -> Any:
    """One product: `shape`, `groups` and `ragged`."""
    positive = click.IntRange(1)
    command = _shape_argument(command)
    command = click.option(
        "--groups", type=positive, help="Products, or ragged groups.  [default: 1]"
    )(command)
    return click.option("--ragged", is_flag=True, help="M rows in ragged groups (ragged_dot).")(
        command
    )


def grouped(shape: Shape, groups: int | None, ragged: bool) -> tuple[int, bool]:
    """Groups, and whether they are ragged, by the shape or by the options."""
    if not shape.groups:
        return groups or 1, ragged
    if groups not in (None, shape.groups):
        raise click.UsageError(f"--groups is {groups}, but the shape is {shape.name}; allowed: one")
    return shape.groups, True
