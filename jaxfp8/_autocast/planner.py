"""Finds the products of a traced program and decides which of them run in FP8.

The program is walked once, forwards, through every jaxpr whose body autocast can rewrite. For each value it is known
which leaves of the function's inputs it depends on; from that follows which operand of a product varies with the batch
(the activation) and which does not (the weight). A walk backwards finds the values that are ranked or normalized across
features: logits.

Only public JAX modules; equations are recognized by their primitives' names, which all supported versions share.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend.core import Literal as JaxprLiteral

Kind = Literal["dot_general", "ragged_dot"]
Side = Literal["lhs", "rhs"]
Role = Literal["forward", "input gradient", "weight gradient"]

FLOAT_DTYPES = tuple(np.dtype(d) for d in (jnp.float32, jnp.bfloat16, jnp.float16))


@dataclasses.dataclass(frozen=True)
class Candidate:
    """One product of a traced function, as a policy sees it.

    **Arguments:**

    - `kind`: the JAX operation.
    - `scope`: name scopes around it, joined by `/`; `transpose(jvp(...))` where the function itself differentiates.
    - `weight_path`: where the weight comes from in the function's arguments, such as `params['dense']['kernel']`;
      empty if it is computed, or unknown.
    - `role`: `"forward"`, or which gradient it computes where the function itself differentiates.
    - `batch`, `m`, `n`, `k`: sizes of the batch (for `ragged_dot`: groups), of the activation's rows (for `ragged_dot`:
      of all groups together), of the weight's columns and of the contraction.
    - `lhs_shape`, `rhs_shape`, `lhs_dtype`, `rhs_dtype`, `out_dtype`: of the JAX operation.
    - `weight`: the operand that is the weight; None if both vary with the batch.
    - `repeats`: how often it runs in one call: the product of the lengths of the scans around it. None inside a
      `while_loop`.
    - `reason`: why it does not run in FP8; empty if it does.
    """

    kind: Kind
    scope: str
    weight_path: str
    role: Role
    batch: int
    m: int
    n: int
    k: int
    lhs_shape: tuple[int, ...]
    rhs_shape: tuple[int, ...]
    lhs_dtype: np.dtype
    rhs_dtype: np.dtype
    out_dtype: np.dtype
    weight: Side | None
    repeats: int | None = 1
    reason: str = ""

    @property
    def fp8(self) -> bool:
        """Whether it runs in FP8."""
        return not self.reason

    @property
    def flops(self) -> int:
        """Floating-point operations of one run: two for a multiply-add."""
        batch = 1 if self.kind == "ragged_dot" else self.batch
        return 2 * batch * self.m * self.n * self.k

    @property
    def names(self) -> tuple[str, ...]:
        """Components of the scope and of the weight's path, which a policy's patterns are matched with."""
        scope = re.split(r"[/()]+", self.scope)
        path = re.split(r"[.\[\]'\"/]+", self.weight_path)
        return tuple(n for n in (*scope, *path) if n and n not in ("jvp", "transpose", "vmap"))


# ------------------------------------------------------------------------------------------------
# Values: what they depend on
# ------------------------------------------------------------------------------------------------


class Leaf(NamedTuple):
    """An array that the function is given, or closes over."""

    path: str
    constant: bool  # closed over, not passed


class Origin(NamedTuple):
    """Where a value comes from."""

    leaves: frozenset[int]
    computed: bool = False  # a product is among its ancestors
    one_hot: bool = False  # booleans as numbers
    tangent: bool = False  # depends on a tangent


NOWHERE = Origin(frozenset())


def merge(origins: Iterable[Origin]) -> Origin:
    """Origin of a value that is computed from others."""
    origins = tuple(origins)
    if not origins:
        return NOWHERE
    return Origin(
        frozenset().union(*(o.leaves for o in origins)),
        any(o.computed for o in origins),
        False,
        any(o.tangent for o in origins),
    )


ELEMENTWISE_OR_SHAPE = frozenset(
    """convert_element_type reshape transpose broadcast_in_dim squeeze expand_dims slice copy copy_p rev
    sharding_constraint reshard pvary pcast reduce_precision name stop_gradient all_gather device_put""".split()
)
"""Under these, booleans as numbers stay what they are."""


@dataclasses.dataclass
class Knowledge:
    """What is known of the leaves; grows while a program is walked in its order.

    - `varying`: leaves that carry the batch.
    - `weights`: leaves that were a weight of a product.
    - `excluded`: leaves of weights whose product was kept as an embedding, a head or a router; their gradients are too.
    - `tables`: leaves from which rows are gathered.
    """

    leaves: list[Leaf]
    varying: set[int] = dataclasses.field(default_factory=set)
    weights: set[int] = dataclasses.field(default_factory=set)
    excluded: set[int] = dataclasses.field(default_factory=set)
    tables: set[int] = dataclasses.field(default_factory=set)
    given: bool = False  # which leaves vary was given, and is not learnt

    def add(self, leaf: Leaf) -> int:
        """The number of a new leaf."""
        self.leaves.append(leaf)
        return len(self.leaves) - 1

    def varies(self, origin: Origin) -> bool:
        """Whether a value varies with the batch."""
        return origin.tangent or not origin.leaves.isdisjoint(self.varying)

    def copy(self) -> Knowledge:
        """One that can grow by itself."""
        return dataclasses.replace(
            self,
            leaves=list(self.leaves),
            varying=set(self.varying),
            weights=set(self.weights),
            excluded=set(self.excluded),
            tables=set(self.tables),
        )

    def path(self, origin: Origin) -> str:
        """The path of the leaf a value comes from, if it is one."""
        return self.leaves[next(iter(origin.leaves))].path if len(origin.leaves) == 1 else ""

    def depth(self, leaf: int) -> int:
        """How deep in the arguments a leaf lies."""
        return len(re.findall(r"\.\w+|\[[^\]]*\]", self.leaves[leaf].path))

    def depths(self, origin: Origin) -> list[int]:
        """How deep in the arguments a value's leaves lie."""
        return [self.depth(i) for i in origin.leaves] or [0]

    def learn(self, activation: Origin, weight: Origin) -> None:
        """A product of an activation of which it was not known that it varies."""
        candidates = activation.leaves - self.weights - weight.leaves
        if len(candidates) > 1:  # parameters of layers before: not those
            least = min(self.depths(weight))
            candidates = frozenset(
                i for i in candidates if self.depth(i) < least and not self.leaves[i].constant
            )
        self.varying |= candidates

    def constant(self, origin: Origin) -> bool:
        """Whether a value comes from what the function closes over."""
        return all(self.leaves[i].constant for i in origin.leaves)


