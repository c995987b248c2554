"""Launching a kernel: parameters, grid, report."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from . import tensormap
from .errors import LaunchError, Race
from .machine import REGISTER_FILE, Cluster
from .memory import Memory, Region
from .parser import Kernel, Module
from .program import Program
from .scheduler import Policy, Scheduler
from .tensormap import TensorMap

_MAX_CLUSTER = 16
_MAX_THREADS = 1024


@dataclass
class Report:
    """What a launch did.

    Attributes:
        instructions: warp instructions executed.
        wgmma: wgmma instructions executed, one for each of a warpgroup.
        generic_bytes_loaded, generic_bytes_stored: global memory through ld (and cp.async), st.
        tma_bytes_loaded, tma_bytes_stored: global memory through bulk copies. A box counts whole.
        shared_bytes: the highest byte of shared memory touched by any CTA, past the system's KiB.
        covered_lines: PTX lines of the instructions executed by at least one warp.
        lines: PTX lines of all instructions of the kernel.
    """

    instructions: int = 0
    wgmma: int = 0
    generic_bytes_loaded: int = 0
    generic_bytes_stored: int = 0
    tma_bytes_loaded: int = 0
    tma_bytes_stored: int = 0
    shared_bytes: int = 0
    covered_lines: frozenset[int] = field(default=frozenset(), repr=False)
    lines: frozenset[int] = field(default=frozenset(), repr=False)

    @property
    def bytes_read(self) -> int:
        return self.generic_bytes_loaded + self.tma_bytes_loaded

    @property
    def bytes_written(self) -> int:
        return self.generic_bytes_stored + self.tma_bytes_stored


@functools.lru_cache(maxsize=256)
def _module(digest: bytes, text: str) -> Module:
    del digest
    return Module(text)


@functools.lru_cache(maxsize=256)
def _program(digest: bytes, text: str, entry: str) -> Program:
    return Program(_module(digest, text).kernel(entry))


def _text(ptx: str | bytes | Path) -> str:
    if isinstance(ptx, Path):
        return ptx.read_text()
    if isinstance(ptx, bytes):
        return ptx.rstrip(b"\0").decode()
    return ptx


def module(ptx: str | bytes | Path) -> Module:
    """The parsed PTX; one object for each content, kept for the life of the process."""
    text = _text(ptx)
    return _module(hashlib.sha256(text.encode()).digest(), text)


def kernel(ptx: str | bytes | Path, entry: str) -> Kernel:
    """A kernel's parameters, directives and instructions."""
    return module(ptx).kernel(entry)


