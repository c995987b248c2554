"""roofline M N K: FLOPs, bytes and the time that they allow, for each product of a layer."""

from __future__ import annotations

from collections.abc import Callable

import click
from rich.console import Console
from rich.table import Table

from .._tools.explain import explain
from .._tools.explanation import Explanation, engineering, readable_time
from .._tools.roofline import Device
from . import chosen_device, device_option
from .models import Shape
from .shapes import grouped, product_arguments


@click.command("roofline")
@product_arguments
@device_option
@click.pass_obj
def command(
    console: Console,
    shape: Shape,
    groups: int | None,
    ragged: bool,
    device_kind: str | None,
) -> None:
    """What (M, K) . (K, N) could take at best: forward pass, gradients and quantization.

    Peaks are those of NVIDIA's data sheets. Operands are bfloat16, activations M x K, weights K x N.
    """
    device = chosen_device("roofline", device_kind)
    m, n, k = shape.m, shape.n, shape.k
    groups, ragged = grouped(shape, groups, ragged)
    found = _explained(m, n, k, groups, ragged, device)
    title = f"{device.name}: {m} x {n} x {k}" + (f", {groups} groups" if groups > 1 else "")
    console.print(_table(found, title))
    console.print(_kernels(found))
    console.print(
        f"{device.name}: {device.fp8:g} TFLOP/s in FP8, {device.bf16:g} in BF16, {device.bandwidth:g} TB/s: above "
        f"{device.fp8 / device.bandwidth:.0f} FLOP a byte a product is bound by the tensor cores. No kernel is faster "
        "than its roofline."
    )


def _explained(m: int, n: int, k: int, groups: int, ragged: bool, device: Device) -> Explanation:
    """The products of a layer and of its gradients."""
    import jax
    import jax.numpy as jnp

    import jaxfp8

    def array(*shape, dtype=jnp.bfloat16):
        return jax.ShapeDtypeStruct(shape, dtype)

    f: Callable[..., jax.Array]
    sizes: tuple[jax.ShapeDtypeStruct, ...]
    if ragged:
        f, sizes = jaxfp8.ragged_dot, (array(groups, dtype=jnp.int32),)
        x, w = array(m, k), array(groups, k, n)
    elif groups > 1:
        f, sizes = _batched, ()
        x, w = array(groups, m, k), array(groups, k, n)
    else:
        f, sizes = jaxfp8.linear, ()
        x, w = array(m, k), array(k, n)
    return explain(f, x, w, *sizes, gradient=(0, 1), device_kind=device)


def _table(found: Explanation, title: str) -> Table:
    """A product a row, its kernel below its name: 80 columns hold it."""
    device = found.device
    table = Table(title=title, padding=(0, 0, 0, 1), collapse_padding=True)
    table.add_column("product", no_wrap=True)
    for heading in ("FLOP", "bytes", "FLOP/B", "FP8", "bound by", "BF16", "ratio"):
        table.add_column(heading, justify="right", no_wrap=True)
    for line in found.lines:
        balance = device.fp8 * 1e12 / (device.bandwidth * 1e12)
        intensity = line.flops / line.bytes
        table.add_row(
            f"{line.role}",
            engineering(line.flops),
            engineering(line.bytes),
            f"{intensity:.0f}",
            readable_time(line.seconds),
            "compute" if intensity > balance else "memory",
            readable_time(line.bf16_seconds),
            f"{line.bf16_seconds / line.seconds:.2f}",
        )
    table.add_section()
    table.add_row(
        f"{found.quantizations} quantizers",
        "",
        engineering(found.quantization_bytes),
        "",
        readable_time(found.quantization_seconds),
        "memory",
        "",
        "",
    )
    table.add_row(
        "sum",
        *[""] * 3,
        readable_time(found.seconds),
        "",
        readable_time(found.bf16_seconds),
        f"{found.bf16_seconds / found.seconds:.2f}",
        style="bold",
    )
    return table


def _kernels(found: Explanation) -> Table:
    table = Table()
    for heading in ("product", "kernel, configuration"):
        table.add_column(heading)
    table.add_column("CTAs", justify="right")
    for line in found.lines:
        ctas = str(line.grid[0]) if line.grid else "-"
        table.add_row(line.role, f"{line.kernel}, {line.configuration}", ctas)
    return table


def _batched(x, w):
    import jaxfp8

    return jaxfp8.dot_general(x, w, (((2,), (1,)), ((0,), (0,))))
