"""RP2, robust physical perturbations (Eykholt et al., CVPR 2018, arXiv 1707.08945): a sticker for all views.

Find where a sticker works (:func:`search_mask`, l_1), optimise it (:func:`rp2`, l_2), and measure on photos that it was
not made with how often it works (:func:`look`, :func:`success`). Tensors and callables only: no files.
"""

from nndefense.attacks.rp2.measure import Rate, Seen, look, success
from nndefense.attacks.rp2.optimise import Found, Optimised, Settings, Terms, cut_mask, objective, rp2, search_mask
from nndefense.attacks.rp2.sticker import (
    MODES,
    Mode,
    Sticker,
    check_mask,
    check_palette,
    default_palette,
    nearest_printable,
    non_printability,
    paper_white,
)
from nndefense.attacks.rp2.views import (
    FRAME,
    RELEASED,
    ViewChanges,
    Views,
    as_photographed,
    carry,
    frame,
    homography,
    warp,
)

__all__ = [
    "FRAME", "MODES", "RELEASED", "Found", "Mode", "Optimised", "Rate", "Seen", "Settings", "Sticker", "Terms",
    "ViewChanges", "Views", "as_photographed", "carry", "check_mask", "check_palette", "cut_mask", "default_palette",
    "frame", "homography", "look", "nearest_printable", "non_printability", "objective", "paper_white", "rp2",
    "search_mask", "success", "warp",
]  # fmt: skip
