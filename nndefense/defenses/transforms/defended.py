"""The defences of Guo et al. (ICLR 2018) as they are used: a classifier behind one of the transformations."""

from __future__ import annotations

from typing import Any

from nndefense.attacks.checks import at_least
from nndefense.defenses.transformed import TransformDefense
from nndefense.defenses.transforms.compression import BitDepth, Jpeg
from nndefense.defenses.transforms.crops import CROP_SIZE, GridCrops, RandomCrop
from nndefense.defenses.transforms.total_variation import TotalVariation
from nndefense.models import Classifier


class GridCropEnsemble(TransformDefense):
    """The average of a classifier's probabilities over crops on a grid; without chance, and differentiable.

    Args:
        classifier: any classifier.
        size: side of the crops as a share of the image's, in (0, 1].
        crops: their number, a square.

    Raises:
        InputError: settings that cannot be used.
    """

    def __init__(self, classifier: Classifier, *, size: float = CROP_SIZE, crops: int = 9) -> None:
        super().__init__(classifier, GridCrops(size, crops), differentiable=True, random=False, views=crops)


def crop_ensemble(
    classifier: Classifier,
    *,
    crops: int | None = None,
    size: float = CROP_SIZE,
    grid: bool = False,
    attack_draws: int | None = None,
    seed: int | None = 0,
) -> TransformDefense:
    """Average the classifier over crops of the image (Guo et al., ICLR 2018, section 4).

    30 crops of 90 / 224 of the side at random places, each resized to the image's size, softmax averaged. Athalye et
    al. (2018) leave the crops at 90 pixels, which only a net without fixed input size can take; not offered.
    ``grid`` gives the variant of the authors' code: 9 crops on a grid of 3 x 3.

    Args:
        classifier: any classifier.
        crops: their number; by default 30, or 9 on the grid.
        size: side of a crop as a share of the image's, in (0, 1].
        grid: crops on a grid instead of at random places.
        attack_draws: crops per step of an attack (EOT); by default as many as the defence takes, and 10 at least.
        seed: of the places; None leaves them to torch's default generators.

    Raises:
        InputError: settings that cannot be used.
    """
    count = (9 if grid else 30) if crops is None else crops
    at_least("crops", count)
    if grid:
        return GridCropEnsemble(classifier, size=size, crops=count)
    options: dict[str, Any] = {"draws": count, "attack_draws": attack_draws, "seed": seed}
    return TransformDefense(classifier, RandomCrop(size), differentiable=True, random=True, **options)


def tv_minimization(
    classifier: Classifier, *, draws: int = 1, attack_draws: int | None = None, seed: int | None = 0, **settings: Any
) -> TransformDefense:
    """Total variation minimisation before the classifier; attacked with BPDA (identity) and EOT over masks.

    Args:
        classifier: any classifier.
        draws: masks that a prediction averages; Guo et al. take one.
        attack_draws: masks per step of an attack; by default 10, or ``draws`` if that is more.
        seed: of the masks; None leaves them to torch's default generators.
        settings: as for :class:`~nndefense.defenses.transforms.TotalVariation`.

    Raises:
        InputError: settings that cannot be used.
    """
    transform = TotalVariation(**settings)
    options: dict[str, Any] = {"draws": draws, "attack_draws": attack_draws, "seed": seed}
    return TransformDefense(classifier, transform, differentiable=False, random=transform.keep < 1, **options)


def jpeg_compression(classifier: Classifier, *, quality: int = 75, subsampling: str = "4:2:0") -> TransformDefense:
    """JPEG before the classifier; attacked with BPDA. Arguments and errors as for
    :class:`~nndefense.defenses.transforms.Jpeg`.
    """
    return TransformDefense(classifier, Jpeg(quality, subsampling), differentiable=False, random=False)


def bit_depth_reduction(classifier: Classifier, *, bits: int = 3, mode: str = "round") -> TransformDefense:
    """Fewer bits before the classifier; attacked with BPDA. Arguments and errors as for
    :class:`~nndefense.defenses.transforms.BitDepth`.
    """
    return TransformDefense(classifier, BitDepth(bits, mode), differentiable=False, random=False)
