"""Arithmetic of PTX on NumPy arrays, one value a lane (PTX ISA 9.7.1 to 9.7.9).

Exact unless a function says otherwise: IEEE round to nearest even, subnormals kept, and NaN results
of arithmetic and of conversions are the canonical NaN of the hardware (0x7fffffff, 0x7fff, 0x7f).
The `.approx` instructions are computed in float64 and rounded once, so they are at least as exact
as the hardware: no bit equality with a GPU can be expected of them.
"""

from __future__ import annotations

import ml_dtypes
import numpy as np

u8, u16, u32, u64 = np.uint8, np.uint16, np.uint32, np.uint64
i8, i16, i32, i64 = np.int8, np.int16, np.int32, np.int64
f16, f32, f64 = np.float16, np.float32, np.float64

CANONICAL_NAN = np.array([0x7FFFFFFF], u32).view(f32)[0]

# --- integers ---------------------------------------------------------------------------------


def udiv(a, b):
    """div.u: division by zero gives all ones."""
    zero = b == 0
    quotient = np.floor_divide(a, np.where(zero, np.ones_like(b), b))
    return np.where(zero, np.iinfo(quotient.dtype).max, quotient)


def urem(a, b):
    """rem.u: a remainder by zero is a."""
    return np.where(b == 0, a, np.remainder(a, np.where(b == 0, np.ones_like(b), b)))


def sdiv(a, b):
    """div.s: truncates towards zero."""
    divisor = np.where(b == 0, np.ones_like(b), b)
    bits = a.dtype.itemsize * 8
    unsigned = np.dtype(f"u{bits // 8}")
    magnitude = np.abs(a).view(unsigned) // np.abs(divisor).view(unsigned)
    quotient = np.where((a < 0) != (divisor < 0), -magnitude, magnitude).astype(unsigned)
    return np.where(b == 0, np.full_like(a, -1), quotient.view(a.dtype))


def srem(a, b):
    """rem.s: the sign of the dividend."""
    return np.where(b == 0, a, a - sdiv(a, b) * b)


def mulhi64(a, b):
    """The upper 64 bits of a 64 by 64 bit product."""
    m, s = u64(0xFFFFFFFF), u64(32)
    x, y = a.astype(u64), b.astype(u64)
    al, ah, bl, bh = x & m, x >> s, y & m, y >> s
    middle = (al * bl >> s) + (ah * bl & m) + (al * bh & m)
    high = ah * bh + (ah * bl >> s) + (al * bh >> s) + (middle >> s)
    if a.dtype.kind == "i":
        high = high - np.where(a < 0, y, u64(0)) - np.where(b < 0, x, u64(0))
        return high.view(i64)
    return high


def shift_left(a, amount):
    """shl: amounts clamp, so 32 or more gives 0 (NumPy does the same for its own width)."""
    return np.left_shift(a, np.minimum(amount, a.dtype.itemsize * 8).astype(a.dtype))


def shift_right(a, amount):
    """shr: amounts clamp; signed types fill with the sign."""
    return np.right_shift(a, np.minimum(amount, a.dtype.itemsize * 8).astype(a.dtype))


def saturate_add(a, b):
    """add.sat.s32"""
    return np.clip(a.astype(i64) + b.astype(i64), -(2**31), 2**31 - 1).astype(i32)


def saturate_sub(a, b):
    """sub.sat.s32"""
    return np.clip(a.astype(i64) - b.astype(i64), -(2**31), 2**31 - 1).astype(i32)


def sad(a, b, c):
    """sad: |a - b| + c"""
    return np.where(a < b, b - a, a - b) + c


def popc(x):
    return np.bitwise_count(x).astype(u32)


def _bit_length(x):
    """Position of the highest set bit plus one, 0 for 0."""
    x = x.astype(u64)
    length = np.zeros(x.shape, u32)
    for shift in (32, 16, 8, 4, 2, 1):
        big = x >= (u64(1) << u64(shift))
        length += np.where(big, u32(shift), u32(0))
        x = np.where(big, x >> u64(shift), x)
    return length + x.astype(u32)


def clz(x):
    return u32(x.dtype.itemsize * 8) - _bit_length(x)


def bfind(x):
    """bfind: position of the most significant bit that differs from the sign; -1 if none."""
    if x.dtype.kind == "i":
        x = np.where(x < 0, ~x, x).view(f"u{x.dtype.itemsize}")
    return _bit_length(x) - u32(1)


