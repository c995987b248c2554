"""Compiles a JAX program for any number of Hopper GPUs on a machine that has none, and reads what XLA made of it.

    pip install -e '.[test,compiled]'                       # JAX's CUDA plugin: no CUDA libraries, no driver
    python -m tests.compiled FILE.py --devices 64 --hosts 8 # FILE defines program(mesh) -> (function, arguments)

XLA:GPU's own passes run: partitioning, fusion, pipelining of collectives, scheduling. What comes out is what the GPUs
would run, but for what autotuning chooses (it needs a device and is off). It says nothing of time.
"""

from __future__ import annotations

import argparse
import collections
import functools
import importlib.util
import math
import os
import pathlib
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

os.environ.setdefault("CUDA_VISIBLE_DEVICES", "-1")
os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")  # no cuDNN, no cuBLAS here

import jax
import numpy as np
from jax.experimental import topologies
from jax.extend.core import Literal, jaxprs_in_params

from jaxfp8._ffi import target
from jaxfp8._primitives.leaf import LEAVES

H200 = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152
  shared_memory_per_core: 233472 shared_memory_per_block_optin: 232448 threads_per_core_limit: 2048
  core_count: 132 fpus_per_core: 128 block_dim_limit_x: 2147483647 block_dim_limit_y: 65535
  block_dim_limit_z: 65535 memory_bandwidth: 4800000000000 l2_cache_size: 52428800
  clock_rate_ghz: 1.98 device_memory_size: 150000000000 registers_per_core_limit: 65536
  registers_per_block_limit: 65536 cuda_compute_capability { major: 9 }
}
platform_name: "CUDA" dnn_version_info { major: 9 minor: 10 }
runtime_version { major: 13 minor: 0 patch: 0 } device_description_str: "NVIDIA H200"
"""
"""xla.gpu's GpuTargetConfigProto, as XLA describes an H200."""


@functools.cache
def devices(count: int, hosts: int = 1) -> tuple[Any, ...]:
    """`count` H200s on `hosts` hosts: NVLink within one, InfiniBand between them."""
    shape = f"1x{hosts}x{count // hosts}"
    found = topologies.get_topology_desc(platform="cuda", target_config=H200, topology=shape)
    return tuple(found.devices)


def mesh(shape: dict[str, int], hosts: int = 1, axis_types: Any = None) -> jax.sharding.Mesh:
    found = np.array(devices(math.prod(shape.values()), hosts)).reshape(*shape.values())
    return jax.sharding.Mesh(found, tuple(shape), axis_types=axis_types)


def compile_for(function: Any, *args: Any, **options: Any) -> Program:
    """The optimized program of a jitted function; `args` are abstract, with shardings of devices that are not here."""
    compiled = function.lower(*args).compile(
        compiler_options={"xla_gpu_autotune_level": 0, **options}
    )
    return Program(compiled.as_text(), compiled.memory_analysis().temp_size_in_bytes)


# ---- The text of a program

ELEMENT_BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s64": 8, "u64": 8, "f64": 8}


class Array(NamedTuple):
    dtype: str
    dims: tuple[int, ...]

    @property
    def bytes(self) -> int:
        each = 1 if self.dtype.startswith("f8") else ELEMENT_BYTES.get(self.dtype, 4)
        return each * math.prod(self.dims)

    def __str__(self) -> str:
        return f"{self.dtype}[{','.join(map(str, self.dims))}]"


def arrays_in(text: str) -> tuple[Array, ...]:
    found = re.findall(r"\b([a-z]+\d*\w*)\[([\d,]*)\]", text)
    return tuple(Array(t, tuple(int(n) for n in d.split(",") if n)) for t, d in found)


class Instruction(NamedTuple):
    name: str
    opcode: str
    results: tuple[Array, ...]
    operands: tuple[str, ...]
    attributes: str

    @property
    def called(self) -> list[str]:
        """Computations that run when this instruction does, but for loops' conditions."""
        names = re.findall(r"(?:calls|to_apply|body)=%([^,\s}]+)", self.attributes)
        branches = re.search(r"branch_computations={([^}]*)}", self.attributes)
        return names + re.findall(r"%([^,\s]+)", branches[1] if branches else "")

    @property
    def target(self) -> str | None:
        found = re.search(r'custom_call_target="([^"]+)"', self.attributes)
        return found[1] if found else None


