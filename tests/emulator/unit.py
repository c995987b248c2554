"""What executes together: a warp, or the warps of a warpgroup or of a CTA in step.

Warps that are all at the same node, with all lanes running, execute it as one unit of many lanes.
Nothing depends on it but speed. A unit offers generated code its views of the
registers, the warp-wide instructions and the loads and stores.
"""

from __future__ import annotations

import numpy as np

from . import alu
from .clocks import EVERY_LANE
from .errors import Divergence, ExitedCta, Misaligned, OutOfBounds, Unsupported
from .machine import Cta, Warp
from .memory import Region
from .order import Semantics
from .program import DTYPES, OFFSET_MASK, PARAM_WINDOW, RANK_SHIFT, UNSIGNED, WINDOW_SHIFT
from .shared import ALL_LANES, Access

u32, u64 = np.uint32, np.uint64
_LANES = np.arange(32, dtype=u32)
_LOW_MASK = u64((1 << WINDOW_SHIFT) - 1)
_SPACE_OF_WINDOW = {0: "global", 1: "shared::cluster", 2: "local", 3: "param"}


class Unit:
    """One warp, or several in step."""

    def __init__(self, cta: Cta, warps: list[Warp]):
        self.cta, self.warps, self.cluster = cta, warps, cta.cluster
        self.low, self.high = warps[0].low, warps[-1].high
        self.size = self.high - self.low
        self.views = cta.registers.views(self.low, self.high)
        self.lane = np.tile(_LANES.astype(np.int64), len(warps))
        # The warp of each lane, as an index into the clocks.
        self.who = np.repeat([w.index for w in warps], 32)

    @property
    def at(self) -> int:
        return self.cluster.at

    @at.setter
    def at(self, index: int):
        self.cluster.at = index

    @property
    def name(self) -> str:
        return self.warps[0].name

    def _wide(self, values: np.ndarray) -> np.ndarray:
        """One value a lane, from one a lane or one for all."""
        if values.size == self.size:
            return values
        return np.broadcast_to(values, (self.size,))

    def active(self, mask: np.ndarray | None) -> np.ndarray:
        """Executing lanes, a row for each warp."""
        if mask is None:
            return np.ones((len(self.warps), 32), bool)
        return self._wide(mask).reshape(-1, 32)

    def clock(self) -> np.ndarray:
        self.cluster.steps += 1
        return np.full(self.size, self.cluster.steps, u64)

    # --- warp-wide instructions (PTX ISA 9.7.13.9, 9.7.9.6, 9.7.13.10, ...) ---

    def _agree(self, members: np.ndarray, mask: np.ndarray | None, what: str) -> np.ndarray:
        """Checks that the lanes of `membermask` are the executing ones; returns the latter."""
        active = self.active(mask)
        if mask is None and members.size == 1 and members[0] == 0xFFFFFFFF:
            return active
        named = self._wide(members).reshape(-1, 32)
        for i, warp in enumerate(self.warps):
            if not active[i].any():
                continue
            executing = named[i][active[i]]
            member = (executing[0] >> _LANES & u32(1)).astype(bool)
            if (
                (executing != executing[0]).any()
                or (member & warp.alive & ~active[i]).any()
                or (active[i] & ~member).any()
            ):
                self.cluster.fault(
                    Divergence,
                    f"{what}: membermask names lanes {np.flatnonzero(member).tolist()}, lanes "
                    f"{np.flatnonzero(active[i]).tolist()} execute it",
                    actor=warp.name,
                )
        return active

    def warp_sync(self, members, mask):
        active = self._agree(members, mask, "bar.warp.sync")
        for i, warp in enumerate(self.warps):
            if active[i].any():
                warp.sync_lanes()

    def _meet(self, members, mask, what: str) -> np.ndarray:
        """The lanes that a collective instruction brings together."""
        active = self._agree(members, mask, what)
        for i, warp in enumerate(self.warps):
            if active[i].any():
                warp.meet()
        return active

    def elect(self, leader, chosen, members, mask):
        """elect.sync: the emulator elects the lowest executing lane."""
        active = self._meet(members, mask, "elect.sync")
        first = active.argmax(axis=1)
        out = np.zeros_like(active)
        out[np.arange(len(first)), first] = True
        where = True if mask is None else mask
        if leader is not None:
            np.copyto(leader, np.repeat(first, 32).astype(u32), where=where)
        np.copyto(chosen, (out & active).reshape(-1), where=where)

    def shfl(self, mode, target, ok, source, b, c, members, mask):
        """shfl.sync (PTX ISA 9.7.9.6): c holds the segment mask and the clamp."""
        self._meet(members, mask, "shfl.sync")
        source = self._wide(source)
        b, c = b.astype(np.int64) & 31, c.astype(np.int64)
        segment, clamp = (c >> 8) & 31, c & 31
        highest = (self.lane & segment) | (clamp & ~segment)
        if mode == "up":
            lane = self.lane - b
            inside = lane >= highest
        elif mode == "down":
            lane = self.lane + b
            inside = lane <= highest
        elif mode == "bfly":
            lane = self.lane ^ b
            inside = lane <= highest
        else:
            lane = (self.lane & segment) | (b & ~segment)
            inside = lane <= highest
        inside = self._wide(inside)
        lane = np.where(inside, lane, self.lane) + np.arange(self.size) // 32 * 32
        where = True if mask is None else mask
        if mask is not None and (~mask[lane] & mask).any():
            self.cluster.fault(
                Divergence, "shfl.sync reads from a lane that does not execute it", actor=self.name
            )
        np.copyto(target, source[lane], where=where)
        if ok is not None:
            np.copyto(ok, inside, where=where)

    def vote(self, mode, target, predicate, members, mask):
        active = self._meet(members, mask, "vote.sync")
        given = self._wide(predicate).reshape(-1, 32)
        if mode == "any":
            result = (given & active).any(axis=1)
        elif mode == "all":
            result = (given | ~active).all(axis=1)
        elif mode == "uni":
            result = (given | ~active).all(axis=1) | ~(given & active).any(axis=1)
        else:
            result = _pack(given & active)
        np.copyto(target, np.repeat(result, 32), where=True if mask is None else mask)

    def activemask(self, target, mask):
        result = np.repeat(_pack(self.active(mask)), 32)
        np.copyto(target, result, where=True if mask is None else mask)

    def match_any(self, target, value, members, mask):
        active = self._meet(members, mask, "match.sync")
        rows = self._wide(value).reshape(-1, 32)
        same = (rows[:, :, None] == rows[:, None, :]) & active[:, None, :]
        result = _pack(same.reshape(-1, 32))
        np.copyto(target, result, where=True if mask is None else mask)

    def redux(self, operation, target, value, members, mask):
        active = self._meet(members, mask, "redux.sync")
        rows = self._wide(value).reshape(-1, 32)
        for i in range(len(self.warps)):
            if active[i].any():
                chosen = rows[i][active[i]]
                result = _REDUCTIONS[operation].reduce(chosen, dtype=chosen.dtype)
                np.copyto(target[32 * i : 32 * i + 32], result, where=active[i])

    # --- addresses ---

    def _addresses(self, address, offset, mask):
        """(lanes or None for all, their 64-bit addresses)."""
        full = address.astype(u64) + u64(offset % 2**64)
        if address.dtype == u32:
            full &= u64(0xFFFFFFFF)
        full = self._wide(full)
        if mask is None:
            return None, full
        lanes = np.flatnonzero(self._wide(mask))
        return lanes, full[lanes]

    def _spaces(self, space: str, lanes, addresses):
        """Splits lanes by state space: (space, lanes, addresses, positions or None for all)."""
        if space != "generic":
            if space.startswith("shared"):
                addresses = addresses & _LOW_MASK
            yield space, lanes, addresses, None
            return
        windows = addresses >> u64(WINDOW_SHIFT)
        if (windows == windows[0]).all():
            name = _SPACE_OF_WINDOW[int(windows[0])]
            kept = addresses if name in ("global", "param") else addresses & _LOW_MASK
            yield name, lanes, kept, None
            return
        every = np.arange(self.size) if lanes is None else lanes
        for window in np.unique(windows):
            here = np.flatnonzero(windows == window)
            name = _SPACE_OF_WINDOW[int(window)]
            kept = addresses[here]
            if name not in ("global", "param"):
                kept = kept & _LOW_MASK
            yield name, every[here], kept, here

    def _aligned(self, addresses, nbytes: int, what: str):
        if (addresses & u64(nbytes - 1)).any():
            bad = int(addresses[(addresses & u64(nbytes - 1)) != 0][0])
            self.cluster.fault(
                Misaligned,
                f"{what} of {nbytes} bytes at {bad:#x} is not aligned to its size",
                actor=self.name,
                offset=bad,
            )

    def _owners(self, space: str, addresses):
        """Splits shared addresses by CTA: (cta, offsets, positions or None for all)."""
        offsets = (addresses & u64(OFFSET_MASK)).astype(np.int64)
        ranks = (addresses >> u64(RANK_SHIFT)).astype(np.int64)
        if (ranks == self.cta.rank).all():
            yield self.cta, offsets, None
            return
        for rank in np.unique(ranks):
            if rank >= self.cluster.size or (space == "shared::cta" and rank != self.cta.rank):
                bad = int(addresses[ranks == rank][0])
                self.cluster.fault(
                    OutOfBounds,
                    f"{space} address {bad:#x} is not in the shared memory of {self.cta.name}",
                    actor=self.name,
                    offset=bad,
                )
            cta = self.cluster.ctas[rank]
            self._alive(cta)
            here = np.flatnonzero(ranks == rank)
            yield cta, offsets[here], here

    def _alive(self, cta: Cta):
        if cta.exited:
            message = f"access to the shared memory of {cta.name}, which has ended"
            self.cluster.fault(ExitedCta, message, actor=self.name, goes_on=False)

    def _access(self, lanes, here, repeat: int) -> Access:
        """Who accesses shared memory: `repeat` granules for each of some lanes."""
        lane = np.arange(self.size) if lanes is None else lanes
        if here is not None:
            lane = lane[here]
        if len(self.warps) == 1:
            return self._access_of_warp(self.warps[0], lane, repeat)
        who = agents = self.who[lane]
        if len(lane) < self.size:
            words = np.zeros(self.size, bool)
            words[lane] = True
            bits = np.packbits(words, bitorder="little").view(u32)
            alone = (bits & (bits - u32(1))) == 0
            agents = np.where(alone[lane // 32], who + self.cluster.first_single, who)
            for warp, some, single in zip(self.warps, bits.tolist(), alone.tolist(), strict=True):
                if single:
                    warp.acted_alone |= some
                else:
                    warp.acted |= some
        else:
            for warp in self.warps:
                warp.acted = EVERY_LANE
        if any(w.split for w in self.warps):
            who = np.concatenate([w.rows for w in self.warps])[lane]
        epoch = np.array([w.epoch for w in self.warps])[lane // 32]
        found = (who, agents, lane % 32, epoch)
        if repeat > 1:
            found = tuple(np.repeat(x, repeat) for x in found)
        return Access(*found)

    def _access_of_warp(self, warp: Warp, lane, repeat: int) -> Access:
        agent = warp.index
        if len(lane) == 32:
            warp.acted = EVERY_LANE
        elif len(lane) == 1 and warp.alive.sum() > 1:
            agent = warp.single
            warp.acted_alone |= 1 << int(lane[0])
        else:
            warp.acted |= int(np.bitwise_or.reduce(np.left_shift(1, lane)))
        who = warp.rows[lane] if warp.split else warp.index
        if repeat > 1:
            lane = np.repeat(lane, repeat)
            who = np.repeat(who, repeat) if warp.split else who
        return Access(who, agent, lane, warp.epoch)

    def _access_together(self, warp: Warp) -> Access:
        """A collective access by all lanes of a warp, at which they meet."""
        warp.meet()
        return Access(warp.index, warp.index, ALL_LANES, warp.epoch)

    # --- loads and stores ---

    def load(self, space, address, offset, itemsize, vector, targets, signed, strong, mask):
        """ld: each lane loads `vector` elements of `itemsize` bytes into `targets`."""
        if mask is not None and not mask.any():
            return
        lanes, addresses = self._addresses(address, offset, mask)
        nbytes = itemsize * vector
        self._aligned(addresses, nbytes, "load")
        data = None
        for name, some, kept, here in self._spaces(space, lanes, addresses):
            part = self._gather(name, some, kept, itemsize, vector, strong)
            if here is None:
                data = part
            else:
                if data is None:
                    data = np.empty((len(addresses), vector), UNSIGNED[itemsize])
                data[here] = part
        assert data is not None
        if strong is not None:
            self._synchronize("read", lanes, addresses, strong)
        if signed:
            data = data.view(f"i{itemsize}")
        for j, target in enumerate(targets):
            if target is None:
                continue
            if mask is None:
                np.copyto(target, data[:, j], casting="unsafe")
            else:
                target[lanes] = data[:, j].astype(target.dtype)

    def _gather(self, space, lanes, addresses, itemsize, vector, strong) -> np.ndarray:
        nbytes = itemsize * vector
        if space.startswith("shared"):
            out = None
            for cta, offsets, here in self._owners(space, addresses):
                shared = cta.shared
                shared.bounds(offsets, nbytes)
                bad = None
                if shared.checked:
                    access = self._access(lanes, here, max(1, nbytes // shared.granule))
                    bad = shared.read(access, shared.granules(offsets, nbytes))
                part = _take(shared.views[itemsize], offsets // itemsize, vector)
                if bad is not None and self.cluster.launch.perturbs:
                    poison = np.full(itemsize, self.cluster.launch.poison, np.uint8)
                    part[bad.reshape(len(offsets), -1).any(axis=1)] = poison.view(part.dtype)
                if here is None:
                    return part
                if out is None:
                    out = np.empty((len(addresses), vector), UNSIGNED[itemsize])
                out[here] = part
            return out
        if space == "local":
            rows = self.low + (np.arange(self.size) if lanes is None else lanes)
            offsets = addresses.astype(np.int64)
            self._local_bounds(offsets, nbytes)
            columns = offsets[:, None] + np.arange(nbytes)
            return np.ascontiguousarray(self.cta.local[rows[:, None], columns]).view(
                UNSIGNED[itemsize]
            )
        if space == "param":
            block = self.cluster.launch.parameter_block
            offsets = (addresses & _LOW_MASK if addresses[0] >= PARAM_WINDOW else addresses).astype(
                np.int64
            )
            if (offsets < 0).any() or (offsets + nbytes > block.size).any():
                self.cluster.fault(OutOfBounds, "load outside of the kernel's parameters")
            return block[offsets[:, None] + np.arange(nbytes)].view(UNSIGNED[itemsize])
        self.cluster.report.generic_bytes_loaded += len(addresses) * nbytes
        out = None
        for region, offsets, here in self._regions(addresses, nbytes, False):
            self._check_global_read(region, offsets, nbytes, _at(lanes, here), strong)
            elements = None if region.base % itemsize else region.elements(itemsize)
            if elements is not None:
                part = _take(elements, offsets // itemsize, vector)
            else:
                columns = offsets[:, None] + np.arange(nbytes)
                part = region.bytes[columns].view(UNSIGNED[itemsize])
            if here is None:
                return part
            if out is None:
                out = np.empty((len(addresses), vector), UNSIGNED[itemsize])
            out[here] = part
        return out

    def store(self, space, address, offset, itemsize, vector, sources, strong, mask):
        """st: each lane stores `vector` elements of `itemsize` bytes."""
        if mask is not None and not mask.any():
            return
        lanes, addresses = self._addresses(address, offset, mask)
        nbytes = itemsize * vector
        self._aligned(addresses, nbytes, "store")
        data = np.empty((len(addresses), vector), UNSIGNED[itemsize])
        for j, source in enumerate(sources):
            full = self._wide(source)
            data[:, j] = (full if lanes is None else full[lanes]).astype(UNSIGNED[itemsize])
        for name, some, kept, here in self._spaces(space, lanes, addresses):
            part = data if here is None else data[here]
            self._scatter(name, some, kept, itemsize, part, strong)
        if strong is not None:
            self._synchronize("write", lanes, addresses, strong)

    def _scatter(self, space, lanes, addresses, itemsize, data, strong):
        vector = data.shape[1]
        nbytes = itemsize * vector
        if space.startswith("shared"):
            for cta, offsets, here in self._owners(space, addresses):
                shared = cta.shared
                shared.bounds(offsets, nbytes)
                if shared.checked:
                    access = self._access(lanes, here, max(1, nbytes // shared.granule))
                    shared.write(access, shared.granules(offsets, nbytes))
                part = data if here is None else data[here]
                index = offsets // itemsize
                if vector == 1:
                    shared.views[itemsize][index] = part[:, 0]
                else:
                    shared.views[itemsize][index[:, None] + np.arange(vector)] = part
            return
        if space == "local":
            rows = self.low + (np.arange(self.size) if lanes is None else lanes)
            offsets = addresses.astype(np.int64)
            self._local_bounds(offsets, nbytes)
            columns = offsets[:, None] + np.arange(nbytes)
            raw = np.ascontiguousarray(data).view(np.uint8).reshape(len(addresses), nbytes)
            self.cta.local[rows[:, None], columns] = raw
            return
        if space != "global":
            self.cluster.fault(OutOfBounds, f"store to the {space} state space")
        self.cluster.report.generic_bytes_stored += len(addresses) * nbytes
        if self.cluster.program.edits_tensor_maps:
            for line in np.unique(addresses & ~u64(127)).tolist():
                version = self.cluster.map_versions.setdefault(int(line), [0, False])
                version[0] += 1
                version[1] = False
        raw = np.ascontiguousarray(data).view(np.uint8).reshape(len(addresses), nbytes)
        for region, offsets, here in self._regions(addresses, nbytes, True):
            columns = offsets[:, None] + np.arange(nbytes)
            self._log_global_store(region, columns, _at(lanes, here), strong)
            region.bytes[columns] = raw if here is None else raw[here]

    def _local_bounds(self, offsets, nbytes):
        if (offsets < 0).any() or (offsets + nbytes > self.cta.local.shape[1]).any():
            self.cluster.fault(OutOfBounds, "access outside of local memory", actor=self.name)

    # --- global memory ---

    def _regions(self, addresses, nbytes: int, write: bool):
        """Splits global addresses by buffer: (region, offsets, positions or None for all)."""
        memory = self.cluster.memory
        find = memory.find_writable if write else memory.find
        low, high = int(addresses.min()), int(addresses.max())
        region = find(low, nbytes)
        if high + nbytes <= region.end:
            yield region, (addresses - u64(region.base)).astype(np.int64), None
            return
        remaining = np.ones(len(addresses), bool)
        while remaining.any():
            region = find(int(addresses[remaining][0]), nbytes)
            inside = (addresses >= u64(region.base)) & (addresses < u64(region.end))
            here = np.flatnonzero(inside & remaining)
            find(int(addresses[here].max()), nbytes)
            yield region, (addresses[here] - u64(region.base)).astype(np.int64), here
            remaining[here] = False

    def _check_global_read(self, region: Region, offsets, nbytes: int, lanes, strong):
        """Bytes that another cluster stored in this launch may not be there yet."""
        if self.cluster.launch.logs_reads:
            number = self.cluster.launch.number + 1
            region.log_readers()[offsets[:, None] + np.arange(nbytes)] = number
        if region.writers is None or not self.cluster.check_races:
            return
        stamps = region.writers[offsets[:, None] + np.arange(nbytes)]
        foreign = self.cluster.order.foreign(self.cluster, stamps).any(axis=1)
        if foreign.any():
            for warp, row, here in self._by_row(lanes, foreign):
                check = self.cluster.launch.check_readers
                check(warp, row, region, stamps[here], strong is not None)

    def _log_global_store(self, region: Region, columns, lanes, strong):
        """Marks bytes [lanes, bytes of each] as stored by their warps."""
        log, order = region.log(), self.cluster.order
        if region.readers is not None:
            for warp, row, here in self._by_row(lanes, np.ones(len(columns), bool)):
                readers = region.readers[columns[here]]
                self.cluster.launch.check_overlap(warp, row, region, readers)
        previous = log[columns]
        if previous.any():
            other = order.of_others(self.cluster, self.cta.rank, previous)
            for warp, row, here in self._by_row(lanes, other.any(axis=1)):
                bad = other[here]
                self.cluster.launch.check_overwrite(
                    warp, row, region, columns[here][bad], previous[here][bad], strong is not None
                )
        stamps = np.array([order.stamp(warp, strong is not None) for warp in self.warps], u32)
        if lanes is None:
            log[columns] = np.repeat(stamps, 32)[:, None]
            for warp in self.warps:
                warp.acted_global = EVERY_LANE
        else:
            log[columns] = stamps[lanes // 32, None]
            for i, warp in enumerate(self.warps):
                own = lanes[lanes // 32 == i] % 32
                if own.size:
                    warp.acted_global |= int(np.bitwise_or.reduce(np.left_shift(1, own)))

    def _by_row(self, lanes, chosen: np.ndarray):
        """Splits accesses by row of clocks: (warp, row, their positions)."""
        positions = np.flatnonzero(chosen)
        lane = positions if lanes is None else lanes[positions]
        for i in np.unique(lane // 32).tolist():
            warp = self.warps[i]
            rows = warp.rows[lane % 32]
            for row in np.unique(rows[lane // 32 == i]).tolist():
                yield warp, row, positions[(lane // 32 == i) & (rows == row)]

    def _synchronize(self, what: str, lanes, addresses, how: Semantics, *, adds: bool = False):
        """What strong accesses order (order.py), by warp and address."""
        order = self.cluster.order
        lane = np.arange(self.size) if lanes is None else lanes
        for i, warp in enumerate(self.warps):
            own = lane // 32 == i
            for address in np.unique(addresses[own]).tolist():
                mask = np.zeros(32, bool)
                mask[lane[own & (addresses == address)] % 32] = True
                place = self._place(int(address))
                if what == "read":
                    order.read(warp, mask, place, how)
                else:
                    order.write(warp, mask, place, how, adds=adds)
                    warp.tick()

    def _place(self, address: int) -> tuple[int, int]:
        """Where strong accesses meet: global memory, or shared memory of a cluster's CTA."""
        low = address & int(_LOW_MASK)
        return (0, address & ~3) if low >> 32 else (self.cluster.id, low & ~3)

    def atomic(
        self, space, operation, kind, vector, targets, address, offset, values, strong, mask
    ):
        """atom and red (PTX ISA 9.7.13.6, 9.7.13.7): lane by lane, element by element."""
        lanes, addresses = self._addresses(address, offset, mask)
        if not len(addresses):
            return
        every = np.arange(self.size) if lanes is None else lanes
        itemsize = np.dtype(DTYPES[kind]).itemsize
        self._aligned(addresses, itemsize * vector, "atomic access")
        operands = [self._wide(v) for v in values]
        combine = _ATOMICS[operation]
        for name, some, kept, _ in self._spaces(space, every, addresses):
            if not name.startswith("shared") and name != "global":
                raise Unsupported(f"atomic access to the {name} state space")
            for lane, place in zip(some.tolist(), kept, strict=True):
                for j in range(vector):
                    where = np.array([place + u64(j * itemsize)])
                    cell = self._cell(name, lane, where, itemsize, strong).view(DTYPES[kind])
                    given = operands[j : j + 1] if vector > 1 else operands
                    old = cell[0]
                    cell[0] = combine(old, *(v[lane] for v in given))
                    if targets:
                        targets[j][lane] = old
                if name == "global" or strong.order != "relaxed" or self.warps[lane // 32].fenced:
                    one, at = np.array([lane]), np.array([place])
                    if targets:
                        self._synchronize("read", one, at, strong)
                    self._synchronize("write", one, at, strong, adds=True)

    def _cell(self, space, lane, place, itemsize, strong):
        if space == "global":
            for region, offsets, _ in self._regions(place, itemsize, True):
                one = np.array([lane])
                self._check_global_read(region, offsets, itemsize, one, strong)
                self._log_global_store(region, offsets[:, None] + np.arange(itemsize), one, strong)
                start = int(offsets[0])
                return region.bytes[start : start + itemsize]
        for cta, offsets, _ in self._owners(space, place):
            cta.shared.bounds(offsets, itemsize)
            warp = self.warps[lane // 32]
            warp.acted |= 1 << lane % 32
            access = Access(warp.rows[lane % 32], warp.index, ALL_LANES, warp.epoch)
            cta.shared.atomic(access, cta.shared.granules(offsets, itemsize))
            start = int(offsets[0])
            return cta.shared.bytes[start : start + itemsize]
        raise AssertionError("an address belongs to one buffer")

    # --- matrices ---

    def _matrix_rows(self, i: int, address, offset, count: int):
        """Offsets of the 16-byte rows that lanes 0 to 8*count-1 of warp `i` give."""
        lanes = self._wide(address)[32 * i : 32 * i + 8 * count]
        places = (lanes.astype(u64) + u64(offset % 2**64)) & _LOW_MASK
        if address.dtype == u32:
            places &= u64(0xFFFFFFFF)
        self._aligned(places, 16, "matrix row")
        owners = list(self._owners("shared::cta", places))
        offsets = owners[0][1]
        self.cta.shared.bounds(offsets, 16)
        return offsets

    def _whole_warps(self, mask, what: str):
        if mask is not None and not self._wide(mask).all():
            self.cluster.fault(Divergence, f"{what} by a diverged warp", actor=self.name)

    def store_matrix(self, address, offset, sources, transposed, mask):
        """stmatrix: thread t of a warp holds row t/4, columns 2*(t%4) and the next."""
        if mask is not None and not np.any(mask):
            return
        self._whole_warps(mask, "stmatrix")
        shared = self.cta.shared
        for i, warp in enumerate(self.warps):
            offsets = self._matrix_rows(i, address, offset, len(sources))
            lanes = slice(32 * i, 32 * i + 32)
            tiles = np.stack(
                [
                    np.ascontiguousarray(self._wide(s)[lanes]).view(np.uint16).reshape(8, 8)
                    for s in sources
                ]
            )
            if transposed:
                tiles = tiles.transpose(0, 2, 1)
            shared.write(self._access_together(warp), shared.granules(offsets, 16))
            rows = np.ascontiguousarray(tiles).view(np.uint8).reshape(-1, 16)
            shared.chunks[offsets // 16] = rows

    def load_matrix(self, address, offset, targets, transposed, mask):
        """ldmatrix: the inverse of stmatrix."""
        if mask is not None and not np.any(mask):
            return
        self._whole_warps(mask, "ldmatrix")
        shared = self.cta.shared
        for i, warp in enumerate(self.warps):
            offsets = self._matrix_rows(i, address, offset, len(targets))
            shared.read(self._access_together(warp), shared.granules(offsets, 16))
            tiles = shared.chunks[offsets // 16].view(np.uint16).reshape(len(targets), 8, 8)
            if transposed:
                tiles = tiles.transpose(0, 2, 1)
            for tile, target in zip(tiles, targets, strict=True):
                packed = np.ascontiguousarray(tile).view(u32).reshape(32)
                target[32 * i : 32 * i + 32] = packed

    def move_matrix(self, target, source, mask):
        """movmatrix.trans: thread t holds row t/4, columns 2*(t%4) and the next."""
        self._whole_warps(mask, "movmatrix")
        for i, warp in enumerate(self.warps):
            warp.meet()
            rows = slice(32 * i, 32 * i + 32)
            tile = np.ascontiguousarray(self._wide(source)[rows]).view(np.uint16).reshape(8, 8)
            target[rows] = np.ascontiguousarray(tile.T).view(u32).reshape(32)

    def multiply_fragments(self, kind, d, a, b, c, mask):
        """mma.sync m16n8k8 and m16n8k16: each warp multiplies what its registers hold.

        PTX ISA, "Matrix Fragments for mma.m16n8k16 with floating point type": register r of A in
        thread t holds row t/4 + 8*(r%2), columns 8*(r/2) + 2*(t%4) and the next; of B column t/4,
        rows 8*r + 2*(t%4) and the next; of C and D as of A, an element a register.
        """
        if mask is not None and not np.any(mask):
            return
        self._whole_warps(mask, "mma.sync")
        wide = alu.from_bf16 if kind == "bf16" else alu.from_f16
        for i, warp in enumerate(self.warps):
            warp.meet()
            rows = slice(32 * i, 32 * i + 32)

            def halves(registers, rows=rows):
                held = np.stack([self._wide(r)[rows] for r in registers])
                values = wide(np.ascontiguousarray(held).view(np.uint16)).astype(np.float64)
                return values.reshape(len(registers), 8, 4, 2)  # register, t / 4, t % 4, element

            left = halves(a).reshape(-1, 2, 8, 4, 2).transpose(1, 2, 0, 3, 4).reshape(16, -1)
            right = halves(b).transpose(0, 2, 3, 1).reshape(-1, 8)
            old = np.stack([self._wide(r)[rows] for r in c]).reshape(2, 2, 8, 4)
            old = old.transpose(0, 2, 3, 1).reshape(16, 8)
            new = (left @ right + old).astype(np.float32).reshape(2, 8, 4, 2)
            new[np.isnan(new)] = alu.CANONICAL_NAN
            for register, values in zip(d, new.transpose(0, 3, 1, 2).reshape(4, 32), strict=True):
                register[rows] = values
            self.cluster.report.mma += 1
            self.cluster.report.products += 16 * 8 * left.shape[1]


def _at(lanes, here):
    """Some of some lanes."""
    if here is None:
        return lanes
    return here if lanes is None else lanes[here]


def _pack(rows: np.ndarray) -> np.ndarray:
    """Rows of 32 booleans to 32-bit masks."""
    return np.packbits(rows, axis=1, bitorder="little").view(u32).reshape(-1)


def _take(elements: np.ndarray, index: np.ndarray, vector: int) -> np.ndarray:
    if vector == 1:
        return elements[index][:, None]
    return elements[index[:, None] + np.arange(vector)]


_REDUCTIONS = {
    "add": np.add, "min": np.minimum, "max": np.maximum, "and": np.bitwise_and,
    "or": np.bitwise_or, "xor": np.bitwise_xor,
}  # fmt: skip

_ATOMICS = {
    "add": lambda old, x: old + x,
    "min": min,
    "max": max,
    "and": lambda old, x: old & x,
    "or": lambda old, x: old | x,
    "xor": lambda old, x: old ^ x,
    "exch": lambda old, x: x,
    "cas": lambda old, compare, x: x if old == compare else old,
    "inc": lambda old, x: old.dtype.type(0) if old >= x else old.dtype.type(old + 1),
    "dec": lambda old, x: x if old == 0 or old > x else old.dtype.type(old - 1),
}
