"""Assertions on an audit's figures, its text, and the command line."""

from __future__ import annotations

import argparse
import json
import operator
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from pathlib import Path

import tools.sass
from tools.sass.disassembly import CLASS_OF, CLASSES, AuditError
from tools.sass.model import KernelReport, LoopReport, audit_file

PEAK_FP8_TFLOPS = 1979.0
# fmt: off
SHOWN_COUNTS = (
    "QGMMA", "HGMMA", "WARPGROUP", "UTMALDG", "UTMASTG", "UTMAREDG", "SYNCS", "FFMA", "FMUL", "FADD", "MOV", "SEL",
    "FSEL", "PRMT", "LDS", "STS", "STSM", "LDG", "STG", "LDL", "STL", "LDC", "ULDC", "R2UR", "BRA", "BAR", "WARPSYNC",
    "SHFL", "NOP", "USETMAXREG",
)
# fmt: on
OPERATORS: dict[str, Callable[[float, float], bool]] = {
    "==": lambda a, b: abs(a - b) < 1e-9,
    "!=": lambda a, b: abs(a - b) >= 1e-9,
    "<=": operator.le,
    ">=": operator.ge,
    "<": operator.lt,
    ">": operator.gt,
}


def figure(report: KernelReport, name: str) -> list[float] | None:
    """Values that an assertion on `name` must hold for; empty if the kernel has no main loop; None if unknown."""
    resources = asdict(report.resources)
    if name.startswith("count."):
        opcode = name[6:].upper()
        return (
            [report.counts.get(opcode, 0)]
            if opcode in CLASS_OF or opcode in report.counts
            else None
        )
    if name.startswith("spills."):
        return [report.spill_places[name[7:]]] if name[7:] in report.spill_places else None
    if name in ("spills", "mma_outside_loops", "instructions", "math_warpgroups"):
        return [getattr(report, name)]
    if name in resources:
        return [resources[name]]
    main = [loop for loop in report.loops if loop.main]
    if name.startswith("loop."):
        known = set(CLASSES) | {"uniform", "alu"}
        return (
            [loop.class_per_kblock.get(name[5:], 0.0) for loop in main]
            if name[5:] in known
            else None
        )
    kinds = {
        key: kind for key, kind in LoopReport.__annotations__.items() if kind in ("int", "float")
    }
    return [getattr(loop, name) for loop in main] if name in kinds else None


def check(reports: list[KernelReport], expressions: Iterable[str]) -> list[str]:
    """One line for each failed assertion."""
    failures = []
    for expression in expressions:
        match = re.fullmatch(r"\s*([\w.]+)\s*(==|!=|<=|>=|<|>)\s*(-?\d+(?:\.\d+)?)\s*", expression)
        if not match:
            raise AuditError(
                f"--assert {expression!r}: expected NAME OP NUMBER, such as 'spills==0'"
            )
        name, comparison, bound = match.group(1), OPERATORS[match.group(2)], float(match.group(3))
        tested = False
        for report in reports:
            values = figure(report, name)
            if values is None:
                raise AuditError(f"--assert {expression!r}: unknown figure {name!r} (see --help)")
            tested = tested or bool(values)
            failed = [value for value in values if not comparison(value, bound)]
            failures += [f"{expression}: {name} is {value:g} in {report.name}" for value in failed]
        if not tested:
            failures.append(f"{expression}: no selected kernel has a main loop with QGMMA or HGMMA")
    return failures


def table(pairs: Iterable[tuple[str, float]]) -> str:
    return "  ".join(f"{name} {value:g}" for name, value in pairs)


