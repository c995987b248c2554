"""Instructions with machine-wide effects: the registry, and those too small for a module.

A class decodes its operands once, when the kernel is compiled, and executes for one warp at a
time. `execute` returns False where the warp must wait; it is then called again.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from . import tensormap
from .clocks import SCOPES
from .errors import Divergence, Misaligned, RegisterBudget, Trap, UnknownInstruction
from .parser import Instruction
from .program import OFFSET_MASK, PARAM_WINDOW, WINDOW_SHIFT
from .shared import Access

if TYPE_CHECKING:
    from .emit import Operands
    from .machine import Cluster, Warp
    from .unit import Unit


class Issue:
    """One warp issuing one special instruction."""

    def __init__(self, warp: Warp, unit: Unit, node, position: int, mask: np.ndarray | None):
        self.warp, self.unit, self.node = warp, unit, node
        self.cluster: Cluster = warp.cluster
        self.cta = warp.cta
        self.views = unit.views
        self.slice = slice(32 * position, 32 * position + 32)
        self.mask = mask  # executing lanes, or None for all

    def value(self, function) -> np.ndarray:
        """A source operand, one element a lane."""
        result = np.asarray(function(self.views))
        return result[self.slice] if result.size > 1 else np.broadcast_to(result, (32,))

    def uniform(self, function, what: str) -> int:
        """A source operand that must be the same in all executing lanes."""
        lanes = self.value(function)
        if self.mask is not None:
            lanes = lanes[self.mask]
        if (lanes != lanes[0]).any():
            self.fault(Divergence, f"{what} differs between the lanes of a warp")
        return int(lanes[0])

    def lanes(self):
        return range(32) if self.mask is None else np.flatnonzero(self.mask).tolist()

    def access(self, lane: int) -> Access:
        """An access to shared memory by one lane."""
        warp = self.warp
        if self.mask is not None and self.mask.sum() == 1 and warp.alive.sum() > 1:
            agent = warp.single
            warp.acted_alone |= 1 << lane
        else:
            agent = warp.index
            warp.acted |= 1 << lane
        return Access(warp.rows[lane], agent, lane, warp.epoch)

    def write(self, slot: int, values: np.ndarray):
        where = True if self.mask is None else self.mask
        np.copyto(self.views[slot][self.slice], values, where=where)

    def whole_warp(self):
        """Checks that an `.aligned` instruction is executed by every live lane."""
        if self.mask is not None and (self.warp.alive & ~self.mask).any():
            self.fault(Divergence, "an .aligned instruction executed by a diverged warp")

    def meet(self):
        """A `.sync.aligned` instruction: every live lane executes it together."""
        self.whole_warp()
        self.warp.meet()

    def fault(self, kind, message: str, **details):
        self.cluster.fault(kind, message, actor=self.warp.name, **details)


class Special:
    """Base of the special instructions. `names` are the opcodes' first parts."""

    names: ClassVar[tuple[str, ...]] = ()
    # Accumulators in flight may be named by this instruction (wgmma itself).
    touches_accumulators = False

    def __init__(self, instruction: Instruction, operands: Operands):
        self.instruction = instruction

    def execute(self, issue: Issue) -> bool:
        raise NotImplementedError


_REGISTRY: dict[str, Any] = {}


def register(cls):
    """Class decorator: this class decodes the opcodes in `names`."""
    for name in cls.names:
        _REGISTRY[name] = cls
    return cls


def register_decoder(*names: str):
    """Decorator: this function decodes the opcodes of those names."""

    def add(function):
        for name in names:
            _REGISTRY[name] = function
        return function

    return add


def is_special(instruction: Instruction) -> bool:
    base = instruction.mods[0]
    return base in _REGISTRY and instruction.mods[1:2] != ["warp"]


def decode(instruction: Instruction, operands: Operands) -> Special:
    return _REGISTRY[instruction.mods[0]](instruction, operands)


@register
class TrapInstruction(Special):
    """trap: an error of the kernel."""

    names = ("trap", "brkpt")

    def execute(self, issue: Issue) -> bool:
        issue.fault(Trap, f"the kernel executed {self.instruction.opcode}")
        return True


