"""doctor: versions, devices, driver and kernels; what would run, and why not."""

from __future__ import annotations

import ctypes
import importlib.util
import platform
from collections.abc import Iterator
from importlib import metadata
from typing import Literal, NamedTuple

import click
import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

Verdict = Literal["ok", "note", "problem"]
STYLES = {"ok": "green", "note": "yellow", "problem": "bold red"}

SUPPORTED_JAX = ((0, 10, 2), (0, 13))


class Finding(NamedTuple):
    """One line of the report."""

    subject: str
    found: str
    verdict: Verdict = "ok"
    advice: str = ""


@click.command("doctor")
@click.option(
    "--run/--no-run", default=True, show_default=True, help="Run a small product of each kind."
)
@click.pass_context
def command(ctx: click.Context, run: bool) -> None:
    """Report versions, devices, driver and kernels, and run each kind of product once.

    The exit status is 1 if there is a problem. That products run as XLA operations, without a Hopper GPU, is none.
    """
    console: Console = ctx.obj
    findings = [*versions(), *driver(), *devices(), *kernels()]
    if run and not any(f.verdict == "problem" for f in findings):
        with console.status("running a product of each kind"):
            findings += list(self_test())
    table = Table(title="jaxfp8 doctor")
    table.add_column("")
    table.add_column("subject")
    table.add_column("found")
    for f in findings:
        found = Text(f.found)
        if f.advice:
            found.append(f"\n{f.advice}", STYLES[f.verdict])
        table.add_row(Text(f.verdict, STYLES[f.verdict]), f.subject, found)
    console.print(table)
    problems = sum(f.verdict == "problem" for f in findings)
    console.print(verdict_line(findings), style="bold")
    if problems:
        ctx.exit(1)


def verdict_line(findings: list[Finding]) -> str:
    """What it comes down to."""
    if problems := [f.subject for f in findings if f.verdict == "problem"]:
        return f"{len(problems)} problem{'s' * (len(problems) > 1)}: {', '.join(problems)}"
    if runs_kernels():
        return "Products run as this package's kernels."
    return "Products run as XLA operations, with the numerics of the kernels: right, but not fast."


# ------------------------------------------------------------------------------------------------
# Versions
# ------------------------------------------------------------------------------------------------


def versions() -> Iterator[Finding]:
    """Python, JAX, this package and what it works with."""
    import jax
    import jaxlib

    from .. import __version__, _ffi

    yield Finding(
        "Python", f"{platform.python_version()}, {platform.system()} {platform.machine()}"
    )
    least, most = SUPPORTED_JAX
    supported = least <= jax.__version_info__ < most
    yield Finding(
        "JAX",
        f"jax {jax.__version__}, jaxlib {jaxlib.__version__}, numpy {np.__version__}",
        "ok" if supported else "problem",
        ""
        if supported
        else f"supported is {'.'.join(map(str, least))} <= jax < {'.'.join(map(str, most))}",
    )
    info = _ffi.build_info()
    ffi = ".".join(map(str, info["ffi"]))
    yield Finding("jaxfp8", f"{__version__}, built for XLA FFI {ffi}")
    known = ("flax", "equinox", "qwix", "tokamax", "optax")
    frameworks = [f"{p} {metadata.version(p)}" for p in known if importlib.util.find_spec(p)]
    yield Finding("frameworks", ", ".join(frameworks) or "none installed")


# ------------------------------------------------------------------------------------------------
# The machine
# ------------------------------------------------------------------------------------------------


def driver() -> Iterator[Finding]:
    """The CUDA driver, asked without creating a context, and JAX's plugin for it."""
    plugins = [
        f"{d.name} {d.version}"
        for d in metadata.distributions()
        if d.name and d.name.lower().replace("_", "-").startswith("jax-cuda")
    ]
    try:
        cuda = ctypes.CDLL("libcuda.so.1")
    except OSError:
        yield Finding(
            "CUDA driver", "none (libcuda.so.1 is not there)", "note", "no NVIDIA GPU can be used"
        )
        return
    version = ctypes.c_int()
    status = cuda.cuDriverGetVersion(ctypes.byref(version))
    if status:
        yield Finding(
            "CUDA driver",
            f"cuDriverGetVersion fails with {status}",
            "problem",
            "reinstall the driver",
        )
    else:
        major, minor = version.value // 1000, version.value % 1000 // 10
        yield Finding("CUDA driver", f"for CUDA {major}.{minor}")
    if plugins:
        yield Finding("JAX's CUDA plugin", ", ".join(sorted(set(plugins))))
    else:
        yield Finding(
            "JAX's CUDA plugin",
            "none",
            "note",
            "there is a driver, but JAX cannot use it: pip install 'jax[cuda13]' (or cuda12)",
        )


