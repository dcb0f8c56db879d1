"""The attacks by name: what each needs, takes and counts, said once. Nothing heavy is imported until one of them runs.

Threat models, the evaluation, recipes, the command's choices, the audit and the table in docs/evaluation.md come from
here; :func:`register` adds an attack to all of them.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from importlib import import_module
from pathlib import Path
from typing import Any, Literal

from nndefense.errors import InputError
from nndefense.own_code import PYTHON, own_function, sha256_of_function, sha256_of_source, taken

#: How a change is measured: the largest change of a value, its Euclidean length, or that by the image's own length.
Norm = Literal["linf", "l2", "normalized-l2"]
#: The norms by name.
NORMS: tuple[Norm, ...] = ("linf", "l2", "normalized-l2")
# From the attacker who has nothing of the defence to the one who has all of it.
THREAT_MODELS = ("black", "gray", "white", "adaptive", "exact")
NEEDS = ("gradient", "scores", "surface", "features", "rows", "classifier")
# What takes the place of an attack that a threat model cannot use.
STAND_IN = {"black": "pgd", "gray": "pgd", "white": "pgd", "adaptive": "adaptive", "exact": "exact"}


@dataclass(frozen=True)
class Attack:
    """An attack: ``f(target, x, y, *, eps, norm, generator, ...) -> images``, and what there is to know before it runs.

    Attributes:
        name: what it is called everywhere.
        function: itself, or where it is, as ``module:function``. Of ``eps``, ``norm``, ``generator``, its effort,
            ``restarts``, ``loss`` and ``settings`` it is given those that it takes.
        title: what a report calls it; default the name.
        about: a line for the table.
        norms: those that it can be measured in.
        needs: ``gradient`` of a model, its ``scores`` alone, or ``surface``: that of a defence that retrieves, and
            what of it (``features``, ``rows``, ``classifier``).
        least: it looks for the least change, and not within a budget; what lies outside the budget is no success.
        effort: what it counts, ``steps`` or ``queries``; empty where its effort is not to be chosen.
        standard: how many of them, unless others are asked for.
        threat_models: those that can use it; default by what it needs. The relaxed defence of ``white`` has a gradient
            and no boundary of its own that counts, so that nothing that looks for the least change is one for it.
        restarts: it takes a number of random starts, and the worst one counts.
        loss: it takes the name of a loss.
        settings: further arguments of the function.
        sha256: of the code and settings of an attack that is not the library's, so that a changed one is measured
            again.
        version: of an attack of the library, which a change of the images that it makes raises by 1, for the same end.
    """

    name: str
    function: str | Callable[..., Any]
    title: str = ""
    about: str = ""
    norms: tuple[str, ...] = NORMS
    needs: tuple[str, ...] = ("gradient",)
    least: bool = False
    effort: Literal["steps", "queries", ""] = ""
    standard: int = 0
    threat_models: tuple[str, ...] = ()
    restarts: bool = False
    loss: bool = False
    settings: Mapping[str, Any] = field(default_factory=dict)
    sha256: str = ""
    version: int = 1

    def __post_init__(self) -> None:
        if not set(self.needs) <= set(NEEDS):
            raise InputError(f"the attack {self.name!r} needs {self.needs}, but can need {', '.join(NEEDS)}")
        if not self.name or not set(self.norms) <= set(NORMS) or not set(self.threat_models) <= set(THREAT_MODELS):
            raise InputError(f"the attack {self.name!r} needs a name, norms of {NORMS} and threats of {THREAT_MODELS}")
        if self.effort and self.standard < 1:
            raise InputError(f"the attack {self.name!r} counts {self.effort}: say how many are standard")
        if not self.threat_models:
            object.__setattr__(self, "threat_models", self._usual_threat_models())

    def _usual_threat_models(self) -> tuple[str, ...]:
        if self.on_retrieval:
            return ("adaptive",)
        white = () if self.least or "gradient" not in self.needs else ("white",)
        # What asks for scores alone can ask the true defence.
        return ("black", "gray", *white, *(() if "gradient" in self.needs else ("adaptive",)))

    @property
    def on_retrieval(self) -> bool:
        """Whether it attacks the surface of a defence that retrieves, and not a model."""
        return "surface" in self.needs

    @property
    def targeted(self) -> bool:
        """Whether it can be sent towards a class: it takes ``targeted``, and does not choose its classes itself."""
        return "targets" not in self.settings and "targeted" in inspect.signature(self.load()).parameters

    def load(self) -> Callable[..., Any]:
        """The function."""
        if callable(self.function):
            return self.function
        module, _, name = self.function.partition(":")
        found: Callable[..., Any] = getattr(import_module(module), name)
        return found

    def run(self, target: Any, x: Any, y: Any, *, effort: int, restarts: int, loss: str, **given: Any) -> Any:
        """Call the function on a model or a surface with what it takes; ``given`` are eps, norm, generator, and
        ``targeted`` where ``y`` are the classes to reach.

        Returns:
            The images, or a record that has them as ``images``, and perhaps what is ``certified`` to stand.
        """
        function = self.load()
        given |= {self.effort: effort} if self.effort else {}
        given |= {"restarts": restarts} if self.restarts else {}
        given |= {**({"loss": loss} if self.loss else {}), **self.settings}
        return function(target, x, y, **taken(function, given))

    def check(self, norm: str, steps: int | None, queries: int | None, restarts: int, loss: str) -> None:
        """Raise :class:`InputError` for what it cannot be measured in, does not take, or would ignore."""
        if norm not in self.norms:
            aims = "looks for the least change in" if self.least else "is made for"
            raise InputError(f"{self.name} {aims} {' and '.join(self.norms)}, and cannot be measured in {norm}")
        for unit, count in (("steps", steps), ("queries", queries)):
            if count is None or unit == self.effort or (not self.effort and (unit, count) == ("steps", self.standard)):
                continue
            if self.effort:
                raise InputError(
                    f"{self.name} counts {self.effort}, not {unit}: give {self.effort} (--{self.effort}) instead"
                )
            other = f", or take {'square' if unit == 'queries' else 'pgd or apgd'}" if self.name in SHIPPED else ""
            raise InputError(f"the effort of {self.name} is fixed: leave {unit} (--{unit}) out{other}")
        if restarts > 1 and not self.restarts:
            more = f", or give more {self.effort}" if self.effort else ""
            raise InputError(f"{self.name} takes no restarts: leave them (--restarts) out{more}")
        if loss != "cross-entropy" and not self.loss:
            raise InputError(f"{self.name} has an objective of its own: leave the loss out")

    def check_targeted(self) -> None:
        """Raise :class:`InputError` where it cannot be sent towards a class."""
        if not self.targeted:
            can = ", ".join(name for name in _ATTACKS if name in SHIPPED and _ATTACKS[name].targeted)
            own = "" if self.name in SHIPPED else "; a function of your own has to take targeted="
            raise InputError(
                f"{self.name} cannot be sent towards a class: leave the target (--target) out, or take {can}{own}"
            )


_HERE, _RETRIEVAL = "nndefense.attacks", "nndefense.attacks.retrieval"
_LEAST: dict[str, Any] = {"least": True, "effort": "steps"}
_L2: tuple[str, ...] = ("l2", "normalized-l2")
_ROWS, _ALL = ("surface", "features", "rows"), ("surface", "features", "rows", "classifier")


def _on_rows(
    name: str, function: str, title: str, about: str, standard: int = 100, needs: tuple[str, ...] = _ROWS
) -> Attack:
    place = f"{_RETRIEVAL}:{function}"
    return Attack(name, place, title, about, needs=needs, effort="steps", standard=standard, restarts=True, version=2)


_ATTACKS: dict[str, Attack] = {
    attack.name: attack
    for attack in (
        Attack("fgsm", f"{_HERE}:fgsm", "FGSM", "one step of the gradient's sign (Goodfellow 2015)", standard=1,
               loss=True),
        Attack("pgd", f"{_HERE}:pgd", "PGD", "projected gradient descent (Madry 2018)", effort="steps", standard=20,
               restarts=True, loss=True),
        Attack("apgd", f"{_HERE}:apgd", "APGD", "PGD that sets its own step size (Croce and Hein 2020)",
               effort="steps", standard=100, restarts=True, loss=True),
        Attack("apgd-t", f"{_HERE}:apgd", "APGD-T", "APGD towards the nine likeliest wrong classes", effort="steps",
               standard=100, restarts=True, settings={"targets": 9}),
        Attack("eot", f"{_HERE}:eot_pgd", "EOT-PGD",
               "PGD for defences by transformation: margins over fresh draws, four aims in turn (Athalye 2018)",
               effort="steps", standard=60, restarts=True),
        # Where a relaxed defence stands it returns the clean image, so that on a white rung PGD is the stronger one.
        Attack("autoattack", f"{_HERE}:autoattack", "AutoAttack",
               "the standard sequence: APGD-CE, APGD-T, FAB-T and Square, with 100 steps and 5,000 queries",
               standard=100, threat_models=("black", "gray")),
        Attack("apgd-square", f"{_HERE}.standard_sequence:apgd_square", "APGD-CE, APGD-T, Square",
               "AutoAttack without FAB-T, with 10 queries for each step", effort="steps", standard=100,
               threat_models=("black", "gray")),
        Attack("square", f"{_HERE}:square", "Square", "random squares, by scores alone (Andriushchenko 2020)",
               needs=("scores",), effort="queries", standard=5000),
        Attack("fab", f"{_HERE}:fab", "FAB", "the fast adaptive boundary attack (Croce and Hein 2020)", standard=100,
               restarts=True, **_LEAST),
        Attack("cw", f"{_HERE}:carlini_wagner", "C&W", "least l2 change by optimisation (Carlini and Wagner 2017)",
               norms=_L2, standard=1000, **_LEAST),
        Attack("deepfool", f"{_HERE}:deepfool", "DeepFool", "least l2 change by linearisation (Moosavi-Dezfooli 2016)",
               norms=_L2, standard=50, **_LEAST),
        _on_rows("adaptive", "adaptive", "adaptive", "the rank margin from many starts, then whatever else there is",
                 needs=("surface",)),
        _on_rows("rank-margin", "rank_margin", "rank margin", "the distances of the row that tips the vote"),
        _on_rows("soft-retrieval", "soft_top_k", "soft retrieval", "the margin of a soft top-K"),
        _on_rows("straight-through", "straight_through", "straight through", "hard top-K forward, soft top-K backward"),
        _on_rows("push-pull", "push_pull", "push-pull", "rows pulled into the K-ball and pushed out (Sitawarin 2020)"),
        _on_rows("ask", "class_scores", "ASK", "scores of the nearest rows of each class (Wang 2021)"),
        _on_rows("drift", "feature_drift", "feature drift", "away from the clean feature", 50, ("surface", "features")),
        _on_rows("pgd-pr", "pgd_pr", "PGD-PR", "the neighbours' predictions (Dubey 2019)", 50, _ALL),
        _on_rows("pgd-fs", "pgd_fs", "PGD-FS", "the neighbours' features (Dubey 2019)", 50, _ALL),
        Attack("exact", f"{_RETRIEVAL}:run_exact", "exact",
               "branch and bound over the sets of nearest rows, where the feature is affine", needs=_ROWS,
               threat_models=("exact",)),
    )
}  # fmt: skip
SHIPPED = frozenset(_ATTACKS)
_loaded: dict[tuple[str, str], Attack] = {}


def register(attack: Attack | Callable[..., Any]) -> str:
    """Add an attack to what evaluations, recipes and the command can run.

    Args:
        attack: an entry, or ``f(model, x, y, *, eps, norm, generator) -> images`` alone, which gets the function's
            name (with a number where another function has it) and is for whoever follows a model's gradient.

    Returns:
        Its name.

    Raises:
        InputError: a name that another attack has, or a callable without one.
    """
    if not isinstance(attack, Attack):
        base = getattr(attack, "__name__", "")
        number, name = 1, base
        while name in _ATTACKS and _ATTACKS[name].function is not attack:
            number, name = number + 1, f"{base}-{number + 1}"
        attack = Attack(name, attack)
    taken_by = _ATTACKS.get(attack.name, attack)
    if attack.name.startswith(PYTHON) or attack.name in SHIPPED or taken_by.function != attack.function:
        raise InputError(f"there is an attack {attack.name!r} already: register it under another name")
    if not attack.sha256:
        also = (attack.least, sorted(attack.settings.items()))
        attack = replace(attack, sha256=sha256_of_function(attack.load(), also))
    _ATTACKS[attack.name] = attack
    return attack.name


def unregister(name: str) -> None:
    """Forget an attack that :func:`register` added."""
    if name in SHIPPED or _ATTACKS.pop(name, None) is None:
        raise InputError(f"{name!r} is no attack that was registered")


def get(name: str) -> Attack:
    """The attack of a name; ``python:FILE:FUNCTION`` is the user's own, whose file is run.

    Raises:
        InputError: no attack has that name, or the user's function cannot be had.
    """
    if name.startswith(PYTHON):
        key = name, sha256_of_source(name)
        if key not in _loaded:
            call = "as f(model, x, y, *, eps, norm, generator)"
            _loaded[key] = Attack(
                name, own_function(name, returns="images", call=call), attack_name(name), sha256=key[1]
            )
        return _loaded[key]
    if name not in _ATTACKS:
        raise InputError(f"the attack is {name!r}, but must be one of {', '.join(names())}, or python:FILE:FUNCTION")
    return _ATTACKS[name]


def names(threat_model: str | None = None) -> tuple[str, ...]:
    """The attacks that a threat model can use, or all."""
    return tuple(n for n, attack in _ATTACKS.items() if threat_model is None or threat_model in attack.threat_models)


def attack_name(name: str) -> str:
    """What a report calls an attack, also one that is not there any more."""
    if name.startswith(PYTHON):
        place, _, function = name.removeprefix(PYTHON).rpartition(":")
        return f"{function} ({Path(place).name})"
    return (_ATTACKS[name].title if name in _ATTACKS else "") or name.replace("-", " ")


def table() -> str:
    """All attacks of the library as a Markdown table, for the documentation."""
    lines = ["| attack | what it is | for | norms | needs | effort | takes |", "| --- " * 7 + "|"]
    for attack in (_ATTACKS[name] for name in _ATTACKS if name in SHIPPED):
        effort = f"{attack.standard:,} {attack.effort}" if attack.effort else "fixed"
        takes = ", ".join(name for name in ("restarts", "loss") if getattr(attack, name))
        takes += (", " if takes else "") + "a target" if attack.targeted else ""
        least = "; looks for the least change" if attack.least else ""
        norms = "all" if attack.norms == NORMS else ", ".join(attack.norms)
        cells = (f"`{attack.name}`", attack.about + least, ", ".join(attack.threat_models), norms,
                 ", ".join(attack.needs), effort, takes)  # fmt: skip
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(line.replace("|  |", "| |") for line in lines)
