"""A kernel's PTX to look around in and to change, and the table of faults planted in it."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
WRONG_RESULT = "wrong result"


class NoMatch(AssertionError):
    """The PTX does not hold what an edit describes: the kernel has changed, and so must the edit."""


def kernel_text(module: str, kernel: str) -> str:
    """The module with no other kernel than `kernel`."""
    starts = [m.start() for m in re.finditer(r"^\.visible \.entry", module, re.M)]
    for start, end in zip(starts, [*starts[1:], len(module)], strict=True):
        if re.match(rf"\.visible \.entry {kernel}\(", module[start:end]):
            return module[: starts[0]] + module[start:end]
    raise NoMatch(f"no kernel {kernel}")


@functools.cache
def gemm_params() -> dict[str, int]:
    """Offset in bytes of each field of GemmParams."""
    header = (ROOT / "csrc/kernels/gemm/args.h").read_text()
    struct = re.search(r"struct GemmParams \{(.*?)\n\};", header, re.S)[1]
    offsets, end = {}, 0
    for type_, name in re.findall(r"^\s*(const \w+\*|void\*|int32_t) (\w+);", struct, re.M):
        offsets[name] = end
        end += 8 if type_.endswith("*") else 4
    return offsets


@dataclass(frozen=True)
class Ring:
    """The loop that makes a ring's barriers, `slots` full ones and then as many empty ones."""

    init: int
    select: int  # of the arrivals that a full barrier counts, and an empty one
    address: int  # constant part of the first's
    slots: int


