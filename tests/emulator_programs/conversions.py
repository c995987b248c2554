"""cvt, mov in all its shapes, and address conversions."""

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction

import ml_dtypes
import numpy as np

from .arithmetic import LANES, lanewise, round_to, value
from .program import Program

_FP8 = {
    "e4m3": (ml_dtypes.float8_e4m3fn, 448.0),
    "e5m2": (ml_dtypes.float8_e5m2, 57344.0),
}


def _fp8(kind: str, x: float) -> int:
    """One value to FP8, by ml_dtypes."""
    dtype, largest = _FP8[kind]
    if math.isnan(x):
        return 0x7F
    clipped = np.float32(max(-largest, min(largest, x)))
    if x == 0:
        clipped = np.float32(x)
    return int(np.array([clipped]).astype(dtype).view(np.uint8)[0])


_ROUNDINGS: dict[str, Callable] = {
    "rni": round,
    "rzi": math.trunc,
    "rmi": math.floor,
    "rpi": math.ceil,
}


def _to_integer(rounding: str, kind: str) -> Callable:
    bits = int(kind[1:])
    low, high = (0, 2**bits - 1) if kind[0] == "u" else (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)

    def convert(x: float) -> int:
        if math.isnan(x):
            return 0
        if math.isinf(x):
            return high if x > 0 else low
        return max(low, min(high, _ROUNDINGS[rounding](Fraction(x))))

    return convert


