"""The native side: which custom-call targets this build has, and their registration."""

from __future__ import annotations

import functools
import re
from pathlib import Path
from types import ModuleType

import jax


def target(name: str) -> str:
    """Versioned name of a custom-call target: docs/architecture.md lists them."""
    return f"jaxfp8_{name}_v1"


def require_cuda_kernels(operation: str) -> None:
    """Raises NotImplementedError if this build of jaxfp8 holds no CUDA kernels."""
    if not images():
        raise NotImplementedError(
            f"{operation}: this build of jaxfp8 holds no CUDA kernels, because there was no nvcc "
            "when it was built; reinstall it where there is one, or with JAXFP8_CUDA=ON to see why"
        )


def images() -> tuple[str, ...]:
    """The compiled kernel files of this build, without suffix; empty if it has none."""
    return tuple(_C.build_info()["images"])


def targets() -> tuple[str, ...]:
    """Every custom-call target of this build, in order."""
    return tuple(sorted(_C.handlers("CUDA")))


def image_directory() -> Path:
    """Where they lie: `<image>.cubin`, the PTX it was assembled from, and ptxas' report."""
    assert _C.__file__ is not None
    return Path(_C.__file__).parent / "_cuda"


def _check_version(built: tuple[int, int], header: str) -> None:
    """Raises ImportError unless a JAX with this XLA FFI header can call our handlers.

    A handler that is newer than the runtime would not fail alone: JAX could no longer start any
    backend of the process.
    """
    found = re.findall(r"#define XLA_FFI_API_(?:MAJOR|MINOR) (\d+)", header)
    if len(found) != 2:
        raise ImportError(
            f"jaxfp8 cannot tell which XLA FFI version jax {jax.__version__} has; "
            "supported is jax >= 0.10.2, < 0.13"
        )
    major, minor = map(int, found)
    if major != built[0] or minor < built[1]:
        raise ImportError(
            f"jaxfp8 was built for XLA FFI {built[0]}.{built[1]}, but jax {jax.__version__} has "
            f"{major}.{minor}. Install a newer jax, or build jaxfp8 against the headers of "
            "jaxlib 0.10.2 (pip install without --no-build-isolation does)"
        )


def _load() -> ModuleType:
    try:
        from . import _C
    except ImportError as error:
        raise ImportError(
            f"jaxfp8's extension module cannot be loaded ({error}); install the package with "
            "pip install . (or -e .), which builds it"
        ) from error
    header = Path(jax.ffi.include_dir(), "xla", "ffi", "api", "c_api.h")
    _check_version(_C.build_info()["ffi"], header.read_text())
    return _C


@functools.cache
def _register(platform: str) -> None:
    for name, handler in _C.handlers(platform).items():
        jax.ffi.register_ffi_target(name, handler, platform=platform)


def register_cpu_targets() -> None:
    """Registers the handlers for the CPU platform too, where only an emulated driver serves them.

    For tests. Once registered they stay; a call without an emulated driver is an error.
    """
    _register("cpu")


_C = _load()
_C.set_image_directory(str(image_directory()))
# Harmless where JAX has no CUDA platform.
_register("CUDA")
