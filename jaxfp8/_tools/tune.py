"""Which kernel configuration a product runs with: tables of measured choices, and how to measure them.

A product's configuration is, in this order: the caller's `config=`; what the tables hold for exactly this product on
this kind of device; the heuristic of the native side. It is looked up while a program is lowered, so tables are loaded
before the program's first call.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .. import _ffi
from .._arrays import checks
from .._arrays.blocks import BLOCK, ceil_blocks
from .._arrays.recipe import FP8_DTYPES

SHIPPED = Path(__file__).with_name("tuned.json")
FORMAT = 1

KINDS = ("gemm_1d1d", "gemm_1d2d", "grouped_gemm", "grouped_wgrad_gemm", "masked_grouped_gemm")


@dataclasses.dataclass(frozen=True, order=True)
class Product:
    """What one kernel launch multiplies, as far as its configuration depends on it.

    **Arguments:**

    - `kind`: the kernel: `"gemm_1d2d"` (an rhs in 128x128 blocks), `"gemm_1d1d"` (both operands in 1x128 blocks),
      `"grouped_gemm"`, `"masked_grouped_gemm"` or `"grouped_wgrad_gemm"`.
    - `m`, `n`, `k`: rows, columns and contraction of one output matrix. `grouped_gemm`: m counts the rows of all
      groups. `grouped_wgrad_gemm`: k is the padded token axis.
    - `groups`: matrices of the batch, or groups.
    - `lhs_dtype`, `rhs_dtype`, `out_dtype`: names.
    - `shared_lhs`: one lhs for the whole batch (gemm_1d2d and gemm_1d1d).
    - `accum`: adds to an array.
    - `num_sms`: multiprocessors it may use, 0 for all.

    **Raises:** ValueError or TypeError for anything that no kernel computes.
    """

    kind: str
    m: int
    n: int
    k: int
    groups: int = 1
    lhs_dtype: str = "float8_e4m3fn"
    rhs_dtype: str = "float8_e4m3fn"
    out_dtype: str = "bfloat16"
    shared_lhs: bool = False
    accum: bool = False
    num_sms: int = 0

    def __post_init__(self):
        if self.kind not in KINDS:
            raise ValueError(f"Product: kind is {self.kind!r}; allowed: {', '.join(KINDS)}")
        for name in ("m", "n", "k", "groups", "num_sms"):
            value, least = getattr(self, name), name != "num_sms"
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(
                    f"Product: {name} is {value!r}; allowed: an int, at least {least:d}"
                )
        for name, allowed in (
            ("lhs_dtype", FP8_DTYPES),
            ("rhs_dtype", FP8_DTYPES),
            ("out_dtype", checks.OUTPUT_DTYPES),
        ):
            names = [np.dtype(d).name for d in allowed]
            if getattr(self, name) not in names:
                raise ValueError(
                    f"Product: {name} is {getattr(self, name)!r}; allowed: {', '.join(names)}"
                )
        if self.kind == "grouped_wgrad_gemm" and self.k < BLOCK * self.groups:
            raise ValueError(
                f"Product: k is {self.k}; allowed: 128 * (ceil(tokens/128) + groups), "
                f"with groups={self.groups}"
            )

    @property
    def target(self) -> str:
        """The custom call's name without version."""
        return self.kind + ("_accum" if self.accum else "")

    @property
    def configs(self) -> tuple[str, ...]:
        """The configurations that it can run with."""
        return config_names(self.kind)


def product_of_call(kind: str, operands, out_dtype, num_sms: int) -> Product | None:
    """The Product of a custom call's operands, FP8 data being operands 0 and 2; None for symbolic shapes."""
    lhs, _, rhs = operands[:3]
    if not all(isinstance(d, int) for d in (*lhs.shape, *rhs.shape)):
        return None  # of jax.export: sizes are known when the program runs, and the heuristic sees them
    batched = kind in ("gemm_1d2d", "gemm_1d1d")
    return Product(
        kind,
        m=lhs.shape[-2],
        n=rhs.shape[-2],
        k=lhs.shape[-1],
        groups=rhs.shape[0] if rhs.ndim == 3 else operands[4].shape[0],
        lhs_dtype=np.dtype(lhs.dtype).name,
        rhs_dtype=np.dtype(rhs.dtype).name,
        out_dtype=np.dtype(out_dtype).name,
        shared_lhs=batched and lhs.shape[0] == 1 < rhs.shape[0],
        accum=len(operands) == (5 if batched else 6),
        num_sms=num_sms,
    )


# --------------------------------------------------------------------------------------------------
# Configurations by name
# --------------------------------------------------------------------------------------------------


@functools.cache
def config_names(kind: str) -> tuple[str, ...]:
    """Readable names of a kernel's configurations, such as "m128n128 cluster 2x1": tile rows, columns, cluster."""
    return _ffi.configs(kind)


