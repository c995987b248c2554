"""Faults to plant in the quantizing kernels."""

from __future__ import annotations

from tests.faults.ptx import WRONG_RESULT, NoMatch, planted

# ---- Arithmetic (quantize.cuh)

INFINITY, SMALLEST_NORMAL = 0x7F800000, 0x00800000


@planted("rows", "the sign counts as magnitude", WRONG_RESULT)
def _(ptx):
    for place in ptx.all(rf"\band\.b32\b.*, {0x7FFF7FFF};", least=8):
        ptx.replace(place, r"and\.b32(\s+%\w+, %\w+), \d+;", r"mov.b32\1;")


@planted("rows with NaN", "NaN and Inf do not mark their block", WRONG_RESULT)
def _(ptx):
    place = ptx.one(rf"\bsetp\.gt\.u32\b.*, {INFINITY - 1};")
    ptx.replace(place, str(INFINITY - 1), "-1")


@planted("rows with NaN", "a NaN's scale has another NaN's bits", WRONG_RESULT)
def _(ptx):
    ptx.replace(ptx.one(rf"\bselp\.b32\b.*{0x7FC00000}"), str(0x7FC00000), str(0x7FFFFFFF))


@planted("rows", "subnormals are not flushed", WRONG_RESULT)
def _(ptx):
    for place in ptx.all(r"\bfma\.rn\.ftz\.f32\b", least=8):
        ptx.replace(place, r"\.ftz", "")


@planted("rows", "negative zeros keep their sign", WRONG_RESULT)
def _(ptx):
    for place in ptx.all(r"\bfma\.rn\.ftz\.f32\b", least=8):
        ptx.replace(place, r", %\w+;", ", 0f80000000;")


@planted("ties", "the reciprocal is rounded down", WRONG_RESULT)
def _(ptx):
    place = ptx.one(r"\brcp\.rn\.f32\b")
    inverse = ptx.operands(place)[0]
    ptx.insert(
        place + 1,
        f"{{ .reg .b32 bits; mov.b32 bits, {inverse}; sub.u32 bits, bits, 1; mov.b32 {inverse}, bits; }}",
    )


@planted("rows", "scales are not below the smallest normal", WRONG_RESULT)
def _(ptx):
    place = ptx.one(rf"\bmax\.u32\b.*, {SMALLEST_NORMAL};")
    ptx.replace(place, r"max\.u32(\s+%\w+, %\w+), \d+;", r"mov.b32\1;")


@planted("rows", "a block of zeros gets the smallest scale", WRONG_RESULT)
def _(ptx):
    place = ptx.one(rf"\bsetp\.lt\.u32\b.*, {SMALLEST_NORMAL};")
    ptx.replace(place, str(SMALLEST_NORMAL), "0")


@planted("rows to powers of two", "scales are rounded down to a power of two", WRONG_RESULT)
def _(ptx):
    place = ptx.one(rf"\badd\.s32\b.*, {SMALLEST_NORMAL - 1};")
    ptx.replace(place, str(SMALLEST_NORMAL - 1), "0")


@planted("rows to powers of two", "scales are not rounded to a power of two", WRONG_RESULT)
def _(ptx):
    place = ptx.one(rf"\band\.b32\b.*, {INFINITY};")
    ptx.replace(place, str(INFINITY), "-1")


@planted("rows", "the maximum misses half of the lanes", WRONG_RESULT)
def _(ptx):
    shuffle = ptx.all(r"\bshfl\.sync\.bfly\.b32\b", least=8)[-1]
    ptx.replace(shuffle, rf", {ptx.operands(shuffle)[3]}, ", ", 0, ")


@planted("rows", "a row takes the inverse of another", WRONG_RESULT)
def _(ptx):
    shuffle = ptx.all(r"\bshfl\.sync\.idx\.b32\b", least=8)[1]
    ptx.replace(shuffle, rf", {ptx.operands(shuffle)[3]}, ", ", 0, ")


@planted("rows", "scales lie one element too far", "OutOfBounds")
def _(ptx):
    place = ptx.all(r"\bst\.global\.[fu]32\b")[-1]
    ptx.replace(place, r"\[(%\w+)\]", r"[\1+4]")


# ---- Transposition, groups


@planted("columns", "maxima are read before they are written", "Race")
def _(ptx):
    ptx.drop(ptx.all(r"\bbar\.sync\b", least=3)[0])


@planted("columns", "inverses are read before they are written", "UninitializedRead")
def _(ptx):
    ptx.drop(ptx.all(r"\bbar\.sync\b", least=3)[1])


@planted("columns", "the transposed tile is read before it is written", "UninitializedRead")
def _(ptx):
    ptx.drop(ptx.all(r"\bbar\.sync\b", least=3)[2])


@planted("columns", "the transposed tile is written without its swizzle", WRONG_RESULT)
def _(ptx):
    barriers = ptx.all(r"\bbar\.sync\b", least=3)
    swizzles = [i for i in ptx.all(r"\bxor\.b32\b") if barriers[1] < i < barriers[2]]
    if not swizzles:
        raise NoMatch("no xor between the barriers")
    for place in swizzles:
        ptx.replace(place, r"xor\.b32(\s+%\w+), %\w+, (%\w+);", r"mov.b32\1, \2;")


