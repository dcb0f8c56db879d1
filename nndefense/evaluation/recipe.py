"""A recipe: what to evaluate, as a TOML file that is checked before anything runs and echoed into the results."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from nndefense import recipes
from nndefense.attacks import registry
from nndefense.certificates import registry as certificates
from nndefense.errors import InputError, check_choice
from nndefense.evaluation.ladder import DEFENDED, INFORMED
from nndefense.evaluation.threats import AttackSettings
from nndefense.own_code import check_allowed


@dataclass(frozen=True)
class Rung:
    """One threat model with one attack and its budgets."""

    threat_model: str
    attack: AttackSettings

    def __post_init__(self) -> None:
        known = registry.THREAT_MODELS
        check_choice("threat_model", self.threat_model, known)
        if self.threat_model not in self.attack.attack.threat_models:
            raise InputError(
                f"the attack {self.attack.name!r} is not one for the threat model {self.threat_model!r}: choose one of "
                f"{', '.join(registry.names(self.threat_model))}"
            )

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {"threat_model": self.threat_model, **self.attack.to_json()}


def _rungs(values: Any) -> tuple[Rung, ...]:
    """The rungs of ``[[attack]]`` tables, whose ``threat_model`` may be a list."""
    found: list[Rung] = []
    for table in recipes.mappings(values, "attack"):
        models = recipes.converted(tuple[str, ...], table.pop("threat_model", ()), "attack.threat_model")
        if not models:
            raise InputError("a recipe needs attack.threat_model")
        settings = recipes.build(AttackSettings, table, "attack", needed=("eps",))
        found += [Rung(model, settings) for model in models]
    return tuple(found)


_RULE = ("k", "weighting", "votes", "temperature", "alpha")


@dataclass(frozen=True)
class Recipe:
    """Everything that an evaluation's numbers depend on, as names: nothing is opened here.

    Attributes:
        dataset: spec of the labelled images.
        classifier, surrogate: sources of classifiers; no surrogate, no black box.
        database: folder of the image database, or None to evaluate the classifier alone.
        rungs: threat models with their attacks; clean accuracy is always measured.
        headline_norm, headline_eps: the budget of the tables; one of those that are run.
        defenses: more defences to measure, by their names in :mod:`nndefense.pipeline.defenses` or as
            ``python:FILE:FACTORY``; without a database ``nearest-neighbor`` is one that is made.
        train_set: specs of the images that they are made of, where they need some.
        materials: how they are made: entries of :class:`~nndefense.pipeline.MaterialSettings`.
        limit: how many images, drawn at random under the seed; None for all.
        k, weighting, votes, temperature, alpha: of the defence's rule; None for the stored ones. An infinite
            temperature is no kernel.
        sizes: whether smaller databases are measured too, at the headline budget.
        abstain: rates of clean images that may be rejected, for each of which it is measured what abstaining is worth.
        abstain_on: spec of the held-out images that its thresholds are set on; None: as
            :func:`~nndefense.pipeline.opening.held_out` finds them.
        abstain_steps: of the attack that must be accepted.
        certify: a method of :mod:`nndefense.certificates.registry`, whose floor stands beside the attacks.
        sigma, draws: of a method that draws noise, for each image.
        audit: whether the checks that need runs of their own are made, on up to ``audit_images`` images.
        title: a line for people.
    """

    dataset: str = field(metadata=recipes.at("data.dataset"))
    classifier: str = field(metadata=recipes.at("models.classifier"))
    rungs: tuple[Rung, ...] = field(metadata=recipes.at("attack", _rungs))
    headline_norm: str = field(metadata=recipes.at("report.headline_norm"))
    headline_eps: float = field(metadata=recipes.at("report.headline_eps"))
    database: str | None = field(default=None, metadata=recipes.at("defense.database"))
    defenses: tuple[str, ...] = field(default=(), metadata=recipes.at("defense.names"))
    train_set: tuple[str, ...] = field(default=(), metadata=recipes.at("data.train_set"))
    materials: Mapping[str, Any] = field(default_factory=dict)
    surrogate: str | None = field(default=None, metadata=recipes.at("models.surrogate"))
    classes: str | None = field(default=None, metadata=recipes.at("models.classes"))
    input_shape: tuple[int, int, int] | None = field(default=None, metadata=recipes.at("models.input_shape"))
    limit: int | None = field(default=None, metadata=recipes.at("data.limit"))
    k: int | None = field(default=None, metadata=recipes.at("defense.k"))
    weighting: str | None = field(default=None, metadata=recipes.at("defense.weighting"))
    votes: str | None = field(default=None, metadata=recipes.at("defense.votes"))
    temperature: float | None = field(default=None, metadata=recipes.at("defense.temperature"))
    alpha: float | None = field(default=None, metadata=recipes.at("defense.alpha"))
    sizes: bool = field(default=True, metadata=recipes.at("defense.sizes"))
    abstain: tuple[float, ...] = field(default=(), metadata=recipes.at("abstain.rates"))
    abstain_on: str | None = field(default=None, metadata=recipes.at("abstain.dataset"))
    abstain_steps: int = field(default=40, metadata=recipes.at("abstain.steps"))
    certify: str | None = field(default=None, metadata=recipes.at("certify.method"))
    sigma: float | None = field(default=None, metadata=recipes.at("certify.sigma"))
    draws: int = field(default=1000, metadata=recipes.at("certify.draws"))
    audit: bool = field(default=True, metadata=recipes.at("report.audit"))
    audit_images: int = field(default=100, metadata=recipes.at("report.audit_images"))
    gallery: int = field(default=10, metadata=recipes.at("report.gallery"))
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
        exact = any(rung.threat_model == "exact" for rung in self.rungs)
        if exact and self.database is None and DEFENDED not in self.defenses:
            raise InputError(
                f"the exact accuracy is that of {DEFENDED}: name its database (--database) or the defence (--defense), "
                "or leave --exact out"
            )
        defended = self.database is not None or self.defenses
        if not defended and any(rung.threat_model in INFORMED for rung in self.rungs):
            raise InputError(
                "white-box and adaptive attacks are on a defence: name its database or other defences, or leave them "
                "out"
            )
        if self.train_set and not self.defenses:
            raise InputError("a training set is what other defences are made of: name defences, or leave it out")
        if self.rule and self.database is None and DEFENDED not in self.defenses:
            raise InputError(
                f"{', '.join(_RULE[:-1])} and {_RULE[-1]} are settings of {DEFENDED}: name its database or the "
                f"defence, or leave out {' and '.join(self.rule)}"
            )
        if not all(0 < rate < 1 for rate in self.abstain):
            raise InputError(
                "clean rejection rates (--abstain) are above 0 and below 1, such as 0.05, but are "
                f"{', '.join(map(str, self.abstain))}"
            )
        if self.abstain_on is not None and not self.abstain:
            raise InputError(
                "--abstain-on is for the thresholds of --abstain: give rates (--abstain 0.05), or leave it out"
            )
        if self.certify is not None and certificates.get(self.certify).chance != (self.sigma is not None):
            raise InputError(f"sigma (--sigma) is for certificates that draw noise, and needed there: {self.certify}")
        if self.sigma is not None and not (self.certify and 0 < self.sigma < float("inf")):
            raise InputError(f"sigma (--sigma) is {self.sigma}, but must be above 0, beside a certificate (--certify)")
        recipes.check_least(self, 1, "draws", "abstain_steps", "audit_images", "batch_size", "limit", "k")
        recipes.check_least(self, 0, "gallery", "seed")

    @property
    def rule(self) -> dict[str, Any]:
        """What is asked of the defence's rule, by name."""
        return {name: value for name in _RULE if (value := getattr(self, name)) is not None}

    def to_json(self) -> dict[str, Any]:
        """Plain values, rungs included; of the rule's newer settings those that are asked for."""
        lists = {"defenses": [*self.defenses], "train_set": [*self.train_set], "abstain": [*self.abstain]}
        values = {**asdict(self), **lists, "rungs": [rung.to_json() for rung in self.rungs]}
        # A recipe without certificates is the one that it was before there were any.
        unsaid = {*_RULE[2:], "sigma", "certify"} | (set() if self.certify else {"draws"})
        return {
            name: value
            for name, value in values.items()
            if name not in unsaid or (value is not None and name != "draws")
        }

    @property
    def sha256(self) -> str:
        """Identifies the recipe: the sha256 of its plain values in canonical form."""
        return recipes.identity(self.to_json())


