"""Which instruction forms a PTX text contains, and which the emulator's own programs execute.

A form is an opcode with its modifiers, without what changes nothing in its execution: the N of a
wgmma, and the hints of caches. Where an opcode has operands of different shapes (a `mov` that packs
or unpacks, a shift by an immediate), the shape is part of the form.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from .launch import Report, module
from .parser import Instruction, Kernel

_HINTS = re.compile(r"\.L1::\w+|\.L2::(?!cache_hint)\w+")


def form(instruction: Instruction) -> str:
    """The normalized form of an instruction."""
    opcode = _HINTS.sub("", instruction.opcode)
    if instruction.mods[:2] == ["wgmma", "mma_async"]:
        opcode = re.sub(r"m64n\d+k", "m64nNk", opcode)
        if instruction.operands[1].startswith("{"):
            opcode += " A in registers"
    elif instruction.mods[0] == "mov":
        if instruction.operands[1].startswith("{"):
            opcode += " packs"
        elif instruction.operands[0].startswith("{"):
            opcode += " unpacks"
    elif instruction.mods[0] in ("shl", "shr"):
        opcode += " by a register" if instruction.operands[2].startswith("%") else " by a number"
    return opcode


def forms_of_kernel(kernel: Kernel, lines: Iterable[int] | None = None) -> set[str]:
    """Forms in a kernel, or on some lines of it."""
    chosen = None if lines is None else set(lines)
    return {form(i) for i in kernel.instructions if chosen is None or i.line in chosen}


def forms(ptx: str | bytes | Path) -> set[str]:
    """Forms in all kernels of a PTX text."""
    parsed = module(ptx)
    return set().union(*(forms_of_kernel(parsed.kernel(e)) for e in parsed.entries))


def executed(ptx: str | bytes | Path, entry: str, report: Report) -> set[str]:
    """Forms that a launch executed."""
    return forms_of_kernel(module(ptx).kernel(entry), report.covered_lines)


def covered_forms() -> set[str]:
    """Forms that the emulator's own programs execute, with results that their tests check.

    Runs every program of `tests/emulator_programs`.
    """
    from tests.emulator_programs import all_programs

    result: set[str] = set()
    for program in all_programs():
        result |= executed(program.ptx, program.entry, program.run())
    return result
