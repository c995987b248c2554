"""A fuzzer of shardings: every operation, forward and gradient, on random meshes with random shardings of everything.

    python -m tests.fuzz_sharding --cases 2000 --seed 0             # eight CPU devices, against one
    python -m tests.fuzz_sharding --cases 300 --compiled            # the same cases compiled for eight H200s

A mesh has 1 to 8 devices in up to three axes, each automatic, explicit or manual. Arguments are stored in their shape
or in one that is reshaped to it, cut by a random spec; in the program arguments, results and reshapes of results are
constrained to others, which need not divide. Each case must give one device's numbers, or an error of ours that names
a function. A case is given again by `--only SEED:NUMBER`.
"""

from __future__ import annotations

import argparse
import collections
import functools
import json
import math
import os
import random
import re
import sys
import time
import traceback
from dataclasses import dataclass
from typing import Any

if __name__ == "__main__":  # before JAX starts; under pytest, conftest does it
    from tests.optimization import QUICK_FLAGS

    os.environ.setdefault("XLA_FLAGS", f"--xla_force_host_platform_device_count=8 {QUICK_FLAGS}")

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxfp8
from tests import oracle
from tests.public_functions import DIFFERENTIABLE, FUNCTIONS, Function

SIZES = (
    {"m": 1024, "k": 256, "n": 256, "f": 1024, "g": 3, "b": 4, "c": 2, "2": 2},
    {"m": 256, "k": 512, "n": 128, "f": 256, "g": 3, "b": 2, "c": 2, "2": 2},
    {"m": 40, "k": 128, "n": 72, "f": 128, "g": 3, "b": 3, "c": 2, "2": 2},
    {"m": 96, "k": 384, "n": 200, "f": 96, "g": 3, "b": 8, "c": 2, "2": 2},
    {"m": 24, "k": 1000, "n": 24, "f": 384, "g": 3, "b": 1, "c": 2, "2": 2},
)
"""Of each dimension: blocks for all devices, for some, none; what 8, 4 or 2 divide and what they don't."""


def _per_example(x, w, _):
    return jax.vmap(lambda row: jaxfp8.linear(row, w))(x)


def _attention(x, w, _):
    heads = w.reshape(w.shape[0], -1, 8)
    return jaxfp8.einsum("bmk,khd->bmhd", x, heads)


def _scanned(x, w, _):
    spec = jax.typeof(w).sharding.spec
    if spec and spec[0] is not None:  # JAX scans over no axis that is cut by its type
        w = jax.sharding.reshard(w, P(None, *spec[1:]))
    y = lax.scan(lambda c, w: (c, jaxfp8.linear(x, w)), 0, w)[1]
    return y


OPERATIONS: dict[str, tuple[Function, tuple[str, ...]]] = {
    **{
        name: (FUNCTIONS[name], ("mk", "kn"))
        for name in ("linear", "linear, prequantized", "einsum", "dot_general", "autocast", "gemm")
    },
    "linear, per example": (Function(_per_example, ()), ("mk", "kn")),
    "linear in scan": (Function(_scanned, ""), ("mk", "bkn")),
    "einsum of heads": (Function(_attention, ""), ("bmk", "kn")),
    "einsum of a batch": (
        Function(lambda x, w, _: jaxfp8.einsum("bmk,bkn->bmn", x, w), ""),
        ("bmk", "bkn"),
    ),
    "linear, vmapped": (
        Function(lambda x, w, _: jax.vmap(jaxfp8.linear)(x, w), ""),
        ("bmk", "bkn"),
    ),
    "mlp": (FUNCTIONS["mlp"], ("mk", "k2f", "fn")),
    "mlp without a gate": (FUNCTIONS["mlp"], ("mk", "kf", "fn")),
    "mlp of a batch": (FUNCTIONS["mlp"], ("bmk", "k2f", "fn")),
    "ragged_dot": (FUNCTIONS["ragged_dot"], ("mk", "gkn")),
    "ragged_mlp": (FUNCTIONS["ragged_mlp"], ("mk", "gk2f", "gfn")),
    "dispatch and combine": (FUNCTIONS["dispatch and combine"], ("mk", "mc")),
    "moe": (FUNCTIONS["moe"], ("mk", "mc", "gk2f", "gfn")),
    **{
        name: (FUNCTIONS[name], ("mk",))
        for name in ("quantize", "quantize_both", "quantize_both, groups", "quantize_weight")
    },
    "wgrad_gemm": (FUNCTIONS["wgrad_gemm"], ("mk", "mn")),
    "grouped_gemm": (FUNCTIONS["grouped_gemm"], ("mk", "gkn")),
    "masked_grouped_gemm": (FUNCTIONS["masked_grouped_gemm"], ("mk", "gkn")),
    "grouped_wgrad_gemm": (FUNCTIONS["grouped_wgrad_gemm"], ("mk", "mn")),
}
"""Function and the dimensions of its arrays."""

