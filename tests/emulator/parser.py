"""PTX text to kernels and instructions (PTX ISA, chapters 4 to 6).

The parser works by statements, not lines: inline assembly puts several statements on a line and
splits others. Registers and labels that inline assembly declares inside `{ }` may repeat a name;
each scope gets its own prefix, so that names are unique within a kernel.
"""

from __future__ import annotations

import bisect
import functools
import re
from dataclasses import dataclass, field

from .errors import PtxSyntaxError

SIZES = {"8": 1, "16": 2, "32": 4, "64": 8, "128": 16}


@dataclass
class Instruction:
    """One instruction. `mods` is the opcode split at its dots, `mods[0]` the base name."""

    opcode: str
    operands: list[str]
    predicate: str | None
    negated: bool
    line: int
    source: str | None
    mods: list[str] = field(init=False)

    def __post_init__(self):
        self.mods = self.opcode.split(".")

    @property
    def text(self) -> str:
        guard = f"@{'!' if self.negated else ''}{self.predicate} " if self.predicate else ""
        return f"{guard}{self.opcode} {', '.join(self.operands)}".rstrip()


@dataclass(frozen=True)
class Parameter:
    """A kernel parameter: its place in the parameter block, in bytes."""

    name: str
    offset: int
    size: int
    align: int
    type: str
    is_array: bool


@dataclass(frozen=True)
class Variable:
    """A variable in a state space. `data` is its initial value (module scope only)."""

    name: str
    space: str
    align: int
    size: int
    external: bool
    data: bytes | None = None


@dataclass
class Kernel:
    """An entry: its parameters, directives, registers and instructions in order."""

    name: str
    parameters: list[Parameter]
    directives: dict[str, tuple[int, ...]]
    module_variables: dict[str, Variable]
    variables: dict[str, Variable] = field(default_factory=dict)
    registers: dict[str, str] = field(default_factory=dict)
    labels: dict[str, int] = field(default_factory=dict)
    instructions: list[Instruction] = field(default_factory=list)

    def names(self) -> set[str]:
        """What the operands name: registers, labels, variables."""
        texts = " ".join(" ".join(i.operands) for i in self.instructions)
        return set(re.findall(r"[A-Za-z_$][\w$]*", texts))


class Module:
    """A PTX file. `entries` lists its kernels; `kernel(name)` parses one."""

    def __init__(self, text: str):
        self._text = _strip_comments(text)
        self._newlines = [m.start() for m in re.finditer("\n", self._text)]
        self._bodies: dict[str, tuple[re.Match, int, int]] = {}
        self.variables: dict[str, Variable] = {}
        self._files: dict[int, str] = {}
        self._scan_module()

    @property
    def entries(self) -> list[str]:
        return list(self._bodies)

    def header(self, name: str) -> Kernel:
        """The kernel of that name without its body: parameters and directives."""
        if name not in self._bodies:
            raise PtxSyntaxError(f"no entry named {name!r}; the module has {self.entries}")
        match, _, _ = self._bodies[name]
        return Kernel(
            name, _parameters(match["params"]), _directives(match["dirs"]), self.variables
        )

    @functools.cache  # noqa: B019 - modules are few and live as long as a cache
    def kernel(self, name: str) -> Kernel:
        """The kernel of that name, parsed."""
        kernel = self.header(name)
        _, start, end = self._bodies[name]
        _Body(self._text, start, end, self._line, self._files, kernel).parse()
        return kernel

    def _line(self, position: int) -> int:
        return bisect.bisect_left(self._newlines, position) + 1

    def _scan_module(self):
        position = 0
        while match := _MODULE_ITEM.search(self._text, position):
            if match["entry"]:
                end = _closing_brace(self._text, match.end())
                self._bodies[match["entry"]] = (match, match.end(), end)
                position = end + 1
            elif match["func"]:
                # A device function that was not inlined; `call` refuses to run it.
                position = _closing_brace(self._text, match.end()) + 1
            elif match["file"]:
                self._files[int(match["file"])] = match["path"].rsplit("/", 1)[-1]
                position = match.end()
            else:
                variable = _variable(match.group(0))
                if variable:
                    self.variables[variable.name] = variable
                position = match.end()


_MODULE_ITEM = re.compile(
    r"\.entry\s+(?P<entry>[\w$]+)\s*\((?P<params>[^)]*)\)(?P<dirs>[^{;]*)\{"
    r"|\.func\b[^;{]*(?P<func>\{)"
    r'|\.file\s+(?P<file>\d+)\s+"(?P<path>[^"]*)"[^\n]*'
    r"|(?<![\w.])\.(?:extern|visible|weak|common|global|shared|const)\b(?!\s*\.(?:entry|func))"
    r"[^;{]*(?:\{[^}]*\}[^;]*)?;",
    re.S,
)


