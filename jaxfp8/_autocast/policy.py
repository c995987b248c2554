"""Which products run in FP8: the policy that a user gives."""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Callable
from typing import Any, Literal

import jax
import numpy as np

from .._arrays.recipe import Recipe
from .candidate import Candidate, Facts, judge_scope_names

EMBEDDING_NAMES = (
    r"(\w+_)?embed(s|der|ding|dings)?(_(table|tokens|layer))?(_?\d+)?",
    r"wte",
    r"wpe",
)
HEAD_NAMES = (r"(\w+_)?lm_?head", r"head(_?\d+)?", r"(\w+_)?logits?(_\w+)?", r"classifier(_?\d+)?")
ROUTER_NAMES = (r"\w*router\w*", r"\w*routing\w*", r"gating", r"gate_?logits?")


@dataclasses.dataclass(frozen=True)
class AutocastPolicy:
    """Which products `jaxfp8.autocast` runs in FP8.

    A product is judged by the first of these that has an opinion:

    1. Whether an FP8 operation exists for it at all: float operands, default precision, and a parameter that meets
       data (or what differentiating that makes). What remains, as attention's products of activations, is never FP8.
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
    - `weight`: which operand of a forward product is the weight (128x128 blocks): `"lhs"`, `"rhs"`, or `"infer"`: the
      parameter.
    - `weight_argnums`: the arguments that hold parameters, whatever their dtypes; all others are data. None: the first
      that holds floats in a container; in a function that is itself a pytree with arrays (an `eqx.Module`, an
      `nnx.Module`, or a method of one) that function alone. Where all arguments are single arrays, the right operand of
      a product is the parameter unless it is known to be data.

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
        if name := judge_scope_names(product, self.exclude):
            return f"excluded by name: {name}"
        if self.include:
            included = judge_scope_names(product, self.include)
            return "" if included else "not included by name"
        if reason := self._special(product, facts):
            return reason
        for name in ("m", "n", "k"):
            size, least = getattr(product, name), getattr(self, f"min_{name}")
            if _below(name, size, least):
                return f"size: {name.upper()}={size} is below {least}"
        return ""

    def _special(self, product: Candidate, facts: Facts) -> str:
        named = functools.partial(judge_scope_names, product)
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


def _below(name: str, size: Any, least: int) -> bool:
    try:
        return size < least
    except jax.errors.InconclusiveDimensionOperation:
        raise ValueError(
            f"autocast: {name.upper()}={size} is symbolic and not known to reach {least}, the policy's min_{name}; "
            f"allowed: AutocastPolicy(min_{name}=1), or a bound, as constraints=['m >= {least}']"
        ) from None


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