# ------------------------------------------------------------------------------------------------
# Jaxprs inside equations
# ------------------------------------------------------------------------------------------------


class Body(NamedTuple):
    """A jaxpr inside an equation.

    **Arguments:**

    - `key`: the parameter, and for cond the position of the branch.
    - `jaxpr`: open or closed.
    - `ins`: for each input of the jaxpr, the operand of the equation.
    - `repeats`: how often it runs; None: unknown.
    """

    key: tuple[str, int]
    jaxpr: Any
    ins: tuple[int, ...]
    repeats: int | None


def open_jaxpr(jaxpr: Any) -> tuple[Any, Sequence[Any]]:
    """A jaxpr and its constants."""
    return (jaxpr.jaxpr, jaxpr.consts) if hasattr(jaxpr, "consts") else (jaxpr, ())


def scan_counts(eqn: Any) -> tuple[int, int]:
    """How many constants and carried values a scan takes, before what it scans over."""
    params = eqn.params
    if "num_consts" in params:  # jax < 0.12
        return params["num_consts"], params["num_carry"]
    consts, carry, _ = params["ft_in"].unpack()
    return len(consts), len(carry)


_DIRECT = {
    "jit": "jaxpr",
    "pjit": "jaxpr",
    "closed_call": "call_jaxpr",
    "core_call": "call_jaxpr",
    "remat2": "jaxpr",
    "checkpoint": "jaxpr",
    "custom_jvp_call": "call_jaxpr",
    "custom_vjp_call": "call_jaxpr",
    "shard_map": "jaxpr",
}
"""Equations whose jaxpr takes the operands and gives the results, as they are."""