@register
class Call(Special):
    """call.uni of what device code calls without a body: a failed assert ends, printf prints nothing."""

    names = ("call",)

    def __init__(self, instruction, operands):
        super().__init__(instruction, operands)
        operands.allow("uni")
        named = [t for t in instruction.operands if not t.startswith("(")]
        self.function = named[0] if named else ""
        if self.function not in ("__assertfail", "__assert_fail", "vprintf"):
            raise UnknownInstruction(f"a call of {self.function or 'what a register holds'}")

    def execute(self, issue: Issue) -> bool:
        if self.function != "vprintf":
            issue.fault(Trap, "an assert of the kernel failed")
        return True


@register
class GridDependency(Special):
    """griddepcontrol: `wait` orders the launch before, `launch_dependents` nothing (order.py)."""

    names = ("griddepcontrol",)

    def __init__(self, instruction, operands):
        super().__init__(instruction, operands)
        operands.allow("wait", "launch_dependents")
        self.waits = "wait" in instruction.mods

    def execute(self, issue: Issue) -> bool:
        if self.waits:
            issue.cluster.order.wait_for_launches(issue.warp)
        return True


@register
class Fence(Special):
    """fence and membar (PTX ISA 9.7.13.4).

    `fence.proxy.async` makes what is ordered before it visible to the asynchronous proxy.
    `fence.mbarrier_init` publishes the mbarriers that the warp initialised.
    `fence.proxy.tensormap` releases and acquires edited tensor maps.
    Memory fences at wider scope order global memory between CTAs: after one, global accesses of
    the CTA are not judged any more.
    """

    names = ("fence", "membar")

    def __init__(self, instruction, operands):
        super().__init__(instruction, operands)
        mods = set(instruction.mods[1:])
        self.address = None
        if mods & {"mbarrier_init"}:
            operands.allow("mbarrier_init", "release", "cluster")
            self.kind = "mbarrier_init"
        elif "proxy" in mods and mods & {"tensormap::generic"}:
            operands.allow(
                "proxy", "tensormap::generic", "release", "acquire", "cta", "cluster", "gpu", "sys"
            )
            self.kind = "tensormap release" if "release" in mods else "tensormap acquire"
            if "acquire" in mods:
                self.address = operands.location(0)
        elif "proxy" in mods:
            operands.allow(
                "proxy", "async", "async.shared::cta", "shared::cta", "shared::cluster", "global"
            )
            self.kind = "proxy"
            if mods & {"global"}:
                self.kind = "proxy global"
        else:
            operands.allow(
                "sc", "acq_rel", "acquire", "release", "cta", "cluster", "gpu", "sys", "gl"
            )
            self.kind = "memory"
            self.scope = next(m for m in instruction.mods if m in SCOPES)

    def execute(self, issue: Issue) -> bool:
        warp, cluster = issue.warp, issue.cluster
        if self.kind == "proxy":
            warp.proxy_fence(issue.mask)
        elif self.kind == "mbarrier_init":
            for barrier in issue.cta.mbarriers.values():
                if barrier.initializer is warp:
                    barrier.published = True
        elif self.kind == "tensormap release":
            for version in cluster.map_versions.values():
                version[1] = True
        elif self.kind == "tensormap acquire":
            for lane in issue.lanes():
                place = int(issue.value(self.address)[lane])
                version = cluster.map_versions.get(place)
                if version and version[1]:
                    warp.tensor_maps[place] = version[0]
        elif self.kind == "memory":
            warp.fence(issue.mask, self.scope)
            if SCOPES[self.scope] >= SCOPES["gpu"]:
                issue.cta.synchronized = True
        return True


