"""Straight-line PTX to NumPy source, one function an opcode.

Each emitter returns the Python lines of one instruction. `V[i]` is a view of a register, `C[i]` a
constant, `X` the executing unit; `$W` becomes `, where=<mask>` and `$M` the mask of executing
lanes, or nothing and None where all lanes run. A modifier that an emitter does not name is
refused: an instruction is executed as it is written, or not at all.
"""

from __future__ import annotations

import re
from collections.abc import Callable

import numpy as np

from .errors import PtxSyntaxError, UnknownInstruction
from .parser import Instruction, split_operands
from .program import (
    BYTES,
    DTYPES,
    LOCAL_WINDOW,
    PARAM_WINDOW,
    RANK_SHIFT,
    SHARED_WINDOW,
    Program,
    immediate,
    register_file,
)

_FILE_ORDER = "PHWD"
_FILE_UNSIGNED = {"H": "u16", "W": "u32", "D": "u64"}
_UNSIGNED_OF = {"s8": "u8", "s16": "u16", "s32": "u32", "s64": "u64"}


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
        kind = _FILE_UNSIGNED[file]
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


def _emits(*names: str):
    def register(function):
        for name in names:
            _EMITTERS[name] = function
        return function

    return register


def _need(o: Operands, kind: str, *kinds: str):
    if kind not in kinds:
        raise UnknownInstruction(f"{o.instruction.mods[0]} of type .{kind} is not known")


_INTEGERS = ("u16", "s16", "u32", "s32", "u64", "s64")
_HALVES = ("f16", "bf16", "f16x2", "bf16x2")


def _half_bits(kind: str) -> str:
    return "b32" if kind.endswith("x2") else "b16"


def _float_result(o: Operands, expression: str, kind: str, destination: int = 0) -> list[str]:
    """Stores a float32 or float64 result: .ftz, .sat, canonical NaN."""
    mods = o.instruction.mods
    if "ftz" in mods:
        expression = f"alu.flush({expression})"
    if "sat" in mods:
        expression = f"alu.saturate({expression})"
    d = o.dst(destination, kind)
    return [f"copyto({d}, {expression}$W)", f"alu.canonical({d}, $M)"]


def _float_src(o: Operands, operand: int, kind: str) -> str:
    value = o.src(operand, kind)
    return f"alu.flush({value})" if "ftz" in o.instruction.mods else value


def _half(o: Operands, operation: str, kind: str, sources: int) -> list[str]:
    bits = _half_bits(kind)
    arguments = ", ".join(o.src(i + 1, bits) for i in range(sources))
    return [
        f'copyto({o.dst(0, bits)}, alu.half_arithmetic("{operation}", "{kind}", {arguments})$W)'
    ]


# --- arithmetic -------------------------------------------------------------------------------


@_emits("add", "sub")
def _add(o: Operands) -> list[str]:
    base, kind = o.instruction.mods[0], o.instruction.mods[-1]
    if kind in ("f32", "f64"):
        o.allow("rn", "ftz", "sat", kind)
        function = "add" if base == "add" else "subtract"
        a, b = _float_src(o, 1, kind), _float_src(o, 2, kind)
        if {"ftz", "sat"} & set(o.instruction.mods):
            return _float_result(o, f"{function}({a}, {b})", kind)
        d = o.dst(0, kind)
        return [f"{function}({a}, {b}, {d}$W)", f"alu.canonical({d}, $M)"]
    if kind in _HALVES:
        o.allow("rn", kind)
        return _half(o, base, kind, 2)
    if base == "add" and kind in ("u16x2", "s16x2"):
        o.allow(kind)
        call = f'alu.pairs(add, "u16", {o.src(1, "b32")}, {o.src(2, "b32")})'
        return [f"copyto({o.dst(0, 'b32')}, {call}$W)"]
    _need(o, kind, *_INTEGERS)
    if "sat" in o.instruction.mods:
        _need(o, kind, "s32")
        o.allow("sat", kind)
        call = f"alu.saturate_{base}({o.src(1, kind)}, {o.src(2, kind)})"
        return [f"copyto({o.dst(0, kind)}, {call}$W)"]
    o.allow(kind)
    kind = _UNSIGNED_OF.get(kind, kind)
    function = "add" if base == "add" else "subtract"
    return [f"{function}({o.src(1, kind)}, {o.src(2, kind)}, {o.dst(0, kind)}$W)"]


