"""Arithmetic, logic, shifts and bit fields."""

from __future__ import annotations

import numpy as np

from ..errors import UnknownInstruction
from ..program import BYTES, DTYPES, immediate
from .operands import HALVES, INTEGERS, Operands, emits, float_result, float_src, need

_UNSIGNED_OF = {"s8": "u8", "s16": "u16", "s32": "u32", "s64": "u64"}


def _half_bits(kind: str) -> str:
    return "b32" if kind.endswith("x2") else "b16"


def _half(o: Operands, operation: str, kind: str, sources: int) -> list[str]:
    bits = _half_bits(kind)
    arguments = ", ".join(o.src(i + 1, bits) for i in range(sources))
    return [
        f'copyto({o.dst(0, bits)}, alu.half_arithmetic("{operation}", "{kind}", {arguments})$W)'
    ]


@emits("add", "sub")
def _add(o: Operands) -> list[str]:
    base, kind = o.instruction.mods[0], o.instruction.mods[-1]
    if kind in ("f32", "f64"):
        o.allow("rn", "ftz", "sat", kind)
        function = "add" if base == "add" else "subtract"
        a, b = float_src(o, 1, kind), float_src(o, 2, kind)
        if {"ftz", "sat"} & set(o.instruction.mods):
            return float_result(o, f"{function}({a}, {b})", kind)
        d = o.dst(0, kind)
        return [f"{function}({a}, {b}, {d}$W)", f"alu.canonical({d}, $M)"]
    if kind in HALVES:
        o.allow("rn", kind)
        return _half(o, base, kind, 2)
    if base == "add" and kind in ("u16x2", "s16x2"):
        o.allow(kind)
        call = f'alu.pairs(add, "u16", {o.src(1, "b32")}, {o.src(2, "b32")})'
        return [f"copyto({o.dst(0, 'b32')}, {call}$W)"]
    need(o, kind, *INTEGERS)
    if "sat" in o.instruction.mods:
        need(o, kind, "s32")
        o.allow("sat", kind)
        call = f"alu.saturate_{base}({o.src(1, kind)}, {o.src(2, kind)})"
        return [f"copyto({o.dst(0, kind)}, {call}$W)"]
    o.allow(kind)
    kind = _UNSIGNED_OF.get(kind, kind)
    function = "add" if base == "add" else "subtract"
    return [f"{function}({o.src(1, kind)}, {o.src(2, kind)}, {o.dst(0, kind)}$W)"]


@emits("mul", "mad")
def _mul(o: Operands) -> list[str]:
    mods, kind = o.instruction.mods, o.instruction.mods[-1]
    if kind in ("f32", "f64", *HALVES):
        if mods[0] == "mad":
            return _fma(o)
        if kind in HALVES:
            o.allow("rn", kind)
            return _half(o, "mul", kind, 2)
        o.allow("rn", "ftz", "sat", kind)
        a, b = float_src(o, 1, kind), float_src(o, 2, kind)
        if {"ftz", "sat"} & set(mods):
            return float_result(o, f"multiply({a}, {b})", kind)
        d = o.dst(0, kind)
        return [f"multiply({a}, {b}, {d}$W)", f"alu.canonical({d}, $M)"]
    need(o, kind, *INTEGERS)
    o.allow("lo", "hi", "wide", kind)
    part, unsigned = mods[1], _UNSIGNED_OF.get(kind, kind)
    if part == "lo":
        product = f"multiply({o.src(1, unsigned)}, {o.src(2, unsigned)}"
        if mods[0] == "mul":
            return [f"{product}, {o.dst(0, unsigned)}$W)"]
        return [f"add({product}), {o.src(3, unsigned)}, {o.dst(0, unsigned)}$W)"]
    if part == "wide":
        need(o, kind, "u16", "s16", "u32", "s32")
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


@emits("fma")
def _fma(o: Operands) -> list[str]:
    mods, kind = o.instruction.mods, o.instruction.mods[-1]
    if kind in HALVES:
        o.allow("rn", "relu", kind)
        return _half(o, "fma_relu" if "relu" in mods else "fma", kind, 3)
    need(o, kind, "f32")
    o.allow("rn", "ftz", "sat", kind)
    a, b, c = (float_src(o, i, kind) for i in (1, 2, 3))
    return float_result(o, f"alu.fma32({a}, {b}, {c})", kind)


