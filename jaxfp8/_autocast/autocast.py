"""autocast: the products of any JAX function in FP8.

The function is traced, its products are found and judged (`_products`), and the program is run again with the chosen
products replaced by this package's operations. Jaxprs inside it (jit, scan, while, cond, remat, custom rules,
shard_map) are rewritten in place, so that what surrounds a product keeps its meaning.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import inspect
import math
import re
import sys
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import source_info_util
from jax.extend.core import Literal as JaxprLiteral
from jax.extend.core.primitives import dot_general_p

from .._arrays import checks
from .._arrays.recipe import Recipe, current_recipe
from .._primitives.mesh import full_spec, place
from ..kernels import quantize as qt
from ..kernels.gemm import product as gemm_product
from ..kernels.grouped_gemm import grouped_gemm, grouped_wgrad_gemm
from ..kernels.quantize import quantize, quantize_both, quantize_weight
from ..ops.dot_general import dot_general
from ..ops.ragged_dot import ragged_dot
from . import planner as prods
from .planner import Candidate, Facts, Found, Knowledge, Leaf, Nested, Plan, Planner

EMBEDDING_NAMES = (r".*embed.*", r"wte", r"wpe")
HEAD_NAMES = (r"(\w+_)?lm_?head", r"head(_?\d+)?", r"(\w+_)?logits?(_\w+)?", r"classifier(_?\d+)?")
ROUTER_NAMES = (r"\w*router\w*", r"\w*routing\w*", r"gating(_\w+)?", r"gate_?logits?")


@dataclasses.dataclass(frozen=True)
class AutocastPolicy:
    """Which products `jaxfp8.autocast` runs in FP8.

    A product is judged by the first of these that has an opinion:

    1. Whether an FP8 operation exists for it at all: float operands, default precision, and one operand that does not
       vary with the batch (or a weight gradient). What remains, as attention's products of activations, is never FP8.
    2. `predicate`.
    3. `exclude`, then `include`.
    4. The rules for embeddings, heads and routers.
    5. The sizes.

    **Arguments:**

    - `recipe`: a `jaxfp8.Recipe`; None takes the one in force where the function is called.
    - `min_m`, `min_n`, `min_k`: least rows of the activation, columns of the weight and length of the contraction. In
      a weight gradient, rows and columns of the result and tokens.
    - `include`: regular expressions. If there are any, only products with a matching name are chosen, whatever their
      size.
    - `exclude`: regular expressions of products that are left alone.
    - `embeddings`: run products that look up or undo an embedding: a one-hot operand, a weight that is also gathered
      from, or a name such as `embed_tokens`.
    - `heads`: run products whose results are ranked or normalized across features (a softmax, argmax or top_k follows:
      the logits of a head or of a router), or with a name such as `lm_head` or `router`.
    - `predicate`: `(Candidate) -> bool | None`; None leaves the product to the other rules.
    - `weight`: which operand is the weight (128x128 blocks): `"lhs"`, `"rhs"`, or `"infer"`: the one that does not vary
      with the batch.
    - `weight_argnums`: the function's arguments that hold weights; all its other arguments then vary with the batch.
      None infers it: integers, booleans and keys vary, and what else does is learnt from the products in program
      order. A function that is itself a pytree with arrays (an `eqx.Module`, an `nnx.Module`, or a method of one)
      holds weights.

    Names are the components of a product's name scopes and of its weight's path in the arguments; a pattern matches a
    whole component, in either case.

    **Raises:** TypeError or ValueError for anything else.
    """

    recipe: Recipe | None = None
    min_m: int = 128
    min_n: int = 128
    min_k: int = 128
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    embeddings: bool = False
    heads: bool = False
    predicate: Callable[[Candidate], bool | None] | None = None
    weight: Literal["infer", "lhs", "rhs"] = "infer"
    weight_argnums: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        put = object.__setattr__
        if self.recipe is not None and not isinstance(self.recipe, Recipe):
            raise TypeError(
                f"AutocastPolicy: recipe is {self.recipe!r}; allowed: a jaxfp8.Recipe, or None"
            )
        for name in ("min_m", "min_n", "min_k"):
            put(self, name, _natural(name, getattr(self, name)))
        for name in ("include", "exclude"):
            put(self, name, _patterns(name, getattr(self, name)))
        for name in ("embeddings", "heads"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(
                    f"AutocastPolicy: {name} is {getattr(self, name)!r}; allowed: True or False"
                )
        if self.predicate is not None and not callable(self.predicate):
            raise TypeError(
                f"AutocastPolicy: predicate is {self.predicate!r}; allowed: a function of a Candidate, or None"
            )
        if self.weight not in ("infer", "lhs", "rhs"):
            raise ValueError(
                f"AutocastPolicy: weight is {self.weight!r}; allowed: 'infer', 'lhs', 'rhs'"
            )
        if self.weight_argnums is not None:
            nums = self.weight_argnums
            nums = nums if isinstance(nums, (tuple, list)) else (nums,)
            put(self, "weight_argnums", tuple(_natural("weight_argnums", n) for n in nums))

    def __repr__(self) -> str:
        fields = [f for f in dataclasses.fields(self) if getattr(self, f.name) != f.default]
        return f"AutocastPolicy({', '.join(f'{f.name}={getattr(self, f.name)!r}' for f in fields)})"

    def judge(self, product: Candidate, facts: Facts) -> str:
        """Why a product that could run in FP8 does not; empty if it does."""
        if self.predicate is not None:
            verdict = self.predicate(product)
            if verdict is not None:
                return "" if verdict else "predicate"
        if name := prods.judge_scope_names(product, self.exclude):
            return f"excluded by name: {name}"
        if self.include:
            included = prods.judge_scope_names(product, self.include)
            return "" if included else "not included by name"
        if reason := self._special(product, facts):
            return reason
        for name in ("m", "n", "k"):
            size, least = getattr(product, name), getattr(self, f"min_{name}")
            if size < least:
                return f"size: {name.upper()}={size} is below {least}"
        return ""

    def _special(self, product: Candidate, facts: Facts) -> str:
        named = functools.partial(prods.judge_scope_names, product)
        if not self.embeddings:
            if facts.one_hot:
                return "embedding: an operand is one-hot"
            if facts.table:
                return "embedding: the weight is also gathered from"
            if name := named(EMBEDDING_NAMES):
                return f"embedding by name: {name}"
        if not self.heads:
            if facts.logits:
                return "head or router: its result is ranked or normalized across features"
            if name := named(HEAD_NAMES):
                return f"head by name: {name}"
            if name := named(ROUTER_NAMES):
                return f"router by name: {name}"
        if facts.of_excluded:
            return "a gradient of an embedding, head or router"
        return ""


def _natural(name: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
        raise TypeError(f"AutocastPolicy: {name} is {value!r}; allowed: a non-negative int")
    if value < 0:
        raise ValueError(f"AutocastPolicy: {name} is {value}; allowed: a non-negative int")
    return int(value)


def _patterns(name: str, patterns: Any) -> tuple[str, ...]:
    patterns = (patterns,) if isinstance(patterns, str) else tuple(patterns)
    for p in patterns:
        try:
            re.compile(p)
        except (re.error, TypeError) as error:
            raise ValueError(
                f"AutocastPolicy: {name} has {p!r}; allowed: regular expressions ({error})"
            ) from None
    return patterns


# ------------------------------------------------------------------------------------------------
# Calling a function as a program of its arrays
# ------------------------------------------------------------------------------------------------


def _is_array(leaf: Any) -> bool:
    return isinstance(leaf, (jax.Array, np.ndarray, np.generic)) and leaf.dtype != object


def _owner(fn: Any) -> tuple[Any, Callable[..., Any]]:
    """A pytree of arrays that the function belongs to, and how to call another one like it."""
    if inspect.ismethod(fn) and any(map(_is_array, jax.tree.leaves(fn.__self__))):
        name = fn.__func__
        return fn.__self__, lambda owner, *args, **kwargs: name(owner, *args, **kwargs)
    if not inspect.isroutine(fn) and any(map(_is_array, jax.tree.leaves(fn))):
        return fn, lambda owner, *args, **kwargs: owner(*args, **kwargs)
    return None, lambda owner, *args, **kwargs: fn(*args, **kwargs)


def _argument_names(fn: Any, count: int) -> list[str]:
    try:
        parameters = list(inspect.signature(fn).parameters.values())
    except (TypeError, ValueError):
        parameters = []
    names = [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)][
        :count
    ]
    return names + [f"args[{i}]" for i in range(len(names), count)]


class Traced:
    """A call of a function, as a jaxpr of the arrays among its arguments.

    Leaves that are no arrays (flags, functions, strings) stay what they are, in arguments and results.
    """

    def __init__(
        self, fn: Any, args: tuple, kwargs: dict, policy: AutocastPolicy, *, abstract: bool = False
    ):
        kinds = (jax.ShapeDtypeStruct,) if abstract else ()
        self.owner, call = _owner(fn)
        everything = (self.owner, args, kwargs)
        paths, tree = jax.tree_util.tree_flatten_with_path(everything)
        leaves = [leaf for _, leaf in paths]
        where = [i for i, x in enumerate(leaves) if _is_array(x) or isinstance(x, kinds)]
        self.arrays = [leaves[i] for i in where]
        self._everything = everything
        self._paths = [p for p, _ in paths]
        self._tree, self._leaves, self._where = tree, leaves, where
        static_out: dict[str, Any] = {}
        same_structure: Any = tree

        def run(arrays):
            filled = self._fill(arrays)
            owner, xs, ks = jax.tree.unflatten(tree, filled)
            out, out_tree = jax.tree.flatten(call(owner, *xs, **ks))
            after, after_tree = jax.tree.flatten((owner, xs, ks))
            if after_tree != same_structure:
                raise ValueError(
                    "autocast: the function changes the structure of its arguments; allowed: pure functions, and "
                    "nnx modules whose variables get new values"
                )
            changed = [i for i in where if after[i] is not filled[i]]
            keep = [i for i, leaf in enumerate(out) if _is_array(leaf)]
            static_out.update(out=out, tree=out_tree, keep=keep, changed=changed)
            return [out[i] for i in keep], [after[i] for i in changed]

        self.jaxpr = jax.make_jaxpr(run)(self.arrays)
        self._out = static_out
        self._out["out"] = [None if _is_array(leaf) else leaf for leaf in static_out["out"]]
        self.knowledge = self._knowledge(fn, args, policy)

    def _fill(self, arrays):
        leaves = list(self._leaves)
        for i, x in zip(self._where, arrays, strict=True):
            leaves[i] = x
        return leaves

    def _knowledge(self, fn, args, policy) -> Knowledge:
        names = _argument_names(fn, len(args))
        nums = policy.weight_argnums
        if nums is not None and any(n >= len(args) for n in nums):
            raise ValueError(
                f"autocast: weight_argnums is {nums}, but the function is called with {len(args)} positional arguments"
            )
        leaves, varying = [], set()
        for i, position in enumerate(self._where):
            kind, *rest = self._paths[position]
            text = jax.tree_util.keystr(tuple(rest))
            of_owner = kind.idx == 0
            if kind.idx == 1:
                text = names[rest[0].idx] + jax.tree_util.keystr(tuple(rest[1:]))
            elif kind.idx == 2:
                text = str(rest[0].key) + jax.tree_util.keystr(tuple(rest[1:]))
            leaves.append(Leaf(text.removeprefix("."), constant=of_owner))
            given = nums is not None and not of_owner
            if prods.is_data(self.arrays[i]) or (
                given and not (kind.idx == 1 and rest[0].idx in nums)
            ):
                varying.add(i)
        return Knowledge(leaves, varying, given=nums is not None)

    def argument(self, i: int) -> int | None:
        """The position of the argument that the i-th array is in."""
        kind, *rest = self._paths[self._where[i]]
        return rest[0].idx if kind.idx == 1 else None

    def origins(self) -> list[prods.Origin]:
        """Origins of the jaxpr's inputs."""
        return [prods.Origin(frozenset({i})) for i in range(len(self.arrays))]

    def result(self, arrays: Sequence[Any]) -> Any:
        """The function's result from the jaxpr's; nnx variables that it changed get their new values."""
        out, changed = self._out, self._out["changed"]
        count = len(arrays) - len(changed)
        if changed:
            leaves = list(self._leaves)
            for i, x in zip(changed, arrays[count:], strict=True):
                leaves[i] = x
            places = {i: self.knowledge.leaves[self._where.index(i)].path for i in changed}
            _update_modules(self._everything, leaves, places)
        leaves = list(out["out"])
        for i, x in zip(out["keep"], arrays[:count], strict=True):
            leaves[i] = x
        return jax.tree.unflatten(out["tree"], leaves)


