"""Bulk asynchronous copies: tensor boxes and plain ranges (PTX ISA 9.7.9.25 and 9.7.9.27).

Loads into shared memory complete on an mbarrier; stores and reductions belong to bulk groups of
the warp (of a thread, in the PTX ISA: kernels issue them from one elected lane). A copy executes
when the schedule says: a load at any time from its issue on, a store's read of shared memory no
later than the `wait_group.read`, its write no later than the `wait_group`, that waits for it.

Tensor boxes lie densely in shared memory, innermost dimension first; swizzling XORs bits 4 and up
of the absolute shared address with bits 7 and up. Out-of-bounds elements are zeros on a load, and
count as transferred; on a store they are clipped.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import numpy as np

from . import cpasync
from .errors import (
    DescriptorError,
    DoubleWrite,
    ExitedCta,
    Misaligned,
    OutOfBounds,
    UnknownInstruction,
    Unsupported,
)
from .machine import Cta, Warp
from .mbarrier import MBarrier, barrier_at, shared_place
from .parser import split_operands
from .special import Issue, Special, register_decoder, tensor_map_at
from .tensormap import DecodedMap

_XOR = {0: 0, 32: 1, 64: 3, 128: 7}


@functools.lru_cache(maxsize=4096)
def swizzled_chunks(offset: int, nbytes: int, swizzle: int) -> np.ndarray:
    """Indices of the 16-byte chunks of shared memory that hold a box written at `offset`."""
    addresses = offset + np.arange(0, nbytes, 16)
    addresses ^= ((addresses >> 7) & _XOR[swizzle]) << 4
    return addresses >> 4


class BulkStore:
    """A store or reduction from shared memory, in its two steps."""

    def __init__(self, cta: Cta, chunks: np.ndarray, put: Callable[[np.ndarray], None], at: int):
        self.cta, self.chunks, self.put, self.at = cta, chunks, put, at
        self.data: np.ndarray | None = None
        self.written = False

    def read(self):
        """Reads the source; shared memory may be reused afterwards."""
        if self.data is None:
            self.data = self.cta.shared.chunks[self.chunks].reshape(-1)

    def write(self):
        """Writes global memory."""
        if not self.written:
            self.read()
            self.cta.cluster.at = self.at
            self.put(self.data)
            self.written = True


def close_bulk_groups(warp: Warp, mask: np.ndarray | None, closed: int, read_only: bool):
    """Retires the first `closed` groups of a warp, which some of its lanes wait for."""
    kept = []
    for number, stores in warp.bulk_groups:
        if number <= closed:
            for store in stores:
                store.read() if read_only else store.write()
        if number > closed or not all(store.written for store in stores):
            kept.append((number, stores))
    warp.bulk_groups = kept
    warp.acquire_agent(mask, warp.cluster.first_bulk + warp.index, closed)


@register_decoder("cp")
def decode_copy(instruction, operands) -> Special:
    """cp.async, cp.reduce.async, their groups and their arrivals."""
    mods = instruction.mods
    if "bulk" not in mods:
        return cpasync.decode(instruction, operands)
    if "commit_group" in mods:
        return BulkCommit(instruction, operands)
    if "wait_group" in mods:
        return BulkWait(instruction, operands)
    if "prefetch" in mods:
        return BulkPrefetch(instruction, operands)
    spaces = [m for m in mods if m in ("shared::cluster", "shared::cta", "global")]
    if spaces == ["global", "shared::cta"]:
        return BulkStoreInstruction(instruction, operands)
    if spaces in (["shared::cluster", "global"], ["shared::cta", "global"]):
        return BulkLoad(instruction, operands)
    raise UnknownInstruction(f"{instruction.opcode} is not known")


class BulkCommit(Special):
    def __init__(self, instruction, operands):
        super().__init__(instruction, operands)
        operands.allow("async", "bulk", "commit_group")

    def execute(self, issue: Issue) -> bool:
        warp = issue.warp
        warp.bulk_committed += 1
        warp.bulk_groups.append((warp.bulk_committed, warp.bulk_open))
        warp.bulk_open = []
        return True


class BulkWait(Special):
    """cp.async.bulk.wait_group[.read] n: all but the last n groups are done (have been read)."""

    def __init__(self, instruction, operands):
        super().__init__(instruction, operands)
        operands.allow("async", "bulk", "wait_group", "read")
        self.allowed = int(operands.text(0))
        self.read_only = "read" in instruction.mods

    def execute(self, issue: Issue) -> bool:
        warp = issue.warp
        at = issue.cluster.at
        closed = warp.bulk_committed - self.allowed
        close_bulk_groups(warp, issue.mask, closed, self.read_only)
        issue.cluster.at = at
        return True


class BulkPrefetch(Special):
    """cp.async.bulk.prefetch: a hint."""

    def __init__(self, instruction, operands):
        super().__init__(instruction, operands)
        operands.allow("async", "bulk", "prefetch", "tensor", *_RANKS, "L2", "global", "tile")
        if "tensor" in instruction.mods:
            _tensor_operand(operands, 0)
        else:
            operands.location(0)

    def execute(self, issue: Issue) -> bool:
        return True


def _tensor_operand(operands, index: int):
    """`[map, {c0, c1, ...}]` as functions: the map's address, the coordinates."""
    text = operands.text(index)
    base, coordinates = split_operands(text.strip("[]"))
    address = operands.value(base, "u64")
    values = [operands.value(c, "s32") for c in split_operands(coordinates.strip("{}"))]
    return address, values