@_emits("mul", "mad")
def _mul(o: Operands) -> list[str]:
    mods, kind = o.instruction.mods, o.instruction.mods[-1]
    if kind in ("f32", "f64", *_HALVES):
        if mods[0] == "mad":
            return _fma(o)
        if kind in _HALVES:
            o.allow("rn", kind)
            return _half(o, "mul", kind, 2)
        o.allow("rn", "ftz", "sat", kind)
        a, b = _float_src(o, 1, kind), _float_src(o, 2, kind)
        if {"ftz", "sat"} & set(mods):
            return _float_result(o, f"multiply({a}, {b})", kind)
        d = o.dst(0, kind)
        return [f"multiply({a}, {b}, {d}$W)", f"alu.canonical({d}, $M)"]
    _need(o, kind, *_INTEGERS)
    o.allow("lo", "hi", "wide", kind)
    part, unsigned = mods[1], _UNSIGNED_OF.get(kind, kind)
    if part == "lo":
        product = f"multiply({o.src(1, unsigned)}, {o.src(2, unsigned)}"
        if mods[0] == "mul":
            return [f"{product}, {o.dst(0, unsigned)}$W)"]
        return [f"add({product}), {o.src(3, unsigned)}, {o.dst(0, unsigned)}$W)"]
    if part == "wide":
        _need(o, kind, "u16", "s16", "u32", "s32")
        wide = kind[0] + str(16 * BYTES[kind])
        dtype = DTYPES[wide].__name__
        product = f"multiply({o.src(1, kind)}, {o.src(2, kind)}"
        if mods[0] == "mul":
            return [f"{product}, {o.dst(0, wide)}, dtype={dtype}$W)"]
        return [f"add({product}, dtype={dtype}), {o.src(3, wide)}, {o.dst(0, wide)}$W)"]
    if BYTES[kind] == 8:
        high = f"alu.mulhi64(*broadcast({o.src(1, kind)}, {o.src(2, kind)}))"
        high = high.replace("broadcast", "alu.np.broadcast_arrays")
    else:
        bits = 8 * BYTES[kind]
        wide = DTYPES[kind[0] + str(2 * bits)].__name__
        high = f"(multiply({o.src(1, kind)}, {o.src(2, kind)}, dtype={wide}) >> {bits})"
        high = f"{high}.astype({DTYPES[kind].__name__})"
    if mods[0] == "mad":
        high = f"({high} + {o.src(3, kind)})"
    return [f"copyto({o.dst(0, kind)}, {high}$W)"]


@_emits("fma")
def _fma(o: Operands) -> list[str]:
    mods, kind = o.instruction.mods, o.instruction.mods[-1]
    if kind in _HALVES:
        o.allow("rn", "relu", kind)
        return _half(o, "fma_relu" if "relu" in mods else "fma", kind, 3)
    _need(o, kind, "f32")
    o.allow("rn", "ftz", "sat", kind)
    a, b, c = (_float_src(o, i, kind) for i in (1, 2, 3))
    return _float_result(o, f"alu.fma32({a}, {b}, {c})", kind)


@_emits("div")
def _div(o: Operands) -> list[str]:
    mods, kind = o.instruction.mods, o.instruction.mods[-1]
    if kind == "f32" and ("approx" in mods or "full" in mods):
        o.allow("approx", "full", "ftz", kind)
        a, b = _float_src(o, 1, kind), _float_src(o, 2, kind)
        return _float_result(o, f"alu.divide_approx({a}, {b})", kind)
    if kind in ("f32", "f64"):
        o.allow("rn", "ftz", kind)
        return _float_result(o, f"divide({_float_src(o, 1, kind)}, {_float_src(o, 2, kind)})", kind)
    _need(o, kind, *_INTEGERS)
    o.allow(kind)
    return [f"copyto({o.dst(0, kind)}, alu.{kind[0]}div({o.src(1, kind)}, {o.src(2, kind)})$W)"]


@_emits("rem")
def _rem(o: Operands) -> list[str]:
    kind = o.instruction.mods[-1]
    _need(o, kind, *_INTEGERS)
    o.allow(kind)
    return [f"copyto({o.dst(0, kind)}, alu.{kind[0]}rem({o.src(1, kind)}, {o.src(2, kind)})$W)"]


@_emits("rcp", "sqrt", "rsqrt", "ex2", "lg2", "sin", "cos", "tanh")
def _unary_function(o: Operands) -> list[str]:
    mods, kind = o.instruction.mods, o.instruction.mods[-1]
    if kind in _HALVES and mods[0] in ("tanh", "ex2"):
        o.allow("approx", "ftz", kind)
        return _half(o, mods[0], kind, 1)
    _need(o, kind, "f32", "f64")
    if "approx" in mods:
        o.allow("approx", "ftz", kind)
        function = f'alu.APPROXIMATE["{mods[0]}"]'
    else:
        if mods[0] not in ("rcp", "sqrt"):
            raise UnknownInstruction(f"{o.instruction.opcode} is not known")
        o.allow("rn", "ftz", kind)
        function = "alu.rcp" if mods[0] == "rcp" else "sqrt"
    return _float_result(o, f"{function}({_float_src(o, 1, kind)})", kind)


