"""What a kernel's loops spend a k-block, and the model's bounds on utilisation."""

from __future__ import annotations

import re
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from tools.sass.disassembly import (
    PROMOTION,
    AuditError,
    Instruction,
    Resources,
    disassemble,
    extract_cubins,
    find_tool,
    is_cubin,
    read_resources,
    readable,
)
from tools.sass.loops import Block, build_blocks, hot_path, natural_loops

MMA_K_BYTES = 32  # of one wgmma
KBLOCK_K_BYTES = 128
MMAS_PER_KBLOCK = KBLOCK_K_BYTES // MMA_K_BYTES
SMEM_BYTES_PER_CYCLE = 128
FP8_MACS_PER_CYCLE = 4096  # of an SM


@dataclass
class LoopReport:
    first_address: int
    last_address: int
    mma_shape: str
    n: int
    promotion_kind: str  # block, outer or no
    main: bool
    kblocks_per_iteration: float
    waits_per_iteration: int  # mbarrier waits on the hot path
    commit_groups_per_kblock: float
    code_bytes: int  # of the hot path
    off_path: int  # instructions of the loop beside the hot path
    stores_in_loop: int  # TMA, shared and global stores: an epilogue inside the loop
    spills: int  # LDL+STL on the hot path, per iteration
    live_registers: int  # at most, on the hot path
    instructions_per_kblock: float
    class_per_kblock: dict[str, float]
    ffma_per_kblock: float
    fmul_per_kblock: float
    promotion_per_kblock: float
    ideal_promotion_per_kblock: float
    promotion_excess_per_kblock: float
    overhead_per_kblock: float
    exposed_issue: float
    exposed_stall: float
    exposed_waits: float
    overlapped_promotion: float
    ffma_yield: float
    ffma_same_bank: float
    tensor_cycles: float
    smem_cycles: float
    util_overlap: float
    util_serial: float
    slack_cycles: float


def bank_conflicts(path: list[Instruction]) -> int:
    """FFMA that fetch three different registers of the same parity; reused operands need no fetch."""
    conflicts = 0
    kept: list[str] = []  # source operands of the instruction before
    for instruction in path:
        sources = [part.strip(" -|") for part in instruction.operands.split(",")[1:]]
        if instruction.root == "FFMA":
            cached = [source.endswith(".reuse") for source in kept] + [False] * 3
            fetched = {
                int(register.group(1))
                for slot, source in enumerate(sources)
                if (register := re.match(r"R(\d+)", source))
                and not (cached[slot] and kept[slot].split(".")[0] == source.split(".")[0])
            }
            conflicts += len(fetched) == 3 and len({register % 2 for register in fetched}) == 1
        kept = sources
    return conflicts


def exposed(path: list[Instruction]) -> list[bool]:
    """For each instruction of the hot path, whether it issues with no MMA in flight in the steady state."""
    flags = [True] * len(path)
    groups, open_group = 0, False
    for _ in range(2):
        for index, instruction in enumerate(path):
            flags[index] = groups == 0 and not open_group and not instruction.is_mma
            if instruction.is_mma:
                open_group = True
                if "gsb0" in instruction.operands:
                    groups, open_group = groups + 1, False
            elif instruction.opcode.startswith("WARPGROUP.DEPBAR"):
                groups = min(groups, int(instruction.operands.rsplit(",", 1)[-1].strip(), 0))
    return flags


def _ideal_promotion(
    roots: Counter[str], accumulators: float, n: int, kblocks: float
) -> tuple[str, float]:
    """The kind of a loop's promotion, and the fewest instructions that it takes."""
    if not sum(roots[root] for root in PROMOTION):
        return "no", 0.0
    if roots["FMUL"] >= accumulators / 2:
        return "outer", accumulators * 2
    return "block", accumulators + kblocks * (2 if 128 % n == 0 else 4)


def _shape(mma: Instruction) -> tuple[int, ...]:
    return tuple(map(int, re.findall(r"\d+", mma.opcode.split(".")[1])))


def _share(count: int, total: int) -> float:
    return round(count / total, 3) if total else 0.0


class _Model(NamedTuple):
    """Cycles of an iteration, and what bounds the tensor cores' utilisation in it."""

    tensor: float
    smem: float
    exposed_issue: int
    exposed_stall: int
    util_overlap: float
    util_serial: float
    slack: float