@emits("div")
def _div(o: Operands) -> list[str]:
    mods, kind = o.instruction.mods, o.instruction.mods[-1]
    if kind == "f32" and ("approx" in mods or "full" in mods):
        o.allow("approx", "full", "ftz", kind)
        a, b = float_src(o, 1, kind), float_src(o, 2, kind)
        return float_result(o, f"alu.divide_approx({a}, {b})", kind)
    if kind in ("f32", "f64"):
        o.allow("rn", "ftz", kind)
        return float_result(o, f"divide({float_src(o, 1, kind)}, {float_src(o, 2, kind)})", kind)
    need(o, kind, *INTEGERS)
    o.allow(kind)
    return [f"copyto({o.dst(0, kind)}, alu.{kind[0]}div({o.src(1, kind)}, {o.src(2, kind)})$W)"]


@emits("rem")
def _rem(o: Operands) -> list[str]:
    kind = o.instruction.mods[-1]
    need(o, kind, *INTEGERS)
    o.allow(kind)
    return [f"copyto({o.dst(0, kind)}, alu.{kind[0]}rem({o.src(1, kind)}, {o.src(2, kind)})$W)"]


@emits("rcp", "sqrt", "rsqrt", "ex2", "lg2", "sin", "cos", "tanh")
def _unary_function(o: Operands) -> list[str]:
    mods, kind = o.instruction.mods, o.instruction.mods[-1]
    if kind in HALVES and mods[0] in ("tanh", "ex2"):
        o.allow("approx", "ftz", kind)
        return _half(o, mods[0], kind, 1)
    need(o, kind, "f32", "f64")
    if "approx" in mods:
        o.allow("approx", "ftz", kind)
        function = f'alu.APPROXIMATE["{mods[0]}"]'
    else:
        if mods[0] not in ("rcp", "sqrt"):
            raise UnknownInstruction(f"{o.instruction.opcode} is not known")
        o.allow("rn", "ftz", kind)
        function = "alu.rcp" if mods[0] == "rcp" else "sqrt"
    return float_result(o, f"{function}({float_src(o, 1, kind)})", kind)


@emits("min", "max")
def _minmax(o: Operands) -> list[str]:
    mods, kind = o.instruction.mods, o.instruction.mods[-1]
    suffix = "_nan" if "NaN" in mods else ""
    if kind in HALVES:
        o.allow("NaN", kind)
        return _half(o, mods[0] + suffix, kind, 2)
    if kind in ("f32", "f64"):
        o.allow("NaN", "ftz", kind)
        a, b = float_src(o, 1, kind), float_src(o, 2, kind)
        return [f"copyto({o.dst(0, kind)}, alu.f{mods[0]}{suffix}({a}, {b})$W)"]
    if kind in ("u16x2", "s16x2"):
        o.allow(kind)
        call = (
            f'alu.pairs(alu.np.{mods[0]}imum, "{kind[:3]}", {o.src(1, "b32")}, {o.src(2, "b32")})'
        )
        return [f"copyto({o.dst(0, 'b32')}, {call}$W)"]
    need(o, kind, *INTEGERS)
    o.allow(kind)
    return [f"{mods[0]}imum({o.src(1, kind)}, {o.src(2, kind)}, out={o.dst(0, kind)}$W)"]


@emits("neg", "abs")
def _neg(o: Operands) -> list[str]:
    mods, kind = o.instruction.mods, o.instruction.mods[-1]
    if kind in HALVES:
        o.allow(kind)
        return _half(o, mods[0], kind, 1)
    function = "negative" if mods[0] == "neg" else "absolute"
    if kind in ("f32", "f64"):
        o.allow("ftz", kind)
        value = f"{function}({float_src(o, 1, kind)})"
        return [f"copyto({o.dst(0, kind)}, {value}$W)"]
    need(o, kind, "s16", "s32", "s64")
    o.allow(kind)
    return [f"{function}({o.src(1, kind)}, {o.dst(0, kind)}$W)"]


@emits("copysign")
def _copysign(o: Operands) -> list[str]:
    kind = o.instruction.mods[-1]
    need(o, kind, "f32", "f64")
    o.allow(kind)
    return [f"copyto({o.dst(0, kind)}, alu.copysign({o.src(1, kind)}, {o.src(2, kind)})$W)"]


@emits("testp")
def _testp(o: Operands) -> list[str]:
    kind = o.instruction.mods[-1]
    need(o, kind, "f32")
    what = o.instruction.mods[1]
    o.allow("finite", "infinite", "number", "notanumber", "normal", "subnormal", kind)
    return [f'copyto({o.dst(0, "pred")}, alu.testp("{what}", {o.src(1, kind)})$W)']


# --- logic, shifts and bit fields -------------------------------------------------------------

_LOGIC_KINDS = ("pred", "b16", "b32", "b64")


