"""What the emulator reports. Every fault of a kernel is one exception of this hierarchy."""

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
    """

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
    ):
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


class UninitializedRead(EmulatorError):
    """A read of shared memory that nothing has written."""


class OutOfBounds(EmulatorError):
    """An access outside every buffer, or outside the shared memory of the CTA."""


class ReadOnlyWrite(OutOfBounds):
    """A store to a buffer that the launch gave as an input."""


class Misaligned(EmulatorError):
    """An address that the instruction does not accept."""


class Deadlock(EmulatorError):
    """No warp can run and no asynchronous operation is in flight, or one spins for ever."""


class RegisterInFlight(EmulatorError):
    """Access to registers of a wgmma that no wait_group has retired."""


class MissingFence(EmulatorError):
    """Ordered in time, but not made visible: a proxy, wgmma, mbarrier-init or tensormap fence."""


class TransactionMismatch(EmulatorError):
    """A transaction count that disagrees with the bytes that arrive."""


class RegisterBudget(EmulatorError):
    """setmaxnreg asks for what the register file of the CTA cannot give."""


class DoubleWrite(EmulatorError):
    """Bytes of an output stored twice in one launch."""


class BarrierMisuse(EmulatorError):
    """A barrier used against its rules: count, number, uninitialised or overwritten."""


class Divergence(EmulatorError):
    """A warp-synchronous instruction executed by lanes other than those it names."""


class ExitedCta(EmulatorError):
    """Shared memory of a CTA accessed after the CTA has ended, or left busy at its end."""


class DescriptorError(EmulatorError):
    """A tensor map or matrix descriptor that breaks its encoding rules."""


class Trap(EmulatorError):
    """The kernel executed `trap`."""
