"""autocast: the products of any JAX function in FP8.

The function is traced, its products are found and judged (`planner`), and the program is run again with the chosen
products replaced by this package's operations. Jaxprs inside it (jit, scan, while, cond, remat, custom rules,
shard_map) are rewritten in place, so that what surrounds a product keeps its meaning.
"""

from __future__ import annotations

import functools
import inspect
from typing import Any

import jax

from .._arrays.recipe import current_recipe
from .policy import AutocastPolicy
from .rewriter import Rewriter
from .traced import Traced

KEPT_JAXPRS = 256
"""How many rewritten jaxprs a function keeps between calls."""


def autocast(fn: Any = None, *, policy: AutocastPolicy | None = None) -> Any:
    """`fn` with its large products in FP8, whatever framework it is written in.

    `dot_general` and `ragged_dot` with float operands become `jaxfp8.dot_general` and `jaxfp8.ragged_dot`, also inside
    jit, scan, while, cond, remat, custom_jvp and custom_vjp functions and shard_map. Everything else stays: the rest of
    the program, results' dtypes, custom rules, remat policies (which take the new products for dots). Embeddings,
    heads, routers, attention's own products and small products are left alone; `jaxfp8.explain` gives the reasons.

        loss = jaxfp8.autocast(loss)                     # then jax.jit, jax.grad ... as ever
        y = jaxfp8.autocast(model)(x)                    # an eqx.Module, an nnx.Module, model.apply, a method

        @jaxfp8.autocast(policy=jaxfp8.AutocastPolicy(exclude=("attention.*",)))
        def forward(params, x): ...

    Differentiate the result (`jax.grad(jaxfp8.autocast(loss))`): the backward pass then reuses what the forward pass
    quantized. Where `fn` differentiates by itself, such as a train step, the gradients' products become FP8 too, with
    the same numerics, each quantizing its operands anew; such a result has no second derivative.

    The wrapped function traces `fn` at every call, so put it under `jax.jit`. Shapes are those that `fn` sees: put
    `jax.vmap` inside, not around.

    **Arguments:**

    - `fn`: a function, or a callable pytree of arrays. Leaves of its arguments and results that are no arrays stay what
      they are. Omitted, the result is a decorator.
    - `policy`: a `jaxfp8.AutocastPolicy`; None is the default one.

    **Returns:** a function with the signature of `fn`.

    **Raises:** TypeError for a `fn` or `policy` of another kind; when called, what `fn` raises, and ValueError if it
    changes its arguments in place (the variables of nnx modules may change).
    """
    if policy is not None and not isinstance(policy, AutocastPolicy):
        raise TypeError(
            f"autocast: policy is {policy!r}; allowed: a jaxfp8.AutocastPolicy, or None"
        )
    if fn is None:
        return functools.partial(autocast, policy=policy)
    if not callable(fn):
        raise TypeError(f"autocast: fn is a {type(fn).__name__}; allowed: a function")
    in_force = policy or AutocastPolicy()

    kept: dict[Any, Any] = {}

    def wrapped(*args, **kwargs):
        recipe = current_recipe("autocast", in_force.recipe)
        traced = Traced(fn, args, kwargs, in_force)
        eager = not any(
            isinstance(x, jax.core.Tracer) for x in [*traced.arrays, *traced.jaxpr.consts]
        )
        if len(kept) > KEPT_JAXPRS:
            kept.clear()
        rewriter = Rewriter(traced.knowledge, in_force, recipe, kept if eager else None)
        plan, _ = rewriter.planner().plan(traced.jaxpr, traced.origins())
        return traced.result(rewriter.run(traced.jaxpr, plan, traced.arrays))

    if inspect.isroutine(fn):
        functools.update_wrapper(wrapped, fn)
    wrapped.autocast = (fn, in_force)  # type: ignore[attr-defined]
    return wrapped
