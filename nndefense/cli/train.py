"""``nndefense train``: the data, the objective and the attack together, trained, and how good the net is."""

from __future__ import annotations

import shlex
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from nndefense.attacks import registry
from nndefense.cli.declare import Commas, OneOf
from nndefense.cli.options import SPEC_HELP, Common, DatasetOption, OverwriteOption, SizeOption, number, numbers, size
from nndefense.errors import InputError

if TYPE_CHECKING:
    from nndefense.datasets import ImageDataset
    from nndefense.training import EnsembleAttack, InnerAttack
    from nndefense.training.batch import BatchAttack

ENSEMBLE = "ensemble-adversarial"


@dataclass(frozen=True, kw_only=True)
class LoopOptions:
    """Settings of every training, by the names that :func:`nndefense.training.train_classifier` has for them."""

    epochs: Annotated[int | None, typer.Option(min=1, help="Passes over the data [default: by its size].")] = None
    batch_size: Annotated[int | None, typer.Option(min=1, help="Images per step [default: by its size].")] = None
    lr: Annotated[float, typer.Option(help="Learning rate.")] = 2e-3
    weight_decay: Annotated[float, typer.Option(help="Weight decay.")] = 0.0
    optimizer: Annotated[str, typer.Option(help="adam, adamw or sgd.")] = "adam"
    schedule: Annotated[str, typer.Option(help="cosine, step, one-cycle or none.")] = "cosine"
    augment: Annotated[bool, typer.Option("--augment", help="Shift images at random.")] = False
    flip: Annotated[bool, typer.Option("--flip", help="Mirror images at random.")] = False
    precision: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "float32"
    checkpoint_seconds: Annotated[float, typer.Option(help="Save also after so many seconds; 0: only by epoch.")] = 300
    tensorboard: Annotated[bool, typer.Option("--tensorboard", help="Curves in tensorboard, beside the net.")] = False
    resume: Annotated[bool, typer.Option("--resume", help="Go on with an unfinished training in --out.")] = False
    overwrite: OverwriteOption = False

    def settings(self, common: Common) -> dict[str, Any]:
        """Arguments of the training."""
        return vars(self) | {
            "checkpoint_seconds": self.checkpoint_seconds or None,
            "device": common.device,
            "seed": common.seed,
            "progress": common.progress,
        }


@dataclass(frozen=True, kw_only=True)
class TrainOptions(LoopOptions):
    """Further settings of the training of a classifier."""

    steps_per_epoch: Annotated[int | None, typer.Option(help="Steps an epoch [default: one pass].")] = None
    unlabelled_per_batch: Annotated[
        int | None, typer.Option(help="Unlabelled images a step [default: as many as labelled ones].")
    ] = None
    refresh_steps: Annotated[
        int | None, typer.Option(help="Of retrieval: compute rows anew each so many steps [default: each epoch].")
    ] = None
    momentum: Annotated[float, typer.Option(help="Momentum of sgd.")] = 0.9
    nesterov: Annotated[bool, typer.Option(help="Nesterov's momentum for sgd.")] = True
    warmup: Annotated[float, typer.Option(help="Epochs in which the learning rate rises.")] = 0.0
    milestones: Annotated[str | None, Commas("Epochs at which step lowers it, with commas.")] = None
    gamma: Annotated[float, typer.Option(help="The factor of step.")] = 0.1
    peak: Annotated[float, typer.Option(help="Where one-cycle is highest, as a share of the training.")] = 0.4
    ema: Annotated[float | None, typer.Option(help="Decay of a moving average of the weights, such as 0.999.")] = None
    clip_norm: Annotated[float | None, typer.Option(help="Shorten gradients to this length.")] = None
    channels_last: Annotated[bool, typer.Option("--channels-last", help="Channels innermost: faster on GPUs.")] = False
    compile: Annotated[bool, typer.Option("--compile", help="Use torch.compile.")] = False
    checks_per_epoch: Annotated[int, typer.Option(help="How often the validation set is attacked.")] = 1
    check_images: Annotated[int, typer.Option(help="How many of its images are attacked at most.")] = 1000
    keep_best: Annotated[
        bool, typer.Option("--keep-best", help="Keep the weights of the best check, not the last.")
    ] = False
    patience: Annotated[int | None, typer.Option(help="End after so many epochs without a better check.")] = None
    stop_on_collapse: Annotated[bool, typer.Option("--stop-on-collapse", help="End at catastrophic overfitting.")] = (
        False
    )
    checkpoint_steps: Annotated[int | None, typer.Option(help="Save also after so many steps.")] = None

    def settings(self, common: Common) -> dict[str, Any]:
        """Arguments of the training."""
        milestones = () if self.milestones is None else numbers("--milestones", self.milestones)
        return super().settings(common) | {"milestones": milestones}