ENTERED = frozenset({*_DIRECT, "scan", "while", "cond"})


def bodies(eqn: Any) -> list[Body]:
    """The jaxprs of an equation that is entered."""
    name, params = eqn.primitive.name, eqn.params
    count = len(eqn.invars)
    if name in _DIRECT:
        key = _DIRECT[name]
        return [Body((key, 0), params[key], tuple(range(count)), 1)]
    if name == "scan":
        return [Body(("jaxpr", 0), params["jaxpr"], tuple(range(count)), params["length"])]
    if name == "while":
        a, b = params["cond_nconsts"], params["body_nconsts"]
        carry = tuple(range(a + b, count))
        return [
            Body(("cond_jaxpr", 0), params["cond_jaxpr"], (*range(a), *carry), None),
            Body(("body_jaxpr", 0), params["body_jaxpr"], (*range(a, a + b), *carry), None),
        ]
    if name == "cond":
        return [
            Body(("branches", i), b, tuple(range(1, count)), 1)
            for i, b in enumerate(params["branches"])
        ]
    return []


# ------------------------------------------------------------------------------------------------
# Backwards: logits
# ------------------------------------------------------------------------------------------------

Axes = frozenset
NONE: Axes = frozenset()

_RANKS = {"reduce_max": "axes", "argmax": "axes", "argmin": "axes"}
_UNARY = frozenset(
    """neg exp exp2 log log1p expm1 tanh logistic erf abs sign sqrt rsqrt integer_pow square convert_element_type copy
    copy_p stop_gradient name reduce_precision sharding_constraint reshard pvary pcast""".split()
)
_BINARY = frozenset("add sub mul div max min pow add_any".split())


