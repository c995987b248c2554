"""Shared memory of a CTA, and the happens-before check of every access to it.

For each granule of shared memory (four bytes, or one byte in kernels that access less than four)
the shadow holds the last writer, its clock at the write, and for each reader its clock at its last
read. An access is a race unless the clocks that it must come after are in the vector clock of the
warp that makes it (Flanagan and Freund, "FastTrack", 2009, with full read vectors). One run of one
schedule is enough: the order that counts is the order that synchronisation enforces.

Generic and asynchronous proxy (PTX ISA 8.6 and 9.7.13.4): a write through the generic proxy is
visible to the asynchronous proxy only after a proxy fence. Each warp therefore has two vector
clocks, `seen` (ordered before me) and `proxied` (ordered before me and visible to the asynchronous
proxy); `fence.proxy.async` raises the second to the first.

Lanes of one warp are ordered by their warp's synchronisations only (bar.warp.sync, or a barrier;
clocks.py):
for each granule the shadow also holds the lanes of the last write and read, and their epochs. Two
lanes that access it in one epoch, one of them writing, race.

Shared memory starts poisoned (all ones: NaN in every float type), and so is the target of an
asynchronous copy until the copy completes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from .errors import BarrierMisuse, ExitedCta, MissingFence, OutOfBounds, Race, UninitializedRead

if TYPE_CHECKING:
    from .machine import Cluster, Warp

FIRST = 0x400  # the first KiB of shared memory belongs to the system
MAX_BYTES = 227 * 1024
_NEVER = 1 << 30  # a clock that nobody reaches
POISON = 0xFF


ALL_LANES = 64  # the lane of an access that all lanes of a warp make together
_SEVERAL = 65  # the lane of reads by different lanes


class Access(NamedTuple):
    """Who makes a generic access: numbers, or arrays of one number for each granule.

    who: the row of clocks that holds what they have seen (clocks.py). agent: as whom it is
    recorded, the warp or a single lane of it. lane, epoch: the lane, and the warp's epoch.
    """

    who: Any
    agent: Any
    lane: Any
    epoch: Any


class SharedMemory:
    """The bytes of one CTA's shared memory, offsets [FIRST, end), and their shadow."""

    def __init__(self, cluster: Cluster, rank: int, end: int, granule: int):
        self.cluster, self.rank, self.end, self.granule = cluster, rank, end, granule
        size = -(-end // 1024) * 1024
        self.bytes = np.full(size, cluster.launch.poison, np.uint8)
        self.chunks = self.bytes.reshape(-1, 16)
        self.views = {n: self.bytes.view(f"u{n}") for n in (1, 2, 4, 8)}
        self.top = FIRST  # one past the highest byte touched
        self.checked = cluster.check_races
        if self.checked:
            count = size // granule
            self.writer = np.full(count, cluster.uninitialized, np.int16)
            self.written = np.full(count, _NEVER, np.int32)
            self.site = np.zeros(count, np.int32)  # instruction of the last write
            self.reads = np.zeros((count, cluster.readers), np.int32)
            self.write_lane = np.zeros(count, np.int8)
            self.write_epoch = np.zeros(count, np.int32)
            self.read_lane = np.zeros(count, np.int8)
            self.read_epoch = np.zeros(count, np.int32)

    # --- bounds ---

    def bounds(self, offsets: np.ndarray, nbytes: int):
        """Checks byte offsets of accesses of `nbytes` each."""
        low, high = int(offsets.min()), int(offsets.max()) + nbytes
        if low < FIRST or high > self.end:
            self.cluster.fault(
                OutOfBounds,
                f"shared memory offset {(low if low < FIRST else high - nbytes):#x} (+{nbytes} "
                f"bytes) is outside of [{FIRST:#x}, {self.end:#x}) of cta{self.rank}",
                offset=low if low < FIRST else high - nbytes,
            )
        if high > self.top:
            self.top = high

    def span(self, offset: int, nbytes: int) -> slice:
        """Checks the bytes [offset, offset + nbytes), and gives their granules."""
        if offset < FIRST or offset + nbytes > self.end:
            self.cluster.fault(
                OutOfBounds,
                f"shared memory [{offset:#x}, +{nbytes}) is outside of [{FIRST:#x}, "
                f"{self.end:#x}) of cta{self.rank}",
                offset=offset,
            )
        self.top = max(self.top, offset + nbytes)
        return slice(offset // self.granule, -(-(offset + nbytes) // self.granule))

    def granules(self, offsets: np.ndarray, nbytes: int) -> np.ndarray:
        """Granules of accesses of `nbytes` at each offset, flat, access by access."""
        first = offsets // self.granule
        if nbytes <= self.granule:
            return first
        return (first[:, None] + np.arange(nbytes // self.granule)).reshape(-1)

    # --- generic proxy ---

    def read(self, access: Access, granules):
        """Generic reads. Returns which of the granules are at fault, or None."""
        if not self.checked:
            return None
        who, agent, lane, epoch = access
        seen = self.cluster.seen
        ok = seen[who, self.writer[granules]] >= self.written[granules]
        if not ok.all():
            self._unordered(who, granules, ok, "read")
        clash = (self.write_epoch[granules] == epoch) & (self.write_lane[granules] != lane)
        if clash.any():
            self._lanes_race(who, granules, clash, "read", "a write")
        bad = ~ok | clash
        if self.cluster.launch.perturbs:
            bad |= self._overwritten_early(granules, agent, seen[who, agent])
        self.reads[granules, agent] = seen[who, agent]
        other = (self.read_epoch[granules] == epoch) & (self.read_lane[granules] != lane)
        self.read_lane[granules] = lane
        other |= self.read_lane[granules] != lane  # several lanes in this very access
        if other.any():
            self.read_lane[granules[other]] = _SEVERAL
        self.read_epoch[granules] = epoch
        return bad if bad.any() else None

    def write(self, access: Access, granules):
        """Generic writes."""
        if not self.checked:
            return
        who, agent, lane, epoch = access
        cluster = self.cluster
        writer = self.writer[granules]
        seen = cluster.seen
        ok = (seen[who, writer] >= self.written[granules]) | (writer == cluster.uninitialized)
        if not ok.all():
            self._unordered(who, granules, ok, "write")
        limit = seen[who, : cluster.readers]
        if not (self.reads[granules] <= limit).all():
            self._still_read(who, granules, limit)
        clash = (self.write_epoch[granules] == epoch) & (self.write_lane[granules] != lane)
        if clash.any():
            self._lanes_race(who, granules, clash, "write", "a write")
        clash = (self.read_epoch[granules] == epoch) & (self.read_lane[granules] != lane)
        if clash.any():
            self._lanes_race(who, granules, clash, "write", "a read")
        self._record(access, granules, cluster.at)
        if isinstance(who, np.ndarray) and (self.writer[granules] != agent).any():
            bad = np.flatnonzero(self.writer[granules] != agent)[0]
            cluster.fault(
                Race,
                "two warps write the same shared memory with nothing between them to order them",
                actor=cluster.warp_of_row(int(who[bad])),
                other=f"{cluster.agent(int(self.writer[granules[bad]]))}, the same instruction",
                offset=int(granules[bad]) * self.granule,
            )

    def _record(self, access: Access, granules, site: int):
        self.writer[granules] = access.agent
        self.written[granules] = self.cluster.seen[access.who, access.agent]
        self.site[granules] = site
        self.write_lane[granules] = access.lane
        self.write_epoch[granules] = access.epoch

    def atomic(self, access: Access, granules):
        """Atomic read-modify-write: unordered against other atomics, ordered against the rest.

        Recorded as a write, and as a read, so that later plain writes must be ordered after every
        warp's atomics.
        """
        if not self.checked:
            return
        who = access.who
        seen = self.cluster.seen
        atomic = self.site[granules] < 0  # the last write was atomic
        ok = (seen[who, self.writer[granules]] >= self.written[granules]) | atomic
        if not ok.all():
            self._unordered(who, granules, ok, "atomic access")
        limit = seen[who, : self.cluster.readers]
        if not atomic.all() and not (self.reads[granules] <= limit).all():
            self._still_read(who, granules, limit)
        self._record(access, granules, -1 - self.cluster.at)
        self.reads[granules, access.agent] = seen[who, access.agent]

    def check_lanes(self, warp: Warp, lane: int, granules: slice, what: str, *, write: bool):
        """An asynchronous operation that one lane issues, against the other lanes of its warp."""
        if not self.checked:
            return
        clash = (self.write_epoch[granules] == warp.epoch) & (self.write_lane[granules] != lane)
        if clash.any():
            self._lanes_race(warp.index, granules, clash, what, "a write")
        if write:
            clash = (self.read_epoch[granules] == warp.epoch) & (self.read_lane[granules] != lane)
            if clash.any():
                self._lanes_race(warp.index, granules, clash, what, "a read")

    # --- asynchronous proxy ---

    def async_read(self, who: str, seen, proxied, granules, agent: int, clock: int, what: str):
        """A read by wgmma or by a bulk store, as `agent` at `clock`.

        seen, proxied: the clocks of the warp that issues it (for wgmma, the least of its warps').
        Returns which of the granules are at fault, or None.
        """
        if not self.checked:
            return None
        writer, written = self.writer[granules], self.written[granules]
        ok = proxied.take(writer) >= written
        if not ok.all():
            ordered = seen.take(writer) >= written
            if not ordered.all():
                self._unordered(who, granules, ordered, what)
            if not (ok | ~ordered).all():
                self._no_fence(who, granules, ok | ~ordered, f"{what} reads")
        column = self.reads[:, agent]
        column[granules] = np.maximum(column[granules], clock)
        if self.cluster.launch.perturbs:
            ok = ok & ~self._overwritten_early(granules, agent, clock)
        return None if ok.all() else ~ok

    def async_write(self, warp: Warp, lane: int, granules, agent: int, clock: int, what: str):
        """A write by the copy engine that a lane of `warp` issues."""
        if not self.checked:
            return
        who, cluster = warp.rows[lane], self.cluster
        writer, written = self.writer[granules], self.written[granules]
        fresh = writer == cluster.uninitialized
        ok = (cluster.proxied[who, writer] >= written) | fresh
        if not ok.all():
            ordered = (cluster.seen[who, writer] >= written) | fresh
            if not ordered.all():
                self._unordered(who, granules, ordered, what)
            self._no_fence(warp.name, granules, ok, f"{what} overwrites")
        self._record_async(who, granules, agent, clock)

    def generic_async_write(self, warp: Warp, lanes, granules, agent: int, clock: int):
        """A write by non-bulk cp.async: asynchronous, but through the generic proxy."""
        if not self.checked:
            return
        who, cluster = warp.rows[lanes], self.cluster
        writer = self.writer[granules]
        ok = cluster.seen[who, writer] >= self.written[granules]
        ok |= writer == cluster.uninitialized
        if not ok.all():
            self._unordered(who, granules, ok, "cp.async")
        for epochs, owners, what in (
            (self.write_epoch, self.write_lane, "a write"),
            (self.read_epoch, self.read_lane, "a read"),
        ):
            clash = (epochs[granules] == warp.epoch) & (owners[granules] != lanes)
            if clash.any():
                self._lanes_race(who, granules, clash, "cp.async", what)
        self._record_async(who, granules, agent, clock)
        self.write_lane[granules] = lanes
        self.write_epoch[granules] = warp.epoch

    def _record_async(self, who, granules, agent: int, clock: int):
        limit = self.cluster.seen[who, : self.cluster.readers]
        if not (self.reads[granules] <= limit).all():
            self._still_read(who, granules, limit)
        self.writer[granules] = agent
        self.written[granules] = clock
        self.site[granules] = self.cluster.at
        self.write_epoch[granules] = 0

    # --- mbarrier objects ---

    def hold_barrier(self, access: Access, offset: int):
        """An mbarrier object lives here now: any ordinary access is an error."""
        granules = self.span(offset, 8)
        if self.checked:
            self.write(access, np.arange(granules.start, granules.stop))
            self.writer[granules] = self.cluster.barrier_object
            self.written[granules] = _NEVER

    def release_barrier(self, warp: Warp, offset: int):
        granules = self.span(offset, 8)
        if self.checked:
            self.writer[granules] = warp.index
            self.written[granules] = self.cluster.seen[warp.index, warp.index]
            self.site[granules] = self.cluster.at

    # --- the end of the CTA ---

    def check_end(self, seen: np.ndarray):
        """At the end of the CTA, nobody may still access its shared memory.

        seen: what some warp of the CTA has seen. Accesses by other CTAs and copies into this one
        must be ordered before it, in every schedule.
        """
        if not self.checked:
            return
        cluster = self.cluster
        first = cluster.ctas[self.rank].warps[0].index
        own = np.arange(first, first + cluster.warps_per_cta)
        own = np.concatenate([own, cluster.first_single + own])
        foreign = (self.writer < cluster.uninitialized) & ~np.isin(self.writer, own)
        late = foreign & (self.written > seen.take(self.writer))
        if late.any():
            granule = int(np.flatnonzero(late)[0])
            cluster.fault(
                ExitedCta,
                f"cta{self.rank} may end before a write to its shared memory offset "
                f"{granule * self.granule:#x}",
                actor=cluster.agent(int(self.writer[granule])),
                at=max(int(self.site[granule]), -1 - int(self.site[granule])),
                offset=granule * self.granule,
            )
        if cluster.size > 1:
            every = [*range(cluster.first_wgmma), *range(cluster.first_single, cluster.readers)]
            others = np.setdiff1d(every, own)
            pending = self.reads[:, others] > seen[others]
            if pending.any():
                granule, column = (int(i[0]) for i in np.nonzero(pending))
                cluster.fault(
                    ExitedCta,
                    f"cta{self.rank} may end before a read of its shared memory offset "
                    f"{granule * self.granule:#x}",
                    actor=cluster.agent(int(others[column])),
                    offset=granule * self.granule,
                )

    # --- faults ---

    def _first(self, granules, bad: np.ndarray) -> tuple[int, int]:
        """(position, granule) of the first bad access."""
        if isinstance(granules, slice):
            granules = np.arange(granules.start, granules.stop)
        position = int(np.flatnonzero(bad)[0])
        return position, int(granules.reshape(-1)[position])

    def _actor(self, who, position: int) -> str:
        if isinstance(who, str):
            return who
        return self.cluster.warp_of_row(int(who[position] if isinstance(who, np.ndarray) else who))

    def _unordered(self, who, granules, ok, what: str):
        cluster = self.cluster
        # What nothing has written, and the rest, are different findings.
        index = (
            np.arange(granules.start, granules.stop) if isinstance(granules, slice) else granules
        )
        fresh = ~ok & (self.writer[index.reshape(-1)] == cluster.uninitialized).reshape(ok.shape)
        if fresh.any() and (fresh != ~ok).any():
            self._unordered(who, granules, ~fresh, what)
            ok = ok | fresh
        position, granule = self._first(granules, ~ok)
        actor = self._actor(who, position)
        writer = int(self.writer[granule])
        offset = granule * self.granule
        place = f"shared memory offset {offset:#x} of cta{self.rank}"
        count = int((~ok).sum()) * self.granule
        if writer == cluster.uninitialized:
            cluster.fault(
                UninitializedRead,
                f"{what} of {place} ({count} bytes), which nothing has written",
                actor=actor,
                offset=offset,
                of_a_value=True,
            )
            return
        if writer == cluster.barrier_object:
            cluster.fault(
                BarrierMisuse,
                f"{what} of {place}, where an mbarrier object lives",
                actor=actor,
                offset=offset,
            )
        cluster.fault(
            Race,
            f"{what} of {place} ({count} bytes) is not ordered after a write",
            actor=actor,
            other=f"{cluster.agent(writer)}, {cluster.site(int(self.site[granule]))}",
            offset=offset,
            of_a_value=_is_read(what),
        )

    def _lanes_race(self, who, granules, clash, what: str, earlier: str):
        position, granule = self._first(granules, clash)
        lane = int((self.write_lane if earlier == "a write" else self.read_lane)[granule])
        lanes = f"lane {lane}" if lane < 32 else "several lanes"
        self.cluster.fault(
            Race,
            f"{what} of shared memory offset {granule * self.granule:#x} of cta{self.rank} is not "
            f"ordered after {earlier} by {lanes} of the same warp: bar.warp.sync is missing",
            actor=self._actor(who, position),
            other=f"{lanes}, {self.cluster.site(int(self.site[granule]))}"
            if earlier == "a write"
            else lanes,
            offset=granule * self.granule,
            of_a_value=_is_read(what),
        )

    def _overwritten_early(self, granules, agents, clocks) -> np.ndarray:
        """Which of these reads the first run has found overwritten with nothing in between."""
        launch, place = self.cluster.launch, (self.cluster.ordinal, self.rank)
        if isinstance(granules, slice):
            granules = np.arange(granules.start, granules.stop)
        found = np.zeros(len(granules), bool)
        if not launch.overwritten:
            return found
        every = np.broadcast_arrays(granules, agents, clocks)
        for i, (granule, agent, clock) in enumerate(zip(*(x.tolist() for x in every), strict=True)):
            low, high = launch.overwritten.get((*place, agent, granule), (0, 0))
            found[i] = low < clock <= high
        return found

    def _note_overwritten(self, granules, bad: np.ndarray, limit):
        """Keeps the reads that a write follows with nothing in between, for a second run."""
        if isinstance(granules, slice):
            granules = np.arange(granules.start, granules.stop)
        limit = np.broadcast_to(limit, bad.shape)
        kept = self.cluster.launch.overwritten
        for i, agent in np.argwhere(bad).tolist():
            key = (self.cluster.ordinal, self.rank, agent, int(granules[i]))
            low, high = int(limit[i, agent]), int(self.reads[granules[i], agent])
            before = kept.get(key, (low, high))
            kept[key] = min(low, before[0]), max(high, before[1])

    def _still_read(self, who, granules, limit):
        bad = self.reads[granules] > limit
        cluster = self.cluster
        if cluster.launch.stop_at != "warning" and not cluster.launch.perturbs:
            self._note_overwritten(granules, bad, limit)
        agents = np.flatnonzero(bad.any(axis=0))
        copies = (agents >= cluster.first_bulk) & (agents < cluster.first_single)
        position, granule = self._first(granules, bad.any(axis=1))
        reader = int(np.flatnonzero(bad[position])[0])
        actor = self._actor(who, position)
        offset = granule * self.granule
        self.cluster.fault(
            Race,
            f"write to shared memory offset {offset:#x} of cta{self.rank}, which another party "
            "may still be reading",
            actor=actor,
            other=self.cluster.agent(reader),
            offset=offset,
            of_a_value=not copies.any(),
        )

    def _no_fence(self, who: str, granules, ok, what: str):
        _, granule = self._first(granules, ~ok)
        self.cluster.fault(
            MissingFence,
            f"{what} shared memory offset {granule * self.granule:#x} of cta{self.rank}, written "
            "through the generic proxy without a fence.proxy.async",
            actor=who,
            other=f"{self.cluster.agent(int(self.writer[granule]))}, "
            f"{self.cluster.site(int(self.site[granule]))}",
            offset=granule * self.granule,
            of_a_value=_is_read(what),
        )


def _is_read(what: str) -> bool:
    """Is it an access whose value the emulator can change (`Launch.perturbs`)?"""
    return what == "read" or what.startswith("operand")
