"""Training a classifier: repeatable under a seed, and resumable after any epoch."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from nndefense.datasets import ImageDataset
from nndefense.errors import InputError, ModelError
from nndefense.files import make_folder
from nndefense.models import Classifier, load_classifier, resolve_device, save_classifier
from nndefense.models.checkpoint import check_savable
from nndefense.training.accuracy import accuracy, check_labels
from nndefense.training.batches import EpochBatches
from nndefense.training.objectives import Objective, objective_name, standard
from nndefense.training.progress import TrainingFolder
from nndefense.training.random_state import seeded
from nndefense.training.settings import TrainingSettings, default_batch_size, default_epochs

# One epoch as a line of history.jsonl.
HistoryRow = dict[str, Any]

# Reading the loss makes a GPU wait, so it is done once in so many steps.
_LOOK_EVERY = 20


def train_classifier(
    classifier: Classifier,
    dataset: ImageDataset,
    *,
    epochs: int | None = None,
    batch_size: int | None = None,
    lr: float = 2e-3,
    weight_decay: float = 0.0,
    optimizer: str = "adam",
    schedule: str = "cosine",
    augment: bool = False,
    flip: bool = False,
    seed: int = 0,
    device: str | torch.device = "auto",
    out: str | Path | None = None,
    resume: bool = False,
    overwrite: bool = False,
    validation: ImageDataset | None = None,
    objective: Objective = standard,
    progress: bool = True,
    on_epoch: Callable[[HistoryRow], None] | None = None,
) -> Classifier:
    """Train ``classifier`` in place and return it, in evaluation mode on ``device``.

    On one CPU with the same number of threads and the same versions, the same arguments give the same weights bit for
    bit, whether in one go or resumed. On a GPU some operations add in varying order. The global random state is the
    same afterwards as before.

    Args:
        classifier: of any architecture; of a built-in or torchvision one if ``out`` is given.
        dataset: labelled images; its classes are matched by :meth:`Classifier.label_map`.
        epochs, batch_size: by default :func:`default_epochs` and :func:`default_batch_size` of the data.
        lr, weight_decay, optimizer, schedule, augment, flip, seed: see :class:`TrainingSettings`.
        device: as for :func:`nndefense.models.resolve_device`.
        out: the folder for the classifier, with ``history.jsonl`` and, until it is finished, a checkpoint after every
            epoch; by default nothing is written.
        resume: go on with the unfinished training in ``out``; a finished one is returned as it is.
        overwrite: delete the training or classifier that ``out`` holds.
        validation: labelled images whose accuracy is measured after every epoch.
        objective: what to minimise.
        progress: show a bar on standard error.
        on_epoch: called with the line of history after every epoch, once the checkpoint is written; what it raises
            ends the training there.

    Raises:
        InputError: settings, data or ``out`` cannot be used, or differ from those of the training to resume.
        ModelError: the loss is no longer finite, the classes do not match, or a checkpoint is damaged.
    """
    started = time.perf_counter()
    target = resolve_device(device)
    check_labels(dataset)
    batch = default_batch_size(len(dataset)) if batch_size is None else batch_size
    settings = TrainingSettings(
        epochs=default_epochs(len(dataset), max(batch, 1)) if epochs is None else epochs,
        batch_size=batch,
        lr=lr,
        weight_decay=weight_decay,
        optimizer=optimizer,
        schedule=schedule,
        augment=augment,
        flip=flip,
        seed=seed,
    )
    if batch > len(dataset):
        raise InputError(
            f"the batch size {batch} is more than the {len(dataset)} images of {dataset.name}: choose a smaller one"
        )
    classifier.check_shape((1, *dataset.shape))
    labels = classifier.label_map(dataset.classes)[torch.from_numpy(dataset.labels)]
    if validation is not None:
        check_labels(validation)
        classifier.label_map(validation.classes)

    identity = _identity(classifier, dataset, settings, objective)
    folder = _open_folder(out, classifier, resume=resume, overwrite=overwrite)
    saved = None
    if folder is not None and resume:
        if not folder.is_unfinished():
            return _finished(folder, identity, target)
        saved = folder.state()
        _check_same(saved, identity, folder)

    classifier.to(target)
    solver = _optimizer(classifier, settings)
    history: list[HistoryRow] = []
    if folder is not None:
        if saved is not None:
            history = folder.restore(saved, classifier, solver)
        else:
            # Before the first epoch, so that a training is recognised and can be resumed whenever it was stopped.
            folder.save(classifier, solver, identity, history)
    batches = EpochBatches(dataset, labels, settings, target)
    for epoch in range(len(history) + 1, settings.epochs + 1):
        row = _run_epoch(classifier, batches, solver, objective, epoch, progress=progress)
        if validation is not None:
            row["validation_accuracy"] = accuracy(classifier, validation)
        history.append(row)
        if progress:
            _report(row, settings.epochs)
        if folder is not None:
            folder.save(classifier, solver, identity, history)
        if on_epoch is not None:
            on_epoch(dict(row))

    classifier.eval()
    classifier.info = {
        "data": identity["data"],
        "settings": identity["settings"],
        "objective": identity["objective"],
        "validation": None if validation is None else _described(validation),
        "history": history,
        "device": str(target),
        # Of this process only, where the training was resumed.
        "seconds": round(time.perf_counter() - started, 3),
    }
    if folder is not None:
        classifier.source = str(folder.folder)
        save_classifier(classifier, folder.folder)
        folder.finish(history)
    return classifier


def _run_epoch(
    classifier: Classifier,
    batches: EpochBatches,
    solver: torch.optim.Optimizer,
    objective: Objective,
    epoch: int,
    *,
    progress: bool,
) -> HistoryRow:
    """Train for one epoch and return its line of history.

    The accuracy is that of the objective's last forward pass on each batch, before the step: on the images that the
    loss was worked out for. It costs nothing, unlike a second pass over the data.
    """
    settings, device = batches.settings, batches.device
    steps = batches.count * settings.epochs
    last: list[Tensor] = []
    handle = classifier.register_forward_hook(lambda _module, _images, logits: last.append(logits.detach()))
    loss_sum = torch.zeros((), dtype=torch.float64 if device.type != "mps" else torch.float32, device=device)
    right = torch.zeros((), dtype=torch.int64, device=device)
    counted = seen = 0
    started = time.perf_counter()
    bar = tqdm(
        total=len(batches.dataset),
        desc=f"epoch {epoch}/{settings.epochs}",
        unit="img",
        leave=False,
        file=sys.stderr,
        disable=not progress,
    )
    try:
        with bar, seeded(settings.seed, epoch, device):
            for number, (images, labels) in enumerate(batches.epoch(epoch)):
                rate = settings.lr_at(((epoch - 1) * batches.count + number) / steps)
                for group in solver.param_groups:
                    group["lr"] = rate
                classifier.train()
                last.clear()
                solver.zero_grad(set_to_none=True)
                loss = objective(classifier, images, labels)
                loss.backward()  # type: ignore[no-untyped-call]
                solver.step()
                seen += len(labels)
                loss_sum += loss.detach() * len(labels)
                if last and len(last[-1]) == len(labels):
                    right += (last[-1].argmax(1) == labels).sum()
                    counted += len(labels)
                bar.update(len(labels))
                if (number + 1) % _LOOK_EVERY == 0 or number + 1 == batches.count:
                    mean = float(loss_sum) / seen
                    if not math.isfinite(mean):
                        raise ModelError(
                            f"the loss is no longer a finite number in epoch {epoch} of {settings.epochs}: train with "
                            f"a lower learning rate than {settings.lr:g}, and check that no image holds NaN"
                        )
                    share = f"{int(right) / counted:.4f}" if counted else "?"
                    bar.set_postfix_str(f"loss {mean:.4f}, accuracy {share}", refresh=False)
    finally:
        handle.remove()
    seconds = time.perf_counter() - started
    return {
        "epoch": epoch,
        "loss": float(loss_sum) / seen,
        "accuracy": int(right) / counted if counted else None,
        "lr": rate,
        "seconds": round(seconds, 3),
        "images_per_second": round(seen / seconds, 1),
    }


def _optimizer(classifier: nn.Module, settings: TrainingSettings) -> torch.optim.Optimizer:
    parameters = [parameter for parameter in classifier.parameters() if parameter.requires_grad]
    if not parameters:
        raise InputError("the classifier has no weights to train: they are all frozen")
    if settings.optimizer == "sgd":
        return torch.optim.SGD(
            parameters, lr=settings.lr, momentum=0.9, nesterov=True, weight_decay=settings.weight_decay
        )
    kind = torch.optim.Adam if settings.optimizer == "adam" else torch.optim.AdamW
    return kind(parameters, lr=settings.lr, weight_decay=settings.weight_decay)


def _described(dataset: ImageDataset) -> dict[str, Any]:
    return {"name": dataset.name, "n": len(dataset), "fingerprint": dataset.fingerprint}


def _identity(
    classifier: Classifier, dataset: ImageDataset, settings: TrainingSettings, objective: Objective
) -> dict[str, Any]:
    """What must be the same for a training to go on as the one that it was."""
    return {
        "classifier": _form(classifier),
        "settings": settings.as_dict(),
        "objective": objective_name(objective),
        "data": _described(dataset),
    }


def _form(classifier: Classifier) -> dict[str, Any]:
    return {
        "architecture": classifier.arch,
        "input_shape": list(classifier.input_shape),
        "classes": list(classifier.classes),
        "mean": classifier.mean.flatten().tolist(),
        "std": classifier.std.flatten().tolist(),
    }


def _open_folder(
    out: str | Path | None, classifier: Classifier, *, resume: bool, overwrite: bool
) -> TrainingFolder | None:
    if resume and overwrite:
        raise InputError("a training cannot both be resumed and overwritten: give --resume or --overwrite, not both")
    if out is None:
        if resume or overwrite:
            raise InputError("without a folder there is nothing to resume or to overwrite: give --out")
        return None
    check_savable(classifier)
    folder = TrainingFolder(Path(out).expanduser())
    if resume:
        if not (folder.is_unfinished() or folder.is_finished()):
            raise InputError(f"{folder.folder} holds no training to resume: leave --resume out to start one")
        return folder
    make_folder(folder.folder)
    if overwrite:
        folder.clear()
    else:
        folder.check_free()
    return folder


def _finished(folder: TrainingFolder, identity: dict[str, Any], device: torch.device) -> Classifier:
    """The classifier of a training that was resumed although it is finished."""
    classifier = load_classifier(folder.folder, device=device)
    _check_same({**classifier.info, "classifier": _form(classifier)}, identity, folder)
    return classifier


def _check_same(saved: dict[str, Any], identity: dict[str, Any], folder: TrainingFolder) -> None:
    """Raise :class:`InputError` that names everything in which a training differs from the saved one."""
    differences = []
    for part in ("classifier", "settings"):
        old = saved.get(part) or {}
        differences += [
            name.replace("_", " ")
            if isinstance(value, list)
            else f"{name.replace('_', ' ')} ({old.get(name)}, not {value})"
            for name, value in identity[part].items()
            if old.get(name) != value
        ]
    if saved.get("objective") != identity["objective"]:
        differences.append(f"objective ({saved.get('objective')}, not {identity['objective']})")
    old, new = saved.get("data") or {}, identity["data"]
    if old.get("fingerprint") != new["fingerprint"]:
        differences.append(f"data ({old.get('name')} of {old.get('n')} images, not {new['name']} of {new['n']})")
    if differences:
        raise InputError(
            f"the training in {folder.folder} was started with other {', '.join(differences)}: "
            "resume it with the same, or start anew with --overwrite"
        )


def _report(row: HistoryRow, epochs: int) -> None:
    """One line an epoch on standard error, which stays when the bar has gone."""
    parts = [f"epoch {row['epoch']}/{epochs}", f"loss {row['loss']:.4f}"]
    if row["accuracy"] is not None:
        parts.append(f"accuracy {row['accuracy']:.4f}")
    if "validation_accuracy" in row:
        parts.append(f"validation {row['validation_accuracy']:.4f}")
    parts.append(f"{row['images_per_second']:.0f} images/s")
    tqdm.write(", ".join(parts), file=sys.stderr)
