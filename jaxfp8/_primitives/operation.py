"""How operations compose with JAX: opaque to vmap and grad, transparent to everything else.

An `Operation` is one primitive that carries its own traced jaxpr as a parameter. JAX looks into jaxpr-valued
parameters, so it sees what the body needs (custom_partitioning wants the devices while lowering, names want remat
policies) without any registration in private tables.

- Batching adds the name of a dimension and binds again: no reshape, no loop.
- The JVP rule calls a custom_vjp function. Under `grad(vmap(f))` vmap is the inner transform, so the primitive is
  batched first and differentiated second: the weight gradient is one product over all tokens. Under `vmap(grad(f))`
  the kernels are batched: it then has a real batch dimension, as per-example gradients need.

Only public JAX modules.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive, jaxpr_as_fun
from jax.interpreters import ad, batching, mlir

from .call import Call
from .mesh import match_varying
from .once import undefined_tangents

# What validation computes in an operation's place: (operation, arrays, call) -> results, or None for the operation
# itself. Part of JAX's cache key, so that functions are traced anew inside.
stand_in = jax.make_user_context(default_value=None)


class Operation:
    """`body(*arrays, call=...) -> list of arrays`, as one primitive.

    **Arguments:**

    - `name`: the primitive's.
    - `body`: traced once per call and types; its jaxpr becomes a parameter.
    - `together`: groups of operand positions that are mapped together (data and its scales).
    - `derivative`: `(call, moving, *arrays) -> list of arrays`, which is differentiated instead of the body, with
      respect to the arrays at the positions `moving`. None: what uses a tangent of the result raises.
    - `function`: the public function that this error names; None is the primitive's name without its prefix.
    """

    def __init__(self, name, body, *, together=(), derivative=None, function=None):
        self.body = jax.jit(body, static_argnames="call")
        self.together = together
        self.derivative = derivative
        self.function = function or name.removeprefix("jaxfp8_")
        self.primitive = Primitive(name)
        self.primitive.multiple_results = True
        self.primitive.def_impl(lambda *arrays, call, jaxpr: self.body(*arrays, call=call))
        self.primitive.def_abstract_eval(lambda *_, call, jaxpr: jaxpr.out_avals)
        mlir.register_lowering(self.primitive, self._lower)
        batching.primitive_batchers[self.primitive] = self._batch
        ad.primitive_jvps[self.primitive] = self._undefined if derivative is None else self._jvp

    def __call__(self, *arrays, call: Call):
        if stand_in.value is not None:
            instead = stand_in.value(self, arrays, call)
            if instead is not None:
                return instead
        # In shard_map a weight that does not vary becomes one that does; transposing that cast sums its gradient.
        alike = match_varying(arrays)
        jaxpr = self.body.trace(*alike, call=call).jaxpr  # kept by jit: equal calls share one
        return self.primitive.bind(*alike, call=call, jaxpr=jaxpr)

    def _lower(self, ctx, *operands, call, jaxpr):
        return mlir.lower_fun(jaxpr_as_fun(jaxpr), multiple_results=True)(ctx, *operands)

    def _batch(self, arrays, axes, *, call, jaxpr):
        size = next(x.shape[a] for x, a in zip(arrays, axes, strict=True) if a is not None)
        mapped = [a is not None for a in axes]
        arrays = [
            x if a is None else jnp.moveaxis(x, a, 0) for x, a in zip(arrays, axes, strict=True)
        ]
        for group in self.together:
            group = [i for i in group if i < len(arrays)]  # optional operands come last
            if any(mapped[i] for i in group):
                for i in group:
                    if not mapped[i]:
                        arrays[i] = jnp.broadcast_to(arrays[i], (size, *arrays[i].shape))
                        mapped[i] = True
        outs = self(*arrays, call=call.batched(mapped))
        return outs, [0] * len(outs)

    def _undefined(self, primals, tangents, *, call, jaxpr):
        results = self(*primals, call=call)
        message = (
            f"{self.function}: quantization and products of quantized arrays have no derivative. Differentiate linear, "
            "dot_general, einsum, ragged_dot or mlp, or pass straight through: "
            "x + jax.lax.stop_gradient(jaxfp8.quantize(x).dequantize() - x)"
        )
        return results, undefined_tangents(tangents, results, message)

    def _jvp(self, primals, tangents, *, call, jaxpr):
        # Integer operands have no tangent; differentiate only what moves.
        moving = [i for i, t in enumerate(tangents) if type(t) is not ad.Zero]

        def f(*xs):
            arrays = list(primals)
            for i, x in zip(moving, xs, strict=True):
                arrays[i] = x
            return self.derivative(call, moving, *arrays)

        return jax.jvp(f, [primals[i] for i in moving], [tangents[i] for i in moving])
