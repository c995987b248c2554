"""Meshes, placed arrays and the profile of communication, for the sections of multi_gpu.py."""

import collections
import pathlib
import re
import tempfile

import jax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P


def on_mesh(devices, axis):
    return jax.make_mesh(
        (devices,), (axis,), devices=jax.devices()[:devices], axis_types=(AxisType.Auto,)
    )


def place(tree, mesh, *axes):
    return jax.device_put(tree, NamedSharding(mesh, P(*axes)))


def queued(run):
    """run, whose calls may be queued; on a CPU it waits for each, since queued collectives block each other there."""
    return run if jax.default_backend() != "cpu" else lambda: jax.block_until_ready(run())


def communication(run, calls=3):
    """Milliseconds a call of one GPU in communication's kernels, and of them with no other kernel beside.

    `run()` starts one call and returns what to wait for. None where the profile has no kernels, as on a CPU.
    """
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            for _ in range(calls):
                out = run()
            jax.block_until_ready(out)
        kernels = _kernels_of_one_gpu(folder)
    if not kernels:
        return None
    ours = [(s, e) for name, s, e in kernels if _moves(name)]
    others = [(s, e) for name, s, e in kernels if not _moves(name)]
    total, exposed = covered(ours), covered(ours + others) - covered(others)
    return {"communication_ms": total / calls / 1e6, "exposed_ms": exposed / calls / 1e6}


def _moves(name):
    return "nccl" in name.lower()


def _kernels_of_one_gpu(folder):
    """(name, start, end) in nanoseconds, of the first GPU's streams."""
    (path,) = pathlib.Path(folder).rglob("*.xplane.pb")
    found = collections.defaultdict(list)
    for plane in jax.profiler.ProfileData.from_file(str(path)).planes:
        if match := re.search(r"GPU:(\d+)", plane.name):
            for line in plane.lines:
                if "Stream" in line.name:
                    spans = ((e.name, e.start_ns, e.start_ns + e.duration_ns) for e in line.events)
                    found[int(match[1])] += spans
    return found[min(found)] if found else []


def covered(spans):
    """The length of the union of (start, end)."""
    total, until = 0, float("-inf")
    for start, end in sorted(spans):
        total += max(0, end - max(start, until))
        until = max(until, end)
    return total