def _update_modules(everything: Any, leaves: Sequence[Any], changed: dict[int, str]) -> None:
    """Gives the nnx modules among the arguments the values that their copies got while the function was traced."""
    nnx = sys.modules.get("flax.nnx")
    start = 0
    is_module = (lambda x: isinstance(x, nnx.Module)) if nnx else None
    for node in jax.tree.leaves(everything, is_leaf=is_module):
        structure: Any = jax.tree.structure(node)
        stop = start + structure.num_leaves
        if inside := [i for i in changed if start <= i < stop]:
            if nnx is None or not isinstance(node, nnx.Module):
                raise ValueError(
                    f"autocast: the function changes {changed[inside[0]]} in place; allowed: pure functions, and nnx "
                    "modules whose variables get new values"
                )
            nnx.update(node, nnx.state(jax.tree.unflatten(structure, leaves[start:stop])))
        start = stop


# ------------------------------------------------------------------------------------------------
# Running a program with products replaced
# ------------------------------------------------------------------------------------------------


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


def _signature(plan: Plan) -> Any:
    """What decides how a jaxpr is rewritten."""
    return tuple(
        (i.index, i.product.weight, i.product.role, i.product.reason)
        if isinstance(i, Found)
        else (i.index, tuple((key, _signature(inner)) for key, inner in i.bodies))
        for i in plan.items
    )


