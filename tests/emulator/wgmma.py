"""Warpgroup matrix multiply-accumulate (PTX ISA 9.7.15).

Four warps issue each wgmma together. It may execute at any time between its issue by the last of
them and the `wgmma.wait_group` that waits for it; until then nobody may touch its accumulators,
write its A registers or overwrite its operands in shared memory.

A product is summed exactly enough to be independent of order: operands and accumulator in float64,
one rounding to the accumulator's type at the end of each instruction. The tensor cores of Hopper
keep 14 bits for FP8 operands: inside `tensor_core.hopper_arithmetic()` so does the emulator, and its
results are a GPU's to the bit.
"""

from __future__ import annotations

import functools
import re
from typing import TYPE_CHECKING

import numpy as np

from . import alu, tensor_core
from .errors import (
    BarrierMisuse,
    DescriptorError,
    Divergence,
    MissingFence,
    OutOfBounds,
    Race,
    UnknownInstruction,
    Unsupported,
)
from .shared import FIRST
from .special import Issue, Special, register_decoder

if TYPE_CHECKING:
    from .machine import Warp, Warpgroup

_FP8 = ("e4m3", "e5m2")
_HALF = ("f16", "bf16")
_OPERAND_BYTES = 32  # bytes of K in one instruction, for every operand type


