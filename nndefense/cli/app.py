"""Options of every subcommand; the work is imported when it is asked for, so that help is instant."""

from __future__ import annotations

import math
import shlex
import sys
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer

from nndefense.cli.theory_app import theory_app
from nndefense.errors import InputError

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="The nearest-neighbour defence against adversarial images: build, calibrate, attack, defend, report.",
    epilog="Exit codes: 0 done, 1 other error, 2 wrong input, 3 data, 4 classifier, 5 database, 130 interrupted.",
)
index_app = typer.Typer(no_args_is_help=True, help="Build, describe and verify an image database.")
app.add_typer(index_app, name="index")
app.add_typer(theory_app, name="theory")


class Device(str, Enum):
    """Where to compute."""

    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"


class Norm(str, Enum):
    """How an attack's budget is measured."""

    linf = "linf"
    l2 = "l2"
    normalized_l2 = "normalized-l2"


class AttackName(str, Enum):
    """Which attack."""

    pgd = "pgd"
    fgsm = "fgsm"


class Weighting(str, Enum):
    """How neighbours are weighted."""

    uniform = "uniform"
    cbw_e = "cbw-e"
    cbw_d = "cbw-d"


SPEC_HELP = (
    "digits, mnist, fashion-mnist, cifar10, imagefolder:PATH or hdf5:PATH; a split and a slice may follow: "
    "mnist:test[:1000]."
)
ClassifierOption = Annotated[
    str,
    typer.Option(
        "--classifier", help="A trained folder, torchvision:NAME:WEIGHTS, or python:FILE_OR_MODULE:FACTORY (it is run)."
    ),
]
ClassesOption = Annotated[
    Path | None, typer.Option("--classes", help="Class names of a classifier of your own: a line each, or a CSV file.")
]
ShapeOption = Annotated[
    str | None, typer.Option("--input-shape", metavar="C,H,W", help="Image shape of a classifier of your own.")
]
DatabaseOption = Annotated[Path, typer.Option("--database", help="Folder of the image database.")]
DatasetOption = Annotated[str, typer.Option("--dataset", help=SPEC_HELP)]
DatasetsOption = Annotated[list[str], typer.Option("--dataset", help=SPEC_HELP + " Repeat it to join several.")]
DataDirOption = Annotated[
    Path | None, typer.Option("--data-dir", help="Folder of the data sets [default: $NNDEFENSE_DATA, else data].")
]
DeviceOption = Annotated[Device, typer.Option("--device", help="Where to compute.")]
SeedOption = Annotated[int, typer.Option("--seed", min=0, max=2**63 - 1, help="Seed of all random draws.")]
OverwriteOption = Annotated[bool, typer.Option("--overwrite", help="Replace what is there.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON.")]
BatchOption = Annotated[int, typer.Option("--batch-size", min=1, help="Images per forward pass.")]
QuietOption = Annotated[bool, typer.Option("--quiet", help="No progress bars.")]
DebugOption = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]
NormOption = Annotated[Norm, typer.Option("--norm", help="normalized-l2: length of the change / length of the image.")]
AttackOption = Annotated[AttackName, typer.Option("--attack", help="The attack.")]
StepsOption = Annotated[int, typer.Option("--steps", min=1, help="Gradient steps of PGD.")]
RestartsOption = Annotated[int, typer.Option("--restarts", min=1, help="Random starts of PGD; the worst counts.")]
KOption = Annotated[int | None, typer.Option("--k", min=1, help="Neighbours [default: as calibrated, else 50].")]
WeightingOption = Annotated[
    Weighting | None, typer.Option("--weighting", help="Weighting [default: as calibrated, else cbw-d].")
]
LimitOption = Annotated[int | None, typer.Option("--limit", min=1, help="Use so many images, drawn at random.")]
LayersOption = Annotated[
    str | None, typer.Option("--layers", help="Layers to try, with commas [default: six, spread over the net].")
]
PoolingsOption = Annotated[
    str, typer.Option("--poolings", help="Poolings to try, with commas: avg, max, rmac, gridG, flatten.")
]
KsOption = Annotated[str, typer.Option("--ks", help="Numbers of neighbours to try, with commas.")]
PcaOption = Annotated[int, typer.Option("--pca", min=0, help="Dimensions kept by PCA; 0 for no PCA.")]
LossOption = Annotated[
    float, typer.Option("--max-clean-loss", min=0, max=1, help="Clean accuracy that may be lost, as a fraction.")
]
RowsOption = Annotated[
    int, typer.Option("--candidate-rows", min=1, help="Database images, drawn at random, to compare settings on.")
]
EpsOption = Annotated[str, typer.Option("--eps", help="Budgets, with commas, in units of the norm; 8/255 is fine.")]
HeadlineOption = Annotated[
    str | None, typer.Option("--headline", help="The budget of the table [default: calibrated, else the largest].")
]
SurrogateOption = Annotated[
    str | None, typer.Option("--surrogate", help="Classifier whose gradients the black-box attacker follows.")
]
EPS_GRID = "0.05,0.1,0.15,0.2,0.25,0.3"
POOLINGS = "avg,rmac,grid4,grid8"
KS = "1,3,5,10,20,50"


