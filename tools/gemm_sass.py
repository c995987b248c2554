"""Audits every GEMM kernel's machine code: python -m tools.gemm_sass [FOLDER] > benchmarks/gemm_sass.md

FOLDER holds the cubins; without it, those of the installed jaxfp8. Columns: tools/sass.
Exits with 1 if a kernel breaks a row of REQUIRED: static figures of other kernels of the same tile, and what two
accumulator sets should reach. They do not rank speed: 1d2d m128n128 exposes fewer slots than m256n128, which was
measured 3 to 13 % faster at large K.
"""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path

from tools.sass.model import KernelReport, audit_file
from tools.sass.report import check

EVERY = (
    "spills.k_loop==0",
    "spills.tile_loop==0",
    "commit_groups_per_kblock<=1",
    "promotion_excess_per_kblock<=0",
)

REQUIRED = {
    "gemm_1d2d_m256n128_": ("overhead_per_kblock<=27", "exposed_issue<=79", "util_serial>=0.764"),
    "gemm_1d2d_m128n128_": ("overhead_per_kblock<=37", "exposed_issue<=30", "util_serial>=0.88"),
    "gemm_1d2d_m128n192_": ("overhead_per_kblock<=44", "exposed_issue<=118", "util_serial>=0.766"),
    "gemm_1d2d_m64n64_": ("overhead_per_kblock<=36", "util_serial>=0.68"),
    "gemm_1d1d_m128n128_": ("overhead_per_kblock<=55", "exposed_issue<=30", "util_serial>=0.88"),
}  # fmt: skip
"""By the beginning of a kernel's name, beside EVERY; the 128x128 tiles have two accumulator sets."""


def find_tools() -> str | None:
    """The folder of nvdisasm's wheel; None leaves it to PATH."""
    spec = importlib.util.find_spec("nvidia")
    for location in (spec.submodule_search_locations or []) if spec else []:
        for tool in sorted(Path(location).glob("cu*/bin/nvdisasm")):
            return str(tool.parent)
    return None


def rows_of(name: str) -> list[str]:
    """What a kernel must satisfy."""
    rows = [*EVERY]
    for start, required in REQUIRED.items():
        rows += required if name.startswith(start) else ()
    return rows


def audit(cubin: Path, liveness: bool = True) -> list[KernelReport]:
    return audit_file(cubin, tools_dir=find_tools(), liveness=liveness)


def failures(reports) -> list[str]:
    return [line for r in reports for line in check([r], rows_of(r.name))]


def table(reports) -> str:
    """A row for each kernel of E4M3 operands; E5M2 changes no instruction's number."""
    lines = [
        "Machine code per 128 of the contraction and warp: `python -m tools.gemm_sass`.",
        "Columns: tools/sass. Static figures; nothing here was run.",
        "",
        "| kernel | live registers | spills | instructions | promotion | excess | overhead | exposed "
        "| slack | serial |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for r in sorted(reports, key=lambda r: r.name):
        if not re.search("e4m3_e4m3", r.name):
            continue
        loop = max((x for x in r.loops if x.main), key=lambda x: x.overhead_per_kblock)
        lines.append(
            f"| {r.name} | {loop.live_registers} | {r.spills} | {loop.instructions_per_kblock:g} | "
            f"{loop.promotion_per_kblock:g} | {loop.promotion_excess_per_kblock:g} | {loop.overhead_per_kblock:g} | "
            f"{loop.exposed_issue:g} | {loop.slack_cycles:g} | {100 * loop.util_serial:.1f} % |"
        )
    return "\n".join(lines)


def main() -> int:
    if len(sys.argv) > 1:
        folder = Path(sys.argv[1])
    else:
        from jaxfp8 import _ffi

        folder = _ffi.image_directory()
    reports = [r for cubin in sorted(folder.glob("gemm_*.cubin")) for r in audit(cubin)]
    print(table(reports))
    broken = failures(reports)
    for line in broken:
        print(line, file=sys.stderr)
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
