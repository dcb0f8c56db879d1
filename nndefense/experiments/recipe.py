"""A recipe: which nets are trained and how they are judged, checked before anything runs and echoed in the results.

The shipped ones are TOML files in ``recipes``, each at two scales.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

from nndefense import recipes
from nndefense.attacks import registry
from nndefense.attacks.spatial import SpatialAttack
from nndefense.errors import InputError, check_choice
from nndefense.evaluation.threats import AttackSettings
from nndefense.experiments.form import Form
from nndefense.experiments.published import Published
from nndefense.experiments.threat import SPATIAL, Threat
from nndefense.models import ARCHITECTURES
from nndefense.training import InnerAttack, TrainingSettings, make_objective
from nndefense.training.batch import BatchAttack
from nndefense.training.objectives import OBJECTIVES
from nndefense.training.settings import make_settings

#: The sizes at which a recipe can be run: the paper's, and one for a machine without a GPU.
SCALES = ("full", "small")
TEACHER = "standard"
# How many transformations these objectives draw; another number is another method.
_DRAWS = {"worst-of-10": 10, "random-augmentation": 1}


@dataclass(frozen=True)
class Method:
    """A way to train.

    Attributes:
        name: what the tables call it; unique in a recipe.
        objective: one of :data:`nndefense.training.OBJECTIVES`.
        weights: those of the objective that differ from their defaults.
        settings: fields of :class:`nndefense.training.TrainingSettings` that differ from the recipe's.
        attack: entries of the inner attack that differ from the recipe's.
        architecture: of its nets; ``""`` for the recipe's.
        pool: whether a training by retrieval takes the unlabelled images, with pseudo-labels, as the labelled ones.
    """

    name: str
    objective: str
    weights: Mapping[str, Any] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
    attack: Mapping[str, Any] = field(default_factory=dict)
    architecture: str = ""
    pool: bool = False

    def __post_init__(self) -> None:
        """Raise :class:`InputError` for an objective or architecture that cannot be."""
        make_objective(self.objective, **self.weights)
        if self.pool and not OBJECTIVES[self.objective].rows:
            raise InputError(f"pool is for objectives with rows, such as retrieval: {self.objective} has none")
        if self.architecture:
            check_choice("architecture", self.architecture, ARCHITECTURES)

    @property
    def attacks(self) -> bool:
        """Whether the training depends on the threat."""
        return OBJECTIVES[self.objective].attack or self.objective in _DRAWS

    @property
    def unlabelled(self) -> bool:
        """Whether it learns from unlabelled images."""
        return OBJECTIVES[self.objective].unlabelled or self.pool


def evaluation_attack(name: str, **options: Any) -> AttackSettings:
    """An attack of the report; norm and radius come from the threat.

    Raises:
        InputError: it is not one that stays inside a budget, or its options cannot be used.
    """
    (attack,) = _evaluation([{"name": name, **options}])
    return attack


def _evaluation(values: Any) -> tuple[AttackSettings, ...]:
    given = {"norm": "linf", "eps": (1.0,)}
    found = [
        recipes.build(AttackSettings, table, "evaluation", given=given, needed=("name",))
        for table in recipes.mappings(values, "evaluation")
    ]
    for attack in found:
        if not _inside_a_budget(attack.attack):
            known = [name for name in registry.names() if _inside_a_budget(registry.get(name))]
            raise InputError(f"the attack {attack.name!r} of an [[evaluation]] must be one of {', '.join(known)}")
    return tuple(found)


def _inside_a_budget(attack: registry.Attack) -> bool:
    return "gray" in attack.threat_models and not attack.least


def _threats(values: Any) -> tuple[Threat, ...]:
    """A threat for every radius of every ``[[threat]]``."""
    found = []
    for table in recipes.mappings(values, "threat"):
        if table.get("norm") == SPATIAL:
            found.append(recipes.build(Threat, table, "threat", given={"text": ""}))
            continue
        eps = table.get("eps", [])
        for one in eps if isinstance(eps, list) else [eps]:
            text = one if isinstance(one, str) else f"{one:g}"
            found.append(recipes.build(Threat, {**table, "eps": one}, "threat", given={"text": text}))
        if "eps" not in table:
            raise InputError("a [[threat]] needs eps")
    return tuple(found)


@dataclass(frozen=True)
class ExperimentRecipe:
    """All that a table depends on, at one scale.

    Attributes:
        name, title, about, sources: for people; ``about`` says what is done and what differs from the papers.
        scale: ``full`` or ``small``.
        train, test: specs of the labelled images to train on and to report on.
        validation: how many images are split off ``train``, for the choice of weights and for nothing else.
        architecture: of every net whose method names none.
        threats, methods: what is trained and measured: each method that attacks against each threat.
        settings: of every training, fields of :class:`nndefense.training.TrainingSettings`.
        attack: of every training that attacks: fields of :class:`nndefense.training.InnerAttack` without norm and
            eps; ``step`` is the step size in parts of eps, in the place of ``step_size``.
        start: an easier first stage for every training that attacks, whose weights are the initial ones of the
            training proper: ``eps`` is its radius in parts of the threat's, ``settings`` and ``attack`` what else
            differs. Nets that meet the full radius at once can stay at guessing. Empty for none.
        check_steps: of the attack on the validation images.
        evaluation: the attacks of the report, one after another on what still stands; the worst counts.
        grid: rotations and shifts along either axis of the grid, for spatial threats.
        images: how many test images are attacked, drawn at random once; None for all. All are classified clean.
        labels: numbers of labelled images; 0 for all. The rest are the pool of unlabelled ones.
        seeds: how many; each gives initial weights, order, and the draw of the labelled images.
        forms: how the nets are used beside on their own.
        certified: how many attacked images linear bounds are tried on, of nets and of forms whose rule is a plain vote.
        adaptive_steps, adaptive_restarts: of :func:`~nndefense.attacks.retrieval.run_adaptive` on the forms.
        compare: pairs of methods, or of methods with a form, whose paired difference is reported.
        published: figures of papers, which stand in a table of their own.
        published_source, published_setting: of those that name none.
        layout: shape of the table.
        figure: what is drawn.
        batch_size: images per forward pass of the evaluation.
        only: what of it is done, each a METHOD or a METHOD/THREAT; all where it is empty.
    """

    name: str
    title: str
    scale: str
    train: str
    test: str
    architecture: str
    threats: tuple[Threat, ...] = field(metadata=recipes.at("threat", _threats))
    methods: tuple[Method, ...] = field(metadata=recipes.at("method"))
    evaluation: tuple[AttackSettings, ...] = field(metadata=recipes.at("evaluation", _evaluation))
    forms: tuple[Form, ...] = field(default=(), metadata=recipes.at("form"))
    certified: int = 0
    adaptive_steps: int = 100
    adaptive_restarts: int = 1
    about: str = ""
    sources: tuple[str, ...] = ()
    validation: int = 0
    settings: Mapping[str, Any] = field(default_factory=dict)
    attack: Mapping[str, Any] = field(default_factory=dict)
    start: Mapping[str, Any] = field(default_factory=dict)
    check_steps: int = 20
    grid: tuple[int, int] = (31, 5)
    images: int | None = None
    labels: tuple[int, ...] = (0,)
    seeds: int = 1
    compare: tuple[tuple[str, str], ...] = ()
    published: tuple[Published, ...] = ()
    published_source: str = ""
    published_setting: str = ""
    layout: Literal["tradeoff", "methods", "errors"] = "methods"
    figure: Literal["bars", "labels", "gap", "retrieval"] = "bars"
    batch_size: int = 250
    only: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Raise :class:`InputError` for parts that do not fit together."""
        names = [method.name for method in self.methods]
        forms = [form.name for form in self.forms]
        kinds = {"methods": names, "threats": [threat.name for threat in self.threats], "forms": forms}
        for what, found in kinds.items():
            if not found and what != "forms":
                raise InputError(f"a recipe needs {what}")
            if len(set(found)) < len(found):
                raise InputError(f"two of the {what} have one name: {', '.join(found)}")
        check_choice("architecture", self.architecture, ARCHITECTURES)
        recipes.check_least(
            self, 1, "seeds", "check_steps", "batch_size", "images", "adaptive_steps", "adaptive_restarts"
        )
        recipes.check_least(self, 0, "validation", "certified")
        if min(self.grid) < 1:
            raise InputError("both numbers of grid must be at least 1")
        if not self.labels or min(self.labels) < 0 or len(set(self.labels)) < len(self.labels):
            raise InputError("labels must be different numbers of images, with 0 for all of them")
        used = [("form.of", name, names) for form in self.forms for name in form.of]
        used += [("compare", name, list(self.subjects)) for pair in self.compare for name in pair]
        used += [("published", one.method, names) for one in self.published if one.method]
        for where, name, known in used:
            if name not in known:
                raise InputError(f"{where} names the method {name!r}, which is none of {', '.join(known)}")
        if not self.validation and any(form.temperature == "held-out" for form in self.forms):
            raise InputError("a temperature held-out is chosen on validation images: split some off with validation")
        threats = {"", *(threat.name for threat in self.threats)}
        for one in self.published:
            if one.threat not in threats:
                raise InputError(f"published names the threat {one.threat!r}, which the recipe has not")
            if not (one.source or self.published_source) or not (one.setting or self.published_setting):
                raise InputError(
                    f"the published figure of {one.name or one.method!r} needs a source, and the setting (net, data, "
                    "attack) that it is of"
                )
        for one_part in self.only:
            check_choice("only", one_part, [*names, *(f"{n}/{threat.name}" for n in names for threat in self.threats)])
        if any(method.unlabelled for method in self.methods) and TEACHER not in names:
            raise InputError(f"pseudo-labels come from the method {TEACHER!r}: add it, with the objective standard")
        if not self.evaluation and any(threat.norm != SPATIAL for threat in self.threats):
            raise InputError("a recipe needs at least one [[evaluation]]")
        if self.validation == 0 and any(self.settings_of(method, 10**6).keep_best for method in self.methods):
            raise InputError("keep_best chooses the weights on validation images: split some off, or leave it out")
        unknown = set(self.start) - {"eps", "settings", "attack"}
        if unknown:
            raise InputError(f"start has no entry {', '.join(sorted(unknown))}: choose from eps, settings, attack")
        for method in self.methods:
            for threat in self.threats:
                self.attack_of(method, threat)
            if self.start:
                make_settings(10**6, self.start_options_of(method))
                self.attack_of(method, self.threats[0], start=True)

    def wants(self, method: str, threat: str) -> bool:
        """Whether a method is to be measured under a threat."""
        return not self.only or method in self.only or f"{method}/{threat}" in self.only

    @property
    def subjects(self) -> tuple[str, ...]:
        """What is measured, by the names in the tables: each method's nets on their own, then in each form."""
        found = []
        for method in self.methods:
            found.append(method.name)
            found += [form.title(method.name, rows) for form in self.forms_of(method) for rows in form.rows]
        return tuple(found)

    def forms_of(self, method: Method) -> list[Form]:
        """How a method's nets are used beside on their own."""
        return [form for form in self.forms if not form.of or method.name in form.of]

    def settings_of(self, method: Method, images: int, seed: int = 0) -> TrainingSettings:
        """The settings of a method's training on so many labelled images, with this ``seed``."""
        return make_settings(images, {**self.options_of(method), "seed": seed})

    def options_of(self, method: Method) -> dict[str, Any]:
        """What the recipe says about a method's training settings."""
        return {**self.settings, **method.settings}

    def start_options_of(self, method: Method) -> dict[str, Any]:
        """The training settings of the first stage; its last weights count, so nothing is chosen."""
        return {**self.options_of(method), "keep_best": False, "patience": None, **self.start.get("settings", {})}

    def attack_of(self, method: Method, threat: Threat, *, start: bool = False) -> BatchAttack | None:
        """The inner attack of a method's training against a threat, or of its ``start``; None where it has none.

        Raises:
            InputError: the recipe gives the attack an entry that it does not have.
        """
        if not method.attacks:
            return None
        given = {**self.attack, **method.attack}
        if start:
            given |= self.start.get("attack", {})
            threat = replace(threat, eps=threat.eps * self.start.get("eps", 1.0))
        if threat.norm == SPATIAL:
            draws = _DRAWS.get(method.objective, given.get("draws", 10))
            return SpatialAttack(draws=draws, degrees=threat.degrees, shift=threat.shift)
        given.pop("draws", None)
        step = given.pop("step", None)
        if step is not None:
            given["step_size"] = step * threat.eps
        try:
            return InnerAttack(norm=threat.norm, eps=threat.eps, **given)
        except TypeError:
            raise InputError(f"an inner attack has no such entry: {', '.join(sorted(given))}") from None

    def check_attack(self, threat: Threat) -> BatchAttack:
        """The attack on the validation images."""
        if threat.norm == SPATIAL:
            return SpatialAttack(degrees=threat.degrees, shift=threat.shift)
        return InnerAttack(norm=threat.norm, eps=threat.eps, steps=self.check_steps)

    def evaluation_of(self, threat: Threat) -> tuple[AttackSettings, ...]:
        """The attacks of the report at a threat's norm and radius; none for a spatial threat, which has its grid."""
        if threat.norm == SPATIAL:
            return ()
        return tuple(replace(attack, norm=threat.norm, eps=(threat.eps,)) for attack in self.evaluation)

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        plain: dict[str, Any] = json.loads(json.dumps(asdict(self)))
        for attack in plain["evaluation"]:
            del attack["norm"], attack["eps"]  # they are the threat's
            if attack["queries"] is None:
                del attack["queries"]
        # They say nothing where no net is used in a form.
        own = () if self.forms else ("forms", "certified", "adaptive_steps", "adaptive_restarts")
        return {name: value for name, value in plain.items() if name not in own}

    @property
    def sha256(self) -> str:
        """Identifies the recipe: the sha256 of its plain values in canonical form."""
        return recipes.identity(self.to_json())


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
    """Make the recipe ``name`` from the values of a TOML file.

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
