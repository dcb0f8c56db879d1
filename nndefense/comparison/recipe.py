"""What a comparison measures: rows, attacks and budgets, read from TOML and checked before anything is made."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

from nndefense import recipes
from nndefense.attacks import norms
from nndefense.comparison.published import PUBLISHED
from nndefense.errors import InputError, check_choice
from nndefense.evaluation.ladder import DEFENDED
from nndefense.own_code import PYTHON
from nndefense.pipeline import defenses
from nndefense.pipeline.materials import MaterialSettings


@dataclass(frozen=True)
class RowSpec:
    """One row of the table.

    Attributes:
        name: as it stands in the table; unique.
        kind: a defence of :mod:`nndefense.pipeline.defenses`, or ``python:FILE:FACTORY``.
        options: of the defence.
        published: the name of the printed row beside it, in :data:`~nndefense.comparison.published.PUBLISHED`, or None.
        informed: whether attackers who know the defence are sent against it.
    """

    name: str
    kind: str
    options: Mapping[str, Any] = field(default_factory=dict)
    published: str | None = None
    informed: bool = True

    def __post_init__(self) -> None:
        if self.kind not in defenses.names() and not self.kind.startswith(PYTHON):
            known = ", ".join(defenses.names())
            raise InputError(f"the row {self.name!r} is of the kind {self.kind!r}, but must be {known}")
        # A user's code is not run to ask what it takes.
        if self.kind in defenses.names():
            checked = defenses.get(self.kind).checked(self.options, f"the row {self.name!r}")
            object.__setattr__(self, "options", checked)
        if self.published is not None and self.published not in PUBLISHED:
            raise InputError(f"the row {self.name!r} stands beside {self.published!r}: choose {', '.join(PUBLISHED)}")


@dataclass(frozen=True)
class Scope(MaterialSettings):
    """How much is done, which differs between data sets.

    Attributes:
        eps: budgets of the attacks, in units of ``norm``; the table shows the headline.
        limit: images to report on, drawn at random; None for all.
        restarts: of PGD on the classifier and on the surrogate, beside ``steps``.
        white_steps: of PGD on a defence itself.
        adaptive_steps: of the attacks on retrieval.
        informed_eps: budgets of these two; None for all.
        net: source of the classifier, where none is given.
    """

    eps: tuple[float, ...] = (0.03, 0.06)
    limit: int | None = 500
    restarts: int = 1
    white_steps: int = 20
    adaptive_steps: int = 100
    informed_eps: tuple[float, ...] | None = None
    net: str = ""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.eps or not all(eps > 0 for eps in self.eps):
            raise InputError("a comparison needs at least one eps above 0")
        norms.check_eps(max(self.eps), self.norm)
        if self.headline not in self.eps:
            raise InputError(f"the headline budget {self.headline:g} is not among the eps that are run: add it")
        if self.informed_eps is not None and self.headline not in self.informed_eps:
            raise InputError("informed_eps must hold the headline budget: the table shows it")
        recipes.check_least(self, 1, "restarts", "white_steps", "adaptive_steps", "limit")


@dataclass(frozen=True)
class ComparisonRecipe:
    """A comparison of defences.

    Attributes:
        name: of the recipe.
        title, about: for people.
        rows: what is compared, in this order.
        scope: how much is done.
        seed: of everything drawn.
    """

    name: str
    title: str
    about: str
    rows: tuple[RowSpec, ...] = field(metadata=recipes.at("row"))
    scope: Scope = field(metadata=recipes.at("scope", lambda values: changed(Scope(), values)))
    seed: int = 0

    def __post_init__(self) -> None:
        names = [row.name for row in self.rows]
        if len(set(names)) != len(names) or not names:
            raise InputError("a comparison needs rows, each with a name of its own")
        if self.rows[0].kind != "none":
            raise InputError("the first row must be of the kind none: every defence is compared with the bare net")

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return json.loads(json.dumps(asdict(self)))  # type: ignore[no-any-return]

    @property
    def sha256(self) -> str:
        """Identifies the recipe: the sha256 of its plain values in canonical form."""
        return recipes.identity(self.to_json())


def comparison_names() -> tuple[str, ...]:
    """The shipped recipes."""
    return recipes.shipped(__package__)


def shipped_comparison(name: str, dataset: str, *, seed: int = 0, scope: str | None = None) -> ComparisonRecipe:
    """The shipped recipe ``name``, for a ``seed``, with the scope that it has for a ``dataset``, ``digits`` of
    ``digits:train``, or the one named.

    Raises:
        InputError: there is no such recipe, or no such scope.
    """
    return comparison_from(comparison_values(name), name, dataset, seed=seed, scope=scope)


def comparison_values(name: str) -> dict[str, Any]:
    """The values in the TOML file of the shipped recipe ``name``; errors as for :func:`shipped_comparison`."""
    return recipes.read_shipped(__package__, name, "comparison")


def material_settings(dataset: str, name: str = "table2") -> dict[str, Any]:
    """How the shipped recipe ``name`` makes its defences on a ``dataset``, for an evaluation of some of them.

    Returns:
        Entries of :class:`~nndefense.pipeline.MaterialSettings`, without those that follow from the evaluation.
    """
    scope = shipped_comparison(name, dataset).scope
    told = [entry.name for entry in fields(MaterialSettings) if entry.name not in ("norm", "headline", "batch_size")]
    return {entry: getattr(scope, entry) for entry in told}


def comparison_from(
    values: Mapping[str, Any], name: str, dataset: str, *, seed: int = 0, scope: str | None = None
) -> ComparisonRecipe:
    """Make the recipe ``name`` for a ``dataset`` and a ``seed`` from the values of a TOML file: ``title``, ``about``,
    ``[[row]]``, ``[scope.default]`` and, for data sets that have one, ``[scope.NAME]``, whose entries take the place of
    the default's; ``scope`` names one whatever the data set. A scope can have rows of its own, ``[[scope.NAME.row]]``.

    Raises:
        InputError: an entry is missing, unknown or cannot be used; the message names it.
    """
    scopes = recipes.mapping(values.get("scope", {}), "scope")
    if scope is not None:
        check_choice("the scope", scope, scopes)
    chosen = scope or dataset.partition(":")[0].partition("[")[0]
    own = {
        key: entry
        for one in ("default", chosen)
        for key, entry in recipes.mapping(scopes.get(one, {}), f"scope.{one}").items()
    }
    whole = {**values, "about": str(values.get("about", "")).strip()}
    if "row" in own:
        whole["row"] = own.pop("row")
    return recipes.build(ComparisonRecipe, {**whole, "scope": own}, given={"name": name, "seed": seed})


def retrieved_by(recipe: ComparisonRecipe, **options: Any) -> ComparisonRecipe:
    """The recipe with these options in every nearest-neighbour row; those that are None stay as they are.

    Raises:
        InputError: it has no such row, or options cannot be used.
    """
    asked = {name: value for name, value in options.items() if value is not None}
    if asked and not any(row.kind == DEFENDED for row in recipe.rows):
        raise InputError(f"{', '.join(asked)} is for rows of the kind {DEFENDED}, and there is none: leave it out")
    rows = (replace(row, options={**row.options, **asked}) if row.kind == DEFENDED else row for row in recipe.rows)
    return replace(recipe, rows=tuple(rows))


def changed(scope: Scope, values: Mapping[str, Any]) -> Scope:
    """A scope with the entries of ``values`` changed; budgets may be quotients such as ``"8/255"``.

    Other budgets bring their largest as the headline, and where the scope keeps attackers who know the defence to some
    budgets, another headline is theirs.

    Raises:
        InputError: an unknown entry or one that cannot be used.
    """
    found = recipes.entries(Scope, values, "scope")
    if "eps" in found:
        found.setdefault("headline", max(found["eps"]))
    if "headline" in found and scope.informed_eps is not None:
        found.setdefault("informed_eps", (found["headline"],))
    return replace(scope, **found)
