"""The operands of an instruction as Python expressions, and the table of emitters."""

from __future__ import annotations

import re
from collections.abc import Callable

import numpy as np

from ..errors import PtxSyntaxError, UnknownInstruction
from ..parser import Instruction, split_operands
from ..program import BYTES, DTYPES, PARAM_WINDOW, Program, immediate, register_file

_FILE_ORDER = "PHWD"
FILE_UNSIGNED = {"H": "u16", "W": "u32", "D": "u64"}


def check_modifiers(instruction: Instruction, allowed: set[str]):
    """Refuses an instruction with a modifier outside of `allowed`."""
    unknown = [m for m in instruction.mods[1:] if m not in allowed]
    if unknown:
        raise UnknownInstruction(
            f"{instruction.mods[0]}: modifier .{unknown[0]} is not known to the emulator"
        )


class Operands:
    """Translates the operands of one instruction, noting the registers it reads and writes."""

    def __init__(self, program: Program, instruction: Instruction):
        self.program, self.instruction = program, instruction
        self.reads: set[str] = set()
        self.writes: set[str] = set()

    def __len__(self):
        return len(self.instruction.operands)

    def text(self, operand: int | str) -> str:
        if isinstance(operand, str):
            return operand
        if operand >= len(self.instruction.operands):
            raise PtxSyntaxError("too few operands")
        return self.instruction.operands[operand]

    def allow(self, *modifiers: str):
        check_modifiers(self.instruction, set(modifiers))

    # Sources

    def src(self, operand: int | str, kind: str) -> str:
        """Expression for a source operand read as a type."""
        name, program = self.text(operand), self.program
        if name.startswith("!"):
            return f"(~{self.src(name[1:], kind)})"
        if program.is_register(name):
            self.reads.add(name)
            if kind == "pred":
                return f"V[{program.slot(name, 'pred')}]"
            have, need = program.register(name)[0], register_file(kind)
            if have == need:
                return f"V[{program.slot(name, kind)}]"
            if _FILE_ORDER.index(have) > _FILE_ORDER.index(need):
                return f"V[{program.slot(name, 'low:' + kind)}]"
            raise PtxSyntaxError(f"{name} is narrower than .{kind}")
        if name.startswith("%"):
            width = "u64" if BYTES[kind] == 8 else "u32"
            return f"V[{program.slot('%special:' + name[1:], width)}]"
        symbol, offset = name, 0
        if match := re.match(r"^([A-Za-z_$][\w$]*)\+(-?\d+)$", name):
            symbol, offset = match[1], int(match[2])
        if symbol in program.parameters:
            value = PARAM_WINDOW + program.parameters[symbol].offset + offset
            return program.constant(np.array([value], np.uint64))
        if symbol in program.variables:
            width = "u64" if BYTES[kind] == 8 else "u32"
            base = f"V[{program.slot('%symbol:' + symbol, width)}]"
            if not offset:
                return base
            return f"({base} + {program.constant(np.array([offset], DTYPES[width]))})"
        value = immediate(name, kind)
        if value is None:
            raise PtxSyntaxError(f"operand {name!r} as .{kind}")
        return program.constant(value)

    def parts(self, operand: int | str) -> list[str]:
        """The members of a vector operand `{a, b}`."""
        text = self.text(operand)
        return split_operands(text[1:-1]) if text.startswith("{") else [text]

    def address(self, operand: int | str) -> tuple[str, int]:
        """`[base+offset]` as (expression, constant offset)."""
        text = self.text(operand)
        if not (text.startswith("[") and text.endswith("]")):
            raise PtxSyntaxError(f"{text!r} is not an address")
        base, offset, program = text[1:-1].strip(), 0, self.program
        if match := re.match(r"^(.*?)\s*\+\s*(-?\w+)$", base):
            base, offset = match[1], int(match[2], 0)
        if program.is_register(base):
            wide = program.register(base)[0] == "D"
            return self.src(base, "u64" if wide else "u32"), offset
        if base in program.parameters:
            value = PARAM_WINDOW + program.parameters[base].offset
            return program.constant(np.array([value], np.uint64)), offset
        if base in program.variables:
            width = "u64" if program.variables[base].space in ("global", "const") else "u32"
            return f"V[{program.slot('%symbol:' + base, width)}]", offset
        return self.src(base, "u64"), offset

    def is_result_of_a_call(self, operand: int | str) -> bool:
        """Does an address name a `.param` variable of the body, and not of the kernel?"""
        base = re.split(r"[+\s]", self.text(operand).strip("[] "))[0]
        known = self.program.parameters, self.program.variables, self.program.kernel.registers
        return not any(base in names for names in known) and not base[:1].isdigit()

    # Destinations

    def dst(self, operand: int | str, kind: str) -> str:
        """Expression for a destination written as a type of its own width."""
        name, program = self.text(operand), self.program
        if not program.is_register(name):
            raise PtxSyntaxError(f"destination {name!r} is not a register")
        self.writes.add(name)
        have, need = program.register(name)[0], register_file(kind)
        if have != need:
            raise PtxSyntaxError(f"{name} has not the width of .{kind}")
        return f"V[{program.slot(name, kind if BYTES[kind] > 1 or kind == 'pred' else 'u16')}]"

    def dst_wide(self, operand: int | str, signed: bool = False) -> str:
        """A destination that may be wider than the instruction's type, as its whole register."""
        name, program = self.text(operand), self.program
        file = program.register(name)[0]
        self.writes.add(name)
        kind = FILE_UNSIGNED[file]
        return f"V[{program.slot(name, 's' + kind[1:] if signed else kind)}]"

    def slot(self, operand: int | str, kind: str) -> int:
        """The slot of a register operand (for instructions that index `V` themselves)."""
        return int(self.src(operand, kind)[2:-1])

    def dst_slot(self, operand: int | str, kind: str) -> int:
        return int(self.dst(operand, kind)[2:-1])

    def value(self, operand: int | str, kind: str) -> Callable:
        """A source operand as a function of the views."""
        return self.function(self.src(operand, kind))

    def location(self, operand: int | str) -> Callable:
        """An address operand as a function of the views that gives uint64 addresses."""
        expression, offset = self.address(operand)
        return self.function(f"{expression}.astype(uint64) + uint64({offset % 2**64})")

    def function(self, expression: str) -> Callable:
        return eval(f"lambda V: {expression}", self.program.namespace)  # noqa: S307