@_emits("min", "max")
def _minmax(o: Operands) -> list[str]:
    mods, kind = o.instruction.mods, o.instruction.mods[-1]
    suffix = "_nan" if "NaN" in mods else ""
    if kind in _HALVES:
        o.allow("NaN", kind)
        return _half(o, mods[0] + suffix, kind, 2)
    if kind in ("f32", "f64"):
        o.allow("NaN", "ftz", kind)
        a, b = _float_src(o, 1, kind), _float_src(o, 2, kind)
        return [f"copyto({o.dst(0, kind)}, alu.f{mods[0]}{suffix}({a}, {b})$W)"]
    if kind in ("u16x2", "s16x2"):
        o.allow(kind)
        call = (
            f'alu.pairs(alu.np.{mods[0]}imum, "{kind[:3]}", {o.src(1, "b32")}, {o.src(2, "b32")})'
        )
        return [f"copyto({o.dst(0, 'b32')}, {call}$W)"]
    _need(o, kind, *_INTEGERS)
    o.allow(kind)
    return [f"{mods[0]}imum({o.src(1, kind)}, {o.src(2, kind)}, out={o.dst(0, kind)}$W)"]


@_emits("neg", "abs")
def _neg(o: Operands) -> list[str]:
    mods, kind = o.instruction.mods, o.instruction.mods[-1]
    if kind in _HALVES:
        o.allow(kind)
        return _half(o, mods[0], kind, 1)
    function = "negative" if mods[0] == "neg" else "absolute"
    if kind in ("f32", "f64"):
        o.allow("ftz", kind)
        value = f"{function}({_float_src(o, 1, kind)})"
        return [f"copyto({o.dst(0, kind)}, {value}$W)"]
    _need(o, kind, "s16", "s32", "s64")
    o.allow(kind)
    return [f"{function}({o.src(1, kind)}, {o.dst(0, kind)}$W)"]


@_emits("copysign")
def _copysign(o: Operands) -> list[str]:
    kind = o.instruction.mods[-1]
    _need(o, kind, "f32", "f64")
    o.allow(kind)
    return [f"copyto({o.dst(0, kind)}, alu.copysign({o.src(1, kind)}, {o.src(2, kind)})$W)"]


@_emits("testp")
def _testp(o: Operands) -> list[str]:
    kind = o.instruction.mods[-1]
    _need(o, kind, "f32")
    what = o.instruction.mods[1]
    o.allow("finite", "infinite", "number", "notanumber", "normal", "subnormal", kind)
    return [f'copyto({o.dst(0, "pred")}, alu.testp("{what}", {o.src(1, kind)})$W)']


# --- logic, shifts and bit fields -------------------------------------------------------------

_LOGIC_KINDS = ("pred", "b16", "b32", "b64")


@_emits("and", "or", "xor")
def _logic(o: Operands) -> list[str]:
    base, kind = o.instruction.mods[0], o.instruction.mods[-1]
    _need(o, kind, *_LOGIC_KINDS)
    o.allow(kind)
    prefix = "logical" if kind == "pred" else "bitwise"
    return [f"{prefix}_{base}({o.src(1, kind)}, {o.src(2, kind)}, {o.dst(0, kind)}$W)"]


@_emits("not")
def _not(o: Operands) -> list[str]:
    kind = o.instruction.mods[-1]
    _need(o, kind, *_LOGIC_KINDS)
    o.allow(kind)
    function = "logical_not" if kind == "pred" else "invert"
    return [f"{function}({o.src(1, kind)}, {o.dst(0, kind)}$W)"]


@_emits("cnot")
def _cnot(o: Operands) -> list[str]:
    kind = o.instruction.mods[-1]
    _need(o, kind, "b16", "b32", "b64")
    o.allow(kind)
    return [f"copyto({o.dst(0, kind)}, {o.src(1, kind)} == 0$W)"]


@_emits("shl", "shr")
def _shift(o: Operands) -> list[str]:
    base, kind = o.instruction.mods[0], o.instruction.mods[-1]
    _need(o, kind, "b16", "b32", "b64", *(_INTEGERS if base == "shr" else ()))
    o.allow(kind)
    amount = o.text(2)
    if o.program.is_register(amount) or amount.startswith("%"):
        function = "alu.shift_left" if base == "shl" else "alu.shift_right"
        call = f"{function}({o.src(1, kind)}, {o.src(2, 'u32')})"
        return [f"copyto({o.dst(0, kind)}, {call}$W)"]
    count = int(immediate(amount, "u32")[0])  # type: ignore[index]
    clamped = o.program.constant(np.array([min(count, 8 * BYTES[kind])], DTYPES[kind]))
    function = "left_shift" if base == "shl" else "right_shift"
    return [f"{function}({o.src(1, kind)}, {clamped}, {o.dst(0, kind)}$W)"]


@_emits("shf")
def _funnel_shift(o: Operands) -> list[str]:
    mods = o.instruction.mods
    o.allow("l", "r", "clamp", "wrap", "b32")
    arguments = ", ".join(o.src(i, "u32") for i in (1, 2, 3))
    call = f"alu.shf({arguments}, left={'l' in mods[1:]}, wrap={'wrap' in mods})"
    return [f"copyto({o.dst(0, 'u32')}, {call}$W)"]