@register
class SetMaxRegisters(Special):
    """setmaxnreg (PTX ISA 9.7.19.5): moves registers between warps through the CTA's pool."""

    names = ("setmaxnreg",)

    def __init__(self, instruction, operands):
        super().__init__(instruction, operands)
        operands.allow("inc", "dec", "sync", "aligned", "u32")
        self.direction = instruction.mods[1]
        self.count = int(operands.text(0))
        if self.count % 8 or not 24 <= self.count <= 256:
            raise RegisterBudget(f"{self.count} registers: not a multiple of 8 in 24..256")

    def execute(self, issue: Issue) -> bool:
        issue.meet()
        warp, cta = issue.warp, issue.cta
        change = 32 * (warp.registers - self.count)
        if self.direction == "inc":
            if self.count < warp.registers:
                issue.fault(
                    RegisterBudget,
                    f"setmaxnreg.inc to {self.count} below the warp's {warp.registers} registers",
                )
            if cta.free_registers + change < 0:
                warp.blocked = RegisterPool(cta)
                cta.register_waiters.append(warp)
                return False
        elif self.count > warp.registers:
            issue.fault(
                RegisterBudget,
                f"setmaxnreg.dec to {self.count} above the warp's {warp.registers} registers",
            )
        cta.free_registers += change
        warp.registers = self.count
        if self.direction == "dec":
            for waiter in cta.register_waiters:
                waiter.blocked = None
            cta.register_waiters = []
            issue.cluster.progress += 1
        return True


class RegisterPool:
    """What a warp waits for in setmaxnreg.inc."""

    def __init__(self, cta):
        self.cta = cta

    def __repr__(self):
        return f"the register pool of cta{self.cta.rank} ({self.cta.free_registers} free)"


@register
class TensorMapReplace(Special):
    """tensormap.replace.tile: edits a tensor map in shared or global memory."""

    names = ("tensormap",)

    def __init__(self, instruction, operands):
        super().__init__(instruction, operands)
        mods = instruction.mods
        if mods[1:3] != ["replace", "tile"] or len(mods) < 5:
            raise UnknownInstruction(f"{instruction.opcode} is not known")
        self.field = mods[3]
        operands.allow(
            "replace", "tile", "global_address", "global_dim", "global_stride", "box_dim",
            "shared::cta", "global", "b1024", "b32", "b64",
        )  # fmt: skip
        self.address = operands.location(0)
        self.ordinal = int(operands.text(1)) if len(operands) > 2 else 0
        self.new = operands.value(len(operands) - 1, "u64" if mods[-1] == "b64" else "u32")

    def execute(self, issue: Issue) -> bool:
        for lane in issue.lanes():
            place = int(issue.value(self.address)[lane])
            value = int(issue.value(self.new)[lane])
            if "shared::cta" in self.instruction.mods or place >> WINDOW_SHIFT == 1:
                shared, offset = issue.cta.shared, place & OFFSET_MASK
                if offset % 128:
                    issue.fault(Misaligned, "a tensor map is 128-byte aligned", offset=offset)
                span = shared.span(offset, tensormap.BYTES)
                shared.write(issue.access(lane), np.arange(span.start, span.stop))
                target = shared.bytes[offset : offset + tensormap.BYTES]
            else:
                region = issue.cluster.memory.find_writable(place, tensormap.BYTES)
                start = place - region.base
                target = region.bytes[start : start + tensormap.BYTES]
            edited = tensormap.replace(target.tobytes(), self.field, self.ordinal, value)
            target[:] = np.frombuffer(edited, np.uint8)
        return True


def tensor_map_at(issue: Issue, address: int) -> tensormap.DecodedMap:
    """The map that a copy names: in the parameters, or in global memory."""
    from .errors import DescriptorError, MissingFence

    if address >> WINDOW_SHIFT == 1:
        issue.fault(DescriptorError, "a copy names a tensor map in shared memory")
    if address % 64:
        issue.fault(Misaligned, f"tensor map at {address:#x} is not 64-byte aligned")
    if address >= PARAM_WINDOW:
        start = address - PARAM_WINDOW
        return tensormap.decode(issue.cluster.launch.parameter_block[start : start + 128].tobytes())
    region = issue.cluster.memory.find(address, tensormap.BYTES, "tensor map")
    start = address - region.base
    version = issue.cluster.map_versions.get(address)
    if version and issue.warp.tensor_maps.get(address) != version[0]:
        issue.fault(
            MissingFence,
            "a tensor map edited in this kernel, without fence.proxy.tensormap release and acquire",
            offset=address,
        )
    return tensormap.decode(region.bytes[start : start + 128].tobytes())