_EMITTERS: dict[str, Callable[[Operands], list[str]]] = {}


def emit(operands: Operands) -> list[str]:
    """The Python lines of an instruction."""
    base = operands.instruction.mods[0]
    if base not in _EMITTERS:
        raise UnknownInstruction(
            f"opcode {operands.instruction.opcode} is not known to the emulator"
        )
    return _EMITTERS[base](operands)


def emits(*names: str):
    def register(function):
        for name in names:
            _EMITTERS[name] = function
        return function

    return register


def need(o: Operands, kind: str, *kinds: str):
    if kind not in kinds:
        raise UnknownInstruction(f"{o.instruction.mods[0]} of type .{kind} is not known")


INTEGERS = ("u16", "s16", "u32", "s32", "u64", "s64")
HALVES = ("f16", "bf16", "f16x2", "bf16x2")


def float_result(o: Operands, expression: str, kind: str, destination: int = 0) -> list[str]:
    """Stores a float32 or float64 result: .ftz, .sat, canonical NaN."""
    mods = o.instruction.mods
    if "ftz" in mods:
        expression = f"alu.flush({expression})"
    if "sat" in mods:
        expression = f"alu.saturate({expression})"
    d = o.dst(destination, kind)
    return [f"copyto({d}, {expression}$W)", f"alu.canonical({d}, $M)"]


def float_src(o: Operands, operand: int, kind: str) -> str:
    value = o.src(operand, kind)
    return f"alu.flush({value})" if "ftz" in o.instruction.mods else value
