"""Prints the path of nvcc: of its wheel, or on PATH, in CUDA_HOME, CUDA_PATH, /usr/local/cuda."""

import importlib.util
import os
import shutil
from pathlib import Path


def _candidates():
    spec = importlib.util.find_spec("nvidia")
    for location in (spec.submodule_search_locations or []) if spec else []:
        yield from sorted(Path(location).glob("cu*/bin/nvcc"))
    if on_path := shutil.which("nvcc"):
        yield Path(on_path)
    for home in (os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"):
        if home:
            yield Path(home, "bin", "nvcc")


print(next((path for path in _candidates() if path.exists()), ""))