def bfind_shift(x):
    """bfind.shiftamt: the left shift that brings that bit to the top; -1 if there is none."""
    found = bfind(x)
    none = found == u32(0xFFFFFFFF)
    return np.where(none, found, u32(8 * x.dtype.itemsize - 1) - found)


def pairs(function, kind, a, b):
    """A function of the two 16-bit halves of each operand (`.u16x2`, `.s16x2`)."""
    a, b = np.broadcast_arrays(a, b)
    halves = [np.ascontiguousarray(v).view(u16 if kind == "u16" else i16) for v in (a, b)]
    return function(*halves).view(u32).reshape(a.shape)


def brev(x):
    """brev: the bits in reverse order."""
    bits = x.dtype.itemsize * 8
    shift, mask = bits // 2, (1 << bits // 2) - 1
    while shift:
        m = x.dtype.type(mask)
        x = ((x >> x.dtype.type(shift)) & m) | ((x & m) << x.dtype.type(shift))
        shift //= 2
        mask ^= mask << shift
    return x


def bfe(a, position, length):
    """bfe: `length` bits of a from `position`, zero or sign extended."""
    bits = a.dtype.itemsize * 8
    unsigned = np.dtype(f"u{bits // 8}")
    a, position, length = np.broadcast_arrays(a, position & u32(255), length & u32(255))
    p = np.minimum(position, bits).astype(unsigned)
    n = np.minimum(length, bits).astype(unsigned)
    one = unsigned.type(1)
    mask = np.where(n >= bits, ~unsigned.type(0), np.left_shift(one, n) - one)
    value = np.right_shift(a.astype(unsigned), p) & mask
    if a.dtype.kind == "i":
        top = np.minimum(p.astype(i64) + n.astype(i64) - 1, bits - 1)
        sign = np.right_shift(a.astype(unsigned), np.maximum(top, 0).astype(unsigned)) & one
        value = np.where((sign != 0) & (n > 0), value | ~mask, value)
        # Bits above the register are copies of the sign bit.
        above = p.astype(i64) + n.astype(i64) > bits
        kept = np.left_shift(one, np.clip(bits - p.astype(i64), 0, bits).astype(unsigned)) - one
        value = np.where(above & (sign != 0), value | (~kept), value)
        return value.astype(unsigned).view(a.dtype)
    return value


def bfi(field, base, position, length):
    """bfi: `base` with `length` bits from `position` replaced by those of `field`."""
    bits = base.dtype.itemsize * 8
    kind = base.dtype.type
    field, base, position, length = np.broadcast_arrays(field, base, position, length)
    p = np.minimum(position & u32(255), bits).astype(base.dtype)
    n = np.minimum(length & u32(255), bits).astype(base.dtype)
    ones = np.where(n >= bits, ~kind(0), np.left_shift(kind(1), n) - kind(1))
    mask = np.left_shift(ones, p)
    return (base & ~mask) | (np.left_shift(field, p) & mask)


def prmt(a, b, selector):
    """prmt, default mode: any four bytes of the eight of {b, a}."""
    a, b, selector = np.broadcast_arrays(a, b, selector)
    both = a.astype(u64) | (b.astype(u64) << u64(32))
    result = np.zeros(a.shape, u64)
    for i in range(4):
        nibble = ((selector >> u32(4 * i)) & u32(15)).astype(u64)
        byte = (both >> ((nibble & u64(7)) * u64(8))) & u64(255)
        sign = np.where(byte & u64(128), u64(255), u64(0))
        result |= np.where(nibble & u64(8), sign, byte) << u64(8 * i)
    return result.astype(u32)


def lop3(a, b, c, table):
    """lop3: the three-input function whose truth table is `table`."""
    a, b, c, table = np.broadcast_arrays(a, b, c, table)
    lut = int(table.flat[0])
    result = np.zeros(a.shape, u32)
    for i in range(8):
        if lut >> i & 1:
            result |= (a if i & 4 else ~a) & (b if i & 2 else ~b) & (c if i & 1 else ~c)
    return result


def shf(low, high, amount, *, left: bool, wrap: bool):
    """shf: a funnel shift of {high, low}."""
    both = low.astype(u64) | (high.astype(u64) << u64(32))
    n = (amount & u32(31) if wrap else np.minimum(amount, u32(32))).astype(u64)
    return ((both << n) >> u64(32) if left else both >> n).astype(u32)