class Rewriter:
    """Runs jaxprs with the chosen products replaced."""

    def __init__(self, knowledge: Knowledge, policy: AutocastPolicy, recipe: Recipe):
        self.knowledge, self.policy, self.recipe = knowledge, policy, recipe
        self._rewritten: dict[Any, tuple[Any, Any, Sequence[Any]]] = {}

    def planner(self, *, backward: bool = False) -> Planner:
        """A planner that shares what is known of the leaves."""
        return Planner(self.knowledge, self.policy.judge, self.policy.weight, backward=backward)

    def run(self, jaxpr: Any, plan: Plan, arrays: Sequence[Any]) -> list[Any]:
        """The results of a jaxpr, open or closed."""
        jaxpr, consts = prods.open_jaxpr(jaxpr)
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

    def _rewrite(self, old: Any, plan: Plan, operands) -> tuple[Any, Sequence[Any]]:
        """A jaxpr with products replaced, closed if the old one is; an open one takes the constants first."""
        key = (id(prods.open_jaxpr(old)[0]), _signature(plan))
        if key not in self._rewritten:
            new = jax.make_jaxpr(lambda *xs: self.run(old, plan, xs))(*operands)
            constants: Sequence[Any] = ()
            if not hasattr(old, "consts"):
                jaxpr, constants = new.jaxpr, new.consts
                new = jaxpr.replace(constvars=[], invars=[*jaxpr.constvars, *jaxpr.invars])
            # The old one lives as long, so that its id stays its own.
            self._rewritten[key] = (old, new, constants)
        _, new, constants = self._rewritten[key]
        return new, constants

    def _scan(self, eqn, item, plans, operands):
        params = eqn.params
        jaxpr, plan = params["jaxpr"], plans[("jaxpr", 0)]
        a, count = prods.scan_counts(eqn)
        b = a + count
        consts = operands[:a]

        def body(carry, xs):
            outs = self.run(jaxpr, plan, [*consts, *carry, *xs])
            return outs[: len(carry)], outs[len(carry) :]

        carry, ys = jax.lax.scan(
            body,
            operands[a:b],
            operands[b:],
            length=params["length"],
            reverse=params["reverse"],
            unroll=params["unroll"],
        )
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

            origins = [*item.operands, *[prods.Origin(frozenset(), tangent=True)] * len(moving)]
            moved = tuple(tangents[i] for i in moving)
            return self._trace_rule(pushed, (primals, moved), origins)[0]

        return f(*operands)

    def _custom_vjp(self, eqn, item, plans, operands):
        (plan,) = plans.values()
        original = functools.partial(_bind, eqn)
        floats = [i for i, v in enumerate(eqn.invars) if _differentiable(v.aval)]
        f = jax.custom_vjp(lambda *xs: self.run(eqn.params["call_jaxpr"], plan, xs))
        residual_origins: list[prods.Origin] = []

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

            cotangent = self.knowledge.add(Leaf("", constant=False))
            self.knowledge.varying.add(cotangent)
            flows = [cotangents[i] for i in flowing]
            origins = [*residual_origins, *[prods.Origin(frozenset({cotangent}))] * len(flows)]
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


