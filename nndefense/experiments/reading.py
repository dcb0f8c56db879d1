"""Shipped recipes: TOML files beside this one, read and checked with errors that name the entry."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from importlib import resources
from typing import Any

from nndefense.errors import InputError
from nndefense.evaluation.recipe import number
from nndefense.experiments.recipe import SPATIAL, Method, Published, Recipe, Threat, evaluation_attack

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

SCALES = ("full", "small")
_TEXT, _COUNT, _TABLE, _LIST = str, int, Mapping, list
# What may stand at the top of a recipe or, for one scale, in the table of that scale.
_EITHER: dict[str, Any] = {
    "about": _TEXT, "train": _TEXT, "test": _TEXT, "architecture": _TEXT, "validation": _COUNT, "images": _COUNT,
    "seeds": _COUNT, "check_steps": _COUNT, "batch_size": _COUNT, "labels": _LIST, "grid": _LIST, "settings": _TABLE,
    "attack": _TABLE, "start": _TABLE, "method": _LIST, "compare": _LIST, "threat": _LIST, "evaluation": _LIST,
    "published": _LIST, "published_source": _TEXT,
}  # fmt: skip
_TOP: dict[str, Any] = {
    "title": _TEXT, "sources": _LIST, "layout": _TEXT, "figure": _TEXT, **dict.fromkeys(SCALES, _TABLE),
}  # fmt: skip
_METHOD: dict[str, Any] = {
    "name": _TEXT, "objective": _TEXT, "weights": _TABLE, "settings": _TABLE, "attack": _TABLE,
}  # fmt: skip
_NUMBER = (int, float)
_THREAT: dict[str, Any] = {"norm": _TEXT, "eps": (*_NUMBER, str, list), "degrees": _NUMBER, "shift": _NUMBER}
_PUBLISHED: dict[str, Any] = {
    "method": _TEXT, "threat": _TEXT, "standard": _NUMBER, "robust": _NUMBER,
}  # fmt: skip


def recipe_names() -> tuple[str, ...]:
    """The names of the shipped recipes, in alphabetical order."""
    folder = resources.files(__package__).joinpath("recipes")
    return tuple(sorted(entry.name.removesuffix(".toml") for entry in folder.iterdir() if entry.name.endswith(".toml")))


def shipped_recipe(name: str, scale: str = "full") -> Recipe:
    """Read a shipped recipe at one scale.

    Args:
        name: one of :func:`recipe_names`.
        scale: ``full``, the papers' settings for a GPU, or ``small``, for two CPU cores.

    Raises:
        InputError: no such recipe or scale.
    """
    if name not in recipe_names():
        raise InputError(f"there is no recipe {name!r}: choose one of {', '.join(recipe_names())}")
    text = resources.files(__package__).joinpath("recipes").joinpath(f"{name}.toml").read_text(encoding="utf-8")
    return recipe_from(tomllib.loads(text), name, scale)


def recipe_from(values: Mapping[str, Any], name: str, scale: str) -> Recipe:
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


def _recipe(values: Mapping[str, Any], name: str, scale: str) -> Recipe:
    if scale not in SCALES:
        raise InputError(f"there is no scale {scale!r}: choose {' or '.join(SCALES)}")
    _check(values, _TOP | _EITHER, "")
    own = values.get(scale)
    if own is None:
        raise InputError(f"it has no table [{scale}]")
    _check(own, _EITHER, f"{scale}.")
    given = {key: value for key, value in values.items() if key not in SCALES}
    for key, value in own.items():
        merged = key in ("settings", "attack") and key in given
        given[key] = {**given[key], **value} if merged else value
    for needed in ("title", "train", "test", "architecture", "method", "threat"):
        if needed not in given:
            raise InputError(f"it needs {needed}")
    threats = tuple(threat for table in given.pop("threat") for threat in _threats(table))
    methods = tuple(_method(table) for table in given.pop("method"))
    published = tuple(Published(**_checked(table, _PUBLISHED, "published.")) for table in given.pop("published", []))
    evaluation = tuple(_evaluation(table) for table in given.pop("evaluation", []))
    for key in ("compare", "labels", "grid", "sources"):
        if key in given:
            given[key] = tuple(tuple(entry) if isinstance(entry, list) else entry for entry in given[key])
    return Recipe(
        name=name,
        scale=scale,
        threats=threats,
        methods=methods,
        published=published,
        evaluation=evaluation,
        **given,
    )


def _threats(table: Any) -> list[Threat]:
    found = _checked(table, _THREAT, "threat.", needed=("norm",))
    if found["norm"] == SPATIAL:
        return [Threat(**found)]
    if "eps" not in found:
        raise InputError("a [[threat]] needs eps")
    eps = found.pop("eps")
    return [
        Threat(eps=number(one, "threat.eps"), text=one if isinstance(one, str) else f"{one:g}", **found)
        for one in (eps if isinstance(eps, list) else [eps])
    ]


def _method(table: Any) -> Method:
    return Method(**_checked(table, _METHOD, "method.", needed=("name", "objective")))


def _evaluation(table: Any) -> Any:
    kinds = {"name": _TEXT, "steps": _COUNT, "restarts": _COUNT, "loss": _TEXT}
    return evaluation_attack(**_checked(table, kinds, "evaluation.", needed=("name",)))


def _checked(table: Any, kinds: Mapping[str, Any], where: str, needed: tuple[str, ...] = ()) -> dict[str, Any]:
    if not isinstance(table, Mapping):
        raise InputError(f"[[{where.rstrip('.')}]] must be a table")
    _check(table, kinds, where)
    for name in needed:
        if name not in table:
            raise InputError(f"a [[{where.rstrip('.')}]] needs {name}")
    return dict(table)


def _check(table: Mapping[str, Any], kinds: Mapping[str, Any], where: str) -> None:
    """Raise :class:`InputError` for an entry that is unknown or of the wrong kind."""
    for name, value in table.items():
        if name not in kinds:
            raise InputError(f"a recipe has no entry {where}{name}: choose from {', '.join(kinds)}")
        kind = kinds[name] if isinstance(kinds[name], tuple) else (kinds[name],)
        # A boolean is an integer to Python, but not to people.
        if not isinstance(value, kind) or isinstance(value, bool):
            wanted = " or ".join({"str": "text", "int": "a whole number", "float": "a number", "list": "a list"}.get(
                one.__name__, "a table") for one in kind)  # fmt: skip
            raise InputError(f"{where}{name} is {value!r}, but must be {wanted}")
