"""`python -m tests.emulator`: a kernel of any PTX file, with the arguments of a Python file."""

import re
from pathlib import Path

import pytest

from tests.emulator.__main__ import main
from tests.emulator_programs.program import kernel

pytestmark = pytest.mark.emulator

PAGE = Path(__file__).parents[1] / "docs" / "emulator.md"
TWICE = kernel(
    "u64 u64 u32",
    """
    mov.u32 %r1, %tid.x;
    mov.u32 %r2, %ctaid.x;
    mad.lo.u32 %r1, %r2, 32, %r1;
    ld.param.u64 %d1, [p0];
    ld.param.u64 %d2, [p1];
    mad.wide.u32 %d3, %r1, 4, %d1;
    mad.wide.u32 %d4, %r1, 4, %d2;
    ld.global.f32 %f1, [%d3];
    add.f32 %f2, %f1, %f1;
    st.global.f32 [%d4], %f2;""",
    name="_Z5twicePKfPfi",
)


@pytest.fixture
def files(tmp_path):
    """The arguments file that the page prints, and a kernel for it."""
    (arguments,) = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(), re.M | re.S)
    (tmp_path / "arguments.py").write_text(arguments)
    (tmp_path / "kernel.ptx").write_text(TWICE)
    return tmp_path


def _run(folder, *options: str) -> int:
    return main([str(folder / "kernel.ptx"), str(folder / "arguments.py"), *options])


def test_the_example_of_the_page_runs_and_is_counted(files, capsys):
    assert _run(files, "--seeds", "2") == 0
    printed = capsys.readouterr().out
    assert printed.count("the results are right") == 2 and "no errors" in printed
    for line in (
        r"instructions +22 of warps",
        r"ld\.global\.f32 +2",
        r"bytes read +256 by loads, 0 in bulk",
        r"bytes written +256 by stores, 0 in bulk",
        r"lines executed +11 of 11",
    ):
        assert re.search(line, printed), (line, printed)


def test_a_wrong_result_is_an_error(files, capsys):
    (files / "kernel.ptx").write_text(TWICE.replace("add.f32 %f2, %f1, %f1", "mov.f32 %f2, %f1"))
    assert _run(files) == 1
    assert "wrong result" in capsys.readouterr().out


def test_findings_are_printed_with_their_rule(files, capsys):
    (files / "kernel.ptx").write_text(TWICE.replace("[%d3];", "[%d3+4];"))
    assert _run(files) == 1
    printed = capsys.readouterr().out
    assert "error: OutOfBounds" in printed and "the run ended there" in printed
    assert "rule  PTX ISA" in printed


def test_launches_that_overlap_are_judged(files, capsys):
    text = (files / "arguments.py").read_text()
    text += "first = launch\nlaunches = [first, dict(first, args=[y, np.zeros_like(x), "
    text += "np.int32(64)], programmatic=True)]\ndel check\n"
    (files / "arguments.py").write_text(text)
    assert _run(files) == 1
    assert "griddepcontrol.wait is missing" in capsys.readouterr().out
    waits = TWICE.replace("ld.global", "griddepcontrol.wait;\n    ld.global")
    (files / "kernel.ptx").write_text(waits)
    assert _run(files) == 0


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('kernel="twice"', 'kernel="thrice"', "kernel is 'thrice'"),
        ("launch = dict", "start = dict", "defines neither"),
    ],
)
def test_what_the_arguments_lack_is_named(files, old, new, message):
    text = (files / "arguments.py").read_text()
    (files / "arguments.py").write_text(text.replace(old, new))
    with pytest.raises(SystemExit, match=message):
        _run(files)
