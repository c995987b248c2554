"""PEP 517 backend: scikit-build-core, with build requirements that depend on the machine.

`jaxlib` supplies the XLA FFI headers; the version pinned here is the oldest that the package
supports, since a handler runs under every runtime whose FFI is not older than its own. nvcc comes
from the machine, or, where there is none, from its wheels; these are pinned together because pip
would otherwise mix releases that cannot read each other's output.
"""

import os
import platform
import shutil
import sys
from pathlib import Path

from scikit_build_core import build as _backend
from scikit_build_core.build import *  # noqa: F403  the hooks that need no change

_JAXLIB = "jaxlib==0.10.2"
_NVCC = [
    "nvidia-cuda-nvcc==13.0.88",
    "nvidia-cuda-crt==13.0.88",
    "nvidia-nvvm==13.0.88",
    "nvidia-cuda-runtime==13.0.96",
    "nvidia-cuda-cccl==13.0.85",
]


def _has_nvcc() -> bool:
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    return bool(
        shutil.which("nvcc") or any(home and Path(home, "bin", "nvcc").exists() for home in homes)
    )


def _extra_requirements() -> list[str]:
    cuda = os.environ.get("JAXFP8_CUDA", "AUTO").upper()
    wheels_exist = sys.platform == "linux" and platform.machine() == "x86_64"
    if cuda == "OFF" or _has_nvcc() or not wheels_exist:
        return [_JAXLIB]
    return [_JAXLIB, *_NVCC]


def get_requires_for_build_wheel(config_settings=None):
    return _backend.get_requires_for_build_wheel(config_settings) + _extra_requirements()


def get_requires_for_build_editable(config_settings=None):
    return _backend.get_requires_for_build_editable(config_settings) + _extra_requirements()
