"""The recording driver of tests/native: CUDA without a device, built with the machine's C++ compiler.

Tests install it (`RecordingDriver`), or let the library find it as libcuda.so.1 (`build`).
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import os
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

from jaxfp8 import _C
from tests import ffi_frames
from tests.ffi_frames import Error, Frame

ROOT = Path(__file__).parent.parent
_SOURCE = ROOT / "tests" / "native" / "recording_driver.cc"
# What a recorded image holds: the header of a 64-bit ELF file with nothing in it.
IMAGE = b"\x7fELF\x02" + bytes(59)

ENTRY_POINTS = (
    "cuInit", "cuDriverGetVersion", "cuGetErrorName", "cuGetErrorString", "cuDeviceGetAttribute",
    "cuStreamGetCtx", "cuCtxGetCurrent", "cuCtxPushCurrent_v2", "cuCtxPopCurrent_v2",
    "cuCtxGetDevice", "cuCtxGetId", "cuMemcpyDtoDAsync_v2",
    "cuThreadExchangeStreamCaptureMode", "cuLibraryLoadData",
    "cuLibraryGetKernel", "cuKernelSetAttribute", "cuKernelGetFunction", "cuTensorMapEncodeTiled",
    "cuLaunchKernelEx",
)  # fmt: skip
IMAGES = sorted(path.stem for path in (ROOT / "csrc" / "kernels").glob("*/*.cu"))


def compiler() -> str | None:
    """The C++ compiler, if the machine has one."""
    return shutil.which(os.environ.get("CXX", "c++"))


def build(directory: Path, name: str = "libcuda.so.1") -> Path:
    """Compiles the driver to `directory`/`name`; RECORDING_CXXFLAGS may instrument it.

    The loader takes whatever is loaded as libcuda.so.1 for CUDA's: a process that is to have no driver
    needs another name.
    """
    spec = importlib.util.find_spec("jaxlib")
    assert spec and spec.origin, "jaxlib is not installed"
    library = directory / name
    command = [compiler() or "c++", "-std=c++20", "-O1", "-g", "-shared", "-fPIC", "-pthread"]
    command += [f"-Wl,-soname,{name}", *os.environ.get("RECORDING_CXXFLAGS", "").split()]
    command += [f"-I{ROOT / 'csrc'}", f"-I{Path(spec.origin).parent / 'include'}"]
    subprocess.run([*command, "-o", str(library), str(_SOURCE)], check=True)
    return library


def write_images(directory: Path):
    """Files that the recording driver takes for the compiled kernels."""
    for image in IMAGES:
        (directory / f"{image}.cubin").write_bytes(IMAGE)


class Launch(ctypes.Structure):
    """What was launched last."""

    _fields_ = [
        ("_kernel", ctypes.c_char * 96),
        ("_grid", ctypes.c_uint32 * 3),
        ("_block", ctypes.c_uint32 * 3),
        ("_cluster", ctypes.c_uint32 * 3),
        ("dynamic_smem", ctypes.c_uint32),
        ("device", ctypes.c_int32),
    ]

    @property
    def kernel(self) -> str:
        return self._kernel.decode()

    @property
    def grid(self) -> tuple[int, ...]:
        return tuple(self._grid)

    @property
    def cluster(self) -> tuple[int, ...]:
        return tuple(self._cluster)


@functools.cache
def _library() -> ctypes.CDLL:
    directory = Path(tempfile.mkdtemp(prefix="recording-driver-"))
    try:
        library = ctypes.CDLL(str(build(directory, "recording_driver.so")))
    finally:
        shutil.rmtree(directory)  # the mapping stays
    library.recording_last_launch.restype = ctypes.POINTER(Launch)
    library.recording_last_copy.restype = ctypes.POINTER(ctypes.c_uint64 * 3)
    library.recording_complaint.restype = ctypes.c_char_p
    library.recording_api.restype = ctypes.c_void_p
    library.recording_error_message.restype = ctypes.c_char_p
    library.recording_error_message.argtypes = [ctypes.c_void_p]
    library.recording_error_code.argtypes = [ctypes.c_void_p]
    library.recording_error_free.argtypes = [ctypes.c_void_p]
    for name in ("recording_calls", "recording_complaints", "recording_hammer"):
        getattr(library, name).restype = ctypes.c_int64
    return library


class RecordingDriver:
    """The driver table filled with the recording driver, while this object is entered.

    Calls may be made on streams 1 to `num_devices`, or on none (device 0). What it records of
    launches and contexts is of the thread that asks.
    """

    def __init__(
        self,
        *,
        num_devices: int = 1,
        capability: tuple[int, int] = (9, 0),
        num_sms: int = 132,
        version: int = 13000,
    ):
        self._library = _library()
        self._devices = (num_devices, *capability, num_sms, version)
        self.num_sms = num_sms

    def __enter__(self) -> RecordingDriver:
        self.reset()
        self._images = tempfile.TemporaryDirectory()
        self.image_directory = Path(self._images.name)
        write_images(self.image_directory)
        _C.set_image_directory(self._images.name, built=False)
        self.install()
        return self

    def __exit__(self, *_):
        _C._uninstall_driver()
        self._images.cleanup()
        _C.set_image_directory(str(Path(_C.__file__).parent / "_cuda"))

    def reset(self):
        self._library.recording_reset()
        self._library.recording_set_devices(*self._devices)

    def install(self):
        """Installs it anew: the library knows nothing of it, as before the first call."""
        addresses = {
            name: ctypes.cast(getattr(self._library, name), ctypes.c_void_p).value or 0
            for name in ENTRY_POINTS
        }
        _C._install_driver(addresses)

    def fail(self, entry_point: str, code: int, *, skip: int = 0):
        """Calls of an entry point fail with a CUresult, after `skip` more; 0: no longer."""
        if self._library.recording_fail(entry_point.encode(), code, skip):
            raise ValueError(f"there is no entry point {entry_point}")

    def jitter(self, microseconds: int):
        """A quarter of the driver's calls sleep up to this long, until the next `reset`."""
        self._library.recording_jitter(microseconds)

    def hold(self, entry_point: str):
        """Calls of an entry point do not return, until another is held, or none: ""."""
        self._library.recording_hold(entry_point.encode())

    def calls(self, entry_point: str) -> int:
        return self._library.recording_calls(entry_point.encode())

    @property
    def complaints(self) -> int:
        """How many calls broke a rule of the driver API."""
        return self._library.recording_complaints()

    @property
    def complaint(self) -> str:
        return self._library.recording_complaint().decode()

    @property
    def last_launch(self) -> Launch:
        return self._library.recording_last_launch()[0]

    @property
    def last_copy(self) -> tuple[int, int, int]:
        """Target, source and bytes of this thread's last copy."""
        return tuple(self._library.recording_last_copy()[0])

    def renew_contexts(self):
        """Destroys every device's context and makes it anew, at the same address."""
        self._library.recording_renew_contexts()

    @property
    def depth(self) -> int:
        """Contexts on this thread's stack."""
        return self._library.recording_depth()

    @property
    def capture_mode(self) -> int:
        """This thread's; 0 is global, the default."""
        return self._library.recording_capture_mode()

    @property
    def api(self) -> int:
        """For `Frame(api=)`: XLA's functions without Python."""
        return self._library.recording_api()

    def hammer(
        self, calls: Sequence[tuple[str, Frame]], *, threads: int, rounds: int, platform="CUDA"
    ) -> tuple[int, str]:
        """Makes calls (target, frame) from many threads at once; frames need this driver's `api`.

        Returns how many failed, and the message of one.
        """
        handlers = ffi_frames.handlers(platform)
        pointers = ctypes.c_void_p * len(calls)
        functions = pointers(*(ctypes.cast(handlers[t], ctypes.c_void_p).value for t, _ in calls))
        frames = pointers(*(ctypes.addressof(frame.frame) for _, frame in calls))
        message = ctypes.create_string_buffer(1024)
        failed = self._library.recording_hammer(
            functions, frames, len(calls), threads, rounds, message, len(message)
        )
        return failed, message.value.decode()


__all__ = ["Error", "Launch", "RecordingDriver", "build", "compiler", "write_images"]