@dataclass(frozen=True, kw_only=True)
class InnerAttackOptions:
    """The attack inside a step; what is not said is as the objective's paper has it."""

    attack: Annotated[
        str | None,
        OneOf(
            "What attacks [default: fgsm for ensemble-adversarial, else pgd].",
            ("pgd", "single-step", "fgsm", "r-fgsm", "spatial"),
        ),
    ] = None
    norm: Annotated[str, OneOf("Of the attack; normalized-l2 is relative to the image's length.", registry.NORMS)] = (
        "linf"
    )
    eps: Annotated[str | None, typer.Option(help="Budget of the attack, such as 0.3 or 8/255.")] = None
    steps: Annotated[int, typer.Option(help="Gradient steps of the attack; random draws of spatial.")] = 10
    step_size: Annotated[str | None, typer.Option(help="Length of a step [default: 2.5 eps / steps].")] = None
    start: Annotated[
        str | None,
        OneOf(
            "Where the attack begins [default: gaussian for trades, else uniform].",
            ("uniform", "gaussian", "sign", "none"),
        ),
    ] = None
    start_scale: Annotated[
        str | None, typer.Option(help="Size of the noise of the starts gaussian and sign (r-fgsm: eps / 6).")
    ] = None
    target: Annotated[
        str | None,
        OneOf(
            "Step away from the label or from the predicted class, or towards the least likely one [default: "
            "least-likely for alp, predicted for fgsm, r-fgsm and ensemble-adversarial, else label].",
            ("label", "predicted", "least-likely"),
        ),
    ] = None
    source: Annotated[
        list[str] | None,
        typer.Option(help="A static source of ensemble-adversarial: a trained folder. Repeat it."),
    ] = None
    source_cache: Annotated[
        Path | None,
        typer.Option(help="Folder to keep what the static sources attack [default: do it anew]."),
    ] = None
    attack_mode: Annotated[str, OneOf("The net's mode while it is attacked.", ("eval", "train"))] = "eval"
    check_steps: Annotated[
        int | None,
        typer.Option(min=1, help="Steps of the attack on the validation set [default: as in training, at least 10]."),
    ] = None

    def made(self, objective: str, data_dir: Path | None = None) -> BatchAttack | None:
        """The attack of the training; None where no budget was given to an objective that needs none."""
        from nndefense.attacks import SpatialAttack
        from nndefense.training import OBJECTIVES

        said: dict[str, Any] = {
            name: _number(name, getattr(self, name)) for name in ("eps", "step_size", "start_scale")
        }
        if objective == ENSEMBLE:
            return self._ensemble(said, data_dir)
        if self.source or self.source_cache is not None:
            given = "--source" if self.source else "--source-cache"
            raise InputError(f"static sources attack for the objective {ENSEMBLE} alone: leave {given} out")
        if self.attack == "spatial":
            return SpatialAttack(draws=self.steps, mode=self.attack_mode)
        if said["eps"] is None:
            if objective in OBJECTIVES and not OBJECTIVES[objective].attack:
                return None
            raise InputError(f"the objective {objective} attacks its images: give --eps, such as 0.3 or 8/255")
        return self._steps(objective, **said)

    def _ensemble(self, said: dict[str, Any], data_dir: Path | None) -> EnsembleAttack:
        from nndefense.models import load_classifier
        from nndefense.training import EnsembleAttack

        if not self.source:
            raise InputError(
                f"the objective {ENSEMBLE} attacks by static sources too: name trained classifiers by --source, once "
                "for each"
            )
        if said["eps"] is None or self.attack == "spatial":
            raise InputError(f"the objective {ENSEMBLE} attacks by gradient steps: give --eps, such as 0.3 or 8/255")
        step = self._steps(ENSEMBLE, **said)
        return EnsembleAttack(
            [load_classifier(source, data_dir=data_dir) for source in self.source], step, cache=self.source_cache
        )

    def _steps(self, objective: str, *, eps: float, step_size: float | None, start_scale: float | None) -> InnerAttack:
        """An attack by gradient steps, with whatever was said in the place of its own settings."""
        from nndefense.training import InnerAttack

        kind = self.attack or ("fgsm" if objective == ENSEMBLE else "pgd")
        if kind == "single-step":
            attack = InnerAttack.single_step(eps, self.norm, self.attack_mode)
        elif kind == "fgsm":
            attack = InnerAttack.fgsm(eps, self.norm, self.attack_mode)
        elif kind == "r-fgsm":
            if self.norm != "linf":
                raise InputError(f"R+FGSM is an attack in linf, not in {self.norm}: choose another --attack")
            attack = InnerAttack.r_fgsm(eps, start_scale, self.attack_mode)
        else:
            start = "gaussian" if "trades" in objective else "uniform"
            attack = InnerAttack(eps=eps, norm=self.norm, steps=self.steps, start=start, mode=self.attack_mode)
        if objective == "alp":
            attack = replace(attack, target="least-likely")
        elif objective == ENSEMBLE and attack.target == "label":
            attack = replace(attack, target="predicted")
        said: dict[str, Any] = {
            "step_size": step_size,
            "start": self.start,
            "start_scale": start_scale,
            "target": self.target,
        }
        return replace(attack, **{name: value for name, value in said.items() if value is not None})

    def checking(self, attack: BatchAttack | None) -> BatchAttack | None:
        """The attack on the validation set; None for the training's own choice."""
        from nndefense.training import EnsembleAttack, InnerAttack

        if self.check_steps is None:
            return None
        if isinstance(attack, EnsembleAttack):
            attack = attack.step
        if not isinstance(attack, InnerAttack):
            raise InputError("--check-steps is the length of an attack by gradient steps: leave it out, or give --eps")
        return InnerAttack(eps=attack.eps, norm=attack.norm, steps=self.check_steps)


