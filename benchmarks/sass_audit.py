#!/usr/bin/env python3
"""Static performance audit of Hopper (sm_90a) wgmma GEMM kernels, from machine code alone.

    sass_audit.py FILE [--kernel REGEX] [--json] [--assert EXPR ...]

FILE is a cubin, fatbin, object file or shared library. For each kernel the report gives its resources, its
instruction mix and, for each innermost loop that issues QGMMA/HGMMA, the instructions spent per k-block and two
modelled upper bounds on tensor-core utilisation. Nothing is run: these are proxies that catch spills, stray
address arithmetic, serialised wgmma and lost overlap; they are no timings and must never be reported as such.

Needs `nvdisasm` (and `cuobjdump` for anything but a bare cubin) on PATH, beside nvcc, in --tools DIR, or in the
pip packages nvidia-cuda-nvdisasm / nvidia-cuda-cuobjdump (site-packages/nvidia/cu13/bin) of this interpreter.
Exit status: 0 fine; 1 an --assert failed; 2 bad usage, unreadable file, no disassembler, no kernel.

How a loop is measured
----------------------
- Loops are natural loops of the control-flow graph (back edges to a dominator), not address ranges: the compiler
  moves the retry code of mbarrier waits out of line, and the branches back from there look like huge loops.
- Hot path: of all paths from the loop header to a back edge, the one with the most MMA instructions, then the
  fewest instructions. A nested loop without MMA (a spin on an mbarrier) counts once: every wait succeeds at first
  try. The rest of the loop is reported as `off_path`. So instruction counts are lower bounds.
- k-block (the unit of all "per k-block" figures) = 128 bytes of K of one 64-row wave of one warpgroup = 4 QGMMA
  m64nNk32 (or 4 HGMMA m64nNk16): MMA instructions / 4. In the DeepGEMM style that is one commit group. A loop
  unrolled 8 times holds 8; a tile of 256 rows over two warpgroups runs 2 waves per 128-deep K step, so twice that.
- Main loops = the loops with most k-blocks per iteration (there may be several, one per specialised variant). The
  others are remainder loops. An assertion on a loop figure must hold in every main loop.
- Ideal promotion per k-block and thread: 64*N/128 FFMA (one for each accumulator register) plus the scale products.
  `block` promotion (a scale for each A row, one for each 128 B columns): 2 FMUL, or 4 if 128 % N != 0, since such
  a tile meets two B scales. `outer` promotion (a scale for each A row and each B column): one product for each
  accumulator, 64*N/128 FMUL. A loop is `outer` if it holds at least N/4 FMUL per k-block, and `no` with an ideal of 0
  if it holds no FFMA, FMUL or FADD (plain GEMM).
- overhead = instructions - MMA - ideal promotion: what a perfect kernel would not issue, barriers and loads included.
- exposed = instructions issued while the warp has no MMA in flight, from the WARPGROUP.DEPBAR that waits for the last
  one to the next MMA, followed around the loop to the steady state. `exposed_issue` counts them, `exposed_stall` adds
  up their encoded stall cycles, both per k-block. `overlapped_promotion` is the share of FFMA/FMUL/FADD issued while
  an MMA of the same warp is in flight (near 0 for kernels that wait at once after each commit).

The model (each term optimistic, so each utilisation is an upper bound)
----------------------------------------------------------------------
All terms are cycles per k-block, W the number of math warpgroups (launch bound / 128 - 1 for one producer warpgroup,
2 without a launch bound, or --math-warpgroups).
  T   tensor cores: 64*N*128 bytes of K / 4096 = 2*N, whatever the data type. From the H100 SXM data sheet: 1979
      TFLOP/s dense FP8 on 132 SMs is 4096 MAC per cycle and SM at 1.83 GHz; 16-bit types have half the rate, and
      half the K in the same bytes.
  S   shared memory: (64 rows of A unless A is in registers, + N rows of B) * 128 B, at 32 banks * 4 B per cycle
      (CUDA programming guide). Fills by TMA and reads by other instructions are not charged.
  I   issue slots. An SM has 4 sub-partitions, each with a scheduler that issues one warp instruction per cycle and 32
      FP32 lanes, so that an FFMA takes one cycle (Hopper architecture white paper). A warpgroup puts one warp on
      each, so W warpgroups share every scheduler. The producer warp is not charged.
  E   exposed: max(exposed_issue, exposed_stall).   H   hidden: the same of the other instructions but the MMA.
  util_overlap = W*T / max(W*T, W*S, W*I, max(T, H) + E): the warpgroups are out of phase, so that one promotes under
      the MMA of the other.
  util_serial = W*T / (max(W*T, W*S, W*(I - exposed_issue), H) + max(W*exposed_issue, E)): the warpgroups are in phase,
      so that promotion hides only under the MMA of its own warp.
  slack_cycles = W*T - (max(T, H) + E): latency outside this model that each k-block of a warpgroup can bear before the
      tensor cores wait even in the overlapped case. With W = 1 it is negative, for there is nothing to overlap with.
Left out: latencies (mbarrier, shared memory, scoreboard waits, of which `exposed_waits` counts the exposed ones; start
and drain of an MMA), memory traffic, tails, epilogue, wave quantisation, instruction-cache misses, and clocks lowered
by power. Real kernels lie between the two bounds or below both.

Encoded scheduling fields (stall cycles, yield hint, wait mask) are undocumented by NVIDIA; their layout is that found
by Jia et al., "Dissecting the NVIDIA Volta GPU Architecture via Microbenchmarking", arXiv 1804.06826, and sm_90 code
still reads sensibly with it. `ffma_yield` is the share of FFMA that hint a switch to another warp (DeepGEMM's authors
saw up to 10% from alternating it; compilers since CUDA 12.3 do so). `ffma_same_bank` counts the FFMA per k-block that
fetch three different registers from one of two banks, even and odd: a lost cycle on Volta, unproven on Hopper.

Assertions
----------
  --assert 'spills==0' 'overhead_per_kblock<=40' 'count.R2UR<100' 'loop.uniform<=25' 'util_serial>=0.7'
NAME OP NUMBER with OP one of == != <= >= < >. Kernel figures: registers, stack, spills (LDL+STL, static),
spills.PLACE (k_loop, tile_loop, producer_loop, elsewhere), smem_static, barriers, code_bytes, mma_outside_loops,
count.OPCODE. Main-loop figures: the fields that --json shows under loops[], and loop.CLASS (instructions of a class per
k-block). Every selected kernel must pass. Kernels without MMA loop are exempt from main-loop figures, but a figure that
no selected kernel has is a failure. Worth asserting in any kernel: spills.k_loop==0, commit_groups_per_kblock<=1 (ptxas
serialises wgmma with no more than a warning), kblocks_per_iteration>=1.
"""