def dp4a(a, b, c):
    """dp4a on signed bytes (both operands .s32)."""
    a, b, c = np.broadcast_arrays(a, b, c)
    x = np.ascontiguousarray(a).view(i8).reshape(*a.shape, 4).astype(i32)
    y = np.ascontiguousarray(b).view(i8).reshape(*b.shape, 4).astype(i32)
    return (x * y).sum(-1, dtype=i32) + c


# --- float32 ----------------------------------------------------------------------------------


def canonical(x, where=None):
    """Replaces NaN of `x`, in place, by the canonical NaN. A dot product finds NaN cheaply."""
    total = np.dot(x, x)
    if total != total:
        bad = np.isnan(x)
        if where is not None:
            bad &= where
        x[bad] = CANONICAL_NAN if x.dtype == f32 else np.nan


_SMALLEST = f32(2.0**-126)


def flush(x):
    """.ftz: subnormals become zero of the same sign."""
    size = np.abs(x)
    if size.min() >= _SMALLEST:
        return x
    return np.where(size < _SMALLEST, np.copysign(f32(0), x), x)


_TIE_MASK, _TIE = u64(0x1FFFFFFF), u64(0x10000000)
_MAGNITUDE, _ONE64 = u64(0x7FFFFFFFFFFFFFFF), u64(1)
_TINY = np.array([2.0**-126]).view(u64)[0]


def fma32(a, b, c):
    """fma.rn.f32: one rounding.

    The product is exact in float64; the sum may round there before it rounds to float32, which
    matters only where the float64 sum lies halfway between two float32 values (or is subnormal as
    float32). Those lanes round the float64 sum to odd first, after which the second rounding is
    right (Boldo and Melquiond, "Emulation of FMA and correctly rounded sums", 2008).
    """
    product = np.multiply(a, b, dtype=f64)
    total = product + c
    bits = total.view(u64)
    if ((bits & _TIE_MASK) == _TIE).any() or ((bits & _MAGNITUDE) - _ONE64 < _TINY).any():
        total = _sum_to_odd(product, np.broadcast_to(c, total.shape).astype(f64))
    return total.astype(f32)


def _sum_to_odd(a, b):
    """a + b in float64, rounded to odd: a second rounding to fewer bits is then right."""
    total = a + b
    back = total - a
    error = (a - (total - back)) + (b - back)  # Knuth's two-sum: total + error is exact
    fix = (error != 0) & np.isfinite(total) & ((total.view(u64) & _ONE64) == 0)
    towards = np.where(error > 0, np.inf, -np.inf)
    return np.where(fix, np.nextafter(total, towards), total)


def unordered(compare, a, b):
    """The `u` comparisons: true if either operand is NaN."""
    return compare(a, b) | np.isnan(a) | np.isnan(b)


def fmin(a, b):
    return _signed_zero_min(np.fmin(a, b), a, b)


def fmax(a, b):
    return _signed_zero_max(np.fmax(a, b), a, b)


def fmin_nan(a, b):
    return _signed_zero_min(np.minimum(a, b), a, b)


def fmax_nan(a, b):
    return _signed_zero_max(np.maximum(a, b), a, b)


def _signed_zero_min(result, a, b):
    """PTX ISA 9.7.3.11: -0 is less than +0."""
    negative = (result == 0) & (np.signbit(a) | np.signbit(b)) & (a == 0) & (b == 0)
    result = np.where(negative, -result.dtype.type(0), result)
    return np.where(np.isnan(result), CANONICAL_NAN, result) if result.dtype == f32 else result


def _signed_zero_max(result, a, b):
    positive = (result == 0) & ~(np.signbit(a) & np.signbit(b)) & (a == 0) & (b == 0)
    result = np.where(positive, result.dtype.type(0), result)
    return np.where(np.isnan(result), CANONICAL_NAN, result) if result.dtype == f32 else result


def rcp(x):
    return np.divide(x.dtype.type(1), x)


def approx(function):
    """An `.approx` instruction: `function` in float64, rounded once."""

    def run(x):
        return function(x.astype(f64)).astype(x.dtype)

    run.__name__ = function.__name__
    return run


def _rsqrt(x):
    return 1.0 / np.sqrt(x)


def _reciprocal(x):
    return 1.0 / x