def check_config(function: str, config: Any, kind: str) -> None:
    """Raises unless `config` is None or a configuration of the kernel."""
    if config is None:
        return
    if not isinstance(config, str):
        raise TypeError(
            f"{function}: config is {config!r}; allowed: a configuration's name, or None"
        )
    if config not in config_names(kind):
        raise ValueError(
            f"{function}: config is {config!r}; allowed: None, {', '.join(config_names(kind))}"
        )


# --------------------------------------------------------------------------------------------------
# Tables: device kind -> product -> (configuration, microseconds)
# --------------------------------------------------------------------------------------------------

_Table = dict[str, dict[Product, tuple[str, float]]]


def _fail(path: Path, message: str):
    raise ValueError(f"{path}: {message}")


def _read(path: Path) -> _Table:
    try:
        content = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: no JSON ({error})") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        _fail(path, f'no table of configurations; allowed: an object with "format": {FORMAT}')
    table: _Table = {}
    for device, entries in content["devices"].items():
        products = table.setdefault(device, {})
        for entry in entries:
            fields = dict(entry)
            try:
                config, microseconds = fields.pop("config"), float(fields.pop("microseconds"))
                product = Product(**fields)
            except (KeyError, TypeError, ValueError) as error:
                raise ValueError(f"{path}: {entry} is no entry ({error})") from error
            if config not in product.configs:
                _fail(
                    path,
                    f"{entry} names a configuration that this version of jaxfp8 does not have; tune the product again. "
                    f"Allowed: {', '.join(product.configs)}",
                )
            products[product] = config, microseconds
    return table


def _write(path: Path, table: _Table) -> None:
    """One entry a line, in a fixed order; the file is replaced as a whole."""

    def entry(product, choice):
        fields = {
            f.name: getattr(product, f.name)
            for f in dataclasses.fields(product)
            if f.default is dataclasses.MISSING or getattr(product, f.name) != f.default
        }
        return json.dumps(fields | {"config": choice[0], "microseconds": round(choice[1], 2)})

    devices = []
    for device in sorted(table):
        lines = ",\n   ".join(entry(p, table[device][p]) for p in sorted(table[device]))
        devices.append(f"  {json.dumps(device)}: [\n   {lines}\n  ]")
    text = f'{{\n "format": {FORMAT},\n "devices": {{\n' + ",\n".join(devices) + "\n }\n}\n"
    with tempfile.NamedTemporaryFile("w", dir=path.parent, prefix=path.name, delete=False) as file:
        file.write(text)
    os.replace(file.name, path)


@functools.cache
def _tables() -> _Table:
    """What this process knows: the shipped table, under what was loaded and tuned since."""
    return _read(SHIPPED)


def _add(table: _Table) -> None:
    for device, products in table.items():
        _tables().setdefault(device, {}).update(products)


def load_tuned(path: Any) -> int:
    """Adds a table that `jaxfp8.tune` wrote to what this process chooses configurations from.

    Entries win over the shipped ones and over files loaded before. Programs that are compiled already keep theirs, so
    load before their first call.

    **Arguments:**

    - `path`: of the JSON file.

    **Returns:** how many products it holds.

    **Raises:** OSError if it cannot be read; ValueError if it is no such table or names a configuration that this
    version does not have.
    """
    table = _read(Path(path))
    _add(table)
    return sum(map(len, table.values()))


@functools.cache
def _lowering_device_kind() -> str | None:
    """The kind of this process's CUDA devices; None if it has none, as when lowering for export."""
    try:
        return jax.devices("cuda")[0].device_kind
    except RuntimeError:
        return None


_recorders: list[set[Product]] = []


def config_index(product: Product | None, kind: str, config: str | None) -> int:
    """The custom call's `config` attribute: of the given name, else of the tables, else -1 (the heuristic)."""
    if product is None:
        return -1 if config is None else config_names(kind).index(config)
    for recorder in _recorders:
        recorder.add(product)
    if config is None:
        config, _ = _tables().get(_lowering_device_kind() or "", {}).get(product, (None, 0.0))
    return -1 if config is None else product.configs.index(config)


@contextlib.contextmanager
def _recording() -> Iterator[set[Product]]:
    products: set[Product] = set()
    _recorders.append(products)
    try:
        yield products
    finally:
        _recorders.remove(products)


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
    with _recording() as products:
        if _lowering_device_kind() is None:
            traced.lower(lowering_platforms=("cuda",))
        else:
            traced.lower().compile()
    return sorted(products)


# --------------------------------------------------------------------------------------------------
# Measuring
# --------------------------------------------------------------------------------------------------

_COLD_BYTES = (
    128 << 20
)  # that a program's launches read, so that none finds its operands in L2 (50 MB on an H100)
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

    def cluster_size(config):
        return int(np.prod([int(x) for x in config.split()[-1].split("x")]))

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
        device = jax.devices("cuda")[0]
    device_sms = getattr(device, "core_count", None) or 132
    path = None if path is None else Path(path)
    table = _read(path) if path is not None and path.exists() else {}
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
        _add({device.device_kind: {product: entries[product]}})
        if path is not None:
            _write(path, table)
        if report is not None:
            report(product, best, seconds)
    return choices