# ------------------------------------------------------------------------------------------------
# What replaces a product
# ------------------------------------------------------------------------------------------------


def replacement(eqn: Any, product: Candidate, operands: Sequence[Any], recipe: Recipe) -> jax.Array:
    """The FP8 product of an equation's operands, in the equation's result type."""
    y = _product(eqn, product, operands, recipe)
    return place(y, full_spec(eqn.outvars[0].aval.sharding.spec, y.ndim))


def _product(eqn: Any, product: Candidate, operands: Sequence[Any], recipe: Recipe) -> jax.Array:
    if product.kind == "ragged_dot":
        return _ragged(product, operands, recipe)
    lhs, rhs = operands
    dims = prods.dimensions(eqn)
    sharding = eqn.params.get("out_sharding")
    if product.role == "weight gradient":
        return _weight_gradient(dims, lhs, rhs, product.out_dtype, recipe)
    if product.weight == "rhs":
        return _activation_first(product, dims, lhs, rhs, sharding, recipe)
    swapped = prods.Dims(*((right, left) for left, right in dims))
    batch, rows, columns = len(dims.batch[0]), len(dims.free[1]), len(dims.free[0])
    order = [*range(batch), *range(batch + rows, batch + rows + columns)]
    order += range(batch, batch + rows)
    if sharding is not None:
        sharding = _permuted(sharding, [order.index(i) for i in range(len(order))])
    y = _activation_first(product, swapped, rhs, lhs, sharding, recipe)
    return jnp.transpose(y, order)


