"""What a recipe says about a use of its nets as a defence."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Form:
    """A way to use a trained net beside on its own: with a database of its training images.

    Attributes:
        name: what the tables call it after the method's name; unique in a recipe.
        of: names of the methods whose nets are used so; all of them where it is empty.
        layer, pooling: of the feature.
        k, weighting, votes, alpha: of the :class:`~nndefense.database.rule.Rule`; K is lowered to the number of rows.
        temperature: of its kernel: ``none``, ``learned`` by the net in training, or ``held-out``: the one under which
            the validation images' own classes are likeliest.
        rows: numbers of rows, 0 for all; fewer are drawn at random, and are among those of more.
    """

    name: str
    of: tuple[str, ...] = ()
    layer: str = "embedding"
    pooling: str = "flatten"
    k: int = 50
    weighting: str = "uniform"
    votes: str = "labels"
    temperature: Literal["none", "learned", "held-out"] = "none"
    alpha: float = 0.0
    rows: tuple[int, ...] = (0,)

    def title(self, method: str, rows: int) -> str:
        """What the tables call a method's nets used so with this number of rows."""
        return f"{method} + {self.name}" + (f" ({rows:,} rows)" if rows else "")
