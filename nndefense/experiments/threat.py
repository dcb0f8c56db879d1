"""What the nets of a recipe are to withstand."""

from __future__ import annotations

from dataclasses import dataclass

from nndefense.attacks import NORMS, norms
from nndefense.attacks.spatial import SHIFT, SpatialAttack
from nndefense.errors import InputError
from nndefense.reporting.wording import budget

SPATIAL = "spatial"


@dataclass(frozen=True)
class Threat:
    """What a net is to withstand: a ball, or rotations with translations.

    Attributes:
        norm: one of :data:`nndefense.attacks.NORMS`, or ``spatial``.
        eps: the radius in units of the norm; 0 for ``spatial``.
        text: the radius as the recipe has it, such as ``8/255``.
        degrees, shift: the limits of ``spatial``, as for :class:`nndefense.attacks.spatial.SpatialAttack`.
    """

    norm: str
    eps: float = 0.0
    text: str = ""
    degrees: float = 30.0
    shift: float = SHIFT

    def __post_init__(self) -> None:
        """Raise :class:`InputError` for a threat that cannot be."""
        if self.norm == SPATIAL:
            SpatialAttack(degrees=self.degrees, shift=self.shift)
        elif self.norm not in NORMS:
            raise InputError(f"the threat's norm is {self.norm!r}, but must be one of {', '.join((*NORMS, SPATIAL))}")
        elif self.eps <= 0:
            raise InputError(f"the threat's eps is {self.eps}, but must be above 0")
        else:
            norms.check_eps(self.eps, self.norm)

    @property
    def name(self) -> str:
        """Names the threat in files, such as ``linf-0.3`` or ``linf-8of255``."""
        return SPATIAL if self.norm == SPATIAL else f"{self.norm}-{self.text.replace('/', 'of')}"

    @property
    def title(self) -> str:
        """Names the threat for people."""
        if self.norm == SPATIAL:
            return f"rotations to {self.degrees:g}°, shifts to {100 * self.shift:.3g} %"
        return budget(self.norm, self.text)
