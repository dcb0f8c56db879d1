"""Running an attack by its name on a model or on a retrieval surface, and what it cost."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nndefense import attacks
from nndefense.attacks import retrieval
from nndefense.attacks.retrieval import RetrievalSurface
from nndefense.datasets import ImageDataset
from nndefense.errors import InputError
from nndefense.evaluation.threats import LEAST, AttackSettings
from nndefense.models import Classifier

_RETRIEVAL: dict[str, Callable[..., Tensor]] = {
    "adaptive": retrieval.adaptive,
    "soft-retrieval": retrieval.soft_top_k,
    "straight-through": retrieval.straight_through,
    "push-pull": retrieval.push_pull,
    "ask": retrieval.class_scores,
    "drift": retrieval.feature_drift,
    "pgd-pr": retrieval.pgd_pr,
    "pgd-fs": retrieval.pgd_fs,
}


@dataclass(frozen=True)
class Attacked:
    """What an attack made of a batch, and its cost in images x passes.

    Attributes:
        images: N x C x H x W, each within its budget and in [0, 1].
        forwards, backwards: passes through what was attacked.
        queries: answers asked of the true defence.
    """

    images: Tensor
    forwards: int = 0
    backwards: int = 0
    queries: int = 0


def run_attack(
    settings: AttackSettings, target: Any, images: Tensor, labels: Tensor, eps: float, generator: torch.Generator
) -> Attacked:
    """Attack a batch at one radius.

    Args:
        settings: which attack, and how strongly; its own radii are not looked at.
        target: images N x C x H x W -> logits N x K, or a :class:`RetrievalSurface`.
        images: clean images, N x C x H x W in [0, 1].
        labels: class numbers N of the target.
        eps: the radius, in units of the settings' norm.
        generator: source of random starts.

    Raises:
        InputError: an attack that does not fit the target or the norm.
    """
    if isinstance(target, RetrievalSurface):
        return _on_retrieval(settings, target, images, labels, eps, generator)
    if settings.name in _RETRIEVAL:
        raise InputError(f"the attack {settings.name!r} is one on retrieval, not on a classifier")
    counted = attacks.Counted(target)
    made = _on_model(settings, counted, images, labels, eps, generator)
    return Attacked(made, counted.forwards, counted.backwards, counted.queries)


def attack_all(
    settings: AttackSettings,
    classifier: Classifier,
    dataset: ImageDataset,
    eps: float,
    *,
    batch_size: int,
    seed: int,
    device: str | torch.device,
    progress: Callable[[int], object] = lambda images: None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Attack a classifier on a whole data set, which must fit in memory, as for calibration.

    Args:
        settings, eps: as for :func:`run_attack`.
        classifier: what is attacked.
        dataset: N labelled images.
        batch_size: images per forward pass.
        seed: draws the random starts.
        device: where the images are put.
        progress: called with the number of images after each batch.

    Returns:
        The images N x C x H x W, the same attacked, and their class numbers N of the classifier.
    """
    labels_of = classifier.label_map(dataset.classes)
    generator = torch.Generator().manual_seed(seed)
    clean, attacked, truth = [], [], []
    for batch, labels, _ in dataset.batches(batch_size):
        images, aims = batch.to(device), labels_of[labels].to(device)
        clean.append(images)
        attacked.append(run_attack(settings, classifier, images, aims, eps, generator).images)
        truth.append(aims)
        progress(len(images))
    return torch.cat(clean), torch.cat(attacked), torch.cat(truth)


def _on_model(
    settings: AttackSettings, model: Any, x: Tensor, y: Tensor, eps: float, generator: torch.Generator
) -> Tensor:
    name, norm = settings.name, settings.norm
    ball: dict[str, Any] = {"eps": eps, "norm": norm}
    chance: dict[str, Any] = {"restarts": settings.restarts, "generator": generator}
    if name == "fgsm":
        return attacks.fgsm(model, x, y, **ball, loss=settings.loss)
    if name == "pgd":
        return attacks.pgd(model, x, y, **ball, **chance, steps=settings.steps, loss=settings.loss)
    if name == "apgd":
        return attacks.apgd(model, x, y, **ball, **chance, steps=settings.steps, loss=settings.loss)
    if name == "apgd-t":
        return attacks.apgd(model, x, y, **ball, **chance, steps=settings.steps, targets=9)
    if name == "square":
        return attacks.square(model, x, y, **ball, queries=settings.steps, generator=generator)
    if name == "autoattack":
        return attacks.autoattack(model, x, y, **ball, steps=settings.steps, generator=generator).images
    if name == "fab":
        return _within(attacks.fab(model, x, y, **ball, **chance, steps=settings.steps), x, eps, norm)
    if norm == "linf":
        raise InputError(f"{name} looks for the least l2 change: measure it in l2 or normalized-l2")
    if name == "cw":
        return _within(attacks.carlini_wagner(model, x, y, steps=settings.steps), x, eps, norm)
    assert name in LEAST
    return _within(attacks.deepfool(model, x, y, steps=settings.steps), x, eps, norm)


def _within(made: Tensor, x: Tensor, eps: float, norm: str) -> Tensor:
    """Attacked images that are within the budget; the clean image where the least change found is larger."""
    change = (made - x).flatten(1)
    size = change.abs().amax(1) if norm == "linf" else torch.linalg.vector_norm(change, dim=1)
    inside = size <= attacks.radius(x, eps, norm)
    return torch.where(inside[:, None, None, None], made, x)


def _on_retrieval(
    settings: AttackSettings,
    surface: RetrievalSurface,
    x: Tensor,
    y: Tensor,
    eps: float,
    generator: torch.Generator,
) -> Attacked:
    if settings.name == "square":
        counted = attacks.Counted(surface.predict)
        made = attacks.square(counted, x, y, eps=eps, norm=settings.norm, queries=settings.steps, generator=generator)
        return Attacked(made, queries=counted.queries or counted.forwards)
    if settings.name not in _RETRIEVAL:
        raise InputError(f"the attack {settings.name!r} needs a gradient of the defence: choose one on retrieval")
    surface.counts.reset()
    made = _RETRIEVAL[settings.name](
        surface, x, y, eps=eps, norm=settings.norm, steps=settings.steps, generator=generator
    )
    counts = surface.counts
    return Attacked(made, counts.forwards, counts.backwards, counts.queries)


def peak_memory_mb() -> float:
    """The most memory that this process has held so far, in MB; on a GPU the most that torch has held there.

    0 where the system does not tell.
    """
    if torch.cuda.is_available() and torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        return torch.cuda.max_memory_allocated() / 1e6
    try:
        import resource
    except ImportError:  # Windows has no such module
        return 0.0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # Kilobytes on Linux, bytes on macOS.
    return peak / 1e6 if sys.platform == "darwin" else peak * 1024 / 1e6
