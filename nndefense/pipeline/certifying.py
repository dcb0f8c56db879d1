"""Certifying the answers of a classifier or of a defence over a database, cell by cell, into a results file."""

from __future__ import annotations

import datetime
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nndefense.attacks.norms import check_eps
from nndefense.attacks.registry import NORMS
from nndefense.attacks.retrieval import RetrievalSurface
from nndefense.bars import progress_bar
from nndefense.certificates import Certified, registry
from nndefense.datasets import ImageDataset, measured_spec
from nndefense.defenses import NearestNeighborDefense
from nndefense.defenses.stored import open_stored, stored_calibration
from nndefense.errors import DataError, InputError, check_choice, make_plain
from nndefense.evaluation import CellStore
from nndefense.evaluation.ladder import BARE, DEFENDED
from nndefense.evaluation.results import identity
from nndefense.files import sealed, write_json
from nndefense.locks import writes
from nndefense.models import Classifier
from nndefense.own_code import taken
from nndefense.pipeline.checks import check_not_calibrated_on, check_not_in_database
from nndefense.pipeline.opening import drawn, neighbor_pictures, open_classifier, open_datasets
from nndefense.reporting import Table
from nndefense.reporting.wording import budget, percent_in
from nndefense.versions import library_versions

FORMAT, VERSION = "nndefense-certificates", 1
NAME = "certificates.json"
# Images that are certified, and kept, at a time.
_CELL = 20
# Copies of images that the time of a draw is measured on.
_TIMED = 256


@dataclass(frozen=True)
class CertifySettings:
    """What is certified, and how; nothing is opened here.

    Attributes:
        method: of :mod:`nndefense.certificates.registry`.
        dataset: spec of labelled images.
        eps: budgets of the table, in units of the norm; what decides at given budgets decides at these.
        norm: of the radii; by default l2, or where the method has no l2 the first that it has.
        sigma: standard deviation of the noise, for methods that draw it.
        draws_select, draws: for each image, to choose the class and to bound its chance.
        confidence: 1 - alpha.
        limit: how many images, drawn at random under the seed; None for all.
        batch_size: images, or noisy copies of them, for each forward pass.
        seed: of that draw and of the noise.
    """

    method: str
    dataset: str
    eps: tuple[float, ...]
    norm: str | None = None
    sigma: float | None = None
    draws_select: int = 100
    draws: int = 10_000
    confidence: float = 0.999
    limit: int | None = None
    batch_size: int = 512
    seed: int = 0

    def __post_init__(self) -> None:
        make_plain(self)
        method = registry.get(self.method)
        if self.norm is None:
            object.__setattr__(self, "norm", "l2" if "l2" in method.norms else method.norms[0])
        check_choice("norm", self.norm or "", NORMS)
        if not self.eps or not all(0 < eps < float("inf") for eps in self.eps):
            raise InputError("give at least one eps (--eps), each finite and above 0")
        check_eps(max(self.eps), self.norm or "")
        if method.chance and self.sigma is None:
            raise InputError(f"{method.name} draws noise: give sigma (--sigma), in pixels of [0, 1], such as 0.25")
        if not method.chance and self.sigma is not None:
            raise InputError(f"{method.name} draws no noise: leave sigma (--sigma) out")
        if self.sigma is not None and not 0 < self.sigma < float("inf"):
            raise InputError(f"sigma (--sigma) is {self.sigma}, but must be above 0 and finite, in pixels of [0, 1]")
        if not 0.5 < self.confidence < 1:
            raise InputError(
                f"confidence (--confidence) is {self.confidence}, but must be above 1/2 and below 1, such as 0.999"
            )
        if min(self.draws_select, self.draws, self.batch_size, self.limit or 1) < 1:
            raise InputError("draws_select, draws, batch_size and limit must be at least 1")

    @property
    def how(self) -> dict[str, Any]:
        """What the method is given."""
        named = {name: getattr(self, name) for name in ("sigma", "draws_select", "draws", "seed", "batch_size")}
        method = registry.get(self.method)
        own = self.norm if self.norm in method.norms else method.norms[0]
        return {**named, "alpha": round(1 - self.confidence, 12), "eps": tuple(sorted(self.eps)), "norm": own}