class _Transfer(Special):
    """What loads and stores share: tensor or range, and the shared memory side."""

    def _decode_form(self, instruction, operands, extra: tuple[str, ...]):
        mods = instruction.mods
        self.tensor = "tensor" in mods
        self.tile_rank = next((int(m[0]) for m in mods if m in _RANKS), None)
        operands.allow(
            "async", "bulk", "tensor", *_RANKS, "tile", "shared::cluster", "shared::cta", "global",
            "L2::cache_hint", *extra,
        )  # fmt: skip

    def _map(self, issue: Issue, lane: int):
        """The tensor map and the coordinates that a lane gives."""
        address = int(issue.value(self.map)[lane])
        decoded = tensor_map_at(issue, address)
        coordinates = tuple(int(issue.value(c)[lane]) for c in self.coordinates)
        if decoded.rank != len(coordinates) or decoded.rank != self.tile_rank:
            issue.fault(
                DescriptorError,
                f"a tensor map of rank {decoded.rank} with {len(coordinates)} coordinates",
            )
        return decoded, coordinates

    def _check_offset(self, issue: Issue, offset: int):
        alignment = 128 if self.tensor else 16
        if offset % alignment:
            issue.fault(
                Misaligned,
                f"shared memory offset {offset:#x} of a bulk copy is not {alignment}-byte aligned",
                offset=offset,
            )

    def _range(self, issue: Issue, address: int, nbytes: int):
        if address % 16 or nbytes % 16 or nbytes <= 0:
            issue.fault(
                Misaligned,
                f"a bulk copy of {nbytes} bytes at {address:#x}: both must be multiples of 16",
                offset=address,
            )


_RANKS = ("1d", "2d", "3d", "4d", "5d")


