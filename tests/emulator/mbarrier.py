"""mbarrier objects (PTX ISA 9.7.13.15).

State: the arrivals still pending in the current phase, those expected in each, and the transaction
count. A phase completes when no arrival is pending and the transaction count is zero. The count is
signed: bytes may arrive (complete_tx) before they are expected (expect_tx).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from .clocks import SCOPES, lane_bits
from .errors import (
    BarrierMisuse,
    ExitedCta,
    Misaligned,
    MissingFence,
    OutOfBounds,
    Race,
    TransactionMismatch,
    UnknownInstruction,
)
from .program import OFFSET_MASK, RANK_SHIFT, WINDOW_SHIFT
from .special import Issue, Special, register

if TYPE_CHECKING:
    from .machine import Cluster, Cta, Warp

_MAX_TRANSACTIONS = (1 << 20) - 1
_MAX_COUNT = (1 << 20) - 1


class MBarrier:
    """One mbarrier object.

    The clock of its agent counts phases over its whole life, so that a barrier that is initialised
    again does not make old copies look like new ones.
    """

    def __init__(self, cta: Cta, offset: int):
        self.cta, self.offset = cta, offset
        self.cluster: Cluster = cta.cluster
        self.name = f"mbarrier cta{cta.rank}+{offset:#x}"
        self.agent = self.cluster.new_mbarrier_agent(self.name)
        self.waiters: list[Warp] = []
        self.in_flight: list[object] = []
        self.clock = 0  # phases completed, in all lives
        self.remote_arrivals: dict[int, int] = {}  # warp of another CTA: its clock at the last
        # Warps of which only some lanes have arrived: where their lanes had met last, the lanes that
        # have arrived since, and the clock at the first of these arrivals.
        self.partly: dict[int, tuple[int, int, int]] = {}
        self.valid = False

    def initialize(self, count: int, warp: Warp):
        self.expected = self.pending = count
        self.transactions = 0
        self.phase = 0
        self.valid = True
        self.initializer = warp
        self.initialized = int(warp.seen[warp.index])
        self.initialized_round = self.cluster.barrier.round
        self.published = False  # by fence.mbarrier_init
        agents = self.cluster.agents
        self.released = np.zeros(agents, np.int32)
        self.released_proxied = np.zeros(agents, np.int32)
        self.acquired = self.released.copy()
        self.acquired_proxied = self.released.copy()
        # What arrivals of other CTAs release at cluster scope, once there is one.
        self.remote: tuple[np.ndarray, np.ndarray] | None = None
        self.acquired_in_cta = (self.acquired, self.acquired_proxied)

    def __repr__(self):
        return (
            f"{self.name} (phase {self.phase}, {self.pending} of {self.expected} arrivals "
            f"pending, {self.transactions} bytes pending)"
        )

    def release(self, seen: np.ndarray, proxied: np.ndarray, remote: bool = False):
        """What an arrival orders before the phase's completion."""
        into, into_proxied = self.released, self.released_proxied
        if remote:
            if self.remote is None:
                self.remote = (np.zeros_like(into), np.zeros_like(into))
            into, into_proxied = self.remote
        np.maximum(into, seen, out=into)
        np.maximum(into_proxied, proxied, out=into_proxied)

    def release_lanes(self, warp: Warp, mask: np.ndarray | None):
        """An arrival by some lanes of a warp, by its cumulative release."""
        remote = self.cta is not warp.cta
        self.release(*warp.released(mask), remote)
        if warp.whole(mask):
            return
        # Once every lane that did something has arrived, all that came before the first is covered.
        clock = int(warp.seen[warp.index])
        met, bits, first = self.partly.get(warp.index, (warp.synced, 0, clock))
        if met != warp.synced:
            bits, first = 0, clock
        bits |= lane_bits(mask)
        self.partly[warp.index] = (warp.synced, bits, first)
        if not (warp.acted | warp.acted_alone) & ~bits:
            into, into_proxied = self.remote if remote else (self.released, self.released_proxied)
            for agent in (warp.index, warp.single):
                into[agent] = max(int(into[agent]), first)
                if warp.proxied[agent] >= first:
                    into_proxied[agent] = max(int(into_proxied[agent]), first)

    def check_end(self, seen: np.ndarray):
        """At the end of the CTA, no arrival from another CTA may be on its way."""
        for who, clock in self.remote_arrivals.items():
            if clock > seen[who]:
                self.cluster.fault(
                    ExitedCta,
                    f"{self.cta.name} may end before an arrival at its {self.name}",
                    actor=self.cluster.agent(who),
                    other=self.name,
                )

    def arrive(self, count: int, actor: str):
        if count > self.pending:
            self.cluster.fault(
                BarrierMisuse,
                f"{count} arrivals at {self!r}: more than are pending",
                actor=actor,
                other=self.name,
            )
        self.pending -= count

    def add_transactions(self, nbytes: int, actor: str):
        self.transactions += nbytes
        if abs(self.transactions) > _MAX_TRANSACTIONS:
            self.cluster.fault(
                TransactionMismatch,
                f"the transaction count of {self!r} is out of range",
                actor=actor,
                other=self.name,
            )

    def complete_phase(self) -> bool:
        """Completes the current phase if nothing is pending."""
        if self.pending or self.transactions:
            return False
        self.phase += 1
        self.clock += 1
        self.pending = self.expected
        self.released[self.agent] = self.released_proxied[self.agent] = self.clock
        if self.in_flight:
            self.cluster.fault(
                TransactionMismatch,
                f"{self!r} completed phase {self.phase - 1} while {len(self.in_flight)} copies "
                "that signal it are still in flight: too few bytes expected",
                other=self.name,
            )
        self.acquired = self.released.copy()
        self.acquired_proxied = self.released_proxied.copy()
        self.acquired_in_cta = (self.acquired, self.acquired_proxied)
        if self.remote is not None:
            self.acquired = np.maximum(self.released, self.remote[0])
            self.acquired_proxied = np.maximum(self.released_proxied, self.remote[1])
        self.cluster.progress += 1
        for warp in self.waiters:
            if warp.blocked is self:
                warp.blocked = None
        self.waiters.clear()
        return True

    def check_visible(self, issue: Issue, lane: int, asynchronous: bool = False):
        """Is the initialisation ordered before (and, for copies, visible to) this access?"""
        cluster, warp = self.cluster, issue.warp
        if not cluster.check_races:
            return
        who = self.initializer.single
        row = warp.rows[lane]
        passed = warp.cluster_passed > self.initialized_round
        if cluster.seen[row, who] < self.initialized and not (self.published and passed):
            issue.fault(
                Race,
                f"access to {self!r} is not ordered after its mbarrier.init",
                other=self.initializer.name,
                offset=self.offset,
            )
        if asynchronous and not self.published and cluster.proxied[row, who] < self.initialized:
            issue.fault(
                MissingFence,
                f"a copy signals {self!r}, whose mbarrier.init no fence.mbarrier_init or "
                "fence.proxy.async made visible to the asynchronous proxy",
                severity="warning",
                section="mbarrier: mbarrier.init; membar / fence: fence.mbarrier_init",
                other=self.initializer.name,
                offset=self.offset,
            )