def read_recipe(path: Path, *, allow_code: bool = False) -> Recipe:
    """Read and check a TOML recipe; see :func:`recipe_from`.

    Args:
        path: the file.
        allow_code: whether it may name Python code (``python:FILE:NAME``), which is run. A recipe is a file, and may be
            a stranger's: without this, nothing that it names is.

    Raises:
        DataError: the file is missing or no TOML.
        InputError: an entry is missing, unknown or of the wrong kind; the message names it. Or it names Python code.
    """
    values = recipes.read_toml(path)
    check_allowed(values, path, allow_code=allow_code)
    try:
        return recipe_from(values)
    except InputError as error:
        raise InputError(f"{path}: {error}") from error


def recipe_from(values: Mapping[str, Any]) -> Recipe:
    """Make a recipe from the values of a TOML file.

    Sections ``[data]``, ``[models]``, ``[defense]``, ``[report]`` and one or more ``[[attack]]``, whose
    ``threat_model`` may be a list. A budget is a number or a quotient such as ``"8/255"``, or a list of them.

    Raises:
        InputError: an entry is missing, unknown or of the wrong kind; the message names it.
    """
    return recipes.build(Recipe, values)


def rungs_for(
    threat_models: Sequence[str], attack: AttackSettings, adaptive: AttackSettings | None = None
) -> tuple[Rung, ...]:
    """The ladder of one attack under several threat models.

    Each threat model runs the attack where it can use it. Where it cannot, :data:`nndefense.attacks.registry.STAND_IN`
    takes its place, with the same norm, radii and restarts and its own standard effort: PGD for attackers who follow a
    gradient, ``adaptive`` for those who attack the retrieval, who always run it as well, and ``exact`` for the proof.
    Images that stop at the boundary of the net (AutoAttack's, or of the least change) say little about a defence that
    they are shown to, so that beside them PGD's are.

    Args:
        threat_models: which rungs.
        attack: what to run.
        adaptive: what the adaptive attackers run in any case.

    Raises:
        InputError: the attack is for none of these threat models.
    """
    for model in threat_models:
        check_choice("the threat model", model, registry.THREAT_MODELS)
    usable = attack.attack.threat_models
    if not set(usable) & set(threat_models):
        raise InputError(
            f"{attack.name} is an attack for {' and '.join(usable)} attackers, and none of them is here: for one on "
            "retrieval give --database or --defense nearest-neighbor, and leave --no-adaptive out"
        )
    stops = "white" not in usable and "gradient" in attack.attack.needs
    shown = stops and bool({*INFORMED} & {*threat_models})
    rungs = []
    for model in threat_models:
        restarts = attack.restarts if registry.get(registry.STAND_IN[model]).restarts else 1
        instead = AttackSettings(registry.STAND_IN[model], attack.norm, attack.eps, restarts=restarts)
        instead = adaptive if model == "adaptive" and adaptive is not None else instead
        if model == "adaptive" and instead.name != attack.name:
            rungs.append(Rung(model, instead))
        if model in usable or model != "adaptive":
            rungs.append(Rung(model, attack if model in usable else instead))
        if shown and model in ("black", "gray"):
            rungs.append(Rung(model, instead))
    return tuple(rungs)