TWINS = {
    "linear, per example": lambda x, w, _: jax.vmap(lambda row: jnp.dot(row, w))(x),
    "linear, vmapped": lambda x, w, _: jax.vmap(jnp.dot)(x, w),
    "autocast": lambda x, w, _: jnp.tanh(x @ w),
}
"""What explicit axes refuse of JAX's own product: an unmapped operand that is cut over a mapped axis, or a sum over
shards whose result has no sharding given."""

QUANTIZED = tuple(n for n in FUNCTIONS if n not in DIFFERENTIABLE)
REQUANTIZED = ("mlp", "moe", "ragged_mlp", "dispatch", "autocast")
"""What quantizes results of sums, where another order may flip a rounding to FP8."""

Spec = tuple[tuple[str, ...], ...]


@dataclass(frozen=True)
class Array:
    """An argument: its shape, the shape in which it is stored, the specs of what is stored and of it in the program."""

    shape: tuple[int, ...]
    stored: tuple[int, ...]
    spec: Spec
    constraint: Spec | None


@dataclass(frozen=True)
class Case:
    operation: str
    sizes: int  # of SIZES
    dtype: str
    axes: tuple[tuple[str, int, str], ...]  # name, devices, "auto", "explicit" or "manual"
    manual_dims: tuple[tuple[str, str], ...]  # manual axis -> dimension that it cuts
    arrays: tuple[Array, ...]
    outs: tuple[int, ...]  # seeds of the results' specs

    @property
    def differentiable(self) -> bool:
        return self.operation not in QUANTIZED


# ---- Drawing


def _axes(rng: random.Random) -> tuple[tuple[str, int, str], ...]:
    devices = rng.choice((1, 2, 3, 4, 6, 8, 8, 8))
    sizes = []
    for _ in range(rng.choice((0, 1, 2))):
        divisors = [d for d in range(1, devices + 1) if devices % d == 0]
        sizes.append(rng.choice(divisors))
        devices //= sizes[-1]
    sizes.append(devices)
    kinds = rng.choice(
        (("auto",), ("explicit",), ("auto", "explicit"), ("auto", "explicit", "manual"))
    )
    return tuple((n, s, rng.choice(kinds)) for n, s in zip("pqr", sizes, strict=False))


def draw_spec(rng: random.Random, shape, axes: dict[str, int], *, divide: bool) -> Spec:
    """Each axis on some dimension, or none; `divide`: only where shards are even."""
    spec: list[tuple[str, ...]] = [()] * len(shape)
    for name in rng.sample(sorted(axes), len(axes)):
        if not shape or rng.random() < 0.3:
            continue
        at = rng.randrange(len(shape))
        shards = math.prod(axes[a] for a in spec[at]) * axes[name]
        if not divide or shape[at] % shards == 0:
            spec[at] = (*spec[at], name)
    return tuple(spec)


