"""Faults to plant in the activation kernels.

The kernels are unrolled, so that one line of source is many instructions: an edit changes each of
them, as a fault in the source would.
"""

from __future__ import annotations

import re

from tests.faults.ptx import WRONG_RESULT, NoMatch, Ptx, planted
from tests.faults.quantize import INFINITY, SMALLEST_NORMAL

NUMBER = r"%f\d+"
LOADS = r"\bld\.global\.nc\.v4\.u32\b"
BARRIER = r"\bbar\.sync\b"
MUL, FMA, ADD = r"\bmul\.rn\.f32\b", r"\bfma\.rn\.f32\b", r"\badd\.rn\.f32\b"
MIN, EX2, RCP = r"\bmin\.f32\b", r"\bex2\.approx\b", r"\brcp\.approx\b"
POINT = (MUL, MIN, FMA, MUL, MUL, EX2, ADD, RCP)  # activation.cuh, Activation::at
SLOPE = (ADD, MUL, FMA, MUL, FMA)  # Activation::slope


def elements(ptx: Ptx, *then: str) -> list[list[int]]:
    """For each element, the lines of the instructions of POINT, then of `then`, in order."""
    patterns = [re.compile(p) for p in (*POINT, *then)]
    found, lines = [], []
    for i, line in enumerate(ptx.lines):
        if patterns[len(lines)].search(line):
            lines.append(i)
        if len(lines) == len(patterns):
            found.append(lines)
            lines = []
    if len(found) < 8:
        raise NoMatch(f"{len(found)} elements")
    return found


def barrier(ptx: Ptx, which: int, count: int) -> int:
    """One of the kernel's barriers; the last three are those of quantize_tile.cuh."""
    found = ptx.all(BARRIER)
    if len(found) != count:
        raise NoMatch(f"{len(found)} barriers, expected {count}")
    return found[which]


def never(ptx: Ptx, pattern: str):
    """The comparisons with `pattern` give false."""
    for place in ptx.all(pattern):
        predicate = re.search(r"setp\S*\s+(%p\d+)", ptx.lines[place])[1]
        ptx.lines[place] = f"setp.ne.u32 {predicate}, 0, 0;"


def never_taken(ptx: Ptx, store: int):
    """The branch around a store."""
    ptx.drop(ptx.before(store, r"^\s*@%\w+ bra"))


def loaded_halves(ptx: Ptx) -> tuple[int, list[tuple[str, str]]]:
    """Where all 8 rows are loaded and none is used, and the words of gate and up that are loaded 16 bytes at a time."""
    words = [ptx.operands(i)[:4] for i in ptx.all(LOADS, least=16)]
    if len(words) != 16:
        raise NoMatch(f"{len(words)} loads of 16 bytes, expected 8 of each half")
    square = elements(ptx)[0][0]
    first = ptx.definition(ptx.operands(square)[1], square)
    first = ptx.definition(ptx.operands(first)[1], square)
    return first, list(zip(sum(words[:8], []), sum(words[8:], []), strict=True))


# ---- The activation (activation.cuh)


@planted("activation rows with NaN", "the square is not limited", WRONG_RESULT)
def _(ptx):
    for place in ptx.all(MIN, least=8):
        ptx.replace(place, rf"min\.f32 ({NUMBER}), ({NUMBER}), {NUMBER};", r"mov.f32 \1, \2;")


@planted("activation rows", "the exponent has the wrong sign", WRONG_RESULT)
def _(ptx):
    for place in ptx.all("0fBFB8AA3B"):
        ptx.replace(place, "0fBFB8AA3B", "0f3FB8AA3B")


@planted("activation rows", "the exponent is of e, not of 2", WRONG_RESULT)
def _(ptx):
    for place in ptx.all("0fBFB8AA3B"):
        ptx.replace(place, "0fBFB8AA3B", "0fBF800000")


@planted("activation rows", "one is not added to the exponential", WRONG_RESULT)
def _(ptx):
    for *_, add, _ in elements(ptx):
        ptx.replace(add, rf"add\.rn\.f32 ({NUMBER}), {NUMBER}, ({NUMBER});", r"mov.f32 \1, \2;")