@writes("out", holds=("cells",))
def certify(
    settings: CertifySettings,
    out: str | Path,
    *,
    classifier: str | None = None,
    database: str | Path | None = None,
    k: int | None = None,
    weighting: str | None = None,
    votes: str | None = None,
    temperature: float | None = None,
    alpha: float | None = None,
    classes: Path | None = None,
    input_shape: tuple[int, int, int] | None = None,
    images: Sequence[str] = (),
    data_dir: Path | None = None,
    device: str = "auto",
    progress: bool = True,
    command: str = "",
    say: Callable[[str], object] = lambda text: None,
) -> dict[str, Any]:
    """Certify the answers of a classifier, or of nearest neighbours in a database.

    Of a data set whose split is not named the test split is taken, else the validation split. Images that stand in the
    database, or that its setting was calibrated on, are refused. Finished cells are found again.

    Args:
        settings: how, and on which images.
        out: folder for ``certificates.json`` and finished cells.
        classifier: where it comes from; None: the one that the database names.
        database: folder of a database, whose defence is certified; None: the classifier alone.
        k, weighting, votes, temperature, alpha: of the defence's rule; None for the stored ones.
        classes, input_shape: of a classifier of one's own.
        images: specs of the images that the database was built from, as for :func:`nndefense.pipeline.evaluate`.
        data_dir: the folder of the data sets.
        device: where the nets run.
        progress: whether to show a bar.
        command: recorded.
        say: called with a line for people, such as on how long it will take.

    Returns:
        The results, as in ``certificates.json``.

    Raises:
        NNDefenseError: something cannot be opened, does not fit together, or cannot be certified.
    """
    method = registry.get(settings.method)
    method.check_target(retrieves=database is not None)
    asked: dict[str, Any] = {"k": k, "weighting": weighting, "votes": votes, "temperature": temperature, "alpha": alpha}
    if database is None and set(asked.values()) != {None}:
        raise InputError("k and weighting are settings of nearest neighbours: give a database, or leave them out")
    settings = replace(settings, dataset=measured_spec(settings.dataset, data_dir=data_dir))
    folder = Path(database).expanduser() if database is not None else None
    net = open_classifier(
        classifier,
        device=device,
        data_dir=data_dir,
        classes=classes,
        input_shape=input_shape,
        specs=(settings.dataset,),
        database=folder,
        say=say,
    )
    whole = open_datasets([settings.dataset], data_dir=data_dir, like=net)
    target: Classifier | NearestNeighborDefense = net
    if folder is not None:
        stored = open_stored(folder, net, **asked)
        target = NearestNeighborDefense(net, stored.database, **stored.rule.to_json())
        pictures = neighbor_pictures(stored.database, data_dir, net, images, (settings.dataset,), say)
        check_not_in_database(whole, target, pictures)
        check_not_calibrated_on(whole, stored_calibration(folder), folder)
    shown = drawn(whole, settings.limit, settings.seed).usable
    if not len(shown) or (shown.labels < 0).any():
        raise DataError(f"{shown.name} has no images, or some without a label: an accuracy needs a label for each")
    store = CellStore(Path(out).expanduser() / "cells", "certificates")
    found = certify_images(target, shown, settings, store=store, progress=progress, say=say)
    results = _results(settings, found, shown, target, command)
    write_json(Path(out).expanduser() / NAME, results)
    return results


