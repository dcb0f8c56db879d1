"""``nndefense racnn``: train RA-CNN on a database, and measure it clean and under attack."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from nndefense.cli.declare import Group, Only
from nndefense.cli.options import (
    BatchOption,
    ClassifierOptions,
    Common,
    DatabaseOption,
    DatasetOption,
    EpsOption,
    ImagesOption,
    MeasuredOption,
    NormOption,
    command_line,
    numbers,
)
from nndefense.cli.train import LoopOptions
from nndefense.errors import InputError

if TYPE_CHECKING:
    from nndefense.database import ImageDatabase
    from nndefense.datasets import ImageDataset
    from nndefense.models import Classifier

racnn = Group(
    "racnn", "RA-CNN: classify an image's projection into the hull of its retrieved neighbours (Zhao and Cho 2019)."
)
Retriever = Annotated[ClassifierOptions, Only("classifier", "classes")]
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


@racnn.command("train")
def train(
    *,
    dataset: DatasetOption,
    model: Retriever,
    database: DatabaseOption,
    out: Annotated[Path, typer.Option(help="Folder for the trained net and its features of all rows.")],
    arch: Annotated[str, typer.Option(help="Architecture of the trained features.")] = "small-cnn",
    k: Annotated[int, typer.Option(min=1, help="Neighbours; 5 or 10 in the paper.")] = 5,
    mixup_draws: Annotated[int, typer.Option(min=1, help="Draws of local mixup a step and image.")] = 5,
    mixup_weight: Annotated[
        float, typer.Option(help="Weight of local mixup against the cross-entropy; unknown in the paper; 0: none.")
    ] = 1.0,
    images: ImagesOption = None,
    loop: LoopOptions,
    common: Common,
) -> None:
    """Train features, attention and classifier on the neighbours that a database retrieves."""
    from nndefense.database import ImageDatabase
    from nndefense.pipeline import open_datasets
    from nndefense.training.launcher import leads
    from nndefense.training.racnn import train_racnn

    net = model.open(common, database=database)
    opened = ImageDatabase.open(database, classifier=net)
    found = train_racnn(
        net,
        opened,
        open_datasets([dataset], data_dir=common.data_dir, like=net),
        images=_rows(net, opened, images, dataset, common),
        data_dir=common.data_dir,
        out=out,
        arch=arch,
        k=k,
        mixup_draws=mixup_draws,
        mixup_weight=mixup_weight,
        **loop.settings(common),
    )
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
    common.show(result, text)


@racnn.command("evaluate")
def evaluate(
    *,
    trained: Annotated[Path, typer.Option("--model", help="Folder of a trained RA-CNN.")],
    dataset: MeasuredOption,
    model: Retriever,
    database: DatabaseOption,
    images: ImagesOption = None,
    k: Annotated[int | None, typer.Option(min=1, help="Neighbours [default: as in training].")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Images for the clean accuracy, drawn at random.")] = None,
    attacked: Annotated[int, typer.Option(min=1, help="How many of them are attacked at most.")] = 500,
    eps: EpsOption = "0.1",
    norm: NormOption = "linf",
    steps: Annotated[int, typer.Option(min=1, help="Gradient steps.")] = 40,
    adaptive: Annotated[
        bool, typer.Option("--adaptive/--no-adaptive", help="Also the ensemble of attacks on the retrieval.")
    ] = True,
    out: Annotated[Path | None, typer.Option(help="Also write the figures to this JSON file.")] = None,
    batch_size: BatchOption = 100,
    common: Common,
) -> None:
    """Clean accuracy, and accuracy under attacks that ignore, hold, follow or relax the retrieval, with intervals."""
    from nndefense.bars import progress_bar
    from nndefense.database import ImageDatabase
    from nndefense.datasets import measured_spec
    from nndefense.defenses.racnn import RaCnnDefense
    from nndefense.evaluation.racnn import measure_racnn
    from nndefense.files import sealed, write_json
    from nndefense.locks import locked_file
    from nndefense.pipeline import check_not_in_database, open_datasets
    from nndefense.versions import library_versions

    budgets = numbers("--eps", eps)
    if out is not None and not out.parent.is_dir():
        raise InputError(f"{out.parent} is no folder: create it, or choose another --out")
    net = model.open(common, database=database)
    defense = RaCnnDefense.load(trained, net, ImageDatabase.open(database, classifier=net), k=k)
    spec = measured_spec(dataset, data_dir=common.data_dir)
    measured = open_datasets([spec], data_dir=common.data_dir, like=net, limit=limit, seed=common.seed)
    check_not_in_database(measured, defense)
    with locked_file(out) if out is not None else nullcontext():
        with progress_bar(total=len(measured), desc="attacking", unit=" images", shown=common.progress) as bar:
            found = measure_racnn(
                defense,
                measured,
                budgets,
                norm=norm,
                steps=steps,
                attacked=attacked,
                adaptive=adaptive,
                batch_size=batch_size,
                images=_rows(net, defense.database, images, dataset, common),
                data_dir=common.data_dir,
                seed=common.seed,
                step=bar.update,
            )
        result = {
            "model": str(trained),
            "classifier": model.classifier,
            "database": {"path": str(database), "rows": len(defense.database)},
            "defense": defense.settings(),
            "data": {"name": measured.name, "n": len(measured), "fingerprint": measured.fingerprint},
            "norm": norm,
            "steps": steps,
            "seed": common.seed,
            **found,
            "command": command_line(),
            "versions": library_versions(),
        }
        if out is not None:
            write_json(out, sealed(result))
    common.show(result, _text(result))


def _rows(
    net: Classifier, database: ImageDatabase, images: list[str] | None, dataset: str, common: Common
) -> ImageDataset | None:
    """The images of the rows: those of --images, else as for an evaluation with this --dataset."""
    from nndefense.pipeline import open_datasets
    from nndefense.pipeline.opening import neighbor_pictures

    if images:
        return open_datasets(images, data_dir=common.data_dir, like=net)
    return neighbor_pictures(database, common.data_dir, net, named=[dataset], say=common.say)


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
