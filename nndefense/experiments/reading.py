"""Shipped recipes: TOML files beside this one, at one of two scales."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nndefense import recipes
from nndefense.errors import InputError
from nndefense.experiments.recipe import ExperimentRecipe

SCALES = ("full", "small")


def recipe_names() -> tuple[str, ...]:
    """The names of the shipped recipes, in alphabetical order."""
    return recipes.shipped(__package__)


def shipped_recipe(name: str, scale: str = "full") -> ExperimentRecipe:
    """Read a shipped recipe at one scale.

    Args:
        name: one of :func:`recipe_names`.
        scale: ``full``, the papers' settings for a GPU, or ``small``, for two CPU cores.

    Raises:
        InputError: no such recipe or scale.
    """
    return recipe_from(recipes.read_shipped(__package__, name), name, scale)


def recipe_from(values: Mapping[str, Any], name: str, scale: str) -> ExperimentRecipe:
    """Make a recipe from the values of a TOML file.

    What stands in the table of the scale (``[full]``, ``[small]``) replaces what stands at the top, ``settings`` and
    ``attack`` entry by entry. ``[[method]]``, ``[[threat]]``, ``[[evaluation]]`` and ``[[published]]`` are lists of
    tables, at the top or for one scale, as ``[[small.method]]``; the eps of a threat is a number or a quotient such as
    ``"8/255"``, or a list of them, and makes a threat each.

    Raises:
        InputError: an entry is missing, unknown, of the wrong kind or out of range; the message names it.
    """
    try:
        return _recipe(values, name, scale)
    except InputError as error:
        raise InputError(f"recipe {name} at scale {scale}: {error}") from None


def _recipe(values: Mapping[str, Any], name: str, scale: str) -> ExperimentRecipe:
    if scale not in SCALES:
        raise InputError(f"there is no scale {scale!r}: choose {' or '.join(SCALES)}")
    if values.get(scale) is None:
        raise InputError(f"it has no table [{scale}]")
    chosen = {key: value for key, value in values.items() if key not in SCALES}
    for key, value in recipes.mapping(values[scale], scale).items():
        both = key in ("settings", "attack") and isinstance(chosen.get(key), Mapping) and isinstance(value, Mapping)
        chosen[key] = {**chosen[key], **value} if both else value
    return recipes.build(ExperimentRecipe, {"evaluation": [], **chosen}, given={"name": name, "scale": scale})