@_emits("popc", "clz", "bfind")
def _count(o: Operands) -> list[str]:
    base, kind = o.instruction.mods[0], o.instruction.mods[-1]
    _need(o, kind, *(("u32", "s32", "u64", "s64") if base == "bfind" else ("b32", "b64")))
    shift = base == "bfind" and "shiftamt" in o.instruction.mods
    o.allow(kind, *(["shiftamt"] if shift else []))
    name = "bfind_shift" if shift else base
    return [f"copyto({o.dst(0, 'u32')}, alu.{name}({o.src(1, kind)})$W)"]


@_emits("brev")
def _brev(o: Operands) -> list[str]:
    kind = o.instruction.mods[-1]
    _need(o, kind, "b32", "b64")
    o.allow(kind)
    return [f"copyto({o.dst(0, kind)}, alu.brev({o.src(1, kind)})$W)"]


@_emits("bfe")
def _bfe(o: Operands) -> list[str]:
    kind = o.instruction.mods[-1]
    _need(o, kind, "u32", "s32", "u64", "s64")
    o.allow(kind)
    call = f"alu.bfe({o.src(1, kind)}, {o.src(2, 'u32')}, {o.src(3, 'u32')})"
    return [f"copyto({o.dst(0, kind)}, {call}$W)"]


@_emits("bfi")
def _bfi(o: Operands) -> list[str]:
    kind = o.instruction.mods[-1]
    _need(o, kind, "b32", "b64")
    o.allow(kind)
    call = f"alu.bfi({o.src(1, kind)}, {o.src(2, kind)}, {o.src(3, 'u32')}, {o.src(4, 'u32')})"
    return [f"copyto({o.dst(0, kind)}, {call}$W)"]


@_emits("prmt")
def _prmt(o: Operands) -> list[str]:
    o.allow("b32")
    call = f"alu.prmt({', '.join(o.src(i, 'u32') for i in (1, 2, 3))})"
    return [f"copyto({o.dst(0, 'u32')}, {call}$W)"]


@_emits("lop3")
def _lop3(o: Operands) -> list[str]:
    o.allow("b32")
    call = f"alu.lop3({', '.join(o.src(i, 'u32') for i in (1, 2, 3, 4))})"
    return [f"copyto({o.dst(0, 'u32')}, {call}$W)"]


@_emits("sad")
def _sad(o: Operands) -> list[str]:
    kind = o.instruction.mods[-1]
    _need(o, kind, *_INTEGERS)
    o.allow(kind)
    call = f"alu.sad({', '.join(o.src(i, kind) for i in (1, 2, 3))})"
    return [f"copyto({o.dst(0, kind)}, {call}$W)"]


@_emits("dp4a")
def _dp4a(o: Operands) -> list[str]:
    if o.instruction.mods != ["dp4a", "s32", "s32"]:
        raise UnknownInstruction("only dp4a.s32.s32 is known")
    call = f"alu.dp4a({', '.join(o.src(i, 's32') for i in (1, 2, 3))})"
    return [f"copyto({o.dst(0, 's32')}, {call}$W)"]


# --- comparison and selection -----------------------------------------------------------------

_COMPARE = {
    "eq": "equal", "ne": "not_equal", "lt": "less", "le": "less_equal", "gt": "greater",
    "ge": "greater_equal", "lo": "less", "ls": "less_equal", "hi": "greater",
    "hs": "greater_equal",
}  # fmt: skip


def _comparison(o: Operands, compare: str, kind: str, a: str, b: str) -> str:
    if kind in ("f16", "bf16"):
        a, b = (f'alu.half_compare("{kind}", {v})' for v in (a, b))
    elif "ftz" in o.instruction.mods:
        a, b = f"alu.flush({a})", f"alu.flush({b})"
    floating = kind in ("f16", "bf16", "f32", "f64")
    if compare in _COMPARE:
        if floating and compare == "ne":
            # Ordered: false if either operand is NaN, where NumPy says true.
            return f"(not_equal({a}, {b}) & ~isnan({a}) & ~isnan({b}))"
        return f"{_COMPARE[compare]}({a}, {b})"
    if floating and compare.endswith("u") and compare[:-1] in _COMPARE:
        return f"alu.unordered({_COMPARE[compare[:-1]]}, {a}, {b})"
    if floating and compare == "num":
        return f"(~isnan({a}) & ~isnan({b}))"
    if floating and compare == "nan":
        return f"(isnan({a}) | isnan({b}))"
    raise UnknownInstruction(f"comparison .{compare} of .{kind}")


@_emits("setp")
def _setp(o: Operands) -> list[str]:
    mods, kind = o.instruction.mods, o.instruction.mods[-1]
    _need(o, kind, "b16", "b32", "b64", "f16", "bf16", "f32", "f64", *_INTEGERS)
    combine = next((m for m in mods[2:-1] if m in ("and", "or", "xor")), None)
    o.allow(mods[1], "ftz", kind, *([combine] if combine else []))
    lines = [f"T = {_comparison(o, mods[1], kind, o.src(1, kind), o.src(2, kind))}"]
    names = [n.strip() for n in o.text(0).split("|")]
    if combine and len(names) > 1:
        raise UnknownInstruction("setp with a Boolean operator and two destinations")
    if combine:
        lines.append(f"T = logical_{combine}(T, {o.src(3, 'pred')})")
    if names[0] != "_":
        lines.append(f"copyto({o.dst(names[0], 'pred')}, T$W)")
    if len(names) > 1 and names[1] != "_":
        lines.append(f"copyto({o.dst(names[1], 'pred')}, ~T$W)")
    return lines


