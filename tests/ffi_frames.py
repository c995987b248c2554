"""Calls the FFI handlers as XLA does, without XLA: call frames built with ctypes (xla/ffi/api/c_api.h, 0.3).

XLA checks shapes and layouts before a handler sees them; a frame made here holds anything.
"""

from __future__ import annotations

import ctypes
import functools
import itertools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from jaxfp8 import _C

# XLA_FFI_DataType
DTYPES = {
    "invalid": 0, "pred": 1, "s8": 2, "s16": 3, "s32": 4, "s64": 5, "u8": 6, "u16": 7, "u32": 8,
    "u64": 9, "f16": 10, "f32": 11, "f64": 12, "c64": 15, "bf16": 16, "token": 17, "c128": 18,
    "f8e5m2": 19, "f8e4m3fn": 20, "s4": 21, "u4": 22, "f8e4m3b11fnuz": 23, "f8e5m2fnuz": 24,
    "f8e4m3fnuz": 25, "f8e4m3": 28, "f8e3m4": 29, "f4e2m1fn": 32, "f8e8m0fnu": 33,
    "unknown": 63,  # the largest that the enumeration can hold
}  # fmt: skip
INVALID_ARGUMENT, INTERNAL, UNAVAILABLE = 3, 13, 14  # XLA_FFI_Error_Code
INITIALIZE, EXECUTE = 2, 3  # XLA_FFI_ExecutionStage
STAGES = {INITIALIZE: "initialize", EXECUTE: "execute"}
_ARRAY, _DICTIONARY, _SCALAR, _STRING = 1, 2, 3, 4  # XLA_FFI_AttrType

_ptr, _size, _i64, _int = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int64, ctypes.c_int
_HEAD = [("struct_size", _size), ("extension_start", _ptr)]


class _Buffer(ctypes.Structure):
    _fields_ = [*_HEAD, ("dtype", _int), ("data", _ptr), ("rank", _i64), ("dims", _ptr)]


class _Arrays(ctypes.Structure):  # XLA_FFI_Args and XLA_FFI_Rets
    _fields_ = [*_HEAD, ("size", _i64), ("types", _ptr), ("values", _ptr)]


class _Attrs(ctypes.Structure):
    _fields_ = [*_HEAD, ("size", _i64), ("types", _ptr), ("names", _ptr), ("values", _ptr)]


class _Span(ctypes.Structure):
    _fields_ = [("ptr", ctypes.c_char_p), ("len", _size)]


class _Scalar(ctypes.Structure):
    _fields_ = [("dtype", _int), ("value", _ptr)]


class _Array(ctypes.Structure):
    _fields_ = [("dtype", _int), ("size", _size), ("data", _ptr)]


class _Frame(ctypes.Structure):
    _fields_ = [
        *_HEAD,
        ("api", _ptr),
        ("ctx", _ptr),
        ("stage", _int),
        ("args", _Arrays),
        ("rets", _Arrays),
        ("attrs", _Attrs),
        ("future", _ptr),
    ]


class _ErrorCreate(ctypes.Structure):
    _fields_ = [*_HEAD, ("message", ctypes.c_char_p), ("code", _int)]


class _StreamGet(ctypes.Structure):
    _fields_ = [*_HEAD, ("ctx", _ptr), ("stream", _ptr)]


_CREATE = ctypes.CFUNCTYPE(_size, ctypes.POINTER(_ErrorCreate))
_STREAM = ctypes.CFUNCTYPE(_size, ctypes.POINTER(_StreamGet))


class _Api(ctypes.Structure):
    _fields_ = [
        *_HEAD,
        ("version", _size * 3),
        ("internal", _ptr),
        ("error_create", _CREATE),
        ("error_get_message", _ptr),
        ("error_destroy", _ptr),
        ("handler_register", _ptr),
        ("stream_get", _STREAM),
        ("others", _ptr * 13),  # not used by the handlers
    ]


class Error(NamedTuple):
    """What a handler returned."""

    code: int  # XLA_FFI_Error_Code
    message: str


_errors: dict[int, Error] = {}
_handles = itertools.count(1)


@_CREATE
def _create(args):
    handle = next(_handles)
    _errors[handle] = Error(args[0].code, args[0].message.decode())
    return handle


@_STREAM
def _stream(args):
    args[0].stream = args[0].ctx  # frames carry the stream itself
    return 0


_API = _Api(
    struct_size=ctypes.sizeof(_Api),
    version=(_size * 3)(24, 0, 3 << 32),
    error_create=_create,
    stream_get=_stream,
)

