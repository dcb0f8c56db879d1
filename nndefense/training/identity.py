"""What must be the same for a training to go on as the one that it was."""

from __future__ import annotations

from typing import Any

from nndefense.datasets import ImageDataset
from nndefense.errors import InputError
from nndefense.models import Classifier
from nndefense.training.batch import BatchAttack
from nndefense.training.settings import setting_defaults


def described(dataset: ImageDataset) -> dict[str, Any]:
    """A data set, for a record."""
    return {"name": dataset.name, "n": len(dataset), "fingerprint": dataset.fingerprint}


def described_attack(attack: BatchAttack | None) -> Any:
    """An attack, for a record: its ``as_dict()`` if it has one, else its name."""
    if attack is None:
        return None
    as_dict = getattr(attack, "as_dict", None)
    return as_dict() if callable(as_dict) else str(getattr(attack, "__qualname__", None) or repr(attack))


def form(classifier: Classifier) -> dict[str, Any]:
    """A classifier without its weights, for a record."""
    return {
        "architecture": classifier.arch,
        "input_shape": list(classifier.input_shape),
        "classes": list(classifier.classes),
        "mean": classifier.mean.flatten().tolist(),
        "std": classifier.std.flatten().tolist(),
    }


def check_same(saved: dict[str, Any], identity: dict[str, Any], place: object) -> None:
    """Raise :class:`InputError` that names everything in which a training differs from the saved one in ``place``."""
    differences = []
    defaults: dict[str, dict[str, Any]] = {"classifier": {}, "settings": setting_defaults()}
    for part, default in defaults.items():
        old = default | (saved.get(part) or {})
        differences += [
            name.replace("_", " ")
            if isinstance(value, list)
            else f"{name.replace('_', ' ')} ({old.get(name)}, not {value})"
            for name, value in identity[part].items()
            if old.get(name) != value
        ]
    if saved.get("objective") != identity["objective"]:
        differences.append(f"objective ({saved.get('objective')}, not {identity['objective']})")
    for part, name in (("attack", "attack"), ("selection", "choice of the final weights")):
        before, now = saved.get(part), identity[part]
        if before != now:
            differences.append(f"{name} ({_difference(before, now)})")
    if saved.get("processes", 1) != identity["processes"]:
        differences.append(f"number of processes ({saved.get('processes', 1)}, not {identity['processes']})")
    for part, name in (("data", "data"), ("unlabelled", "unlabelled data")):
        old, new = saved.get(part) or {}, identity[part] or {}
        if old.get("fingerprint") != new.get("fingerprint"):
            differences.append(f"{name} ({_size(old)}, not {_size(new)})")
    if differences:
        raise InputError(
            f"the training in {place} was started with other {', '.join(differences)}: "
            "resume it with the same, or start anew with --overwrite of the command that trains, or by deleting the "
            "folder"
        )


def _size(data: dict[str, Any]) -> str:
    return f"{data['name']} of {data['n']} images" if data else "none"


def _difference(old: Any, new: Any) -> str:
    if isinstance(old, dict) and isinstance(new, dict):
        names = [name for name in {**old, **new} if old.get(name) != new.get(name)]
        return ", ".join(f"{name} {old.get(name)}, not {new.get(name)}" for name in names)
    return f"{'none' if old is None else 'one'}, not {'none' if new is None else 'one'}"
