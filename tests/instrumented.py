"""Builds the host code with a sanitizer or for coverage, and runs Python on it.

    python -m tests.instrumented address -m tests.fuzz_border --calls 100000
    python -m tests.instrumented thread -m tests.hammer
    python -m tests.instrumented coverage

`address` is AddressSanitizer with UndefinedBehaviorSanitizer, `thread` ThreadSanitizer; what follows
are the arguments of `python`. There jaxfp8 is a bare package around the instrumented `_C`: without JAX,
whose own code no sanitizer knows, so every report is of our host code, the recording driver, or the
interpreter's allocations. `coverage` runs the tests of the border and prints the line coverage of csrc's
host code (gcovr); it fails below 90 %.
"""

from __future__ import annotations

import functools
import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
LEAST_COVERAGE = 90  # percent of lines
_RUNTIMES = {"address": ("libasan.so", "libubsan.so"), "thread": ("libtsan.so",)}
_OPTIONS = {
    # The interpreter frees little at its end; leaks of a call show in tests/test_border.py.
    "ASAN_OPTIONS": "detect_leaks=0:abort_on_error=0:exitcode=66",
    "UBSAN_OPTIONS": "print_stacktrace=1:halt_on_error=1",
    # The interpreter is not instrumented: its own accesses inside intercepted calls are not ours.
    "TSAN_OPTIONS": "halt_on_error=1:exitcode=66:ignore_noninstrumented_modules=1",
}
BORDER_TESTS = ["tests/test_border.py", "tests/test_driver.py", "tests/test_ffi_errors.py"]


def build(kind: str) -> Path:
    """Compiles the instrumented host code; the folder that holds `_C`."""
    folder = ROOT / "build" / f"instrumented-{kind}"
    # Kernels are not instrumented. Coverage tests need to know which exist: their files are copied.
    configure = [
        "cmake", "-S", str(ROOT), "-B", str(folder), "-DCMAKE_BUILD_TYPE=RelWithDebInfo",
        f"-DJAXFP8_INSTRUMENT={kind}", f"-DJAXFP8_CUDA={'AUTO' if kind == 'coverage' else 'OFF'}",
        f"-DPython_EXECUTABLE={sys.executable}", "-DSKBUILD_SOABI=",
    ]  # fmt: skip
    # The interpreter's environment has a cmake that is new enough (the extra `coverage`).
    path = os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"]))
    run = functools.partial(
        subprocess.run, check=True, stdout=subprocess.DEVNULL, env={**os.environ, "PATH": path}
    )
    if shutil.which("ninja", path=path):
        configure += ["-G", "Ninja"]
    run(configure)
    run(["cmake", "--build", str(folder), "--target", "_C", "--parallel"])
    return folder


def _package(folder: Path, *, whole: bool) -> Path:
    """A folder to import from: jaxfp8 with the instrumented `_C`, all of it or that alone."""
    site = folder / "site"
    shutil.rmtree(site, ignore_errors=True)
    package = site / "jaxfp8"
    package.mkdir(parents=True)
    if whole:
        from jaxfp8 import _ffi

        kernels = _ffi.image_directory()  # an editable installation has them elsewhere
        for path in {*(ROOT / "jaxfp8").iterdir(), kernels}:
            if not path.name.startswith(("_C.cpython", "_C.abi3", "__pycache__")):
                (package / path.name).symlink_to(path)
    else:
        (package / "__init__.py").touch()
    # An editable installation would come before PYTHONPATH.
    (site / "sitecustomize.py").write_text(
        "import sys\n"
        "sys.meta_path[:] = [f for f in sys.meta_path if not type(f).__name__.startswith('ScikitBuild')]\n"
    )
    (extension,) = folder.glob("_C*.so")
    (package / extension.name).symlink_to(extension)
    return site


def _environment(kind: str, site: Path) -> dict[str, str]:
    # Safe path: the folder of the checkout, which may hold another `_C`, comes last.
    paths = {"PYTHONPATH": os.pathsep.join((str(site), str(ROOT))), "PYTHONSAFEPATH": "1"}
    env = {**os.environ, **paths, **_OPTIONS}
    flags = {"address": "-fsanitize=address,undefined", "thread": "-fsanitize=thread"}.get(kind, "")
    env["RECORDING_CXXFLAGS"] = flags
    compiler = os.environ.get("CXX", "c++")
    runtimes = [
        subprocess.run(
            [compiler, f"-print-file-name={name}"], check=True, capture_output=True, text=True
        ).stdout.strip()
        for name in _RUNTIMES.get(kind, ())
    ]
    if runtimes:
        env["LD_PRELOAD"] = " ".join(runtimes)
        env["PYTHONMALLOC"] = "malloc"  # every object an allocation that the sanitizer sees
    return env


def command(kind: str, arguments: list[str]) -> tuple[list[str], dict[str, str]]:
    """The command and environment of `python ARGUMENTS` on an instrumented build, which it makes."""
    site = _package(build(kind), whole=kind == "coverage")
    line = [sys.executable, *arguments]
    if kind == "thread" and shutil.which("setarch"):
        line = ["setarch", "-R", *line]  # its shadow memory needs addresses where they always were
    return line, _environment(kind, site)


def coverage() -> int:
    """Runs the tests of the border; prints the line coverage and returns 1 below the least."""
    folder = ROOT / "build" / "instrumented-coverage"
    for old in folder.rglob("*.gcda"):
        old.unlink()
    tests = ["-m", "pytest", "-x", "-o", "pythonpath=", *BORDER_TESTS]
    line, env = command("coverage", tests)
    subprocess.run(line, check=True, env=env, cwd=ROOT)
    report = [
        sys.executable, "-m", "gcovr", "--root", str(ROOT), "--object-directory", str(folder),
        "--filter", "csrc/", "--fail-under-line", str(LEAST_COVERAGE), "--print-summary",
        "--gcov-ignore-parse-errors=negative_hits.warn_once_per_file", str(folder),
    ]  # fmt: skip
    return subprocess.run(report, cwd=ROOT).returncode


def main(arguments: list[str]) -> int:
    kind, *rest = arguments or [""]
    if kind == "coverage":
        return coverage()
    if kind not in _RUNTIMES or not rest:
        print(__doc__, file=sys.stderr)
        return 2
    line, env = command(kind, rest)
    return subprocess.run(line, env=env, cwd=ROOT).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
