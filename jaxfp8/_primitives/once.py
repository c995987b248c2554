"""First derivatives only: what a second one meets.

FP8 products are differentiable once; quantizers, and products of quantized arrays, not at all. Their tangents exist, so
that `lax.stop_gradient` around them works (straight-through estimators, first-order meta-learning), but whoever
evaluates or transposes one gets an error in place of zeros.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

_undefined = Primitive("jaxfp8_undefined_tangent")
_undefined.multiple_results = True


def _refuse(*_, message, types):
    raise NotImplementedError(message)


def _batch_undefined(tangents, axes, *, message, types):
    size = next(t.shape[a] for t, a in zip(tangents, axes, strict=True) if a is not None)
    batched = tuple(t.update(shape=(size, *t.shape)) for t in types)
    return _undefined.bind(*tangents, message=message, types=batched), [0] * len(types)


_undefined.def_impl(_refuse)
_undefined.def_abstract_eval(lambda *_, message, types: list(types))
mlir.register_lowering(_undefined, _refuse)
ad.primitive_transposes[_undefined] = _refuse
batching.primitive_batchers[_undefined] = _batch_undefined


def undefined_tangents(tangents, results, message: str) -> list:
    """Tangents of `results`: zero if all `tangents` are, else ones that raise `message` where they are used."""
    moving = [t for t in tangents if type(t) is not ad.Zero]
    types = [jax.typeof(r).to_tangent_aval() for r in results]
    if not moving:
        return [ad.Zero(t) for t in types]
    # Integers have none; their tangent type is float0.
    inexact = [jnp.issubdtype(r.dtype, jnp.inexact) for r in results]
    some = tuple(t for t, i in zip(types, inexact, strict=True) if i)
    found = iter(_undefined.bind(*moving, message=message, types=some) if some else ())
    return [next(found) if i else ad.Zero(t) for t, i in zip(types, inexact, strict=True)]


_mark = Primitive("jaxfp8_differentiable_once")
_mark.multiple_results = True


def _mark_jvp(primals, tangents, *, count, message):
    results = _mark.bind(*primals, count=count, message=message)
    return results, undefined_tangents(tangents, results, message)


_mark.def_impl(lambda *xs, count, message: list(xs[:count]))
_mark.def_abstract_eval(lambda *ts, count, message: list(ts[:count]))
mlir.register_lowering(_mark, lambda ctx, *xs, count, message: list(xs[:count]))
batching.primitive_batchers[_mark] = lambda xs, axes, *, count, message: (
    _mark.bind(*xs, count=count, message=message),
    axes[:count],
)
ad.primitive_jvps[_mark] = _mark_jvp


def _marked(results, inputs, message: str):
    """`results`, each of whose floating-point arrays depends on all `inputs` as far as derivatives know.

    Quantized arrays are integers to JAX (uint8 residuals) or come from elsewhere (prequantized weights): without the
    mark a second derivative through them would be zero.
    """
    arrays = [x for x in jax.tree.leaves(inputs) if isinstance(x, jax.Array | np.ndarray)]
    inputs = [x for x in arrays if jnp.issubdtype(x.dtype, jnp.inexact)]

    def one(x):
        if not jnp.issubdtype(x.dtype, jnp.inexact):
            return x
        return _mark.bind(x, *inputs, count=1, message=message)[0]

    return jax.tree.map(one, results)


def _stopped(inputs):
    """`inputs` without tangents; what is no array stays."""

    def one(x):
        return jax.lax.stop_gradient(x) if isinstance(x, jax.Array) else x

    return jax.tree.map(one, inputs)


def differentiable_once(functions: str, fwd, bwd):
    """The pair for `defvjp` of a custom_vjp function, whatever its arguments are.

    **Arguments:**

    - `functions`: the public functions that it serves, for the error.
    - `fwd`, `bwd`: as for `defvjp`.
    """
    message = (
        f"{functions}: FP8 products have first derivatives only. Where a second one is meant, give this product to "
        "jax.numpy (autocast: a policy that keeps it); where it is not, put jax.lax.stop_gradient around the first"
    )

    def marked(rule):
        # Inside, nothing has a tangent: else an inner primitive would raise first, and under its own name.
        return lambda *arguments: _marked(rule(*_stopped(arguments)), arguments, message)

    return marked(fwd), marked(bwd)


def first_derivative(functions: str, body, fwd, bwd):
    """The derivative of an `Operation`: `(call, moving, *arrays) -> list of arrays`, differentiable once.

    `moving` holds the positions of the arrays whose gradients may be asked for. What only others' gradients need is
    neither computed nor kept: XLA drops neither one result of a kernel that has two nor all that a loop stacks.

    **Arguments:**

    - `functions`: the public functions that it serves, for the error.
    - `body`: the operation's: `(*arrays, call=...)`.
    - `fwd`: `(call, types, moving, *arrays) -> (results, residuals)`; `types` are the arrays'.
    - `bwd`: `(call, types, moving, residuals, cotangents)`, with every array's gradient; None where none is asked for.
    """

    @functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
    def function(call, types, moving, *arrays):
        return body(*arrays, call=call)

    function.defvjp(*differentiable_once(functions, fwd, bwd))

    def derivative(call, moving, *arrays):
        return function(call, tuple(map(jax.typeof, arrays)), frozenset(moving), *arrays)

    return derivative
