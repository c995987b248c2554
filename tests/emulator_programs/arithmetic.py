"""Every arithmetic instruction, lane by lane, against Python integers, Fractions and ml_dtypes.

The expected values come from a second implementation on single numbers, so that a mistake in a
vectorised one does not hide itself.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import ml_dtypes
import numpy as np

from .program import Program, kernel, read_only, same_bits

LANES = 128
_BITS = {"16": np.uint16, "32": np.uint32, "64": np.uint64}
_FLOATS = {"f32": np.float32, "f64": np.float64, "f16": np.float16, "bf16": ml_dtypes.bfloat16}
_REGISTER = {2: "%h", 4: "%r", 8: "%d"}


def bits_of(kind: str) -> int:
    return {"f16x2": 32, "bf16x2": 32, "u16x2": 32, "s16x2": 32, "bf16": 16, "pred": 8}.get(
        kind, int("".join(c for c in kind.split("x")[0] if c.isdigit()) or 0)
    )


def storage(kind: str):
    """The unsigned type that holds a value of a kind in memory."""
    return {8: np.uint8, 16: np.uint16, 32: np.uint32, 64: np.uint64}[bits_of(kind)]


def inputs(kind: str, seed: int) -> np.ndarray:
    """Random bit patterns and the awkward values of a type, as stored."""
    rng = np.random.default_rng(seed)
    dtype = storage(kind)
    bits = bits_of(kind)
    random = rng.integers(0, 2**bits, LANES, dtype=np.uint64).astype(dtype)
    if kind in _FLOATS:
        usual = (rng.standard_normal(LANES) * 4).astype(_FLOATS[kind]).view(dtype)
        random = np.where(np.arange(LANES) % 3 == 0, random, usual)
        special = np.array(
            [0.0, -0.0, 1, -1, np.inf, -np.inf, np.nan, 448, 449, 464, 465, 1e-3, 2**-9, 2**-10,
             -(2**-7), 0.5, 65504, 1e-40, -1e-40, 3e38], np.float64
        ).astype(_FLOATS[kind]).view(dtype)  # fmt: skip
    else:
        ones = 2**bits - 1
        special = np.array(
            [0, 1, 2, ones, ones - 1, ones >> 1, (ones >> 1) + 1, 31, 32, 33, 255, 256, 7, 8],
            np.uint64,
        ).astype(dtype)
    random[: len(special)] = np.roll(special, 5 * seed)
    return random


def value(kind: str, raw) -> Any:
    """A stored bit pattern as a Python number."""
    raw, bits = int(raw), bits_of(kind)
    if kind in _FLOATS:
        return float(np.array([raw], storage(kind)).view(_FLOATS[kind])[0])
    if kind[0] == "s" and raw >> (bits - 1):
        return raw - (1 << bits)
    return raw


# Bits of the fraction, the lowest and the highest exponent.
_FORMATS = {"f32": (23, -126, 127), "f16": (10, -14, 15), "bf16": (7, -126, 127)}


def round_to(kind: str, x) -> int:
    """An exact number (Fraction, or a float for infinities and NaN) rounded to nearest even."""
    if isinstance(x, float) and not math.isfinite(x):
        if math.isnan(x):
            return {"f32": 0x7FFFFFFF, "f16": 0x7FFF, "bf16": 0x7FFF}[kind]
        return int(np.array([x]).astype(_FLOATS[kind]).view(storage(kind))[0])
    if x == 0:
        return int(np.array([float(x)]).astype(_FLOATS[kind]).view(storage(kind))[0])
    x = Fraction(x)
    fraction, lowest, highest = _FORMATS[kind]
    sign, x = (1, -x) if x < 0 else (0, x)
    exponent = x.numerator.bit_length() - x.denominator.bit_length()
    if Fraction(2) ** exponent > x:
        exponent -= 1
    exponent = max(exponent, lowest)
    scaled = x / Fraction(2) ** (exponent - fraction)
    whole = scaled.numerator // scaled.denominator
    rest = scaled - whole
    if rest > Fraction(1, 2) or (rest == Fraction(1, 2) and whole & 1):
        whole += 1
    if whole >= 2 << fraction:
        whole //= 2
        exponent += 1
    bits = 8 * np.dtype(storage(kind)).itemsize
    if exponent > highest:
        code = (2 * highest + 1) << fraction
    elif whole < 1 << fraction:
        code = whole
    else:
        code = ((exponent - lowest + 1) << fraction) + whole - (1 << fraction)
    return code | sign << (bits - 1)


def exact(x: float):
    return Fraction(x) if math.isfinite(x) else x


# --- expected values --------------------------------------------------------------------------

_INTEGER: dict[str, Callable] = {
    "add": lambda a, b: a + b,
    "sub": lambda a, b: a - b,
    "min": min,
    "max": max,
    "and": lambda a, b: a & b,
    "or": lambda a, b: a | b,
    "xor": lambda a, b: a ^ b,
    "not": lambda a: ~a,
    "cnot": lambda a: int(a == 0),
    "neg": lambda a: -a,
    "abs": abs,
}


def _truncated_division(a: int, b: int) -> int:
    return abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1)


def integer_expected(opcode: str) -> Callable:
    base, *mods = opcode.split(".")
    kind = mods[-1]
    bits = bits_of(kind)
    if base in ("mul", "mad"):

        def multiply(a, b, c=0):
            product = a * b
            if mods[0] == "hi":
                product >>= bits
            return product + c

        return multiply
    if base == "div":
        return lambda a, b: -1 if b == 0 else _truncated_division(a, b)
    if base == "rem":
        return lambda a, b: a if b == 0 else a - b * _truncated_division(a, b)
    if base == "shl":
        return lambda a, b: a << b if b < bits else 0
    if base == "shr":
        return lambda a, b: a >> min(b, bits)
    if opcode == "add.sat.s32":
        return lambda a, b: max(-(2**31), min(2**31 - 1, a + b))
    if opcode == "sub.sat.s32":
        return lambda a, b: max(-(2**31), min(2**31 - 1, a - b))
    return _INTEGER[base]


def _bfe(kind):
    def extract(a, position, length):
        bits = bits_of(kind)
        position, length = position & 255, length & 255
        source = a & (1 << bits) - 1
        if kind[0] == "u" or length == 0:
            sign = 0
        else:
            sign = source >> min(position + length - 1, bits - 1) & 1
        result = 0
        for i in range(bits):
            bit = source >> (position + i) & 1 if i < length and position + i < bits else sign
            result |= bit << i
        return result

    return extract


def _bfi(bits):
    def insert(field, base, position, length):
        position, length = position & 255, length & 255
        for i in range(length):
            if position + i < bits:
                base = base & ~(1 << (position + i)) | (field >> i & 1 if i < bits else 0) << (
                    position + i
                )
        return base

    return insert


def _prmt(a, b, selector):
    both, result = a | b << 32, 0
    for i in range(4):
        nibble = selector >> 4 * i & 15
        byte = both >> 8 * (nibble & 7) & 255
        if nibble & 8:
            byte = 255 if byte & 128 else 0
        result |= byte << 8 * i
    return result


def _shf(left: bool, wrap: bool):
    def shift(low, high, amount):
        both = low | high << 32
        amount = amount & 31 if wrap else min(amount, 32)
        return (both << amount) >> 32 if left else both >> amount

    return shift


def _bfind(kind):
    def find(a):
        a = ~a if a < 0 else a
        return a.bit_length() - 1

    return find


def _shiftamt(a):
    return 32 - a.bit_length() if a else -1


def _dp4a(a, b, c):
    x, y = (int(v & 0xFFFFFFFF).to_bytes(4, "little") for v in (a, b))
    return sum((p - 256 * (p > 127)) * (q - 256 * (q > 127)) for p, q in zip(x, y, strict=True)) + c


def _float_operation(base: str, kind: str, relu: bool = False) -> Callable:
    """add, sub, mul, fma, div, rcp, sqrt: exact, then one rounding."""

    def compute(*operands):
        operands = list(operands)
        with np.errstate(all="ignore"):
            rough = float(_ROUGH[base](*(np.float64(x) for x in operands)))
        if math.isnan(rough) or not all(math.isfinite(x) for x in operands):
            if relu and not math.isnan(rough) and rough < 0:
                rough = 0.0
            return round_to(kind, rough)
        if base in ("div", "rcp") and operands[-1] == 0:
            return round_to(kind, rough)
        result = _EXACT[base](*(Fraction(x) for x in operands))
        if relu and result < 0:
            return 0
        if result == 0 and base in ("add", "sub", "mul", "fma", "div"):
            return int(np.array([rough]).astype(_FLOATS[kind]).view(storage(kind))[0]) & (
                1 << bits_of(kind) - 1
            )
        code = round_to(kind, result)
        if not code and math.copysign(1, rough) < 0:
            code = 1 << bits_of(kind) - 1  # a negative number that underflows
        return code

    return compute


_ROUGH: dict[str, Callable] = {
    "add": lambda a, b: a + b, "sub": lambda a, b: a - b, "mul": lambda a, b: a * b,
    "fma": lambda a, b, c: a * b + c, "div": np.divide, "rcp": lambda a: np.float64(1) / a,
}  # fmt: skip
_EXACT: dict[str, Callable] = {
    "add": lambda a, b: a + b, "sub": lambda a, b: a - b, "mul": lambda a, b: a * b,
    "fma": lambda a, b, c: a * b + c, "div": lambda a, b: a / b, "rcp": lambda a: 1 / a,
}  # fmt: skip


def _minmax(base: str, kind: str, nan: bool) -> Callable:
    choose = min if base == "min" else max

    def compute(a, b):
        if math.isnan(a) or math.isnan(b):
            if nan or (math.isnan(a) and math.isnan(b)):
                return round_to(kind, math.nan)
            a = b = b if math.isnan(a) else a
        result = choose((a, math.copysign(1, a)), (b, math.copysign(1, b)))[0]
        return int(np.array([result]).astype(_FLOATS[kind]).view(storage(kind))[0])

    return compute


def _flushed(function: Callable) -> Callable:
    """.ftz: subnormal operands and results are zeros."""

    def flush(x):
        return math.copysign(0.0, x) if abs(x) < 2.0**-126 else x

    def compute(*operands):
        code = function(*(flush(x) for x in operands))
        return code & 0x80000000 if code & 0x7F800000 == 0 else code

    return compute


def _packed(kind: str, function: Callable) -> Callable:
    """Both halves of a packed type."""
    half = kind[:-2]

    def compute(*operands):
        result = 0
        for shift in (0, 16):
            parts = [value(half, x >> shift & 0xFFFF) for x in operands]
            result |= (function(*parts) & 0xFFFF) << shift
        return result

    return compute


# --- programs ---------------------------------------------------------------------------------


def lanewise(
    opcode: str,
    result: str,
    operands: list[str],
    expected: Callable,
    *,
    body: str | None = None,
    transform: Callable | None = None,
    nan_is_nan: bool = False,
    relative: float | None = None,
) -> Program:
    """A program that applies an instruction to every lane's operands."""
    lines = ["    mov.u32 %r100, %tid.x;"]
    names = []
    for i, kind in enumerate(operands):
        size = bits_of(kind) // 8
        register = f"{_REGISTER[max(size, 2)]}{i + 1}"
        names.append(register)
        lines += [
            f"    ld.param.u64 %d{40 + i}, [p{i}];",
            f"    mad.wide.u32 %d{50 + i}, %r100, {size}, %d{40 + i};",
            f"    ld.global.u{8 * size} {register}, [%d{50 + i}];",
        ]
    size = bits_of(result) // 8
    target = f"{_REGISTER[max(size, 2)]}0"
    lines.append(body or f"    {opcode} {', '.join([target, *names])};")
    count = len(operands)
    lines += [
        f"    ld.param.u64 %d60, [p{count}];",
        f"    mad.wide.u32 %d61, %r100, {size}, %d60;",
        f"    st.global.u{8 * size} [%d61], {target};",
    ]
    given = [inputs(kind, i) for i, kind in enumerate(operands)]
    if transform:
        given = list(transform(*given))
    mask = (1 << bits_of(result)) - 1

    def arguments():
        return [*(read_only(g.copy()) for g in given), np.zeros(LANES, storage(result))]

    def check(*arrays):
        *sources, got = arrays
        rows = zip(*sources, strict=True)
        raw = [expected(*(value(k, x) for k, x in zip(operands, r, strict=True))) for r in rows]
        if relative is not None:
            got_values = got.view(_FLOATS[result]).astype(np.float64)
            np.testing.assert_allclose(got_values, np.array(raw, np.float64), rtol=relative)
            return
        want = np.array([int(x) & mask for x in raw], np.uint64).astype(storage(result))
        if nan_is_nan:
            both = np.isnan(got.view(_FLOATS[result])) & np.isnan(want.view(_FLOATS[result]))
            want = np.where(both, got, want)
        same_bits(got, want, opcode)

    text = kernel(" ".join(["u64"] * (count + 1)), "\n".join(lines))
    return Program(opcode, text, arguments, check, block=LANES)


