"""The house keeps its order: imports go down the floors only, and no function is long."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
LONGEST = 60


def functions(path):
    """Name and lines of each function, its docstring aside: that is for its readers."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            first = node.body[0]
            prose = ast.get_docstring(node) and first.end_lineno - first.lineno + 1
            yield node.name, node.end_lineno - node.lineno + 1 - (prose or 0)


FOLDERS = [".ci", "benchmarks", "build_backend", "cmake", "examples", "jaxfp8", "tests", "tools"]


@pytest.mark.parametrize("folder", FOLDERS)
def test_no_function_is_longer_than_a_screen(folder):
    files = sorted((ROOT / folder).rglob("*.py"))
    assert files
    long = [(f.name, name, n) for f in files for name, n in functions(f) if n > LONGEST]
    assert not long


def native_functions(path):
    """First line and lines of each function outside of classes: clang-format puts its ends at the margin."""
    start = None
    for number, line in enumerate(path.read_text().splitlines(), 1):
        if line == "}" and start is not None:
            yield start, number - start + 1
            start = None
        elif line[:1] in ("", " "):
            continue
        elif re.match(r"[#/}]|namespace|using", line) or line.endswith(";"):
            start = None
        elif start is None:
            start = number


def test_no_native_function_outside_kernels_is_longer_than_a_screen():
    files = sorted((ROOT / "csrc").rglob("*.cc"))
    found = [(f.name, start, n) for f in files for start, n in native_functions(f)]
    assert len(found) > 50
    assert not [f for f in found if f[2] > LONGEST]


def test_each_floor_imports_only_floors_below_it():
    pytest.importorskip("importlinter")
    program = "from importlinter.cli import lint_imports_command as run; run(['--no-cache'])"
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stdout
    assert "2 kept, 0 broken" in done.stdout
