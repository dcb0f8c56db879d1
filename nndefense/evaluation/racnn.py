"""RA-CNN clean and under attacks that ignore, hold, follow or relax its retrieval, image by image."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nndefense.attacks import apgd, pgd
from nndefense.attacks.checks import checked_inputs
from nndefense.attacks.retrieval import run_adaptive
from nndefense.datasets import ImageDataset
from nndefense.defenses.racnn import RaCnnDefense
from nndefense.errors import NNDefenseError
from nndefense.statistics import wilson_interval
from nndefense.training.neighbors import row_images

Attacker = Callable[[Tensor, Tensor, float], Tensor]


def measure_racnn(
    defense: RaCnnDefense,
    dataset: ImageDataset,
    budgets: Sequence[float],
    *,
    norm: str = "linf",
    steps: int = 40,
    attacked: int = 500,
    adaptive: bool = True,
    batch_size: int = 100,
    images: ImageDataset | None = None,
    data_dir: Path | None = None,
    seed: int = 0,
    step: Callable[[int], object] = lambda images: None,
) -> dict[str, Any]:
    """Measure RA-CNN and the plain classifier of its database.

    Args:
        defense: the trained defence, on the device where all is computed.
        dataset: labelled images that do not stand in the database:
            :func:`nndefense.pipeline.check_not_in_database` tells those that do.
        budgets: of the attacks, in units of ``norm``.
        norm, steps: of every attack.
        attacked: how many images are attacked at most; all give the clean accuracy.
        adaptive: also the ensemble of attacks on the retrieval.
        batch_size: images at a time.
        images, data_dir: of the database's rows, as for :func:`~nndefense.training.neighbors.row_images`.
        seed: of the attacks' random starts.
        step: called with the number of images of every batch that is done.

    Returns:
        Plain values: ``clean`` by name (``classifier``, ``ra-cnn``), and ``attacked``, a row for each budget and
        attack; each with ``accuracy``, ``n`` and the Wilson 95 % ``interval``.

    Raises:
        InputError: a budget, norm or image that cannot be used.
    """
    dataset = dataset.usable
    net, place = defense.classifier, defense.classifier.device
    labels = net.label_map(dataset.classes).to(place)
    clean: dict[str, list[Tensor]] = {"classifier": [], "ra-cnn": []}
    standing: dict[tuple[float, str], list[Tensor]] = {}
    attacks = _attacks(defense, norm, steps, seed, adaptive, images, data_dir)
    done = 0
    for batch, own, _ in dataset.batches(batch_size):
        x, y = batch.to(place), labels[own.to(place)]
        for name, who in (("classifier", net), ("ra-cnn", defense)):
            with torch.no_grad():
                clean[name].append((who(x).argmax(1) == y).cpu())
        part = min(len(x), attacked - done)
        if part > 0:
            for eps in budgets:
                for name, right in _attacked(defense, attacks, x[:part], y[:part], eps, norm, steps, seed):
                    standing.setdefault((eps, name), []).append(right)
            done += part
        step(len(x))
    return {
        "clean": {name: _rate(torch.cat(found)) for name, found in clean.items()},
        "attacked": [
            {"eps": eps, "attack": name, **_rate(torch.cat(found))} for (eps, name), found in standing.items()
        ],
    }


def _attacks(
    defense: RaCnnDefense,
    norm: str,
    steps: int,
    seed: int,
    adaptive: bool,
    images: ImageDataset | None,
    data_dir: Path | None,
) -> dict[str, Attacker]:
    """The attacks on RA-CNN by name: (images, labels, eps) -> attacked images."""

    def follow(model: Callable[[Tensor], Callable[[Tensor], Tensor]], method: Callable[..., Tensor] = pgd) -> Attacker:
        def attack(x: Tensor, y: Tensor, eps: float) -> Tensor:
            generator = torch.Generator(x.device).manual_seed(seed)
            return method(model(x), x, y, eps=eps, norm=norm, steps=steps, loss="margin", generator=generator)

        return attack

    # Made once: each holds the rows of the database.
    fresh = defense.attack_model(retrieval="fresh")
    soft, through = (defense.attack_model(retrieval=name) for name in ("soft", "straight-through"))
    found = {
        "no retrieval": follow(lambda x: defense.net),
        "held": follow(lambda x: defense.attack_model(retrieval="held", held=x)),
        "fresh": follow(lambda x: fresh),
        "soft": follow(lambda x: soft),
        "straight-through": follow(lambda x: through),
        "apgd": follow(lambda x: through, apgd),
    }
    if adaptive:
        try:
            pictures = row_images(defense.classifier, defense.database, images, data_dir)
        except NNDefenseError:
            if images is not None:
                raise
            # Without them the ensemble leaves out the attacks that begin on the way to the rows' images.
            pictures = None
        surface = defense.surface(images=pictures)

        def ensemble(x: Tensor, y: Tensor, eps: float) -> Tensor:
            generator = torch.Generator(x.device).manual_seed(seed)
            return run_adaptive(surface, x, y, eps=eps, norm=norm, steps=steps, generator=generator).images

        found["adaptive"] = ensemble
    return found


def _attacked(
    defense: RaCnnDefense,
    attacks: dict[str, Attacker],
    x: Tensor,
    y: Tensor,
    eps: float,
    norm: str,
    steps: int,
    seed: int,
) -> Iterator[tuple[str, Tensor]]:
    """For each attack, N truth values: right on the clean image and after the attack."""
    net = defense.classifier
    checked_inputs(net, x, y, eps, norm)
    generator = torch.Generator(x.device).manual_seed(seed)
    images = pgd(net, x, y, eps=eps, norm=norm, steps=steps, loss="margin", generator=generator)
    with torch.no_grad():
        yield "undefended", ((net(x).argmax(1) == y) & (net(images).argmax(1) == y)).cpu()
        right = defense(x).argmax(1) == y
    worst = right.clone()
    for name, attack in attacks.items():
        here = right.nonzero()[:, 0]
        stands = right.clone()
        if len(here):
            images = attack(x[here], y[here], eps)
            with torch.no_grad():
                stands[here] = defense(images).argmax(1) == y[here]
        worst &= stands
        yield name, stands.cpu()
    yield "worst", worst.cpu()


def _rate(right: Tensor) -> dict[str, Any]:
    count = int(right.sum())
    return {"accuracy": count / len(right), "n": len(right), "interval": list(wilson_interval(count, len(right)))}
