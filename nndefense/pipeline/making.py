"""Making a defence that the registry names, and a subject of an evaluation of it."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from nndefense.errors import InputError
from nndefense.evaluation import Subject
from nndefense.evaluation.judging import is_random
from nndefense.evaluation.subjects import known_of
from nndefense.images import shape_text
from nndefense.models.state import update_with_state
from nndefense.own_code import taken, told
from nndefense.pipeline import defenses
from nndefense.pipeline.materials import Materials


@dataclass(frozen=True)
class Made:
    """A defence that was made.

    Attributes:
        model: images N x C x H x W in [0, 1] -> scores N x classes of the classifier.
        facts: what is to be known of it, as plain values; they identify it, too.
        database, database_rows: fingerprint and number of rows of its database, or None.
        identity: what else tells it apart from others; :func:`make_defense` adds options, weights and images.
    """

    model: nn.Module
    facts: dict[str, Any] = field(default_factory=dict)
    database: str | None = None
    database_rows: int | None = None
    identity: dict[str, Any] = field(default_factory=dict)


def make_defense(defense: defenses.Defense, materials: Materials, options: Mapping[str, Any] | None = None) -> Made:
    """Make a defence of the registry, or of the user's own code.

    Args:
        defense: as :func:`nndefense.pipeline.defenses.get` gives it.
        materials: what it is made of.
        options: of the defence.

    Raises:
        InputError: it takes no such option, it is made of images that are not there, or what it makes is not a module
            that answers in the classifier's classes.
    """
    name, classifier, given = defense.name, materials.classifier, dict(options or {})
    function = defense.load()
    if wrong := sorted(set(given) - set(taken(function, given))):
        raise InputError(f"the defence {name} takes no {', '.join(wrong)}")
    asked = {"materials", "data"}.intersection(inspect.signature(function).parameters)
    made = function(classifier, **dict.fromkeys(asked, materials), **given)
    if not isinstance(made, Made):
        if not isinstance(made, nn.Module):
            raise InputError(f"the defence {name} is made as {type(made).__name__}: make a torch.nn.Module")
        form = ", ".join(f"{key} {value}" for key, value in given.items())
        made = Made(made.to(classifier.device).eval(), {"form": form or defense.about})
    if defense.sha256:
        _probe(name, made.model, materials)
        made.facts["code"] = defense.sha256[:16]
    return replace(made, identity={**_identity(made.model, materials, bool(asked)), "options": given, **made.identity})


def _identity(model: nn.Module, materials: Materials, asked: bool) -> dict[str, Any]:
    """What a defence answers by beside its code: weights, database, draws, and the images that it asked for."""
    weights = hashlib.sha256()
    update_with_state(weights, model.state_dict())
    found: dict[str, Any] = {"weights": weights.hexdigest(), "draws": materials.scope.draws}
    if database := getattr(getattr(model, "database", None), "fingerprint", None):
        found["database"] = str(database)
    if asked and materials.train is not None:
        found["images"] = [materials.train.fingerprint, materials.scope.holdout, materials.seed]
    return found


@torch.no_grad()
def _probe(name: str, model: nn.Module, materials: Materials) -> None:
    """Check that a defence that is not the library's answers in the classifier's classes."""
    classifier = materials.classifier
    images = torch.zeros((2, *classifier.input_shape), device=classifier.device)
    images[1] = 0.5
    with told(f"the defence {name}"):
        scores = model(images)
    wanted = (2, len(classifier.classes))
    shaped = isinstance(scores, Tensor) and tuple(scores.shape) == wanted
    if not shaped or not bool(scores.isfinite().all()):
        found = shape_text(scores.shape) if isinstance(scores, Tensor) else type(scores).__name__
        found = "NaN or infinite scores" if shaped else found
        raise InputError(
            f"the defence {name} gives {found} for 2 images: it must give finite logits or log-probabilities "
            f"{shape_text(wanted)}"
        )


def with_known_seed(made: Made, seed: int) -> Made | None:
    """A random defence as it is when its seed is known, so that it and the attacker draw the same.

    Args:
        made: the defence.
        seed: the one that is known.

    Returns:
        The defence with that seed, or None for one that does not draw.
    """
    if not is_random(made.model) or not callable(fixed := getattr(made.model, "fixed", None)):
        return None
    return replace(made, model=fixed(seed), facts={**made.facts, "known seed": seed})


def subject_of(made: Made, name: str, variant: str, materials: Materials, *, informed: bool = True) -> Subject:
    """What an evaluation measures of a defence, with what attackers who know it are given.

    Args:
        made: the defence.
        name: in the records; the bare net is ``none`` there.
        variant: what it is in the comparison.
        materials: what it was made of.
        informed: whether attackers who know it are sent against it.
    """
    known = {}
    if informed:
        images = materials.rows if materials.train is not None else None
        known = known_of(made.model, materials.classifier, images=images, draws=materials.scope.draws)
    apart = {**made.identity, "options": sorted(made.identity.get("options", {}).items())}
    identity = repr([sorted(made.facts.items()), sorted(apart.items())])
    return Subject(name, made.model, variant, made.database, made.database_rows, identity=identity, **known)