@dataclass(frozen=True, kw_only=True)
class DataOptions:
    """What is trained on: the size of the images, and those beside the training set."""

    size: SizeOption = None
    labels: Annotated[
        int | None,
        typer.Option(
            min=1, help="Keep the labels of so many images, drawn class by class with --seed; the pool is the rest."
        ),
    ] = None
    unlabelled: Annotated[str | None, typer.Option(help="Data set of unlabelled images. " + SPEC_HELP)] = None
    pseudo_labels: Annotated[Path | None, typer.Option(help="Their labels: a file of nndefense pseudo-label.")] = None
    validation: Annotated[
        str | None, typer.Option(help="Data set to measure after each epoch; with an attack, also under attack.")
    ] = None
    holdout: Annotated[int | None, typer.Option(min=1, help="Or hold so many images of --dataset out for that.")] = None

    def opened(
        self, spec: str, arch: str, common: Common
    ) -> tuple[ImageDataset, ImageDataset | None, ImageDataset | None]:
        """The labelled set, the pool and the validation set."""
        from nndefense.datasets import holdout
        from nndefense.datasets.spec import VALIDATION, measured_spec
        from nndefense.pipeline import open_datasets, training_shape
        from nndefense.training.pools import complement
        from nndefense.training.validation import check_labels

        shape = training_shape([spec], arch, size(self.size), data_dir=common.data_dir, say=common.say)
        images, pool = open_datasets([spec], data_dir=common.data_dir, like=shape), None
        check_labels(images)
        if self.labels is not None:
            images, pool = complement(images, self.labels, common.seed)
        if self.unlabelled is not None:
            pool = open_datasets([self.unlabelled], data_dir=common.data_dir, like=shape)
        unlabelled = self._labelled(pool, images)
        if self.holdout is None:
            if self.validation is None:
                return images, unlabelled, None
            spec = measured_spec(self.validation, data_dir=common.data_dir, among=(*VALIDATION, "test"))
            return images, unlabelled, open_datasets([spec], data_dir=common.data_dir, like=shape)
        if self.validation is not None:
            raise InputError("the validation set is either named or held out: give --validation or --holdout, not both")
        kept, out = holdout(images, self.holdout, common.seed)
        return images.subset(kept), unlabelled, images.subset(out)

    def _labelled(self, pool: ImageDataset | None, images: ImageDataset) -> ImageDataset | None:
        """The pool under its pseudo-labels."""
        from nndefense.training.pseudo_labels import PseudoLabels

        if self.pseudo_labels is None:
            if self.unlabelled is not None:
                raise InputError(
                    f"{self.unlabelled} has no labels to learn from: write some with nndefense pseudo-label, and give "
                    "--pseudo-labels"
                )
            # Images that lost their labels are simply left out.
            return None
        if pool is None:
            raise InputError("--pseudo-labels are those of a pool: name it with --unlabelled, or give --labels")
        return PseudoLabels.open(self.pseudo_labels).dataset(pool, images)


