"""The certificates by name: what each proves, of what, in which norms. Nothing heavy is imported until one runs.

The command's choices, the rung of an evaluation and the table in docs/certificates.md come from here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any

from nndefense.attacks.registry import NORMS
from nndefense.errors import InputError
from nndefense.own_code import taken

if TYPE_CHECKING:
    from nndefense.certificates.record import Certified


@dataclass(frozen=True)
class CertificateMethod:
    """A way to certify: ``f(target, images, *, ...) -> Certified``.

    Attributes:
        name: what it is called everywhere.
        function: itself, or where it is, as ``module:function``. The target is a module from images N x C x H x W in
            [0, 1] to scores N x classes or, where ``retrieval``, the surface (``attacks.retrieval.RetrievalSurface``)
            of a defence at L3, whose ``features`` is the defence's extractor, a module. It is given those settings that
            it takes, by name: ``norm``, ``eps`` (the budgets, ascending), ``sigma``, ``draws_select``, ``draws``,
            ``alpha``, ``seed`` and ``batch_size``.
        about: what it proves, for people.
        norms: those that its radii can be in; others follow by :meth:`~nndefense.certificates.Certified.in_norm`.
        retrieval: it is of a defence that retrieves, and not of any pipeline.
        chance: it draws noise: what it says holds but for a chance alpha, and of the pipeline under noise, which is a
            defence of its own.
        at_eps: it decides at given budgets, and has no radius of its own.
        bare: it is of a classifier alone.
    """

    name: str
    function: str | Callable[..., Certified]
    about: str
    norms: tuple[str, ...]
    retrieval: bool = False
    chance: bool = False
    at_eps: bool = False
    bare: bool = False

    def load(self) -> Callable[..., Certified]:
        """The function."""
        if callable(self.function):
            return self.function
        module, _, name = self.function.partition(":")
        found: Callable[..., Certified] = getattr(import_module(module), name)
        return found

    def check_target(self, *, retrieves: bool) -> None:
        """Refuse a defence that retrieves, or a classifier alone, where the method is of the other.

        Raises:
            InputError: it is.
        """
        if self.retrieval and not retrieves:
            raise InputError(f"{self.name} certifies nearest neighbours: give a database (--database)")
        if self.bare and retrieves:
            raise InputError(f"{self.name} certifies the classifier alone: leave the database (--database) out")

    def run(self, target: Any, images: Any, **settings: Any) -> Certified:
        """Certify images N x C x H x W; the function is given those settings that it takes."""
        function = self.load()
        return function(target, images, **taken(function, settings))


_HERE = "nndefense.certificates"
_METHODS: dict[str, CertificateMethod] = {
    method.name: method
    for method in (
        CertificateMethod("smoothing", f"{_HERE}.smoothing:certify_smoothing", "the most frequent answer of any "
                          "pipeline under Gaussian noise (Cohen et al. 2019)", ("l2", "normalized-l2"), chance=True),
        CertificateMethod("smoothed-features", f"{_HERE}.smoothed_features:certify_smoothed_features", "the vote of "
                          "the rows nearest to the mean feature under Gaussian noise (after Pautov et al. 2022)",
                          ("l2", "normalized-l2"), retrieval=True, chance=True),
        CertificateMethod("exact", f"{_HERE}.affine:certify_exact", "nearest neighbours on a feature that is affine in "
                          "the pixels, by branch and bound", NORMS, retrieval=True, at_eps=True),
        CertificateMethod("bounds", f"{_HERE}.bounds:certify_bounds", "nearest neighbours on the feature of a net of "
                          "ReLUs, by linear bounds", NORMS[:2], retrieval=True, at_eps=True),
        CertificateMethod("bounds-net", f"{_HERE}.bounds:certify_bounds", "the bare classifier, a net of ReLUs, by "
                          "linear bounds", NORMS[:2], at_eps=True, bare=True),
    )
}  # fmt: skip


def get(name: str) -> CertificateMethod:
    """The method of a name.

    Raises:
        InputError: there is none.
    """
    if name not in _METHODS:
        raise InputError(f"the method is {name!r}, but must be one of {', '.join(_METHODS)}")
    return _METHODS[name]


def names() -> tuple[str, ...]:
    """All methods."""
    return tuple(_METHODS)


def table() -> str:
    """All methods as a Markdown table, for the documentation."""
    lines = ["| method | what it certifies | norms | holds |", "| --- " * 4 + "|"]
    for method in _METHODS.values():
        holds = "but for a chance alpha an image" if method.chance else "without exception"
        lines.append(f"| `{method.name}` | {method.about} | {', '.join(method.norms)} | {holds} |")
    return "\n".join(lines)
