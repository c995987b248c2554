"""Which inputs a value comes from, and which of them vary with the batch."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable
from typing import Any, NamedTuple

import jax.numpy as jnp


class Input(NamedTuple):
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

    leaves: list[Input]
    varying: set[int] = dataclasses.field(default_factory=set)
    weights: set[int] = dataclasses.field(default_factory=set)
    excluded: set[int] = dataclasses.field(default_factory=set)
    tables: set[int] = dataclasses.field(default_factory=set)
    given: bool = False  # which leaves vary was given, and is not learnt

    def add(self, new: Input) -> int:
        """The number of a new input_."""
        self.leaves.append(new)
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


def is_data(leaf: Any) -> bool:
    """Whether an argument cannot be a weight: integers, booleans, random keys."""
    return not jnp.issubdtype(leaf.dtype, jnp.inexact)
