"""Executes PTX of sm_90a kernels on the CPU, and finds their faults.

    report = launch(ptx, "kernel", grid=(2, 1, 1), block=(128, 1, 1), args=[x, y, np.int32(5)])

`ptx` is text, bytes or a path; compiled kernels are cached by content. Arguments are NumPy arrays,
NumPy scalars, `TensorMap`s, or bytes of a parameter's exact size. A C-contiguous array is a buffer
of global memory; kernels write it in place where it is writeable, and a store to an array that is
not (`array.flags.writeable = False`) is an error. Guard zones surround every buffer: an access
outside of every buffer is an error, as is one that is not aligned to its size.

To run on memory that somebody else owns, map it, and pass pointers as `np.uint64`:

    memory = Memory()
    memory.map(address, nbytes, writable=False)      # not copied; `unmap` forgets it
    launch(ptx, "kernel", grid=1, block=128, args=[np.uint64(address)], memory=memory)
    TensorMap((memory, address), [k, m], strides=[k], box=[128, 64], swizzle=128, dtype="uint8")

`kernel(ptx, name).parameters` gives the offset and size of each parameter, `module(ptx).entries`
the names of the kernels, `TensorMap.encode()` the 128 bytes of a parameter.

`seed` selects the schedule: 0 is fast, runs every warp until it blocks and completes asynchronous
operations as late as possible; other seeds choose orders, turns and completions at random.
`check_races=False` turns off the happens-before detector. `stop_at` says what ends a run: any finding
(as here), an "error", or "nothing", which collects all in `report.findings` and goes on.

What it finds, each an exception of `errors.py` with the PTX line and both parties: races between
generic accesses, bulk copies, cp.async and wgmma, also between lanes of a warp that no
bar.warp.sync orders; reads of uninitialised shared memory; registers
of a wgmma in flight; missing proxy, wgmma, mbarrier-init and tensormap fences; wrong transaction
counts; deadlock; out-of-bounds and misaligned accesses; register budgets; bytes stored twice;
misuse of barriers, warp-synchronous instructions and descriptors. An instruction or a modifier
that it does not know is refused, never skipped.

Order is judged by lane, semantics and scope: who waits or arrives (clocks.py), and what atomics,
strong accesses and fences release and acquire (order.py).

What it does not model: time, caches, bank conflicts, textures, calls, and what ptxas
does to the program. Clusters of a grid run one after another, so a CTA that waits for another
cluster is reported as a deadlock, as CUDA does not promise that both are resident. Global memory is
judged between clusters only. Results of
`.approx` instructions and of tensor cores have more bits than the hardware's (alu.py, wgmma.py).
"""

from . import barriers, bulk, mbarrier, special, wgmma  # noqa: F401 - they register their instructions
from .errors import (
    BarrierMisuse,
    Deadlock,
    DescriptorError,
    Divergence,
    DoubleWrite,
    EmulatorError,
    ExitedCta,
    LaunchError,
    Misaligned,
    MissingFence,
    OutOfBounds,
    PtxSyntaxError,
    Race,
    ReadOnlyWrite,
    RegisterBudget,
    RegisterInFlight,
    TransactionMismatch,
    Trap,
    UninitializedRead,
    UnknownInstruction,
    Unsupported,
)
from .launch import Report, kernel, launch, module
from .memory import Memory, Region
from .tensormap import TensorMap

__all__ = [
    "BarrierMisuse",
    "Deadlock",
    "DescriptorError",
    "Divergence",
    "DoubleWrite",
    "EmulatorError",
    "ExitedCta",
    "LaunchError",
    "Memory",
    "Misaligned",
    "MissingFence",
    "OutOfBounds",
    "PtxSyntaxError",
    "Race",
    "ReadOnlyWrite",
    "Region",
    "RegisterBudget",
    "RegisterInFlight",
    "Report",
    "TensorMap",
    "TransactionMismatch",
    "Trap",
    "UninitializedRead",
    "UnknownInstruction",
    "Unsupported",
    "kernel",
    "launch",
    "module",
]
