"""Non-bulk cp.async: small copies by each thread, through the generic proxy (PTX ISA 9.7.9.25.3).

The writes of a copy become visible to the thread that issued it at a wait_group or wait_all, and to
who waits on an mbarrier at the arrival of `cp.async.mbarrier.arrive`, which the hardware makes once
the thread's earlier copies are complete. The arrival orders these copies, not the thread's other
writes. Since the copies use the generic proxy, wgmma sees them only after a proxy fence.

The emulator keeps one list of copies a warp: an instruction of all lanes is one copy.
"""

from __future__ import annotations

from collections import Counter

import numpy as np

from .errors import BarrierMisuse, ExitedCta, Misaligned, UnknownInstruction
from .machine import Warp
from .mbarrier import barrier_at, shared_place
from .special import Issue, Special


class CopyGroup:
    """The cp.async state of a warp. Copies and arrivals are numbered together, in order."""

    def __init__(self, warp: Warp):
        self.warp = warp
        self.agent = warp.cluster.first_copy + warp.index
        self.issued = 0
        self.pending: list[tuple[int, object]] = []  # (number, step), oldest first
        self.commits: list[int] = []  # number of the last copy of each group

    def add(self, step) -> int:
        self.issued += 1
        self.pending.append((self.issued, step))
        return self.issued

    def complete_through(self, number: int):
        """Executes the copies up to a number, in order."""
        cluster = self.warp.cluster
        at = cluster.at
        while self.pending and self.pending[0][0] <= number:
            _, step = self.pending.pop(0)
            step()  # type: ignore[operator]
        cluster.at = at

    def complete_one(self):
        if self.pending:
            self.complete_through(self.pending[0][0])

    def acquire(self, mask: np.ndarray | None, number: int):
        """Some lanes of the issuing warp see the copies up to a number."""
        self.complete_through(number)
        self.warp.acquire_agent(mask, self.agent, number, proxied=False)


def copies_of(warp: Warp) -> CopyGroup:
    if warp.copies is None:
        warp.copies = CopyGroup(warp)
    return warp.copies


def decode(instruction, operands) -> Special:
    """The form that the opcode names."""
    mods = instruction.mods
    if mods[1:3] == ["async", "mbarrier"]:
        return CopyArrive(instruction, operands)
    if mods[1:3] == ["async", "commit_group"]:
        return CopyCommit(instruction, operands)
    if mods[1:3] in (["async", "wait_group"], ["async", "wait_all"]):
        return CopyWait(instruction, operands)
    if mods[1:3] in (["async", "ca"], ["async", "cg"]):
        return CopyAsync(instruction, operands)
    raise UnknownInstruction(f"{instruction.opcode} is not known")


