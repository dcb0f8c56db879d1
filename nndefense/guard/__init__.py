"""The guard: defended predictions to rely on, which do not depend on their batch, as a Python call."""

from __future__ import annotations

from typing import TYPE_CHECKING

from nndefense.faces import importing

if TYPE_CHECKING:
    from nndefense.guard.guard import HELD_BYTES, Guard
    from nndefense.guard.percentile import FILE, Percentile, check_rate
    from nndefense.guard.pictures import Sample
    from nndefense.guard.prediction import Defended, Neighbor, Opinion

# Imported when they are first used: whoever reads an answer needs no torch.
__getattr__ = importing(
    __name__,
    {
        **dict.fromkeys(("HELD_BYTES", "Guard"), "nndefense.guard.guard"),
        **dict.fromkeys(("FILE", "Percentile", "check_rate"), "nndefense.guard.percentile"),
        "Sample": "nndefense.guard.pictures",
        **dict.fromkeys(("Defended", "Neighbor", "Opinion"), "nndefense.guard.prediction"),
    },
)

__all__ = ["FILE", "HELD_BYTES", "Defended", "Guard", "Neighbor", "Opinion", "Percentile", "Sample", "check_rate"]
