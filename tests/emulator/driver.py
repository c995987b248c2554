"""A CUDA driver whose device is the emulator.

`EmulatedDriver` fills jaxfp8's driver table with ctypes callbacks. XLA then calls the real handlers
on its own CPU buffers; they plan, encode tensor maps and launch as on a GPU, and the launch
executes the kernel's PTX on those buffers. Addresses are translated, so that guard zones lie
between the buffers, and results are poisoned first, so that an element nobody stores is seen.

XLA calls handlers from threads of its own; callbacks take the GIL, and one launch runs at a time.
A failure inside a callback becomes a driver error with the exception's text, and is kept.
"""

from __future__ import annotations

import ctypes
import struct
import threading
from collections import defaultdict, deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from jaxfp8 import _C

from . import launch as emulate
from . import module
from .memory import Memory
from .tensormap import TensorMap

SUCCESS = 0
INVALID_VALUE = 1
NOT_INITIALIZED = 3
NO_DEVICE = 100
INVALID_IMAGE = 200
NOT_FOUND = 500
LAUNCH_FAILED = 719

# cuGetErrorName and cuGetErrorString (CUDA driver API, 6.1).
_ERRORS = {
    SUCCESS: ("CUDA_SUCCESS", "no error"),
    INVALID_VALUE: ("CUDA_ERROR_INVALID_VALUE", "invalid argument"),
    NOT_INITIALIZED: ("CUDA_ERROR_NOT_INITIALIZED", "initialization error"),
    NO_DEVICE: ("CUDA_ERROR_NO_DEVICE", "no CUDA-capable device is detected"),
    INVALID_IMAGE: ("CUDA_ERROR_INVALID_IMAGE", "device kernel image is invalid"),
    NOT_FOUND: ("CUDA_ERROR_NOT_FOUND", "named symbol not found"),
    LAUNCH_FAILED: ("CUDA_ERROR_LAUNCH_FAILED", "unspecified launch failure"),
}
_FIRST_EXCEPTION = 100_000  # error codes of exceptions inside callbacks

_MULTIPROCESSOR_COUNT = 16
_CAPABILITY_MAJOR, _CAPABILITY_MINOR = 75, 76
_DYNAMIC_SMEM = 8
_CLUSTER_DIMENSION = 4
_TENSOR_MAP_TYPES = {0: "uint8", 7: "float32", 9: "bfloat16"}
_TENSOR_MAP_BYTES = 128
_SWIZZLES = (0, 32, 64, 128)
_POISON = 0xFF  # NaN in every float type

_int, _u32, _u64, _ptr = ctypes.c_int, ctypes.c_uint32, ctypes.c_uint64, ctypes.c_void_p
_int_p, _ptr_p, _str_p = (ctypes.POINTER(t) for t in (_int, _ptr, ctypes.c_char_p))
_u64_p, _u32_p = ctypes.POINTER(_u64), ctypes.POINTER(_u32)


class _LaunchAttribute(ctypes.Structure):
    _fields_ = [("id", _int), ("pad", _int), ("value", _u32 * 16)]


class _LaunchConfig(ctypes.Structure):
    _fields_ = [
        ("grid", _u32 * 3),
        ("block", _u32 * 3),
        ("dynamic_smem", _u32),
        ("stream", _ptr),
        ("attributes", ctypes.POINTER(_LaunchAttribute)),
        ("num_attributes", _u32),
    ]


class _Buffer(ctypes.Structure):
    _fields_ = [("name", ctypes.c_char_p), ("data", _ptr), ("size", _u64), ("written", _int)]