class CopyAsync(Special):
    """cp.async.{ca,cg}: 4, 8 or 16 bytes a lane; bytes past src-size are zeros."""

    def __init__(self, instruction, operands):
        super().__init__(instruction, operands)
        operands.allow(
            "async", "ca", "cg", "shared", "shared::cta", "global", "L2::cache_hint", "L2::64B",
            "L2::128B", "L2::256B",
        )  # fmt: skip
        self.target = operands.location(0)
        self.source = operands.location(1)
        self.size = int(operands.text(2), 0)
        if self.size not in (4, 8, 16) or ("cg" in instruction.mods and self.size != 16):
            raise UnknownInstruction(f"cp.async of {self.size} bytes")
        self.source_size = None
        extra = operands.instruction.operands[3:]
        if extra and "L2::cache_hint" in instruction.mods:
            extra = extra[:-1]
        if extra:
            text = extra[0]
            if operands.program.kernel.registers.get(text) == "pred":
                raise UnknownInstruction("cp.async with an ignore-src predicate")
            self.source_size = operands.value(text, "u32")

    def execute(self, issue: Issue) -> bool:
        cluster, warp, cta, size = issue.cluster, issue.warp, issue.cta, self.size
        lanes = np.array(list(issue.lanes()))
        places = [shared_place(int(a)) for a in issue.value(self.target)[lanes]]
        if any(rank != cta.rank for rank, _ in places):
            issue.fault(BarrierMisuse, "cp.async into the shared memory of another CTA")
        offsets = np.array([offset for _, offset in places])
        sources = issue.value(self.source)[lanes]
        if (offsets % size).any() or (sources % np.uint64(size)).any():
            issue.fault(Misaligned, f"cp.async of {size} bytes at an address not aligned to it")
        kept = np.full(len(lanes), size)
        if self.source_size is not None:
            kept = issue.value(self.source_size)[lanes].astype(np.int64)
            if (kept > size).any():
                issue.fault(Misaligned, f"cp.async: src-size {int(kept.max())} exceeds {size}")
        cta.shared.bounds(offsets, size)
        group = copies_of(warp)
        granules = cta.shared.granules(offsets, size)
        each = np.repeat(lanes, len(granules) // len(lanes))
        cta.shared.generic_async_write(warp, each, granules, group.agent, group.issued + 1)
        columns = offsets[:, None] + np.arange(size)
        cta.shared.bytes[columns] = cluster.launch.poison
        at = cluster.at
        cluster.report.generic_bytes_loaded += int(kept.sum())

        def step():
            cluster.at = at
            if cta.exited:
                message = f"cp.async arrives after {cta.name} has ended"
                cluster.fault(ExitedCta, message, goes_on=False)
            data = np.zeros((len(lanes), size), np.uint8)
            for row, (source, count) in enumerate(zip(sources, kept, strict=True)):
                if count:
                    region = cluster.memory.find(int(source), int(count), "cp.async")
                    start = int(source) - region.base
                    if cluster.launch.logs_reads:
                        number = cluster.launch.number + 1
                        region.log_readers()[start : start + count] = number
                    if region.writers is not None and cluster.check_races:
                        stamps = region.writers[start : start + count]
                        cluster.launch.check_readers(
                            warp, int(warp.rows[lanes[row]]), region, stamps
                        )
                    data[row, :count] = region.bytes[start : start + count]
            cta.shared.bytes[columns] = data

        number = group.add(step)
        if cluster.policy.completes_at_issue("load"):
            group.complete_through(number)
        return True


class CopyCommit(Special):
    """cp.async.commit_group"""

    def __init__(self, instruction, operands):
        super().__init__(instruction, operands)
        operands.allow("async", "commit_group")

    def execute(self, issue: Issue) -> bool:
        group = copies_of(issue.warp)
        group.commits.append(group.issued)
        return True


class CopyWait(Special):
    """cp.async.wait_group n, cp.async.wait_all"""

    def __init__(self, instruction, operands):
        super().__init__(instruction, operands)
        operands.allow("async", "wait_group", "wait_all")
        self.allowed = int(operands.text(0)) if "wait_group" in instruction.mods else None

    def execute(self, issue: Issue) -> bool:
        group = copies_of(issue.warp)
        if self.allowed is None:
            group.acquire(issue.mask, group.issued)
        elif len(group.commits) > self.allowed:
            group.acquire(issue.mask, group.commits[len(group.commits) - 1 - self.allowed])
        return True


class CopyArrive(Special):
    """cp.async.mbarrier.arrive[.noinc]: an arrival once the thread's earlier copies are complete.

    Without `.noinc` the pending count rises by one first, so that the pair leaves it unchanged.
    """

    def __init__(self, instruction, operands):
        super().__init__(instruction, operands)
        operands.allow("async", "mbarrier", "arrive", "noinc", "shared", "shared::cta", "b64")
        self.address = operands.location(0)
        self.increments = "noinc" not in instruction.mods

    def execute(self, issue: Issue) -> bool:
        cluster, warp = issue.cluster, issue.warp
        addresses = issue.value(self.address)
        counts = Counter(int(addresses[lane]) for lane in issue.lanes())
        group = copies_of(warp)
        at, upto = cluster.at, group.issued
        arrivals = []
        for address, count in counts.items():
            barrier = barrier_at(issue, *shared_place(address))
            barrier.check_visible(issue, next(iter(issue.lanes())))
            if self.increments:
                barrier.pending += count
            arrivals.append((barrier, count))
        seen = np.zeros(cluster.agents, np.int32)
        seen[group.agent] = upto

        def step():
            cluster.at = at
            for barrier, count in arrivals:
                barrier.arrive(count, f"cp.async of {warp.name}")
                barrier.release(seen, np.zeros_like(seen))
                barrier.complete_phase()

        number = group.add(step)
        if cluster.policy.completes_at_issue("load") or len(group.pending) == 1:
            group.complete_through(number)
        return True