def train(
    *,
    dataset: DatasetOption,
    out: Annotated[Path, typer.Option(help="Folder for the classifier.")],
    arch: Annotated[str, typer.Option(help="Architecture; docs/what-is-in-it.md has the list.")] = "small-cnn",
    objective: Annotated[
        str,
        typer.Option(
            help="standard, half-half, adversarial, trades, interpolated, ensemble-adversarial, alp, clp, worst-of-10, "
            "random-augmentation, noise-augmentation, self-training, rst, rst-at, rst-trades, robust-consistency, "
            "retrieval, retrieval-trades or retrieval-standard."
        ),
    ] = "standard",
    weight: Annotated[
        list[str] | None, typer.Option(help="A weight of the objective: beta=6. Repeat it for several.")
    ] = None,
    attack: InnerAttackOptions,
    data: DataOptions,
    loop: TrainOptions,
    common: Common,
) -> None:
    """Train a classifier, for standard or for robust accuracy; torchrun spreads it over several GPUs."""
    from nndefense.models import build_classifier
    from nndefense.training import accuracy, make_objective, train_classifier
    from nndefense.training.launcher import leads

    settings = loop.settings(common)
    loss = make_objective(objective, **dict(map(_weight, weight or [])))
    inner = attack.made(objective, common.data_dir)
    images, unlabelled, held = data.opened(dataset, arch, common)
    net = build_classifier(arch, input_shape=images.shape, classes=images.classes, seed=common.seed)
    classifier = train_classifier(
        net,
        images,
        objective=loss,
        attack=inner,
        unlabelled=unlabelled,
        validation=held,
        validation_attack=attack.checking(inner),
        out=out,
        **settings,
    )
    if not leads():
        return
    rows = classifier.info["history"]
    robust = next((row["robust_accuracy"] for row in _last_checks(rows, classifier.info["best"])), None)
    collapsed = any(row.get("catastrophic_overfitting") for row in rows)
    found = {
        "classifier": str(out),
        "arch": arch,
        "objective": classifier.info["objective"],
        "fingerprint": classifier.fingerprint,
        "epochs": len(rows),
        "training_accuracy": accuracy(classifier, images),
        "validation_accuracy": accuracy(classifier, held) if held else None,
        "robust_validation_accuracy": robust if held else None,
        "catastrophic_overfitting": collapsed,
        "best": classifier.info["best"],
    }
    text = f"{out}: {arch}, training accuracy {found['training_accuracy']:.4f}"
    if held is not None:
        text += f", accuracy on {held.name} {found['validation_accuracy']:.4f}"
        if robust is not None:
            text += f", {robust:.4f} under attack (on {min(len(held), loop.check_images)} of them)"
    if collapsed:
        text += "; catastrophic overfitting was found"
    if "retrieval" in classifier.info:
        text += _next_commands(dataset, out, attack)
    common.show(found, text)


def _next_commands(dataset: str, net: Path, attack: InnerAttackOptions) -> str:
    """What makes a defence of a net to retrieve by, and what attacks it."""
    database = shlex.quote(str(net.with_name(f"{net.name}-database")))
    images, folder = shlex.quote(dataset), shlex.quote(str(net))
    budget = f" --norm {attack.norm}" + (f" --eps {attack.eps}" if attack.eps else "")
    return (
        "\nthe defence is a database of its training images, which takes the kernel that was learned:\n"
        f"  nndefense index build --dataset {images} --classifier {folder} --layer embedding --pooling flatten "
        f"--out {database}\n"
        f"  nndefense evaluate --database {database} --dataset TEST{budget}"
    )


def _number(name: str, text: str | None) -> float | None:
    return None if text is None else number(f"--{name.replace('_', '-')}", text)


def _last_checks(rows: list[dict[str, Any]], best: dict[str, Any] | None) -> list[dict[str, Any]]:
    """The check that the final weights were kept for, or the last one; none where there was none."""
    if best is not None:
        rows = rows[: best["epoch"]]
    checks = rows[-1].get("checks", [])
    kept = [check for check in checks if best is not None and check["step"] == best["step"]]
    return kept or checks[-1:]


def _weight(word: str) -> tuple[str, float | str]:
    """Read ``beta=6`` or ``mix=loss``."""
    name, sign, value = word.partition("=")
    if not sign:
        raise InputError(f"--weight is {word!r}, but must be a name and a value such as beta=6")
    try:
        return name.strip().replace("-", "_"), float(value)
    except ValueError:
        return name.strip().replace("-", "_"), value.strip()