def _model(path: list[Instruction], flags: list[bool], warpgroups: int) -> _Model:
    mmas = [instruction for instruction in path if instruction.is_mma]
    sizes = [_shape(mma) for mma in mmas]
    tensor = sum(size[0] * size[1] for size in sizes) * MMA_K_BYTES / FP8_MACS_PER_CYCLE
    smem = sum(
        (size[0] * ("gdesc" in mma.operands.split(",")[1]) + size[1])
        * MMA_K_BYTES
        / SMEM_BYTES_PER_CYCLE
        for size, mma in zip(sizes, mmas, strict=True)
    )
    alone = [instruction for instruction, flag in zip(path, flags, strict=True) if flag]
    exposed_issue, exposed_stall = len(alone), sum(instruction.stall for instruction in alone)
    gap = max(exposed_issue, exposed_stall)
    covered = [instruction for instruction in path if not instruction.is_mma]
    hidden_stall = sum(instruction.stall for instruction in covered) - exposed_stall
    shadow = max(len(covered) - exposed_issue, hidden_stall)
    busy = warpgroups * tensor
    chain = max(tensor, shadow) + gap
    under_mma = max(busy, warpgroups * smem, warpgroups * (len(path) - exposed_issue), shadow)
    return _Model(
        tensor,
        smem,
        exposed_issue,
        exposed_stall,
        util_overlap=round(busy / max(busy, warpgroups * smem, warpgroups * len(path), chain), 4),
        util_serial=round(busy / (under_mma + max(warpgroups * exposed_issue, gap)), 4),
        slack=busy - chain,
    )