def _float_bits(kind: str, function: Callable) -> Callable:
    def compute(*operands):
        result = np.asarray(function(*operands), np.float64)
        return int(result.astype(_FLOATS[kind]).view(storage(kind)))

    return compute


def programs() -> list[Program]:
    out: list[Program] = []
    for add_to in (
        _integers, _bitwise, _bit_fields, _words, _floats, _approximations, _comparisons, _predicates,
        _selections,
    ):  # fmt: skip
        add_to(out.append)
    return out


def _integers(add):
    for kind in ("u16", "s16", "u32", "s32", "u64", "s64"):
        for base in ("add", "sub", "min", "max", "div", "rem"):
            opcode = f"{base}.{kind}"
            add(lanewise(opcode, kind, [kind, kind], integer_expected(opcode)))
        for base in ("mul.lo", "mul.hi"):
            opcode = f"{base}.{kind}"
            add(lanewise(opcode, kind, [kind, kind], integer_expected(opcode)))
        for base in ("mad.lo", "mad.hi"):
            opcode = f"{base}.{kind}"
            add(lanewise(opcode, kind, [kind] * 3, integer_expected(opcode)))
        add(lanewise(f"sad.{kind}", kind, [kind] * 3, lambda a, b, c: abs(a - b) + c))
        if bits_of(kind) < 64:
            wide = f"{kind[0]}{2 * bits_of(kind)}"
            for base in ("mul.wide", "mad.wide"):
                opcode = f"{base}.{kind}"
                operands = [kind, kind] + ([wide] if base.startswith("mad") else [])
                add(lanewise(opcode, wide, operands, integer_expected(opcode)))
        if kind[0] == "s":
            for base in ("neg", "abs"):
                add(lanewise(f"{base}.{kind}", kind, [kind], _INTEGER[base]))
        opcode = f"shr.{kind}"
        shift = integer_expected(opcode)
        add(lanewise(opcode, kind, [kind, "u32"], shift))
        for amount in (3, 40):
            target = f"{_REGISTER[bits_of(kind) // 8]}"
            add(
                lanewise(
                    f"{opcode} {amount}",
                    kind,
                    [kind],
                    lambda a, n=amount, f=shift: f(a, n),
                    body=f"    {opcode} {target}0, {target}1, {amount};",
                )
            )
    for kind in ("add.sat.s32", "sub.sat.s32"):
        add(lanewise(kind, "s32", ["s32", "s32"], integer_expected(kind)))