_capsule_pointer = ctypes.pythonapi.PyCapsule_GetPointer
_capsule_pointer.restype, _capsule_pointer.argtypes = _ptr, [ctypes.py_object, ctypes.c_char_p]
_HANDLER = ctypes.CFUNCTYPE(_size, ctypes.POINTER(_Frame))


@functools.cache
def handlers(platform: str, stage: int = EXECUTE) -> dict[str, Any]:
    """The handlers of a platform and stage, by target."""
    return {
        name: _HANDLER(_capsule_pointer(capsule, None))
        for name, capsule in _C.handlers(platform, STAGES[stage]).items()
    }


class Buffer(NamedTuple):
    """An array of a call: element type, address, sizes."""

    dtype: str
    address: int
    dims: Sequence[int]


def scalar(dtype: str, value: int | float | bool) -> tuple[int, Any, list[Any]]:
    """A scalar attribute: i1 is "pred"."""
    kind = {"pred": ctypes.c_bool, "f32": ctypes.c_float, "f64": ctypes.c_double}.get(dtype)
    if kind is None:
        kind = {"8": ctypes.c_uint8, "6": ctypes.c_uint16, "2": ctypes.c_int32}.get(
            dtype[-1], ctypes.c_int64
        )
    held = kind(value)
    return _SCALAR, _Scalar(DTYPES[dtype], ctypes.addressof(held)), [held]


def string(text: str) -> tuple[int, Any, list[Any]]:
    """A string attribute."""
    return _STRING, _Span(text.encode(), len(text)), []


def array(dtype: str, values: Sequence[int]) -> tuple[int, Any, list[Any]]:
    """An array attribute."""
    held = (ctypes.c_int32 * len(values))(*values)
    return _ARRAY, _Array(DTYPES[dtype], len(values), ctypes.addressof(held)), [held]


def dictionary() -> tuple[int, Any, list[Any]]:
    """An empty dictionary attribute."""
    return _DICTIONARY, _Attrs(struct_size=ctypes.sizeof(_Attrs)), []


class Frame:
    """One call: its buffers, its attributes and, on the CUDA platform, its stream.

    `attributes`: name -> what `scalar`, `string`, `array` or `dictionary` gives. `api`: another
    XLA_FFI_Api than the one here.
    """

    def __init__(
        self,
        operands: Sequence[Buffer],
        results: Sequence[Buffer],
        attributes: Mapping[str, tuple[int, Any, list[Any]]],
        *,
        stream: int = 0,
        stage: int = EXECUTE,
        api: int = 0,
    ):
        self._keep: list[Any] = []
        self.frame = _Frame(
            struct_size=ctypes.sizeof(_Frame) - ctypes.sizeof(_ptr),  # up to `attrs`
            api=api or ctypes.addressof(_API),
            ctx=stream or None,
            stage=stage,
            args=self._arrays(operands),
            rets=self._arrays(results),
            attrs=self._attributes(attributes),
        )

    def _held(self, value):
        self._keep.append(value)
        return ctypes.addressof(value)

    def _arrays(self, buffers: Sequence[Buffer]) -> _Arrays:
        n = len(buffers)
        made = (_Buffer * n)()
        for b, buffer in zip(made, buffers, strict=True):
            b.struct_size = ctypes.sizeof(_Buffer)
            b.dtype, b.data, b.rank = DTYPES[buffer.dtype], buffer.address, len(buffer.dims)
            b.dims = self._held((_i64 * len(buffer.dims))(*buffer.dims))
        base = self._held(made)
        pointers = (_ptr * n)(*(base + i * ctypes.sizeof(_Buffer) for i in range(n)))
        types = (_int * n)(*[1] * n)
        return _Arrays(
            struct_size=ctypes.sizeof(_Arrays),
            size=n,
            types=self._held(types),
            values=self._held(pointers),
        )

    def _attributes(self, attributes) -> _Attrs:
        n = len(attributes)
        named = sorted(attributes.items())  # XLA's order, which the lookup relies on
        spans = [_Span(name.encode(), len(name.encode())) for name, _ in named]
        values = []
        for _, (_, value, held) in named:
            self._keep.append(held)
            values.append(self._held(value))
        return _Attrs(
            struct_size=ctypes.sizeof(_Attrs),
            size=n,
            types=self._held((_int * n)(*(kind for _, (kind, _, _) in named))),
            names=self._held((_ptr * n)(*(self._held(s) for s in spans))),
            values=self._held((_ptr * n)(*values)),
        )

    def call(self, target: str, platform: str = "cpu") -> Error | None:
        """Calls the target's handler; None is success."""
        handle = handlers(platform, self.frame.stage)[target](ctypes.byref(self.frame))
        return _errors.pop(handle) if handle else None