APPROXIMATE = {
    "rcp": approx(_reciprocal),
    "sqrt": approx(np.sqrt),
    "rsqrt": approx(_rsqrt),
    "ex2": approx(np.exp2),
    "lg2": approx(np.log2),
    "sin": approx(np.sin),
    "cos": approx(np.cos),
    "tanh": approx(np.tanh),
}


def divide_approx(a, b):
    """div.approx and div.full: in float64, rounded once."""
    return (a.astype(f64) / b.astype(f64)).astype(f32)


def saturate(x):
    """.sat of a float: clamp to [0, 1], NaN becomes +0."""
    return np.where(x > 0, np.minimum(x, 1), 0).astype(x.dtype)


def copysign(sign_of, magnitude):
    """copysign d, a, b: the sign of a on b."""
    return np.copysign(magnitude, sign_of)


def testp(kind, x):
    bits = np.ascontiguousarray(x).view(u32)
    exponent = bits & u32(0x7F800000)
    return {
        "finite": np.isfinite,
        "infinite": np.isinf,
        "number": lambda v: ~np.isnan(v),
        "notanumber": np.isnan,
        "normal": lambda v: (exponent != 0) & (exponent != 0x7F800000),
        "subnormal": lambda v: (exponent == 0) & (v != 0),
    }[kind](x)


# --- conversions (PTX ISA 9.7.9.21) -----------------------------------------------------------

_ROUND = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}
_INTEGERS = {
    "u8": u8, "s8": i8, "u16": u16, "s16": i16, "u32": u32, "s32": i32, "u64": u64, "s64": i64,
}  # fmt: skip


def float_to_integer(x, rounding, kind):
    """cvt.{rni,rzi,rmi,rpi}: saturates; NaN becomes 0."""
    target = _INTEGERS[kind]
    limits = np.iinfo(target)
    rounded = _ROUND[rounding](np.where(np.isnan(x), 0, x).astype(f64))
    low = rounded <= float(limits.min)
    high = rounded >= float(limits.max)
    safe = np.where(low | high, 0, rounded).astype(target)
    return np.where(low, limits.min, np.where(high, limits.max, safe)).astype(target)


def float_to_integral(x, rounding):
    return _ROUND[rounding](x).astype(x.dtype)


def integer_saturate(x, kind):
    limits = np.iinfo(_INTEGERS[kind])
    lowest = max(limits.min, int(np.iinfo(x.dtype).min))
    highest = min(limits.max, int(np.iinfo(x.dtype).max))
    return np.clip(x, x.dtype.type(lowest), x.dtype.type(highest)).astype(_INTEGERS[kind])


def narrow(x, kind):
    """The low 8 bits of a register, as u8 or s8."""
    return x.astype(i8 if kind == "s8" else u8)


def to_bf16(x):
    """float32 to the bits of bfloat16, round to nearest even."""
    bits = np.ascontiguousarray(x, f32).view(u32)
    rounded = (bits + u32(0x7FFF) + ((bits >> u32(16)) & u32(1))) >> u32(16)
    return np.where(np.isnan(x), u32(0x7FFF), rounded).astype(u16)


def from_bf16(bits):
    return (bits.astype(u32) << u32(16)).view(f32)


def to_f16(x):
    """float32 to the bits of float16, round to nearest even."""
    return np.where(np.isnan(x), u16(0x7FFF), np.asarray(x).astype(f16).view(u16))


def from_f16(bits):
    return np.ascontiguousarray(bits).view(f16).astype(f32)


def pack_halves(kind, high, low):
    """cvt.rn.{f16x2,bf16x2}.f32 d, a, b: a goes to the upper half."""
    convert = to_bf16 if kind == "bf16x2" else to_f16
    high, low = np.broadcast_arrays(high, low)
    return (convert(high).astype(u32) << u32(16)) | convert(low)


_FP8 = {
    "e4m3": (ml_dtypes.float8_e4m3fn, f32(448)),
    "e5m2": (ml_dtypes.float8_e5m2, f32(57344)),
}
# The value of each of the 256 codes, in float64.
FP8_VALUES = {k: np.arange(256, dtype=u8).view(t).astype(f64) for k, (t, _) in _FP8.items()}


# Bits of the fraction, the smallest normal number, and the largest finite one.
_FP8_FORMAT = {"e4m3": (3, 2.0**-6, 448.0), "e5m2": (2, 2.0**-14, 57344.0)}