def _stored(rng: random.Random, shape: tuple[int, ...]) -> tuple[int, ...]:
    """A shape that is reshaped to this one: two dimensions merged, one split, or the same."""
    at = rng.randrange(len(shape))
    how = rng.choice(("same", "same", "merge", "split"))
    if how == "merge" and at + 1 < len(shape):
        return (*shape[:at], shape[at] * shape[at + 1], *shape[at + 2 :])
    if how == "split":
        for part in rng.sample((2, 4, 8), 3):
            if shape[at] % part == 0:
                parts = (part, shape[at] // part)[:: rng.choice((1, -1))]
                return (*shape[:at], *parts, *shape[at + 1 :])
    return shape


def draw(seed: int, number: int) -> Case:
    rng = random.Random(f"{seed}:{number}")
    operation = rng.choice(sorted(OPERATIONS))
    _, all_dims = OPERATIONS[operation]
    at = rng.randrange(len(SIZES))
    sizes, axes = SIZES[at], _axes(rng)
    free = {n: s for n, s, kind in axes if kind != "manual"}
    automatic = {n: s for n, s, kind in axes if kind == "auto"}
    manual_dims, left = [], dict(sizes)
    result = "n" if operation.startswith(("linear", "einsum")) else ""
    for name, size, kind in axes:
        if kind == "manual":  # a shard of whole blocks, so that it has the whole's numbers
            dims = [d for d in result if left[d] % (128 * size) == 0]
            dims += [d for d in "b" if all(d in a for a in all_dims) and left[d] % size == 0]
            if dims and rng.random() < 0.8:
                manual_dims.append((name, rng.choice(dims)))
                left[manual_dims[-1][1]] //= size
    arrays = []
    for dims in all_dims:
        shape = tuple(sizes[d] for d in dims)
        stored = _stored(rng, shape)
        constraint = draw_spec(rng, shape, automatic, divide=rng.random() < 0.5)
        spec = draw_spec(rng, stored, free, divide=True)
        arrays.append(Array(shape, stored, spec, rng.choice((None, None, constraint))))
    dtype = rng.choice(("float32", "float32", "bfloat16"))
    outs = tuple(rng.randrange(1 << 30) for _ in range(8))
    return Case(operation, at, dtype, axes, tuple(manual_dims), tuple(arrays), outs)


# ---- One case as a program


def _index(case: Case):
    function, _ = OPERATIONS[case.operation]
    sizes = SIZES[case.sizes]
    m, g, c = sizes["m"], sizes["g"], sizes["c"]
    if function.index == "sizes":
        return np.array([m // 2, 0, m - m // 2 - 3], np.int32)
    if function.index == "expert":
        return (np.arange(m * c).reshape(m, c) * 7 % g).astype(np.int32)
    return None


@functools.cache
def values(case_sizes: int, operation: str, dtype: str) -> tuple[np.ndarray, ...]:
    rng = np.random.default_rng(case_sizes)
    sizes = SIZES[case_sizes]
    shapes = [tuple(sizes[d] for d in dims) for dims in OPERATIONS[operation][1]]
    return tuple(np.asarray(jnp.asarray(rng.standard_normal(s), dtype)) for s in shapes)


def _cotangent(y):
    """Of no symmetry, and without a random stream in the program."""
    i = lax.broadcasted_iota(jnp.float32, (y.size,), 0).reshape(y.shape)
    return jnp.sin(i * 0.7).astype(y.dtype)


def _entry(axes):
    return axes[0] if len(axes) == 1 else (axes or None)


def to_spec(spec: Spec) -> P:
    return P(*map(_entry, spec))


def program(case: Case, mesh=None, *, twin: bool = False):
    """A function of the stored arrays; without a mesh, of one device. `twin`: of JAX's own product."""
    function, all_dims = OPERATIONS[case.operation]
    index = _index(case)
    operation = TWINS[case.operation] if twin else function.call

    def call(*arrays):
        return operation(*arrays, index)

    manual = {n for n, _, kind in case.axes if kind == "manual"}
    if mesh is not None and manual:
        call = _manual(case, call, all_dims, manual, mesh)

    def run(*stored):
        arrays = [
            _constrain(s.reshape(a.shape), a.constraint, mesh)
            for s, a in zip(stored, case.arrays, strict=True)
        ]
        if not case.differentiable:
            results = [call(*arrays)]
        else:
            y, pull = jax.vjp(call, *arrays)
            dy = _cotangent(y)
            if mesh is not None and AxisType.Explicit in mesh.axis_types:
                dy = jax.sharding.reshard(dy, jax.typeof(y).sharding)
            results = [y, *pull(dy)]
        return [_result(r, i, case, mesh) for i, r in enumerate(results)]

    return run


def _manual(case: Case, call, all_dims, manual: set[str], mesh):
    def of(dims) -> P:
        cut = [tuple(a for a, d in case.manual_dims if d == name) for name in dims]
        return P(*map(_entry, cut))

    rank = len(
        jax.eval_shape(
            call, *(jax.ShapeDtypeStruct(a.shape, jnp.float32) for a in case.arrays)
        ).shape
    )
    out = {
        "einsum of heads": "bm",
        "linear": "mn",
        "linear, prequantized": "mn",
        "linear, per example": "mn",
        "linear in scan": "bmn",
        "einsum": "mn",
        "einsum of a batch": "bmn",
        "linear, vmapped": "bmn",
    }.get(case.operation, "")
    out_spec = of(out)
    if case.operation == "einsum of heads":
        out_spec = P(*of("bmn")) if out else P()
    assert len(out_spec) <= rank
    return jax.shard_map(
        call, mesh=mesh, in_specs=tuple(map(of, all_dims)), out_specs=out_spec, axis_names=manual
    )


def _constrain(x, spec: Spec | None, mesh):
    """On automatic axes, evenly or not."""
    if mesh is None or spec is None or not any(spec):
        return x
    if AxisType.Explicit in mesh.axis_types or not x.size:
        return x
    return lax.with_sharding_constraint(x, NamedSharding(mesh, to_spec(spec)))


def _result(y, position: int, case: Case, mesh):
    """The result, or a reshape of it, constrained."""
    rng = random.Random(case.outs[position])
    if mesh is None or rng.random() < 0.3:
        return y
    automatic = {n: s for n, s, kind in case.axes if kind == "auto"}
    shape = _stored(rng, y.shape)
    spec = draw_spec(rng, shape, automatic, divide=rng.random() < 0.5)
    if AxisType.Explicit in mesh.axis_types:
        return y
    return _constrain(y.reshape(shape), spec, mesh).reshape(y.shape)


# ---- Judging


TYPES = {"auto": AxisType.Auto, "explicit": AxisType.Explicit, "manual": AxisType.Auto}
OURS = re.compile(rf"^({'|'.join(map(re.escape, jaxfp8.__all__))}): ")


def mesh_of(case: Case, devices) -> jax.sharding.Mesh:
    sizes = [s for _, s, _ in case.axes]
    found = np.array(devices[: math.prod(sizes)]).reshape(sizes)
    names = tuple(n for n, _, _ in case.axes)
    return jax.sharding.Mesh(found, names, axis_types=tuple(TYPES[k] for _, _, k in case.axes))


@functools.cache
def expected(sizes: int, operation: str, dtype: str):
    case = next(
        c
        for c in (draw(0, n) for n in range(100_000))
        if (c.sizes, c.operation, c.dtype) == (sizes, operation, dtype)
    )
    arrays = [
        v.reshape(a.stored)
        for v, a in zip(values(sizes, operation, dtype), case.arrays, strict=True)
    ]
    return [np.asarray(r, np.float32) for r in jax.jit(program(case))(*arrays)]


def placed(case: Case, mesh) -> list[Any]:
    """Stored shape and sharding of each argument; on explicit axes a reshape that JAX itself refuses is not made."""
    found = []
    for a in case.arrays:
        stored, spec = a.stored, a.spec
        sharding = NamedSharding(mesh, to_spec(spec))
        if AxisType.Explicit in mesh.axis_types:
            try:
                struct = jax.ShapeDtypeStruct(stored, jnp.float32, sharding=sharding)
                jax.eval_shape(lambda x, a=a: x.reshape(a.shape), struct)
            except Exception as error:
                assert "reshape" in str(error), error
                stored, sharding = a.shape, NamedSharding(mesh, P())
        found.append((stored, sharding))
    return found


def tolerance(case: Case, dtype) -> float:
    """Of a result of this dtype, norm-wise: products of quantized arrays give bfloat16."""
    if "bfloat16" in (case.dtype, dtype.name):
        return 3e-2
    return 5e-3 if case.operation.startswith(REQUANTIZED) else 1e-5


def _twin_is_refused(case: Case, mesh, compiled: bool) -> bool:
    with jax.set_mesh(mesh):
        arrays = (
            jax.ShapeDtypeStruct(s, jnp.dtype(case.dtype), sharding=w)
            for s, w in placed(case, mesh)
        )
        try:
            jax.jit(program(case, mesh, twin=True)).lower(*arrays)
        except Exception:  # by whatever class, private ones among them
            return True
        return False


def judge(case: Case, devices, *, compiled: bool) -> str:
    """The outcome: "equal", "compiled" or "refused".

    Raises:
        AssertionError: numbers that are not one device's, or an error that is not ours.
    """
    mesh = mesh_of(case, devices)
    try:
        with jax.set_mesh(mesh):
            stored = placed(case, mesh)
            f = jax.jit(program(case, mesh))
            if compiled:
                from tests.compiled import compile_for

                dtype = jnp.dtype(case.dtype)
                compile_for(f, *(jax.ShapeDtypeStruct(s, dtype, sharding=w) for s, w in stored))
                return "compiled"
            arrays = values(case.sizes, case.operation, case.dtype)
            got = f(
                *(jax.device_put(v.reshape(s), w) for v, (s, w) in zip(arrays, stored, strict=True))
            )
    except Exception as error:
        if OURS.match(str(error)) and isinstance(error, (TypeError, ValueError)):
            return "refused"
        if case.operation in TWINS and _twin_is_refused(case, mesh, compiled):
            return "refused by JAX, jnp.dot too"
        text = "".join(traceback.format_exception(error)[-6:])
        raise AssertionError(
            f"a stranger's error: {type(error).__name__}: {error}\n{text}"
        ) from error
    want = expected(case.sizes, case.operation, case.dtype)
    for i, (a, b) in enumerate(zip(got, want, strict=True)):
        error = oracle.error(np.asarray(a, np.float32), b)
        assert error <= tolerance(case, a.dtype), f"result {i} is off by {error:.2e}"
    return "equal"


def run(
    seed: int, cases: int, *, first: int = 0, compiled: bool = False, keep_going: bool = False
) -> dict[str, Any]:
    """Judges cases `first` to `first + cases`; counts by outcome, operation and kinds of axes.

    Raises:
        AssertionError: names the case. With `keep_going`, faults are printed and counted.
    """
    if compiled:
        from tests.compiled import devices as gpus

        devices = gpus(8)
    else:
        devices = jax.devices("cpu")
    outcomes: collections.Counter[str] = collections.Counter()
    operations: collections.Counter[str] = collections.Counter()
    kinds: collections.Counter[str] = collections.Counter()
    faults = []
    start = time.monotonic()
    for number in range(first, first + cases):
        case = draw(seed, number)
        try:
            outcome = judge(case, devices, compiled=compiled)
        except AssertionError as error:
            message = f"{seed}:{number}: {error}\n{case}"
            if not keep_going:
                raise AssertionError(message) from error
            print(message, file=sys.stderr, flush=True)
            faults.append(f"{seed}:{number}")
            outcome = "fault"
        outcomes[outcome] += 1
        operations[case.operation] += 1
        kinds[" ".join(sorted({k for _, _, k in case.axes}))] += 1
        if keep_going and number % 50 == 49:
            print(number + 1 - first, dict(outcomes), file=sys.stderr, flush=True)
        if number % 200 == 199:
            jax.clear_caches()
    return {
        "seed": seed,
        "cases": sum(outcomes.values()),
        "seconds": round(time.monotonic() - start, 1),
        "outcomes": dict(outcomes),
        "cases_by_axes": dict(sorted(kinds.items())),
        "cases_by_operation": dict(sorted(operations.items())),
        "faults": faults,
    }


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--cases", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="number of the first case")
    parser.add_argument("--compiled", action="store_true", help="compile for eight H200s")
    parser.add_argument("--only", metavar="SEED:NUMBER", help="judge one case again")
    args = parser.parse_args(argv)
    if args.only:
        seed, number = map(int, args.only.split(":"))
        print(draw(seed, number))
        print(json.dumps(run(seed, 1, first=number, compiled=args.compiled), indent=1))
        return 0
    found = run(args.seed, args.cases, first=args.first, compiled=args.compiled, keep_going=True)
    print(json.dumps(found, indent=1))
    return 1 if found["faults"] else 0


if __name__ == "__main__":
    sys.exit(main())