@functools.lru_cache(maxsize=65536)
def operand_chunks(descriptor: int, rows: int, transposed: bool) -> np.ndarray:
    """16-byte chunks of shared memory that a matrix descriptor names (PTX ISA 9.7.15.5.1).

    Returns indices [rows, 2] for a K-major operand, [16, rows / 8] for an MN-major one (16-bit
    types only: 16 values of K, each a line of `rows` elements). Addresses are the low 18 bits,
    swizzled by the absolute address as the copy engine swizzles.
    """
    start = (descriptor & 0x3FFF) << 4
    leading = (descriptor >> 16 & 0x3FFF) << 4
    stride = (descriptor >> 32 & 0x3FFF) << 4
    if descriptor >> 49 & 7:
        raise Unsupported("a matrix descriptor with a base offset")
    layout = descriptor >> 62 & 3
    pitch, mask = {0: (16, 0), 1: (128, 7), 2: (64, 3), 3: (32, 1)}[layout]
    if not transposed:
        row = np.arange(rows)[:, None]
        chunk = np.arange(_OPERAND_BYTES // 16)[None, :]
        address = start + row // 8 * stride + row % 8 * pitch
        address = address + (chunk * leading if layout == 0 else chunk * 16)
    else:
        k = np.arange(16)[:, None]
        chunk = np.arange(rows * 2 // 16)[None, :]
        if layout == 0:
            address = start + chunk * stride + k // 8 * leading + k % 8 * 16
        else:
            per_line = pitch // 16
            address = start + chunk // per_line * leading + chunk % per_line * 16
            address = address + k // 8 * stride + k % 8 * pitch
    address = address ^ ((address >> 7 & mask) << 4)
    return address >> 4


@functools.lru_cache(maxsize=65536)
def operand_granules(descriptor: int, rows: int, transposed: bool, granule: int):
    """(shadow granules, lowest byte, one past the highest byte) of an operand."""
    chunks = operand_chunks(descriptor, rows, transposed).reshape(-1)
    per_chunk = 16 // granule
    granules = (chunks[:, None] * per_chunk + np.arange(per_chunk)).reshape(-1)
    return granules, int(chunks.min()) * 16, int(chunks.max()) * 16 + 16


class Multiply:
    """One wgmma of a warpgroup, from its first issue on."""

    def __init__(self, instruction: MultiplyInstruction, a: int | None, b: int, accumulate: bool):
        self.instruction, self.a, self.b, self.accumulate = instruction, a, b, accumulate
        self.issued: dict[int, int] = {}  # warp number: its commit group
        self.waiters: list[Warp] = []
        # The chunks of A and B whose reads are at fault, for a second run (launch.py).
        self.suspect: dict[str, np.ndarray] = {}
        # What all four warps have seen at their issue.
        self.seen: np.ndarray | None = None
        self.proxied: np.ndarray | None = None

    def join(self, warp: Warp):
        """Another warp issues it."""
        if self.seen is None:
            self.seen, self.proxied = warp.seen.copy(), warp.proxied.copy()
        else:
            np.minimum(self.seen, warp.seen, out=self.seen)
            np.minimum(self.proxied, warp.proxied, out=self.proxied)


class WarpgroupQueue:
    """The wgmmas of a warpgroup, in order; they execute in order."""

    def __init__(self, warpgroup: Warpgroup):
        self.warpgroup = warpgroup
        self.first = 0  # index of entries[0] among all wgmmas of the warpgroup
        self.entries: list[Multiply] = []

    def at(self, index: int) -> Multiply | None:
        position = index - self.first
        return self.entries[position] if position < len(self.entries) else None

    def run_committed(self, closed: int):
        """Executes those in a group up to `closed` (of the slowest warp)."""
        while self.entries:
            entry = self.entries[0]
            if len(entry.issued) < 4 or min(entry.issued.values()) > closed:
                return
            self._run_first()

    def run_all(self):
        """Executes every wgmma that all four warps have issued."""
        while self.entries and len(self.entries[0].issued) == 4:
            self._run_first()

    def _run_first(self):
        entry = self.entries.pop(0)
        self.first += 1
        entry.instruction.multiply(self.warpgroup, entry)


@register_decoder("wgmma")
def decode_wgmma(instruction, operands) -> Special:
    action = instruction.mods[1]
    if action == "mma_async":
        return MultiplyInstruction(instruction, operands)
    if action == "fence":
        return WgmmaFence(instruction, operands)
    if action == "commit_group":
        return WgmmaCommit(instruction, operands)
    if action == "wait_group":
        return WgmmaWait(instruction, operands)
    raise UnknownInstruction(f"{instruction.opcode} is not known")


class WgmmaFence(Special):
    """wgmma.fence: orders register accesses before the wgmmas that follow."""

    def __init__(self, instruction, operands):
        super().__init__(instruction, operands)
        operands.allow("fence", "sync", "aligned")

    def execute(self, issue: Issue) -> bool:
        issue.meet()
        issue.warp.touched = 0
        return True


class WgmmaCommit(Special):
    """wgmma.commit_group"""

    def __init__(self, instruction, operands):
        super().__init__(instruction, operands)
        operands.allow("commit_group", "sync", "aligned")

    def execute(self, issue: Issue) -> bool:
        issue.meet()
        issue.warp.wgmma_groups += 1
        return True


class WgmmaWait(Special):
    """wgmma.wait_group n: all but the last n groups are done."""

    def __init__(self, instruction, operands):
        super().__init__(instruction, operands)
        operands.allow("wait_group", "sync", "aligned")
        self.allowed = int(operands.text(0))

    def execute(self, issue: Issue) -> bool:
        issue.meet()
        warp = issue.warp
        warpgroup = issue.cta.group_of(warp)
        closed = warp.wgmma_groups - self.allowed
        for entry in warpgroup.queue.entries:
            group = entry.issued.get(warp.number)
            if group is not None and group <= closed and len(entry.issued) < 4:
                # The instruction is not whole before all four warps have issued it.
                warp.blocked = PeerIssue(warpgroup)
                entry.waiters.append(warp)
                return False
        at = issue.cluster.at
        warpgroup.queue.run_committed(closed)
        issue.cluster.at = at
        warp.wgmma_open = [open_ for open_ in warp.wgmma_open if open_[0] > closed]
        warp.accumulators = warp.fragments = 0
        for _, accumulators, fragments, _ in warp.wgmma_open:
            warp.accumulators |= accumulators
            warp.fragments |= fragments
        clock = max(int(warp.seen[warpgroup.agent]), closed)
        warp.seen[warpgroup.agent] = warp.proxied[warpgroup.agent] = clock
        return True


class PeerIssue:
    """What a warp waits for when its peers have not issued their part of a wgmma."""

    def __init__(self, warpgroup):
        self.warpgroup = warpgroup

    def __repr__(self):
        return "the other warps of the warpgroup to issue the same wgmma"


class MultiplyInstruction(Special):
    """wgmma.mma_async.sync.aligned.m64nNk{16,32}: D = A B [+ D]."""

    touches_accumulators = True

    def __init__(self, instruction, operands):
        super().__init__(instruction, operands)
        program = operands.program
        match = re.fullmatch(
            r"wgmma\.mma_async\.sync\.aligned\.m64n(\d+)k(\d+)\.(\w+)\.(\w+)\.(\w+)",
            instruction.opcode,
        )
        if not match:
            raise UnknownInstruction(f"{instruction.opcode} is not known")
        self.n, self.k = int(match[1]), int(match[2])
        self.d_type, self.a_type, self.b_type = match[3], match[4], match[5]
        self.fp8 = self.a_type in _FP8
        if self.fp8:
            known = self.b_type in _FP8 and self.k == 32 and self.d_type in ("f32", "f16")
        elif self.a_type == "tf32":
            known = self.b_type == "tf32" and self.k == 8 and self.d_type == "f32"
        else:
            results = {"f16": ("f32", "f16"), "bf16": ("f32",)}.get(self.a_type, ())
            known = self.a_type == self.b_type and self.k == 16 and self.d_type in results
        if not known or not (8 <= self.n <= 256 and self.n % 8 == 0):
            raise UnknownInstruction(f"{instruction.opcode} is not known")
        self.shape = f"m64n{self.n}k{self.k}.{self.d_type}.{self.a_type}.{self.b_type}"
        d = operands.parts(0)
        expected = self.n // (2 if self.d_type == "f32" else 4)
        if len(d) != expected:
            raise DescriptorError(f"{len(d)} accumulator registers where {expected} are needed")
        self.d_rows = np.array([program.register(r)[1] for r in d])
        self.d_mask = program.mask(d)
        self.a_rows, self.a_mask, self.a = None, 0, None
        if operands.text(1).startswith("{"):
            a = operands.parts(1)
            self.a_rows = np.array([program.register(r)[1] for r in a])
            self.a_mask = program.mask(a)
        else:
            self.a = operands.value(1, "u64")
        self.b = operands.value(2, "u64")
        self.scale_d = operands.value(3, "pred")
        immediates = [int(t) for t in instruction.operands[4:]]
        self.sign = immediates[0] * immediates[1]
        transposes = immediates[2:]
        if (self.fp8 or self.a_type == "tf32") and transposes:
            raise DescriptorError("only 16-bit operands can be transposed")
        self.a_transposed = self.b_transposed = False
        if transposes:
            self.b_transposed = bool(transposes[-1])
            if self.a_rows is None:
                self.a_transposed = bool(transposes[0])

    def execute(self, issue: Issue) -> bool:
        issue.meet()
        warp, cluster = issue.warp, issue.cluster
        warpgroup = issue.cta.group_of(warp)
        if len(warpgroup.warps) != 4:
            issue.fault(Divergence, "wgmma in an incomplete warpgroup")
        a = issue.uniform(self.a, "the descriptor of A") if self.a else None
        b = issue.uniform(self.b, "the descriptor of B")
        accumulate = bool(issue.uniform(self.scale_d, "scale-d"))
        self._check_registers(issue)

        queue = warpgroup.queue
        entry = queue.at(warp.wgmma_issued)
        if entry is None:
            entry = Multiply(self, a, b, accumulate)
            queue.entries.append(entry)
        elif (entry.instruction, entry.a, entry.b, entry.accumulate) != (self, a, b, accumulate):
            issue.fault(
                Divergence,
                "the warps of a warpgroup issue different wgmmas",
                other=f"PTX line {entry.instruction.instruction.line}",
            )
        warp.wgmma_issued += 1
        group = warp.wgmma_groups + 1
        entry.issued[warp.number] = group
        warp.wgmma_open.append((group, self.d_mask, self.a_mask, self.shape))
        warp.accumulators |= self.d_mask
        warp.fragments |= self.a_mask
        entry.join(warp)
        if len(entry.issued) == 4:
            self._check_operands(issue, warpgroup, entry)
            for waiter in entry.waiters:
                waiter.blocked = None
            cluster.progress += 1
            if cluster.policy.completes_at_issue("wgmma"):
                queue.run_all()
        return True

    def _check_registers(self, issue: Issue):
        warp, program = issue.warp, issue.cluster.program
        stale = (self.d_mask | self.a_mask) & warp.touched
        if stale:
            issue.fault(
                MissingFence,
                f"registers {program.names(stale)} of a wgmma were accessed since the last "
                "wgmma.fence",
            )
        for _, accumulators, _, shape in warp.wgmma_open:
            shared = accumulators & self.d_mask
            if shared and (shape != self.shape or accumulators != self.d_mask):
                issue.fault(
                    MissingFence,
                    f"registers {program.names(shared)} accumulate a wgmma of another shape "
                    f"({shape}) that is still in flight",
                )
            if accumulators & self.a_mask:
                issue.fault(
                    Race,
                    f"A registers {program.names(accumulators & self.a_mask)} are accumulators of "
                    "a wgmma in flight",
                )

    def _check_operands(self, issue: Issue, warpgroup: Warpgroup, entry: Multiply):
        shared = issue.cta.shared
        group = min(entry.issued.values())
        for descriptor, rows, transposed, name in (
            (entry.a, 64, self.a_transposed, "A"),
            (entry.b, self.n, self.b_transposed, "B"),
        ):
            if descriptor is None:
                continue
            granules, low, high = operand_granules(descriptor, rows, transposed, shared.granule)
            if low < FIRST or high > shared.end:
                issue.fault(
                    OutOfBounds,
                    f"operand {name} of wgmma reads shared memory [{low:#x}, {high:#x}) outside of "
                    f"[{FIRST:#x}, {shared.end:#x})",
                    offset=low,
                )
            who = f"{issue.warp.name} and its warpgroup"
            what = f"operand {name} of wgmma"
            bad = shared.async_read(
                who, entry.seen, entry.proxied, granules, warpgroup.agent, group, what
            )
            if bad is not None and issue.cluster.launch.perturbs:
                entry.suspect[name] = granules[bad] // (16 // shared.granule)

    # --- arithmetic ---

    def multiply(self, warpgroup: Warpgroup, entry: Multiply):
        """Executes the instruction on the registers and shared memory of the warpgroup."""
        cta = warpgroup.cta
        low = warpgroup.warps[0].low
        file = cta.registers.files["W"]
        threads = slice(low, low + 128)
        if entry.a is None:
            a = self._fragment(file[self.a_rows, threads])
        else:
            chunks = operand_chunks(entry.a, 64, self.a_transposed)
            a = self._operand(cta, chunks, self.a_transposed, self.a_type, entry.suspect.get("A"))
        chunks = operand_chunks(entry.b, self.n, self.b_transposed)
        b = self._operand(cta, chunks, self.b_transposed, self.b_type, entry.suspect.get("B"))
        product = self.sign * (a @ b.T)
        hopper = self.fp8 and self.d_type == "f32" and tensor_core.in_use()
        # Element (row, column) is held by warp row/16, lane 4*(row%8) + column%8/2, register
        # 4*(column/8) + 2*(row%16/8) + column%2 (PTX ISA 9.7.15.5.2, "D fragments").
        tiles = product.reshape(4, 2, 8, self.n // 8, 4, 2)
        if self.d_type == "f32":
            result = tiles.transpose(3, 1, 5, 0, 2, 4).reshape(self.n // 2, 128)
            if hopper:
                result = self._as_hopper(a, b, file[self.d_rows, threads], entry.accumulate, result)
            elif entry.accumulate:
                result = result + file[self.d_rows, threads].view(np.float32)
            rounded = result.astype(np.float32)
            rounded[np.isnan(rounded)] = alu.CANONICAL_NAN
            file[self.d_rows, threads] = rounded.view(np.uint32)
        else:
            result = tiles.transpose(3, 1, 0, 2, 4, 5).reshape(self.n // 4, 128, 2)
            if entry.accumulate:
                old = np.ascontiguousarray(file[self.d_rows, threads]).view(np.float16)
                result = result + old.reshape(self.n // 4, 128, 2)
            rounded16 = np.ascontiguousarray(result.astype(np.float16))
            file[self.d_rows, threads] = rounded16.view(np.uint32).reshape(self.n // 4, 128)
        cta.cluster.report.wgmma += 1
        cta.cluster.report.products += 64 * self.n * self.k

    def _as_hopper(self, a, b, registers, accumulate, exact):
        """The accumulator registers [n / 2, 128] after an FP8 product, rounded as the hardware does."""
        shape, order = (self.n // 8, 2, 2, 4, 8, 4), (3, 1, 5, 0, 2, 4)
        old = None
        if accumulate:
            held = np.ascontiguousarray(registers).view(np.float32).astype(np.float64)
            old = held.reshape(shape).transpose(np.argsort(order)).reshape(64, self.n)
        if not (np.isfinite(exact).all() and (old is None or np.isfinite(old).all())):
            return exact if old is None else exact + held
        total = tensor_core.multiply(self.sign * a, b, old, (self.a_type, self.b_type))
        tiles = total.reshape(4, 2, 8, self.n // 8, 4, 2)
        return tiles.transpose(order).reshape(self.n // 2, 128)

    def _decode(self, raw: np.ndarray, kind: str) -> np.ndarray:
        """Bytes in their last axis to float64 values."""
        if kind in _FP8:
            return alu.FP8_VALUES[kind][raw]
        if kind == "tf32":  # the low 13 bits do not count
            words = np.ascontiguousarray(raw).view(np.uint32) & np.uint32(0xFFFFE000)
            return words.view(np.float32).astype(np.float64)
        bits = np.ascontiguousarray(raw).view(np.uint16)
        wide = alu.from_bf16(bits) if kind == "bf16" else alu.from_f16(bits)
        return wide.astype(np.float64)

    def _operand(self, cta, chunks, transposed: bool, kind: str, suspect=None) -> np.ndarray:
        """An operand in shared memory as a matrix [rows, K]; suspect chunks have no value."""
        raw = cta.shared.chunks[chunks]
        if suspect is not None:
            raw[np.isin(chunks, suspect)] = cta.cluster.launch.poison
        raw = raw.reshape(chunks.shape[0], -1)
        values = self._decode(raw, kind)
        return values.T if transposed else values

    def _fragment(self, registers: np.ndarray) -> np.ndarray:
        """A in registers: four registers a thread (PTX ISA 9.7.15.5.2, "A fragments").

        Register r of thread t holds row 16*(t/32) + t%32/4 + 8*(r%2) and, of the 32 bytes of K,
        the four from 16*(r/2) + 4*(t%4).
        """
        raw = np.ascontiguousarray(registers).view(np.uint8).reshape(2, 2, 4, 8, 4, 4)
        # Axes: half of K, half of the rows, warp, row in eight, column of four lanes, byte.
        rows = raw.transpose(2, 1, 3, 0, 4, 5).reshape(64, _OPERAND_BYTES)
        return self._decode(rows, self.a_type)


def check_idle(warp: Warp):
    """At the end of a warp no wgmma may be in flight."""
    if warp.wgmma_open:
        warp.cluster.fault(
            BarrierMisuse,
            "the warp ends with wgmmas that no wgmma.wait_group waited for",
            actor=warp.name,
        )