@_emits("set")
def _set(o: Operands) -> list[str]:
    mods, kind = o.instruction.mods, o.instruction.mods[-1]
    result = mods[-2]
    _need(o, kind, "b16", "b32", "b64", "f32", "f64", *_INTEGERS)
    _need(o, result, "u32", "s32", "f32")
    o.allow(mods[1], "ftz", result, kind)
    test = _comparison(o, mods[1], kind, o.src(1, kind), o.src(2, kind))
    true = "float32(1)" if result == "f32" else "uint32(0xffffffff)"
    false = "float32(0)" if result == "f32" else "uint32(0)"
    d = o.dst(0, "f32" if result == "f32" else "u32")
    return [f"copyto({d}, where({test}, {true}, {false})$W)"]


@_emits("selp")
def _selp(o: Operands) -> list[str]:
    kind = o.instruction.mods[-1]
    _need(o, kind, "b16", "b32", "b64", "f32", "f64", *_INTEGERS)
    o.allow(kind)
    call = f"where({o.src(3, 'pred')}, {o.src(1, kind)}, {o.src(2, kind)})"
    return [f"copyto({o.dst(0, kind)}, {call}$W)"]


@_emits("slct")
def _slct(o: Operands) -> list[str]:
    mods = o.instruction.mods
    kind, test = mods[-2], mods[-1]
    _need(o, kind, "b16", "b32", "b64", "f32", "f64", *_INTEGERS)
    _need(o, test, "s32", "f32")
    o.allow(kind, test)
    call = f"where({o.src(3, test)} >= 0, {o.src(1, kind)}, {o.src(2, kind)})"
    return [f"copyto({o.dst(0, kind)}, {call}$W)"]


# --- moves and conversions --------------------------------------------------------------------


@_emits("mov")
def _mov(o: Operands) -> list[str]:
    kind, program = o.instruction.mods[-1], o.program
    _need(o, kind, "pred", "b16", "b32", "b64", "f32", "f64", *_INTEGERS)
    o.allow(kind)
    target, source = o.text(0), o.text(1)
    if source.startswith("{"):
        parts = o.parts(1)
        bits = 8 * BYTES[kind] // len(parts)
        program.register(target)
        o.writes.add(target)
        # All parts are read before any is written: the target may be one of them.
        names = [f"t{i}" for i in range(len(parts))]
        lines = [f"{n} = {o.src(p, f'u{bits}')}.copy()" for n, p in zip(names, parts, strict=True)]
        return lines + [
            f"copyto(V[{program.slot(target, f'part{bits}:{i}')}], {n}$W)"
            for i, n in enumerate(names)
        ]
    if target.startswith("{"):
        parts = o.parts(0)
        bits = 8 * BYTES[kind] // len(parts)
        if not program.is_register(source):
            raise PtxSyntaxError("mov to a vector takes a register")
        o.reads.add(source)
        lines = [
            f"t{i} = V[{program.slot(source, f'part{bits}:{i}')}].copy()" for i in range(len(parts))
        ]
        return lines + [
            f"copyto({o.dst(p, f'u{bits}')}, t{i}$W)" for i, p in enumerate(parts) if p != "_"
        ]
    if re.match(r"^%(clock|globaltimer)", source):
        return [f"copyto({o.dst(0, kind)}, X.clock(), casting='unsafe'$W)"]
    return [f"copyto({o.dst(0, kind)}, {o.src(1, kind)}$W)"]