_SIGNATURES: dict[str, tuple[Any, ...]] = {
    "cuInit": (_u32,),
    "cuDriverGetVersion": (_int_p,),
    "cuGetErrorName": (_int, _str_p),
    "cuGetErrorString": (_int, _str_p),
    "cuDeviceGetAttribute": (_int_p, _int, _int),
    "cuStreamGetCtx": (_ptr, _ptr_p),
    "cuCtxGetCurrent": (_ptr_p,),
    "cuCtxPushCurrent_v2": (_ptr,),
    "cuCtxPopCurrent_v2": (_ptr_p,),
    "cuCtxGetDevice": (_int_p,),
    "cuCtxGetId": (_ptr, _u64_p),
    "cuMemcpyDtoDAsync_v2": (ctypes.c_uint64, ctypes.c_uint64, ctypes.c_size_t, _ptr),
    "cuThreadExchangeStreamCaptureMode": (_int_p,),
    "cuLibraryLoadData": (_ptr_p, _ptr, _int_p, _ptr_p, _u32, _int_p, _ptr_p, _u32),
    "cuLibraryGetKernel": (_ptr_p, _ptr, ctypes.c_char_p),
    "cuKernelSetAttribute": (_int, _int, _ptr, _int),
    "cuKernelGetFunction": (_ptr_p, _ptr),
    "cuTensorMapEncodeTiled": (
        _ptr, _int, _u32, _ptr, _u64_p, _u64_p, _u32_p, _u32_p, _int, _int, _int, _int,
    ),
    "cuLaunchKernelEx": (ctypes.POINTER(_LaunchConfig), _ptr, _ptr_p, _ptr_p),
}  # fmt: skip
ENTRY_POINTS = tuple(_SIGNATURES)
_HOOK = ctypes.CFUNCTYPE(None, ctypes.c_char_p, ctypes.POINTER(_Buffer), _int)


# XLA may still be in a call whose result nobody awaited, when a test has dropped its driver.
_recent: deque[EmulatedDriver] = deque(maxlen=8)


@dataclass
class Launch:
    """One executed launch: what was asked for, and the emulator's report of it."""

    target: str
    device: int
    image: str
    kernel: str
    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    cluster: tuple[int, int, int]
    dynamic_smem: int
    report: Any = None


@dataclass
class _Call:
    """The custom call that a thread is in: its buffers, under emulated addresses."""

    target: str
    memory: Memory = field(default_factory=Memory)
    spans: list[tuple[int, int, int]] = field(default_factory=list)  # host base, size, emulated

    def translate(self, address: int) -> int:
        """The emulated address of a host address; others, such as null and integers, stay."""
        for base, size, emulated in self.spans:
            if base <= address < base + size:
                return emulated + (address - base)
        return address


