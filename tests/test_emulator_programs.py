"""The emulator executes each instruction form as the PTX ISA says: bit for bit, program by program."""

import pytest

from tests.emulator_programs import all_programs

pytestmark = pytest.mark.emulator


@pytest.mark.parametrize("program", all_programs(), ids=lambda p: p.name)
def test_program(program):
    for seed in program.seeds:
        program.run(seed)
