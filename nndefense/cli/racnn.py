"""What ``nndefense racnn`` does: train RA-CNN on a database, and measure it clean and under attack."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from nndefense.attacks import apgd, pgd
from nndefense.attacks.checks import checked_inputs
from nndefense.attacks.retrieval import run_adaptive
from nndefense.cli import inputs, output
from nndefense.cli.options import command_line
from nndefense.database import ImageDatabase
from nndefense.defenses.racnn import RaCnnDefense
from nndefense.errors import DataError, InputError, NNDefenseError
from nndefense.files import write_json
from nndefense.models import resolve_device
from nndefense.statistics import wilson_interval
from nndefense.training.launcher import leads
from nndefense.training.neighbors import row_images
from nndefense.training.racnn import train_racnn
from nndefense.versions import library_versions

Attack = Callable[[Tensor, Tensor, float], Tensor]
_WORDS = {
    "no retrieval": "PGD on the net without its neighbours",
    "held": "PGD, neighbours of the clean image held (retrieval hidden)",
    "fresh": "PGD, neighbours retrieved at every step (direct)",
    "soft": "PGD through the relaxed choice of neighbours",
    "straight-through": "PGD, true answer, gradient through the choice, too",
    "apgd": "APGD, as the line above",
    "adaptive": "ensemble of attacks on the retrieval",
    "worst": "worst of all, image by image",
}


def train(
    spec: str,
    classifier: str,
    database: Path,
    out: Path,
    *,
    images: str | None,
    classes: Path | None,
    data_dir: Path | None,
    as_json: bool,
    options: dict[str, Any],
) -> None:
    """Train RA-CNN and say where it is and how good."""
    device = str(resolve_device(options["device"]))
    net = inputs.open_classifier(classifier, device=device, data_dir=data_dir, classes=classes, database=database)
    rows = ImageDatabase.open(database, classifier=net)
    dataset = inputs.open_datasets([spec], data_dir=data_dir, like=net)
    pictures = None if images is None else inputs.open_datasets([images], data_dir=data_dir, like=net)
    found = train_racnn(net, rows, dataset, images=pictures, data_dir=data_dir, out=out, **options)
    if not leads():
        return
    history = found.net.info["history"]
    result = {
        "model": str(out),
        "architecture": found.net.arch,
        "fingerprint": found.net.fingerprint,
        "k": found.k,
        "rows": len(found.table),
        "objective": found.training["objective"],
        "training_accuracy": history[-1]["accuracy"],
        "epochs": len(history),
        "seconds": found.net.info["seconds"],
    }
    text = (
        f"{out}: {found.net.arch}, {found.k} neighbours of {len(found.table):,} rows, training accuracy "
        f"{result['training_accuracy']:.3f} with each image left out of its own neighbours, "
        f"{result['seconds']:.0f} s"
    )
    output.show(result, text, as_json)


def evaluate(
    model: Path,
    spec: str,
    classifier: str,
    database: Path,
    *,
    k: int | None,
    limit: int | None,
    attacked: int,
    budgets: tuple[float, ...],
    norm: str,
    steps: int,
    adaptive: bool,
    out: Path | None,
    batch_size: int,
    classes: Path | None,
    data_dir: Path | None,
    device: str,
    seed: int,
    as_json: bool,
    progress: bool,
) -> None:
    """Print the accuracy of the plain classifier and of RA-CNN, clean and under each attack."""
    if out is not None and not out.parent.is_dir():
        raise InputError(f"{out.parent} is no folder: create it, or choose another --out")
    target = resolve_device(device)
    net = inputs.open_classifier(classifier, device=str(target), data_dir=data_dir, classes=classes, database=database)
    defense = RaCnnDefense.load(model, net, ImageDatabase.open(database, classifier=net), k=k)
    dataset = inputs.open_datasets([spec], data_dir=data_dir, like=net, limit=limit, seed=seed)
    shared = set(dataset.ids).intersection(defense.database.ids(defense.database.row_numbers))
    if shared:
        raise DataError(
            f"{len(shared)} images of {dataset.name} stand in the database by their ids (such as {min(shared)}), "
            "which would hand the defence their answers: use other images"
        )
    labels = net.label_map(dataset.classes).to(target)
    clean: dict[str, list[Tensor]] = {"classifier": [], "ra-cnn": []}
    standing: dict[tuple[float, str], list[Tensor]] = {}
    attacks = _attacks(defense, norm, steps, seed, adaptive, data_dir)
    done = 0
    bar = tqdm(total=len(dataset), desc="attacking", unit=" images", disable=None) if progress else nullcontext()
    with bar:
        for images, own, _ in dataset.batches(batch_size):
            x, y = images.to(target), labels[own.to(target)]
            for name, who in (("classifier", net), ("ra-cnn", defense)):
                with torch.no_grad():
                    clean[name].append((who(x).argmax(1) == y).cpu())
            part = min(len(x), attacked - done)
            if part > 0:
                for eps in budgets:
                    for name, right in _attacked(net, defense, attacks, x[:part], y[:part], eps, norm, steps, seed):
                        standing.setdefault((eps, name), []).append(right)
                done += part
            if isinstance(bar, tqdm):
                bar.update(len(x))
    result = {
        "model": str(model),
        "classifier": str(classifier),
        "database": {"path": str(database), "rows": len(defense.database)},
        "defense": defense.settings(),
        "data": {"name": dataset.name, "n": len(dataset), "fingerprint": dataset.fingerprint},
        "norm": norm,
        "steps": steps,
        "seed": seed,
        "clean": {name: _rate(torch.cat(found)) for name, found in clean.items()},
        "attacked": [
            {"eps": eps, "attack": name, **_rate(torch.cat(found))} for (eps, name), found in standing.items()
        ],
        "command": command_line(),
        "versions": library_versions(),
    }
    if out is not None:
        write_json(out, result)
    output.show(result, _text(result), as_json)


def _attacks(
    defense: RaCnnDefense, norm: str, steps: int, seed: int, adaptive: bool, data_dir: Path | None
) -> dict[str, Attack]:
    """The attacks on RA-CNN by name: (images, labels, eps) -> attacked images."""

    def follow(model: Callable[[Tensor], Callable[[Tensor], Tensor]]) -> Attack:
        def attack(x: Tensor, y: Tensor, eps: float) -> Tensor:
            generator = torch.Generator(x.device).manual_seed(seed)
            return pgd(model(x), x, y, eps=eps, norm=norm, steps=steps, loss="margin", generator=generator)

        return attack

    def stronger(x: Tensor, y: Tensor, eps: float) -> Tensor:
        generator = torch.Generator(x.device).manual_seed(seed)
        return apgd(through, x, y, eps=eps, norm=norm, steps=steps, loss="margin", generator=generator)

    # Made once: each holds the rows of the database.
    fresh = defense.attack_model(retrieval="fresh")
    soft, through = (defense.attack_model(retrieval=name) for name in ("soft", "straight-through"))
    found = {
        "no retrieval": follow(lambda x: defense.net),
        "held": follow(lambda x: defense.attack_model(retrieval="held", held=x)),
        "fresh": follow(lambda x: fresh),
        "soft": follow(lambda x: soft),
        "straight-through": follow(lambda x: through),
        "apgd": stronger,
    }
    if adaptive:
        try:
            pictures = row_images(defense.classifier, defense.database, data_dir=data_dir)
        except NNDefenseError:
            # Without them the ensemble leaves out the attacks that begin on the way to the rows' images.
            pictures = None
        surface = defense.surface(images=pictures)

        def ensemble(x: Tensor, y: Tensor, eps: float) -> Tensor:
            generator = torch.Generator(x.device).manual_seed(seed)
            found = run_adaptive(surface, x, y, eps=eps, norm=norm, steps=steps, generator=generator)
            return found.images

        found["adaptive"] = ensemble
    return found


def _attacked(
    net: torch.nn.Module,
    defense: RaCnnDefense,
    attacks: dict[str, Attack],
    x: Tensor,
    y: Tensor,
    eps: float,
    norm: str,
    steps: int,
    seed: int,
) -> Iterator[tuple[str, Tensor]]:
    """For each attack, N truth values: right on the clean image and after the attack."""
    checked_inputs(net, x, y, eps, norm)
    generator = torch.Generator(x.device).manual_seed(seed)
    images = pgd(net, x, y, eps=eps, norm=norm, steps=steps, loss="margin", generator=generator)
    with torch.no_grad():
        yield "undefended", ((net(x).argmax(1) == y) & (net(images).argmax(1) == y)).cpu()
        right = defense(x).argmax(1) == y
    worst = right.clone()
    for name, attack in attacks.items():
        here = right.nonzero()[:, 0]
        stands = right.clone()
        if len(here):
            images = attack(x[here], y[here], eps)
            with torch.no_grad():
                stands[here] = defense(images).argmax(1) == y[here]
        worst &= stands
        yield name, stands.cpu()
    yield "worst", worst.cpu()


def _rate(right: Tensor) -> dict[str, Any]:
    count = int(right.sum())
    return {"accuracy": count / len(right), "n": len(right), "interval": list(wilson_interval(count, len(right)))}


def _text(result: dict[str, Any]) -> str:
    def line(words: str, found: dict[str, Any]) -> str:
        low, high = found["interval"]
        return f"  {words:<68} {found['accuracy']:.3f}  [{low:.3f}, {high:.3f}]  of {found['n']}"

    lines = [
        f"{result['data']['name']}, K = {result['defense']['k']} of {result['database']['rows']:,} rows; "
        "accuracy with 95 % Wilson intervals",
        line("classifier, clean", result["clean"]["classifier"]),
        line("RA-CNN, clean", result["clean"]["ra-cnn"]),
    ]
    last = None
    for found in result["attacked"]:
        if found["eps"] != last:
            last = found["eps"]
            lines.append(f"{result['norm']} {last:g}, {result['steps']} steps")
        words = "classifier, PGD" if found["attack"] == "undefended" else f"RA-CNN: {_WORDS[found['attack']]}"
        lines.append(line(words, found))
    return "\n".join(lines)
