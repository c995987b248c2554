"""Global memory between clusters: what orders a store before an access of another cluster.

Every stored byte carries a stamp: which warp of which cluster stored it, at which of its clocks.
Another cluster may read it, or store over it, once it knows of that clock (PTX ISA, "Memory
Consistency Model", "Release and Acquire Patterns"):

- A release is an atomic or a strong store with `.release` or `.acq_rel`, or a relaxed one after a
  fence, at gpu scope or wider. It leaves at its place what the warp knew, the warp's own stores
  included; an atomic adds to what is there, a store replaces it.
- An acquire is an atomic or a strong load with `.acquire` or `.acq_rel`, or a relaxed one before a
  fence. What a warp acquires, others of its cluster know after the next barrier or mbarrier.

A relaxed atomic alone orders nothing, whether its result is used or not. A fence counts for every
relaxed write that a barrier orders after it, also one by another thread: all threads fence, the CTA
meets, one thread counts. By the letter the fence belongs to the thread that writes.

Launches that overlap (programmatic dependent launch): what an earlier one stored, or still reads, is
ordered by `griddepcontrol.wait` alone, which waits for all of the launch before. That one has waited
for the launch before it only if its own CTAs did. `launch_dependents` orders nothing. The emulator
runs the second launch after the first, and judges it as if they overlapped.

Two strong accesses never race. A strong load may still see an old value where the warp has read
something that its writer wrote later, and nothing released or acquired: that is a finding too.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from .clocks import SCOPES

if TYPE_CHECKING:
    from .machine import Cluster, Warp

Known = dict[int, np.ndarray]  # cluster: the clocks of its warps

RELEASES = ("release", "acq_rel")
ACQUIRES = ("acquire", "acq_rel")
GRID_END = 1 << 30  # a clock after all of a cluster


class Semantics(NamedTuple):
    """`.acquire.gpu` and the like. Without any, an access is weak, and has no Semantics."""

    order: str
    scope: str

    @property
    def rank(self) -> int:
        return SCOPES[self.scope]


class Stamp(NamedTuple):
    """Who stored a byte."""

    cluster: int
    linear: int  # the CTA, in its grid
    agent: int
    clock: int
    strong: bool


class Import(NamedTuple):
    """What a warp has learned of other clusters.

    kind: "acquired"; "released": it read what a release had written, but did not acquire;
    "observed": it read what a warp wrote later, which released nothing.
    """

    agent: int
    clock: int
    known: Known
    kind: str


class Local(NamedTuple):
    """A release at a place, for warps of the same cluster."""

    cluster: int
    rank: int  # CTA
    scope: int
    seen: np.ndarray
    proxied: np.ndarray


class Place:
    """What strong writes at an address have left there."""

    def __init__(self):
        self.known: Known = {}
        self.carried: Known = {}  # what came before them, released or not
        self.local: list[Local] = []


def merge(into: Known, more: Known):
    for cluster, clocks in more.items():
        have = into.get(cluster)
        into[cluster] = clocks.copy() if have is None else np.maximum(have, clocks)


class Grid:
    """A launch among those that may overlap."""

    def __init__(self, ctas: int):
        self.ctas = ctas
        self.clusters: list[int] = []
        self.waited: set[int] = set()  # CTAs that executed griddepcontrol.wait


class GlobalOrder:
    """Stamps of the stores to one memory, and its places of synchronisation."""

    def __init__(self):
        self.grids: list[Grid] = []
        self.stamps: list[Stamp | None] = [None]
        self.clusters = 0
        self.places: dict[tuple[int, int], Place] = {}
        self._cluster_of = np.zeros(1024, np.int32)
        self._cta_of = np.zeros(1024, np.int32)
        self._numbers: dict[Stamp, int] = {}

    def new_cluster(self) -> int:
        self.clusters += 1
        self.grids[-1].clusters.append(self.clusters)
        return self.clusters

    # --- launches that overlap ---

    def wait_for_launches(self, warp: Warp):
        """griddepcontrol.wait"""
        self.grids[-1].waited.add(warp.cta.linear)
        known: Known = {}
        for grid in reversed(self.grids[:-1]):
            for cluster in grid.clusters:
                known[cluster] = np.full(_MAX_WARPS, GRID_END, np.int32)
            if len(grid.waited) < grid.ctas:
                break
        if known:
            clock = int(warp.row_seen[warp.index])
            self._import(warp.cluster, Import(warp.index, clock, known, "acquired"))

    def knows_launch(self, cluster: Cluster, row: int, number: int) -> bool:
        """Is the end of an earlier launch ordered before what a row of clocks does next?"""
        last = Stamp(self.grids[number].clusters[0], 0, 0, GRID_END, False)
        return self.knows(cluster, row, last, "acquired")

    def in_earlier_launch(self, stamp: Stamp) -> bool:
        return stamp.cluster not in self.grids[-1].clusters

    def stamp(self, warp: Warp, strong: bool = False) -> int:
        """The number of a warp's stores at its present clock."""
        index = warp.index
        key = Stamp(warp.cluster.id, warp.cta.linear, index, int(warp.row_seen[index]), strong)
        number = self._numbers.get(key)
        if number is None:
            number = self._numbers[key] = len(self.stamps)
            self.stamps.append(key)
            if number >= len(self._cluster_of):
                self._cluster_of = np.concatenate([self._cluster_of, self._cluster_of * 0])
                self._cta_of = np.concatenate([self._cta_of, self._cta_of * 0])
            self._cluster_of[number] = key.cluster
            self._cta_of[number] = 16 * key.cluster + warp.cta.rank
        return number

    def foreign(self, cluster: Cluster, stamps: np.ndarray) -> np.ndarray:
        """Which stamps are those of other clusters."""
        owners = self._cluster_of[stamps]
        return (owners != 0) & (owners != cluster.id)

    def of_others(self, cluster: Cluster, rank: int, stamps: np.ndarray) -> np.ndarray:
        """Which stamps are those of other CTAs."""
        owners = self._cta_of[stamps]
        return (owners != 0) & (owners != 16 * cluster.id + rank)

    def knows(self, cluster: Cluster, row: int, stamp: Stamp, *kinds: str) -> bool:
        """Is a store of another cluster ordered before what a row of clocks does next?"""
        seen = cluster.seen[row]
        for what in cluster.imports:
            if what.kind in kinds and seen[what.agent] >= what.clock:
                clocks = what.known.get(stamp.cluster)
                if clocks is not None and clocks[stamp.agent] >= stamp.clock:
                    return True
        return False

    def unordered(self, cluster: Cluster, row: int, numbers, strong: bool):
        """The stores, of those with these stamps, that a read may miss: (stamp, why)."""
        for number in np.unique(numbers).tolist():
            stamp = self.stamps[number]
            assert stamp is not None
            if self.knows(cluster, row, stamp, "acquired"):
                continue
            if not (strong and stamp.strong):
                yield stamp, "race"
            elif self.knows(cluster, row, stamp, "released"):
                yield stamp, "no acquire"
            elif self.knows(cluster, row, stamp, "observed"):
                yield stamp, "no release"

    # --- strong accesses ---

    def write(self, warp: Warp, mask, place: tuple[int, int], how: Semantics, *, adds: bool):
        """A strong store, or an atomic (`adds`), by some lanes."""
        found = self.places.get(place)
        if found is None or not adds:
            found = self.places[place] = Place()
        cluster = warp.cluster
        merge(found.carried, {cluster.id: warp.released_global(mask)})
        if how.order in RELEASES:
            if how.rank >= SCOPES["gpu"]:
                merge(found.known, self._known_to(warp, mask))
            seen, proxied = warp.released(mask)
            local = Local(cluster.id, warp.cta.rank, how.rank, seen.copy(), proxied.copy())
            found.local.append(local)
            return
        if how.rank >= SCOPES["gpu"]:
            for known in self._fenced_before(warp):
                merge(found.known, known)
        if warp.fenced is not None:
            scope = min(SCOPES[warp.fenced[0]], how.rank)
            found.local.append(Local(cluster.id, warp.cta.rank, scope, *warp.fenced[1:]))

    def read(self, warp: Warp, mask, place: tuple[int, int], how: Semantics):
        """A strong load, or an atomic that returns a value, by some lanes."""
        found = self.places.get(place)
        if found is None:
            return
        cluster = warp.cluster
        acquires = how.order in ACQUIRES
        for left in found.local:
            if left.cluster == cluster.id and (
                left.rank == warp.cta.rank or min(left.scope, how.rank) >= SCOPES["cluster"]
            ):
                if acquires:
                    warp.acquire(mask, left.seen, left.proxied)
                else:
                    warp.pending.append((left.seen, left.proxied))
        clock = int(warp.row_seen[warp.index])
        carried = {c: v for c, v in found.carried.items() if c != cluster.id}
        if carried:
            self._import(cluster, Import(warp.index, clock, carried, "observed"))
        known = {c: v for c, v in found.known.items() if c != cluster.id}
        if known and how.rank >= SCOPES["gpu"]:
            kind = "acquired" if acquires else "released"
            if self._import(cluster, Import(warp.index, clock, known, kind)) and not acquires:
                warp.pending_global.append(known)

    def _import(self, cluster: Cluster, new: Import) -> bool:
        """Keeps what a warp has learned, unless it was the same that it learned last."""
        last = next((i for i in reversed(cluster.imports) if i.kind == new.kind), None)
        if last is not None and last.agent == new.agent and last.known.keys() == new.known.keys():
            if all((last.known[c] >= clocks).all() for c, clocks in new.known.items()):
                return False
        cluster.imports.append(new)
        return True

    def fence(self, warp: Warp, mask, scope: str):
        """A memory fence of a warp: relaxed reads before it acquire, writes after it release."""
        if SCOPES[scope] < SCOPES["gpu"]:
            return
        clock = int(warp.row_seen[warp.index])
        for known in warp.pending_global:
            warp.cluster.imports.append(Import(warp.index, clock, known, "acquired"))
        warp.pending_global.clear()
        warp.fences.append((clock, self._known_to(warp, mask)))
        del warp.fences[:-_FENCES]

    def _known_to(self, warp: Warp, mask) -> Known:
        """What some lanes know: their own cluster, and what others have told them."""
        cluster = warp.cluster
        own = warp.released_global(mask)
        result = {cluster.id: own.copy()}
        for what in cluster.imports:
            if what.kind == "acquired" and own[what.agent] >= what.clock:
                merge(result, what.known)
        return result

    def _fenced_before(self, warp: Warp):
        """What the fences came after that are ordered before a warp's next write."""
        for other in warp.cluster.warps:
            limit = warp.row_seen[other.index]
            for clock, known in reversed(other.fences):
                if other is warp or clock <= limit:
                    yield known
                    break


_FENCES = 8  # of a warp that are kept
_MAX_WARPS = 16 * 32  # of a cluster