def shared_place(address: int) -> tuple[int, int]:
    """(rank, offset) of a shared::cta, shared::cluster or generic address."""
    address &= (1 << WINDOW_SHIFT) - 1
    return (address >> RANK_SHIFT) & 0xFF, address & OFFSET_MASK


def barrier_at(issue: Issue, rank: int, offset: int) -> MBarrier:
    """The live mbarrier at a shared address."""
    cta = _barrier_home(issue, rank, offset)
    barrier = cta.mbarriers.get(offset)
    if barrier is None or not barrier.valid:
        issue.fault(
            BarrierMisuse,
            f"no mbarrier was initialised at shared memory offset {offset:#x} of cta{rank}",
            offset=offset,
        )
    assert barrier is not None
    return barrier


def _barrier_home(issue: Issue, rank: int, offset: int) -> Cta:
    cluster = issue.cluster
    if rank >= cluster.size:
        issue.fault(OutOfBounds, f"mbarrier in cta{rank}, which the cluster does not have")
    cta = cluster.ctas[rank]
    if cta.exited:
        message = f"mbarrier of {cta.name}, which has ended"
        issue.fault(ExitedCta, message, offset=offset, goes_on=False)
    if offset % 8:
        issue.fault(Misaligned, f"mbarrier at {offset:#x} is not 8-byte aligned", offset=offset)
    cta.shared.span(offset, 8)
    return cta


