"""Options of ``nndefense train``; the work is imported when it is asked for."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from nndefense.cli.options import (
    SPEC_HELP,
    DataDirOption,
    DatasetOption,
    DebugOption,
    Device,
    DeviceOption,
    JsonOption,
    Norm,
    OverwriteOption,
    QuietOption,
    SeedOption,
    number,
    numbers,
)


class Kind(str, Enum):
    """What attacks the images inside a step."""

    pgd = "pgd"
    single_step = "single-step"
    fgsm = "fgsm"
    r_fgsm = "r-fgsm"
    spatial = "spatial"


class Start(str, Enum):
    """Where an attack begins."""

    uniform = "uniform"
    gaussian = "gaussian"
    sign = "sign"
    none = "none"


class Target(str, Enum):
    """Which class an attack steps away from, or towards."""

    label = "label"
    predicted = "predicted"
    least_likely = "least-likely"


class Mode(str, Enum):
    """The net's mode while it is attacked."""

    eval = "eval"
    train = "train"


def train(
    dataset: DatasetOption,
    out: Annotated[Path, typer.Option("--out", help="Folder for the classifier.")],
    arch: Annotated[str, typer.Option("--arch", help="Architecture; see the README for the list.")] = "small-cnn",
    objective: Annotated[
        str,
        typer.Option(
            help="standard, half-half, adversarial, trades, interpolated, ensemble-adversarial, alp, clp, worst-of-10, "
            "random-augmentation, self-training, rst, rst-at, rst-trades or robust-consistency."
        ),
    ] = "standard",
    weight: Annotated[
        list[str] | None, typer.Option("--weight", help="A weight of the objective: beta=6. Repeat it for several.")
    ] = None,
    attack: Annotated[
        Kind | None,
        typer.Option(help="What attacks [default: fgsm for ensemble-adversarial, else pgd]."),
    ] = None,
    norm: Annotated[Norm, typer.Option(help="Of the attack; normalized-l2 is relative to the image's length.")] = (
        Norm.linf
    ),
    eps: Annotated[str | None, typer.Option(help="Budget of the attack, such as 0.3 or 8/255.")] = None,
    steps: Annotated[int, typer.Option(help="Gradient steps of the attack; random draws of spatial.")] = 10,
    step_size: Annotated[str | None, typer.Option(help="Length of a step [default: 2.5 eps / steps].")] = None,
    start: Annotated[
        Start | None, typer.Option(help="Where the attack begins [default: gaussian for trades, else uniform].")
    ] = None,
    start_scale: Annotated[
        str | None, typer.Option(help="Size of the noise of the starts gaussian and sign (r-fgsm: eps / 6).")
    ] = None,
    target: Annotated[
        Target | None,
        typer.Option(
            help="Step away from the label or from the predicted class, or towards the least likely one [default: "
            "least-likely for alp, predicted for fgsm, r-fgsm and ensemble-adversarial, else label]."
        ),
    ] = None,
    source: Annotated[
        list[str] | None,
        typer.Option("--source", help="A static source of ensemble-adversarial: a trained folder. Repeat it."),
    ] = None,
    source_cache: Annotated[
        Path | None,
        typer.Option("--source-cache", help="Folder to keep what the static sources attack [default: do it anew]."),
    ] = None,
    attack_mode: Annotated[Mode, typer.Option(help="The net's mode while it is attacked.")] = Mode.eval,
    labels: Annotated[
        int | None,
        typer.Option(
            min=1, help="Keep the labels of so many images, drawn class by class with --seed; the pool is the rest."
        ),
    ] = None,
    unlabelled: Annotated[
        str | None, typer.Option("--unlabelled", help="Data set of unlabelled images. " + SPEC_HELP)
    ] = None,
    pseudo_labels: Annotated[
        Path | None, typer.Option("--pseudo-labels", help="Their labels: a file of nndefense pseudo-label.")
    ] = None,
    unlabelled_per_batch: Annotated[
        int | None, typer.Option(help="Unlabelled images a step [default: as many as labelled ones].")
    ] = None,
    epochs: Annotated[int | None, typer.Option(min=1, help="Passes over the data [default: by its size].")] = None,
    steps_per_epoch: Annotated[int | None, typer.Option(help="Steps an epoch [default: one pass].")] = None,
    batch_size: Annotated[int | None, typer.Option(min=1, help="Images per step [default: by its size].")] = None,
    lr: Annotated[float, typer.Option(help="Learning rate.")] = 2e-3,
    weight_decay: Annotated[float, typer.Option(help="Weight decay.")] = 0.0,
    optimizer: Annotated[str, typer.Option(help="adam, adamw or sgd.")] = "adam",
    momentum: Annotated[float, typer.Option(help="Momentum of sgd.")] = 0.9,
    nesterov: Annotated[bool, typer.Option(help="Nesterov's momentum for sgd.")] = True,
    schedule: Annotated[str, typer.Option(help="cosine, step, one-cycle or none.")] = "cosine",
    warmup: Annotated[float, typer.Option(help="Epochs in which the learning rate rises.")] = 0.0,
    milestones: Annotated[str | None, typer.Option(help="Epochs at which step lowers it, with commas.")] = None,
    gamma: Annotated[float, typer.Option(help="The factor of step.")] = 0.1,
    peak: Annotated[float, typer.Option(help="Where one-cycle is highest, as a share of the training.")] = 0.4,
    ema: Annotated[float | None, typer.Option(help="Decay of a moving average of the weights, such as 0.999.")] = None,
    clip_norm: Annotated[float | None, typer.Option(help="Shorten gradients to this length.")] = None,
    augment: Annotated[bool, typer.Option("--augment", help="Shift images at random.")] = False,
    flip: Annotated[bool, typer.Option("--flip", help="Mirror images at random.")] = False,
    precision: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "float32",
    channels_last: Annotated[bool, typer.Option("--channels-last", help="Channels innermost: faster on GPUs.")] = False,
    compile: Annotated[bool, typer.Option("--compile", help="Use torch.compile.")] = False,
    validation: Annotated[
        str | None, typer.Option(help="Data set to measure after each epoch; with an attack, also under attack.")
    ] = None,
    holdout: Annotated[
        int | None, typer.Option(min=1, help="Or hold so many images of --dataset out for that.")
    ] = None,
    check_steps: Annotated[
        int | None, typer.Option(min=1, help="Steps of the attack on them [default: as in training, at least 10].")
    ] = None,
    checks_per_epoch: Annotated[int, typer.Option(help="How often they are attacked.")] = 1,
    check_images: Annotated[int, typer.Option(help="How many of them are attacked at most.")] = 1000,
    keep_best: Annotated[
        bool, typer.Option("--keep-best", help="Keep the weights of the best check, not the last.")
    ] = False,
    patience: Annotated[int | None, typer.Option(help="End after so many epochs without a better check.")] = None,
    stop_on_collapse: Annotated[
        bool, typer.Option("--stop-on-collapse", help="End at catastrophic overfitting.")
    ] = False,
    checkpoint_steps: Annotated[int | None, typer.Option(help="Save also after so many steps.")] = None,
    checkpoint_seconds: Annotated[float, typer.Option(help="Save also after so many seconds; 0: only by epoch.")] = 300,
    tensorboard: Annotated[bool, typer.Option("--tensorboard", help="Curves in OUT/tensorboard.")] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with an unfinished training in --out.")] = False,
    overwrite: OverwriteOption = False,
    data_dir: DataDirOption = None,
    device: DeviceOption = Device.auto,
    seed: SeedOption = 0,
    json: JsonOption = False,
    quiet: QuietOption = False,
    debug: DebugOption = False,
) -> None:
    """Train a classifier, for standard or for robust accuracy; torchrun spreads it over several GPUs."""
    from nndefense.cli import training

    training.train(
        dataset,
        out,
        arch,
        objective=(objective, weight or []),
        attack=training.AttackChoice(
            kind=None if attack is None else attack.value,
            norm=norm.value,
            eps=None if eps is None else number("--eps", eps),
            steps=steps,
            step_size=None if step_size is None else number("--step-size", step_size),
            start=None if start is None else start.value,
            mode=attack_mode.value,
            check_steps=check_steps,
            start_scale=None if start_scale is None else number("--start-scale", start_scale),
            target=None if target is None else target.value,
            sources=source or (),
            source_cache=source_cache,
        ),
        data=training.DataChoice(
            labels=labels,
            unlabelled=unlabelled,
            pseudo_labels=pseudo_labels,
            validation=validation,
            holdout=holdout,
            data_dir=data_dir,
        ),
        as_json=json,
        options={
            "epochs": epochs,
            "steps_per_epoch": steps_per_epoch,
            "batch_size": batch_size,
            "unlabelled_per_batch": unlabelled_per_batch,
            "lr": lr,
            "weight_decay": weight_decay,
            "optimizer": optimizer,
            "momentum": momentum,
            "nesterov": nesterov,
            "schedule": schedule,
            "warmup": warmup,
            "milestones": () if milestones is None else numbers(milestones),
            "gamma": gamma,
            "peak": peak,
            "ema": ema,
            "clip_norm": clip_norm,
            "augment": augment,
            "flip": flip,
            "precision": precision,
            "channels_last": channels_last,
            "compile": compile,
            "checks_per_epoch": checks_per_epoch,
            "check_images": check_images,
            "keep_best": keep_best,
            "patience": patience,
            "stop_on_collapse": stop_on_collapse,
            "checkpoint_steps": checkpoint_steps,
            "checkpoint_seconds": checkpoint_seconds or None,
            "tensorboard": tensorboard,
            "resume": resume,
            "overwrite": overwrite,
            "device": device.value,
            "seed": seed,
            "progress": not quiet,
        },
    )
