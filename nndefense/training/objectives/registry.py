"""The objectives by name, with their weights."""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, TypeVar

from nndefense.errors import InputError
from nndefense.training.batch import Objective

_F = TypeVar("_F", bound=Objective)
# What most weights may be.
SHARE = (0.0, 1.0)
WEIGHT = (0.0, math.inf)


@dataclass(frozen=True)
class ObjectiveSpec:
    """An objective that can be asked for by name.

    Attributes:
        name: what it is asked for by.
        function: the pure function ``(model, batch, attack, *, weights)`` -> :class:`Outcome`.
        summary: one line for a list of choices.
        attack: whether it needs an attack.
        unlabelled: whether it takes unlabelled images; it then needs them.
        limits: what each weight may be: the choices, or the least and the largest number (a whole one, where the
            default is).
        rows: whether it retrieves from rows of the training set, and of unlabelled images if there are some.
    """

    name: str
    function: Objective
    summary: str
    attack: bool
    unlabelled: bool
    limits: Mapping[str, tuple[Any, ...]]
    rows: bool = False

    @property
    def weights(self) -> dict[str, Any]:
        """The weights and other choices by name, with their defaults."""
        found = inspect.signature(self.function).parameters.values()
        return {one.name: one.default for one in found if one.kind is one.KEYWORD_ONLY}


#: Every objective by its name, as :func:`entered` puts it in.
OBJECTIVES: dict[str, ObjectiveSpec] = {}


def entered(
    name: str,
    summary: str,
    limits: Mapping[str, tuple[Any, ...]] = MappingProxyType({}),
    *,
    attack: bool = True,
    unlabelled: bool = False,
    rows: bool = False,
) -> Callable[[_F], _F]:
    """Enter the function that is decorated in :data:`OBJECTIVES`; arguments as for :class:`ObjectiveSpec`."""

    def enter(function: _F) -> _F:
        OBJECTIVES[name] = ObjectiveSpec(name, function, summary, attack, unlabelled, limits, rows)
        return function

    return enter


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
        _check_weight(spec, weight, value)
    return functools.partial(spec.function, **weights)


def find_spec(objective: Objective) -> ObjectiveSpec | None:
    """The entry of :data:`OBJECTIVES` that an objective comes from, or None for a function of the user's own."""
    function = objective.func if isinstance(objective, functools.partial) else objective
    return next((spec for spec in OBJECTIVES.values() if spec.function is function), None)


def weights_of(objective: Objective) -> dict[str, Any]:
    """All weights of an objective by name: those that are bound, and the defaults of a known one."""
    spec = find_spec(objective)
    bound = dict(objective.keywords) if isinstance(objective, functools.partial) else {}
    return (spec.weights if spec else {}) | bound


def objective_name(objective: Objective) -> str:
    """The text that identifies an objective with all its weights, such as ``trades(beta=6.0)``.

    For a function of the user's own it is the attribute ``description``, else the name, else the ``repr``.
    """
    bound = weights_of(objective)
    function = objective.func if isinstance(objective, functools.partial) else objective
    if described := getattr(objective, "description", None):
        return str(described)
    if spec := find_spec(objective):
        # An int and a float of the same value are the same weight.
        shown = [f"{key}={float(v) if isinstance(v, int) else v}" for key, v in bound.items()]
        return f"{spec.name}({', '.join(shown)})" if shown else spec.name
    named = str(getattr(function, "description", None) or getattr(function, "__qualname__", None) or repr(function))
    return f"{named}({', '.join(f'{key}={value!r}' for key, value in bound.items())})" if bound else named


def _check_weight(spec: ObjectiveSpec, weight: str, value: Any) -> None:
    name, limits = spec.name, spec.limits[weight]
    low, high = limits[0], limits[-1]
    if isinstance(low, str):
        if value not in limits:
            raise InputError(f"{weight} of the objective {name} is {value!r}, but must be one of {', '.join(limits)}")
        return
    number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if not number or not low <= value <= high:
        wanted = f"between {low:g} and {high:g}" if math.isfinite(high) else f"finite and at least {low:g}"
        raise InputError(f"{weight} of the objective {name} is {value!r}, but must be {wanted}")
    if isinstance(spec.weights[weight], int) and value != int(value):
        raise InputError(f"{weight} of the objective {name} is {value!r}, but must be a whole number")