@register
class MBarrierInstruction(Special):
    """mbarrier.init, inval, arrive[.expect_tx], arrive_drop, expect_tx, complete_tx, *_wait."""

    names = ("mbarrier",)

    def __init__(self, instruction, operands):
        super().__init__(instruction, operands)
        mods = instruction.mods
        self.action = mods[1]
        operands.allow(
            "init", "inval", "arrive", "arrive_drop", "expect_tx", "complete_tx", "try_wait",
            "test_wait", "parity", "noComplete", "release", "acquire", "relaxed", "cta", "cluster",
            "shared", "shared::cta", "shared::cluster", "b64",
        )  # fmt: skip
        if "noComplete" in mods:
            raise UnknownInstruction("mbarrier.noComplete is not known")
        texts = instruction.operands
        place = next(i for i, text in enumerate(texts) if text.startswith("["))
        self.address = operands.location(place)
        self.remote = "shared::cluster" in mods
        self.expects = "expect_tx" in mods
        self.relaxed = "relaxed" in mods
        # The scope that the text names. Without one it is that of the CTA by the letter; kernels,
        # and NVIDIA's own library, use that form across a cluster, so that it counts as the
        # cluster's.
        self.scope = next((m for m in mods if m in SCOPES), "cluster")
        self.is_wait = self.action in ("try_wait", "test_wait")
        self.argument = self.target = None
        if self.is_wait:
            self.target = operands.dst_slot(0, "pred")
            self.by_parity = "parity" in mods
            self.argument = operands.value(place + 1, "u32" if self.by_parity else "u64")
            if len(texts) > place + 2:
                operands.src(place + 2, "u32")  # the time limit
        else:
            if place == 1 and texts[0] != "_":
                self.target = operands.dst_slot(0, "u64")
            if len(texts) > place + 1:
                self.argument = operands.value(place + 1, "u32")

    def execute(self, issue: Issue) -> bool:
        addresses = issue.value(self.address)
        if self.is_wait:
            return self._wait(issue, addresses)
        arguments = issue.value(self.argument) if self.argument else None
        state = np.zeros(32, np.uint64)
        completed: set[MBarrier] = set()  # by earlier lanes of this instruction
        masks = self._lanes_of_each(issue, addresses)
        for lane in issue.lanes():
            rank, offset = shared_place(int(addresses[lane]))
            argument = int(arguments[lane]) if arguments is not None else None
            if self.action == "init":
                self._initialize(issue, lane, rank, offset, argument)
                continue
            barrier = barrier_at(issue, rank, offset)
            barrier.check_visible(issue, lane)
            if not self.remote and barrier.cta is not issue.cta:
                issue.fault(OutOfBounds, "shared::cta names an mbarrier of another CTA")
            if self.action == "inval":
                barrier.valid = False
                barrier.cta.shared.release_barrier(issue.warp, offset)
                continue
            state[lane] = barrier.phase
            count = 1
            if self.expects:
                barrier.add_transactions(argument, issue.warp.name)
            elif self.action == "complete_tx":
                barrier.add_transactions(-argument, issue.warp.name)
            elif argument is not None:
                count = argument
            if self.action in ("arrive", "arrive_drop"):
                if barrier in completed:
                    issue.fault(
                        BarrierMisuse,
                        f"the arrivals of one instruction fall into two phases of {barrier!r}",
                        other=barrier.name,
                    )
                barrier.arrive(count, issue.warp.name)
                if barrier.cta is not issue.cta:
                    own = issue.warp.single
                    barrier.remote_arrivals[own] = int(issue.warp.seen[own])
                if self.action == "arrive_drop":
                    barrier.expected -= count
                self._release(issue, barrier, masks.get(int(addresses[lane]), issue.mask))
            if barrier.complete_phase():
                completed.add(barrier)
        if self.target is not None:
            issue.write(self.target, state)
        issue.warp.tick()
        return True

    @staticmethod
    def _lanes_of_each(issue: Issue, addresses: np.ndarray) -> dict[int, np.ndarray]:
        """The executing lanes by the barrier that they name, where they name several."""
        executing = addresses if issue.mask is None else addresses[issue.mask]
        if (executing == executing[0]).all():
            return {}
        lanes = np.ones(32, bool) if issue.mask is None else issue.mask
        return {int(a): lanes & (addresses == a) for a in np.unique(executing)}

    def _release(self, issue: Issue, barrier: MBarrier, mask: np.ndarray | None):
        """What an arrival releases: nothing for a barrier outside of its scope."""
        warp = issue.warp
        remote = barrier.cta is not issue.cta
        if remote and SCOPES[self.scope] < SCOPES["cluster"]:
            return
        if not self.relaxed:
            barrier.release_lanes(warp, mask)
        elif (fenced := warp.fenced_for("cluster" if remote else "cta")) is not None:
            barrier.release(*fenced, remote)

    def _initialize(self, issue: Issue, lane: int, rank: int, offset: int, count: int):
        cta = _barrier_home(issue, rank, offset)
        if cta is not issue.cta:
            issue.fault(OutOfBounds, "mbarrier.init in another CTA")
        if not 1 <= count <= _MAX_COUNT:
            issue.fault(BarrierMisuse, f"mbarrier.init with count {count}", offset=offset)
        barrier = cta.mbarriers.get(offset)
        if barrier is None:
            barrier = cta.mbarriers[offset] = MBarrier(cta, offset)
        elif barrier.valid:
            issue.fault(
                BarrierMisuse, f"mbarrier.init of {barrier!r}, which is live", offset=offset
            )
        cta.shared.hold_barrier(issue.access(lane), offset)
        barrier.initialize(count, issue.warp)
        issue.warp.tick()

    def _wait(self, issue: Issue, addresses: np.ndarray) -> bool:
        """try_wait and test_wait: true if the phase named by its parity has completed.

        The instruction may return false at any time, and a kernel must loop. The first failing
        poll therefore returns false. Only when the warp polls again at the same place, with
        nothing but the loop in between, does it sleep until the barrier's phase completes.
        """
        warp = issue.warp
        arguments = issue.value(self.argument)
        result = np.zeros(32, bool)
        polled: dict[tuple[int, int], tuple[MBarrier, bool]] = {}
        for lane in issue.lanes():
            key = (int(addresses[lane]), int(arguments[lane]))
            if key not in polled:
                barrier = barrier_at(issue, *shared_place(key[0]))
                if barrier.cta is not issue.cta:
                    issue.fault(OutOfBounds, "a wait on an mbarrier of another CTA")
                barrier.check_visible(issue, lane)
                if self.by_parity:
                    done = (barrier.phase & 1) != (key[1] & 1)
                else:
                    done = barrier.phase > key[1]
                polled[key] = (barrier, done)
            result[lane] = polled[key][1]
        unfinished = [barrier for barrier, done in polled.values() if not done]
        here = (issue.node.index, warp.specials)
        if unfinished:
            if not warp.poll_expired and warp.last_poll == here:
                warp.blocked = unfinished[0]
                unfinished[0].waiters.append(warp)
                return False
            warp.last_poll = (here[0], here[1] + 1)
        warp.poll_expired = False
        for key, (barrier, done) in polled.items():
            if not done:
                continue
            mask = issue.mask
            if len(polled) > 1:
                mask = (addresses == key[0]) & (arguments == key[1])
                mask = mask if issue.mask is None else mask & issue.mask
            self._acquire(warp, barrier, mask)
        issue.write(self.target, result)
        return True

    def _acquire(self, warp: Warp, barrier: MBarrier, mask: np.ndarray | None):
        """These lanes come after what the phase's arrivals released."""
        clocks = (barrier.acquired, barrier.acquired_proxied)
        if SCOPES[self.scope] < SCOPES["cluster"]:
            clocks = barrier.acquired_in_cta
        if self.relaxed:
            warp.pending.append(clocks)
            return
        warp.acquire(mask, *clocks)
        if warp.whole(mask) and clocks[0][warp.index] > warp.synced:
            warp.sync_lanes()  # all lanes wait for what all of them have released
