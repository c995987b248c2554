"""Reading programs: what a jaxpr or an HLO module computes, holds and moves; and comparing their values.

The kernels can be made opaque: every leaf is then an unknown custom call, as on a GPU, so that replication shows in the
operand shapes of the calls. Opaque programs are compiled, never run.
"""

import collections
import contextlib
import ctypes
import functools
import math
import pathlib
import re
import tempfile
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import jaxprs_in_params

import jaxfp8.kernels.grouped_gemm  # noqa: F401 (with gemm, every product registers its leaf)
from jaxfp8._primitives.leaf import LEAVES
from tests import oracle
from tests.leaf_lowering import leaves_lower_to

# ------------------------------------------------------------------------------------------------
# Values
# ------------------------------------------------------------------------------------------------


def assert_close(got, want, tolerance):
    """Every leaf of `got` is finite and within `tolerance` (norm-wise, relative) of the same leaf of `want`."""
    got, want = jax.tree.leaves(got), jax.tree.leaves(want)
    assert len(got) == len(want)
    errors = [oracle.error(a, b) for a, b in zip(got, want, strict=True)]
    assert all(e <= tolerance for e in errors), f"relative errors {errors}; allowed: {tolerance}"


def assert_same_bits(got, want):
    """Every leaf of `got` has the dtype and the bits of the same leaf of `want`."""
    got, want = jax.tree.leaves(got), jax.tree.leaves(want)
    assert len(got) == len(want)
    for a, b in zip(map(np.asarray, got), map(np.asarray, want), strict=True):
        assert (a.dtype, a.shape) == (b.dtype, b.shape)
        assert np.ascontiguousarray(a).tobytes() == np.ascontiguousarray(b).tobytes()


def train(f):
    """y, dx and dw of f(x, w) for a given dy."""

    def run(x, w, dy):
        y, pull = jax.vjp(f, x, w)
        return y, *pull(dy)

    return run


# ------------------------------------------------------------------------------------------------
# Jaxprs
# ------------------------------------------------------------------------------------------------


def walk(jaxpr):
    """Every equation, those of inner jaxprs included."""
    for eqn in getattr(jaxpr, "jaxpr", jaxpr).eqns:
        yield eqn
        for inner in jaxprs_in_params(eqn.params):
            yield from walk(inner)


def count(jaxpr, *leaves):
    """How often the program calls the kernels with these names."""
    primitives = [LEAVES[f"jaxfp8_{name}_leaf"].primitive for name in leaves]
    return sum(eqn.primitive in primitives for eqn in walk(jaxpr))


def products(jaxpr):
    """How many products the program has, each a kernel call on a GPU."""
    return count(
        jaxpr, "gemm_1d2d", "gemm_1d1d", "grouped_gemm", "masked_grouped_gemm", "grouped_wgrad_gemm"
    )


def has_loop(jaxpr):
    return any(eqn.primitive.name in ("scan", "while") for eqn in walk(jaxpr))


def largest(jaxpr):
    """Elements of the largest array that the program makes."""
    return max(math.prod(v.aval.shape) for eqn in walk(jaxpr) for v in eqn.outvars)


def rounded_to_fewer_bits(jaxpr):
    """The dtypes on which the program has a reduce_precision."""
    return {
        e.invars[0].aval.dtype.name for e in walk(jaxpr) if e.primitive.name == "reduce_precision"
    }


# ------------------------------------------------------------------------------------------------
# HLO
# ------------------------------------------------------------------------------------------------


def largest_in_hlo(text):
    """Elements of the largest array in an HLO module."""
    shapes = re.findall(r"\b[a-z]\w*\[([\d,]+)\]", text)
    return max(math.prod(map(int, s.split(","))) for s in shapes)


def collectives(hlo, least=0):
    """What moves between devices, as {"all-gather fp8": 2}; arrays of up to `least` elements (scales) aside."""
    pattern = (
        r"= \(?(\w+)\[([\d,]*)\]\S*.*? "
        r"(all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute)(?:-start)?\("
    )
    found = collections.Counter()
    for dtype, shape, kind in re.findall(pattern, hlo):
        if math.prod(int(n) for n in shape.split(",") if n) > least:
            fp8 = dtype in ("f16", "u8", "f8e4m3fn", "f8e5m2")  # XLA:CPU moves FP8 as f16
            found[f"{kind} {'fp8' if fp8 else dtype}"] += 1
    return dict(found)


BYTES = {
    "pred": 1, "u8": 1, "s8": 1, "f8e4m3fn": 1, "f8e5m2": 1, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4,
}  # fmt: skip


class Moved(NamedTuple):
    """A collective: its kind, the dtype that moves, and the elements of its result on one device.

    XLA:CPU moves bfloat16 as float32, and FP8 as float16; bytes and integers as they are.
    """

    kind: str
    dtype: str
    elements: int

    @property
    def bytes(self) -> int:
        return self.elements * BYTES[self.dtype]


