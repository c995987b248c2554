"""The native side: which custom-call targets this build has, and their registration."""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

if TYPE_CHECKING:
    from . import _C


def target(name: str) -> str:
    """Versioned name of a custom-call target: docs/architecture.md lists them."""
    return f"jaxfp8_{name}_v1"


CONTRACTION_STEP = 16
"""Bytes of which a row of FP8 data must be a multiple for the tensor copy engine (cuTensorMapEncodeTiled)."""

_XLA_NAMES = {
    "float8_e4m3fn": "f8e4m3fn",
    "float8_e5m2": "f8e5m2",
    "bfloat16": "bf16",
    "float16": "f16",
    "float32": "f32",
    "int32": "s32",
}

Type = tuple[tuple[int, ...], Any]
"""Shape and dtype of an array."""


def plan(
    name: str,
    operands: Sequence[Type],
    results: Sequence[Type],
    *,
    config: int = -1,
    num_sms: int = 0,
    device_sms: int,
) -> _C.LaunchPlan:
    """The launch of a product on a device of `device_sms` multiprocessors.

    **Arguments:** `name` without version; arrays as the lowering has them before it pads the contraction; `config`:
    index into `configs(name)`, or -1 for the heuristic, whose choice is the plan's `config`.

    **Raises:** ValueError for a product that no kernel serves.
    """

    def padded(position: int, shape: tuple[int, ...]) -> tuple[int, ...]:
        if position not in (0, 2):  # lhs and rhs
            return shape
        return (*shape[:-1], -(-shape[-1] // CONTRACTION_STEP) * CONTRACTION_STEP)

    return _C.plan(
        target(name),
        [(_XLA_NAMES[np.dtype(d).name], padded(i, s)) for i, (s, d) in enumerate(operands)],
        [(_XLA_NAMES[np.dtype(d).name], s) for s, d in results],
        config=config,
        num_sms=num_sms,
        device_sms=device_sms,
    )


@functools.cache
def configs(name: str) -> tuple[str, ...]:
    """Names of a target's configurations, by index; `name` without version."""
    return tuple(_C.configs(target(name)))


def build_info() -> _C.BuildInfo:
    """What this build contains: version, nvcc (empty: no kernels), ffi, images."""
    return _C.build_info()


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
    """Where they lie: `<image>.cubin`; in an editable installation its PTX and ptxas' report, too."""
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
    execute = _C.handlers(platform)
    # On CUDA kernels are loaded before a program starts; XLA's CPU platform has no such stage.
    initialize = _C.handlers(platform, "initialize") if platform == "CUDA" else None
    for name, handler in execute.items():
        stages = {"initialize": initialize[name], "execute": handler} if initialize else handler
        jax.ffi.register_ffi_target(name, stages, platform=platform)


def register_cpu_targets() -> None:
    """Registers the handlers for the CPU platform too, where only an emulated driver serves them.

    For tests. Once registered they stay; a call without an emulated driver is an error.
    """
    _register("cpu")


_C = _load()
_C.set_image_directory(image_directory())
# Harmless where JAX has no CUDA platform.
_register("CUDA")
