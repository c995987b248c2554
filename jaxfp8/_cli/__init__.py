"""The command line: one module a command; what needs JAX is imported by the command that needs it."""

from __future__ import annotations

import contextlib
import importlib
import pathlib
from collections.abc import Iterator
from typing import Any

import click
from rich.console import Console

_COMMANDS = {
    "bench": "Time FP8 against BF16, through JAX, quantization included.",
    "doctor": "What would run here, and why not.",
    "memory": "Bytes of a product: operands, scales, result, workspace.",
    "roofline": "What a product could take at best, and the kernels it would launch.",
    "tune": "Measure kernel configurations on this GPU and keep the fastest.",
}


class _Commands(click.Group):
    """Commands by name, imported when they run; their one-line helps are known before."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in _COMMANDS:
            return None
        return importlib.import_module(f".{cmd_name}", __name__).command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, _COMMANDS[name]) for name in self.list_commands(ctx)])


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.option(
    "--svg",
    type=click.Path(dir_okay=False, writable=True, path_type=pathlib.Path),
    help="Also save what is printed as a picture.",
)
@click.option(
    "--width", type=click.IntRange(60), help="Columns to print in; default: the terminal's."
)
@click.pass_context
def main(ctx: click.Context, svg: pathlib.Path | None, width: int | None) -> None:
    """FP8 matrix products for JAX: what runs, what it costs, what it buys."""
    ctx.obj = ctx.with_resource(_printing(ctx, svg, width))


@contextlib.contextmanager
def _printing(ctx: Any, svg: pathlib.Path | None, width: int | None) -> Iterator[Console]:
    console = Console(record=svg is not None, width=width, highlight=False)
    yield console
    if svg is not None:
        title = f"python -m jaxfp8 {ctx.invoked_subcommand or ''}"
        svg.parent.mkdir(parents=True, exist_ok=True)
        console.save_svg(str(svg), title=title)


def device_option(command: Any) -> Any:
    """A device kind to plan for."""
    return click.option(
        "--device",
        "device_kind",
        help="Such as h100, h100-pcie, h200, h20, or what JAX calls it; default: the GPU here, else h100.",
    )(command)


def chosen_device(function: str, name: str | None) -> Any:
    """The device of `device_option`; a bad name is a usage error."""
    from .._tools.roofline import device

    try:
        return device(function, name)
    except ValueError as error:
        raise click.UsageError(str(error)) from None
