"""Running a jaxpr again with its chosen products replaced."""

from __future__ import annotations

import contextlib
import functools
import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend import source_info_util
from jax.extend.core import Literal as JaxprLiteral
from jax.extend.core.primitives import dot_general_p

from .._arrays.recipe import Recipe
from .candidate import Candidate
from .jaxprs import open_jaxpr, scan_counts
from .origins import Knowledge, Origin
from .plan import AutocastPlan, Found, Nested
from .planner import Planner
from .policy import AutocastPolicy
from .replacement import replacement


def _bind(eqn: Any, *operands: Any) -> list[Any]:
    return _as_is(eqn, operands)


@contextlib.contextmanager
def _context(eqn: Any):
    """The name scope, source line and context of an equation."""
    stack = source_info_util.current_name_stack() + eqn.source_info.name_stack
    with (
        source_info_util.user_context(eqn.source_info.traceback, name_stack=stack),
        eqn.ctx.manager,
    ):
        yield


def _as_is(eqn: Any, operands: Sequence[Any]) -> list[Any]:
    """The results of an equation, as jax.core.eval_jaxpr has them."""
    with _context(eqn):
        out = eqn.primitive.bind(*operands, **eqn.primitive.get_bind_params(eqn.params))
    return list(out) if eqn.primitive.multiple_results else [out]


def _signature(plan: AutocastPlan) -> Any:
    """What decides how a jaxpr is rewritten."""
    return tuple(
        (i.index, i.product.weight, i.product.role, i.product.reason)
        if isinstance(i, Found)
        else (i.index, tuple((key, _signature(inner)) for key, inner in i.bodies))
        for i in plan.items
    )