class BulkLoad(_Transfer):
    """cp.async.bulk[.tensor] from global to shared memory, of one or several CTAs."""

    def __init__(self, instruction, operands):
        super().__init__(instruction, operands)
        self._decode_form(
            instruction, operands, ("mbarrier::complete_tx::bytes", "multicast::cluster")
        )
        self.target = operands.location(0)
        if self.tensor:
            self.map, self.coordinates = _tensor_operand(operands, 1)
            following = 2
        else:
            self.source = operands.location(1)
            self.size = operands.value(2, "u32")
            following = 3
        self.barrier = operands.location(following)
        multicast = "multicast::cluster" in instruction.mods
        self.ctas = operands.value(following + 1, "u16") if multicast else None

    def execute(self, issue: Issue) -> bool:
        for lane in issue.lanes():
            self._issue_lane(issue, lane)
        return True

    def _issue_lane(self, issue: Issue, lane: int):
        cluster, warp = issue.cluster, issue.warp
        rank, offset = shared_place(int(issue.value(self.target)[lane]))
        barrier_rank, barrier_offset = shared_place(int(issue.value(self.barrier)[lane]))
        self._check_offset(issue, offset)
        nbytes, swizzle, fetch = self._source(issue, lane)
        ranks = [rank]
        if self.ctas is not None:
            bits = int(issue.value(self.ctas)[lane])
            ranks = [r for r in range(16) if bits >> r & 1]
        chunks = swizzled_chunks(offset, nbytes, swizzle)
        targets: list[tuple[Cta, MBarrier, object]] = []
        for r in ranks:
            if r >= cluster.size:
                issue.fault(OutOfBounds, f"a copy to cta{r}, which the cluster does not have")
            cta = cluster.ctas[r]
            if cta.exited:
                issue.fault(ExitedCta, f"a copy into {cta.name}, which has ended", goes_on=False)
            home = r if self.ctas is not None else barrier_rank
            if self.ctas is None and home != r:
                issue.fault(OutOfBounds, f"data goes to cta{r}, its mbarrier is in cta{home}")
            barrier = barrier_at(issue, home, barrier_offset)
            barrier.check_visible(issue, lane, asynchronous=True)
            span = cta.shared.span(offset, nbytes)
            cta.shared.check_lanes(warp, lane, span, "a bulk load", write=True)
            cta.shared.async_write(
                warp, lane, span, barrier.agent, barrier.clock + 1, "a bulk load"
            )
            token = object()
            barrier.in_flight.append(token)
            cta.shared.chunks[chunks] = cluster.launch.poison
            targets.append((cta, barrier, token))
        at = cluster.at
        cluster.report.tma_bytes_loaded += nbytes

        def complete():
            cluster.at = at
            data = fetch().reshape(-1, 16)
            for cta, barrier, token in targets:
                if cta.exited:
                    message = f"a bulk load arrives after {cta.name} has ended"
                    cluster.fault(ExitedCta, message, other=warp.name, goes_on=False)
                cta.shared.chunks[chunks] = data
                barrier.in_flight.remove(token)
                barrier.add_transactions(-nbytes, "a bulk load")
                barrier.complete_phase()

        if cluster.policy.completes_at_issue("load"):
            complete()
            cluster.at = at
        else:
            cluster.loads.append(complete)

    def _source(self, issue: Issue, lane: int) -> tuple[int, int, Callable[[], np.ndarray]]:
        """What a lane copies: bytes, swizzle, and how to fetch them later."""
        if self.tensor:
            decoded, coordinates = self._map(issue, lane)
            _check_box(issue, lane, decoded, coordinates)
            fetch = functools.partial(decoded.load, issue.cluster.memory, coordinates)
            return decoded.box_bytes, decoded.swizzle, fetch
        source = int(issue.value(self.source)[lane])
        nbytes = int(issue.value(self.size)[lane])
        self._range(issue, source, nbytes)
        return nbytes, 0, _range_of(issue, lane, source, nbytes)


def _check_box(issue: Issue, lane: int, decoded: DecodedMap, coordinates):
    """May the copy that a lane issues read this box?"""
    region = decoded.region(issue.cluster.memory, write=False)
    if issue.cluster.launch.logs_reads:
        clipped = decoded.clip(coordinates)
        if clipped:
            window = decoded.view_of(region, region.log_readers())
            window[clipped[0]] = issue.cluster.launch.number + 1
    if region.writers is not None and issue.cluster.check_races:
        clipped = decoded.clip(coordinates)
        if clipped:
            stamps = decoded.view(region, log=True)[clipped[0]]
            row = int(issue.warp.rows[lane])
            issue.cluster.launch.check_readers(issue.warp, row, region, stamps)


