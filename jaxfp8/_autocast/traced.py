"""A call of a function as a program of its arrays."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from .origins import Input, Knowledge, Origin, is_data
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
            leaves.append(Input(text.removeprefix("."), constant=of_owner))
            given = nums is not None and not of_owner
            if is_data(self.arrays[i]) or (given and not (kind.idx == 1 and rest[0].idx in nums)):
                varying.add(i)
        return Knowledge(leaves, varying, given=nums is not None)

    def argument(self, i: int) -> int | None:
        """The position of the argument that the i-th array is in."""
        kind, *rest = self._paths[self._where[i]]
        return rest[0].idx if kind.idx == 1 else None

    def origins(self) -> list[Origin]:
        """Origins of the jaxpr's inputs."""
        return [Origin(frozenset({i})) for i in range(len(self.arrays))]

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
