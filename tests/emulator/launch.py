"""Launching a kernel: parameters, grid, report."""

from __future__ import annotations

import functools
import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from . import tensormap
from .errors import CONTINUABLE, DoubleWrite, EmulatorError, LaunchError, Race
from .machine import REGISTER_FILE, Cluster, Warp
from .memory import Memory, Region
from .order import Grid
from .parser import Kernel, Module
from .program import Program
from .scheduler import Policy, Scheduler
from .shared import FIRST, POISON
from .tensormap import TensorMap

_MAX_CLUSTER = 16
_MAX_THREADS = 1024


@dataclass
class Report:
    """What a launch did.

    Attributes:
        instructions: warp instructions executed.
        wgmma: wgmma instructions executed, one for each of a warpgroup.
        mma: mma.sync instructions executed, one for each warp.
        products: multiplications of two elements by wgmma and mma.sync.
        generic_bytes_loaded, generic_bytes_stored: global memory through ld (and cp.async), st.
        tma_bytes_loaded, tma_bytes_stored: global memory through bulk copies. A box counts whole.
        shared_bytes: the highest byte of shared memory touched by any CTA, past the system's KiB.
        covered_lines: PTX lines of the instructions executed by at least one warp.
        lines: PTX lines of all instructions of the kernel.
        opcodes: how many warps executed each opcode.
        findings: what was found and did not end the run, one for each place (`launch`'s stop_at).
        finished: did the kernel run to its end?
    """

    instructions: int = 0
    wgmma: int = 0
    mma: int = 0
    products: int = 0
    generic_bytes_loaded: int = 0
    generic_bytes_stored: int = 0
    tma_bytes_loaded: int = 0
    tma_bytes_stored: int = 0
    shared_bytes: int = 0
    covered_lines: frozenset[int] = field(default=frozenset(), repr=False)
    lines: frozenset[int] = field(default=frozenset(), repr=False)
    opcodes: Counter[str] = field(default_factory=Counter, repr=False)
    findings: list[EmulatorError] = field(default_factory=list)
    finished: bool = True

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
        stop_at: str = "warning",
        poison: int = POISON,
        perturbs: bool = False,
    ):
        if stop_at not in ("warning", "error", "nothing"):
            raise LaunchError(f"stop_at is {stop_at!r}; allowed are 'warning', 'error', 'nothing'")
        self.stop_at, self.poison = stop_at, poison
        self.perturbs = perturbs  # gives values to reads that a finding is about
        # Reads that nothing orders before a write, by cluster, CTA, agent and granule: their clocks.
        self.overwritten: dict[tuple[int, int, int, int], tuple[int, int]] = {}
        self._clusters = 0
        # Where dependents may start early, what this launch reads is kept for them (order.py).
        self.number = len(memory.order.grids)
        self.logs_reads = check_races and any(
            i.opcode == "griddepcontrol.launch_dependents" for i in program.instructions
        )
        self._by_place: dict[tuple, EmulatorError] = {}
        self.program, self.memory = program, memory
        self.grid, self.block, self.cluster = grid, block, cluster
        self.dynamic_smem, self.check_races = dynamic_smem, check_races
        self.threads = block[0] * block[1] * block[2]
        self.policy = Policy(seed)
        self.report = Report()
        self.executed = [0] * len(program.nodes)  # by node: how many warps
        self._check_shape()
        memory.order.grids.append(Grid(int(np.prod(grid))))
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
        try:
            for x, y, z in origins:
                blocks = [
                    (x + i, y + j, z + k) for k in range(cz) for j in range(cy) for i in range(cx)
                ]
                cluster = Cluster(self, blocks)
                top = FIRST
                try:
                    Scheduler(cluster).run()
                finally:
                    top = max(top, *(cta.shared.top for cta in cluster.ctas))
                    self.report.shared_bytes = max(self.report.shared_bytes, top - FIRST)
        finally:
            self._count()
        return self.report

    def _count(self):
        """Adds up what was executed."""
        instructions = self.program.instructions
        self.report.lines = frozenset(i.line for i in instructions)
        self.report.covered_lines = frozenset(
            instructions[i].line
            for node, count in zip(self.program.nodes, self.executed, strict=True)
            for i in range(node.first, node.first + node.count)
            if count
        )
        for node, count in zip(self.program.nodes, self.executed, strict=True):
            if count:
                for i in range(node.first, node.first + node.count):
                    self.report.opcodes[instructions[i].opcode] += count

    def new_ordinal(self) -> int:
        """A cluster's number in the order of execution."""
        self._clusters += 1
        return self._clusters

    def found(self, error: EmulatorError) -> bool:
        """Keeps a finding that does not end the run; False for one that does."""
        if self.stop_at == "warning" or not isinstance(error, CONTINUABLE):
            return False
        # Whether the value that was read is used is known at the end only.
        if self.stop_at == "error" and error.severity == "error" and not error.of_a_value:
            return False
        other = error.other and error.other.rsplit(", ", 1)[-1]
        first = self._by_place.setdefault((type(error), error.line, other), error)
        if first is error:
            self.report.findings.append(error)
        else:
            first.count += 1
        return True

    # --- global memory between CTAs ---

    def block_of(self, linear: int) -> tuple[int, int, int]:
        gx, gy, _ = self.grid
        return linear % gx, linear // gx % gy, linear // gx // gy

    def check_overlap(self, warp: Warp, row: int, region: Region, readers: np.ndarray):
        """A store over what earlier launches, by their numbers, may still read."""
        if not self.check_races:
            return
        order, cluster = warp.cluster.order, warp.cluster
        for number in np.unique(readers).tolist():
            if (
                number
                and number <= self.number
                and not order.knows_launch(cluster, row, number - 1)
            ):
                cluster.fault(
                    Race,
                    f"a store to {region}, which an earlier launch may still read: "
                    "griddepcontrol.wait is missing",
                    actor=f"{warp.name} of block {warp.cta.block_index}",
                    section=_GRID_RULE,
                )
                return

    def check_readers(
        self, warp: Warp, row: int, region: Region, stamps: np.ndarray, strong: bool = False
    ):
        """A read of bytes that another cluster stored, and nothing orders after it, is a race."""
        order, cluster = warp.cluster.order, warp.cluster
        foreign = stamps[order.foreign(cluster, stamps)]
        if not foreign.size:
            return
        for stamp, why in order.unordered(cluster, row, foreign, strong):
            actor = f"{warp.name} of block {warp.cta.block_index}"
            if order.in_earlier_launch(stamp):
                cluster.fault(
                    Race,
                    f"a read of {region} where an earlier launch stored: griddepcontrol.wait is "
                    "missing",
                    actor=actor,
                    other=f"CTA {stamp.linear} of that launch",
                    section=_GRID_RULE,
                )
                return
            cluster.fault(
                Race,
                f"a read of {region} where another CTA stored: {_WHY[why]}",
                actor=actor,
                other=f"block {self.block_of(stamp.linear)}",
                severity="warning" if why == "no acquire" else None,
                section="Memory Consistency Model: Release and Acquire Patterns",
            )
            return

    def check_overwrite(self, warp: Warp, row: int, region: Region, columns, previous, strong):
        """A store over bytes that another CTA stored in this launch."""
        if not self.check_races:
            return
        order, cluster = warp.cluster.order, warp.cluster
        for number in np.unique(previous).tolist():
            stamp = order.stamps[number]
            if stamp.cluster == cluster.id:
                ordered = warp.cta.synchronized
            elif stamp.strong:
                ordered = strong or order.knows(
                    cluster, row, stamp, "acquired", "released", "observed"
                )
            else:
                ordered = order.knows(cluster, row, stamp, "acquired")
            if not ordered:
                offset = int(columns[previous == number][0])
                earlier = order.in_earlier_launch(stamp)
                who = "an earlier launch" if earlier else "another CTA"
                other = f"CTA {stamp.linear}" if earlier else f"block {self.block_of(stamp.linear)}"
                cluster.fault(
                    DoubleWrite,
                    f"a store to {region} at byte {offset}, which {who} stored"
                    + (": griddepcontrol.wait is missing" if earlier else " in this launch"),
                    actor=f"{warp.name} of block {warp.cta.block_index}",
                    other=other,
                    offset=region.base + offset,
                    section=_GRID_RULE if earlier else None,
                )
                return


