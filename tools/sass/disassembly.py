"""Cubins, the resources of their kernels, and their instructions."""

from __future__ import annotations

import os
import re
import shutil
import struct
import subprocess
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

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


class AuditError(Exception):
    """The audit cannot be made; the message says why."""


# ---- Tools and containers


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


# ---- Resources


@dataclass
class Resources:
    registers: int = 0  # at launch; setmaxnreg changes it later for each warpgroup
    stack: int = 0  # bytes
    smem_static: int = 0  # bytes, with the 1 KiB that CUDA reserves where it is declared
    barriers: int = 0
    max_threads: int = 0  # launch bound, 0 if none
    code_bytes: int = 0


class _Elf:
    """A cubin's section headers by name, their contents, and its symbols' names by index."""

    def __init__(self, path: Path):
        self._data = data = path.read_bytes()
        try:
            (table,) = struct.unpack_from("<Q", data, 40)
            entry_size, count, names_index = struct.unpack_from("<HHH", data, 58)
            headers = [
                struct.unpack_from("<IIQQQQIIQQ", data, table + i * entry_size)
                for i in range(count)
            ]
            names = self._body(headers[names_index])
            self.sections = {self._text(names, header[0]): header for header in headers}
            strings, symbols = self.body(".strtab"), self.body(".symtab")
            self.symbols = [
                self._text(strings, struct.unpack_from("<I", symbols, at)[0])
                for at in range(0, len(symbols), 24)
            ]
        except (struct.error, KeyError, ValueError, IndexError) as error:
            raise AuditError(f"{path.name}: broken cubin ({error!r})") from error

    def _body(self, header: Sequence[int]) -> bytes:
        return self._data[header[4] : header[4] + header[5]]

    @staticmethod
    def _text(strings: bytes, at: int) -> str:
        return strings[at : strings.index(b"\0", at)].decode()

    def body(self, section: str) -> bytes:
        return self._body(self.sections[section])

    def attributes(self, section: str) -> Iterable[tuple[int, bytes]]:
        """(attribute, payload) entries of a .nv.info section; none where there is no such section."""
        data = self.body(section) if section in self.sections else b""
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
    elf = _Elf(path)
    kernels: dict[str, Resources] = {}
    for name, header in elf.sections.items():
        if name.startswith(".text.") and header[1] == 1:
            # Before CUDA 13 the section flags hold the barrier count and sh_info the register count.
            barriers, registers = (header[2] >> 20) & 0x7F, header[7] >> 24
            kernels[name[6:]] = Resources(
                barriers=barriers, registers=registers, code_bytes=header[5]
            )
    for attribute, payload in elf.attributes(".nv.info"):
        if len(payload) != 8:
            continue
        index, value = struct.unpack("<II", payload)
        resources = kernels.get(elf.symbols[index]) if index < len(elf.symbols) else None
        if resources and attribute == 0x2F:
            resources.registers = value
        elif resources and attribute in (0x11, 0x12):  # frame size, least stack size
            resources.stack = max(resources.stack, value)
    for name, resources in kernels.items():
        if f".nv.shared.{name}" in elf.sections:
            resources.smem_static = elf.sections[f".nv.shared.{name}"][5]
        for attribute, payload in elf.attributes(f".nv.info.{name}"):
            if attribute == 0x4C:
                resources.barriers = max(resources.barriers, payload[0])
            elif attribute in (0x05, 0x10) and len(payload) == 12:  # launch bound, block size
                x, y, z = struct.unpack("<III", payload)
                resources.max_threads = x * y * z
    return kernels


# ---- Instructions


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