@planted("columns", "scales of columns past the matrix are stored", "OutOfBounds")
def _(ptx):
    store = ptx.first(r"\bst\.global\.[fu]32\b")
    ptx.drop(ptx.before(store, r"^\s*@%\w+ bra"))


@planted("weight", "the block's maximum is read before it is written", "Race")
def _(ptx):
    ptx.drop(ptx.all(r"\bbar\.sync\b", least=2)[0])


@planted("weight", "the transposed block is read before it is written", "UninitializedRead")
def _(ptx):
    ptx.drop(ptx.all(r"\bbar\.sync\b", least=2)[1])


@planted("ragged groups", "the token block is read before it is found", "Race")
def _(ptx):
    ptx.drop(ptx.all(r"\bbar\.sync\b", least=4)[0])


@planted("ragged groups", "tokens past a group are not zeros beside a NaN", WRONG_RESULT)
def _(ptx):
    barriers = ptx.all(r"\bbar\.sync\b", least=4)
    for store in ptx.all(r"\bst\.shared\.v2\.[ub]32\b", least=8):
        if barriers[-2] < store < barriers[-1]:
            for word in ptx.operands(store)[-2:]:
                place = ptx.definition(word, store)
                ptx.replace(place, r"and\.b32(\s+%\w+, %\w+), %\w+;", r"mov.b32\1;")


@planted("ragged groups", "rows past the groups give their block a scale", WRONG_RESULT)
def _(ptx):
    test = ptx.first(rf"\bsetp\.gt\.u32\b.*, {INFINITY - 1};")
    place = ptx.definition(ptx.operands(test)[1], test)
    ptx.replace(place, r"selp\.b32(\s+%\w+), 0, (%\w+), %\w+;", r"mov.b32\1, \2;")


@planted("ragged groups", "a negative group size is taken as it is", "DoubleWrite")
def _(ptx):
    for place in ptx.all(r"\bmax\.s32\s+%\w+, %\w+, 0;", least=2):
        if place < ptx.first(r"\bbar\.sync\b"):
            ptx.replace(place, r"max\.s32(\s+%\w+, %\w+), 0;", r"mov.b32\1;")


@planted("ragged groups", "blocks without tokens get a scale of zero", WRONG_RESULT)
def _(ptx):
    one = ptx.one(r"\bmov\.[ub]32\s+%\w+, 1065353216;")
    ptx.set(one, 0)


# ---- Other formats, batches


@planted("rows of float32", "the sign counts as magnitude", WRONG_RESULT)
def _(ptx):
    for place in ptx.all(rf"\band\.b32\b.*, {0x7FFFFFFF};", least=8):
        ptx.replace(place, r"and\.b32(\s+%\w+, %\w+), \d+;", r"mov.b32\1;")


@planted("rows of float16", "the lower half of a word is taken twice", WRONG_RESULT)
def _(ptx):
    for place in ptx.all(r"\bshr\.u32\s+%\w+, %\w+, 16;", least=8):
        ptx.replace(place, ", 16;", ", 0;")


@planted("rows to E5M2", "values are converted to E4M3", WRONG_RESULT)
def _(ptx):
    for place in ptx.all(r"\bcvt\.rn\.satfinite\.e5m2x2\.f32\b", least=8):
        ptx.replace(place, "e5m2x2", "e4m3x2")


@planted("rows to E5M2", "the scale is E4M3's", WRONG_RESULT)
def _(ptx):
    for place in ptx.all("0f37924925"):
        ptx.replace(place, "0f37924925", "0f3B124925")


@planted("batch of columns", "the second matrix's row scales overwrite the first's", "DoubleWrite")
def _(ptx):
    groups = ptx.operands(ptx.first(r"ld\.param\.u64\s.*_param_5\]"))[0]
    blocks = ptx.one(rf"\bmul\.lo\.s64\s+%\w+, %\w+, {groups};")
    product = ptx.operands(blocks)[0]
    ptx.set(ptx.after(blocks, rf"\badd\.s64\s+%\w+, {product}, %\w+;"), product)


@planted("batch of weights", "the second matrix is transposed over the first", "DoubleWrite")
def _(ptx):
    ptx.set(ptx.after(ptx.all(r"\bbar\.sync\b", least=2)[1], r"\bmul\.lo\.s64\b"), 0)


@planted("batch of weights", "every matrix's scale is the first's", "DoubleWrite")
def _(ptx):
    store = ptx.first(r"\bst\.global\.[fu]32\b")
    ptx.set(ptx.before(store, r"\bmov\.u32\s+%\w+, %ctaid\.x;"), 0)


@planted("ragged columns", "rows past the groups are a group", "OutOfBounds")
def _(ptx):
    barrier = ptx.first(r"\bbar\.sync\b")
    tokens = ptx.operands(ptx.before(barrier, r"\bst\.shared\.u32\b"))[-1]
    ptx.set(ptx.definition(tokens, barrier), 8)