@emits("and", "or", "xor")
def _logic(o: Operands) -> list[str]:
    base, kind = o.instruction.mods[0], o.instruction.mods[-1]
    need(o, kind, *_LOGIC_KINDS)
    o.allow(kind)
    prefix = "logical" if kind == "pred" else "bitwise"
    return [f"{prefix}_{base}({o.src(1, kind)}, {o.src(2, kind)}, {o.dst(0, kind)}$W)"]


@emits("not")
def _not(o: Operands) -> list[str]:
    kind = o.instruction.mods[-1]
    need(o, kind, *_LOGIC_KINDS)
    o.allow(kind)
    function = "logical_not" if kind == "pred" else "invert"
    return [f"{function}({o.src(1, kind)}, {o.dst(0, kind)}$W)"]


@emits("cnot")
def _cnot(o: Operands) -> list[str]:
    kind = o.instruction.mods[-1]
    need(o, kind, "b16", "b32", "b64")
    o.allow(kind)
    return [f"copyto({o.dst(0, kind)}, {o.src(1, kind)} == 0$W)"]


@emits("shl", "shr")
def _shift(o: Operands) -> list[str]:
    base, kind = o.instruction.mods[0], o.instruction.mods[-1]
    need(o, kind, "b16", "b32", "b64", *(INTEGERS if base == "shr" else ()))
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


@emits("shf")
def _funnel_shift(o: Operands) -> list[str]:
    mods = o.instruction.mods
    o.allow("l", "r", "clamp", "wrap", "b32")
    arguments = ", ".join(o.src(i, "u32") for i in (1, 2, 3))
    call = f"alu.shf({arguments}, left={'l' in mods[1:]}, wrap={'wrap' in mods})"
    return [f"copyto({o.dst(0, 'u32')}, {call}$W)"]


@emits("popc", "clz", "bfind")
def _count(o: Operands) -> list[str]:
    base, kind = o.instruction.mods[0], o.instruction.mods[-1]
    need(o, kind, *(("u32", "s32", "u64", "s64") if base == "bfind" else ("b32", "b64")))
    shift = base == "bfind" and "shiftamt" in o.instruction.mods
    o.allow(kind, *(["shiftamt"] if shift else []))
    name = "bfind_shift" if shift else base
    return [f"copyto({o.dst(0, 'u32')}, alu.{name}({o.src(1, kind)})$W)"]


@emits("brev")
def _brev(o: Operands) -> list[str]:
    kind = o.instruction.mods[-1]
    need(o, kind, "b32", "b64")
    o.allow(kind)
    return [f"copyto({o.dst(0, kind)}, alu.brev({o.src(1, kind)})$W)"]


@emits("bfe")
def _bfe(o: Operands) -> list[str]:
    kind = o.instruction.mods[-1]
    need(o, kind, "u32", "s32", "u64", "s64")
    o.allow(kind)
    call = f"alu.bfe({o.src(1, kind)}, {o.src(2, 'u32')}, {o.src(3, 'u32')})"
    return [f"copyto({o.dst(0, kind)}, {call}$W)"]


@emits("bfi")
def _bfi(o: Operands) -> list[str]:
    kind = o.instruction.mods[-1]
    need(o, kind, "b32", "b64")
    o.allow(kind)
    call = f"alu.bfi({o.src(1, kind)}, {o.src(2, kind)}, {o.src(3, 'u32')}, {o.src(4, 'u32')})"
    return [f"copyto({o.dst(0, kind)}, {call}$W)"]


@emits("prmt")
def _prmt(o: Operands) -> list[str]:
    o.allow("b32")
    call = f"alu.prmt({', '.join(o.src(i, 'u32') for i in (1, 2, 3))})"
    return [f"copyto({o.dst(0, 'u32')}, {call}$W)"]


@emits("lop3")
def _lop3(o: Operands) -> list[str]:
    o.allow("b32")
    call = f"alu.lop3({', '.join(o.src(i, 'u32') for i in (1, 2, 3, 4))})"
    return [f"copyto({o.dst(0, 'u32')}, {call}$W)"]


@emits("sad")
def _sad(o: Operands) -> list[str]:
    kind = o.instruction.mods[-1]
    need(o, kind, *INTEGERS)
    o.allow(kind)
    call = f"alu.sad({', '.join(o.src(i, kind) for i in (1, 2, 3))})"
    return [f"copyto({o.dst(0, kind)}, {call}$W)"]


@emits("dp4a")
def _dp4a(o: Operands) -> list[str]:
    if o.instruction.mods != ["dp4a", "s32", "s32"]:
        raise UnknownInstruction("only dp4a.s32.s32 is known")
    call = f"alu.dp4a({', '.join(o.src(i, 's32') for i in (1, 2, 3))})"
    return [f"copyto({o.dst(0, 's32')}, {call}$W)"]