class Logits:
    """Which axes of which values are ranked or normalized across: by top_k, argmax, sort or a softmax's maximum."""

    def __init__(self) -> None:
        self._kept: dict[tuple[int, tuple[Axes, ...]], tuple[dict[Any, Axes], list[Axes]]] = {}
        self._alive: list[Any] = []  # ids stay unique while their jaxprs live

    def inside(self, jaxpr: Any, outs: Sequence[Axes]) -> tuple[dict[Any, Axes], list[Axes]]:
        """(axes of each variable, axes of each input), given what happens to the results."""
        jaxpr, _ = open_jaxpr(jaxpr)
        key = (id(jaxpr), tuple(outs))
        if key not in self._kept:
            self._alive.append(jaxpr)
            self._kept[key] = self._walk(jaxpr, outs)
        return self._kept[key]

    def _walk(self, jaxpr, outs):
        axes: dict[Any, Axes] = {}
        spread = {  # what may be added or multiplied without hiding which values are ranked
            v
            for eqn in jaxpr.eqns
            if eqn.primitive.name == "broadcast_in_dim"
            and len(eqn.params["broadcast_dimensions"]) < len(eqn.params["shape"])
            for v in eqn.outvars
        }

        def put(atom, found):
            if found and not isinstance(atom, JaxprLiteral):
                axes[atom] = axes.get(atom, NONE) | found

        for atom, found in zip(jaxpr.outvars, outs, strict=True):
            put(atom, found)
        for eqn in reversed(jaxpr.eqns):
            self._step(eqn, [axes.get(v, NONE) for v in eqn.outvars], put, spread)
        return axes, [axes.get(v, NONE) for v in jaxpr.invars]

    def _step(self, eqn, outs, put, spread):
        name, params = eqn.primitive.name, eqn.params
        x: Any = eqn.invars[0] if eqn.invars else None
        if name in _RANKS:
            ranked = tuple(params[_RANKS[name]])
            if len(ranked) == 1:
                put(x, Axes(ranked))
        elif name == "top_k":
            put(x, Axes({params.get("axis", -1) % len(x.aval.shape)}))
        elif name == "sort":
            put(x, Axes({params["dimension"]}))
        if not any(outs):
            for body in bodies(eqn):  # a softmax inside
                _, ins = self.inside(body.jaxpr, [NONE] * len(open_jaxpr(body.jaxpr)[0].outvars))
                self._put_ins(eqn, body, ins, put)
            return
        out = outs[0]
        if name in _UNARY:
            put(x, out)
        elif name in _BINARY:
            for v, other in (eqn.invars, eqn.invars[::-1]):
                alone = isinstance(other, JaxprLiteral) or other in spread or not other.aval.shape
                if alone and v.aval.shape == eqn.outvars[0].aval.shape:
                    put(v, out)
        elif name == "select_n":
            for v in eqn.invars[1:]:
                put(v, out)
        elif name == "transpose":
            put(x, Axes(params["permutation"][a] for a in out))
        elif name == "broadcast_in_dim":
            dims = tuple(params["broadcast_dimensions"])
            put(x, Axes(dims.index(a) for a in out if a in dims))
        elif name == "reshape":
            put(x, Axes(_before_reshape(x.aval.shape, eqn.outvars[0].aval.shape, out)))
        elif name == "squeeze":
            kept = [i for i in range(len(x.aval.shape)) if i not in params["dimensions"]]
            put(x, Axes(kept[a] for a in out))
        elif name in ("slice", "dynamic_slice"):
            put(x, out)
        else:
            self._enter(eqn, outs, put)

    def _enter(self, eqn, outs, put):
        name = eqn.primitive.name
        for body in bodies(eqn):
            jaxpr, _ = open_jaxpr(body.jaxpr)
            if name == "scan":
                _, carry = scan_counts(eqn)
                inner = [*outs[:carry], *(Axes(a - 1 for a in o if a > 0) for o in outs[carry:])]
            elif len(outs) == len(jaxpr.outvars):
                inner = list(outs)
            else:  # the condition of a while loop
                inner = [NONE] * len(jaxpr.outvars)
            _, ins = self.inside(jaxpr, inner)
            self._put_ins(eqn, body, ins, put)

    @staticmethod
    def _put_ins(eqn, body, ins, put):
        first_x = len(eqn.invars)
        if eqn.primitive.name == "scan":
            first_x = sum(scan_counts(eqn))
        for position, found in zip(body.ins, ins, strict=True):
            stacked = position >= first_x
            put(eqn.invars[position], Axes(a + 1 for a in found) if stacked else found)


def _before_reshape(old, new, axes):
    """Axes of the old shape that are axes of the new one, whole."""
    for a in axes:
        for b in range(len(old)):
            if old[b] == new[a] and math.prod(old[:b]) == math.prod(new[:a]):
                yield b


# ------------------------------------------------------------------------------------------------
# Products
# ------------------------------------------------------------------------------------------------


class Dims(NamedTuple):
    """Axes of the operands of a product: contracting, batch and free ones."""

    contract: tuple[tuple[int, ...], tuple[int, ...]]
    batch: tuple[tuple[int, ...], tuple[int, ...]]
    free: tuple[tuple[int, ...], tuple[int, ...]]


def dimensions(eqn: Any) -> Dims:
    """Axes of a dot_general or ragged_dot_general."""
    numbers = eqn.params.get("dimension_numbers")
    if numbers is None:
        numbers = eqn.params["ragged_dot_dimension_numbers"].dot_dimension_numbers
    contract, batch = (tuple(tuple(map(int, a)) for a in pair) for pair in numbers)
    free = tuple(
        tuple(a for a in range(len(v.aval.shape)) if a not in contract[i] + batch[i])
        for i, v in enumerate(eqn.invars[:2])
    )
    return Dims(contract, batch, free)  # type: ignore[arg-type]


