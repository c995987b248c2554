"""Barriers of a CTA and of a cluster (PTX ISA 9.7.13.1 and 9.7.13.5)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from .errors import BarrierMisuse
from .special import Issue, Special, register

if TYPE_CHECKING:
    from .machine import Cluster, Cta, Warp


class NamedBarrier:
    """One of the sixteen barriers of a CTA."""

    def __init__(self, cta: Cta, number: int):
        self.cta, self.number = cta, number
        self.reset()

    def reset(self):
        self.count: int | None = None  # threads of the current phase
        self.whole_cta = False
        self.arrived: list[Warp] = []
        self.waiting: list[Warp] = []
        self.votes: list[np.ndarray] = []
        agents = self.cta.cluster.agents
        self.seen = np.zeros(agents, np.int32)
        self.proxied = np.zeros(agents, np.int32)

    def __repr__(self):
        return f"barrier {self.number} ({32 * len(self.arrived)} of {self.count} threads)"

    def try_release(self) -> bool:
        """Releases the waiting warps if all threads have arrived."""
        if not self.arrived or 32 * len(self.arrived) != self.count:
            return False
        votes = np.concatenate(self.votes) if self.votes else None
        for warp in self.waiting:
            warp.blocked = None
            warp.barrier_token = (self.seen, self.proxied)
            warp.barrier_votes = votes
        self.reset()
        self.cta.cluster.progress += 1
        return True


def live_threads(cta: Cta) -> int:
    return 32 * sum(not warp.done for warp in cta.warps)


@register
class Barrier(Special):
    """bar and barrier: sync, arrive, red; and barrier.cluster."""

    names = ("bar", "barrier")

    def __init__(self, instruction, operands):
        super().__init__(instruction, operands)
        mods = instruction.mods
        self.aligned = mods[0] == "bar" or "aligned" in mods
        self.cluster_wide = "cluster" in mods
        if self.cluster_wide:
            operands.allow("cluster", "arrive", "wait", "release", "acquire", "relaxed", "aligned")
            self.action = "arrive" if "arrive" in mods else "wait"
            self.relaxed = "relaxed" in mods
            return
        operands.allow(
            "cta", "sync", "arrive", "red", "aligned", "popc", "and", "or", "pred", "u32"
        )
        self.action = next(m for m in mods if m in ("sync", "arrive", "red"))
        self.reduction = next((m for m in mods if m in ("popc", "and", "or")), None)
        first = 1 if self.action == "red" else 0
        last = len(operands) - (1 if self.action == "red" else 0)
        self.number = operands.value(first, "u32")
        self.count = operands.value(first + 1, "u32") if last > first + 1 else None
        if self.action == "red":
            kind = "u32" if self.reduction == "popc" else "pred"
            self.target = operands.dst_slot(0, kind)
            self.vote = operands.value(last, "pred")

    def execute(self, issue: Issue) -> bool:
        if self.aligned:
            issue.whole_warp()
        if self.cluster_wide:
            barrier = issue.cluster.barrier
            if self.action == "arrive":
                barrier.arrive(issue, self.relaxed)
                return True
            return barrier.wait(issue)
        return self._named(issue)

    def _named(self, issue: Issue) -> bool:
        warp, cta = issue.warp, issue.cta
        if warp.barrier_token is not None:
            self._pass(issue)
            return True
        number = issue.uniform(self.number, "the barrier's number")
        whole = self.count is None
        count = live_threads(cta) if whole else issue.uniform(self.count, "the barrier's count")
        if not 0 <= number < 16:
            issue.fault(BarrierMisuse, f"barrier {number} is not in 0..15")
        if count % 32 or not 0 < count <= cta.threads:
            issue.fault(
                BarrierMisuse, f"barrier {number}: {count} threads in a CTA of {cta.threads}"
            )
        barrier = cta.named_barriers.setdefault(number, NamedBarrier(cta, number))
        if barrier.count is None:
            barrier.count, barrier.whole_cta = count, whole
        elif barrier.count != count:
            issue.fault(
                BarrierMisuse,
                f"barrier {number}: {count} threads, where its phase began with {barrier.count}",
                other=", ".join(w.name for w in barrier.arrived),
            )
        if warp in barrier.arrived:
            issue.fault(BarrierMisuse, f"a second arrival at {barrier!r} in one phase")
        barrier.arrived.append(warp)
        if warp.whole(issue.mask):
            warp.meet()
        seen, proxied = warp.released(issue.mask)
        np.maximum(barrier.seen, seen, out=barrier.seen)
        np.maximum(barrier.proxied, proxied, out=barrier.proxied)
        if self.action == "red":
            barrier.votes.append(issue.value(self.vote)[warp.alive])
        if self.action == "arrive":
            warp.tick()
            barrier.try_release()
            return True
        barrier.waiting.append(warp)
        warp.blocked = barrier
        if barrier.try_release():
            self._pass(issue)
            return True
        return False

    def _pass(self, issue: Issue):
        warp = issue.warp
        assert warp.barrier_token is not None
        warp.acquire(issue.mask, *warp.barrier_token)
        warp.barrier_token = None
        if warp.whole(issue.mask):
            warp.sync_lanes()
        if self.action == "red":
            votes = warp.barrier_votes
            assert votes is not None
            result = {
                "popc": np.uint32(votes.sum()),
                "and": bool(votes.all()),
                "or": bool(votes.any()),
            }[self.reduction]
            issue.write(self.target, result)


class ClusterBarrier:
    """The barrier of all threads of a cluster: arrive, then wait.

    An arrival releases unless it is relaxed; a relaxed one releases what a fence at cluster scope
    came after, and still makes mbarriers that a fence.mbarrier_init published usable after the wait
    (`Warp.cluster_passed`).
    """

    def __init__(self, cluster: Cluster):
        self.cluster = cluster
        self.round = 0
        self.seen = np.zeros(cluster.agents, np.int32)
        self.proxied = np.zeros(cluster.agents, np.int32)
        self.snapshot = (self.seen, self.proxied)
        self.waiting: list[Warp] = []

    def __repr__(self):
        arrived = sum(w.cluster_arrival > self.round for w in self.cluster.warps)
        return f"barrier.cluster ({arrived} of {len(self.cluster.warps)} warps)"

    def arrive(self, issue: Issue, relaxed: bool):
        warp = issue.warp
        if warp.cluster_arrival > warp.cluster_passed:
            issue.fault(BarrierMisuse, "barrier.cluster.arrive twice without a wait")
        warp.cluster_arrival = self.round + 1
        if warp.whole(issue.mask):
            warp.meet()
        released = warp.fenced_for("cluster") if relaxed else warp.released(issue.mask)
        if released:
            np.maximum(self.seen, released[0], out=self.seen)
            np.maximum(self.proxied, released[1], out=self.proxied)
            warp.tick()
        self.try_release()

    def wait(self, issue: Issue) -> bool:
        warp = issue.warp
        if warp.cluster_arrival <= warp.cluster_passed:
            issue.fault(BarrierMisuse, "barrier.cluster.wait without an arrive")
        if self.round >= warp.cluster_arrival:
            warp.acquire(issue.mask, *self.snapshot)
            if warp.whole(issue.mask):
                warp.sync_lanes()
            warp.cluster_passed = warp.cluster_arrival
            return True
        warp.blocked = self
        self.waiting.append(warp)
        return False

    def try_release(self):
        """Ends the round when every warp that still runs has arrived."""
        live = [w for w in self.cluster.warps if not w.done]
        if not live or any(w.cluster_arrival <= self.round for w in live):
            return
        self.round += 1
        self.snapshot = (self.seen.copy(), self.proxied.copy())
        self.cluster.progress += 1
        for warp in self.waiting:
            warp.blocked = None
        self.waiting = []