@_emits("cvt")
def _cvt(o: Operands) -> list[str]:
    mods = o.instruction.mods
    to, source = mods[-2], mods[-1]
    fp8 = ("e4m3x2", "e5m2x2")
    if to in ("f16x2", "bf16x2") and source == "f32":
        o.allow("rn", to, source)
        call = f'alu.pack_halves("{to}", {o.src(1, "f32")}, {o.src(2, "f32")})'
        return [f"copyto({o.dst(0, 'u32')}, {call}$W)"]
    if to in fp8:
        o.allow("rn", "satfinite", to, source)
        if source == "f32":
            call = f'alu.pack_fp8("{to}", {o.src(1, "f32")}, {o.src(2, "f32")})'
        else:
            _need(o, source, "f16x2")
            call = f'alu.pack_fp8_halves("{to}", {o.src(1, "u32")})'
        return [f"copyto({o.dst(0, 'u16')}, {call}$W)"]
    if source in fp8:
        _need(o, to, "f16x2")
        o.allow("rn", to, source)
        return [f'copyto({o.dst(0, "u32")}, alu.unpack_fp8("{source}", {o.src(1, "u16")})$W)']
    if to == "bf16" or (to == "f16" and source != "f16"):
        _need(o, source, "f32")
        o.allow("rn", to, source)
        return [f"copyto({o.dst(0, 'u16')}, alu.to_{to}({o.src(1, 'f32')})$W)"]
    if source in ("bf16", "f16"):
        _need(o, to, "f32")
        o.allow(to, source)
        return [f"copyto({o.dst(0, 'f32')}, alu.from_{source}({o.src(1, 'u16')})$W)"]
    _need(o, to, "u8", "s8", "f32", "f64", *_INTEGERS)
    _need(o, source, "u8", "s8", "f32", "f64", *_INTEGERS)
    rounding = next((m for m in mods[1:] if m in ("rni", "rzi", "rmi", "rpi")), None)
    if source[0] == "f":
        value = _float_src(o, 1, source)
        if to[0] == "f":
            o.allow("rn", "rni", "rzi", "rmi", "rpi", "sat", "ftz", to, source)
            if rounding:
                value = f'alu.float_to_integral({value}, "{rounding}")'
            if to != source:
                value = f"{value}.astype({DTYPES[to].__name__})"
            return _float_result(o, value, to)
        if rounding is None:
            raise UnknownInstruction("cvt from float to integer without a rounding")
        o.allow(rounding, "ftz", to, source)
        value = f'alu.float_to_integer({value}, "{rounding}", "{to}")'
        return [f"copyto({o.dst_wide(0, to[0] == 's')}, {value}$W)"]
    if BYTES[source] == 1:
        file = o.program.register(o.text(1))[0]
        value = f'alu.narrow({o.src(1, _FILE_UNSIGNED[file])}, "{source}")'
    else:
        value = o.src(1, source)
    if to[0] == "f":
        o.allow("rn", "sat", to, source)
        return _float_result(o, f"{value}.astype({DTYPES[to].__name__})", to)
    o.allow("sat", to, source)
    if "sat" in mods:
        value = f'alu.integer_saturate({value}, "{to}")'
    value = f"{value}.astype({DTYPES[to].__name__})"
    return [f"copyto({o.dst_wide(0, to[0] == 's')}, {value}$W)"]


@_emits("cvta")
def _cvta(o: Operands) -> list[str]:
    mods = o.instruction.mods
    space = next((m for m in mods if m in _WINDOWS), None)
    if space is None or mods[-1] != "u64":
        raise UnknownInstruction(f"{o.instruction.opcode} is not known")
    o.allow("to", space, "u64")
    window = _WINDOWS[space]
    if not window:
        return [f"copyto({o.dst(0, 'u64')}, {o.src(1, 'u64')}$W)"]
    function = "subtract" if "to" in mods else "add"
    constant = o.program.constant(np.array([window], np.uint64))
    return [f"{function}({o.src(1, 'u64')}, {constant}, {o.dst(0, 'u64')}$W)"]


# Parameter addresses carry their window from the start; .global is the identity.
_WINDOWS = {
    "shared": SHARED_WINDOW, "shared::cta": SHARED_WINDOW, "shared::cluster": SHARED_WINDOW,
    "local": LOCAL_WINDOW, "global": 0, "const": 0, "param": 0,
}  # fmt: skip


@_emits("isspacep")
def _isspacep(o: Operands) -> list[str]:
    space = o.instruction.mods[1]
    window = {
        "shared": 1, "shared::cta": 1, "shared::cluster": 1, "local": 2, "param": 3, "global": 0,
    }.get(space)  # fmt: skip
    if window is None:
        raise UnknownInstruction(f"isspacep.{space}")
    return [f"copyto({o.dst(0, 'pred')}, ({o.src(1, 'u64')} >> uint64(56)) == {window}$W)"]


@_emits("mapa")
def _mapa(o: Operands) -> list[str]:
    """mapa: the address of the same variable in another CTA of the cluster (PTX ISA 9.7.9.23)."""
    kind = o.instruction.mods[-1]
    _need(o, kind, "u32", "u64")
    o.allow("shared::cluster", kind)
    # Without .shared::cluster the operand is a generic address; the rank bits are the same.
    constant = o.program.constant
    mask = constant(np.array([2 ** (8 * BYTES[kind]) - 1 - (0xFF << RANK_SHIFT)], DTYPES[kind]))
    shift = constant(np.array([RANK_SHIFT], DTYPES[kind]))
    rank = f"{o.src(2, 'u32')}.astype({DTYPES[kind].__name__})"
    value = f"({o.src(1, kind)} & {mask}) | ({rank} << {shift})"
    return [f"copyto({o.dst(0, kind)}, {value}$W)"]


@_emits("getctarank")
def _getctarank(o: Operands) -> list[str]:
    kind = o.instruction.mods[-1]
    _need(o, kind, "u32", "u64")
    o.allow("shared::cluster", kind)
    value = f"(({o.src(1, kind)} >> {RANK_SHIFT}) & 255).astype(uint32)"
    return [f"copyto({o.dst(0, 'u32')}, {value}$W)"]


