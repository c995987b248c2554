"""Loads, stores, atomics, matrices and hints."""

from __future__ import annotations

import numpy as np

from ..errors import PtxSyntaxError, UnknownInstruction
from ..program import BYTES
from .operands import FILE_UNSIGNED, INTEGERS, Operands, emits, need

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


def _semantics(o: Operands, default: str = "weak") -> str:
    """Order and scope of an access, or None where it is weak (PTX ISA, "Operation types")."""
    mods = o.instruction.mods
    order = next((m for m in mods if m in _STRONG), default)
    if order == "weak":
        return "None"
    scope = next((m for m in mods if m in ("cta", "cluster", "gpu", "sys")), "gpu")
    if order == "volatile":
        order, scope = "relaxed", "sys"
    return f'Semantics("{order}", "{scope}")'


_STRONG = ("relaxed", "acquire", "release", "acq_rel", "volatile")


def _note_width(o: Operands, space: str, bytes_: int):
    if space.startswith("shared") or space == "generic":
        o.program.granule = min(o.program.granule, bytes_)


@emits("ld", "ldu")
def _ld(o: Operands) -> list[str]:
    kind, space, vector = o.instruction.mods[-1], _space(o), _vector(o)
    need(o, kind, "u8", "s8", "b8", "b16", "b32", "b64", "f32", "f64", *INTEGERS)
    o.allow(*_SPACES, *_ORDERS, *_CACHES, "v2", "v4", kind)
    targets = o.parts(0)
    if space == "param" and o.is_result_of_a_call(1):
        zero = o.program.constant(np.array([0], np.uint32))
        return [f"copyto({o.dst_wide(t)}, {zero}, casting='unsafe'$W)" for t in targets]
    address, offset = o.address(1)
    if len(targets) != vector:
        raise PtxSyntaxError("the vector has not the length of the opcode")
    _note_width(o, space, BYTES[kind] * vector)
    views = ", ".join(o.dst_wide(t, kind[0] == "s") if t != "_" else "None" for t in targets)
    return [
        f'X.load("{space}", {address}, {offset}, {BYTES[kind]}, {vector}, ({views},), '
        f"{kind[0] == 's'}, {_semantics(o)}, $M)"
    ]


@emits("st")
def _st(o: Operands) -> list[str]:
    kind, space, vector = o.instruction.mods[-1], _space(o), _vector(o)
    need(o, kind, "u8", "s8", "b8", "b16", "b32", "b64", "f32", "f64", *INTEGERS)
    o.allow(*_SPACES, *_ORDERS, *_CACHES, "v2", "v4", kind)
    if space == "param":
        # An argument of a call (special.py): it is read, and nothing looks at it.
        for source in o.parts(1):
            o.src(source, kind)
        return []
    address, offset = o.address(0)
    sources = o.parts(1)
    if len(sources) != vector:
        raise PtxSyntaxError("the vector has not the length of the opcode")
    _note_width(o, space, BYTES[kind] * vector)
    values = []
    for source in sources:
        if o.program.is_register(source):
            o.reads.add(source)
            file = FILE_UNSIGNED[o.program.register(source)[0]]
            values.append(f"V[{o.program.slot(source, file)}]")
        else:
            values.append(f"{o.src(source, kind)}.view({_unsigned_name(kind)})")
    return [
        f'X.store("{space}", {address}, {offset}, {BYTES[kind]}, {vector}, '
        f"({', '.join(values)},), {_semantics(o)}, $M)"
    ]


def _unsigned_name(kind: str) -> str:
    return f"uint{8 * BYTES[kind]}"


@emits("atom", "red")
def _atom(o: Operands) -> list[str]:
    mods, kind, space, vector = o.instruction.mods, o.instruction.mods[-1], _space(o), _vector(o)
    operation = next((m for m in mods[1:] if m in _ATOMICS), None)
    need(o, kind, "u32", "s32", "u64", "s64", "b32", "b64", "f32")
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
        f"({''.join(f'{d}, ' for d in olds)}), {address}, {offset}, ({values}), "
        f"{_semantics(o, 'relaxed')}, $M)"
    ]


_ATOMICS = ("add", "min", "max", "and", "or", "xor", "exch", "cas", "inc", "dec")


@emits("ldmatrix", "stmatrix")
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


@emits("prefetch", "prefetchu", "applypriority")
def _prefetch(o: Operands) -> list[str]:
    """Hints without an effect on values."""
    o.allow(
        "tensormap", "global", "local", "param", "L1", "L2", "L2::evict_last", "L2::evict_normal"
    )
    o.address(0)
    return []


@emits("nanosleep")
def _nanosleep(o: Operands) -> list[str]:
    o.allow("u32")
    o.src(0, "u32")
    return []


@emits("createpolicy")
def _createpolicy(o: Operands) -> list[str]:
    o.allow(
        "fractional", "L2::evict_last", "L2::evict_normal", "L2::evict_first",
        "L2::evict_unchanged", "b64",
    )  # fmt: skip
    return [f"copyto({o.dst(0, 'u64')}, {o.program.constant(np.array([0], np.uint64))}$W)"]