from __future__ import annotations

import argparse
import json
import operator
import os
import re
import shutil
import struct
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

PEAK_FP8_TFLOPS = 1979.0
MMA_K_BYTES = 32  # of one wgmma
KBLOCK_K_BYTES = 128
MMAS_PER_KBLOCK = KBLOCK_K_BYTES // MMA_K_BYTES
SMEM_BYTES_PER_CYCLE = 128
FP8_MACS_PER_CYCLE = 4096  # of an SM
EM_CUDA = 190

GMMA = ("QGMMA", "HGMMA", "IGMMA")
PROMOTION = ("FFMA", "FMUL", "FADD")
CLASSES: dict[str, tuple[str, ...]] = {
    "mma": GMMA,
    "mma_sync": ("HMMA", "IMMA", "DMMA", "QMMA"),
    "warpgroup": ("WARPGROUP", "WARPGROUPSET"),
    "promotion": PROMOTION,
    "mbarrier": ("SYNCS",),
    "tma": (
        "UTMALDG",
        "UTMASTG",
        "UTMAREDG",
        "UTMACCTL",
        "UTMACMDFLUSH",
        "UTMAPF",
        "UBLKCP",
        "UBLKRED",
        "UBLKPF",
    ),
    "lds": ("LDS", "LDSM"),
    "sts": ("STS", "STSM", "ATOMS"),
    "global": ("LD", "ST", "LDG", "STG", "RED", "REDG", "ATOM", "ATOMG", "LDGSTS", "CCTL"),
    "spill": ("LDL", "STL"),
    "const": ("LDC", "ULDC"),
    "r2ur": ("R2UR",),
    "move": ("MOV", "SEL", "FSEL", "PRMT", "CS2R", "S2R", "S2UR", "P2R", "R2P"),
    "convert": ("F2F", "F2FP", "F2I", "I2F", "I2FP", "FRND", "MUFU"),
    "barrier": (
        "BAR",
        "MEMBAR",
        "FENCE",
        "DEPBAR",
        "ERRBAR",
        "CGABAR",
        "UCGABAR_ARV",
        "UCGABAR_WAIT",
        "LEPC",
    ),
    "branch": (
        "BRA",
        "BRX",
        "JMP",
        "JMX",
        "CALL",
        "RET",
        "EXIT",
        "BSSY",
        "BSYNC",
        "BREAK",
        "KILL",
        "BPT",
        "WARPSYNC",
    ),
    "nop": ("NOP", "NANOSLEEP", "YIELD"),
}  # what is left over: `uniform` (opcodes starting with U) and `alu`
CLASS_OF = {opcode: name for name, opcodes in CLASSES.items() for opcode in opcodes}
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