def _bitwise(add):
    for bits in ("16", "32", "64"):
        kind = f"b{bits}"
        for base in ("and", "or", "xor"):
            add(lanewise(f"{base}.{kind}", kind, [kind, kind], _INTEGER[base]))
        for base in ("not", "cnot"):
            add(lanewise(f"{base}.{kind}", kind, [kind], _INTEGER[base]))
        for base in ("shl", "shr"):
            opcode = f"{base}.{kind}"
            shift = integer_expected(opcode)
            add(lanewise(opcode, kind, [kind, "u32"], shift))
            register = _REGISTER[int(bits) // 8]
            add(
                lanewise(
                    f"{opcode} 5",
                    kind,
                    [kind],
                    lambda a, f=shift: f(a, 5),
                    body=f"    {opcode} {register}0, {register}1, 5;",
                )
            )


def _bit_fields(add):
    for bits in (32, 64):
        kind = f"b{bits}"
        add(lanewise(f"popc.{kind}", "u32", [kind], lambda a: a.bit_count()))
        add(lanewise(f"clz.{kind}", "u32", [kind], lambda a, n=bits: n - a.bit_length()))
        add(lanewise(f"brev.{kind}", kind, [kind], lambda a, n=bits: int(f"{a:0{n}b}"[::-1], 2)))
        add(lanewise(f"bfi.{kind}", kind, [kind, kind, "u32", "u32"], _bfi(bits),
                     transform=_field))  # fmt: skip
        for sign in "us":
            kind = f"{sign}{bits}"
            add(lanewise(f"bfind.{kind}", "u32", [kind], _bfind(kind)))
            add(lanewise(f"bfe.{kind}", kind, [kind, "u32", "u32"], _bfe(kind), transform=_field))
    add(lanewise("bfind.shiftamt.u32", "u32", ["u32"], _shiftamt))


def _words(add):
    """Bytes, halves and bits of 32-bit registers."""
    add(lanewise("prmt.b32", "b32", ["b32"] * 3, _prmt))
    add(lanewise("dp4a.s32.s32", "s32", ["s32"] * 3, _dp4a))
    for table in (0x96, 0xE8, 0x1D):
        add(
            lanewise(
                f"lop3.b32 {table}",
                "b32",
                ["b32"] * 3,
                lambda a, b, c, t=table: sum(
                    (t >> ((a >> i & 1) << 2 | (b >> i & 1) << 1 | c >> i & 1) & 1) << i
                    for i in range(32)
                ),
                body=f"    lop3.b32 %r0, %r1, %r2, %r3, {table};",
            )
        )
    for side in "lr":
        for mode in ("wrap", "clamp"):
            opcode = f"shf.{side}.{mode}.b32"
            add(lanewise(opcode, "b32", ["b32"] * 3, _shf(side == "l", mode == "wrap")))
    for base in ("add", "min", "max"):
        for kind in ("u16x2", "s16x2"):
            half = kind[:3]
            function = {"add": lambda a, b: a + b, "min": min, "max": max}[base]
            add(
                lanewise(
                    f"{base}.{kind}",
                    "b32",
                    ["b32", "b32"],
                    lambda a, b, f=function, h=half: sum(
                        (f(value(h, a >> s & 0xFFFF), value(h, b >> s & 0xFFFF)) & 0xFFFF) << s
                        for s in (0, 16)
                    ),
                )
            )


def _field(*arrays):
    """Positions and lengths of bit fields: mostly inside a register."""
    *values, position, length = arrays
    lanes = np.arange(LANES)
    position = np.where(lanes % 7 == 0, position, lanes % 70).astype(np.uint32)
    length = np.where(lanes % 11 == 0, length, lanes * 5 % 67).astype(np.uint32)
    return (*values, position, length)


def _floats(add):
    for base, count in (("add", 2), ("sub", 2), ("mul", 2), ("fma", 3)):
        rounding = ".rn" if base == "fma" else ""
        expected = _float_operation(base, "f32")
        operands = ["f32"] * count
        add(lanewise(f"{base}{rounding}.f32", "f32", operands, expected, transform=_close))
        add(lanewise(f"{base}.rn.ftz.f32", "f32", operands, _flushed(expected)))
        if base != "fma":
            add(lanewise(f"{base}.rn.f32", "f32", operands, expected))
        saturated = _saturated(expected)
        add(lanewise(f"{base}.rn.sat.f32", "f32", operands, saturated, transform=_close))
        for kind in ("f16", "bf16"):
            expected = _float_operation(base, kind)
            add(lanewise(f"{base}.rn.{kind}", kind, [kind] * count, expected))
            packed = _packed(f"{kind}x2", expected)
            add(lanewise(f"{base}.rn.{kind}x2", "b32", ["b32"] * count, packed))
        if base != "fma":
            double = {"add": np.add, "sub": np.subtract, "mul": np.multiply}[base]
            add(
                lanewise(
                    f"{base}.f64", "f64", ["f64", "f64"], _float_bits("f64", double),
                    nan_is_nan=True,
                )
            )  # fmt: skip
    for kind in ("f16", "bf16"):
        add(lanewise(f"fma.rn.relu.{kind}", kind, [kind] * 3, _float_operation("fma", kind, True)))
    add(lanewise("div.rn.f32", "f32", ["f32", "f32"], _float_operation("div", "f32")))
    add(lanewise("div.rn.ftz.f32", "f32", ["f32"] * 2, _flushed(_float_operation("div", "f32"))))
    add(lanewise("rcp.rn.f32", "f32", ["f32"], _float_operation("rcp", "f32")))
    add(lanewise("rcp.rn.ftz.f32", "f32", ["f32"], _flushed(_float_operation("rcp", "f32"))))
    add(lanewise("sqrt.rn.f32", "f32", ["f32"], _sqrt))
    for base in ("min", "max"):
        for nan in ("", ".NaN"):
            opcode = f"{base}{nan}.f32"
            add(lanewise(opcode, "f32", ["f32", "f32"], _minmax(base, "f32", bool(nan))))
            for kind in ("f16", "bf16"):
                expected = _minmax(base, kind, bool(nan))
                add(lanewise(f"{base}{nan}.{kind}", kind, [kind, kind], expected))
                packed = _packed(f"{kind}x2", expected)
                add(lanewise(f"{base}{nan}.{kind}x2", "b32", ["b32", "b32"], packed))
    for base in ("neg", "abs"):
        flip = (lambda a: a ^ 1 << 31) if base == "neg" else (lambda a: a & 0x7FFFFFFF)
        add(lanewise(f"{base}.f32", "f32", ["u32"], flip, nan_is_nan=True))
    add(
        lanewise(
            "copysign.f32", "f32", ["u32", "u32"],
            lambda a, b: a & 0x80000000 | b & 0x7FFFFFFF, nan_is_nan=True,
        )
    )  # fmt: skip


def _close(*arrays):
    """Operands near each other, so that sums cancel and products tie."""
    out = [a.copy() for a in arrays]
    rng = np.random.default_rng(9)
    half = LANES // 2
    base = rng.standard_normal(half).astype(np.float32)
    for i, array in enumerate(out):
        near = base.view(np.uint32) + rng.integers(0, 3, half).astype(np.uint32) * (i + 1)
        array[half:] = near
    if len(out) == 3:
        # c close to -a*b: only the low half of the product is left.
        a, b = (x[half:].view(np.float32) for x in out[:2])
        out[2][half:] = (-(a * b)).view(np.uint32)
    # Ties: 1 + 2^-24 lies halfway between two floats; a product or a third operand breaks it.
    out[0][half] = np.float32(1 + 2**-12).view(np.uint32)
    out[1][half] = np.float32(1 - 2**-12).view(np.uint32)
    return out


def _saturated(function: Callable) -> Callable:
    def compute(*operands):
        result = float(np.array([function(*operands)], np.uint32).view(np.float32)[0])
        if not result > 0:
            return 0
        return int(np.array([min(result, 1.0)], np.float32).view(np.uint32)[0])

    return compute


def _sqrt(a: float) -> int:
    if math.isnan(a) or a < 0:
        return 0x7FFFFFFF
    if a == 0 or math.isinf(a):
        return int(np.array([a], np.float32).view(np.uint32)[0])
    # An integer square root with 60 guard bits, and a sticky one.
    scale = 200
    n = Fraction(a) * Fraction(4) ** scale
    whole = math.isqrt(n.numerator // n.denominator)
    root = Fraction(2 * whole + (1 if whole * whole != n else 0), 2) / Fraction(2) ** scale
    return round_to("f32", root)


def _approximations(add):
    functions: dict[str, Callable] = {
        "rcp": lambda x: 1 / x, "sqrt": math.sqrt, "rsqrt": lambda x: 1 / math.sqrt(x),
        "ex2": lambda x: 2.0**x, "lg2": math.log2, "sin": math.sin, "cos": math.cos,
        "tanh": math.tanh,
    }  # fmt: skip

    def positive(a):
        rng = np.random.default_rng(3)
        return (np.exp2(rng.uniform(-6, 6, LANES)).astype(np.float32).view(np.uint32),)

    for base, function in functions.items():
        for flush in ("", ".ftz"):
            if base == "tanh" and flush:
                continue
            opcode = f"{base}.approx{flush}.f32"
            add(lanewise(opcode, "f32", ["f32"], function, transform=positive, relative=2.0**-23))

    def both(a, b):
        return (*positive(a), np.roll(*positive(a), 7))

    for mode in ("approx", "full"):
        opcode = f"div.{mode}.f32"
        add(lanewise(opcode, "f32", ["f32"] * 2, lambda a, b: a / b, transform=both,
                     relative=2.0**-23))  # fmt: skip
    add(
        lanewise(
            "div.approx.ftz.f32", "f32", ["f32"] * 2, lambda a, b: a / b, transform=both,
            relative=2.0**-23,
        )
    )  # fmt: skip
    small = [x / 16 for x in range(-64, 64)]

    def halves(kind):
        return lambda a: (np.array(small).astype(_FLOATS[kind]).view(np.uint16),)

    for kind in ("f16", "bf16"):
        for base, function in (("tanh", math.tanh), ("ex2", lambda x: 2.0**x)):
            flush = ".ftz" if (base, kind) == ("ex2", "bf16") else ""
            add(
                lanewise(
                    f"{base}.approx{flush}.{kind}", kind, [kind],
                    lambda x, f=function, k=kind: round_to(k, Fraction(f(x))),
                    transform=halves(kind),
                )
            )  # fmt: skip


def _comparisons(add):
    ordered: dict[str, Callable] = {
        "eq": lambda a, b: a == b, "ne": lambda a, b: a != b and a == a and b == b,
        "lt": lambda a, b: a < b, "le": lambda a, b: a <= b, "gt": lambda a, b: a > b,
        "ge": lambda a, b: a >= b,
    }  # fmt: skip

    def equal_often(a, b):
        return a, np.where(np.arange(LANES) % 4 == 0, a, b)

    def compare(compare_: str, kind: str, function: Callable):
        register = _REGISTER[bits_of(kind) // 8]
        opcode = f"setp.{compare_}.{kind}"
        add(
            lanewise(
                opcode, "u32", [kind, kind], lambda a, b, f=function: int(f(a, b)),
                body=f"    {opcode} %p1, {register}1, {register}2;\n"
                "    selp.u32 %r0, 1, 0, %p1;",
                transform=equal_often,
            )
        )  # fmt: skip

    for kind in ("b16", "b32", "b64"):
        for name in ("eq", "ne"):
            compare(name, kind, ordered[name])
    for kind in ("u16", "s16", "u32", "s32", "u64", "s64"):
        for name, function in ordered.items():
            compare(name, kind, function)
    for name, other in (("lo", "lt"), ("ls", "le"), ("hi", "gt"), ("hs", "ge")):
        compare(name, "u32", ordered[other])
        compare(name, "u64", ordered[other])
    for kind in ("f32", "f64", "f16", "bf16"):
        for name, function in ordered.items():
            compare(name, kind, function)
            if kind == "f32":
                compare(
                    f"{name}u", kind,
                    lambda a, b, f=function: math.isnan(a) or math.isnan(b) or f(a, b),
                )  # fmt: skip
    compare("num", "f32", lambda a, b: not (math.isnan(a) or math.isnan(b)))
    compare("nan", "f32", lambda a, b: math.isnan(a) or math.isnan(b))
    add(
        lanewise(
            "setp.gt.s32 two results", "u32", ["s32", "s32"],
            lambda a, b: 1 if a > b else 2,
            body="    setp.gt.s32 %p1|%p2, %r1, %r2;\n    selp.b32 %r0, 1, 0, %p1;\n"
            "    @%p2 mov.u32 %r0, 2;",
        )
    )  # fmt: skip
    add(
        lanewise(
            "set.lt.u32.f32", "u32", ["f32", "f32"],
            lambda a, b: 0xFFFFFFFF if a < b else 0,
        )
    )  # fmt: skip


def _predicates(add):
    for combine, function in (
        ("and", lambda p, q: p and q), ("or", lambda p, q: p or q), ("xor", lambda p, q: p != q)
    ):  # fmt: skip
        add(
            lanewise(
                f"setp.lt.{combine}.s32", "u32", ["s32", "s32"],
                lambda a, b, f=function: int(f(a < b, b == 7)),
                body=f"    setp.eq.s32 %p2, %r2, 7;\n    setp.lt.{combine}.s32 %p1, %r1, %r2, %p2;"
                "\n    selp.u32 %r0, 1, 0, %p1;",
            )
        )  # fmt: skip
        add(
            lanewise(
                f"{combine}.pred", "u32", ["s32", "s32"],
                lambda a, b, f=function: int(f(a < b, b == 7)) << 1 | int(not f(a < b, b == 7)),
                body="    setp.eq.s32 %p2, %r2, 7;\n    setp.lt.s32 %p3, %r1, %r2;\n"
                f"    {combine}.pred %p4, %p3, %p2;\n    not.pred %p5, %p4;\n"
                "    mov.pred %p6, %p4;\n    selp.u32 %r3, 2, 0, %p6;\n"
                "    selp.u32 %r4, 1, 0, %p5;\n    or.b32 %r0, %r3, %r4;",
            )
        )  # fmt: skip


def _selections(add):
    for kind in ("b16", "b32", "b64", "u16", "s16", "u32", "s32", "u64", "s64", "f32", "f64"):
        register = _REGISTER[bits_of(kind) // 8]
        raw = f"u{bits_of(kind)}"
        add(
            lanewise(
                f"selp.{kind}", raw, [raw, raw], lambda a, b: a if a & 1 else b,
                body=(
                    f"    and.b{bits_of(kind)} {register}9, {register}1, 1;\n"
                    f"    setp.ne.b{bits_of(kind)} %p1, {register}9, 0;\n"
                    f"    selp.{kind} {register}0, {register}1, {register}2, %p1;"
                ),
            )
        )  # fmt: skip
    add(lanewise("slct.b32.s32", "b32", ["b32", "b32", "s32"], lambda a, b, c: a if c >= 0 else b))
    add(lanewise("slct.b32.f32", "b32", ["b32", "b32", "f32"], lambda a, b, c: a if c >= 0 else b))
    for what, function in (
        ("finite", math.isfinite),
        ("infinite", math.isinf),
        ("number", lambda x: not math.isnan(x)),
        ("notanumber", math.isnan),
        ("normal", lambda x: math.isfinite(x) and abs(x) >= 2.0**-126),
        ("subnormal", lambda x: 0 < abs(x) < 2.0**-126),
    ):
        add(
            lanewise(
                f"testp.{what}.f32", "u32", ["f32"], lambda a, f=function: int(f(a)),
                body=f"    testp.{what}.f32 %p1, %r1;\n    selp.u32 %r0, 1, 0, %p1;",
            )
        )  # fmt: skip
