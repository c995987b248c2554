"""Changes how the leaf primitives lower on the CPU, for tests that run or read other lowerings."""

import contextlib

import jax
from jax.interpreters import mlir

import jaxfp8.kernels.activation
import jaxfp8.kernels.gather
import jaxfp8.kernels.gemm
import jaxfp8.kernels.grouped_gemm
import jaxfp8.kernels.quantize
import jaxfp8.kernels.sum_rows  # noqa: F401  fills LEAVES, which jaxfp8 loads lazily
from jaxfp8._primitives.leaf import LEAVES

_choose = None
_registered: set[str] = set()


def _register(name, leaf):
    def lower(ctx, *operands, **params):
        rule = leaf.lower_reference if _choose is None else _choose(name, leaf)
        return rule(ctx, *operands, **params)

    mlir.register_lowering(leaf.primitive, lower, platform="cpu")


@contextlib.contextmanager
def leaves_lower_to(choose):
    """Inside, a leaf that is a custom call on CUDA lowers to `choose(name, leaf)` on the CPU."""
    global _choose
    for name, leaf in LEAVES.items():
        if leaf.custom_call is not None and name not in _registered:
            _register(name, leaf)
            _registered.add(name)
    previous, _choose = _choose, choose
    jax.clear_caches()
    try:
        yield
    finally:
        _choose = previous
        jax.clear_caches()
