"""Comparison, selection, moves, conversions and addresses."""

from __future__ import annotations

import re

import numpy as np

from ..errors import PtxSyntaxError, UnknownInstruction
from ..program import BYTES, DTYPES, LOCAL_WINDOW, RANK_SHIFT, SHARED_WINDOW
from .operands import FILE_UNSIGNED, INTEGERS, Operands, emits, float_result, float_src, need

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


@emits("setp")
def _setp(o: Operands) -> list[str]:
    mods, kind = o.instruction.mods, o.instruction.mods[-1]
    need(o, kind, "b16", "b32", "b64", "f16", "bf16", "f32", "f64", *INTEGERS)
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


@emits("set")
def _set(o: Operands) -> list[str]:
    mods, kind = o.instruction.mods, o.instruction.mods[-1]
    result = mods[-2]
    need(o, kind, "b16", "b32", "b64", "f32", "f64", *INTEGERS)
    need(o, result, "u32", "s32", "f32")
    o.allow(mods[1], "ftz", result, kind)
    test = _comparison(o, mods[1], kind, o.src(1, kind), o.src(2, kind))
    true = "float32(1)" if result == "f32" else "uint32(0xffffffff)"
    false = "float32(0)" if result == "f32" else "uint32(0)"
    d = o.dst(0, "f32" if result == "f32" else "u32")
    return [f"copyto({d}, where({test}, {true}, {false})$W)"]


@emits("selp")
def _selp(o: Operands) -> list[str]:
    kind = o.instruction.mods[-1]
    need(o, kind, "b16", "b32", "b64", "f32", "f64", *INTEGERS)
    o.allow(kind)
    call = f"where({o.src(3, 'pred')}, {o.src(1, kind)}, {o.src(2, kind)})"
    return [f"copyto({o.dst(0, kind)}, {call}$W)"]


@emits("slct")
def _slct(o: Operands) -> list[str]:
    mods = o.instruction.mods
    kind, test = mods[-2], mods[-1]
    need(o, kind, "b16", "b32", "b64", "f32", "f64", *INTEGERS)
    need(o, test, "s32", "f32")
    o.allow(kind, test)
    call = f"where({o.src(3, test)} >= 0, {o.src(1, kind)}, {o.src(2, kind)})"
    return [f"copyto({o.dst(0, kind)}, {call}$W)"]


# --- moves and conversions --------------------------------------------------------------------


@emits("mov")
def _mov(o: Operands) -> list[str]:
    kind, program = o.instruction.mods[-1], o.program
    need(o, kind, "pred", "b16", "b32", "b64", "f32", "f64", *INTEGERS)
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


@emits("cvt")
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
            need(o, source, "f16x2")
            call = f'alu.pack_fp8_halves("{to}", {o.src(1, "u32")})'
        return [f"copyto({o.dst(0, 'u16')}, {call}$W)"]
    if source in fp8:
        need(o, to, "f16x2")
        o.allow("rn", to, source)
        return [f'copyto({o.dst(0, "u32")}, alu.unpack_fp8("{source}", {o.src(1, "u16")})$W)']
    if to == "bf16" or (to == "f16" and source != "f16"):
        need(o, source, "f32")
        o.allow("rn", to, source)
        return [f"copyto({o.dst(0, 'u16')}, alu.to_{to}({o.src(1, 'f32')})$W)"]
    if source in ("bf16", "f16"):
        need(o, to, "f32")
        o.allow(to, source)
        return [f"copyto({o.dst(0, 'f32')}, alu.from_{source}({o.src(1, 'u16')})$W)"]
    need(o, to, "u8", "s8", "f32", "f64", *INTEGERS)
    need(o, source, "u8", "s8", "f32", "f64", *INTEGERS)
    rounding = next((m for m in mods[1:] if m in ("rni", "rzi", "rmi", "rpi")), None)
    if source[0] == "f":
        value = float_src(o, 1, source)
        if to[0] == "f":
            o.allow("rn", "rni", "rzi", "rmi", "rpi", "sat", "ftz", to, source)
            if rounding:
                value = f'alu.float_to_integral({value}, "{rounding}")'
            if to != source:
                value = f"{value}.astype({DTYPES[to].__name__})"
            return float_result(o, value, to)
        if rounding is None:
            raise UnknownInstruction("cvt from float to integer without a rounding")
        o.allow(rounding, "ftz", to, source)
        value = f'alu.float_to_integer({value}, "{rounding}", "{to}")'
        return [f"copyto({o.dst_wide(0, to[0] == 's')}, {value}$W)"]
    if BYTES[source] == 1:
        file = o.program.register(o.text(1))[0]
        value = f'alu.narrow({o.src(1, FILE_UNSIGNED[file])}, "{source}")'
    else:
        value = o.src(1, source)
    if to[0] == "f":
        o.allow("rn", "sat", to, source)
        return float_result(o, f"{value}.astype({DTYPES[to].__name__})", to)
    o.allow("sat", to, source)
    if "sat" in mods:
        value = f'alu.integer_saturate({value}, "{to}")'
    value = f"{value}.astype({DTYPES[to].__name__})"
    return [f"copyto({o.dst_wide(0, to[0] == 's')}, {value}$W)"]


@emits("cvta")
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


@emits("isspacep")
def _isspacep(o: Operands) -> list[str]:
    space = o.instruction.mods[1]
    window = {
        "shared": 1, "shared::cta": 1, "shared::cluster": 1, "local": 2, "param": 3, "global": 0,
    }.get(space)  # fmt: skip
    if window is None:
        raise UnknownInstruction(f"isspacep.{space}")
    return [f"copyto({o.dst(0, 'pred')}, ({o.src(1, 'u64')} >> uint64(56)) == {window}$W)"]


@emits("mapa")
def _mapa(o: Operands) -> list[str]:
    """mapa: the address of the same variable in another CTA of the cluster (PTX ISA 9.7.9.23)."""
    kind = o.instruction.mods[-1]
    need(o, kind, "u32", "u64")
    o.allow("shared::cluster", kind)
    # Without .shared::cluster the operand is a generic address; the rank bits are the same.
    constant = o.program.constant
    mask = constant(np.array([2 ** (8 * BYTES[kind]) - 1 - (0xFF << RANK_SHIFT)], DTYPES[kind]))
    shift = constant(np.array([RANK_SHIFT], DTYPES[kind]))
    rank = f"{o.src(2, 'u32')}.astype({DTYPES[kind].__name__})"
    value = f"({o.src(1, kind)} & {mask}) | ({rank} << {shift})"
    return [f"copyto({o.dst(0, kind)}, {value}$W)"]


@emits("getctarank")
def _getctarank(o: Operands) -> list[str]:
    kind = o.instruction.mods[-1]
    need(o, kind, "u32", "u64")
    o.allow("shared::cluster", kind)
    value = f"(({o.src(1, kind)} >> {RANK_SHIFT}) & 255).astype(uint32)"
    return [f"copyto({o.dst(0, 'u32')}, {value}$W)"]