def _range_of(issue: Issue, lane: int, source: int, nbytes: int) -> Callable[[], np.ndarray]:
    """The bytes of a range, to be read later, after the same check."""
    region = issue.cluster.memory.find(source, nbytes, "bulk load")
    place = slice(source - region.base, source - region.base + nbytes)
    if issue.cluster.launch.logs_reads:
        region.log_readers()[place] = issue.cluster.launch.number + 1
    if region.writers is not None and issue.cluster.check_races:
        row = int(issue.warp.rows[lane])
        issue.cluster.launch.check_readers(issue.warp, row, region, region.writers[place])
    return lambda: region.bytes[place]


class BulkStoreInstruction(_Transfer):
    """cp[.reduce].async.bulk[.tensor] from shared to global memory."""

    def __init__(self, instruction, operands):
        super().__init__(instruction, operands)
        mods = instruction.mods
        self.reduction = None
        extra: tuple[str, ...] = ("bulk_group",)
        if "reduce" in mods:
            self.reduction = next((m for m in mods if m in _REDUCTIONS), None)
            if self.reduction is None:
                raise UnknownInstruction(f"{instruction.opcode} is not known")
            extra += ("reduce", self.reduction)
        self.range_type = None
        if "tensor" not in mods and self.reduction:
            if mods[-1] not in _RANGE_TYPES:
                raise UnknownInstruction(f"{instruction.opcode}: type .{mods[-1]}")
            self.range_type = _RANGE_TYPES[mods[-1]]
            extra += (mods[-1],)
        self._decode_form(instruction, operands, extra)
        if self.tensor:
            self.map, self.coordinates = _tensor_operand(operands, 0)
        else:
            self.target = operands.location(0)
            self.size = operands.value(2, "u32")
        self.source = operands.location(1)

    def execute(self, issue: Issue) -> bool:
        for lane in issue.lanes():
            self._issue_lane(issue, lane)
        return True

    def _issue_lane(self, issue: Issue, lane: int):
        cluster, warp, cta = issue.cluster, issue.warp, issue.cta
        source = int(issue.value(self.source)[lane])
        rank, offset = shared_place(source)
        if rank != cta.rank:
            issue.fault(OutOfBounds, "a bulk store reads the shared memory of another CTA")
        self._check_offset(issue, offset)
        swizzle = 0
        if self.tensor:
            decoded, coordinates = self._map(issue, lane)
            nbytes, swizzle = decoded.box_bytes, decoded.swizzle
            decoded.region(cluster.memory, write=True)
            put = functools.partial(_store_box, issue, decoded, coordinates, self.reduction)
        else:
            target = int(issue.value(self.target)[lane])
            nbytes = int(issue.value(self.size)[lane])
            self._range(issue, target, nbytes)
            cluster.memory.find_writable(target, nbytes, "bulk store")
            put = functools.partial(
                _store_range, issue, target, nbytes, self.reduction, self.range_type
            )
        span = cta.shared.span(offset, nbytes)
        if self.tensor:
            span = _stored(decoded, coordinates, offset, span, cta.shared.granule)
        agent = cluster.first_bulk + warp.index
        cta.shared.check_lanes(warp, lane, span, "a bulk store", write=False)
        row = warp.rows[lane]
        seen, proxied = cluster.seen[row], cluster.proxied[row]
        cta.shared.async_read(
            warp.name, seen, proxied, span, agent, warp.bulk_committed + 1, "a bulk store"
        )
        store = BulkStore(cta, swizzled_chunks(offset, nbytes, swizzle), put, cluster.at)
        if cluster.policy.completes_at_issue("store"):
            store.read()
        warp.bulk_open.append(store)
        cluster.report.tma_bytes_stored += nbytes