@planted("activation rows", "silu and gelu are exchanged", WRONG_RESULT)
def _(ptx):
    test = ptx.definition(re.search(r"(%p\d+);", ptx.lines[ptx.first(r"selp\.f32.*0f3FCC422A")])[1])
    ptx.replace(test, r"setp\.eq", "setp.ne")


@planted("activation both", "gelu has no cubic term", WRONG_RESULT)
def _(ptx):
    for place in ptx.all("0f3D922279"):
        ptx.replace(place, "0f3D922279", "0f00000000")


@planted("activation both", "gelu's cubic term is a third too large", WRONG_RESULT)
def _(ptx):
    for place in ptx.all("0f3D922279"):
        ptx.replace(place, "0f3D922279", "0f3DC2D8A1")


@planted("activation rows", "up is left out", WRONG_RESULT)
def _(ptx):
    for *_, value, gated in elements(ptx, MUL, MUL):
        result, register = ptx.operands(gated)[:2]
        if register != ptx.operands(value)[0]:
            raise NoMatch("the second product is not of the first")
        ptx.lines[gated] = f"mov.f32 {result}, {register};"


@planted("activation rows", "gate and up are exchanged", WRONG_RESULT)
def _(ptx):
    place, pairs = loaded_halves(ptx)
    moves = "".join(f"mov.b32 t, {a}; mov.b32 {a}, {b}; mov.b32 {b}, t; " for a, b in pairs)
    ptx.insert(place, f"{{ .reg .b32 t; {moves}}}")


@planted("activation both", "up comes from the gate's columns", WRONG_RESULT)
def _(ptx):
    place, pairs = loaded_halves(ptx)
    ptx.insert(place, "".join(f"mov.b32 {up}, {gate}; " for gate, up in pairs))


# ---- Rows


@planted("activation rows", "rows past the array are stored", "OutOfBounds")
def _(ptx):
    rows = ptx.operands(ptx.after(ptx.first(r"\bmin\.s64\s+%\w+, %\w+, 8;"), r"\bcvt\.u32\.u64\s"))[
        0
    ]
    limit = ptx.definition(rows)
    ptx.insert(limit + 1, f"mov.u32 {rows}, 8;")


@planted("activation rows", "columns past the half are read", "DoubleWrite")
def _(ptx):
    columns = ptx.after(ptx.all(r"\bmin\.s64\s+%\w+, %\w+, 8;", least=2)[1], r"\bcvt\.u32\.u64\s")
    register = ptx.operands(columns)[0]
    never(ptx, rf"\bsetp\.lt\.s32\s+%p\d+, {register}, 1;")


@planted("activation rows", "scales of rows past the array are stored", "OutOfBounds")
def _(ptx):
    never_taken(ptx, ptx.all(r"\bst\.global\.[uf]32\b")[-1])


@planted("activation rows with NaN", "NaN and Inf do not mark their block", WRONG_RESULT)
def _(ptx):
    ptx.replace(ptx.one(rf"\bsetp\.gt\.u32\b.*, {INFINITY - 1};"), str(INFINITY - 1), "-1")


# ---- Rows and columns


@planted("activation both", "maxima are read before they are written", "UninitializedRead")
def _(ptx):
    ptx.drop(barrier(ptx, -3, 4))


@planted("activation both", "inverses are read before they are written", "UninitializedRead")
def _(ptx):
    ptx.drop(barrier(ptx, -2, 4))


@planted("activation both", "the transposed tile is read before it is written", "UninitializedRead")
def _(ptx):
    ptx.drop(barrier(ptx, -1, 4))


@planted("activation both", "columns take the inverse of their neighbours", WRONG_RESULT)
def _(ptx):
    first, second = [
        i
        for i in ptx.all(r"\bld\.shared\.f32\b", least=8)
        if barrier(ptx, -2, 4) < i < barrier(ptx, -1, 4)
    ][:2]
    address = re.search(r"\[.*\]", ptx.lines[first])[0]
    ptx.replace(second, r"\[.*\]", address)


@planted("activation both", "the transposed tile is written without its swizzle", WRONG_RESULT)
def _(ptx):
    places = [i for i in ptx.all(r"\bxor\.b32\b") if barrier(ptx, -2, 4) < i < barrier(ptx, -1, 4)]
    if not places:
        raise NoMatch("no xor between the barriers")
    for place in places:
        ptx.replace(place, r"xor\.b32(\s+%\w+), %\w+, (%\w+);", r"mov.b32\1, \2;")