class AuditError(Exception):
    """The audit cannot be made; the message says why."""


# --------------------------------------------------------------------------------------------------------------------
# Tools and containers


def find_tool(name: str, tools_dir: str | None) -> str:
    """Path of an NVIDIA disassembler; AuditError where none is installed."""
    places = [tools_dir] if tools_dir else []
    if not tools_dir:
        places += os.environ.get("PATH", "").split(os.pathsep)
        nvcc = shutil.which("nvcc")
        if nvcc:
            places.append(str(Path(nvcc).resolve().parent))
        places += [
            str(Path(entry or ".") / "nvidia" / cuda / "bin")
            for entry in sys.path
            for cuda in ("cu13", "cu12")
        ]
    found = shutil.which(name, path=os.pathsep.join(places))
    if found:
        return found
    raise AuditError(
        f"{name} not found ({'in ' + tools_dir if tools_dir else 'on PATH, beside nvcc, in site-packages/nvidia'}); "
        f"install the CUDA toolkit or `pip install nvidia-cuda-{name}`"
    )


def run_tool(command: list[str], cwd: str | None = None) -> str:
    result = subprocess.run(
        command, check=False, capture_output=True, text=True, errors="replace", cwd=cwd
    )
    if result.returncode != 0:
        message = (result.stderr or result.stdout).strip().splitlines()
        raise AuditError(
            f"{Path(command[0]).name} failed on {command[-1]}: {message[-1] if message else 'no message'}"
        )
    return result.stdout


def is_cubin(path: Path) -> bool:
    head = path.read_bytes()[:20]
    return (
        len(head) == 20
        and head[:4] == b"\x7fELF"
        and struct.unpack_from("<H", head, 18)[0] == EM_CUDA
    )


def extract_cubins(path: Path, workdir: str, tools_dir: str | None) -> list[Path]:
    """The cubins held by a fatbin, object file, library or executable."""
    cuobjdump = find_tool("cuobjdump", tools_dir)
    run_tool([cuobjdump, "-xelf", "all", str(path.resolve())], cwd=workdir)
    return sorted(found for found in Path(workdir).iterdir() if is_cubin(found))


# --------------------------------------------------------------------------------------------------------------------
# Cubin: resources


@dataclass
class Resources:
    registers: int = 0  # at launch; setmaxnreg changes it later for each warpgroup
    stack: int = 0  # bytes
    smem_static: int = 0  # bytes, with the 1 KiB that CUDA reserves where it is declared
    barriers: int = 0
    max_threads: int = 0  # launch bound, 0 if none
    code_bytes: int = 0


def _attributes(data: bytes) -> Iterable[tuple[int, bytes]]:
    """(attribute, payload) entries of a .nv.info section."""
    at = 0
    while at + 4 <= len(data):
        kind, attribute, value = struct.unpack_from("<BBH", data, at)
        at += 4
        if kind == 4:
            yield attribute, data[at : at + value]
            at += value
        else:
            yield attribute, struct.pack("<H", value)