# --- warp-wide instructions -------------------------------------------------------------------


@_emits("elect")
def _elect(o: Operands) -> list[str]:
    o.allow("sync")
    names = [n.strip() for n in o.text(0).split("|")]
    leader = o.dst(names[0], "u32") if names[0] != "_" else "None"
    return [f"X.elect({leader}, {o.dst(names[1], 'pred')}, {o.src(1, 'u32')}, $M)"]


@_emits("shfl")
def _shfl(o: Operands) -> list[str]:
    mods = o.instruction.mods
    if len(mods) != 4 or mods[1] != "sync" or mods[2] not in ("up", "down", "bfly", "idx"):
        raise UnknownInstruction(f"{o.instruction.opcode} is not known")
    _need(o, mods[3], "b32")
    names = [n.strip() for n in o.text(0).split("|")]
    ok = o.dst(names[1], "pred") if len(names) > 1 else "None"
    arguments = ", ".join(o.src(i, "u32") for i in (1, 2, 3, 4))
    return [f'X.shfl("{mods[2]}", {o.dst(names[0], "u32")}, {ok}, {arguments}, $M)']


@_emits("vote")
def _vote(o: Operands) -> list[str]:
    mods = o.instruction.mods
    if len(mods) != 4 or mods[1] != "sync" or mods[2] not in ("any", "all", "uni", "ballot"):
        raise UnknownInstruction(f"{o.instruction.opcode} is not known")
    d = o.dst(0, "u32" if mods[2] == "ballot" else "pred")
    return [f'X.vote("{mods[2]}", {d}, {o.src(1, "pred")}, {o.src(2, "u32")}, $M)']


@_emits("match")
def _match(o: Operands) -> list[str]:
    mods = o.instruction.mods
    if mods[1:3] != ["any", "sync"] or mods[3] not in ("b32", "b64"):
        raise UnknownInstruction(f"{o.instruction.opcode} is not known")
    return [f"X.match_any({o.dst(0, 'u32')}, {o.src(1, mods[3])}, {o.src(2, 'u32')}, $M)"]


@_emits("activemask")
def _activemask(o: Operands) -> list[str]:
    o.allow("b32")
    return [f"X.activemask({o.dst(0, 'u32')}, $M)"]


@_emits("redux")
def _redux(o: Operands) -> list[str]:
    mods, kind = o.instruction.mods, o.instruction.mods[-1]
    _need(o, kind, "u32", "s32", "b32")
    o.allow("sync", "add", "min", "max", "and", "or", "xor", kind)
    return [f'X.redux("{mods[2]}", {o.dst(0, kind)}, {o.src(1, kind)}, {o.src(2, "u32")}, $M)']


@_emits("bar")
def _warp_barrier(o: Operands) -> list[str]:
    """bar.warp.sync; the barriers of a CTA are not straight-line code (barriers.py)."""
    o.allow("warp", "sync")
    return [f"X.warp_sync({o.src(0, 'u32')}, $M)"]


# --- memory -----------------------------------------------------------------------------------

_SPACES = ("global", "shared", "shared::cta", "shared::cluster", "param", "local", "const")
_ORDERS = ("weak", "relaxed", "acquire", "release", "volatile", "cta", "cluster", "gpu", "sys")
_CACHES = (
    "ca", "cg", "cs", "lu", "cv", "wb", "wt", "nc", "L1::evict_normal", "L1::evict_unchanged",
    "L1::evict_first", "L1::evict_last", "L1::no_allocate", "L2::evict_first", "L2::evict_last",
    "L2::evict_normal", "L2::cache_hint", "L2::64B", "L2::128B", "L2::256B",
)  # fmt: skip


def _space(o: Operands) -> str:
    space = next((m for m in o.instruction.mods[1:] if m in _SPACES), "generic")
    return {"shared": "shared::cta", "const": "global"}.get(space, space)


def _vector(o: Operands) -> int:
    return next((int(m[1]) for m in o.instruction.mods if m in ("v2", "v4")), 1)


def _note_width(o: Operands, space: str, bytes_: int):
    if space.startswith("shared") or space == "generic":
        o.program.granule = min(o.program.granule, bytes_)


@_emits("ld", "ldu")
def _ld(o: Operands) -> list[str]:
    kind, space, vector = o.instruction.mods[-1], _space(o), _vector(o)
    _need(o, kind, "u8", "s8", "b8", "b16", "b32", "b64", "f32", "f64", *_INTEGERS)
    o.allow(*_SPACES, *_ORDERS, *_CACHES, "v2", "v4", kind)
    address, offset = o.address(1)
    targets = o.parts(0)
    if len(targets) != vector:
        raise PtxSyntaxError("the vector has not the length of the opcode")
    _note_width(o, space, BYTES[kind] * vector)
    views = ", ".join(o.dst_wide(t, kind[0] == "s") if t != "_" else "None" for t in targets)
    acquire = bool({"acquire", "volatile", "relaxed"} & set(o.instruction.mods))
    return [
        f'X.load("{space}", {address}, {offset}, {BYTES[kind]}, {vector}, ({views},), '
        f"{kind[0] == 's'}, {acquire}, $M)"
    ]