class Rewriter:
    """Runs jaxprs with the chosen products replaced.

    `rewritten` keeps jaxprs from one call to the next, so that JAX compiles them once: only of calls with arrays, since
    no tracer may outlive its trace.
    """

    def __init__(
        self,
        knowledge: Knowledge,
        policy: AutocastPolicy,
        recipe: Recipe,
        rewritten: dict[Any, tuple[Any, Any, Sequence[Any]]] | None = None,
    ):
        self.knowledge, self.policy, self.recipe = knowledge, policy, recipe
        self._rewritten = {} if rewritten is None else rewritten

    def planner(self, *, backward: bool = False) -> Planner:
        """A planner that shares what is known of the leaves."""
        return Planner(self.knowledge, self.policy.judge, self.policy.weight, backward=backward)

    def run(self, jaxpr: Any, plan: AutocastPlan, arrays: Sequence[Any]) -> list[Any]:
        """The results of a jaxpr, open or closed."""
        jaxpr, consts = open_jaxpr(jaxpr)
        values = dict(zip(jaxpr.constvars, consts, strict=True))
        values.update(zip(jaxpr.invars, arrays, strict=True))

        def read(atom):
            return atom.val if isinstance(atom, JaxprLiteral) else values[atom]

        items = {item.index: item for item in plan.items}
        for i, eqn in enumerate(jaxpr.eqns):
            operands = [read(v) for v in eqn.invars]
            item = items.get(i)
            if isinstance(item, Found):
                outs = self._product(eqn, item.product, operands)
            elif isinstance(item, Nested) and item.fp8:
                outs = self._nested(eqn, item, operands)
            else:
                outs = _as_is(eqn, operands)
            values.update(zip(eqn.outvars, outs, strict=True))
        return [read(v) for v in jaxpr.outvars]

    # ---- products --------------------------------------------------------------------------------

    def _product(self, eqn, product: Candidate, operands) -> list[Any]:
        if product.reason:
            with jax.named_scope(kept_scope(product.reason)):
                return _as_is(eqn, operands)
        with _context(eqn), jax.named_scope(fp8_scope(product.weight_path)):
            return [replacement(eqn, product, operands, self.recipe)]

    # ---- equations with jaxprs -------------------------------------------------------------------

    def _nested(self, eqn, item: Nested, operands) -> list[Any]:
        name = eqn.primitive.name
        plans = dict(item.bodies)
        special = {
            "scan": self._scan,
            "while": self._while,
            "cond": self._cond,
            "shard_map": self._shard_map,
            "custom_jvp_call": self._custom_jvp,
            "custom_vjp_call": self._custom_vjp,
        }
        if name in special:
            with _context(eqn):
                return special[name](eqn, item, plans, operands)
        ((key, _), plan), *_ = item.bodies
        old = eqn.params[key]
        new, constants = self._rewrite(old, plan, operands)
        params = {**eqn.params, key: new}
        if params.get("policy") is not None:
            params["policy"] = checkpoint_policy(params["policy"])
        # Constants of an open jaxpr become operands; any variables will do for them.
        variables = new.invars[: len(constants)] if constants else []
        eqn = eqn.replace(params=params, invars=[*variables, *eqn.invars])
        return _as_is(eqn, [*constants, *operands])

    def _rewrite(self, old: Any, plan: AutocastPlan, operands) -> tuple[Any, Sequence[Any]]:
        """A jaxpr with products replaced, closed if the old one is; an open one takes the constants first."""
        key = (id(open_jaxpr(old)[0]), _signature(plan), self.recipe)
        found = self._rewritten.get(key)
        if found is None:
            new = jax.make_jaxpr(lambda *xs: self.run(old, plan, xs))(*operands)
            constants: Sequence[Any] = ()
            if not hasattr(old, "consts"):
                jaxpr, constants = new.jaxpr, new.consts
                new = jaxpr.replace(constvars=[], invars=[*jaxpr.constvars, *jaxpr.invars])
            # The old one lives as long, so that its id stays its own.
            found = self._rewritten[key] = (old, new, constants)
        return found[1:]

    def _scan(self, eqn, item, plans, operands):
        params = eqn.params
        jaxpr, plan = params["jaxpr"], plans[("jaxpr", 0)]
        a, count = scan_counts(eqn)
        b = a + count
        consts = operands[:a]

        def body(carry, xs):
            outs = self.run(jaxpr, plan, [*consts, *carry, *xs])
            return outs[: len(carry)], outs[len(carry) :]

        how = {name: params[name] for name in ("length", "reverse", "unroll")}
        carry, ys = jax.lax.scan(body, operands[a:b], operands[b:], **how)
        return [*carry, *ys]

    def _while(self, eqn, item, plans, operands):
        params = eqn.params
        a = params["cond_nconsts"]
        b = a + params["body_nconsts"]
        condition, step = (plans[(k, 0)] for k in ("cond_jaxpr", "body_jaxpr"))
        return jax.lax.while_loop(
            lambda carry: self.run(params["cond_jaxpr"], condition, [*operands[:a], *carry])[0],
            lambda carry: self.run(params["body_jaxpr"], step, [*operands[a:b], *carry]),
            operands[b:],
        )

    def _cond(self, eqn, item, plans, operands):
        index, *operands = operands

        def branch(i, jaxpr):
            return lambda *xs: self.run(jaxpr, plans[("branches", i)], xs)

        branches = [branch(i, jaxpr) for i, jaxpr in enumerate(eqn.params["branches"])]
        return jax.lax.switch(index, branches, *operands)

    def _shard_map(self, eqn, item, plans, operands):
        params, plan = eqn.params, plans[("jaxpr", 0)]
        return jax.shard_map(
            lambda *xs: tuple(self.run(params["jaxpr"], plan, xs)),
            mesh=params["mesh"],
            in_specs=tuple(params["in_specs"]),
            out_specs=tuple(params["out_specs"]),
            axis_names=set(params.get("newly_manual_axes", params.get("manual_axes"))),
            check_vma=params["check_vma"],
        )(*operands)

    # ---- custom rules ----------------------------------------------------------------------------

    def _trace_rule(self, rule, arrays, origins, *, backward=False):
        """A derivative rule with its products replaced: results as a pytree, and where they come from."""
        closed, shapes = jax.make_jaxpr(rule, return_shape=True)(*arrays)
        plan, outs = self.planner(backward=backward).plan(closed, origins)
        results = self.run(closed, plan, jax.tree.leaves(arrays))
        return jax.tree.unflatten(jax.tree.structure(shapes), results), outs

    def _custom_jvp(self, eqn, item, plans, operands):
        (plan,) = plans.values()
        original = functools.partial(_bind, eqn)
        f = jax.custom_jvp(lambda *xs: self.run(eqn.params["call_jaxpr"], plan, xs))

        @f.defjvp
        def rule(primals, tangents):
            moving = [i for i, t in enumerate(tangents) if t.dtype != jax.dtypes.float0]

            def pushed(primals, moved):
                all_tangents = list(tangents)
                for i, t in zip(moving, moved, strict=True):
                    all_tangents[i] = t
                return jax.jvp(original, primals, tuple(all_tangents))

            origins = [*item.operands, *[Origin("data", tangent=True)] * len(moving)]
            moved = tuple(tangents[i] for i in moving)
            return self._trace_rule(pushed, (primals, moved), origins)[0]

        return f(*operands)

    def _custom_vjp(self, eqn, item, plans, operands):
        (plan,) = plans.values()
        original = functools.partial(_bind, eqn)
        floats = [i for i, v in enumerate(eqn.invars) if _differentiable(v.aval)]
        f = jax.custom_vjp(lambda *xs: self.run(eqn.params["call_jaxpr"], plan, xs))
        residual_origins: list[Origin] = []

        def forward(*xs):
            (ys, pull), outs = self._trace_rule(
                lambda *xs: jax.vjp(original, *xs), xs, item.operands
            )
            residual_origins[:] = outs[len(ys) :]
            return ys, pull

        def backward(pull, cotangents):
            flowing = [i for i, c in enumerate(cotangents) if c.dtype != jax.dtypes.float0]

            def pulled(pull, flows):
                every = list(cotangents)
                for i, c in zip(flowing, flows, strict=True):
                    every[i] = c
                back = pull(every)
                return [back[i] for i in floats]

            flows = [cotangents[i] for i in flowing]
            origins = [*residual_origins, *[Origin("gradient")] * len(flows)]
            back, _ = self._trace_rule(pulled, (pull, flows), origins, backward=True)
            every = [None] * len(operands)
            for i, c in zip(floats, back, strict=True):
                every[i] = c
            return tuple(every)

        f.defvjp(forward, backward)
        return f(*operands)


