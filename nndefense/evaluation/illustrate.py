"""Pictures for the report: a few images, drawn at random, with all that led to the defence's answer."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from nndefense.datasets import ImageDataset
from nndefense.defenses import NearestNeighborDefense
from nndefense.evaluation.report import GalleryNeighbor, GalleryRow
from nndefense.evaluation.suite import run_attack
from nndefense.evaluation.threats import AttackSettings, ThreatModel

_NEIGHBORS = 8


def illustrate(
    dataset: ImageDataset,
    defense: NearestNeighborDefense,
    threat: ThreatModel,
    attack: AttackSettings,
    *,
    eps: float,
    label_maps: dict[str, Tensor],
    pictures: ImageDataset | None,
    count: int = 10,
    seed: int = 0,
    device: str | torch.device = "cpu",
) -> list[GalleryRow]:
    """Attack ``count`` images drawn at random (so the gallery is a fair sample, failures included).

    Args:
        dataset: labelled images.
        defense: the defence to explain, with its classifier.
        threat: whom to attack.
        attack: how.
        eps: at which radius.
        label_maps: as for :func:`~nndefense.evaluation.evaluate.evaluate`.
        pictures: the images that the database was built from, to show the neighbours; None where not at hand.
        count: number of rows.
        seed: draws the images and the random starts.
        device: where the images are put.
    """
    drawn = np.sort(np.random.default_rng(seed).permutation(len(dataset))[:count])
    if not len(drawn):
        return []
    images, labels = dataset.batch(drawn)
    clean = images.to(device)
    generator = torch.Generator().manual_seed(seed)
    attacked = run_attack(
        attack, threat.target, clean, label_maps[threat.name][labels].to(device), eps, generator
    ).images
    with torch.no_grad():
        bare_clean = defense.classifier(clean).softmax(1).cpu()
        bare = defense.classifier(attacked).softmax(1).cpu()
    why = defense.explain(attacked)
    names = defense.classifier.classes
    rows = []
    for i, index in enumerate(drawn):
        neighbors = []
        for j in range(min(_NEIGHBORS, defense.k)):
            label = int(why.labels[i, j])
            name = names[label] if label >= 0 else names[int(why.posteriors[i, j].argmax())]
            neighbors.append(
                GalleryNeighbor(
                    image=_picture(pictures, why.ids[i][j]),
                    id=why.ids[i][j],
                    label=name,
                    weight=float(why.weights[i, j]),
                    distance=float(why.distances[i, j]),
                )
            )
        rows.append(
            GalleryRow(
                clean=images[i].numpy(),
                attacked=attacked[i].cpu().numpy(),
                label=names[int(label_maps["clean"][labels[i]])],
                bare=_top(bare[i], names),
                bare_clean=_top(bare_clean[i], names),
                defended=_top(why.log_probabilities[i].exp(), names),
                neighbors=tuple(neighbors),
                threat_model=threat.name,
                eps=eps,
                id=dataset.ids[int(index)],
            )
        )
    return rows


def _top(probabilities: Tensor, names: tuple[str, ...]) -> tuple[str, float]:
    best = int(probabilities.argmax())
    return names[best], float(probabilities[best])


def _picture(pictures: ImageDataset | None, name: str) -> np.ndarray | None:
    if pictures is None:
        return None
    image, _ = pictures[pictures.index_of(name)]
    return image.numpy()