def _permuted(sharding: Any, order: Sequence[int]) -> Any:
    spec = [*sharding.spec, *[None] * (len(order) - len(sharding.spec))]
    return jax.sharding.NamedSharding(
        sharding.mesh, jax.sharding.PartitionSpec(*(spec[i] for i in order))
    )


def _activation_first(product, dims, x, w, sharding, recipe) -> jax.Array:
    if product.role == "forward":
        return dot_general(
            x,
            w,
            (dims.contract, dims.batch),
            preferred_element_type=product.out_dtype,
            out_sharding=sharding,
            recipe=recipe,
        )
    # x is a cotangent: 1x128 in the gradient's format, while the weight keeps its own.
    batch = tuple(f"b{i}" for i in range(len(dims.batch[0])))
    rows = tuple(f"m{i}" for i in range(len(dims.free[0])))
    x_sizes, w_sizes = ([v.shape[a] for a in f] for v, f in ((x, dims.free[0]), (w, dims.free[1])))
    x = _arranged(x, [[a] for a in (*dims.batch[0], *dims.free[0])] + [dims.contract[0]])
    w = _arranged(w, [[a] for a in dims.batch[1]] + [dims.contract[1], dims.free[1]])
    weight, _ = qt.weight(w, (*batch, "k", "n"), qt.forward_format(recipe))
    y = gemm_product(
        qt.rows(x, (*batch, *rows, "k"), qt.gradient_format(recipe)),
        weight,
        (*batch, *rows, "n"),
        product.out_dtype,
        num_sms=recipe.num_sms,
    )
    return y.reshape(*x.shape[: len(batch)], *x_sizes, *w_sizes)


