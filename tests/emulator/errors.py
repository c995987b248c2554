"""What the emulator reports. Every fault of a kernel is one exception of this hierarchy.

A finding is an error, or a warning where the kernel breaks a rule and computes the right result all
the same on every machine that we know of. Each names the section of the PTX ISA that holds the rule.
"""

from __future__ import annotations


class EmulatorError(Exception):
    """A fault of the executed kernel, or of its launch.

    Attributes:
        line: line of the PTX text, or None outside of an instruction.
        instruction: its text.
        source: `file:line` of the CUDA source, where the PTX carries `.loc` directives.
        actor: who met the fault, e.g. `cta0 warp3`.
        other: the second party (the unordered writer, the barrier, ...), or None.
        offset: byte offset in shared memory, or address in global memory, where one is at fault.
        severity: "error" or "warning".
        section: of the PTX ISA, by its name, or "" where the fault is not one of a rule there.
        of_a_value: is it about a value that was read, which counts only where it is used?
        count: how often the same instruction met it, where a run goes on.
    """

    severity = "error"
    section = ""

    def __init__(
        self,
        message: str,
        *,
        line: int | None = None,
        instruction: str | None = None,
        source: str | None = None,
        actor: str | None = None,
        other: str | None = None,
        offset: int | None = None,
        severity: str | None = None,
        section: str | None = None,
        of_a_value: bool = False,
    ):
        if severity is not None:
            self.severity = severity
        if section is not None:
            self.section = section
        self.count = 1
        self.of_a_value = of_a_value
        self.line = line
        self.instruction = instruction
        self.source = source
        self.actor = actor
        self.other = other
        self.offset = offset
        parts = [message]
        if actor is not None:
            parts.append(f"  by    {actor}")
        if other is not None:
            parts.append(f"  with  {other}")
        if line is not None:
            where = f" ({source})" if source else ""
            parts.append(f"  at    PTX line {line}{where}: {instruction}")
            if self.section:
                parts.append(f"  rule  PTX ISA, {self.section}")
        super().__init__("\n".join(parts))


class LaunchError(EmulatorError):
    """The launch itself is impossible: arguments, grid, cluster or shared memory."""


class PtxSyntaxError(EmulatorError):
    """PTX text that the parser does not understand."""


class Unsupported(EmulatorError):
    """A legal form that the emulator does not model. It never guesses."""


class UnknownInstruction(Unsupported):
    """An opcode, or a modifier of one, that the emulator does not know."""


class Race(EmulatorError):
    """Two accesses, at least one of them a write, that nothing orders."""

    section = "Memory Consistency Model: Causality Order"


class UninitializedRead(EmulatorError):
    """A read of shared memory that nothing has written."""

    section = "State Spaces: Shared State Space"


class OutOfBounds(EmulatorError):
    """An access outside every buffer, or outside the shared memory of the CTA."""

    section = "Operands: Addresses as Operands"


class ReadOnlyWrite(OutOfBounds):
    """A store to a buffer that the launch gave as an input."""


class Misaligned(EmulatorError):
    """An address that the instruction does not accept."""

    section = "Operands: Addresses as Operands"


class Deadlock(EmulatorError):
    """No warp can run and no asynchronous operation is in flight, or one spins for ever."""


class RegisterInFlight(EmulatorError):
    """Access to registers of a wgmma that no wait_group has retired."""

    section = "Asynchronous wgmma Instructions: wgmma.mma_async"


class MissingFence(EmulatorError):
    """Ordered in time, but not made visible: a proxy, wgmma, mbarrier-init or tensormap fence."""

    section = "Parallel Synchronization and Communication Instructions: membar / fence"


class TransactionMismatch(EmulatorError):
    """A transaction count that disagrees with the bytes that arrive."""

    section = "mbarrier: Phase Completion of the mbarrier object"


class RegisterBudget(EmulatorError):
    """setmaxnreg asks for what the register file of the CTA cannot give."""

    section = "Miscellaneous Instructions: setmaxnreg"


class DoubleWrite(EmulatorError):
    """Bytes of an output stored twice in one launch."""

    section = "Memory Consistency Model: Coherence Order"


class BarrierMisuse(EmulatorError):
    """A barrier used against its rules: count, number, uninitialised or overwritten."""

    section = "Parallel Synchronization and Communication Instructions: bar, barrier, mbarrier"


class Divergence(EmulatorError):
    """A warp-synchronous instruction executed by lanes other than those it names."""

    section = "Parallel Synchronization and Communication Instructions: membermask and .aligned"


class ExitedCta(EmulatorError):
    """Shared memory of a CTA accessed after the CTA has ended, or left busy at its end."""

    section = "State Spaces: Shared State Space"


class DescriptorError(EmulatorError):
    """A tensor map or matrix descriptor that breaks its encoding rules."""

    section = "Tensor-map, Matrix descriptor"


class Trap(EmulatorError):
    """The kernel executed `trap`."""


# After these a run can go on: what happened next is what the schedule made of it.
CONTINUABLE = (Race, UninitializedRead, MissingFence, DoubleWrite, RegisterInFlight, ExitedCta)