def _stored(decoded: DecodedMap, coordinates, offset: int, span: slice, granule: int):
    """The granules of a box whose elements lie in the tensor; the others are not stored."""
    inside = np.zeros((*decoded.box[:0:-1], decoded.inner_bytes), bool)
    clipped = decoded.clip(coordinates)
    if clipped is not None:
        inside[clipped[1]] = True
    if inside.all():
        return span
    chunks = swizzled_chunks(offset, decoded.box_bytes, decoded.swizzle)
    chunks = chunks[inside.reshape(-1, 16).any(axis=1)]
    return (chunks[:, None] * (16 // granule) + np.arange(16 // granule)).reshape(-1)


_REDUCTIONS = {"add": np.add, "min": np.minimum, "max": np.maximum}
_RANGE_TYPES = {
    "f32": np.float32, "u32": np.uint32, "s32": np.int32, "u64": np.uint64, "s64": np.int64,
}  # fmt: skip


def _combine(reduction: str, dtype, old: np.ndarray, new: np.ndarray) -> np.ndarray:
    """A reduction on bytes. Its order over the grid is that of the schedule."""
    left = np.ascontiguousarray(old).view(dtype)
    right = np.ascontiguousarray(new).view(dtype)
    if np.dtype(dtype).itemsize == 2:
        wide = _REDUCTIONS[reduction](left.astype(np.float32), right.astype(np.float32))
        return wide.astype(dtype).view(np.uint8)
    return _REDUCTIONS[reduction](left, right).view(np.uint8)


def _store_box(issue: Issue, decoded: DecodedMap, coordinates, reduction, data: np.ndarray):
    cluster = issue.cluster
    region = decoded.region(cluster.memory, write=True)
    clipped = decoded.clip(coordinates)
    if clipped is None:
        return
    tensor, box = clipped
    new = data.reshape(*decoded.box[:0:-1], decoded.inner_bytes)[box]
    view = decoded.view(region)[tensor]
    if reduction:
        if decoded.dtype in (np.uint8, np.uint16):
            raise Unsupported("a reduction of 8-bit or 16-bit integers")
        view[...] = _combine(reduction, decoded.dtype, view, new)
        return
    region.log()
    if region.readers is not None:
        readers = decoded.view_of(region, region.readers)[tensor]
        cluster.launch.check_overlap(issue.warp, issue.warp.index, region, readers)
    _log_store(issue, decoded.view(region, log=True)[tensor], f"box {coordinates} of {region}")
    view[...] = new


def _store_range(issue: Issue, target: int, nbytes: int, reduction, dtype, data: np.ndarray):
    region = issue.cluster.memory.find_writable(target, nbytes, "bulk store")
    start = target - region.base
    view = region.bytes[start : start + nbytes]
    if reduction:
        view[...] = _combine(reduction, dtype, view, data)
        return
    if region.readers is not None:
        readers = region.readers[start : start + nbytes]
        issue.cluster.launch.check_overlap(issue.warp, issue.warp.index, region, readers)
    _log_store(issue, region.log()[start : start + nbytes], f"{target:#x} of {region}")
    view[...] = data


def _log_store(issue: Issue, log: np.ndarray, what: str):
    """Marks bytes as stored by this CTA; none may have been stored before in this launch."""
    cluster = issue.cluster
    if cluster.check_races:
        order, warp, cta = cluster.order, issue.warp, issue.cta
        earlier = [order.stamps[n] for n in np.unique(log).tolist() if n]
        earlier = [s for s in earlier if not order.knows(cluster, warp.index, s, "acquired")]
        if earlier:
            cluster.fault(
                DoubleWrite,
                f"a bulk store to {what}: bytes of it were already stored in this launch",
                actor=warp.name + f" of block {issue.cta.block_index}",
                other=f"block {cluster.launch.block_of(earlier[0].linear)}",
                severity="warning" if all(s.linear == cta.linear for s in earlier) else None,
            )
    log[...] = cluster.order.stamp(issue.warp)