def read_resources(path: Path) -> dict[str, Resources]:
    """Resources of each kernel of a cubin, from its ELF sections."""
    data = path.read_bytes()
    try:
        (table,) = struct.unpack_from("<Q", data, 40)
        entry_size, count, names_index = struct.unpack_from("<HHH", data, 58)
        headers = [
            struct.unpack_from("<IIQQQQIIQQ", data, table + i * entry_size) for i in range(count)
        ]

        def body(header: Sequence[int]) -> bytes:
            return data[header[4] : header[4] + header[5]]

        def text(strings: bytes, at: int) -> str:
            return strings[at : strings.index(b"\0", at)].decode()

        names = body(headers[names_index])
        sections = {text(names, header[0]): header for header in headers}
        symbol_names = body(sections[".strtab"])
        symbols = body(sections[".symtab"])
        symbol = [
            text(symbol_names, struct.unpack_from("<I", symbols, at)[0])
            for at in range(0, len(symbols), 24)
        ]
    except (struct.error, KeyError, ValueError, IndexError) as error:
        raise AuditError(f"{path.name}: broken cubin ({error!r})") from error

    kernels: dict[str, Resources] = {}
    for name, header in sections.items():
        if name.startswith(".text.") and header[1] == 1:
            # Before CUDA 13 the section flags hold the barrier count and sh_info the register count.
            barriers, registers = (header[2] >> 20) & 0x7F, header[7] >> 24
            kernels[name[6:]] = Resources(
                barriers=barriers, registers=registers, code_bytes=header[5]
            )
    for attribute, payload in (
        _attributes(body(sections[".nv.info"])) if ".nv.info" in sections else ()
    ):
        if len(payload) != 8:
            continue
        index, value = struct.unpack("<II", payload)
        resources = kernels.get(symbol[index]) if index < len(symbol) else None
        if resources and attribute == 0x2F:
            resources.registers = value
        elif resources and attribute in (0x11, 0x12):  # frame size, least stack size
            resources.stack = max(resources.stack, value)
    for name, resources in kernels.items():
        if f".nv.shared.{name}" in sections:
            resources.smem_static = sections[f".nv.shared.{name}"][5]
        info = sections.get(f".nv.info.{name}")
        for attribute, payload in _attributes(body(info)) if info else ():
            if attribute == 0x4C:
                resources.barriers = max(resources.barriers, payload[0])
            elif (
                attribute in (0x05, 0x10) and len(payload) == 12
            ):  # launch bound, required block size
                x, y, z = struct.unpack("<III", payload)
                resources.max_threads = x * y * z
    return kernels


# --------------------------------------------------------------------------------------------------------------------
# Disassembly


@dataclass(slots=True)
class Instruction:
    address: int
    predicate: str
    opcode: str
    operands: str
    stall: int = 0
    yields: bool = False
    wait_mask: int = 0
    reuse: int = 0
    live: int = 0  # live general registers, 0 if unknown
    target: int | None = None

    @property
    def root(self) -> str:
        return self.opcode.split(".", 1)[0]

    @property
    def kind(self) -> str:
        if self.opcode.startswith("IMAD.MOV"):
            return "move"
        return CLASS_OF.get(self.root, "uniform" if self.root.startswith("U") else "alu")

    @property
    def is_mma(self) -> bool:
        return self.root in GMMA


INSTRUCTION = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/\s+(?:@(!?\w+)\s+)?([A-Z][\w.]*)\s*([^;]*);")
SECTION = re.compile(r'^\s*\.section\s+\.text\.([^,\s]+),"ax')
LABEL = re.compile(r"^([.$\w]+):")
TARGET = re.compile(r"`\(([.$\w]+)\)")
ENCODING = re.compile(r"/\* 0x([0-9a-f]{16}) \*/")
LIVE = re.compile(r"//\s*\|\s*(\d*)\s*\|")


def disassemble(nvdisasm: str, path: Path, liveness: bool = True) -> dict[str, list[Instruction]]:
    """Instructions of each function of a cubin, in address order."""
    command = [nvdisasm, "-c", "-hex", str(path)]
    listing = None
    if liveness:
        try:
            listing = run_tool([*command[:3], "-lrm", "count", command[3]])
        except AuditError:  # a luxury that nvdisasm cannot compute for all code
            pass
    if listing is None:
        listing = run_tool(command)

    functions: dict[str, list[Instruction]] = {}
    labels: dict[str, int] = {}  # unique in the file
    waiting: list[str] = []  # labels of the next instruction
    code: list[Instruction] = []
    for line in listing.splitlines():
        if section := SECTION.match(line):
            code = functions.setdefault(section.group(1), [])
            waiting = []
        elif match := INSTRUCTION.match(line):
            address = int(match.group(1), 16)
            labels.update(dict.fromkeys(waiting, address))
            waiting = []
            code.append(
                Instruction(address, match.group(2) or "", match.group(3), match.group(4).strip())
            )
        elif label := LABEL.match(line):
            waiting.append(label.group(1))
        elif code and (word := ENCODING.search(line)):  # second word of the instruction above
            control = int(word.group(1), 16) >> 41
            code[-1].stall = control & 15
            code[-1].yields = not (control >> 4) & 1
            code[-1].wait_mask = (control >> 11) & 63
            code[-1].reuse = (control >> 17) & 15
        live = LIVE.search(line)
        if code and live and live.group(1):
            code[-1].live = max(code[-1].live, int(live.group(1)))

    for instructions in functions.values():
        for instruction in instructions:
            if target := TARGET.search(instruction.operands):
                instruction.target = labels.get(target.group(1))
        while instructions and (
            instructions[-1].root == "NOP" or instructions[-1].target == instructions[-1].address
        ):
            instructions.pop()  # padding: a branch to itself, then NOPs
    return {name: instructions for name, instructions in functions.items() if instructions}