@app.callback()
def _main(debug: DebugOption = False) -> None:
    """--debug is read where errors are caught; here it is only declared."""


@app.command()
def train(
    dataset: DatasetOption,
    out: Annotated[Path, typer.Option("--out", help="Folder for the classifier.")],
    arch: Annotated[str, typer.Option("--arch", help="Architecture; see the README for the list.")] = "small-cnn",
    epochs: Annotated[int | None, typer.Option(min=1, help="Passes over the data [default: by its size].")] = None,
    batch_size: Annotated[int | None, typer.Option(min=1, help="Images per step [default: by its size].")] = None,
    lr: Annotated[float, typer.Option(help="Learning rate.")] = 2e-3,
    weight_decay: Annotated[float, typer.Option(help="Weight decay.")] = 0.0,
    optimizer: Annotated[str, typer.Option(help="adam, adamw or sgd.")] = "adam",
    schedule: Annotated[str, typer.Option(help="cosine or none.")] = "cosine",
    augment: Annotated[bool, typer.Option("--augment", help="Shift images at random.")] = False,
    flip: Annotated[bool, typer.Option("--flip", help="Mirror images at random.")] = False,
    validation: Annotated[str | None, typer.Option(help="Data set to measure after each epoch.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with an unfinished training in --out.")] = False,
    overwrite: OverwriteOption = False,
    data_dir: DataDirOption = None,
    device: DeviceOption = Device.auto,
    seed: SeedOption = 0,
    json: JsonOption = False,
    quiet: QuietOption = False,
    debug: DebugOption = False,
) -> None:
    """Train a classifier."""
    from nndefense.cli import commands

    commands.train(
        dataset,
        out,
        arch,
        data_dir=data_dir,
        validation=validation,
        as_json=json,
        options={
            "epochs": epochs,
            "batch_size": batch_size,
            "lr": lr,
            "weight_decay": weight_decay,
            "optimizer": optimizer,
            "schedule": schedule,
            "augment": augment,
            "flip": flip,
            "resume": resume,
            "overwrite": overwrite,
            "device": device.value,
            "seed": seed,
            "progress": not quiet,
        },
    )


@index_app.command("build")
def index_build(
    dataset: DatasetsOption,
    classifier: ClassifierOption,
    layer: Annotated[str, typer.Option("--layer", help="Module of the net, such as layer3.5, or conv_5_1.")],
    out: Annotated[Path, typer.Option("--out", help="Folder for the database.")],
    pooling: Annotated[str, typer.Option("--pooling", help="avg, max, rmac, gridG or flatten.")] = "avg",
    pca: PcaOption = 256,
    whiten: Annotated[bool, typer.Option("--whiten", help="Scale PCA coordinates to variance 1.")] = False,
    normalize: Annotated[bool, typer.Option("--normalize", help="Scale vectors to length 1.")] = False,
    index: Annotated[str, typer.Option("--index", help="FAISS factory string; Flat is exact.")] = "Flat",
    pca_sample: Annotated[int, typer.Option(min=2, help="Images that PCA is fitted on.")] = 4096,
    overwrite: OverwriteOption = False,
    limit: LimitOption = None,
    batch_size: BatchOption = 128,
    classes: ClassesOption = None,
    input_shape: ShapeOption = None,
    data_dir: DataDirOption = None,
    device: DeviceOption = Device.auto,
    seed: SeedOption = 0,
    json: JsonOption = False,
    quiet: QuietOption = False,
    debug: DebugOption = False,
) -> None:
    """Build a database of images: features, posteriors, weights and the index."""
    from nndefense.cli import commands
    from nndefense.features import FeatureSpec

    commands.index_build(
        dataset,
        classifier,
        FeatureSpec(layer, pooling, pca, whiten, normalize),
        out,
        classes=classes,
        input_shape=_shape(input_shape),
        data_dir=data_dir,
        device=device.value,
        limit=limit,
        as_json=json,
        options={
            "index": index,
            "pca_sample": pca_sample,
            "overwrite": overwrite,
            "batch_size": batch_size,
            "seed": seed,
            "progress": not quiet,
        },
    )


