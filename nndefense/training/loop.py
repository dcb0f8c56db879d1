"""Training a classifier: one loop for every objective, repeatable under a seed, and resumable after any step."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from nndefense.datasets import ImageDataset
from nndefense.errors import InputError
from nndefense.locks import locked
from nndefense.memory import reused_memory
from nndefense.models import Classifier, load_classifier, resolve_device, save_classifier
from nndefense.models.checkpoint import check_savable
from nndefense.modes import outside_inference_mode
from nndefense.training.batch import BatchAttack, Objective
from nndefense.training.batches import EpochBatches
from nndefense.training.display import Curves, tensorboard_module
from nndefense.training.ensemble_attack import EnsembleAttack
from nndefense.training.epochs import Checkpoints, TrainingRun, fastest_convolutions
from nndefense.training.identity import check_same, described, described_attack, form
from nndefense.training.kernel_retrieval import embedded
from nndefense.training.launcher import Team, join
from nndefense.training.objectives import find_spec, make_objective, objective_name, weights_of
from nndefense.training.progress import HistoryRow, TrainingFolder
from nndefense.training.row_bank import RowBank
from nndefense.training.settings import SettingsOptions, TrainingSettings, make_settings
from nndefense.training.step import Stepper
from nndefense.training.validation import ValidationChecks, check_labels

if TYPE_CHECKING:
    from typing_extensions import Unpack


@outside_inference_mode
def train_classifier(
    classifier: Classifier,
    dataset: ImageDataset,
    *,
    objective: str | Objective = "standard",
    attack: BatchAttack | None = None,
    unlabelled: ImageDataset | None = None,
    validation: ImageDataset | None = None,
    validation_attack: BatchAttack | None = None,
    device: str | torch.device = "auto",
    out: str | Path | None = None,
    resume: bool = False,
    overwrite: bool = False,
    checkpoint_steps: int | None = None,
    checkpoint_seconds: float | None = 300.0,
    tensorboard: bool = False,
    progress: bool = True,
    on_epoch: Callable[[HistoryRow], None] | None = None,
    **settings: Unpack[SettingsOptions],
) -> Classifier:
    """Train ``classifier`` in place and return it, in evaluation mode on ``device``.

    On one CPU with the same number of threads and the same versions, the same arguments give the same weights bit for
    bit, whether in one go or killed and resumed any number of times. On a GPU some operations add in varying order.
    The global random state is the same afterwards as before.

    Started by ``torchrun``, it is one training in several processes; see :mod:`nndefense.training.launcher`.

    Args:
        classifier: of any architecture; of a built-in or torchvision one if ``out`` is given.
        dataset: labelled images; its classes are matched by :meth:`Classifier.label_map`.
        objective: what to minimise: a name in :data:`nndefense.training.OBJECTIVES`, or a function.
        attack: for objectives that attack: an :class:`InnerAttack`, or anything that is called like one; an
            :class:`EnsembleAttack` first fills its cache, if it has one.
        unlabelled: a pool whose labels are pseudo-labels, for objectives that take one.
        validation: labelled images whose accuracy is measured after every epoch, and, with an attack, their robust
            accuracy at every check.
        validation_attack: for the checks; by default the attack of the training with at least ten steps.
        device: as for :func:`nndefense.models.resolve_device`.
        out: the folder for the classifier, with ``history.jsonl`` and, until it is finished, a checkpoint; by default
            nothing is written.
        resume: go on with the unfinished training in ``out``, also with one that was killed before its first
            checkpoint; a finished one is returned as it is.
        overwrite: delete the training or classifier that ``out`` holds.
        checkpoint_steps, checkpoint_seconds: save also within an epoch, after so many steps, or when so many seconds
            have passed since the last time; None: not for that reason. It does not change the weights.
        tensorboard: also write curves to ``out/tensorboard``.
        progress: show a bar on standard error.
        on_epoch: called with the line of history after every epoch, once the checkpoint is written; what it raises
            ends the training there.
        **settings: the fields of :class:`TrainingSettings` by name; ``epochs`` and ``batch_size`` are by default
            :func:`default_epochs` and :func:`default_batch_size` of the data.

    Raises:
        InputError: settings, data or ``out`` cannot be used, differ from those of the training to resume, or the disk
            is full.
        ModelError: the loss or a weight is no longer finite, the classes do not match, or a checkpoint is damaged.

    Whatever is raised, the last checkpoint in ``out`` stays whole.
    """
    started = time.perf_counter()
    team = join(resolve_device(device))
    dataset = dataset.usable
    unlabelled = None if unlabelled is None else unlabelled.usable
    validation = None if validation is None else validation.usable
    check_labels(dataset)
    chosen = make_settings(len(dataset), dict(settings))
    loss = make_objective(objective) if isinstance(objective, str) else objective
    _check_parts(classifier, dataset, loss, attack, unlabelled, validation, validation_attack, chosen)
    checkpoints = Checkpoints(checkpoint_steps, checkpoint_seconds)
    if tensorboard:
        tensorboard_module()
        if out is None:
            raise InputError("without a folder there is no place for TensorBoard's curves: give --out")
    labels = classifier.label_map(dataset.classes)[torch.from_numpy(dataset.labels)]
    pseudo = None
    if unlabelled is not None:
        pseudo = classifier.label_map(unlabelled.classes)[torch.from_numpy(unlabelled.labels)]
    batches = EpochBatches(dataset, labels, chosen, team, unlabelled=unlabelled, pseudo_labels=pseudo)
    spec, bank, weights = find_spec(loss), None, weights_of(loss)
    if spec is not None and spec.rows:
        bank = RowBank(
            classifier, batches.sets, batches.labels, team, neighbors=weights["rows"], votes=weights["votes"]
        )
        batches.bank = bank.rows
    watch = ValidationChecks(
        classifier, dataset, validation, attack, validation_attack, chosen, team, retrieves=bank is not None
    )

    held = None if validation is None else described(validation)
    # All that the final weights depend on, and, where they are not those of the last step, what they are chosen by.
    selected = {"validation": held, "attack": described_attack(watch.attack) if watch.active else None}
    identity = {
        "classifier": form(classifier),
        "settings": chosen.as_dict(),
        "objective": objective_name(loss),
        "attack": described_attack(attack),
        "data": described(dataset),
        "unlabelled": None if unlabelled is None else described(unlabelled),
        "selection": selected if chosen.keep_best or chosen.stop_on_collapse else None,
        "processes": team.size,
    }
    # The leading process may still be writing what an earlier call left.
    team.wait()
    with _opened(out, classifier, team, resume=resume, overwrite=overwrite) as (folder, resume):
        state = None
        if folder is not None and resume:
            if not folder.is_unfinished():
                # It was resumed although it is finished.
                finished = load_classifier(folder.folder, device=team.device)
                check_same({**finished.info, "classifier": form(finished)}, identity, folder.folder)
                return finished
            state = folder.state()
            check_same(state, identity, folder.folder)

        classifier.to(team.device)
        if chosen.channels_last:
            classifier.to(memory_format=torch.channels_last)
        team.agree(classifier)
        stepper = Stepper(classifier, loss, attack, chosen, team)
        kept = folder if team.leads else None
        run = TrainingRun(stepper, batches, watch, kept, checkpoints, identity, progress and team.leads, bank)
        if folder is not None and state is not None:
            run.restore(folder, state)
            team.wait()
        else:
            # Before the first step, so that a training is recognised and can be resumed whenever it was stopped.
            run.save()
        if isinstance(attack, EnsembleAttack):
            batches.others = attack.prepare(dataset, team, progress=progress)
        board = None
        if tensorboard and folder is not None and team.leads:
            board = Curves(folder.folder, run.done)
        try:
            with fastest_convolutions(team.device), reused_memory():
                run.finish(board, on_epoch)
        finally:
            if board is not None:
                board.close()

        if chosen.channels_last:
            classifier.to(memory_format=torch.contiguous_format)
        classifier.eval()
        classifier.info = {
            **{name: identity[name] for name in ("data", "settings", "objective", "attack", "unlabelled", "selection")},
            "processes": team.size,
            "validation": held,
            "precision": {"used": stepper.precision.name, "reason": stepper.precision.reason},
            "best": None if run.standing.best is None else run.standing.best.as_dict(),
            "history": run.standing.history,
            "device": str(team.device),
            # Of this process only, where the training was resumed.
            "seconds": round(time.perf_counter() - started, 3),
        }
        if bank is not None:
            retrieval = {"rows": len(bank.rows.labels), "neighbors": bank.neighbors, "votes": bank.votes}
            classifier.info["retrieval"] = retrieval | {"temperature": embedded(classifier).temperature}
        if folder is not None:
            classifier.source = str(folder.folder)
            if team.leads:
                save_classifier(classifier, folder.folder)
                folder.finish(run.standing.history)
            # So that no process looks for the classifier before it is there.
            team.wait()
        return classifier


def _check_parts(
    classifier: Classifier,
    dataset: ImageDataset,
    objective: Objective,
    attack: BatchAttack | None,
    unlabelled: ImageDataset | None,
    validation: ImageDataset | None,
    validation_attack: BatchAttack | None,
    settings: TrainingSettings,
) -> None:
    """Raise :class:`InputError` unless the parts of a training fit together."""
    spec = find_spec(objective)
    if spec is not None:
        name = spec.name
        if spec.attack and attack is None:
            raise InputError(f"the objective {name} attacks its images: give an attack")
        if spec.unlabelled and unlabelled is None:
            raise InputError(f"the objective {name} learns from unlabelled images too: give a pool of them")
        if spec.rows:
            embedded(classifier)
            if len(dataset) < 2:
                raise InputError(f"the objective {name} retrieves other images than the one itself: give at least 2")
            if validation is None and settings.stop_on_collapse:
                raise InputError("the collapse of a retrieval shows on images held out: give a validation set")
        elif settings.refresh_steps is not None:
            raise InputError(f"the objective {name} has no rows to refresh: leave the steps between refreshes out")
        if not (spec.unlabelled or spec.rows) and unlabelled is not None:
            raise InputError(f"the objective {name} knows labelled images alone: leave the unlabelled ones out")
    if isinstance(attack, EnsembleAttack):
        attack.check(classifier, dataset)
    if unlabelled is None and settings.unlabelled_per_batch is not None:
        raise InputError("there are no unlabelled images of which a batch could hold some: give a pool of them")
    for images in (dataset, unlabelled, validation):
        if images is not None:
            classifier.check_shape((1, *images.shape))
            check_labels(images)
            classifier.label_map(images.classes)
    if validation is None and settings.keep_best:
        raise InputError("the best weights are those on images held out: give a validation set")
    if validation is None and validation_attack is not None:
        raise InputError("there are no images for the validation attack: give a validation set")


@contextmanager
def _opened(
    out: str | Path | None, classifier: Classifier, team: Team, *, resume: bool, overwrite: bool
) -> Iterator[tuple[TrainingFolder | None, bool]]:
    """The folder of a training, locked by the leading process, and whether there is something to go on with."""
    if resume and overwrite:
        raise InputError("a training cannot both be resumed and overwritten: give --resume or --overwrite, not both")
    if out is None:
        if resume or overwrite:
            raise InputError("without a folder there is nothing to resume or to overwrite: give --out")
        yield None, False
        return
    check_savable(classifier)
    folder = TrainingFolder(Path(out).expanduser())
    nothing = f"{folder.folder} holds no training to resume: leave --resume out to start one"
    if resume and not folder.folder.is_dir():
        raise InputError(nothing)
    with locked(folder.folder) if team.leads else nullcontext(False) as killed:
        begun = folder.is_unfinished() or folder.is_finished()
        if team.leads:
            # One that was killed before its first checkpoint is begun again.
            if resume and not begun and not (killed or folder.is_bare()):
                raise InputError(nothing)
            if overwrite or (resume and not begun):
                folder.clear()
            elif not resume:
                folder.check_free()
        # The leading process has looked before it wrote anything.
        go_on = torch.tensor(float(team.leads and resume and begun), device=team.device)
        yield folder, bool(team.sum(go_on))
