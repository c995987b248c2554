"""Which warp runs, for how long, and when asynchronous operations complete.

Any ready warp may run; a blocked one waits for an object that wakes it. When nobody is ready, one
asynchronous copy completes; when none is in flight, the waits on mbarriers time out once; when that
changes nothing, the cluster is deadlocked. Lanes of a warp that diverge run one side after the
other and meet at the immediate postdominator of the branch, so a lane that spins until another lane
of its warp acts is reported as a deadlock.
"""

from __future__ import annotations

import random

import numpy as np

from .bulk import close_bulk_groups
from .errors import Deadlock, EmulatorError, ExitedCta, RegisterBudget, RegisterInFlight
from .machine import Cluster, Warp
from .mbarrier import MBarrier
from .program import Node, located
from .special import Issue, RegisterPool
from .unit import Unit
from .wgmma import check_idle

_FOR_EVER = 10**9
# A kernel of the test-suite executes some 10^6 nodes at most.
_MAX_STEPS = 50_000_000


class Policy:
    """The schedule that a seed selects.

    Seed 0 runs each warp until it blocks, in turn, and completes asynchronous operations as late as
    the program allows. Other seeds draw the order of clusters and warps, the length of their turns,
    a warp or a kind of warp to starve, the time of each completion, and the content of registers
    that nothing has written.
    """

    def __init__(self, seed: int):
        self.random = random.Random(seed)
        self.seed = seed
        self.fixed = seed == 0
        draw = self.random.choice
        self.quantum = _FOR_EVER if self.fixed else draw([1, 3, 20, _FOR_EVER])
        self.starve = None if self.fixed else draw([None, None, "first", "last", "one"])
        self.in_step = self.fixed or draw([True, False])
        self.completion = {
            kind: "lazy" if self.fixed else draw(["lazy", "eager", "random"])
            for kind in ("load", "store", "wgmma")
        }

    def completes_at_issue(self, kind: str) -> bool:
        how = self.completion[kind]
        return how == "eager" or (how == "random" and self.random.random() < 0.3)

    def completes_now(self) -> bool:
        """Does some pending load complete before the next turn?"""
        return self.completion["load"] == "random" and self.random.random() < 0.3

    def priority(self, warp: Warp) -> int:
        if self.starve == "first":
            return warp.index
        if self.starve == "last":
            return -warp.index
        if self.starve == "one":
            return self.random.randrange(4)
        return 0

    def register_fill(self, dtype: np.dtype) -> int:
        """The content of registers before anything is written to them."""
        if dtype == np.bool_:
            return 0 if self.fixed else self.random.randrange(2)
        return int(np.iinfo(dtype).max) if self.fixed else self.random.getrandbits(16)


