"""The state of a running cluster: CTAs, warps, registers, agents and their clocks."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from .clocks import WARP, LaneClocks
from .errors import EmulatorError, LaunchError
from .program import Program
from .shared import FIRST, MAX_BYTES, SharedMemory

if TYPE_CHECKING:
    from .barriers import ClusterBarrier, NamedBarrier
    from .bulk import BulkStore
    from .cpasync import CopyGroup
    from .launch import Launch
    from .mbarrier import MBarrier
    from .order import Import
    from .unit import Unit
    from .wgmma import WarpgroupQueue

_MBARRIERS_PER_CTA = 128
REGISTER_FILE = 65536  # 32-bit registers of an SM


class Warp(LaneClocks):
    """One warp: where it is, which of its lanes run, and what it waits for."""

    def __init__(self, cta: Cta, number: int, index: int):
        self.cta, self.number = cta, number
        self.low, self.high = 32 * number, 32 * number + 32
        self.name = f"cta{cta.rank} warp{number}"
        # Control flow. `mask` None means all lanes; `stack` holds (node, mask, join) to resume.
        self.node = 0
        self.mask: np.ndarray | None = None
        self.join: int | None = None
        self.stack: list[tuple[int, np.ndarray | None, int | None]] = []
        self.alive = np.ones(32, bool)
        self.done = False
        self.blocked: Any = None
        self.priority = 0
        self.last_run = 0
        self.unit: Unit | None = None
        # A failed try_wait: (node, number of special instructions before it); see mbarrier.py.
        self.last_poll: tuple[int, int] | None = None
        self.specials = 0
        self.poll_expired = False
        # Registers of wgmma in flight, and those touched since the last wgmma.fence (bit sets).
        self.accumulators = 0
        self.fragments = 0
        self.touched = -1
        self.wgmma_issued = 0
        self.wgmma_groups = 0
        self.wgmma_open: list[tuple[int, int, int, str]] = []
        # Bulk stores: closed groups, the open group, groups committed so far.
        self.bulk_groups: list[tuple[int, list[BulkStore]]] = []
        self.bulk_open: list[BulkStore] = []
        self.bulk_committed = 0
        # Non-bulk cp.async.
        self.copies: CopyGroup | None = None
        # Set by the barrier that released the warp: its clocks, and the votes of bar.red.
        self.barrier_token: tuple[np.ndarray, np.ndarray] | None = None
        self.barrier_votes: np.ndarray | None = None
        self.cluster_arrival = 0
        self.cluster_passed = 0
        self.registers = 0
        self.tensor_maps: dict[int, int] = {}  # address: version acquired by a fence
        self._start_clocks(cta.cluster, index)

    @property
    def cluster(self) -> Cluster:
        return self.cta.cluster


class Warpgroup:
    """Four consecutive warps, which issue wgmma together."""

    def __init__(self, cta: Cta, warps: list[Warp], agent: int):
        from .wgmma import WarpgroupQueue

        self.cta, self.warps, self.agent = cta, warps, agent
        self.unit: Unit | None = None
        self.queue: WarpgroupQueue = WarpgroupQueue(self)


class Cta:
    """A CTA: registers of all its threads, shared and local memory, barriers."""

    def __init__(self, cluster: Cluster, rank: int, block_index: tuple[int, int, int]):
        launch, program = cluster.launch, cluster.program
        self.cluster, self.rank, self.block_index = cluster, rank, block_index
        grid = launch.grid
        self.linear = block_index[0] + grid[0] * (block_index[1] + grid[1] * block_index[2])
        self.threads = launch.threads
        self.symbols: dict[str, int] = dict(launch.symbols)
        end = _place_shared(program, self.symbols, launch.dynamic_smem)
        local_bytes = _place_local(program, self.symbols)
        self.local = np.full((self.threads, local_bytes), 0xFF, np.uint8)
        self.shared = SharedMemory(cluster, rank, end, program.granule)
        self.mbarriers: dict[int, MBarrier] = {}
        self.named_barriers: dict[int, NamedBarrier] = {}
        self.unit: Unit | None = None
        self._special = self._special_registers(end)
        self.registers = program.take_registers(self.threads)
        self.registers.reset(self)
        self.exited = False
        # A fence at gpu scope was executed: stores over those of its cluster's other CTAs may be
        # ordered.
        self.synchronized = False
        warps = self.threads // 32
        self.warps = [Warp(self, i, rank * warps + i) for i in range(warps)]
        first = cluster.first_wgmma + rank * -(-warps // 4)
        self.warpgroups = [
            Warpgroup(self, self.warps[i : i + 4], first + i // 4) for i in range(0, warps, 4)
        ]
        per_thread = launch.registers_per_thread
        self.free_registers = REGISTER_FILE - per_thread * self.threads
        for warp in self.warps:
            warp.registers = per_thread
        self.register_waiters: list[Warp] = []

    @property
    def name(self) -> str:
        return f"cta{self.rank} (block {self.block_index})"

    def group_of(self, warp: Warp) -> Warpgroup:
        return self.warpgroups[warp.number // 4]

    def special_register(self, name: str) -> Any:
        """The value of a special register: a number, or one for each thread."""
        if name not in self._special:
            raise LaunchError(f"special register %{name} is not known")
        return self._special[name]

    def _special_registers(self, end: int) -> dict[str, Any]:
        launch, cluster = self.cluster.launch, self.cluster
        tid = np.arange(self.threads, dtype=np.uint32)
        bx, by, _ = launch.block
        lane = tid % 32
        bit = np.uint32(1) << lane
        result: dict[str, Any] = {
            "tid.x": tid % bx,
            "tid.y": tid // bx % by,
            "tid.z": tid // bx // by,
            "laneid": lane,
            "warpid": tid // 32,
            "nwarpid": self.threads // 32,
            "lanemask_eq": bit,
            "lanemask_lt": bit - np.uint32(1),
            "lanemask_le": bit | (bit - np.uint32(1)),
            "lanemask_gt": ~(bit | (bit - np.uint32(1))),
            "lanemask_ge": ~(bit - np.uint32(1)),
            "cluster_ctarank": self.rank,
            "cluster_nctarank": cluster.size,
            "is_explicit_cluster": 1,
            "smid": self.linear % 132,
            "nsmid": 132,
            "gridid": 1,
            "dynamic_smem_size": launch.dynamic_smem,
            "total_smem_size": end,
        }
        for axis, name in enumerate("xyz"):
            result[f"ntid.{name}"] = launch.block[axis]
            result[f"ctaid.{name}"] = self.block_index[axis]
            result[f"nctaid.{name}"] = launch.grid[axis]
            result[f"cluster_nctaid.{name}"] = launch.cluster[axis]
            result[f"cluster_ctaid.{name}"] = self.block_index[axis] % launch.cluster[axis]
            result[f"clusterid.{name}"] = self.block_index[axis] // launch.cluster[axis]
            result[f"nclusterid.{name}"] = launch.grid[axis] // launch.cluster[axis]
        return result


def _place_shared(program: Program, symbols: dict[str, int], dynamic: int) -> int:
    """Gives every shared variable an offset; dynamic shared memory comes last."""
    offset, external = FIRST, []
    for variable in program.variables.values():
        if variable.space != "shared":
            continue
        if variable.external or not variable.size:
            external.append(variable)
            continue
        offset = -(-offset // variable.align) * variable.align
        symbols[variable.name] = offset
        offset += variable.size
    for variable in external:
        offset = -(-offset // variable.align) * variable.align
        symbols[variable.name] = offset
    end = offset + dynamic
    if end - FIRST > MAX_BYTES:
        raise LaunchError(f"{end - FIRST} bytes of shared memory exceed {MAX_BYTES}")
    return end


def _place_local(program: Program, symbols: dict[str, int]) -> int:
    offset = 0
    for variable in program.variables.values():
        if variable.space != "local":
            continue
        offset = -(-offset // variable.align) * variable.align
        symbols[variable.name] = offset
        offset += variable.size
    return max(16, -(-offset // 16) * 16)


class Cluster:
    """A cluster of CTAs, its agents and their vector clocks.

    Agents, in the order of their numbers: the warps; one for the wgmma of each warpgroup; one for
    the bulk stores of each warp; one for the accesses of a warp that a single lane makes (these
    four read shared memory); one for the cp.async of each warp; one for each mbarrier (the copies
    that complete on it); "nobody yet" and "an mbarrier object". The clock of a warp, and of its
    single lanes, counts its releases; of wgmma and bulk stores, their groups; of an mbarrier, its
    phases.

    A release by some lanes, such as an arrival at an mbarrier by an elected lane, covers what these
    did before it, but what others of the warp did only up to where all lanes met last (clocks.py).
    """

    def __init__(self, launch: Launch, blocks: list[tuple[int, int, int]]):
        from .barriers import ClusterBarrier

        self.launch, self.program, self.memory = launch, launch.program, launch.memory
        self.policy, self.check_races = launch.policy, launch.check_races
        self.random: random.Random = launch.policy.random
        self.report = launch.report
        # Between clusters (order.py).
        self.order = launch.memory.order
        self.id = self.order.new_cluster()
        self.ordinal = launch.new_ordinal()
        self.imports: list[Import] = []
        self.size = len(blocks)
        self.warps_per_cta = launch.threads // 32
        groups = -(-self.warps_per_cta // 4)
        warps = self.size * self.warps_per_cta
        self.first_wgmma = warps
        self.first_bulk = warps + groups * self.size
        self.first_single = self.first_bulk + warps
        self.readers = self.first_single + warps
        self.first_copy = self.readers
        self.first_mbarrier = self.first_copy + warps
        self.uninitialized = self.first_mbarrier + _MBARRIERS_PER_CTA * self.size
        self.barrier_object = self.uninitialized + 1
        self.agents = self.barrier_object + 1
        self._mbarrier_count = 0
        self._mbarrier_names: dict[int, str] = {}
        # A row for each warp, and for each lane that knows more than its warp (clocks.py).
        self.first_lane_row = warps
        self.seen = np.zeros((warps * (1 + WARP), self.agents), np.int32)
        self.proxied = np.zeros((warps * (1 + WARP), self.agents), np.int32)
        every = np.arange(warps)
        self.seen[every, every] = self.seen[every, self.first_single + every] = 1
        self._epochs = 0
        self.at = 0  # index of the instruction being executed
        self.steps = 0
        self.progress = 0  # counts events that may unblock a warp
        self.loads: list[Callable[[], None]] = []  # asynchronous copies into shared memory
        self.map_versions: dict[int, list] = {}  # tensor maps edited in global memory
        self.barrier: ClusterBarrier = ClusterBarrier(self)
        self.ctas = [Cta(self, rank, block) for rank, block in enumerate(blocks)]
        self.warps = [warp for cta in self.ctas for warp in cta.warps]

    def new_epoch(self) -> int:
        """A number for a stretch of a warp's life between two synchronisations of its lanes."""
        self._epochs += 1
        return self._epochs

    def new_mbarrier_agent(self, name: str) -> int:
        agent = self.first_mbarrier + self._mbarrier_count
        if agent >= self.uninitialized:
            raise LaunchError(f"more than {_MBARRIERS_PER_CTA} mbarriers in a CTA")
        self._mbarrier_count += 1
        self._mbarrier_names[agent] = name
        return agent

    def warp_of_row(self, row: int) -> str:
        """The warp whose clocks a row holds, for messages."""
        if row >= self.first_lane_row:
            row = (row - self.first_lane_row) // WARP
        return self.agent(row)

    def agent(self, number: int) -> str:
        """An agent's name, for messages."""
        if number < self.first_wgmma:
            return f"cta{number // self.warps_per_cta} warp{number % self.warps_per_cta}"
        if number < self.first_bulk:
            groups = -(-self.warps_per_cta // 4)
            number -= self.first_wgmma
            return f"wgmma of cta{number // groups} warpgroup{number % groups}"
        if number < self.first_single:
            return f"bulk store of {self.agent(number - self.first_bulk)}"
        if number < self.readers:
            return self.agent(number - self.first_single)
        if number < self.first_mbarrier:
            return f"cp.async of {self.agent(number - self.first_copy)}"
        return f"asynchronous copy on {self._mbarrier_names.get(number, '?')}"

    def site(self, at: int) -> str:
        """An instruction, for messages. Atomics are kept as -1 - index."""
        instruction = self.program.instructions[at if at >= 0 else -1 - at]
        return f"PTX line {instruction.line}: {instruction.text}"

    def fault(
        self,
        kind: type[EmulatorError],
        message: str,
        *,
        actor: str | None = None,
        other: str | None = None,
        offset: int | None = None,
        at: int | None = None,
        severity: str | None = None,
        section: str | None = None,
        goes_on: bool = True,
        of_a_value: bool = False,
    ):
        """A finding at the instruction being executed (or at instruction `at`).

        It is raised, unless the launch only collects it (`Launch.found`) and the caller can go on.
        """
        index = self.at if at is None else at
        place: dict[str, Any] = {}
        if index < len(self.program.instructions):
            instruction = self.program.instructions[index]
            place = {
                "line": instruction.line,
                "instruction": instruction.text,
                "source": instruction.source,
            }
        error = kind(
            message, actor=actor, other=other, offset=offset, severity=severity, section=section,
            of_a_value=of_a_value, **place,
        )  # fmt: skip
        if not goes_on or not self.launch.found(error):
            raise error
