"""The objectives by name, with their weights."""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from nndefense.errors import InputError
from nndefense.training.batch import Objective
from nndefense.training.objectives.ensemble import ensemble_adversarial
from nndefense.training.objectives.interpolated import interpolated
from nndefense.training.objectives.logit_pairing import PASSES, alp, clp
from nndefense.training.objectives.self_training import robust_consistency, rst, rst_at, rst_trades, self_training
from nndefense.training.objectives.spatial import random_augmentation, worst_of_10
from nndefense.training.objectives.supervised import MIXES, adversarial, half_half, standard
from nndefense.training.objectives.tradeoff import trades

_SHARE = (0.0, 1.0)
_WEIGHT = (0.0, math.inf)


@dataclass(frozen=True)
class ObjectiveSpec:
    """An objective that can be asked for by name.

    Attributes:
        function: the pure function (model, batch, attack, *, weights) -> :class:`Outcome`.
        summary: one line for a list of choices.
        attack: whether it needs an attack.
        unlabelled: whether it takes unlabelled images; it then needs them.
        limits: what each weight may be: the choices, or the least and the largest number.
    """

    function: Objective
    summary: str
    attack: bool = True
    unlabelled: bool = False
    limits: Mapping[str, tuple[str, ...] | tuple[float, float]] = field(default_factory=dict)

    @property
    def weights(self) -> dict[str, Any]:
        """The weights and other choices by name, with their defaults."""
        found = inspect.signature(self.function).parameters.values()
        return {one.name: one.default for one in found if one.kind is one.KEYWORD_ONLY}


#: Every objective by its name. Another one is a function in a file of its own and an entry here.
OBJECTIVES: dict[str, ObjectiveSpec] = {
    "standard": ObjectiveSpec(standard, "cross-entropy of the images as they are", attack=False),
    "half-half": ObjectiveSpec(half_half, "half clean and half attacked images", limits={"mix": MIXES}),
    "adversarial": ObjectiveSpec(adversarial, "attacked images alone (Madry et al. 2018)"),
    "trades": ObjectiveSpec(
        trades,
        "cross-entropy plus beta times the divergence under attack (Zhang et al. 2019)",
        limits={"beta": _WEIGHT},
    ),
    "interpolated": ObjectiveSpec(
        interpolated, "mixup of clean and of attacked images (Lamb et al. 2019)", limits={"alpha": _WEIGHT}
    ),
    "ensemble-adversarial": ObjectiveSpec(
        ensemble_adversarial,
        "half clean images, half attacked by one of several nets (Tramer et al. 2018)",
        limits={"mix": _SHARE},
    ),
    "alp": ObjectiveSpec(
        alp,
        "cross-entropy, and the logits of clean and attacked images drawn together (Kannan et al. 2018)",
        limits={"pairing": _WEIGHT, "smoothing": _SHARE, "passes": PASSES},
    ),
    "clp": ObjectiveSpec(
        clp,
        "cross-entropy, and the logits of pairs of clean images drawn together (Kannan et al. 2018)",
        attack=False,
        limits={"pairing": _WEIGHT, "smoothing": _SHARE, "noise": _WEIGHT},
    ),
    "worst-of-10": ObjectiveSpec(
        worst_of_10, "the worst of 10 rotations and translations", attack=False, limits={"mix": _SHARE}
    ),
    "random-augmentation": ObjectiveSpec(
        random_augmentation, "one random rotation and translation", attack=False, limits={"mix": _SHARE}
    ),
    "self-training": ObjectiveSpec(
        self_training,
        "cross-entropy of labels and pseudo-labels",
        attack=False,
        unlabelled=True,
        limits={"std_unlabelled": _SHARE},
    ),
    "rst": ObjectiveSpec(
        rst,
        "robust self-training with four free weights",
        unlabelled=True,
        limits=dict.fromkeys(("std_labelled", "rob_labelled", "std_unlabelled", "rob_unlabelled"), _WEIGHT),
    ),
    "rst-at": ObjectiveSpec(
        rst_at,
        "robust self-training with adversarial training (Raghunathan et al. 2020)",
        unlabelled=True,
        limits=dict.fromkeys(("mix", "std_unlabelled", "rob_unlabelled"), _SHARE),
    ),
    "rst-trades": ObjectiveSpec(
        rst_trades,
        "robust self-training with TRADES (Carmon et al. 2019)",
        unlabelled=True,
        limits={"beta": _WEIGHT, "unlabelled": _SHARE},
    ),
    "robust-consistency": ObjectiveSpec(
        robust_consistency,
        "labels where there are some, stability everywhere",
        unlabelled=True,
        limits={"beta": _WEIGHT},
    ),
}


def make_objective(name: str, **weights: Any) -> Objective:
    """Bind an objective's weights: ``make_objective("trades", beta=3.0)``.

    Args:
        name: one of :data:`OBJECTIVES`.
        **weights: those of the objective that shall differ from their defaults.

    Returns:
        A :func:`functools.partial` of the objective's function.

    Raises:
        InputError: an unknown objective or weight, or a weight out of range.
    """
    if name not in OBJECTIVES:
        raise InputError(f"there is no objective {name!r}: choose one of {', '.join(OBJECTIVES)}")
    spec = OBJECTIVES[name]
    for weight, value in weights.items():
        if weight not in spec.weights:
            known = f"it takes {', '.join(spec.weights)}" if spec.weights else "it takes none"
            raise InputError(f"the objective {name} has no weight {weight!r}: {known}")
        _check_weight(name, weight, value, spec.limits[weight])
    return functools.partial(spec.function, **weights)


def find_spec(objective: Objective) -> ObjectiveSpec | None:
    """The entry of :data:`OBJECTIVES` that an objective comes from, or None for a function of the user's own."""
    function = objective.func if isinstance(objective, functools.partial) else objective
    return next((spec for spec in OBJECTIVES.values() if spec.function is function), None)


def objective_name(objective: Objective) -> str:
    """The text that identifies an objective with all its weights, such as ``trades(beta=6.0)``.

    For a function of the user's own it is the attribute ``description``, else the name, else the ``repr``.
    """
    bound = dict(objective.keywords) if isinstance(objective, functools.partial) else {}
    function = objective.func if isinstance(objective, functools.partial) else objective
    described = getattr(objective, "description", None)
    if described:
        return str(described)
    for name, spec in OBJECTIVES.items():
        if spec.function is function:
            weights = spec.weights | bound
            # An int and a float of the same value are the same weight.
            shown = [f"{key}={float(v) if isinstance(v, int) else v}" for key, v in weights.items()]
            return f"{name}({', '.join(shown)})" if shown else name
    named = str(getattr(function, "description", None) or getattr(function, "__qualname__", None) or repr(function))
    return f"{named}({', '.join(f'{key}={value!r}' for key, value in bound.items())})" if bound else named


def _check_weight(name: str, weight: str, value: Any, limits: tuple[str, ...] | tuple[float, float]) -> None:
    low, high = limits[0], limits[-1]
    if isinstance(low, str) or isinstance(high, str):
        if value not in limits:
            raise InputError(
                f"{weight} of the objective {name} is {value!r}, but must be one of {', '.join(map(str, limits))}"
            )
        return
    number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if not number or not low <= value <= high:
        wanted = f"between {low:g} and {high:g}" if math.isfinite(high) else f"finite and at least {low:g}"
        raise InputError(f"{weight} of the objective {name} is {value!r}, but must be {wanted}")