class Scheduler:
    """Runs one cluster to its end."""

    def __init__(self, cluster: Cluster):
        self.cluster, self.policy = cluster, cluster.policy
        self.program, self.nodes = cluster.program, cluster.program.nodes
        self.report = cluster.report
        self.executed = cluster.launch.executed
        self.turn = 0
        self.last_progress = -1
        self.shared_units = self.policy.in_step
        for warp in cluster.warps:
            warp.priority = self.policy.priority(warp)

    # --- whose turn it is ---

    def run(self):
        cluster, policy = self.cluster, self.policy
        try:
            while True:
                live = [w for w in cluster.warps if not w.done]
                if not live:
                    break
                ready = [w for w in live if w.blocked is None]
                if not ready:
                    if not self._complete_one() and not self._expire_polls(live):
                        self._deadlock(live)
                    continue
                if policy.completes_now():
                    self._complete_one()
                self.turn += 1
                if policy.fixed:
                    warp = min(ready, key=lambda w: w.last_run)
                    quantum = _FOR_EVER
                else:
                    best = max(w.priority for w in ready)
                    if policy.random.random() < 0.1:
                        warp = policy.random.choice(ready)
                    else:
                        warp = policy.random.choice([w for w in ready if w.priority == best])
                    quantum = policy.quantum
                unit = self._unit(warp)
                for member in unit.warps:
                    member.last_run = self.turn
                self._execute(unit, quantum)
            while self._complete_one():
                pass
            for cta in cluster.ctas:
                self.program.give_registers(cta.registers)
        except EmulatorError as error:
            if error.line is None and cluster.at < len(self.program.instructions):
                raise located(error, self.program.instructions[cluster.at]) from error
            raise

    def _complete_one(self) -> bool:
        """Completes one asynchronous copy into shared memory, if any is in flight."""
        cluster, policy = self.cluster, self.policy
        waiting = [w.copies for w in cluster.warps if w.copies is not None and w.copies.pending]
        choices = len(cluster.loads) + len(waiting)
        if not choices:
            return False
        index = 0 if policy.fixed else policy.random.randrange(choices)
        at = cluster.at
        if index < len(cluster.loads):
            cluster.loads.pop(index)()
        else:
            waiting[index - len(cluster.loads)].complete_one()
        cluster.at = at
        return True

    def _expire_polls(self, live: list[Warp]) -> bool:
        """Lets every try_wait return false once more, unless that was tried since."""
        polling = [w for w in live if isinstance(w.blocked, MBarrier)]
        if not polling or self.cluster.progress == self.last_progress:
            return False
        self.last_progress = self.cluster.progress
        for warp in polling:
            warp.poll_expired = True
            warp.blocked = None
        return True

    def _deadlock(self, live: list[Warp]):
        lines = []
        kind: type[EmulatorError] = Deadlock
        for warp in live:
            node = self.nodes[warp.node]
            place = "the end"
            if node.count:
                instruction = self.program.instructions[node.first]
                place = f"PTX line {instruction.line}: {instruction.text[:70]}"
            lines.append(f"  {warp.name} waits for {warp.blocked!r} at {place}")
            if isinstance(warp.blocked, RegisterPool):
                kind = RegisterBudget
        self.cluster.at = self.nodes[live[0].node].first
        message = "no warp can run, and nothing is in flight\n" + "\n".join(lines)
        self.cluster.fault(kind, message, actor=live[0].name)

    def _unit(self, warp: Warp) -> Unit:
        """The CTA, or the warpgroup, if all its warps are in step with this one; else the warp."""
        if self.shared_units:
            group = warp.cta.group_of(warp)
            if _in_step(group.warps, warp):
                if _in_step(warp.cta.warps, warp):
                    if warp.cta.unit is None:
                        warp.cta.unit = Unit(warp.cta, warp.cta.warps)
                    return warp.cta.unit
                if group.unit is None:
                    group.unit = Unit(warp.cta, group.warps)
                return group.unit
        if warp.unit is None:
            warp.unit = Unit(warp.cta, [warp])
        return warp.unit

    # --- execution ---

    def _execute(self, unit: Unit, quantum: int):
        """Runs a unit until it blocks, ends, falls out of step, or has used its turn."""
        nodes, program, cluster = self.nodes, self.program, self.cluster
        warps, warp, views = unit.warps, unit.warps[0], unit.views
        index, done = warp.node, 0
        while True:
            if warp.mask is not None and index == warp.join:
                index, warp.mask, warp.join = warp.stack.pop()
                continue
            if done >= quantum:
                for member in warps:
                    member.node = index
                return
            node = nodes[index]
            done += 1
            self.executed[index] += len(warps)
            self.report.instructions += node.count * len(warps)
            cluster.steps += 1
            if cluster.steps > _MAX_STEPS:
                cluster.fault(Deadlock, f"no end after {_MAX_STEPS} steps", actor=warp.name)
            if node.kind == "code":
                self._check_registers(unit, node)
                if warp.mask is None:
                    (node.run or program.compile(node, False))(views, None, unit)
                else:
                    (node.run_masked or program.compile(node, True))(views, warp.mask, unit)
                index += 1
            elif node.kind == "branch":
                following = self._branch(unit, node)
                if following is None:
                    return
                index = following
            elif node.kind == "exit":
                following = self._exit(unit, node)
                if following is None:
                    return
                index = following
            else:
                if not self._special(unit, node):
                    return
                index += 1

    def _check_registers(self, unit: Unit, node: Node):
        for warp in unit.warps:
            if warp.accumulators:
                clash = warp.accumulators & (node.reads | node.writes)
                if clash:
                    self._in_flight(warp, node, clash, "accumulators")
            if warp.fragments & node.writes:
                self._in_flight(warp, node, warp.fragments & node.writes, "A registers")
            warp.touched |= node.reads | node.writes

    def _in_flight(self, warp: Warp, node: Node, clash: int, what: str):
        at = node.first
        for position in range(node.first, node.first + node.count):
            text = self.program.instructions[position].text
            names = [n for n, bit in self.program.bits.items() if bit & clash]
            if any(name in text.replace(",", " ").split() for name in names):
                at = position
                break
        self.cluster.fault(
            RegisterInFlight,
            f"access to {self.program.names(clash)}, {what} of a wgmma that no wgmma.wait_group "
            "has waited for",
            actor=warp.name,
            at=at,
        )

    def _branch(self, unit: Unit, node: Node) -> int | None:
        """The next node, or None where the warps of the unit part."""
        if node.guard is None:
            return node.target
        warps, warp = unit.warps, unit.warps[0]
        self._check_registers(unit, node)
        taken = unit.views[node.guard[0]]
        if node.guard[1]:
            taken = ~taken
        if warp.mask is not None:
            taken = taken & warp.mask
            count, full = np.count_nonzero(taken), np.count_nonzero(warp.mask)
        else:
            count, full = np.count_nonzero(taken), unit.size
        if count == 0:
            return node.index + 1
        if count == full:
            return node.target
        if len(warps) == 1:
            self._diverge(warp, node, taken)
            return warp.node
        for i, member in enumerate(warps):
            own = taken[32 * i : 32 * i + 32]
            count = np.count_nonzero(own)
            if count == 0:
                member.node = node.index + 1
            elif count == 32:
                member.node = node.target
            else:
                self._diverge(member, node, own)
        return None

    def _diverge(self, warp: Warp, node: Node, taken: np.ndarray):
        """Runs the taken side first; then the other; then both from the join on."""
        mask = np.ones(32, bool) if warp.mask is None else warp.mask
        taken = taken.copy()
        warp.stack.append((node.join, warp.mask, warp.join))
        warp.stack.append((node.index + 1, mask & ~taken, node.join))
        warp.node, warp.mask, warp.join = node.target, taken, node.join
        if warp.node == node.join:
            warp.node, warp.mask, warp.join = warp.stack.pop()

    def _exit(self, unit: Unit, node: Node) -> int | None:
        warps = unit.warps
        if len(warps) > 1:
            if node.guard is None:
                for warp in warps:
                    self._finish(warp)
                return None
            # A predicated exit: each warp decides for itself.
            self.shared_units = False
            for warp in warps:
                warp.node = node.index
            return None
        warp = warps[0]
        mask = np.ones(32, bool) if warp.mask is None else warp.mask
        leaving = mask
        if node.guard is not None:
            decision = unit.views[node.guard[0]]
            leaving = mask & (~decision if node.guard[1] else decision)
        warp.alive = warp.alive & ~leaving
        if not warp.alive.any():
            self._finish(warp)
            return None
        if not leaving.any():
            return node.index + 1
        warp.stack = [
            (resume, warp.alive.copy() if saved is None else saved & warp.alive, join)
            for resume, saved, join in warp.stack
        ]
        staying = mask & ~leaving
        if staying.any():
            warp.mask = staying
            return node.index + 1
        while True:
            index, warp.mask, warp.join = warp.stack.pop()
            if warp.mask is not None and warp.mask.any():
                return index

    def _special(self, unit: Unit, node: Node) -> bool:
        """One special instruction, warp by warp. False where a warp must wait."""
        cluster = self.cluster
        advanced = True
        for position, warp in enumerate(unit.warps):
            warp.node = node.index
            cluster.at = node.first
            mask = warp.mask
            if node.guard is not None:
                guard = unit.views[node.guard[0]][32 * position : 32 * position + 32]
                if node.guard[1]:
                    guard = ~guard
                mask = guard.copy() if mask is None else mask & guard
                if mask.all():
                    mask = None
            if mask is None or mask.any():
                touched = node.reads | node.writes
                if warp.accumulators & touched and not node.special.touches_accumulators:
                    self._in_flight(warp, node, warp.accumulators & touched, "accumulators")
                issue = Issue(warp, unit, node, position, mask)
                if not node.special.execute(issue):
                    advanced = False
                    continue
                warp.touched |= node.writes
            warp.node = node.index + 1
            warp.specials += 1
        return advanced

    def _finish(self, warp: Warp):
        """The end of a warp: nothing of it may be in flight that its CTA's end would cut."""
        cluster, cta = self.cluster, warp.cta
        warp.done = True
        cluster.progress += 1
        check_idle(warp)
        if warp.copies is not None:
            warp.copies.complete_through(warp.copies.issued)
        open_stores = warp.bulk_open + [s for _, group in warp.bulk_groups for s in group]
        if any(store.data is None for store in open_stores):
            cluster.fault(
                ExitedCta,
                "the warp ends while bulk stores may still read shared memory: "
                "cp.async.bulk.wait_group.read 0 is missing",
                actor=warp.name,
                at=next(s.at for s in open_stores if s.data is None),
                severity="warning",
                section="Data Movement and Conversion Instructions: cp.async.bulk.wait_group",
            )
        warp.bulk_groups.append((warp.bulk_committed + 1, warp.bulk_open))
        warp.bulk_open = []
        close_bulk_groups(warp, None, warp.bulk_committed + 1, read_only=False)
        if all(w.done for w in cta.warps):
            cta.exited = True
            if cluster.check_races:
                seen = cluster.seen[[row for w in cta.warps for row in w.rows_of(None)]].max(axis=0)
                cta.shared.check_end(seen)
                for barrier in cta.mbarriers.values():
                    barrier.check_end(seen)
        for barrier in cta.named_barriers.values():
            if barrier.count is not None and barrier.whole_cta:
                barrier.count = 32 * sum(not w.done for w in cta.warps)
                barrier.try_release()
        cluster.barrier.try_release()


def _in_step(warps: list[Warp], warp: Warp) -> bool:
    return all(
        w.node == warp.node and w.blocked is None and not w.done and w.mask is None and not w.stack
        for w in warps
    )