class Launch:
    """One kernel launch."""

    def __init__(
        self,
        program: Program,
        memory: Memory,
        grid: tuple[int, int, int],
        block: tuple[int, int, int],
        cluster: tuple[int, int, int],
        dynamic_smem: int,
        args: Sequence[Any],
        seed: int,
        check_races: bool,
    ):
        self.program, self.memory = program, memory
        self.grid, self.block, self.cluster = grid, block, cluster
        self.dynamic_smem, self.check_races = dynamic_smem, check_races
        self.threads = block[0] * block[1] * block[2]
        self.policy = Policy(seed)
        self.report = Report()
        self.covered: set[int] = set()
        self._check_shape()
        self.registers_per_thread = self._registers_per_thread()
        self.symbols = self._module_variables()
        self.parameter_block = self._parameters(args)

    def _check_shape(self):
        kernel = self.program.kernel
        if min(self.grid + self.block + self.cluster) < 1:
            raise LaunchError("grid, block and cluster sizes must be positive")
        if self.threads % 32 or self.threads > _MAX_THREADS:
            raise LaunchError(f"{self.threads} threads: not a multiple of 32 up to {_MAX_THREADS}")
        size = self.cluster[0] * self.cluster[1] * self.cluster[2]
        if size > _MAX_CLUSTER:
            raise LaunchError(f"a cluster of {size} CTAs; at most {_MAX_CLUSTER}")
        for axis in range(3):
            if self.grid[axis] % self.cluster[axis]:
                raise LaunchError(f"grid {self.grid} is no multiple of cluster {self.cluster}")
        limit = kernel.directives.get("maxntid")
        if limit and self.threads > int(np.prod(limit)):
            raise LaunchError(f"{self.threads} threads exceed .maxntid {limit}")
        exact = kernel.directives.get("reqntid")
        if exact and (*exact, 1, 1)[:3] != self.block:
            raise LaunchError(f"block {self.block} is not .reqntid {exact}")
        required = kernel.directives.get("reqnctapercluster")
        if required and (*required, 1, 1)[:3] != self.cluster:
            raise LaunchError(f"cluster {self.cluster} is not .reqnctapercluster {required}")
        if "explicitcluster" in kernel.directives and not required and size == 1:
            raise LaunchError("the kernel needs a cluster launch (.explicitcluster)")

    def _registers_per_thread(self) -> int:
        """The registers a thread starts with.

        ptxas decides; it takes what the launch bounds leave, and no more than a setmaxnreg.inc of
        the kernel asks for.
        """
        kernel = self.program.kernel
        ctas = kernel.directives.get("minnctapersm", (1,))[0]
        if "maxnreg" in kernel.directives:
            return kernel.directives["maxnreg"][0]
        threads = int(np.prod(kernel.directives.get("maxntid", (self.threads,))))
        available = min(255, REGISTER_FILE // ctas // threads // 8 * 8)
        increases = [
            int(i.operands[0])
            for i in self.program.instructions
            if i.mods[:2] == ["setmaxnreg", "inc"]
        ]
        return min([available, *increases]) if available >= 248 else available

    def _module_variables(self) -> dict[str, int]:
        """Addresses of the variables at module scope in global and constant memory."""
        symbols = {}
        for variable in self.program.variables.values():
            if variable.space in ("global", "const"):
                data = np.zeros(variable.size, np.uint8)
                if variable.data is not None:
                    data[:] = np.frombuffer(variable.data, np.uint8)
                data.flags.writeable = variable.space == "global"
                symbols[variable.name] = self.memory.array(data, name=variable.name).base
        return symbols

    def _parameters(self, args: Sequence[Any]) -> np.ndarray:
        parameters = self.program.kernel.parameters
        if len(args) != len(parameters):
            raise LaunchError(f"{len(args)} arguments for {len(parameters)} parameters")
        block = np.zeros(self.program.parameter_bytes, np.uint8)
        for position, (parameter, arg) in enumerate(zip(parameters, args, strict=True)):
            data = self._argument(position, arg)
            if len(data) != parameter.size:
                raise LaunchError(
                    f"argument {position} has {len(data)} bytes; parameter {parameter.name} has "
                    f"{parameter.size}"
                )
            start = parameter.offset
            block[start : start + parameter.size] = np.frombuffer(data, np.uint8)
        return block

    def _argument(self, position: int, arg: Any) -> bytes:
        if isinstance(arg, TensorMap):
            return arg.encode(self.memory)
        if isinstance(arg, bytes):
            return arg
        if isinstance(arg, np.ndarray):
            region = self.memory.array(arg, name=f"argument {position} {arg.dtype}{arg.shape}")
            return region.base.to_bytes(8, "little")
        if isinstance(arg, np.generic):
            return arg.tobytes()
        raise LaunchError(
            f"argument {position} is a {type(arg).__name__}; allowed are NumPy arrays, NumPy "
            "scalars, TensorMap and bytes"
        )

    def run(self) -> Report:
        gx, gy, gz = self.grid
        cx, cy, cz = self.cluster
        origins = [
            (x, y, z) for z in range(0, gz, cz) for y in range(0, gy, cy) for x in range(0, gx, cx)
        ]
        if not self.policy.fixed:
            self.policy.random.shuffle(origins)
        top = 0
        for x, y, z in origins:
            blocks = [
                (x + i, y + j, z + k) for k in range(cz) for j in range(cy) for i in range(cx)
            ]
            cluster = Cluster(self, blocks)
            Scheduler(cluster).run()
            top = max(top, *(cta.shared.top for cta in cluster.ctas))
        self.report.shared_bytes = top - 0x400
        instructions = self.program.instructions
        self.report.lines = frozenset(i.line for i in instructions)
        self.report.covered_lines = frozenset(
            instructions[i].line
            for index in self.covered
            for node in [self.program.nodes[index]]
            for i in range(node.first, node.first + node.count)
        )
        return self.report

    # --- global memory between CTAs ---

    def block_of(self, linear: int) -> tuple[int, int, int]:
        gx, gy, _ = self.grid
        return linear % gx, linear // gx % gy, linear // gx // gy

    def _cluster_of(self, linear: int) -> tuple[int, ...]:
        return tuple(b // c for b, c in zip(self.block_of(linear), self.cluster, strict=True))

    def check_readers(self, unit, region: Region, writers: np.ndarray):
        """A read of bytes that a CTA of another cluster stored in this launch is a race."""
        if unit.cta.synchronized:
            return
        mine = unit.cta.linear + 1
        foreign = np.unique(writers[(writers != 0) & (writers != mine)])
        own = tuple(b // c for b, c in zip(unit.cta.block_index, self.cluster, strict=True))
        for writer in foreign.tolist():
            if self._cluster_of(writer - 1) != own:
                unit.cluster.fault(
                    Race,
                    f"a read of {region} where another CTA of this launch stored",
                    actor=f"{unit.name} of block {unit.cta.block_index}",
                    other=f"block {self.block_of(writer - 1)}",
                )

    def double_write(self, unit, region: Region, columns, previous, other):
        """A store over bytes that another CTA stored in this launch."""
        if unit.cta.synchronized or not self.check_races:
            return
        from .errors import DoubleWrite

        offset = int(columns[other][0])
        unit.cluster.fault(
            DoubleWrite,
            f"a store to {region} at byte {offset}, which another CTA stored in this launch",
            actor=f"{unit.name} of block {unit.cta.block_index}",
            other=f"block {self.block_of(int(previous[other][0]) - 1)}",
            offset=region.base + offset,
        )


def _triple(value, name: str) -> tuple[int, int, int]:
    sizes = (value,) if isinstance(value, (int, np.integer)) else tuple(value)
    if not 1 <= len(sizes) <= 3:
        raise LaunchError(f"{name} has {len(sizes)} sizes")
    x, y, z = (*(int(s) for s in sizes), 1, 1)[:3]
    return x, y, z


def launch(
    ptx: str | bytes | Path,
    entry: str,
    *,
    grid,
    block,
    cluster=(1, 1, 1),
    dynamic_smem: int = 0,
    args: Sequence[Any],
    seed: int = 0,
    check_races: bool = True,
    memory: Memory | None = None,
) -> Report:
    """Executes a kernel. See the package's docstring.

    Raises:
        EmulatorError: the launch is impossible, or the kernel has a fault.
    """
    text = _text(ptx)
    program = _program(hashlib.sha256(text.encode()).digest(), text, entry)
    memory = _memory_of(args) if memory is None else memory
    memory.forget_stores()
    running = Launch(
        program,
        memory,
        _triple(grid, "grid"),
        _triple(block, "block"),
        _triple(cluster, "cluster"),
        int(dynamic_smem),
        args,
        seed,
        check_races,
    )
    with np.errstate(all="ignore"):
        return running.run()


def _memory_of(args: Sequence[Any]) -> Memory:
    """The memory that the tensor maps name, or a new one."""
    found = {
        id(a.memory): a.memory for a in args if isinstance(a, TensorMap) and a.memory is not None
    }
    if len(found) > 1:
        raise LaunchError("the tensor maps belong to different memories")
    return next(iter(found.values()), None) or Memory()


__all__ = ["Launch", "Report", "kernel", "launch", "module", "tensormap"]
