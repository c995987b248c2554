"""tune: measures the configurations of a program's products and keeps the fastest."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .. import _ffi
from .._arrays.blocks import BLOCK, ceil_blocks
from .._arrays.recipe import FP8_DTYPES
from ..kernels import configurations
from ..kernels.configurations import (
    Product,
    add_table,
    cluster_size,
    read_table,
    recording,
    write_table,
)


def products_of(function: Callable, *args: Any, **kwargs: Any) -> list[Product]:
    """The products that a program multiplies on a CUDA device, for `jaxfp8.tune`.

    Where there is a CUDA device the program is compiled (not run), so that products of automatically partitioned
    programs are those of a shard. Elsewhere it is lowered only.

    **Arguments:**

    - `function`, `args`, `kwargs`: a call of it. Arrays may be `jax.ShapeDtypeStruct`.

    **Returns:** each product once, sorted.
    """
    # A function of its own: JAX would not lower again what it has lowered before.
    traced = jax.jit(lambda *args, **kwargs: function(*args, **kwargs)).trace(*args, **kwargs)
    with recording() as products:
        if configurations.lowering_device_kind() is None:
            traced.lower(lowering_platforms=("cuda",))
        else:
            traced.lower().compile()
    return sorted(products)


# What a program's launches read, so that none finds its operands in L2 (50 MB on an H100).
_COLD_BYTES = 128 << 20
_MOST_CALLS = 32


def _operand_types(product: Product) -> list[jax.ShapeDtypeStruct]:
    """Types of a call's operands, as its leaf primitive takes them."""
    p = product
    ragged = p.kind in ("grouped_gemm", "grouped_wgrad_gemm")
    wgrad = p.kind == "grouped_wgrad_gemm"
    lhs_batch = () if ragged else (1 if p.shared_lhs else p.groups,)
    rhs_batch = () if wgrad else (p.groups,)
    blocks = ceil_blocks(p.k)
    rhs_rows = p.n if wgrad or p.kind == "gemm_1d1d" else ceil_blocks(p.n)
    types: list[tuple[tuple[int, ...], Any]] = [
        ((*lhs_batch, p.m, p.k), p.lhs_dtype),
        ((*lhs_batch, p.m, blocks), np.float32),
        ((*rhs_batch, p.n, p.k), p.rhs_dtype),
        ((*rhs_batch, rhs_rows, blocks), np.float32),
    ]
    if ragged or p.kind == "masked_grouped_gemm":
        types.append(((p.groups,), np.int32))
    if p.accum:
        types.append(
            ((p.m, p.n) if p.kind == "grouped_gemm" else (p.groups, p.m, p.n), p.out_dtype)
        )
    return [jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in types]