def to_fp8(x, kind):
    """cvt.rn.satfinite.{e4m3,e5m2}: saturates at the largest finite value; NaN becomes 0x7f."""
    fraction, normal, largest = _FP8_FORMAT[kind]
    drop = 23 - fraction
    bits = np.ascontiguousarray(x, f32).view(u32)
    size = bits & u32(0x7FFFFFFF)
    nan = size > u32(0x7F800000)
    size = np.minimum(size, f32(largest).view(u32))
    # Round to nearest even in the integer: a carry out of the fraction moves the exponent.
    rounded = (size + u32((1 << (drop - 1)) - 1) + ((size >> u32(drop)) & u32(1))) >> u32(drop)
    exponent = (int(f32(normal).view(u32)) >> 23) - 1
    code = rounded - u32(exponent << fraction)
    small = size < f32(normal).view(u32)
    if small.any():
        steps = np.rint(size.view(f32) * f32(2.0**fraction / normal)).astype(u32)
        code = np.where(small, steps, code)
    code = code | (bits >> u32(24) & u32(0x80))
    return np.where(nan, u32(0x7F), code).astype(u8)


def pack_fp8(kind, high, low):
    """cvt.rn.satfinite.{e4m3x2,e5m2x2}.f32 d, a, b: a goes to the upper byte."""
    high, low = np.broadcast_arrays(high, low)
    kind = kind[:4]
    return (to_fp8(high, kind).astype(u16) << u16(8)) | to_fp8(low, kind)


def pack_fp8_halves(kind, pair):
    """cvt.rn.satfinite.{e4m3x2,e5m2x2}.f16x2"""
    high, low = from_f16((pair >> u32(16)).astype(u16)), from_f16((pair & u32(0xFFFF)).astype(u16))
    return pack_fp8(kind, high, low)


def unpack_fp8(kind, pair):
    """cvt.rn.f16x2.{e4m3x2,e5m2x2}"""
    values = FP8_VALUES[kind[:4]]

    def half(byte):
        return to_f16(values[byte].astype(f32)).astype(u32)

    return half(pair & u16(255)) | (half(pair >> u16(8)) << u32(16))


# --- f16, bf16 and their packed forms (PTX ISA 9.7.4) ------------------------------------------


def half_arithmetic(operation, kind, *operands):
    """add, sub, mul, fma, min, max, neg, abs of f16, bf16, f16x2, bf16x2.

    Products are exact in float64, and sums are rounded to odd there, so that the conversion to the
    result rounds once.
    """
    lanes = 2 if kind.endswith("x2") else 1
    brain = kind.startswith("bf")
    halves = []
    for k in range(lanes):
        values = []
        for operand in operands:
            bits = ((operand >> u32(16 * k)) & u32(0xFFFF)).astype(u16) if lanes == 2 else operand
            values.append((from_bf16(bits) if brain else from_f16(bits)).astype(f64))
        result = _HALF[operation](*values)
        if brain:
            halves.append(_f64_to_bf16(result))
        else:
            halves.append(np.where(np.isnan(result), u16(0x7FFF), result.astype(f16).view(u16)))
    if lanes == 1:
        return halves[0]
    return halves[0].astype(u32) | (halves[1].astype(u32) << u32(16))


def _f64_to_bf16(x):
    """One rounding: to odd in float32, then to nearest in bfloat16."""
    narrow_ = x.astype(f32)
    error = x - narrow_.astype(f64)
    bits = narrow_.view(u32)
    fix = (error != 0) & np.isfinite(narrow_) & ((bits & u32(1)) == 0)
    towards = np.where(error > 0, f32(np.inf), f32(-np.inf)).astype(f32)
    return to_bf16(np.where(fix, np.nextafter(narrow_, towards), narrow_))


_HALF = {
    "add": _sum_to_odd,
    "sub": lambda a, b: _sum_to_odd(a, -b),
    "mul": lambda a, b: a * b,
    "fma": lambda a, b, c: _sum_to_odd(a * b, c),
    "min": fmin,
    "max": fmax,
    "min_nan": fmin_nan,
    "max_nan": fmax_nan,
    "fma_relu": lambda a, b, c: np.maximum(_sum_to_odd(a * b, c), 0),
    "neg": lambda a: -a,
    "abs": np.abs,
    "tanh": np.tanh,
    "ex2": np.exp2,
}


def half_compare(kind, bits):
    """f16 or bf16 bits as float32, for comparison."""
    return from_bf16(bits) if kind == "bf16" else from_f16(bits)
