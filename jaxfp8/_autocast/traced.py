"""A call of a function as a program of its arrays."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from .origins import Kind, Knowledge, Origin, is_data
from .policy import AutocastPolicy


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


_PACKED = ("bool", "int2", "uint2", "int4", "uint4", "int8", "uint8")
"""Dtypes that quantized weights and masks have, and tokens have not."""


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
        leaves, where = [], []
        for position in self._where:
            kind, *rest = self._paths[position]
            text = jax.tree_util.keystr(tuple(rest))
            if kind.idx == 1:
                text = names[rest[0].idx] + jax.tree_util.keystr(tuple(rest[1:]))
            elif kind.idx == 2:
                text = str(rest[0].key) + jax.tree_util.keystr(tuple(rest[1:]))
            leaves.append(text.removeprefix("."))
            where.append(
                "owner" if kind.idx == 0 else rest[0].idx if kind.idx == 1 else rest[0].key
            )
        holding = {"owner"} if nums is None else {"owner", *nums}
        floats = [not is_data(x) for x in self.arrays]
        if nums is None and "owner" not in where:
            # The first argument with floats in a container; where all are single arrays, products tell.
            nested = (
                w
                for w, position, f in zip(where, self._where, floats, strict=True)
                if f and len(self._paths[position]) > 2
            )
            first = next(nested, None)
            holding = {first} if first is not None else set()
        kinds: list[Kind] = []
        for place, x, f in zip(where, self.arrays, floats, strict=True):
            held = place in holding and (f or nums is not None or x.dtype.name in _PACKED)
            unknown = f and not holding
            kinds.append("either" if unknown else "parameter" if held else "data")
        return Knowledge(leaves, kinds)

    def argument(self, i: int) -> int | None:
        """The position of the argument that the i-th array is in."""
        kind, *rest = self._paths[self._where[i]]
        return rest[0].idx if kind.idx == 1 else None

    def origins(self) -> list[Origin]:
        """Origins of the jaxpr's inputs."""
        return [self.knowledge.origin(i) for i in range(len(self.arrays))]

    def result(self, arrays: Sequence[Any]) -> Any:
        """The function's result from the jaxpr's; nnx variables that it changed get their new values."""
        out, changed = self._out, self._out["changed"]
        count = len(arrays) - len(changed)
        if changed:
            leaves = list(self._leaves)
            for i, x in zip(changed, arrays[count:], strict=True):
                leaves[i] = x
            places = {i: self.knowledge.leaves[self._where.index(i)] for i in changed}
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