_GRID_RULE = "Parallel Synchronization and Communication Instructions: griddepcontrol"
_WHY = {
    "race": "nothing orders the read after the store",
    "no release": "the reader has seen a later write of that CTA, which released nothing",
    "no acquire": "the reader has seen a later write of that CTA, and acquired nothing",
}


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
    stop_at: str = "warning",
    programmatic: bool = False,
    memory: Memory | None = None,
) -> Report:
    """Executes a kernel. See the package's docstring.

    stop_at: the first finding that is raised: any ("warning"), an "error", or "nothing", where the
    report holds all of them. Then a read, of what nothing has written or of what nothing orders, is a
    warning if its value reaches no result: if a second run, with other values for these, stores the
    same.

    programmatic: this launch may overlap the one before it in `memory`, as one with the attribute
    cudaLaunchAttributeProgrammaticStreamSerialization: only `griddepcontrol.wait` orders them.

    Raises:
        EmulatorError: the launch is impossible, or the kernel has a fault.
    """
    text = _text(ptx)
    program = _program(hashlib.sha256(text.encode()).digest(), text, entry)
    memory = _memory_of(args) if memory is None else memory
    if not programmatic:
        memory.forget_stores()
    shape = (_triple(grid, "grid"), _triple(block, "block"), _triple(cluster, "cluster"))
    start = functools.partial(Launch, program, memory, *shape, int(dynamic_smem), args, seed)
    running = start(check_races, stop_at)
    before = memory.snapshot() if stop_at != "warning" else None
    report = running.report
    with np.errstate(all="ignore"):
        try:
            running.run()
        except EmulatorError as error:
            if stop_at != "nothing" or isinstance(error, LaunchError):
                raise
            report.findings.append(error)
            report.finished = False
        unwritten = [f for f in report.findings if f.of_a_value]
        if unwritten and report.finished and before is not None:
            again = start(check_races, "nothing", poison=_OTHER_POISON, perturbs=True)
            again.overwritten = running.overwritten
            used = _depends_on_poison(again, before)
            for finding in unwritten:
                finding.severity = "error" if used else "warning"
            if used and stop_at == "error":
                raise unwritten[0]
    return report


_OTHER_POISON = 0x3C


def _depends_on_poison(again: Launch, before: list[np.ndarray]) -> bool:
    """Does a second run, with other values for the reads found, store something else?"""
    memory = again.memory
    results = memory.snapshot()
    memory.restore(before)
    try:
        again.run()
        return any(
            not np.array_equal(a, b) for a, b in zip(results, memory.snapshot(), strict=False)
        )
    except EmulatorError:
        return True
    finally:
        memory.restore(results)


def _memory_of(args: Sequence[Any]) -> Memory:
    """The memory that the tensor maps name, or a new one."""
    found = {
        id(a.memory): a.memory for a in args if isinstance(a, TensorMap) and a.memory is not None
    }
    if len(found) > 1:
        raise LaunchError("the tensor maps belong to different memories")
    return next(iter(found.values()), None) or Memory()


__all__ = ["Launch", "Report", "kernel", "launch", "module", "tensormap"]
