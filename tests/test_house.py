"""The house keeps its order: imports go down the floors only, and no function is long."""

import ast
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


@pytest.mark.parametrize("folder", ["benchmarks", "build_backend", "examples", "jaxfp8", "tests"])
def test_no_function_is_longer_than_a_screen(folder):
    files = sorted((ROOT / folder).rglob("*.py"))
    assert files
    long = [(f.name, name, n) for f in files for name, n in functions(f) if n > LONGEST]
    assert not long


def test_each_floor_imports_only_floors_below_it():
    pytest.importorskip("importlinter")
    program = "from importlinter.cli import lint_imports_command as run; run(['--no-cache'])"
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stdout
    assert "2 kept, 0 broken" in done.stdout