def devices() -> Iterator[Finding]:
    """What JAX computes on."""
    import jax

    try:
        found = jax.devices()
    except RuntimeError as error:
        yield Finding(
            "devices", str(error).splitlines()[0], "problem", "JAX itself finds no device"
        )
        return
    kinds: dict[tuple[str, str], int] = {}
    for d in found:
        capability = getattr(d, "compute_capability", None)
        kind = d.device_kind + (f", compute capability {capability}" if capability else "")
        kinds[d.platform, kind] = kinds.get((d.platform, kind), 0) + 1
    for (plat, kind), count in kinds.items():
        hopper = plat == "gpu" and kind.endswith("capability 9.0")
        yield Finding(
            "devices",
            f"{count} x {plat}: {kind}",
            "ok" if hopper else "note",
            ""
            if hopper
            else "the kernels are for compute capability 9.0 (H100, H200, H800, H20, GH200)",
        )


def runs_kernels() -> bool:
    """Whether products on JAX's first device are this package's kernels."""
    from .. import _ffi
    from .._tools.roofline import here

    return here() is not None and bool(_ffi.images())


def kernels() -> Iterator[Finding]:
    """The compiled kernels of this build."""
    from .. import _ffi
    from .._tools.roofline import here

    images, nvcc = _ffi.images(), _ffi.build_info()["nvcc"]
    if not images:
        yield Finding(
            "kernels",
            "none: there was no nvcc when this package was built",
            "problem" if here() else "note",
            "reinstall with an nvcc of 12.3 or newer, or with JAXFP8_CUDA=ON to see why there was none",
        )
        return
    sizes = [(_ffi.image_directory() / f"{i}.cubin") for i in images]
    missing = [p.name for p in sizes if not p.exists()]
    if missing:
        yield Finding(
            "kernels", f"not there: {', '.join(missing)}", "problem", "reinstall the package"
        )
        return
    total = sum(p.stat().st_size for p in sizes) / 2**20
    yield Finding("kernels", f"{len(images)} images for sm_90a, {total:.1f} MiB, nvcc {nvcc}")
    names = [t.removeprefix("jaxfp8_").removesuffix("_v1") for t in _ffi.targets()]
    products = [n for n in names if "gemm" in n and "accum" not in n]
    counts = ", ".join(f"{name} {len(_ffi.configs(name))}" for name in products)
    yield Finding("configurations", counts)


# ------------------------------------------------------------------------------------------------
# Running
# ------------------------------------------------------------------------------------------------


def self_test() -> Iterator[Finding]:
    """A product of each kind on JAX's first device, against NumPy float64 on the dequantized operands."""
    import jax
    import jax.numpy as jnp

    import jaxfp8

    rng = np.random.default_rng(0)
    m, n, k, groups = 192, 256, 384, 3
    bound = 1e-3 if runs_kernels() else 1e-5  # docs/numerics.md, "Products"
    how = "kernel" if runs_kernels() else "XLA operations"

    def normal(*shape):
        return jnp.asarray(rng.standard_normal(shape), jnp.float32)

    def exact(q):
        return np.asarray(q.dequantize(), np.float64)

    def report(name, got, want):
        error = float(np.linalg.norm(np.asarray(got, np.float64) - want) / np.linalg.norm(want))
        right = error <= bound  # a NaN is wrong
        advice = "" if right else f"allowed is {bound:g}; please report this with the lines above"
        found = f"{how}; error against float64: {error:.1e}"
        return Finding(name, found, "ok" if right else "problem", advice)

    x, w, experts = normal(m, k), normal(k, n), normal(groups, k, n)
    rows, (weight, _) = jaxfp8.quantize(x), jaxfp8.quantize_weight(w)
    y = jax.jit(lambda a, b: jaxfp8.gemm(a, b, out_dtype=jnp.float32))(rows, weight)
    yield report("gemm", y, exact(rows) @ exact(weight).T)

    left, right = jaxfp8.quantize(normal(n, m)), jaxfp8.quantize(normal(k, m))
    yield report(
        "wgrad_gemm", jax.jit(jaxfp8.wgrad_gemm)(left, right), exact(left) @ exact(right).T
    )

    sizes = np.array([70, 0, 100], np.int32)
    stack, _ = jaxfp8.quantize_weight(experts)
    y = jax.jit(lambda *a: jaxfp8.grouped_gemm(*a, out_dtype=jnp.float32))(
        rows, stack, jnp.asarray(sizes)
    )
    want = np.zeros((m, n))
    for g, (start, size) in enumerate(zip(np.cumsum(sizes) - sizes, sizes, strict=True)):
        want[start : start + size] = exact(rows)[start : start + size] @ exact(stack)[g].T
    yield report("grouped_gemm", y, want)

    y, pull = jax.vjp(jax.jit(jaxfp8.linear), x, w)
    finite = all(np.isfinite(np.asarray(g)).all() for g in (y, *pull(y)))
    yield Finding(
        "linear, gradients",
        f"{how}; finite" if finite else "not finite",
        "ok" if finite else "problem",
    )
