"""Leaf primitives: one shard, one fixed rank; a custom call on cuda, XLA operations elsewhere."""

from __future__ import annotations

import functools
import math

import jax
from jax import lax
from jax.experimental.xla_metadata import set_xla_metadata
from jax.extend.core import Primitive
from jax.interpreters import mlir
from jax.sharding import AbstractMesh

from .. import _ffi
from .mesh import result_type

NO_MESH = AbstractMesh((), ())

LEAVES: dict[str, Leaf] = {}
"""Every leaf by name; tests lower them to custom calls on other platforms."""


class Leaf:
    """A primitive with one lowering per platform.

    **Arguments:**

    - `name`: the primitive's.
    - `reference`: `(*arrays, **params) -> list of arrays`: XLA operations, the executable specification. It gives the
      result types and is the lowering for every platform but cuda.
    - `custom_call`: the same signature, in terms of `jax.ffi.ffi_call`: the lowering for cuda. None where XLA's own
      operations are meant on every platform.
    - `types`: `(*operand types, **params) -> result types`, where the reference does not give them.
    """

    def __init__(self, name, reference, custom_call=None, types=None):
        self.reference = reference
        self.custom_call = custom_call
        self.primitive = Primitive(name)
        self.primitive.multiple_results = True
        self.primitive.def_abstract_eval(types or self._types)
        self.primitive.def_impl(self._eager)
        self.lower_reference = _lowering(reference)
        mlir.register_lowering(self.primitive, self.lower_reference)
        if custom_call is not None:
            self.lower_custom_call = _lowering(custom_call)
            mlir.register_lowering(self.primitive, self._lower_cuda, platform="cuda")
        self._jitted = jax.jit(
            lambda *arrays, params: self.primitive.bind(*arrays, **dict(params)),
            static_argnames="params",
        )
        LEAVES[name] = self

    def __call__(self, *arrays, **params):
        return self.primitive.bind(*arrays, **params)

    def _eager(self, *arrays, **params):
        # Else the jitted function would bind this primitive again, and so on.
        with jax.disable_jit(False):
            return self._jitted(*arrays, params=tuple(sorted(params.items())))

    def _types(self, *operands, **params):
        shapes = tuple((t.shape, t.dtype) for t in operands)
        outs = self._shapes(shapes, tuple(sorted(params.items())))
        return [result_type(o.shape, o.dtype, operands) for o in outs]

    @functools.lru_cache(1024)  # noqa: B019 (leaves live as long as the module)
    def _shapes(self, operands, params):
        # Traced once per shape: tracing the reference each time would dominate the time to trace a model.
        with jax.sharding.use_abstract_mesh(NO_MESH):
            plain = [jax.ShapeDtypeStruct(*o) for o in operands]
            return jax.eval_shape(functools.partial(self.reference, **dict(params)), *plain)

    def _lower_cuda(self, ctx, *operands, **params):
        _ffi.require_cuda_kernels(self.primitive.name)
        return self.lower_custom_call(ctx, *operands, **params)


FLOPS_A_SECOND, BYTES_A_SECOND = 1.2e15, 3.3e12
"""What a Hopper GPU reaches, roughly, in FP8 products and in its memory."""


def timed_call(target, results, *, flops=0, **options):
    """`jax.ffi.ffi_call` that tells XLA about how long the call runs.

    XLA's scheduler puts collectives beside what hides them, and takes a custom call for 10 us unless `latency_metadata`
    says its nanoseconds (openxla/xla, latency_hiding_scheduler.cc). `flops`: operations of a product.
    """
    call = jax.ffi.ffi_call(target, results, **options)

    def run(*operands, **attributes):
        arrays = *operands, *results
        if not all(isinstance(n, int) for v in arrays for n in v.shape):
            return call(*operands, **attributes)  # symbolic shapes have no time
        nbytes = sum(math.prod(v.shape) * v.dtype.itemsize for v in arrays)
        seconds = max(flops / FLOPS_A_SECOND, nbytes / BYTES_A_SECOND)
        with set_xla_metadata(latency_metadata=str(math.ceil(1e9 * seconds))):
            return call(*operands, **attributes)

    return run


def once(y):
    """A result of a custom call that is both used and kept, as values: XLA then runs the call once.

    In a scan, XLA's dynamic-slice fusion (jax 0.10 to 0.11) lets a call write straight into the stack of what is kept
    for the backward pass, which is what one wants; but where the result has another use as well, it leaves a second
    call for that one. Behind a barrier the result is copied to the stack, which costs its bytes and not its products.
    """
    return lax.optimization_barrier(y)


def _lowering(function):
    """Lowering rule of a JAX function, outside of the caller's mesh.

    A partition function is lowered under the caller's `jax.set_mesh`; an explicit mesh there would put sharding
    annotations into code that is already per shard (jax 0.11, 0.12).
    """
    rule = mlir.lower_fun(function, multiple_results=True)

    def lower(ctx, *operands, **params):
        if any(not t.sharding.mesh.empty for t in ctx.avals_in):
            return rule(ctx, *operands, **params)
        with jax.sharding.use_abstract_mesh(NO_MESH):
            return rule(ctx, *operands, **params)

    return lower
