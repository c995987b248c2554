"""What `jax.export` must be told of programs with FP8 operations.

JAX serializes a custom call only if somebody vouches that a later build still serves it under the same name. jaxfp8
does: the names carry a version (`jaxfp8_gemm_1d2d_v1`), and what a name means never changes. A change of operands,
layouts or attributes gets a new version, and the old one stays.
"""

from __future__ import annotations

import jax

from . import _ffi


def disabled_checks() -> list[jax.export.DisabledSafetyCheck]:
    """The safety checks to disable when a program with FP8 operations is exported for CUDA.

    For example, on a machine without a GPU:

        exported = jax.export.export(
            jax.jit(step), platforms=["cuda"], disabled_checks=jaxfp8.export.disabled_checks()
        )(*arguments)
        pathlib.Path("step.bin").write_bytes(exported.serialize())

    **Returns:** a check for each custom-call target of this build; other custom calls stay checked.
    """
    return [jax.export.DisabledSafetyCheck.custom_call(name) for name in _ffi.targets()]
