"""A kernel as a graph of executable nodes.

Registers live in four arrays per CTA, one row a register and one column a thread: predicates
(bool), 16, 32 and 64 bits. PTX registers are untyped storage, so every interpretation that the
program uses (u32, s32, f32, the low half, one part of a vector, ...) is a NumPy view of the row.
Each pair (register, interpretation) is a *slot*; a unit of execution (a warp, or four warps in
step) holds the list `V` of its views, and generated code indexes it: `add(V[3], V[4], V[5])`.

A node is straight-line code, a branch, an exit, or one instruction with machine-wide effects
(barriers, asynchronous copies, wgmma, ...). Straight-line nodes become Python functions, compiled
at their first execution, in a variant for all lanes and one for a mask of lanes.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from . import alu
from .errors import EmulatorError, PtxSyntaxError, UnknownInstruction
from .order import Semantics
from .parser import Instruction, Kernel, Variable

# Windows of generic addresses, above what any host pointer can reach (47 bits).
SHARED_WINDOW = 1 << 56
LOCAL_WINDOW = 2 << 56
PARAM_WINDOW = 3 << 56
WINDOW_SHIFT = 56

# A shared::cluster address is (rank of the CTA) << 24 | offset.
RANK_SHIFT = 24
OFFSET_MASK = (1 << RANK_SHIFT) - 1

DTYPES: dict[str, Any] = {
    "pred": np.bool_,
    "u8": np.uint8, "s8": np.int8, "b8": np.uint8,
    "u16": np.uint16, "s16": np.int16, "b16": np.uint16, "f16": np.uint16, "bf16": np.uint16,
    "u32": np.uint32, "s32": np.int32, "b32": np.uint32, "f32": np.float32,
    "f16x2": np.uint32, "bf16x2": np.uint32,
    "u64": np.uint64, "s64": np.int64, "b64": np.uint64, "f64": np.float64,
}  # fmt: skip
BYTES = {name: np.dtype(dtype).itemsize for name, dtype in DTYPES.items()}
UNSIGNED: dict[int, Any] = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}
FILES = {"P": np.bool_, "H": np.uint16, "W": np.uint32, "D": np.uint64}


def register_file(kind: str) -> str:
    """Which of the four register arrays holds registers of a type."""
    if kind == "pred":
        return "P"
    if kind not in BYTES:
        raise UnknownInstruction(f"registers of type .{kind}")
    return {1: "H", 2: "H", 4: "W", 8: "D"}[BYTES[kind]]


class Registers:
    """The registers of a CTA, and the views of them that its units use.

    Making the views of a large kernel takes milliseconds, so that CTAs and launches reuse them.
    """

    def __init__(self, program: Program, threads: int):
        self.program, self.threads = program, threads
        self.files = {
            name: np.empty((program.counts[name] + 1, threads), dtype)
            for name, dtype in FILES.items()
        }
        self._views: dict[tuple[int, int], list[np.ndarray]] = {}
        self._fixed: dict[int, np.ndarray] = {}  # slots of special registers and of symbols

    def reset(self, cta):
        """Fills the registers for a new CTA."""
        for file in self.files.values():
            file[...] = cta.cluster.policy.register_fill(file.dtype)
        for slot, (name, view) in enumerate(self.program.slot_list):
            if name.startswith("%symbol:"):
                symbol = name[8:]
                value: Any = cta.symbols[symbol]
                if self.program.variables[symbol].space == "shared":
                    value |= cta.rank << RANK_SHIFT
            elif name.startswith("%special:"):
                value = cta.special_register(name[9:])
            else:
                continue
            if slot not in self._fixed:
                self._fixed[slot] = np.empty(self.threads, DTYPES[view])
            self._fixed[slot][...] = value

    def views(self, low: int, high: int) -> list[np.ndarray]:
        """The slots of threads [low, high)."""
        key = (low, high)
        if key not in self._views:
            registers, files = self.program.registers, self.files
            self._views[key] = [
                self._fixed[slot][low:high]
                if slot in self._fixed
                else _interpret(files[registers[name][0]][registers[name][1], low:high], view)
                for slot, (name, view) in enumerate(self.program.slot_list)
            ]
        return self._views[key]


def _interpret(row: np.ndarray, view: str) -> np.ndarray:
    """A register row in one of its interpretations, as a view."""
    if view == "pred":
        return row
    if view.startswith("part"):
        bits, _, part = view[4:].partition(":")
        return row.view(UNSIGNED[int(bits) // 8]).reshape(len(row), -1)[:, int(part)]
    if view.startswith("low:"):
        kind = view[4:]
        dtype = np.dtype(DTYPES[kind]) if BYTES[kind] > 1 else np.dtype(np.uint16)
        return row.view(dtype).reshape(len(row), -1)[:, 0]
    dtype = DTYPES[view] if BYTES[view] > 1 else np.uint16
    return row.view(dtype)


class Node:
    """A piece of a kernel that runs without a scheduling decision.

    kind: "code", "branch", "exit" or "special".
    reads, writes: bit sets of registers, to find accesses to registers in flight.
    """

    def __init__(self, kind: str, index: int, first: int, count: int):
        self.kind, self.index = kind, index
        self.first, self.count = first, count  # instructions [first, first + count)
        self.reads = self.writes = 0
        self.target = -1  # branch: node to go to
        self.guard: tuple[int, bool] | None = None  # slot of the predicate, negated
        self.join = -1  # branch: immediate postdominator
        self.special: Any = None
        self.body: list[tuple[int, str | None, list[str]]] = []
        self.run: Callable | None = None
        self.run_masked: Callable | None = None


class Program:
    """A kernel compiled for execution."""

    def __init__(self, kernel: Kernel):
        self.kernel = kernel
        self.instructions = kernel.instructions
        self.registers: dict[str, tuple[str, int]] = {}
        self.counts = dict.fromkeys(FILES, 0)
        self.bits: dict[str, int] = {}
        self.slots: dict[tuple[str, str], int] = {}
        self.slot_list: list[tuple[str, str]] = []
        self.constants: list[np.ndarray] = []
        self._constant_index: dict[tuple[bytes, str], int] = {}
        self.parameters = {p.name: p for p in kernel.parameters}
        self.parameter_bytes = max((p.offset + p.size for p in kernel.parameters), default=0)
        named = kernel.names()  # others of the module's variables are not this kernel's
        self.variables: dict[str, Variable] = {
            **{n: v for n, v in kernel.module_variables.items() if n in named},
            **kernel.variables,
        }
        self.granule = 4  # bytes: the narrowest access to shared memory, at most 4
        # Tensor maps edited in the kernel need fences before use (special.py).
        self.edits_tensor_maps = any(
            i.opcode.startswith(("tensormap.", "fence.proxy.tensormap"))
            for i in kernel.instructions
        )
        self.nodes: list[Node] = []
        self._pool: dict[int, list[Registers]] = {}
        self.namespace = _namespace(self.constants)
        self._build()

    # --- operands ---

    def register(self, name: str) -> tuple[str, int]:
        """(file, row) of a register."""
        place = self.registers.get(name)
        if place is None:
            if name not in self.kernel.registers:
                raise PtxSyntaxError(f"{name!r} is not a register")
            file = register_file(self.kernel.registers[name])
            place = self.registers[name] = (file, self.counts[file])
            self.counts[file] += 1
            self.bits[name] = 1 << len(self.bits)
        return place

    def is_register(self, name: str) -> bool:
        return name in self.kernel.registers

    def slot(self, name: str, view: str) -> int:
        """Index in `V` of an interpretation of a register, special register or symbol."""
        key = (name, view)
        if key not in self.slots:
            if not name.startswith(("%special:", "%symbol:")):
                self.register(name)
            self.slots[key] = len(self.slot_list)
            self.slot_list.append(key)
        return self.slots[key]

    def constant(self, value: np.ndarray) -> str:
        key = (value.tobytes(), value.dtype.str)
        if key not in self._constant_index:
            self._constant_index[key] = len(self.constants)
            self.constants.append(value)
        return f"C[{self._constant_index[key]}]"

    def mask(self, registers: Iterable[str]) -> int:
        result = 0
        for name in registers:
            self.register(name)
            result |= self.bits[name]
        return result

    def names(self, mask: int) -> str:
        """Registers of a mask, for messages."""
        found = [name for name, bit in self.bits.items() if bit & mask]
        return ", ".join(found[:4]) + (", ..." if len(found) > 4 else "")

    def take_registers(self, threads: int) -> Registers:
        """Registers for a CTA, from the pool where there are some."""
        pool = self._pool.setdefault(threads, [])
        try:
            return pool.pop()
        except IndexError:
            return Registers(self, threads)

    def give_registers(self, registers: Registers):
        self._pool[registers.threads].append(registers)

    # --- construction ---

    def _build(self):
        # Imported here: the emitter and the special instructions use this module.
        from . import emit, special

        instructions = self.instructions
        count = len(instructions)
        leaders = {0, count} | set(self.kernel.labels.values())
        for i, instruction in enumerate(instructions):
            if special.is_special(instruction) or instruction.mods[0] in ("bra", "ret", "exit"):
                leaders |= {i, i + 1}
        ordered = sorted(leaders)
        node_at: dict[int, int] = {}
        for first, end in zip(ordered, ordered[1:], strict=False):
            node_at[first] = len(self.nodes)
            instruction = instructions[first]
            base = instruction.mods[0]
            kind = (
                "branch" if base == "bra"
                else "exit" if base in ("ret", "exit")
                else "special" if special.is_special(instruction)
                else "code"
            )  # fmt: skip
            self.nodes.append(Node(kind, len(self.nodes), first, end - first))
        # The end of the body is an exit.
        node_at[count] = len(self.nodes)
        self.nodes.append(Node("exit", len(self.nodes), count, 0))

        for node in self.nodes:
            if node.count == 0:
                continue
            instruction = instructions[node.first]
            try:
                if node.kind == "code":
                    self._emit(node, emit)
                    continue
                if instruction.predicate:
                    node.guard = (self.slot(instruction.predicate, "pred"), instruction.negated)
                    node.reads = self.mask([instruction.predicate])
                if node.kind == "branch":
                    emit.check_modifiers(instruction, {"uni"})
                    label = instruction.operands[0]
                    if label not in self.kernel.labels:
                        raise PtxSyntaxError(f"no label {label!r}")
                    node.target = node_at[self.kernel.labels[label]]
                elif node.kind == "exit":
                    emit.check_modifiers(instruction, {"uni"})
                else:
                    reader = emit.Operands(self, instruction)
                    node.special = special.decode(instruction, reader)
                    node.reads |= self.mask(reader.reads)
                    node.writes |= self.mask(reader.writes)
            except EmulatorError as error:
                raise located(error, instruction) from error
        self._postdominators()

    def _emit(self, node: Node, emit):
        reads: set[str] = set()
        writes: set[str] = set()
        for index in range(node.first, node.first + node.count):
            instruction = self.instructions[index]
            operands = emit.Operands(self, instruction)
            try:
                lines = emit.emit(operands)
                guard = None
                if instruction.predicate:
                    slot = self.slot(instruction.predicate, "pred")
                    operands.reads.add(instruction.predicate)
                    guard = f"{'~' if instruction.negated else ''}V[{slot}]"
            except EmulatorError as error:
                raise located(error, instruction) from error
            node.body.append((index, guard, lines))
            reads |= operands.reads
            writes |= operands.writes
        node.reads, node.writes = self.mask(reads), self.mask(writes)

    def _successors(self, node: Node) -> list[int]:
        following = node.index + 1
        if node.kind == "exit":
            return [following] if node.guard else []
        if node.kind == "branch":
            return [node.target, following] if node.guard else [node.target]
        return [following]

    def _postdominators(self):
        """Immediate postdominators, where diverged lanes meet again.

        Cooper, Harvey and Kennedy, "A simple, fast dominance algorithm", on the reversed graph.
        """
        exit_ = len(self.nodes)
        successors = [self._successors(node) or [exit_] for node in self.nodes]
        predecessors: list[list[int]] = [[] for _ in range(exit_ + 1)]
        for index, targets in enumerate(successors):
            for target in targets:
                predecessors[target].append(index)
        order: list[int] = []
        seen = {exit_}
        stack = [(exit_, iter(predecessors[exit_]))]
        while stack:
            vertex, remaining = stack[-1]
            fresh = next((p for p in remaining if p not in seen), None)
            if fresh is None:
                order.append(vertex)
                stack.pop()
            else:
                seen.add(fresh)
                stack.append((fresh, iter(predecessors[fresh])))
        order.reverse()
        rank = {vertex: i for i, vertex in enumerate(order)}
        joins = {exit_: exit_}
        changed = True
        while changed:
            changed = False
            for vertex in order[1:]:
                new = None
                for target in successors[vertex]:
                    if target not in joins:
                        continue
                    if new is None:
                        new = target
                        continue
                    a, b = target, new
                    while a != b:
                        while rank[a] > rank[b]:
                            a = joins[a]
                        while rank[b] > rank[a]:
                            b = joins[b]
                    new = a
                if new is not None and joins.get(vertex) != new:
                    joins[vertex] = new
                    changed = True
        for node in self.nodes:
            node.join = joins.get(node.index, exit_)

    def compile(self, node: Node, masked: bool) -> Callable:
        """The function `f(V, M, X)` of a code node: views, mask of lanes, executing unit."""
        out = ["def f(V, M, X):"]
        for index, guard, lines in node.body:
            if guard:
                out.append(f" Q = M & {guard}" if masked else f" Q = {guard}")
                where, mask = ", where=Q", "Q"
            elif masked:
                where, mask = ", where=M", "M"
            else:
                where, mask = "", "None"
            if any("X." in line for line in lines):
                out.append(f" X.at = {index}")
            out += [" " + line.replace("$W", where).replace("$M", mask) for line in lines]
        out.append(" pass")
        scope = dict(self.namespace)
        exec(_code("\n".join(out)), scope)  # noqa: S102
        if masked:
            node.run_masked = scope["f"]
        else:
            node.run = scope["f"]
        return scope["f"]


@functools.lru_cache(maxsize=2**15)
def _code(source: str):
    """Kernels, and more so variants of one, have many nodes in common."""
    return compile(source, "<node>", "exec")


def located(error: EmulatorError, instruction: Instruction) -> EmulatorError:
    """The same error with the place of an instruction, unless it has one."""
    if error.line is not None:
        return error
    return type(error)(
        str(error), line=instruction.line, instruction=instruction.text, source=instruction.source
    )


def _namespace(constants: list[np.ndarray]) -> dict[str, Any]:
    """Names that generated code may use."""
    names = """add subtract multiply divide bitwise_and bitwise_or bitwise_xor invert left_shift
        right_shift equal not_equal less less_equal greater greater_equal copyto where logical_and
        logical_or logical_xor logical_not minimum maximum negative absolute isnan array sqrt
        uint8 uint16 uint32 uint64 int8 int16 int32 int64 float32 float64"""
    scope: dict[str, Any] = {name: getattr(np, name) for name in names.split()}
    scope["alu"] = alu
    scope["Semantics"] = Semantics
    scope["C"] = constants
    return scope


_FLOAT32 = re.compile(r"0[fF]([0-9a-fA-F]{8})$")
_FLOAT64 = re.compile(r"0[dD]([0-9a-fA-F]{16})$")
_INTEGER = re.compile(r"(-?)(0[xX][0-9a-fA-F]+|0[bB][01]+|\d+)[uU]?$")
_DECIMAL = re.compile(r"-?\d*\.\d*(e[-+]?\d+)?$")


def immediate(text: str, kind: str) -> np.ndarray | None:
    """A literal (PTX ISA 4.5) as an array of one element of the type, or None."""
    dtype = DTYPES[kind]
    if match := _FLOAT32.match(text):
        value = np.array([int(match[1], 16)], np.uint32).view(np.float32)
        if dtype is np.float64:
            return value.astype(dtype)
        return value.view(dtype) if BYTES[kind] == 4 else None
    if match := _FLOAT64.match(text):
        value = np.array([int(match[1], 16)], np.uint64).view(np.float64)
        if dtype is np.float32:
            return value.astype(dtype)
        return value.view(dtype) if BYTES[kind] == 8 else None
    if match := _INTEGER.match(text):
        digits = match[2]
        octal = len(digits) > 1 and digits[0] == "0" and digits.isdigit()
        number = int(digits, 8 if octal else 0)
        if match[1]:
            number = -number
        if kind == "pred":
            return np.array([number != 0])
        if kind in ("f32", "f64"):
            return np.array([number], dtype)
        size = BYTES[kind]
        return np.array([number & ((1 << 8 * size) - 1)], UNSIGNED[size]).view(dtype)
    if _DECIMAL.match(text) and kind in ("f32", "f64"):
        return np.array([float(text)], dtype)
    return None
