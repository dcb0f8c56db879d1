"""The defences by name: how each is made and what it needs, said once. Nothing heavy is imported until one is made.

The command's choices, the rows of a comparison and the evaluation come from here; :func:`register` adds a defence to
all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import Any

from nndefense import recipes
from nndefense.errors import InputError
from nndefense.own_code import PYTHON, own_function, sha256_of_function, sha256_of_source


@dataclass(frozen=True)
class Defense:
    """A defence: how it is made of a classifier, and what there is to know before that.

    Attributes:
        name: what it is called everywhere; ``none`` is the bare net.
        make: the function, or where it is, as ``module:function``. It is called with the classifier and with those of
            ``materials`` (:class:`~nndefense.pipeline.materials.Materials`; also under the name ``data``) and of the
            options that it takes. It returns a module from images N x C x H x W in [0, 1] to logits or
            log-probabilities N x classes of the classifier, or a :class:`~nndefense.pipeline.making.Made`.
        about: what it is where no option says otherwise, for people.
        images: it is made of training images, too.
        trained: a net is trained for it.
        random: it draws, so that two calls of it differ.
        more: where the options that it passes on go, each as ``module:function``.
        sha256: of the code of a defence that is not the library's, so that a changed one is measured again.
    """

    name: str
    make: str | Callable[..., Any]
    about: str = ""
    images: bool = False
    trained: bool = False
    random: bool = False
    sha256: str = ""
    more: tuple[str, ...] = ()

    def load(self) -> Callable[..., Any]:
        """The function."""
        return self.make if callable(self.make) else _found(self.make)

    def checked(self, options: Mapping[str, Any], whose: str) -> dict[str, Any]:
        """The options of a table, if it takes them; ``whose`` they are is for the message.

        Raises:
            InputError: it takes no such option, or a value is of another kind.
        """
        functions = [self.load(), *map(_found, self.more)]
        return recipes.options_of(functions, options, whose, ("materials", "data"))


def _found(place: str) -> Callable[..., Any]:
    module, _, name = place.partition(":")
    found: Callable[..., Any] = getattr(import_module(module), name)
    return found


_MAKERS = "nndefense.pipeline.makers"
_TRANSFORMS = "nndefense.defenses.transforms"
_DEFENSES: dict[str, Defense] = {
    defense.name: defense
    for defense in (
        Defense("none", f"{_MAKERS}:bare", "the bare net"),
        Defense("crop-ensemble", f"{_MAKERS}:cropped", "30 random crops, averaged", random=True,
                more=(f"{_TRANSFORMS}:crop_ensemble",)),
        Defense("tv-minimization", f"{_TRANSFORMS}:tv_minimization",
                "half of the pixels kept at random, isotropic, weight 0.03", random=True,
                more=(f"{_TRANSFORMS}:TotalVariation",)),
        Defense("quilting", f"{_MAKERS}:quilted", "the nearest patch of 5 x 5 pixels, overlap 2", images=True,
                more=("nndefense.defenses.quilting:quilting",)),
        Defense("jpeg", f"{_TRANSFORMS}:jpeg_compression", "quality 75"),
        Defense("bit-depth", f"{_TRANSFORMS}:bit_depth_reduction", "3 bits"),
        Defense("ensemble-adversarial", f"{_MAKERS}:ensemble_adversarial",
                "trained with images that static nets and it itself have attacked", images=True, trained=True),
        Defense("alp", f"{_MAKERS}:alp", "trained to give clean and attacked images the same logits", images=True,
                trained=True),
        Defense("ra-cnn", f"{_MAKERS}:ra_cnn", "the projection on the hull of 5 neighbours", images=True, trained=True),
        Defense("nearest-neighbor", f"{_MAKERS}:nearest", "the nearest neighbours, calibrated", images=True),
    )
}  # fmt: skip
SHIPPED = frozenset(_DEFENSES)


def register(defense: Defense | Callable[..., Any]) -> str:
    """Add a defence to what evaluations, comparisons and the command can measure.

    Args:
        defense: an entry, or ``f(classifier) -> module`` alone, which gets the function's name.

    Returns:
        Its name.

    Raises:
        InputError: a name that another defence has, or a callable without one.
    """
    if not isinstance(defense, Defense):
        defense = Defense(getattr(defense, "__name__", ""), defense)
    if not defense.name:
        raise InputError("a defence needs a name: register Defense(name, make)")
    taken_by = _DEFENSES.get(defense.name, defense)
    if defense.name.startswith(PYTHON) or defense.name in SHIPPED or taken_by.make != defense.make:
        raise InputError(f"there is a defence {defense.name!r} already: register it under another name")
    if not defense.sha256:
        defense = replace(defense, sha256=sha256_of_function(defense.load()))
    _DEFENSES[defense.name] = defense
    return defense.name


def unregister(name: str) -> None:
    """Forget a defence that :func:`register` added."""
    if name in SHIPPED or _DEFENSES.pop(name, None) is None:
        raise InputError(f"{name!r} is no defence that was registered")


def get(name: str) -> Defense:
    """The defence of a name; ``python:FILE:FACTORY`` is the user's own, whose file is run.

    Raises:
        InputError: no defence has that name, or the user's function cannot be had.
    """
    if name.startswith(PYTHON):
        factory = own_function(name, returns="a module from images to logits", call="as f(classifier)")
        return Defense(name, factory, sha256=sha256_of_source(name))
    if name not in _DEFENSES:
        raise InputError(f"the defence is {name!r}, but must be one of {', '.join(names())}, or python:FILE:FACTORY")
    return _DEFENSES[name]


def names() -> tuple[str, ...]:
    """All defences, the bare net first."""
    return tuple(_DEFENSES)


def defense_name(name: str) -> str:
    """What a record calls a defence: the user's own by its function and file."""
    if not name.startswith(PYTHON):
        return name
    place, _, function = name.removeprefix(PYTHON).rpartition(":")
    return f"{function} ({Path(place).name})"


def table() -> str:
    """All defences of the library as a Markdown table, for the documentation."""
    lines = ["| defence | what it is | made of | random |", "| --- " * 4 + "|"]
    for defense in (_DEFENSES[name] for name in _DEFENSES if name in SHIPPED):
        made = "a training" if defense.trained else "images" if defense.images else "the classifier"
        lines.append(f"| `{defense.name}` | {defense.about} | {made} | {'yes' if defense.random else 'no'} |")
    return "\n".join(lines)