def certify_images(
    target: Classifier | NearestNeighborDefense,
    dataset: ImageDataset,
    settings: CertifySettings,
    *,
    store: CellStore | None = None,
    progress: bool = True,
    say: Callable[[str], object] = lambda text: None,
) -> Certified:
    """Certify a data set's images, a few at a time, which are found again where they were certified already.

    Args:
        target: a net, or nearest neighbours.
        dataset: its images, of the net's shape.
        settings: its data set, limit and budgets of the table are not looked at.
        store: where finished cells are kept and found again.
        progress: whether to show a bar.
        say: called with a line on how long it will take.

    Returns:
        The certificates, in the settings' norm.
    """
    method, norm = registry.get(settings.method), settings.norm or ""
    method.check_target(retrieves=isinstance(target, NearestNeighborDefense))
    net = target.classifier if isinstance(target, NearestNeighborDefense) else target
    seen: nn.Module | RetrievalSurface = target
    if method.retrieval and isinstance(target, NearestNeighborDefense):
        seen = target.surface()
    # What the method takes; how the passes are batched changes nothing.
    key = {name: value for name, value in taken(method.load(), settings.how).items() if name != "batch_size"}
    whose: list[Any] = [net.fingerprint]
    if isinstance(target, NearestNeighborDefense):
        whose += [target.database.fingerprint, target.rule.to_json()]
    parts, told = [], not method.chance
    cells = range(0, len(dataset), _CELL)
    for first in progress_bar(cells, desc="certifying", unit=" cells", shown=progress):
        part = dataset.subset(list(range(first, min(first + _CELL, len(dataset)))))
        asked = [settings.method, key, part.fingerprint, list(part.ids), whose]
        kept = store.get(f"{settings.method} {first}", asked) if store is not None else None
        pixels = part.batch(list(range(len(part))))[0].to(net.device)
        if kept is None:
            if not told:
                say(_cost(target, pixels, settings, len(dataset) - first))
                told = True
            certified = method.run(seen, pixels, **settings.how)
            if store is not None:
                store.put(f"{settings.method} {first}", asked, certified.to_json())
        else:
            certified = Certified.from_json(kept)
        parts.append(certified.in_norm(norm, pixels))
    return Certified.joined(parts)


@torch.no_grad()
def _cost(target: nn.Module, pixels: Tensor, settings: CertifySettings, images: int) -> str:
    """What the draws will take, by the time of one batch."""
    count = min(_TIMED, settings.batch_size)
    copies = pixels[torch.arange(count) % len(pixels)]
    target(copies[: max(count // 8, 1)])
    begun = time.perf_counter()
    target(copies)
    each, draws = (time.perf_counter() - begun) / count, settings.draws_select + settings.draws
    seconds = each * draws * images
    length = f"{seconds:,.0f} s" if seconds < 120 else f"{seconds / 60:,.0f} minutes"
    return (
        f"{draws:,} draws x {images:,} images x {1e3 * each:.2g} ms each: about {length} (--draws and --limit say less)"
    )


def _results(
    settings: CertifySettings, found: Certified, dataset: ImageDataset, target: nn.Module, command: str
) -> dict[str, Any]:
    defense = target if isinstance(target, NearestNeighborDefense) else None
    net = defense.classifier if defense is not None else target
    assert isinstance(net, Classifier)
    labels = net.label_map(dataset.classes)[torch.as_tensor(dataset.labels)]
    table = [found.accuracy(labels, eps) for eps in (0.0, *sorted(set(settings.eps)))]
    results = {
        "format": FORMAT,
        "version": VERSION,
        "created": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "command": command,
        "settings": asdict(settings),
        "defense": BARE if defense is None else DEFENDED,
        "rule": None if defense is None else defense.rule.to_json(),
        "classifier": identity(net),
        "database": None if defense is None else defense.database.fingerprint,
        "dataset": {"name": dataset.name, "n": len(dataset), "fingerprint": dataset.fingerprint},
        "accuracy": [asdict(line) for line in table],
        "abstained": int(found.abstained.sum()),
        "certified": found.to_json(),
        "labels": labels.tolist(),
        "ids": list(dataset.ids),
        "versions": library_versions(),
    }
    return sealed(results)


def certified_text(results: dict[str, Any]) -> str:
    """The table of a certification's ``results``, as :func:`certify` gives them, for a terminal."""
    settings, norm = results["settings"], results["certified"]["norm"]
    method = registry.get(settings["method"])
    about = f"{method.name} on {results['defense']}, {results['dataset']['name']}, {results['dataset']['n']:,} images"
    rows = tuple(
        (
            "any" if not line["eps"] else budget(norm, line["eps"]),
            percent_in(line["accuracy"], line["ci_low"], line["ci_high"], 1),
        )
        for line in results["accuracy"]
    )
    text = Table(("budget", "right and certified, %"), rows, f"{about} [95 % interval]").text()
    if method.chance:
        chance = 1 - settings["confidence"]
        text += (
            f"\nunder noise of sigma {settings['sigma']:g}, each image but for a chance of {chance:.3g}; abstained on "
        )
        text += f"{results['abstained']:,}"
    return text