def _near_fp8(a, *rest):
    """float32 values around every FP8 code, its ties and its limits."""
    out = []
    for i, given in enumerate((a, *rest)):
        new = given.copy()
        rng = np.random.default_rng(40 + i)
        codes = rng.integers(0, 256, LANES).astype(np.uint8)
        dtype = (ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2)[i % 2]
        exact = codes.view(dtype).astype(np.float32)
        between = exact * np.float32(1 + 1 / 16) * (1 + (rng.integers(-1, 2, LANES) * 2.0**-23))
        new[LANES // 2 :] = between.astype(np.float32).view(np.uint32)[LANES // 2 :]
        out.append(new)
    return out


def programs() -> list[Program]:
    out: list[Program] = []
    for add_to in (_narrow_floats, _integers, _bytes, _floats, _moves):
        add_to(out.append)
    return out


def _narrow_floats(add):
    for kind in _FP8:
        add(
            lanewise(
                f"cvt.rn.satfinite.{kind}x2.f32", "u16", ["f32", "f32"],
                lambda a, b, k=kind: _fp8(k, a) << 8 | _fp8(k, b), transform=_near_fp8,
            )
        )  # fmt: skip
        add(
            lanewise(
                f"cvt.rn.satfinite.{kind}x2.f16x2", "u16", ["u32"],
                lambda a, k=kind: _fp8(k, value("f16", a >> 16)) << 8
                | _fp8(k, value("f16", a & 0xFFFF)),
            )
        )  # fmt: skip
        add(
            lanewise(
                f"cvt.rn.f16x2.{kind}x2", "u32", ["u16"],
                lambda a, k=kind: _unpacked(k, a >> 8) << 16 | _unpacked(k, a & 255),
            )
        )  # fmt: skip
    for kind in ("f16", "bf16"):
        add(
            lanewise(
                f"cvt.rn.{kind}x2.f32", "u32", ["f32", "f32"],
                lambda a, b, k=kind: _half(k, a) << 16 | _half(k, b),
            )
        )  # fmt: skip
        add(lanewise(f"cvt.rn.{kind}.f32", kind, ["f32"], lambda a, k=kind: _half(k, a)))
        add(
            lanewise(
                f"cvt.f32.{kind}", "f32", [kind],
                lambda a: int(np.array([a], np.float32).view(np.uint32)[0]), nan_is_nan=True,
            )
        )  # fmt: skip


def _integers(add):
    integers = ("u16", "s16", "u32", "s32", "u64", "s64")
    for source in integers:
        for target in integers:
            if source[1:] != target[1:]:
                add(lanewise(f"cvt.{target}.{source}", target, [source], lambda a: a))
        add(lanewise(f"cvt.rn.f32.{source}", "f32", [source],
                     lambda a: round_to("f32", Fraction(a))))  # fmt: skip
        for rounding in _ROUNDINGS:
            expected = _to_integer(rounding, source)
            add(lanewise(f"cvt.{rounding}.{source}.f32", source, ["f32"], expected))
    add(lanewise("cvt.rzi.ftz.s32.f32", "s32", ["f32"], _to_integer("rzi", "s32")))


def _bytes(add):
    for source in ("u8", "s8"):
        # An 8-bit value in a wider register: its upper bits do not count.
        for register, given in (("%h1", "u16"), ("%r1", "u32")):
            add(
                lanewise(
                    f"cvt.s32.{source} of {given}", "s32", [given],
                    lambda a, s=source: value(s, a & 255),
                    body=f"    cvt.s32.{source} %r0, {register};",
                )
            )  # fmt: skip
    for target in ("u8", "s8"):
        add(
            lanewise(
                f"cvt.{target}.s32", "u16", ["s32"], lambda a, t=target: value(t, a & 255),
                body=f"    cvt.{target}.s32 %h0, %r1;",
            )
        )  # fmt: skip
    add(lanewise("cvt.sat.u8.s32", "u16", ["s32"], lambda a: max(0, min(255, a)),
                 body="    cvt.sat.u8.s32 %h0, %r1;"))  # fmt: skip
    add(lanewise("cvt.sat.s16.s32", "s16", ["s32"], lambda a: max(-32768, min(32767, a))))
    add(lanewise("cvt.s32.s16 of a 32-bit register", "s32", ["u32"],
                 lambda a: value("s16", a & 0xFFFF), body="    cvt.s32.s16 %r0, %r1;"))  # fmt: skip


def _floats(add):
    for rounding, function in _ROUNDINGS.items():
        add(
            lanewise(
                f"cvt.{rounding}.f32.f32", "f32", ["f32"],
                lambda a, f=function: _integral(a, f), nan_is_nan=True,
            )
        )  # fmt: skip
    add(
        lanewise(
            "cvt.sat.f32.f32",
            "f32",
            ["f32"],
            lambda a: round_to("f32", Fraction(min(a, 1.0)) if a > 0 else Fraction(0)),
        )
    )
    add(
        lanewise(
            "cvt.f64.f32",
            "f64",
            ["f32"],
            lambda a: int(np.array([a], np.float64).view(np.uint64)[0]),
            nan_is_nan=True,
        )
    )
    add(
        lanewise(
            "cvt.rn.f32.f64", "f32", ["f64"], lambda a: round_to("f32", _exact(a)), nan_is_nan=True
        )
    )


def _exact(x: float):
    if math.isnan(x) or math.isinf(x) or x == 0:
        return x
    result = Fraction(x)
    # A number that underflows keeps its sign.
    if abs(result) <= Fraction(2) ** -150:
        return math.copysign(0.0, x)
    return result


def _half(kind: str, x: float) -> int:
    if math.isnan(x) or math.isinf(x) or x == 0:
        return round_to(kind, x)
    code = round_to(kind, Fraction(x))
    return code | (0x8000 if x < 0 else 0)


def _unpacked(kind: str, code: int) -> int:
    dtype, _ = _FP8[kind]
    return _half("f16", float(np.array([code], np.uint8).view(dtype).astype(np.float64)[0]))


def _integral(x: float, function: Callable) -> int:
    result = x if not math.isfinite(x) else math.copysign(float(function(Fraction(x))), x)
    return int(np.array([result], np.float32).view(np.uint32)[0])


def _moves(add):
    for kind in ("b16", "u16", "s16", "b32", "u32", "s32", "b64", "u64", "s64", "f32", "f64"):
        raw = f"u{kind[1:]}"
        add(lanewise(f"mov.{kind}", raw, [raw], lambda a: a))
    add(lanewise("mov.b32 packs", "u32", ["u16", "u16"], lambda a, b: b << 16 | a,
                 body="    mov.b32 %r0, {%h1, %h2};"))  # fmt: skip
    add(lanewise("mov.b64 packs", "u64", ["u32", "u32"], lambda a, b: b << 32 | a,
                 body="    mov.b64 %d0, {%r1, %r2};"))  # fmt: skip
    add(lanewise("mov.b64 packs four", "u64", ["u16"] * 4,
                 lambda a, b, c, d: d << 48 | c << 32 | b << 16 | a,
                 body="    mov.b64 %d0, {%h1, %h2, %h3, %h4};"))  # fmt: skip
    add(lanewise("mov.b32 unpacks", "u32", ["u32"], lambda a: (a & 0xFFFF) << 16 | a >> 16,
                 body="    mov.b32 {%h1, %h2}, %r1;\n    mov.b32 %r0, {%h2, %h1};"))  # fmt: skip
    add(lanewise("mov.b64 unpacks", "u64", ["u64"], lambda a: (a & 0xFFFFFFFF) << 32 | a >> 32,
                 body="    mov.b64 {%r1, %r2}, %d1;\n    mov.b64 %d0, {%r2, %r1};"))  # fmt: skip
    add(lanewise("mov.b64 unpacks into a sink", "u32", ["u64"], lambda a: a >> 32,
                 body="    mov.b64 {_, %r0}, %d1;"))  # fmt: skip
    literals = {
        "0x1234": 0x1234, "-1": 0xFFFFFFFF, "0f3F800000": 0x3F800000, "017": 15, "0b101": 5,
        "4294967295U": 0xFFFFFFFF,
    }  # fmt: skip
    for text, number in literals.items():
        add(lanewise(f"mov.b32 {text}", "u32", ["u32"], lambda a, n=number: n,
                     body=f"    mov.b32 %r0, {text};"))  # fmt: skip
    add(lanewise("mov.f64 0d3FF8000000000000", "u64", ["u64"], lambda a: 0x3FF8000000000000,
                 body="    mov.f64 %g0, 0d3FF8000000000000;\n    mov.b64 %d0, %g0;"))  # fmt: skip