def bracketed(text: str, end: str) -> str:
    """The start of `text` up to the first `end` outside of parentheses."""
    depth = 0
    for at, c in enumerate(text):
        if c == end and depth == 0:
            return text[:at]
        depth += (c == "(") - (c == ")")
    return text


def parse_instruction(line: str) -> Instruction | None:
    found = re.match(r"\s+(?:ROOT )?%(\S+) = ", line)
    if not found:
        return None
    rest = line[found.end() :]
    result = bracketed(rest, " ")  # a tuple's type has spaces
    opcode, _, rest = rest[len(result) + 1 :].partition("(")
    operands = bracketed(rest, ")")
    names = re.findall(r"%([^\s,()]+)", operands)
    return Instruction(found[1], opcode, arrays_in(result), tuple(names), rest[len(operands) :])


# ---- What is read from it

COLLECTIVES = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "ragged-all-to-all",
    "all-to-all",
    "collective-permute",
)


class Collective(NamedTuple):
    kind: str
    arrays: tuple[Array, ...]  # what it gives
    devices: int  # that take part in one
    times: int  # how often it runs in one call: the trip counts of the loops around it
    in_loop: bool
    beside: (
        tuple[str, ...] | None
    )  # calls and dots between its start and its done; None: it has no start
    scope: str = ""  # the operation of the traced function for which it runs

    @property
    def moved(self) -> int:
        """Bytes that a device receives each time, in a ring (or directly, in an all-to-all)."""
        size, n = sum(a.bytes for a in self.arrays), self.devices
        if self.kind == "reduce-scatter":
            return size * (n - 1)
        if self.kind == "collective-permute":
            return size
        return size * (n - 1) // n * (2 if self.kind == "all-reduce" else 1)

    @property
    def products(self) -> tuple[str, ...]:
        """The products that hide it."""
        return tuple(n for n in self.beside or () if is_product(n))


def is_product(name: str) -> bool:
    return "gemm" in name or name.startswith(("dot", "__cublas"))


