"""Interpreters of the version matrix: `python3 .ci/pythons.py 3.12` prints the path of one."""

import os
import shutil
import subprocess
import sys
from pathlib import Path


def interpreter(version: str) -> str:
    """Path of a CPython of this minor version: on PATH, or one of pyenv's."""
    name = f"python{version}"
    candidates = [shutil.which(name)]
    if pyenv := shutil.which("pyenv"):
        root = subprocess.run([pyenv, "root"], capture_output=True, text=True).stdout.strip()
        candidates += sorted(map(str, Path(root, "versions").glob(f"{version}.*/bin/{name}")))
    for path in candidates:
        # A shim of pyenv exists for versions that are installed but not chosen; it then fails.
        if path and os.access(path, os.X_OK):
            code = "import sys; print(sys.executable, *sys.version_info[:2])"
            found = subprocess.run([path, "-c", code], capture_output=True, text=True)
            if found.returncode == 0 and found.stdout.split()[1:] == version.split("."):
                return found.stdout.split()[0]
    raise SystemExit(f"there is no Python {version}: not on PATH, and not among pyenv's versions")


if __name__ == "__main__":
    print(interpreter(sys.argv[1]))
