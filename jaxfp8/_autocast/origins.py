"""What a value is to the rule that finds weights: a parameter, data, a gradient or a constant."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

Kind = Literal["constant", "either", "parameter", "data", "gradient"]
"""`either`: an argument of a call whose arguments are all single arrays, until a product tells."""

_tokens = itertools.count(1)


class Origin(NamedTuple):
    """What a value is, and which leaves it is made of if it is a parameter.

    `token` is shared by values that hold the same numbers in another form (cast, reshaped, stacked by a scan): the
    activation of a product is recognized by it where its weight's gradient is computed.
    """

    kind: Kind = "constant"
    leaves: frozenset[int] = frozenset()
    token: int = 0
    one_hot: bool = False  # booleans as numbers
    tangent: bool = False  # depends on a tangent


NOWHERE = Origin()


def fresh(origin: Origin) -> Origin:
    """The same kind of value with other numbers."""
    return origin._replace(token=next(_tokens))


def merge(origins: Iterable[Origin], *, backward: bool = False) -> Origin:
    """Origin of a value computed from others, element-wise for what parameters are concerned.

    A parameter moved by a gradient is a parameter; in a backward pass it is a cotangent.
    """
    origins = tuple(origins)
    kinds = {o.kind for o in origins}
    kind: Kind = "constant"
    if "gradient" in kinds:
        kind = "parameter" if "parameter" in kinds and not backward else "gradient"
    elif "data" in kinds:
        kind = "data"
    elif "parameter" in kinds:
        kind = "parameter"
    elif "either" in kinds:
        kind = "either"
    if backward and kind != "parameter":
        kind = "gradient"
    leaves: frozenset[int] = frozenset()
    if kind in ("parameter", "either"):
        leaves = leaves.union(*(o.leaves for o in origins))
    return fresh(Origin(kind, leaves, tangent=any(o.tangent for o in origins)))


SAME_NUMBERS = frozenset(
    """convert_element_type reshape transpose broadcast_in_dim squeeze expand_dims slice copy copy_p rev
    sharding_constraint reshard pvary pcast reduce_precision name stop_gradient all_gather device_put
    optimization_barrier""".split()
)
"""Under these a value keeps its token, and booleans as numbers stay what they are."""


_SETS = ("weights", "data", "excluded", "tables", "multiplied")


@dataclasses.dataclass
class Knowledge:
    """What is known of the leaves; grows while a program is walked in its order.

    - `weights`: leaves that were a weight of a forward product, and `data`: those that met one. Only of `either`.
    - `excluded`: leaves of weights whose product was kept as an embedding, a head or a router; their gradients are too.
    - `tables`: leaves from which rows are gathered.
    - `multiplied`: leaves of a weight with the rows of the activation that it met.
    - `met`: for the token of an activation and the columns of the weights that it met, whether one was excluded.
    """

    leaves: list[str]
    kinds: list[Kind]
    weights: set[int] = dataclasses.field(default_factory=set)
    data: set[int] = dataclasses.field(default_factory=set)
    excluded: set[int] = dataclasses.field(default_factory=set)
    tables: set[int] = dataclasses.field(default_factory=set)
    multiplied: set[tuple[frozenset[int], int]] = dataclasses.field(default_factory=set)
    met: dict[tuple[int, int], bool] = dataclasses.field(default_factory=dict)

    def add(self, value: Any) -> Origin:
        """The origin of an array that a program closes over, or of its type; NumPy's are constants."""
        kind: Kind = "constant" if isinstance(value, np.ndarray) else "parameter"
        self.leaves.append("")
        self.kinds.append("data" if is_data(value) else kind)
        return self.origin(len(self.leaves) - 1)

    def origin(self, i: int) -> Origin:
        """The origin of a leaf."""
        kind = self.kinds[i]
        return fresh(
            Origin(kind, frozenset({i}) if kind in ("parameter", "either") else frozenset())
        )

    def settled(self, origin: Origin) -> Origin:
        """What is known by now of a value that could be either."""
        if origin.kind != "either":
            return origin
        if origin.leaves & self.data:
            return origin._replace(kind="data")
        return origin._replace(kind="parameter") if origin.leaves <= self.weights else origin

    def copy(self) -> Knowledge:
        """One that can grow by itself."""
        return dataclasses.replace(
            self,
            leaves=list(self.leaves),
            kinds=list(self.kinds),
            met=dict(self.met),
            **{n: set(getattr(self, n)) for n in _SETS},
        )

    def path(self, origin: Origin) -> str:
        """The path of the leaf a value comes from, if it is one."""
        return self.leaves[next(iter(origin.leaves))] if len(origin.leaves) == 1 else ""


def is_data(leaf: Any) -> bool:
    """Whether an argument cannot be a weight: integers, booleans, random keys."""
    return not jnp.issubdtype(leaf.dtype, jnp.inexact)


def says_nothing(aval: Any) -> bool:
    """Whether a value is a single number: it scales parameters, picks layers, and carries no batch."""
    size = getattr(aval, "size", 0)
    return size == 1 and not jnp.issubdtype(aval.dtype, jax.dtypes.prng_key)
