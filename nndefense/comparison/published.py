"""Table 2 of Dubey et al. (2019) as it was printed, and what must be said beside it."""

from __future__ import annotations

from dataclasses import dataclass

TITLE = "Dubey et al. (CVPR 2019), Table 2"
SETTING = "ImageNet, ResNet-50, PGD, normalised l2 distance 0.06; top-1 accuracy"


@dataclass(frozen=True)
class PrintedRow:
    """One row of the printed table: top-1 accuracies as fractions in [0, 1], None where the table has no figure.

    Attributes:
        name: the defence as the table calls it.
        clean, gray, black: the three columns.
        note: what makes the row another experiment than its neighbours; empty where nothing does.
    """

    name: str
    clean: float | None
    gray: float | None
    black: float | None
    note: str = ""


#: The rows by the names that recipes use.
PUBLISHED: dict[str, PrintedRow] = {
    "none": PrintedRow("no defence", 0.761, 0.038, 0.046),
    "crop-ensemble": PrintedRow("crop ensemble (Guo et al.)", 0.652, 0.456, 0.512),
    "tv-minimization": PrintedRow("TV minimisation (Guo et al.)", 0.635, 0.338, 0.597),
    "quilting": PrintedRow(
        "image quilting (Guo et al.)", 0.414, 0.379, 0.618, "more accurate under attack than clean: two nets"
    ),
    "ensemble-adversarial": PrintedRow("ensemble adversarial training (Tramèr et al.)", None, None, 0.051),
    "alp": PrintedRow(
        "ALP (Kannan et al.)", 0.557, 0.279, 0.348, "ResNet-v2-50 at 64 x 64, targeted PGD in l_inf 16/255"
    ),
    "ra-cnn": PrintedRow("RA-CNN (Zhao and Cho)", 0.609, 0.259, None, "ResNet-18"),
    "ig-50b-rmac": PrintedRow("nearest neighbours, IG-50B-All, conv_5_1-RMAC", 0.676, 0.427, 0.491),
    "ig-1b": PrintedRow("nearest neighbours, IG-1B-Targeted, conv_5_1", 0.681, 0.462, 0.587),
    "yfcc-100m": PrintedRow("nearest neighbours, YFCC-100M, conv_5_1", 0.613, 0.309, 0.395),
    "in-1.3m": PrintedRow("nearest neighbours, IN-1.3M, conv_5_1", 0.471, 0.286, 0.312),
}

#: What an honest reader must know of the printed figures.
CAVEATS: tuple[str, ...] = (
    "The columns mix protocols. Image quilting has 61.8 % under attack but 41.4 % clean, which no fixed net can have "
    "under an attack that harms: Guo et al. use a net trained on clean images in one section and nets trained on "
    "transformed images in another.",
    "The ALP row equals the figures of the released ALP net on ImageNet at 64 x 64 pixels (55.7 % clean, 27.5 to "
    "27.9 % under targeted l_inf PGD at 16/255): another net, resolution, norm and goal of attack.",
    "The RA-CNN row is a ResNet-18.",
    "Ensemble adversarial training has one figure only.",
    "A normalised l2 distance depends on the space of the pixels: 0.06 of images from which mean and standard "
    "deviation were taken is about 0.03 of raw pixels in [0, 1]. Which of the two the table means is not known.",
    "No row was evaluated with an attack that adapts to the defence.",
)