RAGGED_ROWS = ((0,), (0,))
"""Ragged and group dimensions of a product of rows sorted by group."""


def ragged_role(eqn: Any, dims: Dims) -> Role | None:
    """What a ragged_dot_general computes, if it is a form of `jax.lax.ragged_dot` or one of its gradients."""
    numbers = eqn.params["ragged_dot_dimension_numbers"]
    ragged, group = tuple(numbers.lhs_ragged_dimensions), tuple(numbers.rhs_group_dimensions)
    if any(dims.batch) or eqn.params.get("group_offset") is not None or len(eqn.invars) != 3:
        return None
    lhs, rhs = (v.aval.shape for v in eqn.invars[:2])
    if (ragged, group) == RAGGED_ROWS and (len(lhs), len(rhs)) == (2, 3):
        if dims.contract == ((1,), (1,)):
            return "forward"
        if dims.contract == ((1,), (2,)):
            return "input gradient"
    if (ragged, group, dims.contract) == ((0,), (), ((0,), (0,))) and (len(lhs), len(rhs)) == (
        2,
        2,
    ):
        return "weight gradient"
    return None


def default_precision(precision: Any) -> bool:
    """Whether a product asks for no more than the default precision."""
    both = precision if isinstance(precision, tuple) else (precision,)
    return all(p is None or p == lax.Precision.DEFAULT for p in both)


def _size(v, axes):
    return math.prod(v.aval.shape[a] for a in axes)


@dataclasses.dataclass(frozen=True)
class Found:
    """A product and what becomes of it: at equation `index` of its jaxpr."""

    index: int
    product: Candidate


@dataclasses.dataclass(frozen=True)
class Nested:
    """An equation with jaxprs in which products were found, and where its operands come from."""

    index: int
    bodies: tuple[tuple[tuple[str, int], Plan], ...]
    operands: tuple[Origin, ...]

    @property
    def fp8(self) -> bool:
        """Whether any product inside runs in FP8."""
        return any(plan.fp8 for _, plan in self.bodies)


@dataclasses.dataclass(frozen=True)
class Plan:
    """The products of a jaxpr, with those of the jaxprs inside it."""

    items: tuple[Found | Nested, ...]

    def products(self) -> Iterable[Candidate]:
        """Every product, in program order."""
        for item in self.items:
            if isinstance(item, Found):
                yield item.product
            else:
                for _, plan in item.bodies:
                    yield from plan.products()

    @property
    def fp8(self) -> bool:
        """Whether any product runs in FP8."""
        return any(p.fp8 for p in self.products())


Judge = Callable[[Candidate, "Facts"], str]
"""Why a product that can run in FP8 does not; empty if it does."""


class Facts(NamedTuple):
    """What the rules for embeddings, heads and routers look at."""

    one_hot: bool
    table: bool  # the weight is also gathered from
    logits: bool  # the result is ranked or normalized across features
    of_excluded: bool  # a gradient of a product that was kept