@planted("activation both", "scales of columns past F are stored", "OutOfBounds")
def _(ptx):
    never_taken(ptx, ptx.after(barrier(ptx, -3, 4), r"\bst\.global\.[fu]32\b"))


@planted("activation to powers of two", "column scales are rounded down", WRONG_RESULT)
def _(ptx):
    ptx.replace(
        ptx.all(rf"\badd\.s32\b.*, {SMALLEST_NORMAL - 1};", least=2)[0],
        str(SMALLEST_NORMAL - 1),
        "0",
    )


@planted("activation to powers of two", "row scales are not rounded", WRONG_RESULT)
def _(ptx):
    ptx.replace(ptx.all(rf"\band\.b32\b.*, {INFINITY};", least=2)[1], str(INFINITY), "-1")


# ---- Gradients


@planted("activation grad", "the slope is the logistic function alone", WRONG_RESULT)
def _(ptx):
    for *_, slope in elements(ptx, *SLOPE):
        result, *_, s = ptx.operands(slope)
        ptx.lines[slope] = f"mov.f32 {result}, {s};"


@planted("activation grad", "the slope's s (1 - s) is s (1 + s)", WRONG_RESULT)
def _(ptx):
    for place in ptx.all(r"\bneg\.f32\b", least=8):
        ptx.replace(place, r"neg\.f32", "mov.f32")


@planted("activation grad", "the slope's x is left out", WRONG_RESULT)
def _(ptx):
    for *_, tail, _ in elements(ptx, *SLOPE):
        result, _, factor = ptx.operands(tail)
        ptx.lines[tail] = f"mov.f32 {result}, {factor};"


@planted("activation grad", "the cube's derivative has no factor 3", WRONG_RESULT)
def _(ptx):
    for place in ptx.all("0f40400000"):
        ptx.replace(place, "0f40400000", "0f3F800000")


@planted("activation grad", "the gradient of the gate is not multiplied by up", WRONG_RESULT)
def _(ptx):
    for *_, gated, _, _, _, _, _ in elements(ptx, MUL, MUL, *SLOPE):
        result, cotangent, _ = ptx.operands(gated)
        ptx.lines[gated] = f"mov.f32 {result}, {cotangent};"


@planted("activation grad", "the gradient of up takes the gate, not its activation", WRONG_RESULT)
def _(ptx):
    for *_, value in elements(ptx, MUL):
        result, x, _ = ptx.operands(value)
        ptx.lines[value] = f"mov.f32 {result}, {x};"


@planted("activation grad", "the gradient of up is not kept", "UninitializedRead")
def _(ptx):
    ptx.drop(ptx.all(r"\bst\.shared\.v4\.f32\b", least=16)[3])


@planted(
    "activation grad", "a row of up's gradient is kept in place of another", "UninitializedRead"
)
def _(ptx):
    ptx.replace(ptx.all(r"\bst\.shared\.v4\.f32\b", least=16)[2], r"\+8192\]", "]")


@planted("activation grad", "threads keep their gradients of up in one place", "Race")
def _(ptx):
    store = ptx.first(r"\bst\.shared\.v4\.f32\b")
    address = re.search(r"\[(%\w+)\]", ptx.lines[store])[1]
    ptx.insert(store, f"and.b32 {address}, {address}, -32;")


@planted("activation grad", "up's gradient is the gate's", WRONG_RESULT)
def _(ptx):
    skip = ptx.before(ptx.first(r"\bld\.shared\.v4\.u32\b"), r"^\s*@%\w+ bra")
    ptx.replace(skip, r"@%\w+ bra", "bra.uni")


@planted("activation grad", "up's columns overwrite the gate's", WRONG_RESULT)
def _(ptx):
    read = ptx.first(r"\bld\.shared\.v4\.u32\b")
    half = ptx.operands(ptx.before(read, r"\bsetp\.eq\.s32\s+%p\d+, %r\d+, 0;"))[1]
    wide = ptx.operands(ptx.before(read, rf"\bcvt\.s64\.s32\s+%rd\d+, {half};"))[0]
    matrix = ptx.before(read, rf"\badd\.s64\s+%rd\d+, %rd\d+, {wide};")
    ptx.replace(matrix, rf", {wide};", ", 0;")