def render_loop(loop: LoopReport, warpgroups: int) -> list[str]:
    fp8 = loop.mma_shape.startswith("QGMMA")
    overlap, serial = (
        f"{100 * util:.1f}%" + (f" ({util * PEAK_FP8_TFLOPS:.0f} TFLOP/s)" if fp8 else "")
        for util in (loop.util_overlap, loop.util_serial)
    )
    notes = []
    if loop.commit_groups_per_kblock > 1:
        notes.append(
            "more than one commit group per k-block: wgmma serialised by the compiler, or N split"
        )
    if loop.kblocks_per_iteration % 1:
        notes.append("the number of MMA is no multiple of 4: the k-block is a notional unit here")
    if loop.stores_in_loop:
        notes.append("the loop holds stores: an epilogue is counted in (K loop fully unrolled?)")
    if loop.spills:
        notes.append(f"{loop.spills} LDL/STL on the hot path of an iteration")
    return [
        f"  {'main' if loop.main else 'remainder'} loop {loop.first_address:#x}..{loop.last_address:#x}: "
        f"{loop.mma_shape}, {loop.kblocks_per_iteration:g} k-blocks and {loop.waits_per_iteration} mbarrier waits per "
        f"iteration, {loop.promotion_kind} scales, {loop.code_bytes} B hot + {loop.off_path} instructions off path, "
        f"{loop.live_registers or '?'} live registers",
        f"    per k-block and warp: {loop.instructions_per_kblock:g} instructions = "
        + table(loop.class_per_kblock.items()),
        f"    promotion {loop.promotion_per_kblock:g} (FFMA {loop.ffma_per_kblock:g}, FMUL {loop.fmul_per_kblock:g}), "
        f"ideal {loop.ideal_promotion_per_kblock:g}, excess {loop.promotion_excess_per_kblock:g}; "
        f"overhead {loop.overhead_per_kblock:g}",
        f"    exposed {loop.exposed_issue:g} issue slots, {loop.exposed_stall:g} encoded stall cycles, "
        f"{loop.exposed_waits:g} scoreboard waits; promotion under own MMA {100 * loop.overlapped_promotion:.0f}%; "
        f"FFMA with yield hint {100 * loop.ffma_yield:.0f}%, in one bank {loop.ffma_same_bank:g}",
        f"    model, {warpgroups} math warpgroup(s): tensor {loop.tensor_cycles:g}, smem {loop.smem_cycles:g} cycles; "
        f"utilisation <= {overlap} overlapped (slack {loop.slack_cycles:g} cycles), <= {serial} serial",
        *(f"    note: {note}" for note in notes),
    ]


def render(report: KernelReport) -> str:
    resources = report.resources
    other = sum(report.counts.values()) - sum(report.counts.get(name, 0) for name in SHOWN_COUNTS)
    lines = [
        f"{report.name}  [{report.cubin}]",
        f"  registers {resources.registers}  stack {resources.stack} B  LDL {report.counts.get('LDL', 0)}  "
        f"STL {report.counts.get('STL', 0)}  static smem {resources.smem_static} B  barriers {resources.barriers}  "
        f"launch bound {resources.max_threads or 'none'}  code {resources.code_bytes} B",
        f"  {report.instructions} instructions: "
        + table((name, report.counts[name]) for name in SHOWN_COUNTS if name in report.counts)
        + f"  other {other}",
    ]
    if report.spills:
        lines.append(
            "  LDL+STL in "
            + table((place, count) for place, count in report.spill_places.items() if count)
        )
    if not report.loops:
        lines.append(
            f"  no loop with QGMMA or HGMMA ({report.mma_outside_loops} MMA in straight code)"
        )
    elif report.mma_outside_loops:
        lines.append(
            f"  {report.mma_outside_loops} MMA outside the loops below (peeled iterations)"
        )
    for loop in report.loops:
        lines += render_loop(loop, report.math_warpgroups)
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    description, _, details = (tools.sass.__doc__ or "").partition("\n")
    parser = argparse.ArgumentParser(
        prog="python -m tools.sass",
        description=description,
        epilog=details,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("file", type=Path, help="cubin, fatbin, object file or shared library")
    parser.add_argument(
        "--kernel",
        metavar="REGEX",
        help="audit only kernels whose (mangled or readable) name matches",
    )
    parser.add_argument("--json", action="store_true", help="print the reports as a JSON list")
    parser.add_argument(
        "--assert", dest="expressions", metavar="EXPR", nargs="+", action="extend", default=[]
    )
    parser.add_argument(
        "--math-warpgroups", type=int, metavar="N", help="instead of launch bound / 128 - 1"
    )
    parser.add_argument("--tools", metavar="DIR", help="folder of nvdisasm and cuobjdump")
    options = parser.parse_args(arguments)
    try:
        if options.kernel:
            re.compile(options.kernel)
        if options.math_warpgroups is not None and options.math_warpgroups < 1:
            raise AuditError(f"--math-warpgroups must be at least 1, not {options.math_warpgroups}")
        reports = audit_file(options.file, options.kernel, options.tools, options.math_warpgroups)
        failures = check(reports, options.expressions)
    except (AuditError, re.error, OSError) as error:
        print(f"sass: {error}", file=sys.stderr)
        return 2
    if options.json:
        print(json.dumps([asdict(report) for report in reports], indent=1))
    else:
        print("\n\n".join(map(render, reports)))
    for failure in failures:
        print(f"sass: assertion failed: {failure}", file=sys.stderr)
    return 1 if failures else 0