def traffic(hlo):
    """Every collective of an HLO module, those in loops once."""
    kinds = "all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute"
    found = []
    for result, kind in re.findall(rf"= (\(?\w+\[.*?) ({kinds})(?:-start)?\(", hlo):
        parts = re.findall(r"\b(\w+)\[([\d,]*)\]", result)
        sizes = [math.prod(int(n) for n in shape.split(",") if n) for _, shape in parts]
        found.append(Moved(kind, parts[0][0], sum(sizes)))
    return found


def stated_dtypes(lowered, kind):
    """The dtypes that the program asks a kind of collective ("all_gather") to move, before XLA widens any."""
    found = re.findall(rf"stablehlo\.{kind}\W.*-> tensor<(?:\d+x)*(\w+)>", lowered.as_text())
    return set(found)


STATED_BYTES = {"ui8": 1, "f8E4M3FN": 1, "bf16": 2, "f32": 4, "i32": 4}


class Stated(NamedTuple):
    """A collective as the program states it: kind, dtype, elements of its result, and devices that take part."""

    kind: str
    dtype: str
    elements: int
    devices: int

    @property
    def received(self) -> float:
        """Bytes that a device receives from others."""
        return self.elements * STATED_BYTES[self.dtype] * (self.devices - 1) / self.devices


def stated(lowered):
    """The collectives that the program asks for, before XLA widens or merges any."""
    pattern = (
        r'"?stablehlo\.(all_gather|all_to_all|all_reduce|reduce_scatter|collective_permute)"?.*'
        r"tensor<\d+x(\d+)xi64>.*-> tensor<([\dx]*x)?(\w+)>"
    )
    found = []
    for kind, devices, dims, dtype in re.findall(pattern, lowered.as_text()):
        elements = math.prod(int(d) for d in dims.split("x") if d)
        found.append(Stated(kind, dtype, elements, int(devices)))
    return found


def multiply_adds(hlo):
    """Multiply-adds of the dense product calls of one device, in an opaque program."""
    total = 0
    for line in hlo.splitlines():
        if re.search(r'custom_call_target="jaxfp8_gemm_1d[12]d_leaf"', line):
            operands = re.search(r"operand_layout_constraints=\{(.*?\})\}", line)[1]
            lhs, _, rhs, _ = [
                tuple(map(int, s.split(","))) for s in re.findall(r"\w+\[([\d,]+)\]", operands)
            ][:4]
            total += rhs[0] * lhs[1] * lhs[2] * rhs[1]
    return total


# ------------------------------------------------------------------------------------------------
# Opaque kernels
# ------------------------------------------------------------------------------------------------


def _custom_call_capsule():
    """A target that XLA:CPU accepts at compile time; nothing here runs it."""
    new = ctypes.pythonapi.PyCapsule_New
    new.restype, new.argtypes = (
        ctypes.py_object,
        [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p],
    )
    return new(ctypes.cast(_never_run, ctypes.c_void_p), b"xla._CUSTOM_CALL_TARGET", None)


_never_run = ctypes.CFUNCTYPE(None)(lambda: None)


@functools.cache
def _opaque(name):
    """The lowering of a leaf to an unknown custom call."""
    jax.ffi.register_ffi_target(name, _custom_call_capsule(), platform="cpu", api_version=0)
    call = jax.ffi.ffi_lowering(name, api_version=2)
    return lambda ctx, *operands, **params: call(ctx, *operands)


def opaque_kernels():
    return leaves_lower_to(lambda name, leaf: _opaque(name))


def partitioned_text(lowered):
    """One device's program as the partitioner leaves it: XLA:CPU widens FP8 collectives to f16 only later."""
    with tempfile.TemporaryDirectory() as directory:
        options = {"xla_dump_to": directory, "xla_dump_hlo_pass_re": "spmd-partitioning"}
        lowered.compile(compiler_options=options)
        (dump,) = pathlib.Path(directory).glob("*after_spmd-partitioning*.txt")
        return dump.read_text()


def compile_opaque(f, *arguments, mesh=None, out_shardings=None):
    """The program for `(shape, sharding)` or `(shape, sharding, dtype)` arguments, with opaque kernels."""
    with opaque_kernels():  # the partitioner lowers a shard's kernels when the program is compiled
        return lower_opaque(f, *arguments, mesh=mesh, out_shardings=out_shardings).compile()


def lower_opaque(f, *arguments, mesh=None, out_shardings=None):
    """As `compile_opaque`, before XLA sees it."""
    ambient = contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh)
    with opaque_kernels(), ambient:
        arrays = [
            jax.ShapeDtypeStruct(shape, *(dtype or [jnp.float32]), sharding=sharding)
            for shape, sharding, *dtype in arguments
        ]
        out = {} if out_shardings is None else {"out_shardings": out_shardings}
        return jax.jit(f, **out).lower(*arrays)