class EmulatedDriver:
    """A driver table for `jaxfp8._C`, installed while this object is entered.

    Arguments:
        directory: the compiled kernels: `<image>.cubin` and `<image>.ptx`.
        num_sms: multiprocessors that a device claims to have. Few keep persistent grids small.
        compute_capability: of the devices.
        num_devices: stream s belongs to device s - 1, as does a context; calls without a stream
            are on device 0.
        seed, check_races: passed to the emulator; may be changed between calls.
        guard: bytes between the buffers of a call, under emulated addresses.
        ptx: texts to execute in place of an image's own PTX, by image.
        launch: executes a kernel; the emulator's `launch` unless a test records launches only.

    Attributes:
        launches: every launch that was executed, in order.
        errors: exceptions from inside callbacks, not yet taken with `take_errors`.
        failures: entry point -> error code that it shall return.
        calls: names of the entry points in the order of their calls.
        contexts: the stack of current contexts, by thread.
    """

    def __init__(
        self,
        directory: Path,
        *,
        num_sms: int = 2,
        compute_capability: tuple[int, int] = (9, 0),
        num_devices: int = 1,
        seed: int = 0,
        check_races: bool = True,
        guard: int = 1 << 16,
        ptx: Mapping[str, str] | None = None,
        launch: Callable[..., Any] | None = None,
    ):
        self.directory = directory
        self.num_sms = num_sms
        self.compute_capability = compute_capability
        self.num_devices = num_devices
        self.seed, self.check_races, self.guard = seed, check_races, guard
        self.ptx = dict(ptx or {})
        self.launch = launch or emulate
        self.launches: list[Launch] = []
        self.errors: list[BaseException] = []
        self.failures: dict[str, int] = {}
        self.calls: list[str] = []
        self.contexts: dict[int, list[int]] = defaultdict(list)
        self._exceptions: list[bytes] = []
        self._texts: list[bytes] = []  # what cuGetErrorString points to
        self._current: dict[int, _Call] = {}  # by thread
        self._libraries: list[str] = []  # images; handle - 1 is the index
        self._kernels: list[tuple[str, str]] = []  # (image, kernel); likewise
        self._dynamic_smem: dict[tuple[int, int], int] = {}  # by kernel handle and device
        self._lock = threading.Lock()
        self._callbacks = {
            name: ctypes.CFUNCTYPE(_int, *signature)(self._guarded(name, getattr(self, name)))
            for name, signature in _SIGNATURES.items()
        }
        self._hook = _HOOK(self._on_call)
        _recent.append(self)

    # --- installation ---------------------------------------------------------------------------

    def entry_points(self) -> dict[str, int]:
        """Symbol -> address, for `_C._install_driver`."""
        return {
            name: ctypes.cast(callback, _ptr).value or 0
            for name, callback in self._callbacks.items()
        }

    @property
    def hook(self) -> int:
        return ctypes.cast(self._hook, _ptr).value or 0

    def install(self):
        _C._install_driver(self.entry_points(), self.hook)

    def __enter__(self) -> EmulatedDriver:
        self.install()
        return self

    def __exit__(self, *_):
        _C._uninstall_driver()

    def take_errors(self) -> list[BaseException]:
        """The exceptions so far; they then count as dealt with."""
        taken, self.errors = self.errors, []
        return taken

    def _guarded(self, name: str, function: Callable[..., int | None]) -> Callable[..., int]:
        def callback(*args) -> int:
            self.calls.append(name)
            if name in self.failures:
                return self.failures[name]
            try:
                return function(*args) or SUCCESS
            except BaseException as error:  # reported: nothing can be raised through C
                self.errors.append(error)
                self._exceptions.append(f"{type(error).__name__}: {error}".encode())
                return _FIRST_EXCEPTION + len(self._exceptions) - 1

        return callback

    def _on_call(self, target, buffers, count):
        call = _Call(target.decode(), Memory(self.guard))
        self._current[threading.get_ident()] = call
        read = {(b.data, b.size) for b in buffers[:count] if not b.written}
        regions: dict[tuple[int, int], int] = {}
        # Results first, so that a buffer which is also an operand is writable.
        for buffer in sorted(buffers[:count], key=lambda b: not b.written):
            extent = buffer.data, buffer.size
            if extent in regions:
                continue
            host = (ctypes.c_ubyte * buffer.size).from_address(buffer.data)
            array = np.frombuffer(host, np.uint8)
            if buffer.written and extent not in read:
                array[:] = _POISON
            array.flags.writeable = bool(buffer.written)
            region = call.memory.array(array, name=buffer.name.decode())
            regions[extent] = region.base
            call.spans.append((*extent, region.base))

    def _call(self) -> _Call:
        """The call of this thread; an empty one for a plan that is launched without a call."""
        return self._current.get(threading.get_ident()) or _Call("")

    def _device(self) -> int:
        stack = self.contexts[threading.get_ident()]
        return stack[-1] - 1 if stack else 0

    # --- entry points ---------------------------------------------------------------------------

    def cuInit(self, flags):
        return INVALID_VALUE if flags else SUCCESS

    def cuDriverGetVersion(self, version):
        version[0] = 13000

    def _error_text(self, error: int) -> tuple[bytes, bytes] | None:
        if error in _ERRORS:
            name, text = _ERRORS[error]
            return name.encode(), text.encode()
        index = error - _FIRST_EXCEPTION
        if 0 <= index < len(self._exceptions):
            return b"EMULATOR", self._exceptions[index]
        return None

    def _give_text(self, error: int, out, which: int):
        texts = self._error_text(error)
        if texts is None:
            out[0] = None
            return INVALID_VALUE
        self._texts.append(texts[which])  # outlives the call
        out[0] = self._texts[-1]
        return SUCCESS

    def cuGetErrorName(self, error, name):
        return self._give_text(error, name, 0)

    def cuGetErrorString(self, error, text):
        return self._give_text(error, text, 1)

    def cuDeviceGetAttribute(self, value, attribute, device):
        if device not in range(self.num_devices):
            return INVALID_VALUE
        value[0] = {
            _MULTIPROCESSOR_COUNT: self.num_sms,
            _CAPABILITY_MAJOR: self.compute_capability[0],
            _CAPABILITY_MINOR: self.compute_capability[1],
        }[attribute]

    def cuStreamGetCtx(self, stream, context):
        context[0] = stream

    def cuCtxGetCurrent(self, context):
        stack = self.contexts[threading.get_ident()]
        context[0] = stack[-1] if stack else None

    def cuCtxPushCurrent_v2(self, context):
        if context not in range(1, self.num_devices + 1):
            return INVALID_VALUE
        self.contexts[threading.get_ident()].append(context)

    def cuCtxPopCurrent_v2(self, context):
        context[0] = self.contexts[threading.get_ident()].pop()

    def cuCtxGetDevice(self, device):
        device[0] = self._device()

    def cuCtxGetId(self, context, number):
        number[0] = context or 0

    def cuMemcpyDtoDAsync_v2(self, target, source, size, stream):
        spans = self._call().spans
        for address in (target, source):
            if not any(b <= address and address + size <= b + n for b, n, _ in spans):
                return INVALID_VALUE
        ctypes.memmove(target, source, size)
        return SUCCESS

    def cuThreadExchangeStreamCaptureMode(self, mode):
        return SUCCESS if mode[0] in (0, 1, 2) else INVALID_VALUE

    def cuLibraryLoadData(self, library, image, *options):
        found = self._image_at(image)
        if found is None:
            return INVALID_IMAGE
        self._libraries.append(found)
        library[0] = len(self._libraries)

    def _image_at(self, address: int) -> str | None:
        """The image whose cubin lies at an address: its size is in its ELF header."""
        if ctypes.string_at(address, 4) != b"\x7fELF":
            return None
        header = ctypes.string_at(address, 64)
        program, sections = struct.unpack_from("<QQ", header, 32)
        program_size, programs, section_size, num_sections = struct.unpack_from("<4H", header, 54)
        size = max(program + program_size * programs, sections + section_size * num_sections)
        code = ctypes.string_at(address, size)
        for path in self.directory.glob("*.cubin"):
            if path.read_bytes() == code:
                return path.stem
        return None

    def _text(self, image: str) -> str:
        return self.ptx.get(image) or (self.directory / f"{image}.ptx").read_text()

    def cuLibraryGetKernel(self, kernel, library, name):
        image = self._libraries[library - 1]
        if name.decode() not in module(self._text(image)).entries:
            return NOT_FOUND
        self._kernels.append((image, name.decode()))
        kernel[0] = len(self._kernels)

    def cuKernelSetAttribute(self, attribute, value, kernel, device):
        if attribute != _DYNAMIC_SMEM or device not in range(self.num_devices):
            return INVALID_VALUE
        self._dynamic_smem[kernel, device] = value

    def cuKernelGetFunction(self, function, kernel):
        function[0] = kernel

    def cuTensorMapEncodeTiled(
        self, out, kind, rank, base, dims, strides, box, element_strides, *modes
    ):
        interleave, swizzle, l2_promotion, fill = modes
        if interleave or fill or any(element_strides[i] != 1 for i in range(rank)):
            return INVALID_VALUE
        call = self._call()
        encoded = TensorMap(
            (call.memory, call.translate(base)),
            [dims[i] for i in range(rank)],
            [strides[i] for i in range(rank - 1)],
            [box[i] for i in range(rank)],
            swizzle=_SWIZZLES[swizzle],
            dtype=_TENSOR_MAP_TYPES[kind],
        ).encode(call.memory)
        ctypes.memmove(out, encoded, len(encoded))

    def cuLaunchKernelEx(self, config, function, arguments, extra):
        config = config[0]
        cluster = (1, 1, 1)
        for i in range(config.num_attributes):
            attribute = config.attributes[i]
            if attribute.id != _CLUSTER_DIMENSION:
                return INVALID_VALUE
            cluster = tuple(attribute.value[:3])
        device = config.stream - 1 if config.stream else 0
        if config.dynamic_smem > self._dynamic_smem.get((function, device), 48 * 1024):
            return INVALID_VALUE
        call = self._call()
        image, name = self._kernels[function - 1]
        text = self._text(image)
        record = Launch(
            call.target,
            device,
            image,
            name,
            tuple(config.grid),
            tuple(config.block),
            cluster,
            config.dynamic_smem,
        )
        values = [
            self._argument(call, parameter, arguments[i])
            for i, parameter in enumerate(module(text).kernel(name).parameters)
        ]
        with self._lock:
            self.launches.append(record)
            record.report = self.launch(
                text,
                name,
                grid=record.grid,
                block=record.block,
                cluster=cluster,
                dynamic_smem=record.dynamic_smem,
                args=values,
                memory=call.memory,
                seed=self.seed,
                check_races=self.check_races,
            )

    @staticmethod
    def _argument(call: _Call, parameter, address: int) -> bytes:
        raw = ctypes.string_at(address, parameter.size)
        if parameter.size in (4, _TENSOR_MAP_BYTES):
            return raw
        # An address, or a struct that begins with addresses; integers of buffers' sizes stay.
        words = [raw[i : i + 8] for i in range(0, len(raw), 8)]
        return b"".join(
            call.translate(int.from_bytes(word, "little")).to_bytes(len(word), "little")
            for word in words
        )
