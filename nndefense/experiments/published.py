"""A figure that a paper prints."""

from __future__ import annotations

from dataclasses import dataclass

from nndefense.errors import InputError


@dataclass(frozen=True)
class Published:
    """A figure from a paper, in percent; None where the paper has none.

    Attributes:
        method: that of the recipe which trains like it; ``""`` where none does.
        standard, robust: accuracies.
        error, confidence: the error under the attack, and the mean confidence on what is wrong.
        threat: name of the threat; ``""`` for all.
        name: what the source calls it; ``""``: as the method.
        source: who printed it; ``""`` for the recipe's ``published_source``.
        setting: the net, data and attack that it is of; ``""`` for the recipe's ``published_setting``.
    """

    method: str
    standard: float | None = None
    robust: float | None = None
    error: float | None = None
    confidence: float | None = None
    threat: str = ""
    name: str = ""
    source: str = ""
    setting: str = ""

    def __post_init__(self) -> None:
        """Raise :class:`InputError` for a figure of nothing."""
        if not self.method and not self.name:
            raise InputError(
                "a [[published]] figure needs a method, or a name where no method of the recipe is like it"
            )
