"""How the library's defences are made of a classifier and materials; :mod:`nndefense.pipeline.defenses` names them."""

from __future__ import annotations

import shutil
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from index_build.patches import SIDE, build_patches
from nndefense import recipes
from nndefense.defenses import NearestNeighborDefense, RaCnnDefense
from nndefense.defenses.quilting import PatchDatabase, quilting
from nndefense.defenses.stored import open_stored
from nndefense.defenses.transforms import crop_ensemble
from nndefense.errors import DatabaseError, InputError
from nndefense.files import make_folder, read_json, write_json
from nndefense.models import ARCHITECTURES, Classifier
from nndefense.models.racnn import DESCRIPTION_FILE, NET_FOLDER, RaCnn, load_racnn
from nndefense.pipeline import defenses
from nndefense.pipeline.making import Made
from nndefense.pipeline.materials import Materials
from nndefense.training import EnsembleAttack, InnerAttack
from nndefense.training.progress import TrainingFolder
from nndefense.training.racnn import train_racnn

# The static sources differ from the defended net in their weights, and every second one in its architecture.
_SOURCES = 2
_ATTACK = ("norm", "eps", "steps")


def bare(classifier: Classifier) -> Made:
    """The classifier itself."""
    return Made(classifier, {"net": classifier.arch or classifier.source})


def cropped(classifier: Classifier, materials: Materials, **options: Any) -> Made:
    """Crops, averaged, of the size that suits the data set."""
    size = options.setdefault("size", materials.scope.crop)
    form = f"{options.get('crops', 30)} crops of {size:.2g} of the side"
    # The form is rounded for people.
    return Made(crop_ensemble(classifier, **options), {"form": form}, identity={"options": options})


def quilted(classifier: Classifier, materials: Materials, **options: Any) -> Made:
    """Image quilting with patches of the training images."""
    patches = _patches(materials)
    told = ", ".join(f"{name} {value}" for name, value in options.items())
    form = told or defenses.get("quilting").about
    return Made(
        quilting(classifier, patches, **options),
        {"form": form, "patches": len(patches), "fingerprint": patches.fingerprint[:16]},
        patches.fingerprint,
        len(patches),
    )


def _patches(materials: Materials) -> PatchDatabase:
    folder, rows = materials.out / "patches", materials.rows
    _, height, width = rows.shape
    # As many as asked for, or all that there are.
    count = min(materials.scope.patches, len(rows) * (height - SIDE + 1) * (width - SIDE + 1))
    try:
        found = PatchDatabase.open(folder)
        made = (found.manifest.data["fingerprint"], len(found), found.manifest.seed)
        if made == (rows.fingerprint, count, materials.seed):
            return found
    except DatabaseError:
        pass
    materials.say(f"cutting {materials.scope.patches:,} patches")
    return build_patches(
        rows,
        folder,
        patches=materials.scope.patches,
        specs=materials.specs,
        seed=materials.seed,
        overwrite=True,
        progress=materials.progress,
    )


def nearest(
    classifier: Classifier,
    materials: Materials,
    *,
    layer: str | None = None,
    pooling: str | None = None,
    pca: int | None = None,
    k: int | None = None,
    weighting: str | None = None,
    votes: str | None = None,
    temperature: float | None = None,
    alpha: float | None = None,
    database: str | None = None,
    share: float = 1.0,
) -> Made:
    """The nearest-neighbour defence over a ``share`` of the training images, or of a finished database.

    What is not given is as the materials' settings say, else calibrated; a finished database brings its feature, and
    what it was calibrated to.
    """
    more = {"votes": votes, "temperature": temperature, "alpha": alpha}
    if database is None:
        chosen = materials.chosen(pooling or "avg", layer=layer or "", pca=pca, k=k, weighting=weighting or "")
        feature, calibration = chosen.feature, chosen.calibration
        rule = chosen.rule.changed(**more)
        # A calibrated layer can be the one that another row names.
        named = [part for part, value in ((layer, layer), (f"pca{pca}", pca)) if value is not None]
        whole = materials.database(feature, "-".join([feature.pooling, *map(str, named)]))
    else:
        wrong = [name for name, value in (("layer", layer), ("pooling", pooling), ("pca", pca)) if value is not None]
        if wrong:
            raise InputError(f"the database {database} has its own {', '.join(wrong)}: leave that out of its row")
        scope = materials.scope
        asked = {"k": k or scope.k, "weighting": weighting or scope.weighting or None}
        stored = open_stored(database, classifier, **asked, **more)  # type: ignore[arg-type]
        whole, rule, calibration = stored.database, stored.rule, stored.calibration or {}
        feature = whole.feature
    rows = whole
    if share < 1:
        count = max(round(share * len(whole)), 1)
        # One order for all sizes, so that a smaller database is a part of every larger one.
        rows = whole.subset(np.random.default_rng(materials.seed).permutation(len(whole))[:count])
    rule = rule.changed(k=min(rule.k, len(rows)))
    facts = {
        "layer": feature.layer,
        "pooling": feature.pooling,
        "dimensions": rows.dimension,
        "rows": len(rows),
        **rule.settings,
    }
    if calibration:
        facts |= {"calibrated on": calibration["n"], "within the bound on clean accuracy": calibration["within_bound"]}
    model = NearestNeighborDefense(classifier, rows, **rule.to_json())
    return Made(model, facts, rows.fingerprint, len(rows))


