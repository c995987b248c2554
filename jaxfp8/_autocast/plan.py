"""What autocast decided: the products of a jaxpr and of the jaxprs inside it."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

from .candidate import Candidate
from .origins import Origin


@dataclasses.dataclass(frozen=True)
class Found:
    """A product and what becomes of it: at equation `index` of its jaxpr."""

    index: int
    product: Candidate


@dataclasses.dataclass(frozen=True)
class Nested:
    """An equation with jaxprs in which products were found, and where its operands come from."""

    index: int
    bodies: tuple[tuple[tuple[str, int], AutocastPlan], ...]
    operands: tuple[Origin, ...]

    @property
    def fp8(self) -> bool:
        """Whether any product inside runs in FP8."""
        return any(plan.fp8 for _, plan in self.bodies)


@dataclasses.dataclass(frozen=True)
class AutocastPlan:
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
