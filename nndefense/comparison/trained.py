"""The rows whose nets have to be trained: ensemble adversarial training, logit pairing, RA-CNN."""

from __future__ import annotations

from typing import Any

from nndefense.comparison.recipe import RowSpec
from nndefense.comparison.row import Row, in_classes_of
from nndefense.defenses import RaCnnDefense
from nndefense.errors import InputError
from nndefense.models import Classifier
from nndefense.models.racnn import DESCRIPTION_FILE, NET_FOLDER, RaCnn, load_racnn
from nndefense.pipeline.materials import Materials
from nndefense.training import EnsembleAttack, InnerAttack
from nndefense.training.progress import TrainingFolder
from nndefense.training.racnn import train_racnn

# The static sources differ from the defended net in their weights, and every second one in its architecture.
_SOURCES = 2
_ATTACK = ("norm", "eps", "steps")


def ensemble_adversarial(materials: Materials, spec: RowSpec) -> Row:
    """A net trained with images that static nets and it itself have attacked in one step (Tramèr et al. 2018)."""
    scope = materials.scope
    archs = [scope.classifier, scope.surrogate or scope.classifier]
    sources = [
        materials.net(f"source-{number}", archs[number % 2], seed=materials.seed + 10 + number)
        for number in range(int(spec.options.get("sources", _SOURCES)))
    ]
    step = InnerAttack.fgsm(_attack(materials)["eps"])
    attack = EnsembleAttack(sources, step, cache=materials.out / "attacked-images")
    net = _net(materials, spec, "ensemble-adversarial", attack)
    return _row(materials, spec, net, {"sources": len(sources), "attack": f"one step, linf {step.eps:g}"})


def alp(materials: Materials, spec: RowSpec) -> Row:
    """A net trained to give clean and attacked images the same logits (Kannan et al. 2018)."""
    found = _attack(materials)
    net = _net(materials, spec, "alp", InnerAttack(**found))
    attack = f"PGD, {found['steps']} steps, {found['norm']} {found['eps']:g}"
    return _row(materials, spec, net, {"attack": attack})


def ra_cnn(materials: Materials, spec: RowSpec) -> Row:
    """RA-CNN over the database of the nearest-neighbour defence (Zhao and Cho 2019)."""
    feature = materials.chosen("avg").feature
    database = materials.database(feature, "avg")
    found = _racnn(materials, spec, database)
    defense = RaCnnDefense(materials.classifier, database, found)
    surface = defense.surface(images=materials.rows) if spec.informed else None
    return Row(
        spec,
        defense,
        facts={
            "net": found.net.arch,
            "k": found.k,
            "rows": len(database),
            "retrieves by": feature.layer,
            "fingerprint": found.net.fingerprint[:16],
        },
        white=defense.attack_model() if spec.informed else None,
        surface=surface,
        database=database.fingerprint,
        database_rows=len(database),
    )


def _racnn(materials: Materials, spec: RowSpec, database: Any) -> RaCnn:
    folder = materials.out / "nets" / "ra-cnn"
    settings = _settings(materials)
    if (folder / DESCRIPTION_FILE).exists():
        found = load_racnn(folder, device=materials.device)
        if found.database["fingerprint"] == database.fingerprint:
            return found
    materials.say("training ra-cnn")
    unfinished = TrainingFolder(folder / NET_FOLDER).is_unfinished()
    return train_racnn(
        materials.classifier,
        database,
        materials.rows,
        images=materials.rows,
        arch=str(materials.scope.classifier.get("arch", "small-cnn")),
        k=int(spec.options.get("k", 5)),
        device=materials.device,
        out=folder,
        resume=unfinished,
        overwrite=not unfinished,
        progress=materials.progress,
        seed=materials.seed,
        **settings,
    )


def _net(materials: Materials, spec: RowSpec, objective: str, attack: Any) -> Classifier:
    if "arch" not in materials.scope.classifier:
        raise InputError(f"the recipe names no architecture to train {spec.name} with: leave it out by --no-train")
    return materials.net(
        objective,
        {"arch": materials.scope.classifier["arch"], **_settings(materials)},
        seed=materials.seed,
        objective=objective,
        attack=attack,
    )


def _settings(materials: Materials) -> dict[str, Any]:
    """Training settings, without those of the attack."""
    return {name: value for name, value in materials.scope.training.items() if name not in _ATTACK}


def _attack(materials: Materials) -> dict[str, Any]:
    found = {name: value for name, value in materials.scope.training.items() if name in _ATTACK}
    return {"norm": "linf", "steps": 5, **found}


def _row(materials: Materials, spec: RowSpec, net: Classifier, facts: dict[str, Any]) -> Row:
    model = in_classes_of(materials, net)
    return Row(
        spec,
        model,
        facts={"net": net.arch, **facts, "fingerprint": net.fingerprint[:16]},
        white=model if spec.informed else None,
    )