def _operands(product: Product, seed: int) -> list[jax.Array]:
    """Normal data, scales about 1, and groups of one size."""
    p, rng = product, np.random.default_rng(seed)

    def draw(t):
        if t.dtype == np.float32:
            return jnp.asarray(rng.uniform(0.5, 2, t.shape).astype(np.float32))
        if t.dtype in FP8_DTYPES:
            x = rng.standard_normal(t.shape, np.float32).clip(-4, 4)
            return jnp.asarray(x * np.float32(64)).astype(t.dtype)
        if t.dtype != np.int32:
            return jnp.zeros(t.shape, t.dtype)
        if p.kind == "masked_grouped_gemm":  # a quarter of the capacity
            return jnp.full(t.shape, max(1, p.m // 4), t.dtype)
        rows = p.m if p.kind == "grouped_gemm" else p.k - BLOCK * p.groups
        sizes = np.full(t.shape, rows // p.groups, np.int32)
        sizes[: rows % p.groups] += 1
        return jnp.asarray(sizes)

    return [draw(t) for t in _operand_types(p)]


def heuristic_config(product: Product, device_sms: int) -> str:
    """What the native side's heuristic chooses on a device of this many multiprocessors."""
    p = product
    shape = (p.m, p.n) if p.kind == "grouped_gemm" else (p.groups, p.m, p.n)
    operands = [(t.shape, t.dtype) for t in _operand_types(p)]
    plan = _ffi.plan(
        p.target, operands, [(shape, p.out_dtype)], num_sms=p.num_sms, device_sms=device_sms
    )
    return p.configs[plan.config]


def _allowed(product: Product, device_sms: int) -> list[str]:
    """Configurations whose cluster fits."""
    sms = min(product.num_sms or device_sms, device_sms)
    return [c for c in product.configs if cluster_size(c) <= sms]


def _program(product: Product, config: str) -> Callable:
    """A jitted function of lists of operands that multiplies each list."""
    from .._primitives.leaf import LEAVES
    from ..kernels import gemm, grouped_gemm  # noqa: F401 (they make the leaves)

    leaf = LEAVES[f"jaxfp8_{product.kind}_leaf"]
    params = {
        "out_dtype": np.dtype(product.out_dtype),
        "num_sms": product.num_sms,
        "config": config,
    }
    return jax.jit(lambda lists: [leaf(*operands, **params)[0] for operands in lists])


def measure(
    product: Product, configs: Iterable[str], *, device: Any, repeats: int
) -> dict[str, float]:
    """Seconds of a launch with each configuration.

    A program holds many launches, on operands of their own that no cache holds; the time of a launch is what it takes
    more than a program of one, divided by the launches more. Configurations alternate; medians.
    """
    moved = sum(t.size * t.dtype.itemsize for t in _operand_types(product))
    copies = int(np.clip(_COLD_BYTES // moved + 1, 5, _MOST_CALLS))
    with jax.default_device(device):
        lists = [_operands(product, seed) for seed in range(copies)]
        programs = {c: _program(product, c) for c in configs}

        def seconds(run, operands):
            start = time.perf_counter()
            jax.block_until_ready(run(operands))
            return time.perf_counter() - start

        times: dict[str, list[float]] = {c: [] for c in programs}
        for run in programs.values():  # compile both
            seconds(run, lists)
            seconds(run, lists[:1])
        for _ in range(repeats):
            for c, run in programs.items():
                more = seconds(run, lists) - seconds(run, lists[:1])
                times[c].append(more / (copies - 1))
    return {c: statistics.median(t) for c, t in times.items()}


def tune(
    products: Iterable[Product],
    *,
    path: Any = None,
    device: Any = None,
    repeats: int = 15,
    measure: Callable[..., dict[str, float]] = measure,
    report: Callable[[Product, str, dict[str, float]], None] | None = None,
) -> dict[Product, str]:
    """Measures each product's configurations on a device and keeps the fastest.

    This process chooses from the result at once; `path` keeps it for others, which call `jaxfp8.load_tuned(path)`.

    **Arguments:**

    - `products`: such as `jaxfp8.products_of(train_step, state, batch)` gives.
    - `path`: a JSON file to write; entries that it holds already stay, unless measured anew.
    - `device`: a JAX device; None takes the first CUDA device.
    - `repeats`: measurements of each configuration.
    - `measure`: `(product, configs, *, device, repeats) -> {config: seconds}`, the way to time.
    - `report`: called after each product with it, the choice and the seconds of every configuration.

    **Returns:** the configuration of each product: the heuristic's, unless another takes 1 % less.

    **Raises:** RuntimeError if there is no CUDA device and none is given; TypeError for what is no Product; ValueError
    if `path` holds something else; OSError if it cannot be written.
    """
    products = list(dict.fromkeys(products))
    for product in products:
        if not isinstance(product, Product):
            raise TypeError(f"tune: products holds {product!r}; allowed: jaxfp8.Product")
    if device is None:
        try:
            device = jax.devices("cuda")[0]
        except RuntimeError as error:
            raise RuntimeError(
                "tune: JAX finds no CUDA device to measure on; run it on a Hopper GPU, or pass device= "
                "(`python -m jaxfp8 doctor` says what is missing)"
            ) from error
    device_sms = getattr(device, "core_count", None) or 132
    path = None if path is None else Path(path)
    table = read_table(path) if path is not None and path.exists() else {}
    entries = table.setdefault(device.device_kind, {})
    choices = {}
    for product in products:
        seconds = measure(product, _allowed(product, device_sms), device=device, repeats=repeats)
        best = heuristic_config(product, device_sms)
        fastest = min(seconds, key=lambda c: seconds[c])
        if seconds[fastest] < 0.99 * seconds[best]:
            best = fastest
        choices[product] = best
        entries[product] = best, 1e6 * seconds[best]
        add_table({device.device_kind: {product: entries[product]}})
        if path is not None:
            write_table(path, table)
        if report is not None:
            report(product, best, seconds)
    return choices
