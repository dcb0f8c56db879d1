"""The options that several subcommands share, and how their text is read; nothing heavy is imported here."""

from __future__ import annotations

import math
import shlex
import sys
from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from nndefense.errors import InputError


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
    """Which attack on a classifier."""

    pgd = "pgd"
    fgsm = "fgsm"
    apgd = "apgd"
    apgd_t = "apgd-t"
    autoattack = "autoattack"
    square = "square"
    fab = "fab"
    cw = "cw"
    deepfool = "deepfool"


class Weighting(str, Enum):
    """How neighbours are weighted."""

    uniform = "uniform"
    cbw_e = "cbw-e"
    cbw_d = "cbw-d"


SPEC_HELP = (
    "digits, mnist, fashion-mnist, cifar10, imagefolder:PATH, images:PATH, files:LIST, hdf5:PATH, webdataset:PATH, "
    "parquet:PATH or torchvision:NAME:PATH, and a PATH may be a URL; a split and a slice may follow: mnist:test[:1000]."
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
StepsOption = Annotated[int, typer.Option("--steps", min=1, help="Gradient steps (queries of square).")]
RestartsOption = Annotated[int, typer.Option("--restarts", min=1, help="Random starts; the worst counts.")]
AdaptiveOption = Annotated[
    bool, typer.Option("--adaptive/--no-adaptive", help="Also attack the retrieval itself, with full knowledge of it.")
]
AdaptiveStepsOption = Annotated[int, typer.Option("--adaptive-steps", min=1, help="Steps of each adaptive attack.")]
AuditOption = Annotated[bool, typer.Option("--audit/--no-audit", help="Also make the audit's own runs.")]
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


def number(option: str, text: str) -> float:
    """Read one number."""
    found = numbers(text)
    if len(found) != 1:
        raise InputError(f"{option} is {text}, but this takes one budget: give one number")
    return found[0]


def words(text: str | None) -> list[str] | None:
    """Read ``a,b`` as words."""
    return [word.strip() for word in text.split(",") if word.strip()] if text else None


def shape(text: str | None) -> tuple[int, int, int] | None:
    """Read ``3,224,224`` as a shape."""
    if text is None:
        return None
    sides = numbers(text.replace("x", ","), whole=True)
    if len(sides) != 3:
        raise InputError(f"--input-shape is {text}, but must be channels, height and width, such as 3,224,224")
    return int(sides[0]), int(sides[1]), int(sides[2])


def command_line() -> str:
    """The command line as it was given, for the record."""
    return " ".join(["nndefense", *(shlex.quote(word) for word in sys.argv[1:])])