@index_app.command("info")
def index_info(
    database: Annotated[Path, typer.Argument(help="Folder of the database.")],
    json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Describe a database."""
    from nndefense.cli import commands

    commands.index_info(database, as_json=json)


@index_app.command("verify")
def index_verify(
    database: Annotated[Path, typer.Argument(help="Folder of the database.")],
    json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Check every file's sha256, the row counts, that ids are unique and that the index holds every row."""
    from nndefense.cli import commands

    commands.index_verify(database, as_json=json)


@app.command()
def calibrate(
    dataset: DatasetsOption,
    classifier: ClassifierOption,
    out: Annotated[Path, typer.Option("--out", help="Folder for the database with the chosen setting.")],
    calibration: Annotated[
        str | None, typer.Option("--calibration", help="Data set to calibrate on [default: hold images out].")
    ] = None,
    holdout: Annotated[int, typer.Option(min=1, help="Images to hold out of the (first) data set.")] = 300,
    norm: NormOption = Norm.normalized_l2,
    eps: Annotated[str, typer.Option("--eps", help="Budget of the attack to calibrate for.")] = "0.2",
    attack: AttackOption = AttackName.pgd,
    steps: StepsOption = 20,
    restarts: RestartsOption = 1,
    layers: LayersOption = None,
    poolings: PoolingsOption = POOLINGS,
    ks: KsOption = KS,
    pca: PcaOption = 256,
    max_clean_loss: LossOption = 0.02,
    candidate_rows: RowsOption = 20_000,
    overwrite: OverwriteOption = False,
    batch_size: BatchOption = 128,
    classes: ClassesOption = None,
    input_shape: ShapeOption = None,
    data_dir: DataDirOption = None,
    device: DeviceOption = Device.auto,
    seed: SeedOption = 0,
    json: JsonOption = False,
    quiet: QuietOption = False,
    debug: DebugOption = False,
) -> None:
    """Choose layer, pooling, K and weighting on held-out images, and build the database with them."""
    from nndefense.cli import commands
    from nndefense.evaluation import AttackSettings

    commands.calibrate(
        dataset,
        classifier,
        out,
        AttackSettings(attack.value, norm.value, (_number("--eps", eps),), steps, restarts),
        calibration=calibration,
        n_holdout=holdout,
        layers=_words(layers),
        poolings=_words(poolings) or [],
        ks=[int(k) for k in numbers(ks, whole=True)],
        pca=pca,
        max_clean_loss=max_clean_loss,
        candidate_rows=candidate_rows,
        overwrite=overwrite,
        batch_size=batch_size,
        classes=classes,
        input_shape=_shape(input_shape),
        data_dir=data_dir,
        device=device.value,
        seed=seed,
        as_json=json,
        progress=not quiet,
    )


@app.command()
def attack(
    dataset: DatasetOption,
    classifier: ClassifierOption,
    out: Annotated[Path, typer.Option("--out", help="HDF5 file for the attacked images; opens as hdf5:FILE.")],
    attack: AttackOption = AttackName.pgd,
    norm: NormOption = Norm.linf,
    eps: Annotated[str, typer.Option("--eps", help="Budget in units of the norm; 8/255 is fine.")] = "8/255",
    steps: StepsOption = 20,
    restarts: RestartsOption = 1,
    limit: LimitOption = None,
    overwrite: OverwriteOption = False,
    batch_size: BatchOption = 128,
    classes: ClassesOption = None,
    input_shape: ShapeOption = None,
    data_dir: DataDirOption = None,
    device: DeviceOption = Device.auto,
    seed: SeedOption = 0,
    json: JsonOption = False,
    quiet: QuietOption = False,
    debug: DebugOption = False,
) -> None:
    """Attack a classifier and keep the attacked images, unrounded."""
    from nndefense.cli import commands
    from nndefense.evaluation import AttackSettings

    commands.attack(
        dataset,
        classifier,
        out,
        AttackSettings(attack.value, norm.value, (_number("--eps", eps),), steps, restarts),
        limit=limit,
        overwrite=overwrite,
        batch_size=batch_size,
        classes=classes,
        input_shape=_shape(input_shape),
        data_dir=data_dir,
        device=device.value,
        seed=seed,
        as_json=json,
        progress=not quiet,
    )


@app.command()
def classify(
    images: Annotated[list[Path], typer.Argument(help="Image files.")],
    classifier: ClassifierOption,
    database: DatabaseOption,
    k: KOption = None,
    weighting: WeightingOption = None,
    top: Annotated[int, typer.Option(min=1, help="Classes and neighbours to show.")] = 5,
    convert: Annotated[bool, typer.Option("--convert", help="Turn grey images to colour, or colour to grey.")] = False,
    batch_size: BatchOption = 64,
    classes: ClassesOption = None,
    input_shape: ShapeOption = None,
    device: DeviceOption = Device.auto,
    json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Classify image files from their nearest neighbours, beside what the bare classifier says."""
    from nndefense.cli import commands

    commands.classify(
        images,
        classifier,
        database,
        k=k,
        weighting=weighting.value if weighting else None,
        top=top,
        convert=convert,
        batch_size=batch_size,
        classes=classes,
        input_shape=_shape(input_shape),
        device=device.value,
        as_json=json,
    )


@app.command()
def evaluate(
    dataset: DatasetOption,
    classifier: ClassifierOption,
    database: DatabaseOption,
    out: Annotated[Path, typer.Option("--out", help="Folder for results.json and report.html.")],
    surrogate: SurrogateOption = None,
    k: KOption = None,
    weighting: WeightingOption = None,
    attack: AttackOption = AttackName.pgd,
    norm: NormOption = Norm.normalized_l2,
    eps: EpsOption = EPS_GRID,
    headline: HeadlineOption = None,
    steps: StepsOption = 20,
    restarts: RestartsOption = 1,
    sizes: Annotated[bool, typer.Option("--sizes/--no-sizes", help="Also search smaller databases.")] = True,
    gallery: Annotated[int, typer.Option(min=0, help="Images in the report's gallery.")] = 10,
    limit: LimitOption = None,
    batch_size: BatchOption = 128,
    classes: ClassesOption = None,
    input_shape: ShapeOption = None,
    data_dir: DataDirOption = None,
    device: DeviceOption = Device.auto,
    seed: SeedOption = 0,
    json: JsonOption = False,
    quiet: QuietOption = False,
    debug: DebugOption = False,
) -> None:
    """Measure the classifier and the defence, clean and attacked, and write results and report."""
    from nndefense.cli import commands
    from nndefense.evaluation import AttackSettings

    commands.evaluate(
        dataset,
        classifier,
        database,
        out,
        AttackSettings(attack.value, norm.value, numbers(eps), steps, restarts),
        headline=_number("--headline", headline) if headline else None,
        surrogate=surrogate,
        k=k,
        weighting=weighting.value if weighting else None,
        sizes=sizes,
        gallery=gallery,
        limit=limit,
        batch_size=batch_size,
        classes=classes,
        input_shape=_shape(input_shape),
        data_dir=data_dir,
        device=device.value,
        seed=seed,
        as_json=json,
        progress=not quiet,
        command=_command(),
    )


@app.command()
def demo(
    dataset: Annotated[
        list[str] | None, typer.Option("--dataset", help=SPEC_HELP + " It fills the database [default: digits].")
    ] = None,
    test: Annotated[
        str | None, typer.Option("--test", help="Data set to report on [default: the first one's split test].")
    ] = None,
    calibration: Annotated[
        str | None, typer.Option("--calibration", help="Data set to calibrate on [default: hold images out].")
    ] = None,
    holdout: Annotated[int, typer.Option(min=1, help="Images to hold out of the first data set.")] = 300,
    out: Annotated[Path, typer.Option("--out", help="Folder for everything that is made.")] = Path("runs/demo"),
    classifier: Annotated[
        str | None, typer.Option("--classifier", help="A ready classifier [default: train one].")
    ] = None,
    surrogate: SurrogateOption = None,
    arch: Annotated[str, typer.Option(help="Architecture of the classifier that is trained.")] = "small-cnn",
    surrogate_arch: Annotated[str, typer.Option(help="Architecture of the surrogate.")] = "madry-mnist",
    epochs: Annotated[int | None, typer.Option(min=1, help="Training epochs [default: by the data's size].")] = None,
    attack: AttackOption = AttackName.pgd,
    norm: NormOption = Norm.normalized_l2,
    eps: EpsOption = EPS_GRID,
    headline: Annotated[str, typer.Option("--headline", help="The budget to calibrate for and to tabulate.")] = "0.2",
    steps: StepsOption = 20,
    restarts: RestartsOption = 1,
    layers: LayersOption = None,
    poolings: PoolingsOption = POOLINGS,
    ks: KsOption = KS,
    pca: PcaOption = 256,
    max_clean_loss: LossOption = 0.02,
    candidate_rows: RowsOption = 20_000,
    limit: LimitOption = 2000,
    gallery: Annotated[int, typer.Option(min=0, help="Images in the report's gallery.")] = 10,
    batch_size: BatchOption = 128,
    classes: ClassesOption = None,
    input_shape: ShapeOption = None,
    data_dir: DataDirOption = None,
    device: DeviceOption = Device.auto,
    seed: SeedOption = 0,
    json: JsonOption = False,
    quiet: QuietOption = False,
    debug: DebugOption = False,
) -> None:
    """Do it all: train, calibrate, build the database, attack, defend, and report."""
    from nndefense.cli import commands
    from nndefense.evaluation import AttackSettings

    sets = dataset or ["digits"]
    commands.demo(
        {
            "database_sets": sets,
            "test": test or commands.test_split(sets[0]),
            "out": out,
            "attack": AttackSettings(attack.value, norm.value, numbers(eps), steps, restarts),
            "headline_eps": _number("--headline", headline),
            "calibration": calibration,
            "holdout": holdout,
            "classifier": classifier,
            "surrogate": surrogate,
            "arch": arch,
            "surrogate_arch": surrogate_arch,
            "classes": classes,
            "input_shape": _shape(input_shape),
            "layers": _words(layers),
            "poolings": _words(poolings) or [],
            "ks": [int(k) for k in numbers(ks, whole=True)],
            "pca": pca,
            "max_clean_loss": max_clean_loss,
            "candidate_rows": candidate_rows,
            "epochs": epochs,
            "limit": limit,
            "batch_size": batch_size,
            "gallery": gallery,
            "data_dir": data_dir,
            "device": device.value,
            "seed": seed,
            "command": _command(),
            "progress": not quiet,
        },
        as_json=json,
    )


def numbers(text: str, *, whole: bool = False) -> tuple[float, ...]:
    """Read ``0.05, 8/255`` as numbers, for every command that takes several."""
    try:
        found = []
        for word in text.split(","):
            top, _, bottom = word.partition("/")
            found.append(float(top) / float(bottom or 1))
    except (ValueError, ZeroDivisionError):
        found = [math.nan]
    if not all(math.isfinite(number) for number in found):
        raise InputError(f"{text!r} is not a list of numbers such as 0.05,0.1 or 8/255")
    if whole and any(number != int(number) or number < 1 for number in found):
        raise InputError(f"{text!r} is not a list of whole numbers from 1 up, such as 1,5,50")
    return tuple(found)


def _number(option: str, text: str) -> float:
    """Read one number."""
    found = numbers(text)
    if len(found) != 1:
        raise InputError(f"{option} is {text}, but this takes one budget: give one number")
    return found[0]


def _words(text: str | None) -> list[str] | None:
    """Read ``a,b`` as words."""
    return [word.strip() for word in text.split(",") if word.strip()] if text else None


def _shape(text: str | None) -> tuple[int, int, int] | None:
    """Read ``3,224,224`` as a shape."""
    if text is None:
        return None
    sides = numbers(text.replace("x", ","), whole=True)
    if len(sides) != 3:
        raise InputError(f"--input-shape is {text}, but must be channels, height and width, such as 3,224,224")
    return int(sides[0]), int(sides[1]), int(sides[2])


def _command() -> str:
    """The command line as it was given, for the record."""
    return " ".join(["nndefense", *(shlex.quote(word) for word in sys.argv[1:])])


__all__: list[Any] = ["app"]