def ensemble_adversarial(classifier: Classifier, materials: Materials, sources: int = _SOURCES) -> Made:
    """A net trained with images that static nets and it itself have attacked in one step (Tramèr et al. 2018)."""
    # What is missing is told before nets are trained.
    step = InnerAttack.fgsm(_attack(materials, "ensemble-adversarial")["eps"])
    own = {"arch": _arch(materials, "ensemble-adversarial"), **materials.scope.classifier}
    archs = [own, materials.scope.surrogate or own]
    statics = [
        materials.net(f"source-{number}", archs[number % 2], seed=materials.seed + 10 + number)
        for number in range(sources)
    ]
    attack = EnsembleAttack(statics, step, cache=materials.out / "attacked-images")
    net = _net(materials, "ensemble-adversarial", attack)
    return _trained(materials, net, {"sources": len(statics), "attack": f"one step, linf {step.eps:g}"})


def alp(classifier: Classifier, materials: Materials) -> Made:
    """A net trained to give clean and attacked images the same logits (Kannan et al. 2018)."""
    found = _attack(materials, "alp")
    net = _net(materials, "alp", InnerAttack(**found))
    return _trained(materials, net, {"attack": f"PGD, {found['steps']} steps, {found['norm']} {found['eps']:g}"})


def ra_cnn(classifier: Classifier, materials: Materials, k: int = 5) -> Made:
    """RA-CNN over the database of the nearest-neighbour defence (Zhao and Cho 2019)."""
    feature = materials.chosen("avg").feature
    database = materials.database(feature, "avg")
    found = _racnn(materials, database, k)
    facts = {
        "net": found.net.arch,
        "k": found.k,
        "rows": len(database),
        "retrieves by": feature.layer,
        "fingerprint": found.net.fingerprint[:16],
    }
    return Made(RaCnnDefense(classifier, database, found), facts, database.fingerprint, len(database))


def _racnn(materials: Materials, database: Any, k: int) -> RaCnn:
    folder = materials.out / "nets" / "ra-cnn"
    arch, settings = str(materials.scope.classifier.get("arch", "small-cnn")), _settings(materials)
    told = {"database": database.fingerprint, "images": materials.rows.fingerprint, "arch": arch, "k": k,
            "seed": materials.seed, **settings}  # fmt: skip
    # Beside the folder: the settings of what is finished or begun in it.
    note, key = folder.with_suffix(".json"), recipes.identity(told)
    same = note.exists() and read_json(note) == {"settings": key}
    if same and (folder / DESCRIPTION_FILE).exists():
        return load_racnn(folder, device=materials.device)
    materials.say("training ra-cnn")
    unfinished = same and TrainingFolder(folder / NET_FOLDER).is_unfinished()
    if not same:
        shutil.rmtree(folder, ignore_errors=True)
        make_folder(note.parent)
        write_json(note, {"settings": key})
    return train_racnn(
        materials.classifier,
        database,
        materials.rows,
        images=materials.rows,
        arch=arch,
        k=k,
        device=materials.device,
        out=folder,
        resume=unfinished,
        overwrite=not unfinished,
        progress=materials.progress,
        seed=materials.seed,
        **settings,
    )


def _arch(materials: Materials, name: str) -> str:
    """The architecture of the net that a defence trains: the settings', else the classifier's own."""
    arch = materials.scope.classifier.get("arch") or materials.classifier.arch
    if arch not in ARCHITECTURES:
        raise InputError(f"no architecture is named to train {name} with: leave that defence out")
    return str(arch)


def _net(materials: Materials, name: str, attack: Any) -> Classifier:
    settings = {"arch": _arch(materials, name), **_settings(materials)}
    return materials.net(name, settings, seed=materials.seed, objective=name, attack=attack)


def _settings(materials: Materials) -> dict[str, Any]:
    """Training settings, without those of the attack."""
    return {name: value for name, value in materials.scope.training.items() if name not in _ATTACK}


def _attack(materials: Materials, name: str) -> dict[str, Any]:
    found = {name: value for name, value in materials.scope.training.items() if name in _ATTACK}
    if "eps" not in found:
        raise InputError(
            f"{name} is trained against an attack, and there are no settings of it for {materials.rows.name}: name "
            "them in a recipe (materials.training.eps)"
        )
    return {"norm": "linf", "steps": 5, **found}


def _trained(materials: Materials, net: Classifier, facts: dict[str, Any]) -> Made:
    model = in_classes_of(net, materials.classifier)
    return Made(model, {"net": net.arch, **facts, "fingerprint": net.fingerprint[:16]})


class InClassesOf(nn.Module):
    """A net's answer in the class numbers of another: images -> log-probabilities N x classes of the other."""

    def __init__(self, net: nn.Module, numbers: Tensor, count: int) -> None:
        """
        Args:
            net: images -> logits N x K.
            numbers: for each of its K classes the other's class number.
            count: of the other's classes; those that the net does not know get a probability of 0.
        """
        super().__init__()
        self.net, self.count = net, count
        self.numbers: Tensor
        self.register_buffer("numbers", numbers)
        self.eval()

    def forward(self, images: Tensor) -> Tensor:
        """Images N x C x H x W in [0, 1] -> N x count."""
        found = self.net(images).log_softmax(1)
        # A finite floor: losses subtract these numbers from one another.
        out = torch.full((len(found), self.count), -1e4, dtype=found.dtype, device=found.device)
        return out.index_copy(1, self.numbers, found)


def in_classes_of(net: Classifier, classifier: Classifier) -> nn.Module:
    """A net that was trained on the materials' images, answering in the classes of the classifier."""
    if net.classes == classifier.classes:
        return net
    return InClassesOf(net, classifier.label_map(net.classes).to(classifier.device), len(classifier.classes))
