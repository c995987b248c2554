"""python -m tests.emulator FILE.ptx ARGUMENTS.py: one's own kernel under the emulator.

ARGUMENTS.py is Python. It gives `launch`, or `launches` in order, each a dict:

    args     NumPy arrays, NumPy scalars, `TensorMap`s, bytes: one for each parameter
    block    threads, a number or up to three
    kernel   its name; needed where the file holds several
    grid, cluster, dynamic_smem, programmatic, ptx    as `tests.emulator.launch` has them

and `check()`, if it likes, which asserts what the arrays then hold. Launches share one memory.

Prints the findings of each launch and each seed, and what it executed and moved. Exits 1 where
there is an error, or where `check` fails.
"""

from __future__ import annotations

import argparse
import runpy
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from . import Memory, Report, TensorMap, launch, module


def _launches(path: Path) -> tuple[list[dict[str, Any]], Any]:
    """The launches that an arguments file describes, and its check."""
    names = runpy.run_path(str(path))
    found = names.get("launches", [names["launch"]] if "launch" in names else None)
    if not found:
        raise SystemExit(f"{path} defines neither `launch` nor `launches`")
    return list(found), names.get("check")


def _entry(ptx: Path, name: str | None) -> str:
    entries = module(ptx).entries
    if name is None and len(entries) == 1:
        return entries[0]
    matching = [e for e in entries if name is not None and (name == e or name in e)]
    if len(matching) != 1:
        raise SystemExit(f"kernel is {name!r}; {ptx} holds {', '.join(entries) or 'none'}")
    return matching[0]


def _shared_memory(launches: Sequence[dict[str, Any]]) -> Memory:
    for given in launches:
        for arg in given["args"]:
            if isinstance(arg, TensorMap) and arg.memory is not None:
                return arg.memory
    return Memory()


def _print_report(report: Report):
    for finding in report.findings:
        times = f" ({finding.count} times)" if finding.count > 1 else ""
        print(f"{finding.severity}{times}: {type(finding).__name__}: {finding}")
    if not report.finished:
        print("the run ended there")
    print(f"instructions          {report.instructions} of warps")
    for opcode, count in report.opcodes.most_common(12):
        print(f"  {opcode:<60} {count}")
    print(f"products              {report.products} ({report.wgmma} wgmma, {report.mma} mma.sync)")
    print(
        f"bytes read            {report.generic_bytes_loaded} by loads, {report.tma_bytes_loaded} in bulk"
    )
    print(
        f"bytes written         {report.generic_bytes_stored} by stores, {report.tma_bytes_stored} in bulk"
    )
    print(f"shared memory         {report.shared_bytes} bytes")
    print(f"lines executed        {len(report.covered_lines)} of {len(report.lines)}")


def run(ptx: Path, arguments: Path, seed: int) -> int:
    """Executes the launches of an arguments file with one seed; the number of errors."""
    launches, check = _launches(arguments)
    memory, errors = _shared_memory(launches), 0
    for given in launches:
        given = dict(given)
        path = Path(given.pop("ptx", ptx))
        entry = _entry(path, given.pop("kernel", None))
        text = path.read_text()
        given.setdefault("grid", 1)
        print(f"== {entry}, grid {given['grid']}, block {given['block']}, seed {seed}")
        report = launch(text, entry, memory=memory, seed=seed, stop_at="nothing", **given)
        _print_report(report)
        errors += sum(f.severity == "error" for f in report.findings)
    if check is not None and not errors:
        try:
            check()
        except AssertionError as error:
            print(f"error: wrong result: {error}")
            return 1
        print("the results are right")
    return errors


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        "python -m tests.emulator", description="Executes a kernel of a PTX file on the CPU."
    )
    parser.add_argument("ptx", type=Path, help="PTX for sm_90a")
    parser.add_argument("arguments", type=Path, help="Python file: `launch` or `launches`, `check`")
    parser.add_argument("--seeds", type=int, default=1, help="schedules: seeds 0, 1, ... (1)")
    options = parser.parse_args(argv)
    errors = sum(run(options.ptx, options.arguments, seed) for seed in range(options.seeds))
    print(f"{errors} errors" if errors else "no errors")
    return 1 if errors else 0


if __name__ == "__main__":
    sys.exit(main())