@_emits("st")
def _st(o: Operands) -> list[str]:
    kind, space, vector = o.instruction.mods[-1], _space(o), _vector(o)
    _need(o, kind, "u8", "s8", "b8", "b16", "b32", "b64", "f32", "f64", *_INTEGERS)
    o.allow(*_SPACES, *_ORDERS, *_CACHES, "v2", "v4", kind)
    if space in ("param",):
        raise UnknownInstruction("st.param")
    address, offset = o.address(0)
    sources = o.parts(1)
    if len(sources) != vector:
        raise PtxSyntaxError("the vector has not the length of the opcode")
    _note_width(o, space, BYTES[kind] * vector)
    values = []
    for source in sources:
        if o.program.is_register(source):
            o.reads.add(source)
            file = _FILE_UNSIGNED[o.program.register(source)[0]]
            values.append(f"V[{o.program.slot(source, file)}]")
        else:
            values.append(f"{o.src(source, kind)}.view({_unsigned_name(kind)})")
    return [
        f'X.store("{space}", {address}, {offset}, {BYTES[kind]}, {vector}, '
        f"({', '.join(values)},), $M)"
    ]


def _unsigned_name(kind: str) -> str:
    return f"uint{8 * BYTES[kind]}"


@_emits("atom", "red")
def _atom(o: Operands) -> list[str]:
    mods, kind, space, vector = o.instruction.mods, o.instruction.mods[-1], _space(o), _vector(o)
    operation = next((m for m in mods[1:] if m in _ATOMICS), None)
    _need(o, kind, "u32", "s32", "u64", "s64", "b32", "b64", "f32")
    if operation is None or (kind == "f32" and operation != "add"):
        raise UnknownInstruction(f"{o.instruction.opcode} is not known")
    if vector > 1 and (kind != "f32" or space not in ("global", "generic")):
        raise UnknownInstruction(f"{o.instruction.opcode} is not known")
    o.allow(*_SPACES, *_ORDERS, "acq_rel", operation, kind, *(["v2", "v4"] if vector > 1 else []))
    first = 1 if mods[0] == "atom" else 0
    olds = []
    if mods[0] == "atom" and o.text(0) != "_":
        olds = [o.dst(t, kind) for t in o.parts(0)]
    address, offset = o.address(first)
    parts = o.parts(first + 1)
    if len(parts) != vector:
        raise PtxSyntaxError("the vector has not the length of the opcode")
    if operation == "cas":
        parts.append(o.text(first + 2))
    values = "".join(f"{o.src(p, kind)}, " for p in parts)
    _note_width(o, space, 4)
    return [
        f'X.atomic("{space}", "{operation}", "{kind}", {vector}, '
        f"({''.join(f'{d}, ' for d in olds)}), {address}, {offset}, ({values}), $M)"
    ]


_ATOMICS = ("add", "min", "max", "and", "or", "xor", "exch", "cas", "inc", "dec")


@_emits("ldmatrix", "stmatrix")
def _matrix(o: Operands) -> list[str]:
    """ldmatrix, stmatrix of 8x8 matrices of 16-bit elements (PTX ISA 9.7.14.5.15, .16)."""
    mods = o.instruction.mods
    o.allow("sync", "aligned", "m8n8", "x1", "x2", "x4", "trans", "shared", "shared::cta", "b16")
    if "m8n8" not in mods:
        raise UnknownInstruction(f"{o.instruction.opcode} is not known")
    count = next(int(m[1]) for m in mods if m in ("x1", "x2", "x4"))
    load = mods[0] == "ldmatrix"
    address, offset = o.address(1 if load else 0)
    names = o.parts(0 if load else 1)
    if len(names) != count:
        raise PtxSyntaxError("the vector has not the length of the opcode")
    views = ", ".join(o.dst(n, "u32") if load else o.src(n, "u32") for n in names)
    return [
        f"X.{'load' if load else 'store'}_matrix({address}, {offset}, ({views},), "
        f"{'trans' in mods}, $M)"
    ]


@_emits("prefetch", "prefetchu", "applypriority")
def _prefetch(o: Operands) -> list[str]:
    """Hints without an effect on values."""
    o.allow(
        "tensormap", "global", "local", "param", "L1", "L2", "L2::evict_last", "L2::evict_normal"
    )
    o.address(0)
    return []


@_emits("nanosleep")
def _nanosleep(o: Operands) -> list[str]:
    o.allow("u32")
    o.src(0, "u32")
    return []


@_emits("createpolicy")
def _createpolicy(o: Operands) -> list[str]:
    o.allow(
        "fractional", "L2::evict_last", "L2::evict_normal", "L2::evict_first",
        "L2::evict_unchanged", "b64",
    )  # fmt: skip
    return [f"copyto({o.dst(0, 'u64')}, {o.program.constant(np.array([0], np.uint64))}$W)"]