class Program:
    """An optimized program."""

    def __init__(self, text: str, temporary_bytes: int = 0):
        self.text, self.temporary_bytes = text, temporary_bytes
        self.computations: dict[str, list[Instruction]] = {}
        self.entry = ""
        for part in re.split(r"\n}\n", text):
            head = re.search(r"^(ENTRY )?%(\S+) \(.*{$", part, re.M)
            if head:
                lines = map(parse_instruction, part[head.end() :].splitlines())
                self.computations[head[2]] = [i for i in lines if i is not None]
                self.entry = head[2] if head[1] else self.entry

    def scheduled(self) -> Iterator[tuple[int, bool, list[Instruction]]]:
        """Times a call, whether in a loop, and instructions: of the entry, of loops' bodies and of branches."""
        todo = [(self.entry, 1, False)]
        while todo:
            name, times, loop = todo.pop()
            body = self.computations[name]
            yield times, loop, body
            for i in body:
                if i.opcode in ("while", "call", "conditional"):
                    trips = re.search(r'"known_trip_count":{"n":"(\d+)"', i.attributes)
                    inner = times * (int(trips[1]) if trips else 1)
                    todo += [(c, inner, loop or i.opcode == "while") for c in i.called]

    def inside(self, instruction: Instruction) -> Iterator[Instruction]:
        """The instruction, or what the fusion or asynchronous computation that it stands for consists of."""
        if instruction.opcode in ("fusion", "async-start", "fusion-start"):
            for name in instruction.called:
                for i in self.computations[name]:
                    yield from self.inside(i)
        else:
            yield instruction

    def work(self, instruction: Instruction) -> list[str]:
        """Targets of its custom calls, and its dots."""
        if "gemm_fusion" in instruction.attributes:
            return ["gemm_fusion"]
        found = []
        for i in self.inside(instruction):
            if i.opcode == "custom-call" and i.target:
                found.append(i.target)
            elif i.opcode == "dot":
                found.append("dot")
        return found

    def calls(self, prefix: str = "jaxfp8_") -> collections.Counter[str]:
        """How often each custom call runs in one call of the program."""
        found: collections.Counter[str] = collections.Counter()
        for times, _, body in self.scheduled():
            for i in body:
                for name in self.work(i):
                    if name.startswith(prefix):
                        found[name] += times
        return found

    def copies(self, least: int = 1 << 20) -> list[tuple[int, bool, str, Array]]:
        """What moves `least` bytes or more and computes nothing: times a call, asynchronous, opcode, what is moved."""
        moving = {"copy", "dynamic-slice", "dynamic-update-slice", "transpose", "concatenate"}
        free = {"parameter", "bitcast", "get-tuple-element", "tuple", "constant"}
        found = []
        for times, _, body in self.scheduled():
            for i in body:
                parts = [p for p in self.inside(i) if p.opcode not in free and p.results[0].dims]
                if not parts or any(p.opcode not in moving for p in parts):
                    continue
                for p in parts:
                    moved = p.results[0]
                    if p.opcode == "dynamic-update-slice":
                        moved = self._result(i, p.operands[1]) or moved
                    if moved.bytes >= least:
                        found.append((times, i.opcode.endswith("-start"), p.opcode, moved))
        return found

    def _result(self, within: Instruction, name: str) -> Array | None:
        for body in self.computations.values():
            for i in body:
                if i.name == name:
                    return i.results[0] if i.results else None
        return None

    def collectives(self) -> list[Collective]:
        """In the order of the schedule."""
        found = []
        for times, loop, body in self.scheduled():
            for at, i in enumerate(body):
                kind = i.opcode.removesuffix("-start")
                if kind in COLLECTIVES:
                    start = i.opcode.endswith("-start")
                    arrays = i.results
                    if start and kind != "all-reduce" and len(arrays) > 1:  # (operands, results)
                        arrays = arrays[len(arrays) // 2 :]
                    beside = tuple(self._until_done(body[at + 1 :], i)) if start else None
                    devices = group_size(i.attributes)
                    scope = re.search(r'op_name="([^"]*)"', i.attributes)
                    found.append(
                        Collective(
                            kind, arrays, devices, times, loop, beside, scope[1] if scope else ""
                        )
                    )
        return found

    def wide_gathers(self, least: int = 1 << 20) -> list[tuple[Array, str]]:
        """What is gathered wider than FP8, from `least` bytes on, and the operation for which it is."""
        found = []
        for c in self.collectives():
            if c.kind in ("all-gather", "all-to-all"):
                found += [
                    (a, c.scope)
                    for a in c.arrays
                    if a.bytes >= least and a.bytes > math.prod(a.dims)
                ]
        return found

    def _until_done(self, later: list[Instruction], start: Instruction) -> Iterator[str]:
        for i in later:
            if i.opcode.endswith("-done") and start.name in i.operands:
                return
            yield from self.work(i)

    def describe(self) -> str:
        rows = [f"{n:5} {name}" for name, n in sorted(self.calls("").items())]
        rows.append("copies: times a call, a: asynchronous, what, MB")
        merged: collections.Counter[Any] = collections.Counter()
        for times, beside, opcode, moved in self.copies():
            merged[moved.bytes, "a" if beside else "", opcode, str(moved)] += times
        for (size, *what), times in sorted(merged.items(), reverse=True):
            rows.append("{:5} {:1} {:22} {:36} {:9.2f}".format(times, *what, size / 1e6))
        rows.append("collectives: times a call, L: in a loop, devices, result, MB each, beside it")
        merged.clear()
        for c in self.collectives():
            arrays = ", ".join(map(str, c.arrays[:3])) + (" ..." if len(c.arrays) > 3 else "")
            beside = ", ".join(sorted(set(c.products))) or "NOTHING"
            where = "L" if c.in_loop else ""
            merged[c.moved, where, c.devices, c.kind, arrays, beside] += c.times
        for (moved, *what, beside), times in sorted(merged.items(), reverse=True):
            line = "{:5} {:1} {:3} {:18} {:44} {:9.2f} {}"
            rows.append(line.format(times, *what, moved / 1e6, beside))
        if wide := self.wide_gathers():
            rows.append("gathered wider than FP8: what, MB, for which operation")
            rows += [f"      {a!s:44} {a.bytes / 1e6:9.2f} {scope}" for a, scope in wide]
        rows.append(f"temporary memory {self.temporary_bytes / 2**20:.1f} MiB a device")
        return "\n".join(rows)


def group_size(attributes: str) -> int:
    """Devices of one group of a collective: of `{{0,1},{2,3}}`, `[groups,size]<=[...]` or `mesh['x'=8,'y'=4] {'x'}`."""
    if found := re.search(r"replica_groups=mesh\[(.*?)\] {(.*?)}", attributes):
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", found[1]))
        axes = re.findall(r"'(\w+)'(?::\(\d+\)(\d+))?", found[2])  # or a part of an axis
        return math.prod(int(part or sizes[axis]) for axis, part in axes)
    if found := re.search(r"replica_groups=\[\d+,(\d+)\]", attributes):
        return int(found[1])
    if found := re.search(r"replica_groups={{([\d,]*)}", attributes):
        return len(found[1].split(","))
    return 2  # pairs of a permutation


# ---- What a traced function asks for


def expected_calls(closed: Any) -> collections.Counter[str]:
    """The custom calls of a traced function, as often as its loops run them; equal ones of equal operands are one."""
    found: collections.Counter[str] = collections.Counter()
    _Body(found, 1).run(closed.jaxpr, range(len(closed.jaxpr.invars)))
    return found


class _Body:
    """A function, or the body of a loop: the values that its equations compute, each once, as XLA merges them."""

    def __init__(self, found: collections.Counter[str], times: int):
        self.found, self.times = found, times
        self.values: dict[Any, int] = {}

    def run(self, jaxpr: Any, operands: Any) -> list[Any]:
        env = dict(zip(jaxpr.invars, operands, strict=True))
        env |= {v: (id(jaxpr), i) for i, v in enumerate(jaxpr.constvars)}

        def read(v):
            return (str(v.val), str(v.aval)) if isinstance(v, Literal) else env[v]

        for eqn in live_equations(jaxpr):
            outs = self.equation(eqn, tuple(map(read, eqn.invars)))
            env |= dict(zip(eqn.outvars, outs, strict=True))
        return [read(v) for v in jaxpr.outvars]

    def equation(self, eqn: Any, operands: tuple[Any, ...]) -> list[Any]:
        name, params = eqn.primitive.name, eqn.params
        inner = list(jaxprs_in_params(params))
        if name in ("scan", "while", "cond"):
            for body in inner:
                times = self.times * params.get("length", 1)
                _Body(self.found, times).run(body, range(len(body.invars)))
        elif inner:
            return self.run(next(j for j in inner if len(j.invars) == len(operands)), operands)
        key = name, str(sorted(params.items())), operands
        new = key not in self.values
        value = self.values.setdefault(key, len(self.values))
        if new and name in LEAVES and LEAVES[name].custom_call is not None:
            self.found[target(name.removeprefix("jaxfp8_").removesuffix("_leaf"))] += self.times
        return [("value", value, i) for i in range(len(eqn.outvars))]


def live_equations(jaxpr: Any) -> list[Any]:
    """Those that the results need, in order."""
    needed = {v for v in jaxpr.outvars if not isinstance(v, Literal)}
    kept = []
    for eqn in reversed(jaxpr.eqns):
        if needed.intersection(eqn.outvars):
            kept.append(eqn)
            needed.update(v for v in eqn.invars if not isinstance(v, Literal))
    return kept[::-1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("file", type=pathlib.Path)
    parser.add_argument("--devices", type=int, default=8)
    parser.add_argument("--hosts", type=int, default=1)
    parser.add_argument("--axis", default="data")
    parser.add_argument("--save", type=pathlib.Path, help="write the optimized program here")
    parser.add_argument("--option", action="append", default=[], metavar="NAME=VALUE")
    arguments = parser.parse_args()
    spec = importlib.util.spec_from_file_location("program", arguments.file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    function, args = module.program(mesh({arguments.axis: arguments.devices}, arguments.hosts))
    bools = {"true": True, "false": False}
    options = (o.split("=", 1) for o in arguments.option)
    found = compile_for(function, *args, **{k: bools.get(v, v) for k, v in options})
    if arguments.save:
        arguments.save.write_text(found.text)
    print(found.describe())


if __name__ == "__main__":
    main()
