"""bench: products and layers through JAX, quantization included, against XLA's BF16 in the same run."""

from __future__ import annotations

import functools
import json
import pathlib
import re
import shutil
import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from .._tools.explanation import readable_time
from .models import MODELS, Shape
from .shapes import model_option, shapes_argument


class Measured(NamedTuple):
    """Seconds a call of both sides: medians, and the spread of the rounds (their range over the median)."""

    shape: Shape
    fp8: float
    bf16: float
    spread: float
    flops: int

    @property
    def speedup(self) -> float:
        """How much less time FP8 takes."""
        return self.bf16 / self.fp8


DEFAULT_SHAPES = [
    Shape(f"{m}x{n}x{k}", m, n, k) for m, n, k in ((8192, 4096, 4096), (4096, 7168, 2048))
]
SMALL_SHAPES = [Shape(f"{m}x{n}x{k}", m, n, k) for m, n, k in ((256, 512, 512), (256, 1024, 512))]
"""Where there is no GPU, so that the command ends."""


@click.command("bench")
@shapes_argument
@model_option
@click.option(
    "--tokens",
    type=click.IntRange(1),
    help="Rows of a model's activations.  [default: 8192; 128 on a CPU]",
)
@click.option(
    "--mode",
    type=click.Choice(["train", "forward"]),
    default="train",
    show_default=True,
    help="Forward and both gradients, or the forward product alone.",
)
@click.option(
    "--rounds", type=click.IntRange(2), default=5, show_default=True, help="Medians of this many."
)
@click.option(
    "--seconds", type=click.FloatRange(0.001), default=0.1, show_default=True, help="Of a round."
)
@click.option(
    "--out",
    type=click.Path(file_okay=False, path_type=pathlib.Path),
    help="A directory for bench.json and bench.png.",
)
@click.pass_obj
def command(
    console: Console,
    shapes: tuple[Shape, ...],
    model: str | None,
    tokens: int | None,
    mode: str,
    rounds: int,
    seconds: float,
    out: pathlib.Path | None,
) -> None:
    """Time FP8 against BF16: SHAPES such as 4096x7168x2048 (M x N x K), or 16384x4096x2048/8 for 8 ragged groups.

    Each side is what a JAX program runs: jaxfp8.linear or jaxfp8.ragged_dot from bfloat16 operands, quantization
    included, and XLA's own product of the same operands. Rounds alternate between the sides. Wall time of many queued
    calls divided by their number.
    """
    import jax

    if shapes and model:
        raise click.UsageError("bench: give SHAPES or --model, not both")
    if tokens and not model:
        raise click.UsageError("bench: --tokens goes with --model")
    on_gpu = jax.devices()[0].platform == "gpu"
    if model:
        todo = MODELS[model].shapes(tokens or (8192 if on_gpu else 128))
    else:
        todo = list(shapes) or (DEFAULT_SHAPES if on_gpu else SMALL_SHAPES)

    before = gpu_state()
    measured = []
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("", total=len(todo) * rounds)
        for shape in todo:
            progress.update(task, description=shape.name)
            advance = functools.partial(progress.advance, task)
            measured.append(measure(shape, mode, rounds, seconds, advance))
    doubts = doubtful(measured, before, gpu_state(), mode)

    device = jax.devices()[0].device_kind
    title = f"{model + ', ' if model else ''}{mode} on {device}, jax {jax.__version__}"
    console.print(_table(title, measured))
    for doubt in doubts:
        console.print(f"[yellow]doubtful:[/] {doubt}")
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        record = {
            "title": title,
            "mode": mode,
            "device": device,
            "jax": jax.__version__,
            "results": [{**m._asdict(), "shape": m.shape._asdict()} for m in measured],
            "doubts": doubts,
        }
        (out / "bench.json").write_text(json.dumps(record, indent=1) + "\n")
        plot(title, measured, doubts, out / "bench.png")
        console.print(f"wrote {out / 'bench.json'} and {out / 'bench.png'}")


# ------------------------------------------------------------------------------------------------
# Measuring
# ------------------------------------------------------------------------------------------------