class Ptx:
    """A kernel's PTX as lines, an instruction each, to look around in and to change.

    Places are line numbers. Changes keep the numbers of the other lines: a new instruction shares
    the line of its neighbour.
    """

    def __init__(self, text: str):
        self.lines = text.splitlines()

    @property
    def text(self) -> str:
        return "\n".join(self.lines) + "\n"

    # --- finding

    def all(self, pattern: str, least: int = 1) -> list[int]:
        """Lines with `pattern`, at least `least`."""
        found = [i for i, line in enumerate(self.lines) if re.search(pattern, line)]
        if len(found) < least:
            raise NoMatch(f"{pattern!r}: {len(found)} lines, expected {least} or more")
        return found

    def one(self, pattern: str) -> int:
        found = self.all(pattern)
        if len(found) > 1:
            raise NoMatch(f"{pattern!r}: {len(found)} lines, expected one")
        return found[0]

    def first(self, pattern: str) -> int:
        return self.all(pattern)[0]

    def before(self, place: int, pattern: str) -> int:
        """The last line with `pattern` before `place`."""
        return next(iter([i for i in self.all(pattern) if i < place][::-1]), None) or self._none(
            pattern, f"before line {place}"
        )

    def after(self, place: int, pattern: str) -> int:
        """The first line with `pattern` after `place`."""
        return next((i for i in self.all(pattern) if i > place), None) or self._none(
            pattern, f"after line {place}"
        )

    @staticmethod
    def _none(pattern: str, where: str) -> int:
        raise NoMatch(f"{pattern!r}: none {where}")

    def operands(self, place: int) -> list[str]:
        """Registers and immediates of an instruction, the guard left out, in order."""
        return re.findall(
            r"(?<![\w.])(?:%[\w.]+|-?\d+|0f[0-9A-F]{8})(?![\w.:])",
            re.sub(r"^\s*(@!?%\w+\s+)?[\w.:]+", "", self.lines[place]),
        )

    def definition(self, register: str, before: int | None = None) -> int:
        """The last line, before `before` if given, that sets a register."""
        pattern = rf"^\s*(@!?%\w+\s+)?[a-z][\w.:]*\s+(\{{[^}}]*)?{register}\b(?!\])"
        found = [i for i in self.all(pattern) if before is None or i < before]
        return found[-1] if found else self._none(pattern, f"before line {before}")

    def parameters(self, field: str) -> list[str]:
        """The registers that a field of a GEMM kernel's GemmParams is loaded into."""
        offset, found = gemm_params()[field], []
        for place in self.all(r"ld\.param\.(?:v[24]\.)?u32\s.*_param_3\+\d+\]"):
            registers = [r for r in self.operands(place) if r.startswith("%")]
            first = int(re.search(r"\+(\d+)\]", self.lines[place])[1])
            index, rest = divmod(offset - first, 4)
            if rest == 0 and 0 <= index < len(registers):
                found.append(registers[index])
        return found

    def parameter(self, field: str) -> str:
        """The register of a field that is loaded once."""
        found = self.parameters(field)
        if len(found) != 1:
            raise NoMatch(f"{field} is loaded {len(found)} times")
        return found[0]

    # --- barriers of the GEMM kernels: ring.cuh, schedule.cuh

    def _address(self, place: int) -> int:
        """Constant part of the address in the brackets: the last immediate that is added to it."""
        register = re.search(r"\[(%\w+)\]", self.lines[place])[1]
        for _ in range(4):
            place = self.definition(register, place)
            operands = self.operands(place)
            if re.search(r"\badd\.s32\b", self.lines[place]) and operands[-1].isdigit():
                return int(operands[-1])
            register = operands[-1] if "add.s32" in self.lines[place] else operands[1]
        raise NoMatch(f"line {place}: no constant address")

    def rings(self) -> dict[str, Ring]:
        """Where the barriers of the `stages` and of the `mail`box are made."""
        rings = {}
        for place in self.all(r"\bmbarrier\.init\b", least=2):
            select = self.definition(self.operands(place)[-1], place)
            self.check(select, r"\bselp\.b32\b")  # of both counts, by the barrier's number
            _, full, _, first = self.operands(select)
            slots = int(self.operands(self.definition(first, select))[-1])
            # The stages' `full` counts 33 arrivals, the mailbox's 1.
            name = "mail" if full == "1" else "stages"
            rings[name] = Ring(place, select, self._address(place), slots)
        if len(rings) != 2:
            raise NoMatch(f"barriers of {' and '.join(rings)}, not of the stages and the mailbox")
        return rings

    def barrier(self, kind: str, pattern: str, count: int | None = None) -> list[int]:
        """Lines with `pattern` on `full`, `empty`, `mail full` or `mail empty` barriers.

        `count` of them, else one or more.
        """
        ring = self.rings()["mail" if kind.startswith("mail") else "stages"]
        address = ring.address + (8 * ring.slots if kind.endswith("empty") else 0)
        found = [
            i
            for i in self.all(pattern)
            if "mbarrier.init" not in self.lines[i]
            and "shared::cluster.b64" not in self.lines[i]
            and self._address(i) == address
        ]
        if len(found) != count if count else not found:
            raise NoMatch(f"{pattern!r} on {kind}: {len(found)} lines, expected {count or 'some'}")
        return found

    def waits(self, kind: str, count: int | None = None) -> list[int]:
        return self.barrier(kind, r"\bmbarrier\.try_wait\b", count)

    # --- changing

    def check(self, place: int, pattern: str) -> int:
        """The place, if it has `pattern`."""
        if not re.search(pattern, self.lines[place]):
            raise NoMatch(f"line {place}: {pattern!r} in {self.lines[place]!r}")
        return place

    def replace(self, place: int, pattern: str, by: str):
        line, count = re.subn(pattern, by, self.lines[place])
        if count != 1:
            raise NoMatch(f"line {place}: {pattern!r} in {self.lines[place]!r}")
        self.lines[place] = line

    def drop(self, *places: int):
        for place in places:
            self.lines[place] = ""

    def insert(self, place: int, text: str):
        """Before `place`."""
        self.lines[place] = f"{text} {self.lines[place]}"

    def set(self, place: int, value: str | int):
        """The instruction gives its result this value instead."""
        match = re.match(r"\s*[\w.]*?\.(?:wide\.)?([subf])(16|32|64)\s+(%\w+),", self.lines[place])
        if not match:
            raise NoMatch(f"line {place}: {self.lines[place]!r} has no simple result")
        wide = "wide" in self.lines[place].split()[0]
        bits = int(match[2]) * (2 if wide else 1)
        self.lines[place] = f"mov.b{bits} {match[3]}, {value};"

    def move(self, places: range, to: int):
        """Lines `places` before line `to`."""
        moved = "\n".join(self.lines[i] for i in places)
        self.drop(*places)
        self.insert(to, moved + "\n")

    def pass_at_once(self, *waits: int):
        """The waits find their phase complete, whatever it is."""
        for place in waits:
            predicate = self.operands_of_wait(place)[0]
            self.lines[place] = f"setp.eq.u32 {predicate}, 0, 0;"

    def operands_of_wait(self, place: int) -> tuple[str, str, str]:
        """Predicate, address, parity of a try_wait."""
        match = re.search(r"try_wait\S*\s+(%?\w+),\s*\[(%\w+)\],\s*(%\w+)", self.lines[place])
        if not match:
            raise NoMatch(f"line {place}: {self.lines[place]!r} is no try_wait")
        return match[1], match[2], match[3]


@dataclass(frozen=True)
class Mutation:
    """`run` names the case of tests/faults/runs.py that executes the faulty kernel.

    `detector` is the emulator's exception, or WRONG_RESULT.
    """

    name: str
    run: str
    detector: str
    edit: Callable[[Ptx], None]


MUTATIONS: list[Mutation] = []


def planted(run: str, name: str, detector: str):
    """Adds the decorated edit to the table."""

    def add(edit: Callable[[Ptx], None]):
        MUTATIONS.append(Mutation(name, run, detector, edit))
        return edit

    return add