def _weight_gradient(dims, dy, x, out_dtype, recipe) -> jax.Array:
    """Both operands 1x128 along the tokens. JAX's transpose of a product puts the cotangent first."""
    tokens = tuple(f"t{i}" for i in range(len(dims.contract[0])))
    columns = [
        qt.columns(_arranged(v, [[a] for a in contract] + [free]), (*tokens, name), tokens, fmt)
        for v, contract, free, name, fmt in (
            (dy, dims.contract[0], dims.free[0], "n", qt.gradient_format(recipe)),
            (x, dims.contract[1], dims.free[1], "k", qt.forward_format(recipe)),
        )
    ]
    left, right = columns
    y = gemm_product(left, right, ("n", "k"), out_dtype, num_sms=recipe.num_sms)
    return y.reshape([v.shape[a] for v, f in ((dy, dims.free[0]), (x, dims.free[1])) for a in f])


def _arranged(x, groups: Sequence[Sequence[int]]) -> jax.Array:
    """x with each group of axes merged into one, in this order."""
    order = [a for group in groups for a in group]
    shape = [math.prod(x.shape[a] for a in group) for group in groups]
    return jnp.transpose(x, order).reshape(shape)


def _ragged(product: Candidate, operands, recipe: Recipe) -> jax.Array:
    lhs, rhs, sizes = operands
    if product.role == "forward":
        return ragged_dot(lhs, rhs, sizes, preferred_element_type=product.out_dtype, recipe=recipe)
    forward = {"dtype": recipe.dtype, "scale_format": recipe.scale_format}
    gradient = {"dtype": recipe.grad_dtype, "scale_format": recipe.backward_scale_format}
    out_dtype = product.out_dtype if product.out_dtype in checks.OUTPUT_DTYPES else jnp.float32
    common: dict[str, Any] = {"out_dtype": out_dtype, "num_sms": recipe.num_sms}
    if product.role == "input gradient":
        _, weight = quantize_weight(rhs, **forward)
        y = grouped_gemm(quantize(lhs, **gradient), weight, sizes, **common)
    else:
        _, x = quantize_both(lhs, group_sizes=sizes, **forward)
        _, dy = quantize_both(rhs, group_sizes=sizes, **gradient)
        y = grouped_wgrad_gemm(x, dy, sizes, **common)
    return y.astype(product.out_dtype)


# ------------------------------------------------------------------------------------------------
# Public function
# ------------------------------------------------------------------------------------------------


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

    def wrapped(*args, **kwargs):
        recipe = current_recipe("autocast", in_force.recipe)
        traced = Traced(fn, args, kwargs, in_force)
        rewriter = Rewriter(traced.knowledge, in_force, recipe)
        plan, _ = rewriter.planner().plan(traced.jaxpr, traced.origins())
        return traced.result(rewriter.run(traced.jaxpr, plan, traced.arrays))

    if inspect.isroutine(fn):
        functools.update_wrapper(wrapped, fn)
    wrapped.autocast = (fn, in_force)  # type: ignore[attr-defined]
    return wrapped