def operands(shape: Shape, *, abstract: bool = False) -> list[Any]:
    """x, w, dy, and sizes of equal groups if there are groups; abstract: their types."""
    import jax
    import jax.numpy as jnp

    _, m, n, k, groups = shape

    def make():
        keys = jax.random.split(jax.random.key(0), 3)
        shapes = [(m, k), (groups, k, n) if groups else (k, n), (m, n)]
        arrays = [
            jax.random.normal(key, s, jnp.bfloat16) for key, s in zip(keys, shapes, strict=True)
        ]
        if groups:
            arrays.append(jnp.full(groups, m // groups, jnp.int32).at[: m % groups].add(1))
        return arrays

    return jax.eval_shape(make) if abstract else make()


def product(shape: Shape, side: str) -> Callable[..., Any]:
    """The product of x and w (and sizes) in "fp8" or "bf16"."""
    import jax
    import jax.numpy as jnp

    import jaxfp8

    if shape.groups:
        return jaxfp8.ragged_dot if side == "fp8" else jax.lax.ragged_dot
    return jaxfp8.linear if side == "fp8" else jnp.dot


def trained(shape: Shape, side: str = "fp8") -> Callable[..., Any]:
    """The product and both gradients, of what `operands` gives."""
    import jax

    f = product(shape, side)

    def train(x, w, dy, *sizes):
        y, pull = jax.vjp(lambda x, w: f(x, w, *sizes), x, w)
        return y, pull(dy)

    return train


def measure(
    shape: Shape, mode: str, rounds: int, seconds: float, advance: Callable[[], None]
) -> Measured:
    """Both sides of a shape, in alternating rounds."""
    import jax

    _, m, n, k, _ = shape
    arrays = operands(shape)
    calls: dict[str, Callable[[], Any]] = {}
    for side in ("fp8", "bf16"):
        if mode == "train":
            calls[side] = functools.partial(jax.jit(trained(shape, side)), *arrays)
        else:
            x, w, _, *sizes = arrays
            calls[side] = functools.partial(jax.jit(product(shape, side)), x, w, *sizes)
    counts = {}
    for side, call in calls.items():
        jax.block_until_ready(call())
        start = time.perf_counter()
        jax.block_until_ready(call())
        counts[side] = max(1, min(100, int(seconds / (time.perf_counter() - start))))
    times: dict[str, list[float]] = {side: [] for side in calls}
    for _ in range(rounds):
        for side, call in calls.items():
            start = time.perf_counter()
            for _ in range(counts[side]):
                out = call()
            jax.block_until_ready(out)
            times[side].append((time.perf_counter() - start) / counts[side])
        advance()
    median = {side: statistics.median(t) for side, t in times.items()}
    spread = max((max(t) - min(t)) / median[side] for side, t in times.items())
    flops = 2 * m * n * k * (3 if mode == "train" else 1)
    return Measured(shape, median["fp8"], median["bf16"], spread, flops)


class GpuState(NamedTuple):
    """What nvidia-smi says of the first GPU."""

    clock: float
    max_clock: float
    throttled: str
    processes: int


def gpu_state() -> GpuState | None:
    """The first GPU's clocks in MHz and its other users; None where there is no nvidia-smi or it does not answer."""
    smi = shutil.which("nvidia-smi")
    if smi is None:
        return None

    def query(what):
        arguments = [smi, "-i", "0", what, "--format=csv,noheader,nounits"]
        try:
            result = subprocess.run(arguments, capture_output=True, text=True, timeout=20)
        except subprocess.TimeoutExpired:
            return None
        return result.stdout.strip() if result.returncode == 0 else None

    clocks = query("--query-gpu=clocks.sm,clocks.max.sm,clocks_event_reasons.active")
    users = query("--query-compute-apps=pid")
    if clocks is None or users is None:
        return None
    now, most, reasons = (v.strip() for v in clocks.split(","))
    clock, max_clock = (float(v) if re.fullmatch(r"[\d.]+", v) else 0.0 for v in (now, most))
    return GpuState(clock, max_clock, reasons, len(users.split()))


THROTTLED = {
    0x8: "hardware slowdown",
    0x20: "software thermal",
    0x40: "hardware thermal",
    0x80: "power brake",
}
"""Bits of NVML's clocksEventReasons (nvml.h, nvmlClocksEventReason...) under which speed is not the GPU's own."""


def doubtful(
    measured: Sequence[Measured], before: GpuState | None, after: GpuState | None, mode: str
) -> list[str]:
    """Why the figures may not mean what they seem to."""
    import jax

    from .._tools.roofline import device, here

    first = jax.devices()[0]
    doubts = []
    if first.platform != "gpu":
        doubts.append(
            f"this ran on a {first.platform}: FP8 is emulated by XLA operations there, and these figures say nothing "
            "about a GPU"
        )
    elif here() is None:
        doubts.append("this GPU has no kernels of this package: FP8 ran as XLA operations")
    if first.platform == "gpu" and after is None:
        doubts.append("nvidia-smi does not answer: clocks and other users of the GPU are unknown")
    if after is not None and before is not None and first.platform == "gpu":
        if max(before.processes, after.processes) > 1:
            doubts.append(f"{max(before.processes, after.processes)} processes use this GPU")
        if after.clock and after.clock < 0.8 * after.max_clock:
            doubts.append(f"the SM clock is {after.clock:.0f} of {after.max_clock:.0f} MHz")
        bits = int(after.throttled, 16) if after.throttled.startswith("0x") else 0
        doubts += [
            f"the clocks are held down: {why}" for bit, why in THROTTLED.items() if bits & bit
        ]
    noisy = [m.shape.name for m in measured if m.spread > 0.1]
    if noisy:
        worst = max(m.spread for m in measured)
        doubts.append(
            f"rounds differ by up to {worst:.0%} ({len(noisy)} of {len(measured)} shapes by more than 10%): shared "
            "clocks or a busy host"
        )
    if here() is not None:
        peak = device("bench", None)
        if any(
            m.flops / m.fp8 > peak.fp8 * 1e12 or m.flops / m.bf16 > peak.bf16 * 1e12
            for m in measured
        ):
            doubts.append("a figure is above the GPU's peak")
        if any(m.fp8 < 30e-6 for m in measured):
            doubts.append("calls of less than 30 us: the host may be what is timed")
    return doubts


# ------------------------------------------------------------------------------------------------
# Showing
# ------------------------------------------------------------------------------------------------


def _table(title: str, measured: Sequence[Measured]) -> Table:
    table = Table(title=title)
    for heading in ("product", "M x N x K"):
        table.add_column(heading)
    for heading in ("FP8", "BF16", "FP8 TFLOP/s", "BF16 TFLOP/s", "spread", "speedup"):
        table.add_column(heading, justify="right")
    for m in measured:
        s = m.shape
        sizes = f"{s.m} x {s.n} x {s.k}" + (f", {s.groups} groups" if s.groups else "")
        table.add_row(
            s.name if not re.match(r"\d+x", s.name) else "linear" if not s.groups else "ragged_dot",
            sizes,
            readable_time(m.fp8),
            readable_time(m.bf16),
            f"{m.flops / m.fp8 / 1e12:.3g}",
            f"{m.flops / m.bf16 / 1e12:.3g}",
            f"{m.spread:.0%}",
            f"[bold]{m.speedup:.2f}[/]",
        )
    if len(measured) > 1:
        fp8, bf16 = sum(m.fp8 for m in measured), sum(m.bf16 for m in measured)
        table.add_section()
        table.add_row(
            "sum",
            "",
            readable_time(fp8),
            readable_time(bf16),
            *[""] * 3,
            f"[bold]{bf16 / fp8:.2f}[/]",
        )
    return table


def plot(
    title: str, measured: Sequence[Measured], doubts: Sequence[str], path: pathlib.Path
) -> None:
    """TFLOP/s of both sides as bars; what is doubtful is written below."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise click.ClickException(
            "bench: --out draws with matplotlib: pip install 'jaxfp8[cli]'"
        ) from None

    figure = Figure(figsize=(8, 1.6 + 0.55 * len(measured)), layout="constrained")
    axes = figure.subplots()
    names = [f"{m.shape.name}" for m in measured]
    places = range(len(measured))
    for offset, side, colour in ((-0.2, "bf16", "#9aa5b1"), (0.2, "fp8", "#2f7d4f")):
        rates = [m.flops / getattr(m, side) / 1e12 for m in measured]
        axes.barh([p + offset for p in places], rates, 0.38, label=side.upper(), color=colour)
    for p, m in zip(places, measured, strict=True):
        axes.annotate(
            f" {m.speedup:.2f}x", (m.flops / m.fp8 / 1e12, p + 0.2), va="center", fontsize=9
        )
    axes.set_yticks(list(places), names)
    axes.invert_yaxis()
    axes.margins(x=0.12)
    axes.set_xlabel("TFLOP/s, quantization included")
    axes.set_title(title, fontsize=10)
    axes.legend(loc="lower right", fontsize=9)
    axes.spines[["top", "right"]].set_visible(False)
    if doubts:
        figure.supxlabel(
            "\n".join(f"doubtful: {d}" for d in doubts), fontsize=7, color="#b00020", wrap=True
        )
    figure.savefig(path, dpi=110)