def _differentiable(aval: Any) -> bool:
    return jnp.issubdtype(aval.dtype, jnp.inexact)


@functools.lru_cache(maxsize=256)
def checkpoint_policy(policy: Callable[..., Any]) -> Callable[..., Any]:
    """A remat policy that takes our products for the dots that they replace."""

    def decide(primitive, *avals, **params):
        if primitive.name not in ("jaxfp8_gemm", "jaxfp8_grouped_gemm"):
            return policy(primitive, *avals, **params)
        call = params["call"]
        lhs, rhs, (out,) = call.ins[0], call.ins[2], call.outs
        shared = [d for d in lhs if d in rhs]
        numbers = tuple(
            tuple(tuple(dims.index(d) for d in ds) for dims in (lhs, rhs))
            for ds in ([d for d in shared if d not in out], [d for d in shared if d in out])
        )
        return policy(
            dot_general_p,
            avals[0],
            avals[2],
            dimension_numbers=numbers,
            precision=None,
            preferred_element_type=call.get("out_dtype"),
            out_sharding=None,
        )

    return decide


KEPT_SCOPE, FP8_SCOPE = "jaxfp8.kept", "jaxfp8.fp8"
"""Name scopes of products that autocast left alone (with the reason) and chose (with the weight's path)."""


def kept_scope(reason: str) -> str:
    """The name scope of a product that autocast left alone."""
    return f"{KEPT_SCOPE}[{re.sub(r'[/()]+', ' ', reason)}]"


def fp8_scope(weight_path: str) -> str:
    """The name scope of a product that autocast chose: profiles show whose it is."""
    names = [n for n in re.split(r"[.\[\]'\"/()]+", weight_path) if n]
    if names and names[-1] == "value":  # of an nnx variable
        names.pop()
    return f"{FP8_SCOPE}[{'.'.join(names)}]" if names else FP8_SCOPE
