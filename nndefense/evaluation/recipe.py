"""A recipe: what to evaluate, as a TOML file that is checked before anything runs and echoed into the results."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, fields
from pathlib import Path
from typing import Any

from nndefense.errors import DataError, InputError
from nndefense.evaluation.threats import THREAT_MODELS, AttackSettings, attacks_for

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

_SECTIONS = ("data", "models", "defense", "report", "attack")


@dataclass(frozen=True)
class Rung:
    """One threat model with one attack and its budgets."""

    threat_model: str
    attack: AttackSettings

    def __post_init__(self) -> None:
        if self.threat_model not in THREAT_MODELS:
            raise InputError(f"threat_model is {self.threat_model!r}, but must be one of {', '.join(THREAT_MODELS)}")
        if self.attack.name not in attacks_for(self.threat_model):
            raise InputError(
                f"the attack {self.attack.name!r} is not one for the threat model {self.threat_model!r}: choose one of "
                f"{', '.join(attacks_for(self.threat_model))}"
            )

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {"threat_model": self.threat_model, **self.attack.to_json()}


@dataclass(frozen=True)
class Recipe:
    """Everything that an evaluation's numbers depend on, as names: nothing is opened here.

    Attributes:
        dataset: spec of the labelled images.
        classifier, surrogate: sources of classifiers; no surrogate, no black box.
        database: folder of the image database, or None to evaluate the classifier alone.
        rungs: threat models with their attacks; clean accuracy is always measured.
        headline_norm, headline_eps: the budget of the tables; one of those that are run.
        limit: how many images, drawn at random under the seed; None for all.
        k, weighting: of the defence; None for the calibrated ones.
        sizes: whether smaller databases are measured too, at the headline budget.
        audit: whether the checks that need runs of their own are made, on up to ``audit_images`` images.
        title: a line for people.
    """

    dataset: str
    classifier: str
    rungs: tuple[Rung, ...]
    headline_norm: str
    headline_eps: float
    database: str | None = None
    surrogate: str | None = None
    classes: str | None = None
    input_shape: tuple[int, int, int] | None = None
    limit: int | None = None
    k: int | None = None
    weighting: str | None = None
    sizes: bool = True
    audit: bool = True
    audit_images: int = 100
    gallery: int = 10
    batch_size: int = 128
    seed: int = 0
    title: str = ""

    def __post_init__(self) -> None:
        if not self.rungs:
            raise InputError("a recipe needs at least one [[attack]]")
        budgets = {(rung.attack.norm, eps) for rung in self.rungs for eps in rung.attack.eps}
        if (self.headline_norm, self.headline_eps) not in budgets:
            listed = ", ".join(f"{norm} {eps:g}" for norm, eps in sorted(budgets))
            raise InputError(
                f"the headline budget {self.headline_norm} {self.headline_eps:g} is not run: choose one of {listed}"
            )
        if any(rung.threat_model == "black" for rung in self.rungs) and self.surrogate is None:
            raise InputError("a black-box attack needs a surrogate: name one under [models], or leave the attack out")
        if self.database is None and any(rung.threat_model in ("white", "adaptive") for rung in self.rungs):
            raise InputError("white-box and adaptive attacks are on a defence: name its database, or leave them out")
        for name in ("audit_images", "batch_size"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} is {getattr(self, name)}, but must be at least 1")
        for name in ("gallery", "seed"):
            if getattr(self, name) < 0:
                raise InputError(f"{name} is {getattr(self, name)}, but must be at least 0")
        if self.limit is not None and self.limit < 1:
            raise InputError(f"limit is {self.limit}, but must be at least 1")

    def to_json(self) -> dict[str, Any]:
        """Plain values, rungs included."""
        return {**asdict(self), "rungs": [rung.to_json() for rung in self.rungs]}

    @property
    def sha256(self) -> str:
        """Identifies the recipe: the sha256 of its plain values in canonical form."""
        text = json.dumps(self.to_json(), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()


def read_recipe(path: Path) -> Recipe:
    """Read and check a TOML recipe; see :func:`recipe_from`.

    Raises:
        DataError: the file is missing or no TOML.
        InputError: an entry is missing, unknown or of the wrong kind; the message names it.
    """
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise DataError(f"there is no recipe at {path}") from error
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read: give a TOML file in UTF-8") from error
    except tomllib.TOMLDecodeError as error:
        raise DataError(f"{path} is no TOML ({error})") from error
    try:
        return recipe_from(values)
    except InputError as error:
        raise InputError(f"{path}: {error}") from error


# Where each entry of a recipe stands in the file.
_PLACES: dict[str, tuple[str, ...]] = {
    "": ("title", "seed", "batch_size"),
    "data": ("dataset", "limit"),
    "models": ("classifier", "surrogate", "classes", "input_shape"),
    "defense": ("database", "k", "weighting", "sizes"),
    "report": ("headline_norm", "headline_eps", "gallery", "audit", "audit_images"),
}
_KINDS: dict[str, type | tuple[type, ...]] = {
    "title": str, "seed": int, "batch_size": int, "dataset": str, "limit": int, "classifier": str, "surrogate": str,
    "classes": str, "input_shape": list, "database": str, "k": int, "weighting": str, "sizes": bool,
    "headline_norm": str, "headline_eps": (int, float, str), "gallery": int, "audit": bool, "audit_images": int,
}  # fmt: skip
_ATTACK_KINDS: dict[str, type | tuple[type, ...]] = {
    "threat_model": (str, list), "name": str, "norm": str, "eps": (int, float, str, list), "steps": int,
    "restarts": int, "loss": str,
}  # fmt: skip


def recipe_from(values: Mapping[str, Any]) -> Recipe:
    """Make a recipe from the values of a TOML file.

    Sections ``[data]``, ``[models]``, ``[defense]``, ``[report]`` and one or more ``[[attack]]``, whose
    ``threat_model`` may be a list. A budget is a number or a quotient such as ``"8/255"``, or a list of them.

    Raises:
        InputError: an entry is missing, unknown or of the wrong kind; the message names it.
    """
    found: dict[str, Any] = {}
    unknown = set(values) - set(_SECTIONS) - set(_PLACES[""])
    for section, names in _PLACES.items():
        part = values.get(section, {}) if section else {k: v for k, v in values.items() if k in names}
        if not isinstance(part, Mapping):
            raise InputError(f"[{section}] must be a table")
        unknown |= {f"{section}.{name}" for name in set(part) - set(names)}
        for name, value in part.items():
            if name in names:
                found[name] = _checked(f"{section}.{name}".lstrip("."), value, _KINDS[name])
    if unknown:
        raise InputError(f"a recipe has no entry {', '.join(sorted(unknown))}")
    tables = values.get("attack", [])
    if not isinstance(tables, list) or not all(isinstance(table, Mapping) for table in tables):
        raise InputError("attacks must be written as [[attack]] tables")
    found["rungs"] = tuple(rung for table in tables for rung in _rungs(table))
    if "headline_eps" in found:
        found["headline_eps"] = number(found["headline_eps"], "report.headline_eps")
    if "input_shape" in found:
        found["input_shape"] = tuple(found["input_shape"])
    needed = [field.name for field in fields(Recipe) if field.name not in found and _required(field)]
    if needed:
        raise InputError(f"a recipe needs {', '.join(needed)}")
    return Recipe(**found)


def _required(entry: Any) -> bool:
    return entry.default is MISSING


def _rungs(table: Mapping[str, Any]) -> list[Rung]:
    unknown = set(table) - set(_ATTACK_KINDS)
    if unknown:
        raise InputError(f"an [[attack]] has no entry {', '.join(sorted(unknown))}")
    given = {name: _checked(f"attack.{name}", value, _ATTACK_KINDS[name]) for name, value in table.items()}
    if "threat_model" not in given or "eps" not in given:
        raise InputError("an [[attack]] needs a threat_model and eps")
    models = given.pop("threat_model")
    eps = given.pop("eps")
    budgets = tuple(number(value, "attack.eps") for value in (eps if isinstance(eps, list) else [eps]))
    settings = AttackSettings(eps=budgets, **given)
    return [Rung(model, settings) for model in (models if isinstance(models, list) else [models])]


def _checked(name: str, value: Any, kind: type | tuple[type, ...]) -> Any:
    kinds = kind if isinstance(kind, tuple) else (kind,)
    # A boolean is an integer to Python, but not to people.
    if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
        raise InputError(f"{name} is {value!r}, but must be {' or '.join(sorted(k.__name__ for k in kinds))}")
    return value


def number(value: float | str, name: str) -> float:
    """A budget: a number, or a quotient such as ``"8/255"``."""
    if isinstance(value, str):
        top, slash, bottom = value.partition("/")
        try:
            return float(top) / (float(bottom) if slash else 1.0)
        except (ValueError, ZeroDivisionError):
            raise InputError(f'{name} is {value!r}, but must be a number or a quotient such as "8/255"') from None
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise InputError(f"{name} is {value!r}, but must be a number")
    return float(value)


def rungs_for(
    threat_models: Sequence[str], attack: AttackSettings, adaptive: AttackSettings | None = None
) -> tuple[Rung, ...]:
    """The ladder of one attack under several threat models; ``adaptive`` is what the adaptive attacker runs."""
    return tuple(
        Rung(model, adaptive if model == "adaptive" and adaptive is not None else attack) for model in threat_models
    )
