"""Which configuration a kernel runs with: their names, and tables of measured choices.

A product's configuration is, in this order: the caller's `config=`; what the tables hold for exactly this product on
this kind of device; the heuristic of the native side. It is looked up while a program is lowered, so tables are loaded
before the program's first call.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import math
import os
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from .. import _ffi
from .._arrays import checks
from .._arrays.blocks import BLOCK
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


_Table = dict[str, dict[Product, tuple[str, float]]]


def _fail(path: Path, message: str):
    raise ValueError(f"{path}: {message}")


def read_table(path: Path) -> _Table:
    """The table in a file that `write_table` wrote."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # also of bytes that are no UTF-8
        raise ValueError(f"{path}: no JSON ({error})") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        _fail(path, f'no table of configurations; allowed: an object with "format": {FORMAT}')
    devices = content.get("devices")
    if not isinstance(devices, dict) or not all(isinstance(e, list) for e in devices.values()):
        _fail(path, '"devices" is no object of lists, one for each kind of device')
    return {
        device: dict(_read_entry(path, entry) for entry in entries)
        for device, entries in devices.items()
    }


def _read_entry(path: Path, entry: Any) -> tuple[Product, tuple[str, float]]:
    if not isinstance(entry, dict):
        _fail(path, f"{entry!r} is no entry; allowed: an object")
    fields = dict(entry)
    try:
        config, microseconds = fields.pop("config"), float(fields.pop("microseconds"))
        product = Product(**fields)
        known = config in product.configs
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: {entry} is no entry ({error})") from error
    if not known:
        _fail(
            path,
            f"{entry} names a configuration that this version of jaxfp8 does not have; tune the product again. "
            f"Allowed: {', '.join(product.configs)}",
        )
    if product.num_sms and cluster_size(config) > product.num_sms:
        _fail(
            path,
            f"{entry} names a configuration that runs in clusters of {cluster_size(config)} multiprocessors; "
            f"its num_sms is {product.num_sms}",
        )
    return product, (config, microseconds)


def cluster_size(config: str) -> int:
    """Multiprocessors of a cluster, by the configuration's name."""
    return math.prod(map(int, config.split()[-1].split("x")))


def write_table(path: Path, table: _Table) -> None:
    """One entry a line, in a fixed order; the file is replaced as a whole, with the mode that it had or a new file's.

    Where `path` is a symbolic link, the file that it names is replaced.
    """

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
    path = path.resolve()
    mode = stat.S_IMODE(path.stat().st_mode) if path.exists() else 0o666 & ~_umask()
    with tempfile.NamedTemporaryFile("w", dir=path.parent, prefix=path.name, delete=False) as file:
        file.write(text)
    os.chmod(file.name, mode)
    os.replace(file.name, path)


def _umask() -> int:
    """The process's; it can be read only by setting it."""
    mask = os.umask(0o077)
    os.umask(mask)
    return mask


@functools.cache
def _tables() -> _Table:
    """What this process knows: the shipped table, under what was loaded and tuned since."""
    return read_table(SHIPPED)


def add_table(table: _Table) -> None:
    """Adds entries to what this process knows."""
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
    table = read_table(Path(path))
    add_table(table)
    return sum(map(len, table.values()))


@functools.cache
def lowering_device_kind() -> str | None:
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
        config, _ = _tables().get(lowering_device_kind() or "", {}).get(product, (None, 0.0))
    return -1 if config is None else product.configs.index(config)


@contextlib.contextmanager
def recording() -> Iterator[set[Product]]:
    """The set of products that are lowered inside the block."""
    products: set[Product] = set()
    _recorders.append(products)
    try:
        yield products
    finally:
        _recorders.remove(products)