@planted("activation grad", "up's rows overwrite the gate's", WRONG_RESULT)
def _(ptx):
    read = ptx.first(r"\bld\.shared\.v4\.u32\b")
    half = ptx.operands(ptx.before(read, r"\bsetp\.eq\.s32\s+%p\d+, %r\d+, 0;"))[1]
    wide = ptx.operands(ptx.before(read, rf"\bcvt\.s64\.s32\s+%rd\d+, {half};"))[0]
    ptx.set(ptx.before(read, rf"\bmul\.lo\.s64\s+%rd\d+, {wide}, %rd\d+;"), 0)


@planted("activation grad", "maxima are read before they are written", "UninitializedRead")
def _(ptx):
    ptx.drop(barrier(ptx, -3, 4))


@planted("activation grad", "up's tile is written while the gate's is read", "Race")
def _(ptx):
    """Of the second half: in the first one the barriers are there."""
    for which in (-3, -2):
        place = barrier(ptx, which, 4)
        half = ptx.operands(
            ptx.before(ptx.first(r"\bld\.shared\.v4\.u32\b"), r"\bsetp\.eq\.s32\s+%p\d+, %r\d+, 0;")
        )[1]
        ptx.lines[place] = f"{{ .reg .pred q; setp.eq.s32 q, {half}, 0; @q bar.sync 0; }}"


@planted("activation grad", "scales of columns past F are stored", "OutOfBounds")
def _(ptx):
    never_taken(ptx, ptx.after(barrier(ptx, -3, 4), r"\bst\.global\.[fu]32\b"))


# ---- Ragged


@planted("activation ragged", "the token block is read before it is found", "Race")
def _(ptx):
    ptx.drop(barrier(ptx, 0, 4))


@planted("activation ragged", "a negative group size is taken as it is", "DoubleWrite")
def _(ptx):
    for place in ptx.all(r"\bmax\.s32\s+%\w+, %\w+, 0;", least=2):
        if place < barrier(ptx, 0, 4):
            ptx.replace(place, r"max\.s32(\s+%\w+, %\w+), 0;", r"mov.b32\1;")


@planted("activation ragged", "a group's last, short block of tokens is left out", WRONG_RESULT)
def _(ptx):
    for place in ptx.all(r"\badd\.s64\s+%\w+, %\w+, 127;", least=2):
        if ptx.first(r"\bmax\.s32\s+%\w+, %\w+, 0;") < place < barrier(ptx, 0, 4):
            ptx.replace(place, ", 127;", ", 0;")


@planted("activation ragged", "a lane does not count the groups before its own", "Race")
def _(ptx):
    for place in ptx.all(r"\bshfl\.sync\.up\.b32\b", least=8)[:4]:
        ptx.replace(place, r"shfl\.sync\.up\.b32\s+(%\w+)\|.*;", r"mov.b32 \1, 0;")


@planted("activation ragged", "tokens past a group are not zeros beside a NaN", WRONG_RESULT)
def _(ptx):
    for store in ptx.all(r"\bst\.shared\.v2\.[ub]32\b", least=8):
        if barrier(ptx, -2, 4) < store < barrier(ptx, -1, 4):
            for word in ptx.operands(store)[-2:]:
                place = ptx.definition(word, store)
                ptx.replace(place, r"and\.b32(\s+%\w+, %\w+), %\w+;", r"mov.b32\1;")


@planted("activation ragged", "rows past the groups give their block a scale", WRONG_RESULT)
def _(ptx):
    test = ptx.first(rf"\bsetp\.gt\.u32\b.*, {INFINITY - 1};")
    place = ptx.definition(ptx.operands(test)[1], test)
    ptx.replace(place, r"selp\.b32(\s+%\w+), 0, (%\w+), %\w+;", r"mov.b32\1, \2;")


@planted("activation ragged", "blocks without rows are not written", WRONG_RESULT)
def _(ptx):
    ptx.drop(ptx.all(r"\bst\.global\.v4\.u32\b.*\{(%r\d+), \1, \1, \1\}")[0])


@planted("activation ragged", "blocks without rows get a scale of zero", WRONG_RESULT)
def _(ptx):
    ptx.set(ptx.one(r"\bmov\.[ub]32\s+%\w+, 1065353216;"), 0)
