"""What is compared: the bare classifier, the defence, and its variants; and who attacks what of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import nn

from nndefense.attacks.retrieval import Knowledge, RetrievalSurface
from nndefense.database import WEIGHTINGS, ImageDatabase
from nndefense.datasets import ImageDataset
from nndefense.defenses import NearestNeighborDefense, RelaxedDefense
from nndefense.errors import InputError
from nndefense.evaluation.evaluate import Subject
from nndefense.evaluation.ladder import BARE, DEFENDED
from nndefense.evaluation.threats import ThreatModel
from nndefense.models import Classifier
from nndefense.own_code import taken, told

# What is run on nets beside the attack that is asked for.
_ON_NETS = ("apgd-square",)
_ON_TRANSFORMS = ("eot",)


def bare_subject(classifier: Classifier) -> Subject:
    """The classifier without any defence."""
    return Subject(BARE, classifier, "none")


def subjects_of(
    defense: NearestNeighborDefense,
    *,
    sizes: bool = True,
    seed: int = 0,
    informed: bool = False,
    pictures: ImageDataset | None = None,
) -> list[Subject]:
    """The bare classifier, the defence, its other weightings and, with ``sizes``, smaller databases.

    With ``informed`` the defence has what attackers need who know it; where the ``pictures`` of its database are at
    hand, attacks also start on the way to them.
    """
    known = known_of(defense, defense.classifier, images=pictures) if informed else {}
    found = [bare_subject(defense.classifier), replace(_subject(DEFENDED, "calibrated", defense), **known)]
    return found + _weightings(defense) + (_sizes(defense, seed) if sizes else [])


def known_of(
    model: nn.Module, classifier: Classifier, *, images: ImageDataset | None = None, draws: int | None = None
) -> dict[str, Any]:
    """What attackers who know a defence are given of it: ``white``, ``surface`` and ``also`` of its :class:`Subject`.

    The gradient is that of its ``attack_model()``, else of its relaxed ``surface()``, else its own, where that reaches
    the pixels. Who has a net's own gradient also runs APGD-CE, APGD-T and Square: PGD alone flatters nets that were
    trained to withstand it. Who has a surface that makes single predictions runs EOT-PGD.

    Args:
        model: the defence; its methods are given those of the other arguments that they take.
        classifier: that is defended.
        images: those of the rows that it retrieves.
        draws: to average at every step, where it is random.
    """
    methods = (getattr(model, name, None) for name in ("surface", "attack_model"))
    show, follow = (method if callable(method) else None for method in methods)
    with told(f"what attackers are given of {type(model).__name__}"):
        surface = show(**taken(show, {"images": images})) if show else None
        followed = follow(**taken(follow, {"draws": draws})) if follow else None
    if surface is not None and not isinstance(surface, RetrievalSurface):
        raise InputError(f"surface() of {type(model).__name__} gives {type(surface).__name__}: give a RetrievalSurface")
    if follow:
        if not isinstance(followed, nn.Module):
            raise InputError(
                f"attack_model() of {type(model).__name__} gives {type(followed).__name__}: give a torch.nn.Module"
            )
        white: nn.Module | None = followed
    elif surface is not None and surface.rows is not None:
        white = RelaxedDefense(surface)
    else:
        white = model if _has_gradient(model, classifier) else None
    also = _ON_NETS if white is model else _ON_TRANSFORMS if hasattr(white, "predictions") else ()
    return {"white": white, "surface": surface, "also": also}


def _has_gradient(model: nn.Module, classifier: Classifier) -> bool:
    generator = torch.Generator().manual_seed(0)
    image = torch.rand((1, *classifier.input_shape), generator=generator).to(classifier.device).requires_grad_()
    with torch.enable_grad():
        scores = model(image)
        if not scores.requires_grad:
            return False
        found = torch.autograd.grad(scores[0, 0] - scores[0, 1:].mean(), image, allow_unused=True)[0]
    return found is not None and bool((found != 0).any())


def threats_of(
    models: Sequence[str], subjects: Sequence[Subject], classifier: Classifier, surrogate: Classifier | None
) -> list[ThreatModel]:
    """Whom to attack: for each threat model the one net that all subjects share, or what each subject shows of itself.

    Args:
        models: names of threat models, in the order in which they are run.
        subjects: what is measured; one without ``white`` or ``surface`` is not attacked by who knows it.
        classifier: that is defended.
        surrogate: of the black-box attacker.

    Raises:
        InputError: a black box without a surrogate.
    """
    found = []
    for name in models:
        if name == "gray":
            found.append(ThreatModel(name, classifier, knowledge=Knowledge.GRAY.value))
        if name == "black":
            if surrogate is None:
                raise InputError("a black-box attack needs a surrogate: give one, or leave the attack out")
            found.append(ThreatModel(name, surrogate, surrogate.fingerprint))
    for subject in subjects:
        targets = {"white": subject.white, "adaptive": subject.surface}
        # Proofs are for the defence under test; another may not be one that can have any.
        targets |= {"exact": subject.surface} if subject.name == DEFENDED else {}
        found += [
            ThreatModel(
                name,
                targets[name],
                knowledge=Knowledge.WHITE.value,
                subject=subject.name,
                also=subject.also if name == "white" else (),
            )
            for name in models
            if targets.get(name) is not None
        ]
    return found


def layer_subject(defense: NearestNeighborDefense) -> Subject:
    """A ``defense`` on another layer, to be compared."""
    feature = defense.database.feature
    return _subject(f"{DEFENDED} ({feature.layer}, {feature.pooling})", "layer", defense)


def _weightings(defense: NearestNeighborDefense) -> list[Subject]:
    """The same defence with the other two weightings."""
    return [
        _subject(
            f"{DEFENDED} ({weighting})",
            "weighting",
            _ruled(defense, defense.database, weighting=weighting),
        )
        for weighting in WEIGHTINGS
        if weighting != defense.weighting
    ]


def _sizes(defense: NearestNeighborDefense, seed: int, sizes: int = 4) -> list[Subject]:
    """The same defence on smaller databases, each a random third of the next.

    Those with at most K rows are left out: there every row is a neighbour of every image, whatever its size.
    """
    database, order = defense.database, np.random.default_rng(seed).permutation(len(defense.database))
    counts = [len(database) // 3**power for power in range(sizes, 0, -1)]
    return [
        _subject(
            f"{DEFENDED} (rows={count})",
            "rows",
            _ruled(defense, database.subset(order[:count])),
        )
        for count in counts
        if count >= 10 and count > defense.k
    ]


def _ruled(defense: NearestNeighborDefense, database: ImageDatabase, **changed: Any) -> NearestNeighborDefense:
    """The defence over another database, or with another rule."""
    return NearestNeighborDefense(defense.classifier, database, **defense.rule.changed(**changed).to_json())


def _subject(name: str, variant: str, defense: NearestNeighborDefense) -> Subject:
    return Subject(
        name,
        defense,
        variant,
        database=defense.database.fingerprint,
        database_rows=len(defense.database),
        every_eps=variant == "calibrated",
    )