def _strip_comments(text: str) -> str:
    def blank(match: re.Match) -> str:
        return re.sub(r"[^\n]", " ", match.group(0))

    return re.sub(r"//[^\n]*|/\*.*?\*/", blank, text, flags=re.S)


def _closing_brace(text: str, position: int) -> int:
    """Position of the brace that closes the one just before `position`."""
    depth = 1
    for match in re.compile(r"[{}]").finditer(text, position):
        depth += 1 if match.group(0) == "{" else -1
        if depth == 0:
            return match.start()
    raise PtxSyntaxError("unbalanced braces")


_PARAMETER = re.compile(
    r"\.param\s+(?:\.align\s+(?P<align>\d+)\s+)?\.(?P<kind>[a-z]+)(?P<bits>\d+)"
    r"(?:\s+\.ptr(?:\s+\.(?:global|shared|const|local))?(?:\s+\.align\s+\d+)?)?"
    r"\s+(?P<name>[\w$]+)(?:\[(?P<count>\d+)\])?$"
)


def _parameters(text: str) -> list[Parameter]:
    result: list[Parameter] = []
    offset = 0
    for item in filter(None, (p.strip() for p in text.split(","))):
        match = _PARAMETER.match(item)
        if not match:
            raise PtxSyntaxError(f"parameter {item!r}")
        size = SIZES[match["bits"]]
        align = int(match["align"] or size)
        offset = -(-offset // align) * align
        total = size * int(match["count"] or 1)
        kind = match["kind"] + match["bits"]
        result.append(
            Parameter(match["name"], offset, total, align, kind, match["count"] is not None)
        )
        offset += total
    return result


def _directives(text: str) -> dict[str, tuple[int, ...]]:
    """Performance directives such as `.maxntid 384, 1, 1` (PTX ISA 11.4)."""
    found = re.findall(r"\.(\w+)((?:\s*\d+\s*,?)*)", text)
    return {name: tuple(int(n) for n in re.findall(r"\d+", args)) for name, args in found}


_VARIABLE = re.compile(
    r"\.(?P<space>shared|global|const|local)\s*(?:\.align\s+(?P<align>\d+)\s+)?"
    r"\.(?P<kind>[a-z]+)(?P<bits>\d+)\s+(?P<name>[\w$]+)(?P<array>\[(?P<count>\d*)\])?"
    r"(?:\s*=\s*(?P<init>\{[^}]*\}|[^;]+))?"
)


def _variable(text: str) -> Variable | None:
    match = _VARIABLE.search(text)
    if not match:
        return None
    size = SIZES[match["bits"]]
    count = int(match["count"] or 0) if match["array"] else 1
    data = None
    if match["init"]:
        values = [v.strip() for v in match["init"].strip("{} \n\t").split(",") if v.strip()]
        if all(re.fullmatch(r"-?(0[xX][0-9a-fA-F]+|\d+)U?", v) for v in values):
            mask = (1 << 8 * size) - 1
            data = b"".join((int(v.rstrip("U"), 0) & mask).to_bytes(size, "little") for v in values)
            data = data.ljust(size * count, b"\0")
        elif all(re.fullmatch(r"0[fF][0-9a-fA-F]{8}", v) for v in values):
            data = b"".join(int(v[2:], 16).to_bytes(4, "little") for v in values)
            data = data.ljust(size * count, b"\0")
        else:
            raise PtxSyntaxError(f"initial value of {match['name']}: {match['init'][:60]!r}")
    return Variable(
        match["name"],
        match["space"],
        int(match["align"] or size),
        size * count,
        ".extern" in text,
        data,
    )


_OPENING = re.compile(r"[{\[(]")


def split_operands(text: str) -> list[str]:
    """Split at the commas outside of braces, brackets and parentheses."""
    if not _OPENING.search(text):
        parts = [part.strip() for part in text.split(",")]
        return parts if parts[-1] else parts[:-1]
    result, depth, start = [], 0, 0
    for i, char in enumerate(text):
        if char in "{[(":
            depth += 1
        elif char in "}])":
            depth -= 1
        elif char == "," and depth == 0:
            result.append(text[start:i].strip())
            start = i + 1
    last = text[start:].strip()
    return result + [last] if last else result


class _Scope:
    """Names declared between two braces; `parent` is None for the kernel's own braces."""

    def __init__(self, prefix: str, parent: _Scope | None):
        self.prefix, self.parent = prefix, parent
        self.names: dict[str, str] = {}

    def declare(self, name: str) -> str:
        self.names[name] = self.prefix + name
        return self.names[name]

    def resolve(self, name: str) -> str:
        scope: _Scope | None = self
        while scope is not None:
            if name in scope.names:
                return scope.names[name]
            scope = scope.parent
        return name


_BETWEEN = re.compile(r"[\s;]+")
_LABEL = re.compile(r"([$%A-Za-z_][\w$]*)\s*:(?!:)")
_NAME = re.compile(r"(?<![\w.$%])[%$A-Za-z_][\w$]*")
_GUARD = re.compile(r"@(!?)\s*([%\w$]+)\s+")
_OPCODE = re.compile(r"([a-z][\w.:]*)\s*")
_LOC = re.compile(r"\.loc\s+(\d+)\s+(\d+)")


class _Body:
    """Parses the statements of one kernel."""

    def __init__(self, text, start, end, line_of, files, kernel: Kernel):
        self.text, self.position, self.end = text, start, end
        self.line_of, self.files, self.kernel = line_of, files, kernel
        self.scope = _Scope("", None)
        self.scopes = 0
        self.source: str | None = None
        # Labels may be used before they are declared: names are resolved at the end.
        self.pending: list[tuple[int, str, str | None, bool, int, str | None, _Scope]] = []

    def parse(self):
        while self.position < self.end:
            char = self.text[self.position]
            if match := _BETWEEN.match(self.text, self.position, self.end):
                self.position = match.end()
            elif char == "{":
                self.scopes += 1
                self.scope = _Scope(f"S{self.scopes}_", self.scope)
                self.position += 1
            elif char == "}":
                assert self.scope.parent is not None
                self.scope = self.scope.parent
                self.position += 1
            elif match := _LABEL.match(self.text, self.position):
                name = self.scope.declare(match[1])
                self.kernel.labels[name] = len(self.pending)
                self.position = match.end()
            elif char == ".":
                self.directive()
            else:
                self.statement()
        for opcode, rest, predicate, negated, line, source, scope in self.pending:
            if scope.parent is not None or rest[:1] in "$_" or "$" in rest:
                rest = _NAME.sub(lambda m, s=scope: s.resolve(m.group(0)), rest)
            if predicate:
                predicate = scope.resolve(predicate)
            operands = split_operands(" ".join(rest.split()))
            self.kernel.instructions.append(
                Instruction(opcode, operands, predicate, negated, line, source)
            )

    def directive(self):
        if match := _LOC.match(self.text, self.position):
            self.source = f"{self.files.get(int(match[1]), match[1])}:{match[2]}"
            self.position = self.text.index("\n", self.position)
            return
        if self.text.startswith(".file", self.position):
            self.position = self.text.index("\n", self.position)
            return
        end = self.text.index(";", self.position)
        text = self.text[self.position : end].strip()
        self.position = end + 1
        if text.startswith(".reg"):
            self.registers(text)
        elif text.startswith((".shared", ".local")):
            variable = _variable(text)
            if variable is None:
                raise PtxSyntaxError(f"variable {text!r}")
            self.kernel.variables[variable.name] = variable
        elif not text.startswith((".pragma", ".param")):
            raise PtxSyntaxError(f"directive {text!r}")

    def registers(self, text: str):
        match = re.match(r"\.reg\s+\.([a-z]+\d*)\s+(.*)$", text, re.S)
        if not match:
            raise PtxSyntaxError(f"registers {text!r}")
        for name in (n.strip() for n in match[2].split(",")):
            span = re.match(r"(.*)<(\d+)>$", name)
            if span:
                for k in range(int(span[2])):
                    self.kernel.registers[f"{span[1]}{k}"] = match[1]
            else:
                self.kernel.registers[self.scope.declare(name)] = match[1]

    def statement(self):
        end = self.text.index(";", self.position)
        text = self.text[self.position : end].strip()
        line = self.line_of(self.position)
        self.position = end + 1
        predicate, negated = None, False
        if match := _GUARD.match(text):
            negated, predicate, text = bool(match[1]), match[2], text[match.end() :]
        match = _OPCODE.match(text)
        if not match:
            raise PtxSyntaxError(f"statement {text!r}", line=line, instruction=text)
        self.pending.append(
            (match[1], text[match.end() :], predicate, negated, line, self.source, self.scope)
        )