# --------------------------------------------------------------------------------------------------------------------
# Control flow


@dataclass
class Block:
    code: list[Instruction]
    successors: list[int] = field(default_factory=list)
    mmas: int = 0


def build_blocks(code: list[Instruction]) -> list[Block]:
    """Basic blocks in address order; block 0 is the entry."""
    ends = ("BRA", "BRX", "JMP", "JMX", "EXIT", "RET", "KILL", "BSYNC")
    leaders = {code[0].address}
    for index, instruction in enumerate(code):
        if instruction.target is not None:
            leaders.add(instruction.target)
        if instruction.root in ends and index + 1 < len(code):
            leaders.add(code[index + 1].address)

    blocks: list[Block] = []
    for instruction in code:
        if instruction.address in leaders:
            blocks.append(Block([]))
        blocks[-1].code.append(instruction)
        blocks[-1].mmas += instruction.is_mma
    start = {block.code[0].address: index for index, block in enumerate(blocks)}

    joins: dict[str, int | None] = {}  # convergence register -> where its BSYNC goes on
    for index, block in enumerate(blocks):
        for instruction in block.code:
            if instruction.root == "BSSY":
                joins[instruction.operands.split(",")[0]] = instruction.target
        last = block.code[-1]
        falls_through, target = True, None
        if last.root in ("BRA", "JMP"):
            target = last.target
            # Besides a predicate, a uniform predicate operand or .ANY/.DIV/.CONV make a branch conditional.
            falls_through = (
                bool(last.predicate) or "," in last.operands or len(last.opcode.split(".")) > 1
            )
        elif last.root == "BSYNC":
            target = joins.get(last.operands)
            falls_through = target is None
        elif last.root in ends:
            falls_through = bool(last.predicate)
        if target in start:
            block.successors.append(start[target])
        if falls_through and index + 1 < len(blocks):
            block.successors.append(index + 1)
    return blocks


def post_order(blocks: list[Block]) -> list[int]:
    """Reachable blocks in depth-first post-order from the entry."""
    order: list[int] = []
    seen = {0}
    stack = [(0, iter(blocks[0].successors))]
    while stack:
        node, successors = stack[-1]
        for successor in successors:
            if successor not in seen:
                seen.add(successor)
                stack.append((successor, iter(blocks[successor].successors)))
                break
        else:
            order.append(node)
            stack.pop()
    return order


def natural_loops(
    blocks: list[Block],
) -> tuple[dict[int, set[int]], dict[int, set[int]], list[int]]:
    """(header -> body, header -> latches, reverse post-order) of the natural loops."""
    order = post_order(blocks)[::-1]
    predecessors: dict[int, list[int]] = {node: [] for node in order}
    for node in order:
        for successor in blocks[node].successors:
            predecessors[successor].append(node)

    dominators = dict.fromkeys(order, (1 << len(blocks)) - 1)  # bit sets
    dominators[0] = 1
    changed = True
    while changed:
        changed = False
        for node in order[1:]:
            common = -1
            for predecessor in predecessors[node]:
                common &= dominators[predecessor]
            common |= 1 << node
            if common != dominators[node]:
                dominators[node] = common
                changed = True

    bodies: dict[int, set[int]] = {}
    latches: dict[int, set[int]] = {}
    for node in order:
        for header in blocks[node].successors:
            if dominators[node] >> header & 1:
                latches.setdefault(header, set()).add(node)
                body = bodies.setdefault(header, {header})
                todo = [node]
                while todo:
                    inner = todo.pop()
                    if inner not in body:
                        body.add(inner)
                        todo += predecessors[inner]
    return bodies, latches, order