class Planner:
    """Walks a program and judges its products.

    **Arguments:**

    - `knowledge`: of the leaves; grows.
    - `judge`: the policy.
    - `weight`: which operand is the weight; `"infer"` finds out.
    - `backward`: whether the program computes cotangents, as a custom_vjp's second rule does.
    """

    def __init__(self, knowledge: Knowledge, judge: Judge, weight: str, *, backward: bool = False):
        self.knowledge, self.judge, self.weight, self.backward = knowledge, judge, weight, backward
        self.logits = Logits()

    def plan(self, jaxpr: Any, ins: Sequence[Origin]) -> tuple[Plan, list[Origin]]:
        """The plan of a jaxpr, open or closed, and where its results come from."""
        outs = [NONE] * len(open_jaxpr(jaxpr)[0].outvars)
        return self._plan(jaxpr, ins, outs, "", 1)

    def _plan(self, jaxpr, ins, out_axes, scope, repeats):
        jaxpr, consts = open_jaxpr(jaxpr)
        axes, _ = self.logits.inside(jaxpr, out_axes)
        origins: dict[Any, Origin] = {}

        def read(atom):
            return NOWHERE if isinstance(atom, JaxprLiteral) else origins[atom]

        for v in jaxpr.constvars:
            origins[v] = Origin(frozenset({self.knowledge.add(Leaf("", constant=True))}))
            if not jnp.issubdtype(v.aval.dtype, jnp.inexact):  # tokens, labels
                self.knowledge.varying |= origins[v].leaves
        origins.update(zip(jaxpr.invars, ins, strict=True))

        items: list[Found | Nested] = []
        for i, eqn in enumerate(jaxpr.eqns):
            operands = [read(v) for v in eqn.invars]
            name = eqn.primitive.name
            here = join_scopes(scope, str(eqn.source_info.name_stack))
            if name in ("dot_general", "ragged_dot_general"):
                product = self._product(eqn, operands, axes, here, repeats, jaxpr, read)
                items.append(Found(i, product))
                outs = [merge(operands)._replace(computed=True)] * len(eqn.outvars)
            elif name in ENTERED:
                found, outs = self._enter(eqn, operands, axes, here, repeats)
                if any(plan.items for _, plan in found):
                    items.append(Nested(i, tuple(found), tuple(operands)))
            else:
                outs = self._other(eqn, operands)
            origins.update(zip(eqn.outvars, outs, strict=True))
        return Plan(tuple(items)), [read(v) for v in jaxpr.outvars]

    def _other(self, eqn, operands):
        name = eqn.primitive.name
        out = merge(operands)
        if name == "gather":
            self.knowledge.tables |= operands[0].leaves - operands[1].leaves
        elif name in ELEMENTWISE_OR_SHAPE:
            is_bool = bool(eqn.invars) and eqn.invars[0].aval.dtype == jnp.bool_
            hot = operands[0].one_hot or (is_bool and name == "convert_element_type")
            out = out._replace(one_hot=hot)
        elif name.startswith("jaxfp8_"):
            out = out._replace(computed=True)
        return [out] * len(eqn.outvars)

    def _enter(self, eqn, operands, axes, scope, repeats):
        name = eqn.primitive.name
        out_axes = [axes.get(v, NONE) for v in eqn.outvars]
        found, results = [], []
        for body in bodies(eqn):
            times = None if repeats is None or body.repeats is None else repeats * body.repeats
            jaxpr, _ = open_jaxpr(body.jaxpr)
            ins = [operands[i] for i in body.ins]
            inner_axes = out_axes
            if name == "scan":
                _, carry = scan_counts(eqn)
                inner_axes = [
                    *out_axes[:carry],
                    *(Axes(a - 1 for a in o if a > 0) for o in out_axes[carry:]),
                ]
            if len(inner_axes) != len(jaxpr.outvars):
                inner_axes = [NONE] * len(jaxpr.outvars)
            if name == "scan":
                first, count = scan_counts(eqn)
                ins = self._settle(jaxpr, ins, inner_axes, range(first, first + count))
            elif name == "while":
                first = len(ins) - len(eqn.outvars)
                if body.key[0] == "body_jaxpr":
                    ins = self._settle(jaxpr, ins, inner_axes, range(first, len(ins)))
            plan, outs = self._plan(body.jaxpr, ins, inner_axes, scope, times)
            found.append((body.key, plan))
            if len(outs) == len(eqn.outvars) and body.key[0] != "cond_jaxpr":
                results.append(outs)
        outs = [
            merge(each)._replace(one_hot=each[0].one_hot) for each in zip(*results, strict=True)
        ]
        if name == "cond":
            outs = [merge([o, operands[0]]) for o in outs]
        return found, outs or [merge(operands)] * len(eqn.outvars)

    def _settle(self, jaxpr, ins, out_axes, carried):
        """Origins of a loop's inputs once what is carried around depends on all that it ever will.

        Only what is carried in, and what is known to vary, spreads: else every activation of a scan over layers would
        depend on the weights of all of them.
        """
        start = carried.start
        carried = [i for i in carried if not self._is_parameter(ins[i])]
        spreading = frozenset().union(*(ins[i].leaves for i in carried))
        while True:
            trial = Planner(
                self.knowledge.copy(), lambda *_: "", self.weight, backward=self.backward
            )
            trial.logits = self.logits
            _, outs = trial._plan(jaxpr, ins, out_axes, "", None)
            settled = list(ins)
            for i in carried:
                out = outs[i - start]
                leaves = out.leaves & (spreading | self.knowledge.varying)
                settled[i] = merge([ins[i], out._replace(leaves=leaves)])
            if settled == ins:
                return settled
            ins = settled

    def _is_parameter(self, origin: Origin) -> bool:
        """Whether a value carried around a loop is a parameter that the loop updates: it stays a weight."""
        known = self.knowledge
        if len(origin.leaves) != 1 or origin.computed or known.varies(origin):
            return False
        return origin.leaves <= known.weights or known.given or max(known.depths(origin)) > 0

    # ---- one product -----------------------------------------------------------------------------

    def _product(self, eqn, operands, axes, scope, repeats, jaxpr, read) -> Candidate:
        lhs, rhs = eqn.invars[:2]
        out = eqn.outvars[0]
        dims = dimensions(eqn)
        ragged = eqn.primitive.name == "ragged_dot_general"
        backward = self.backward or computes_cotangents(scope)
        known = self.knowledge
        varies = [known.varies(o) for o in operands[:2]]

        reason = ""
        role: Role = "input gradient" if backward else "forward"
        weight: Side | None
        if ragged:
            found = ragged_role(eqn, dims)
            role = found or role
            weight = None if role == "weight gradient" else "rhs"
            if found is None:
                reason = "a ragged product of a form without a kernel"
        else:
            weight = self._weight(operands[:2], varies, dims, backward)
            if weight is None and backward and not any(dims.batch):
                role = "weight gradient"

        a, w = (1, 0) if weight == "lhs" else (0, 1)
        sides = (lhs, rhs)
        sizes = {
            "batch": _size(lhs, dims.batch[0]),
            "m": _size(sides[a], dims.free[a]),
            "n": _size(sides[w], dims.free[w]),
            "k": _size(lhs, dims.contract[0]),
        }
        if ragged:
            sizes["batch"] = eqn.invars[2].aval.shape[-1]
            if role != "weight gradient" and found is not None:
                sizes["n"] = rhs.aval.shape[3 - dims.contract[1][0]]
        product = Candidate(
            kind="ragged_dot" if ragged else "dot_general",
            scope=scope,
            weight_path="" if weight is None else known.path(operands[w]),
            role=role,
            lhs_shape=lhs.aval.shape,
            rhs_shape=rhs.aval.shape,
            lhs_dtype=lhs.aval.dtype,
            rhs_dtype=rhs.aval.dtype,
            out_dtype=out.aval.dtype,
            weight=weight,
            repeats=repeats,
            **sizes,
        )
        reason = reason or impossible(product, eqn, dims, any(o.tangent for o in operands[:2]))
        if reason:
            return dataclasses.replace(product, reason=reason)

        facts = Facts(
            one_hot=operands[0].one_hot or operands[1].one_hot,
            table=weight is not None and not operands[w].leaves.isdisjoint(known.tables),
            logits=weight is not None and self._is_logits(dims, w, axes.get(out, NONE)),
            of_excluded=self._of_excluded(eqn, operands, weight, w, backward, jaxpr, read),
        )
        reason = self.judge(product, facts)
        if weight is not None:
            if reason and (facts.one_hot or facts.table or facts.logits or facts.of_excluded):
                known.excluded |= operands[w].leaves - known.varying
            if not known.given and not any(varies) and not reason.startswith("size"):
                known.learn(operands[a], operands[w])
            known.weights |= operands[w].leaves
        return dataclasses.replace(product, reason=reason)

    def _weight(self, origins, varies, dims, backward) -> Side | None:
        if self.weight != "infer" and not (backward and all(varies)):
            return self.weight  # type: ignore[return-value]
        if all(varies):
            return None
        if any(varies):
            return "rhs" if varies[0] else "lhs"
        known = self.knowledge
        left, right = (o.leaves for o in origins)
        if left and left == right or min(len(left), len(right)) > 1 and left & right:
            return None  # computed from the same activations
        # Neither is known to carry the batch. The more telling signs come first.
        signs = (
            lambda i: origins[i].computed,
            lambda i: len(origins[i].leaves) > 1,
            lambda i: not known.constant(origins[i]),
            lambda i: -max(known.depths(origins[i])),
            lambda i: len(dims.free[i]),
        )
        for sign in signs:
            if sign(0) != sign(1):
                return "rhs" if sign(0) > sign(1) else "lhs"
        return "rhs"

    @staticmethod
    def _is_logits(dims: Dims, w: int, ranked: Axes) -> bool:
        """Whether the result is ranked along the weight's columns."""
        batch, rows = len(dims.batch[0]), len(dims.free[0])
        first = batch + (rows if w == 1 else 0)
        return any(first <= axis < first + len(dims.free[w]) for axis in ranked)

    def _of_excluded(self, eqn, operands, weight, w, backward, jaxpr, read) -> bool:
        excluded = self.knowledge.excluded
        if not excluded or not backward:
            return False
        if weight is not None:
            return not operands[w].leaves.isdisjoint(excluded)
        # A weight gradient shares its cotangent with an input gradient, whose weight is known.
        ours = {v for v in eqn.invars[:2] if not isinstance(v, JaxprLiteral)}
        for other in jaxpr.eqns:
            if other is eqn or other.primitive is not eqn.primitive:
                continue
            for v, partner in (other.invars[:2], other.invars[1::-1]):
                if isinstance(v, JaxprLiteral) or v not in ours:
                    continue
                try:
                    leaves = read(partner).leaves
                except KeyError:  # computed later, so no weight
                    continue
                if not leaves.isdisjoint(excluded) and leaves <= self.knowledge.weights:
                    return True
        return False


