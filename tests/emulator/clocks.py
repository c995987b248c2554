"""What a warp has seen, lane by lane.

The lanes of a warp that acquire together share a row of the cluster's clocks. As long as all lanes
know the same, which is nearly always, that is the warp's own row. Where some lanes alone wait for
an mbarrier, a bulk group or a fence, these move to a row of their own, until the lanes meet.

Lanes meet at every instruction with `.sync`: it waits until all lanes that it names execute it (PTX
ISA, "9.7.15.7.1 wgmma.fence" and others of the kind). What they did before is then covered by a
release of one of them. Memory order between the lanes themselves is promised by `bar.warp.sync` and
by barriers only (9.7.13.3): these begin a new epoch, see `SharedMemory`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from .machine import Cluster

WARP = 32
SCOPES = {"cta": 0, "cluster": 1, "gpu": 2, "gl": 2, "sys": 3}
EVERY_LANE = 0xFFFFFFFF


def lane_bits(mask: np.ndarray | None) -> int:
    """Executing lanes as a number, bit by bit."""
    if mask is None:
        return EVERY_LANE
    return int.from_bytes(np.packbits(mask, bitorder="little").tobytes(), "little")


class LaneClocks:
    """The clocks of one warp. Base of `Warp`."""

    cluster: Cluster
    alive: np.ndarray

    def _start_clocks(self, cluster: Cluster, index: int):
        self.index = index
        self.single = cluster.first_single + index  # agent of accesses by one lane alone
        self.row_seen = cluster.seen[index]
        self.row_proxied = cluster.proxied[index]
        self.split = False  # do lanes have rows of their own?
        self.rows = np.full(WARP, index)
        self.first_row = cluster.first_lane_row + WARP * index
        self.synced = 0  # the clock at which the lanes met last
        # Lanes that have accessed shared memory since: together, and each alone.
        self.acted = self.acted_alone = 0
        self.acted_global = 0  # lanes that have stored to global memory since
        # The last fence, for relaxed releases: scope and clocks. What relaxed reads have seen.
        self.fenced: tuple[str, np.ndarray, np.ndarray] | None = None
        self.pending: list[tuple[np.ndarray, np.ndarray]] = []
        # The same at gpu scope, for other clusters (order.py): fences as (clock, what came before).
        self.fences: list[tuple[int, dict[int, np.ndarray]]] = []
        self.pending_global: list[dict[int, np.ndarray]] = []
        self.epoch = cluster.new_epoch()

    @property
    def seen(self) -> np.ndarray:
        """What all lanes have seen; complete only while they have not split."""
        return self.row_seen

    @property
    def proxied(self) -> np.ndarray:
        return self.row_proxied

    def whole(self, mask: np.ndarray | None) -> bool:
        """Are these all lanes that still run?"""
        return mask is None or not (self.alive & ~mask).any()

    def rows_of(self, mask: np.ndarray | None) -> list[int]:
        """The rows that hold what some lanes have seen."""
        if not self.split:
            return [self.index]
        return np.unique(self.rows if mask is None else self.rows[mask]).tolist()

    def _own_rows(self, mask: np.ndarray | None) -> list[int]:
        """The rows of some lanes, which no other lane shares: these lanes learn something."""
        if self.whole(mask):
            return self.rows_of(self.alive if self.split else None)
        cluster, result = self.cluster, []
        for row in self.rows_of(mask):
            members = self.rows == row
            staying = members & self.alive & ~mask
            if staying.any():
                used = set(self.rows.tolist())
                new = next(r for r in range(self.first_row, self.first_row + WARP) if r not in used)
                cluster.seen[new] = cluster.seen[row]
                cluster.proxied[new] = cluster.proxied[row]
                self.rows[members & mask] = new
                self.split = True
                row = new
            result.append(row)
        return result

    def tick(self):
        """A new clock: what the warp does next is not ordered by what it released."""
        clock = self.row_seen[self.index] + 1
        self.row_seen[self.index] = self.row_seen[self.single] = clock
        if self.split:
            rows = self.rows_of(None)
            self.cluster.seen[rows, self.index] = self.cluster.seen[rows, self.single] = clock

    def sync_lanes(self):
        """bar.warp.sync, or more: what lanes did before is ordered before what any lane does."""
        self.epoch = self.cluster.new_epoch()
        self.meet()

    def meet(self):
        """All lanes were here: they know the same, and a release by one covers what they did."""
        if self.split:
            cluster = self.cluster
            for row in self.rows_of(None):
                np.maximum(self.row_seen, cluster.seen[row], out=self.row_seen)
                np.maximum(self.row_proxied, cluster.proxied[row], out=self.row_proxied)
            self.rows[:] = self.index
            self.split = False
        self.synced = int(self.row_seen[self.index])
        self.acted = self.acted_alone = self.acted_global = 0
        self.tick()

    def acquire(self, mask: np.ndarray | None, seen: np.ndarray, proxied: np.ndarray):
        """Everything ordered before those clocks is ordered before what these lanes do next."""
        cluster = self.cluster
        for row in self._own_rows(mask):
            np.maximum(cluster.seen[row], seen, out=cluster.seen[row])
            np.maximum(cluster.proxied[row], proxied, out=cluster.proxied[row])

    def acquire_agent(self, mask: np.ndarray | None, agent: int, clock: int, proxied: bool = True):
        """These lanes know what an agent did up to a clock."""
        cluster = self.cluster
        for row in self._own_rows(mask):
            if clock > cluster.seen[row, agent]:
                cluster.seen[row, agent] = clock
            if proxied and clock > cluster.proxied[row, agent]:
                cluster.proxied[row, agent] = clock

    def proxy_fence(self, mask: np.ndarray | None):
        """What these lanes have seen is visible to the asynchronous proxy."""
        cluster = self.cluster
        for row in self._own_rows(mask):
            np.maximum(cluster.proxied[row], cluster.seen[row], out=cluster.proxied[row])
        self.tick()

    def released(self, mask: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
        """The clocks that a release by some lanes covers.

        What others of the warp did is covered up to where the lanes met last.
        """
        cluster = self.cluster
        if self.whole(mask):
            if not self.split:
                return self.row_seen, self.row_proxied
            rows = self.rows_of(self.alive)
            return cluster.seen[rows].max(axis=0), cluster.proxied[rows].max(axis=0)
        rows = self.rows_of(mask)
        seen, proxied = cluster.seen[rows].max(axis=0), cluster.proxied[rows].max(axis=0)
        others = ~lane_bits(mask)
        for agent, acted in ((self.index, self.acted), (self.single, self.acted_alone)):
            if acted & others:
                seen[agent] = min(int(seen[agent]), self.synced)
                proxied[agent] = min(int(proxied[agent]), self.synced)
        return seen, proxied

    def released_global(self, mask: np.ndarray | None) -> np.ndarray:
        """The clocks, of stores to global memory, that a release by some lanes covers."""
        rows = self.rows_of(mask)
        seen = self.cluster.seen[rows].max(axis=0)
        if not self.whole(mask) and self.acted_global & ~lane_bits(mask):
            seen[self.index] = min(int(seen[self.index]), self.synced)
        return seen

    def fence(self, mask: np.ndarray | None, scope: str):
        """A memory fence: relaxed reads before it acquire, relaxed writes after it release."""
        for seen, proxied in self.pending:
            self.acquire(mask, seen, proxied)
        self.pending.clear()
        seen, proxied = self.released(mask)
        self.fenced = (scope, seen.copy(), proxied.copy())
        self.cluster.memory.order.fence(self, mask, scope)
        self.tick()

    def fenced_for(self, scope: str) -> tuple[np.ndarray, np.ndarray] | None:
        """What a relaxed release at a scope covers: what the last fence of that scope came after."""
        if self.fenced is None or SCOPES[self.fenced[0]] < SCOPES[scope]:
            return None
        return self.fenced[1:]