def hot_path(
    blocks: list[Block], header: int, body: set[int], latches: set[int], order: list[int]
) -> list[int]:
    """Blocks of the path from header to latch with the most MMA and then the fewest instructions."""
    position = {node: index for index, node in enumerate(order)}
    best: dict[int, tuple[int, int]] = {header: (blocks[header].mmas, -len(blocks[header].code))}
    came_from: dict[int, int] = {}
    for node in (node for node in order if node in body):
        if node not in best:
            continue
        for successor in blocks[node].successors:
            if successor not in body or position[successor] <= position[node]:
                continue
            score = (
                best[node][0] + blocks[successor].mmas,
                best[node][1] - len(blocks[successor].code),
            )
            if successor not in best or score > best[successor]:
                best[successor] = score
                came_from[successor] = node
    path = [max(latches, key=lambda node: best.get(node, (-1, 0)))]
    while path[-1] != header:
        path.append(came_from[path[-1]])
    return path[::-1]


# --------------------------------------------------------------------------------------------------------------------
# The consumer loop


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


def audit_loop(path: list[Instruction], off_path: int, warpgroups: int) -> LoopReport:
    mmas = [instruction for instruction in path if instruction.is_mma]
    kblocks = len(mmas) / MMAS_PER_KBLOCK
    shapes = Counter(".".join(mma.opcode.split(".")[:2]) for mma in mmas)
    sizes = [tuple(map(int, re.findall(r"\d+", mma.opcode.split(".")[1]))) for mma in mmas]
    n = max(size[1] for size in sizes)

    def per_kblock(count: float) -> float:
        return round(count / kblocks, 2)

    roots = Counter(instruction.root for instruction in path)
    classes = Counter(instruction.kind for instruction in path)
    accumulators = sum(size[0] * size[1] // 128 for size in sizes) / MMAS_PER_KBLOCK
    promotion = sum(roots[root] for root in PROMOTION)
    if not promotion:
        kind, ideal = "no", 0.0
    elif roots["FMUL"] >= accumulators / 2:
        kind, ideal = "outer", accumulators * 2
    else:
        kind, ideal = "block", accumulators + kblocks * (2 if 128 % n == 0 else 4)

    flags = exposed(path)
    alone = [instruction for instruction, flag in zip(path, flags, strict=True) if flag]
    hidden = sum(
        not flag and instruction.root in PROMOTION
        for instruction, flag in zip(path, flags, strict=True)
    )
    ffma = [instruction for instruction in path if instruction.root == "FFMA"]

    tensor = sum(size[0] * size[1] for size in sizes) * MMA_K_BYTES / FP8_MACS_PER_CYCLE
    smem = sum(
        (size[0] * ("gdesc" in mma.operands.split(",")[1]) + size[1])
        * MMA_K_BYTES
        / SMEM_BYTES_PER_CYCLE
        for size, mma in zip(sizes, mmas, strict=True)
    )
    exposed_issue, exposed_stall = len(alone), sum(instruction.stall for instruction in alone)
    gap = max(exposed_issue, exposed_stall)
    covered = [instruction for instruction in path if not instruction.is_mma]
    hidden_stall = sum(instruction.stall for instruction in covered) - exposed_stall
    shadow = max(len(covered) - exposed_issue, hidden_stall)
    busy = warpgroups * tensor
    chain = max(tensor, shadow) + gap
    under_mma = max(busy, warpgroups * smem, warpgroups * (len(path) - exposed_issue), shadow)
    return LoopReport(
        first_address=path[0].address,
        last_address=path[-1].address,
        mma_shape=" + ".join(shapes),
        n=n,
        promotion_kind=kind,
        main=False,
        kblocks_per_iteration=kblocks,
        waits_per_iteration=sum(
            instruction.opcode.startswith("SYNCS.PHASECHK") for instruction in path
        ),
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
        exposed_issue=per_kblock(exposed_issue),
        exposed_stall=per_kblock(exposed_stall),
        exposed_waits=per_kblock(sum(instruction.wait_mask != 0 for instruction in alone)),
        overlapped_promotion=round(hidden / promotion, 3) if promotion else 0.0,
        ffma_yield=round(sum(instruction.yields for instruction in ffma) / len(ffma), 3)
        if ffma
        else 0.0,
        ffma_same_bank=per_kblock(bank_conflicts(path)),
        tensor_cycles=per_kblock(tensor),
        smem_cycles=per_kblock(smem),
        util_overlap=round(busy / max(busy, warpgroups * smem, warpgroups * len(path), chain), 4),
        util_serial=round(busy / (under_mma + max(warpgroups * exposed_issue, gap)), 4),
        slack_cycles=per_kblock(busy - chain),
    )


@dataclass
class KernelReport:
    name: str
    mangled: str
    cubin: str
    resources: Resources
    instructions: int
    spills: int
    spill_places: dict[
        str, int
    ]  # LDL+STL in k_loop, tile_loop (around it), producer_loop (issues TMA loads), elsewhere
    counts: dict[str, int]  # by opcode without modifiers
    math_warpgroups: int
    mma_outside_loops: int
    loops: list[LoopReport]


def readable(mangled: str) -> str:
    """Nested name and integer template arguments of an Itanium-mangled symbol, else the symbol."""
    if not mangled.startswith("_Z"):
        return mangled
    at, parts = 3 if mangled.startswith("_ZN") else 2, []
    while length := re.match(r"\d+", mangled[at:]):
        begin = at + length.end()
        at = begin + int(length.group())
        parts.append(mangled[begin:at])
    if not parts:
        return mangled
    arguments = (
        re.findall(r"L(?:[a-z]|N\w+?E)(n?\d+)E", mangled[at:])
        if mangled[at : at + 1] == "I"
        else []
    )
    return "::".join(parts) + (f"<{','.join(arguments)}>" if arguments else "")


def audit_kernel(
    mangled: str, code: list[Instruction], resources: Resources, cubin: str, warpgroups: int | None
) -> KernelReport:
    if warpgroups is None:
        warpgroups = max(1, resources.max_threads // 128 - 1) if resources.max_threads else 2
    blocks = build_blocks(code)
    bodies, latches, order = natural_loops(blocks)
    with_mma = {
        header: body for header, body in bodies.items() if any(blocks[node].mmas for node in body)
    }
    loops = []
    in_loops: set[int] = set()
    for header, body in sorted(with_mma.items()):
        if any(other != header and other in body for other in with_mma):
            continue  # not innermost
        nodes = hot_path(blocks, header, body, latches[header], order)
        path = [instruction for node in nodes for instruction in blocks[node].code]
        in_loops.update(body)
        if any(instruction.is_mma for instruction in path):
            total = sum(len(blocks[node].code) for node in body)
            loops.append(audit_loop(path, total - len(path), warpgroups))
    for loop in loops:
        loop.main = loop.kblocks_per_iteration == max(
            other.kblocks_per_iteration for other in loops
        )
    counts = Counter(instruction.root for instruction in code)
    places = {
        "k_loop": in_loops,
        "tile_loop": set().union(*with_mma.values()),
        "producer_loop": {
            node
            for body in bodies.values()
            if any(
                instruction.root == "UTMALDG"
                for inner in body
                for instruction in blocks[inner].code
            )
            for node in body
        },
        "elsewhere": set(range(len(blocks))),
    }
    spills: Counter[str] = Counter()
    for index, block in enumerate(blocks):
        place = next(name for name, nodes in places.items() if index in nodes)
        spills[place] += sum(instruction.kind == "spill" for instruction in block.code)
    return KernelReport(
        name=readable(mangled),
        mangled=mangled,
        cubin=cubin,
        resources=resources,
        instructions=len(code),
        spills=sum(spills.values()),
        spill_places={place: spills[place] for place in places},
        counts=dict(sorted(counts.items())),
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


# --------------------------------------------------------------------------------------------------------------------
# Assertions


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


# --------------------------------------------------------------------------------------------------------------------
# Text report


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
    description, _, details = (__doc__ or "").partition("\n")
    parser = argparse.ArgumentParser(
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
        print(f"sass_audit: {error}", file=sys.stderr)
        return 2
    if options.json:
        print(json.dumps([asdict(report) for report in reports], indent=1))
    else:
        print("\n\n".join(map(render, reports)))
    for failure in failures:
        print(f"sass_audit: assertion failed: {failure}", file=sys.stderr)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