def computes_cotangents(scope: str) -> bool:
    """Whether JAX's names say that an equation belongs to a backward pass, and not to what is recomputed in one."""
    head, found, tail = scope.rpartition("transpose(")
    return bool(found) and "rematted_computation" not in tail


def join_scopes(outer: str, inner: str) -> str:
    """The name scopes of an equation, given those of the equation that its jaxpr is in."""
    return f"{outer}/{inner}" if outer and inner else outer or inner


def impossible(product: Candidate, eqn: Any, dims: Dims, tangent: bool) -> str:
    """Why no FP8 operation computes this product; empty if one does."""
    allowed = ", ".join(d.name for d in FLOAT_DTYPES)
    for name, dtype in (
        ("lhs", product.lhs_dtype),
        ("rhs", product.rhs_dtype),
        ("the result", product.out_dtype),
    ):
        if dtype not in FLOAT_DTYPES:
            return f"{name} is {dtype}, not {allowed}"
    if not default_precision(eqn.params.get("precision")):
        return "asks for a precision above the default"
    if product.kind == "dot_general" and not dims.contract[0]:
        return "contracts no axis"
    if tangent:
        return "a tangent of a custom_jvp rule"
    if product.weight is None and product.role != "weight gradient":
        return "both operands vary with the batch"
    if 0 in product.lhs_shape + product.rhs_shape:
        return "empty"
    return ""


def judge_scope_names(product: Candidate, patterns: Sequence[str]) -> str | None:
    """The first name of a product that a pattern matches in full, or None."""
    for name in product.names:
        if any(re.fullmatch(p, name, re.IGNORECASE) for p in patterns):
            return name
    return None


def is_data(leaf: Any) -> bool:
    """Whether an argument cannot be a weight: integers, booleans, random keys."""
    return not jnp.issubdtype(leaf.dtype, jnp.inexact)