def audit_loop(path: list[Instruction], off_path: int, warpgroups: int) -> LoopReport:
    """The figures of a loop whose hot path is given."""
    mmas = [instruction for instruction in path if instruction.is_mma]
    kblocks = len(mmas) / MMAS_PER_KBLOCK
    sizes = [_shape(mma) for mma in mmas]
    n = max(size[1] for size in sizes)

    def per_kblock(count: float) -> float:
        return round(count / kblocks, 2)

    roots = Counter(instruction.root for instruction in path)
    classes = Counter(instruction.kind for instruction in path)
    accumulators = sum(size[0] * size[1] // 128 for size in sizes) / MMAS_PER_KBLOCK
    promotion = sum(roots[root] for root in PROMOTION)
    kind, ideal = _ideal_promotion(roots, accumulators, n, kblocks)
    flags = exposed(path)
    marked = list(zip(path, flags, strict=True))
    model = _model(path, flags, warpgroups)
    return LoopReport(
        first_address=path[0].address,
        last_address=path[-1].address,
        mma_shape=" + ".join(Counter(".".join(mma.opcode.split(".")[:2]) for mma in mmas)),
        n=n,
        promotion_kind=kind,
        main=False,
        kblocks_per_iteration=kblocks,
        waits_per_iteration=sum(i.opcode.startswith("SYNCS.PHASECHK") for i in path),
        commit_groups_per_kblock=per_kblock(sum("gsb0" in mma.operands for mma in mmas)),
        code_bytes=16 * len(path),
        off_path=off_path,
        stores_in_loop=classes["sts"] + sum(roots[root] for root in ("UTMASTG", "UTMAREDG", "STG")),
        spills=classes["spill"],
        live_registers=max(instruction.live for instruction in path),
        instructions_per_kblock=per_kblock(len(path)),
        class_per_kblock={name: per_kblock(count) for name, count in classes.most_common()},
        ffma_per_kblock=per_kblock(roots["FFMA"]),
        fmul_per_kblock=per_kblock(roots["FMUL"]),
        promotion_per_kblock=per_kblock(promotion),
        ideal_promotion_per_kblock=per_kblock(ideal),
        promotion_excess_per_kblock=per_kblock(promotion - ideal),
        overhead_per_kblock=per_kblock(len(path) - len(mmas) - ideal),
        exposed_issue=per_kblock(model.exposed_issue),
        exposed_stall=per_kblock(model.exposed_stall),
        exposed_waits=per_kblock(sum(i.wait_mask != 0 for i, flag in marked if flag)),
        overlapped_promotion=_share(
            sum(not flag and i.root in PROMOTION for i, flag in marked), promotion
        ),
        ffma_yield=_share(sum(i.yields for i in path if i.root == "FFMA"), roots["FFMA"]),
        ffma_same_bank=per_kblock(bank_conflicts(path)),
        tensor_cycles=per_kblock(model.tensor),
        smem_cycles=per_kblock(model.smem),
        util_overlap=model.util_overlap,
        util_serial=model.util_serial,
        slack_cycles=per_kblock(model.slack),
    )


@dataclass
class KernelReport:
    name: str
    mangled: str
    cubin: str
    resources: Resources
    instructions: int
    spills: int
    # LDL+STL in k_loop, tile_loop (around it), producer_loop (issues TMA loads), elsewhere
    spill_places: dict[str, int]
    counts: dict[str, int]  # by opcode without modifiers
    math_warpgroups: int
    mma_outside_loops: int
    loops: list[LoopReport]


def _audit_loops(
    blocks: list[Block],
    bodies: dict[int, set[int]],
    latches: dict[int, set[int]],
    order: list[int],
    warpgroups: int,
) -> tuple[list[LoopReport], set[int]]:
    """Reports of the innermost loops with MMA, and the blocks of these loops; `bodies` are those with MMA."""
    loops = []
    in_loops: set[int] = set()
    for header, body in sorted(bodies.items()):
        if any(other != header and other in body for other in bodies):
            continue  # not innermost
        nodes = hot_path(blocks, header, body, latches[header], order)
        path = [instruction for node in nodes for instruction in blocks[node].code]
        in_loops.update(body)
        if any(instruction.is_mma for instruction in path):
            total = sum(len(blocks[node].code) for node in body)
            loops.append(audit_loop(path, total - len(path), warpgroups))
    most = max((loop.kblocks_per_iteration for loop in loops), default=0)
    for loop in loops:
        loop.main = loop.kblocks_per_iteration == most
    return loops, in_loops


def _count_spills(blocks: list[Block], places: dict[str, set[int]]) -> dict[str, int]:
    """LDL and STL by place; a block counts in the first place that holds it."""
    spills: Counter[str] = Counter()
    for index, block in enumerate(blocks):
        place = next(name for name, nodes in places.items() if index in nodes)
        spills[place] += sum(instruction.kind == "spill" for instruction in block.code)
    return {place: spills[place] for place in places}


def audit_kernel(
    mangled: str, code: list[Instruction], resources: Resources, cubin: str, warpgroups: int | None
) -> KernelReport:
    """The figures of a kernel; `warpgroups` do math, as many as its launch bound says by default."""
    if warpgroups is None:
        warpgroups = max(1, resources.max_threads // 128 - 1) if resources.max_threads else 2
    blocks = build_blocks(code)
    bodies, latches, order = natural_loops(blocks)
    with_mma = {
        header: body for header, body in bodies.items() if any(blocks[node].mmas for node in body)
    }
    loads = {i for i, block in enumerate(blocks) if any(x.root == "UTMALDG" for x in block.code)}
    loops, in_loops = _audit_loops(blocks, with_mma, latches, order, warpgroups)
    spill_places = _count_spills(
        blocks,
        {
            "k_loop": in_loops,
            "tile_loop": set().union(*with_mma.values()),
            "producer_loop": set().union(*(body for body in bodies.values() if body & loads)),
            "elsewhere": set(range(len(blocks))),
        },
    )
    return KernelReport(
        name=readable(mangled),
        mangled=mangled,
        cubin=cubin,
        resources=resources,
        instructions=len(code),
        spills=sum(spill_places.values()),
        spill_places=spill_places,
        counts=dict(sorted(Counter(instruction.root for instruction in code).items())),
        math_warpgroups=warpgroups,
        mma_outside_loops=sum(
            block.mmas for index, block in enumerate(blocks) if index not in in_loops
        ),
        loops=loops,
    )


def audit_file(
    path: Path,
    pattern: str | None = None,
    tools_dir: str | None = None,
    warpgroups: int | None = None,
    liveness: bool = True,
) -> list[KernelReport]:
    """Reports of the kernels of a file whose mangled or readable name matches the pattern.

    Without liveness, which takes most of the time, no figure counts live registers.
    """
    if not path.is_file():
        raise AuditError(f"{path}: no such file")
    nvdisasm = find_tool("nvdisasm", tools_dir)
    reports: list[KernelReport] = []
    names: list[str] = []
    with tempfile.TemporaryDirectory() as workdir:
        cubins = [path] if is_cubin(path) else extract_cubins(path, workdir, tools_dir)
        for cubin in cubins:
            resources = read_resources(cubin)
            for mangled, code in disassemble(nvdisasm, cubin, liveness).items():
                names.append(readable(mangled))
                if (
                    pattern
                    and not re.search(pattern, mangled)
                    and not re.search(pattern, names[-1])
                ):
                    continue
                found = resources.get(mangled, Resources())
                reports.append(audit_kernel(mangled, code, found, cubin.name, warpgroups))
    if not names:
        raise AuditError(f"{path}: no kernel found (no device code for a real architecture in it)")
    if not reports:
        raise AuditError(
            f"{path}: no kernel matches {pattern!r}; it holds: {', '.join(sorted(set(names)))}"
        )
    return reports
