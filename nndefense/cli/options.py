"""The options that several subcommands share, and how their text is read; nothing heavy is imported here."""

from __future__ import annotations

import math
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from nndefense.attacks import registry
from nndefense.cli.declare import Commas, OneOf, Only
from nndefense.cli.streams import json_of, visible
from nndefense.errors import InputError

if TYPE_CHECKING:
    from nndefense.evaluation import AttackSettings
    from nndefense.models import Classifier

SPEC_HELP = (
    "digits, mnist, fashion-mnist, cifar10, imagefolder:PATH, images:PATH, files:LIST, hdf5:PATH, webdataset:PATH, "
    "parquet:PATH, torchvision:NAME:PATH or hf:NAME, and a PATH may be a URL; a split and a slice may follow: "
    "mnist:test[:1000]."
)
DatasetOption = Annotated[str, typer.Option(help=SPEC_HELP)]
_MEASURED = SPEC_HELP + " Without a split, the test split is taken, else the validation split."
MeasuredOption = Annotated[str, typer.Option(help=_MEASURED)]
MaybeMeasuredOption = Annotated[str | None, typer.Option(help=_MEASURED)]
DatasetsOption = Annotated[list[str], typer.Option(help=SPEC_HELP + " Repeat it to join several.")]
DatabaseOption = Annotated[Path, typer.Option(help="Folder of the image database.")]
OverwriteOption = Annotated[bool, typer.Option("--overwrite", help="Replace what is there.")]
SizeOption = Annotated[
    str | None,
    typer.Option(
        metavar="SIDE|H,W",
        help="Bring all images to this size [default: their own where all have one, of at most 256 pixels a side, else "
        "the architecture's].",
    ),
]
BatchOption = Annotated[int, typer.Option(min=1, help="Images per forward pass.")]
LimitOption = Annotated[int | None, typer.Option(min=1, help="Use so many images, drawn at random.")]
NormOption = Annotated[str, OneOf("normalized-l2: length of the change / length of the image.", registry.NORMS)]
_OWN = "The last is your own f(model, x, y, eps=, norm=, generator=) -> images, which is run."
_LADDER = "Threat models that cannot use it run pgd instead; those from adaptive to pgd-fs need --database."
AttackOption = Annotated[str, OneOf(f"The attack. {_OWN}", lambda: registry.names("gray"), python=True)]
# The proof has an option of its own.
LadderAttackOption = Annotated[
    str,
    OneOf(
        f"The attack. {_LADDER} {_OWN}",
        lambda: [name for name in registry.names() if name not in registry.names("exact")],
        python=True,
    ),
]
StepsOption = Annotated[
    int | None, typer.Option(min=1, help="Gradient steps of each start [default: the attack's standard].")
]
QueriesOption = Annotated[
    int | None, typer.Option(min=1, help="Queries for each image, for square [default: its standard].")
]
RestartsOption = Annotated[int, typer.Option(min=1, help="Random starts, where the attack has any; the worst counts.")]
EpsOption = Annotated[str, Commas("Budgets, with commas, in units of the norm; 8/255 is fine.")]
ImagesOption = Annotated[
    list[str] | None,
    typer.Option(
        help="Images of the database's rows; repeat it to join several [default: those recorded there, where they lie "
        "in the folder of the data sets or of the database]. " + SPEC_HELP,
    ),
]
SigmaOption = Annotated[
    float | None, typer.Option(help="Standard deviation of the noise, in pixels of [0, 1], for methods that draw.")
]
PcaOption = Annotated[int, typer.Option(min=0, help="Dimensions kept by PCA; 0 for no PCA.")]
RayAddressOption = Annotated[
    str | None,
    typer.Option(metavar="HOST:PORT", help="With ray: the cluster to join [default: one on this machine is started]."),
]


@dataclass(frozen=True, kw_only=True)
class Common:
    """What nearly every command takes: where to find and to compute, and what to print."""

    data_dir: Annotated[
        Path | None, typer.Option(help="Folder of the data sets [default: $NNDEFENSE_DATA, else data].")
    ] = None
    device: Annotated[str, OneOf("Where to compute.", ("auto", "cpu", "cuda"))] = "auto"
    seed: Annotated[int, typer.Option(min=0, max=2**63 - 1, help="Seed of all random draws.")] = 0
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress, and no lines that tell how far the work is.")] = (
        False
    )
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False

    @property
    def progress(self) -> bool:
        """Whether progress is shown."""
        return not self.quiet

    def say(self, text: str) -> None:
        """Tell how far the work is."""
        if not self.quiet:
            print(visible(text), file=sys.stderr, flush=True)

    def show(self, value: Any, text: str) -> None:
        """Print the text for people, or the value as JSON."""
        print(json_of(value) if self.json else visible(text))


Printing = Annotated[Common, Only("json", "quiet", "debug")]


@dataclass(frozen=True, kw_only=True)
class AttackOptions:
    """An attack on a classifier, but for its budgets."""

    attack: AttackOption = "pgd"
    norm: NormOption = "normalized-l2"
    steps: StepsOption = None
    queries: QueriesOption = None
    restarts: RestartsOption = 1

    def settings(self, budgets: tuple[float, ...]) -> AttackSettings:
        """The attack with these budgets."""
        from nndefense.evaluation import AttackSettings

        return AttackSettings(self.attack, self.norm, budgets, self.steps, self.restarts, queries=self.queries)


@dataclass(frozen=True, kw_only=True)
class RuleOptions:
    """How the neighbours decide, where that is not as the database has it."""

    k: Annotated[int | None, typer.Option(min=1, help="Neighbours [default: as stored, else 50].")] = None
    weighting: Annotated[
        str | None, OneOf("Weighting [default: as stored, else cbw-d].", ("uniform", "cbw-e", "cbw-d"))
    ] = None
    votes: Annotated[
        str | None,
        OneOf("Stored posteriors or true labels vote [default: as stored, else posteriors].", ("posteriors", "labels")),
    ] = None
    temperature: Annotated[
        float | None,
        typer.Option(help="T of a kernel exp(-d^2/T) on the weights; inf: none [default: as stored, else none]."),
    ] = None
    alpha: Annotated[
        float | None,
        typer.Option(min=0, max=1, help="Share of the classifier's own posterior [default: as stored, else 0]."),
    ] = None

    def asked(self) -> dict[str, Any]:
        """What was given."""
        return {name: value for name, value in vars(self).items() if value is not None}


@dataclass(frozen=True, kw_only=True)
class OwnOptions:
    """What a classifier of the user's own may have to be told."""

    classes: Annotated[
        Path | None,
        typer.Option(help="Class names of a classifier of your own: a line each, or a CSV file."),
    ] = None
    input_shape: Annotated[
        str | None, typer.Option(metavar="C,H,W", help="Image shape of a classifier of your own.")
    ] = None

    @property
    def shape(self) -> tuple[int, int, int] | None:
        """The image shape: channels, height, width."""
        return shape(self.input_shape)


@dataclass(frozen=True, kw_only=True)
class ClassifierOptions(OwnOptions):
    """The classifier that a command works on."""

    classifier: Annotated[
        str,
        typer.Option(
            help="A trained folder, torchvision:NAME:WEIGHTS, timm:NAME[:pretrained], hf:MODEL, or "
            "python:FILE_OR_MODULE:FACTORY (it is run).",
        ),
    ]

    def open(self, common: Common, *, specs: Sequence[str] = (), database: Path | None = None) -> Classifier:
        """Load it; where it does not say its image shape, that is the one of the database or of the first data set."""
        from nndefense.pipeline import open_classifier

        return open_classifier(
            self.classifier,
            device=common.device,
            data_dir=common.data_dir,
            classes=self.classes,
            input_shape=self.shape,
            specs=specs,
            database=database,
            say=common.say,
        )


@dataclass(frozen=True, kw_only=True)
class DatabaseOptions(OwnOptions):
    """A finished database, and the classifier that it names or another copy of it."""

    database: DatabaseOption
    classifier: Annotated[
        str | None,
        typer.Option(help="As for the other commands [default: the one that the database names]."),
    ] = None

    def guard(self, common: Common) -> dict[str, Any]:
        """Arguments of :meth:`nndefense.guard.Guard.open`."""
        return {
            "database": self.database,
            "classifier": self.classifier,
            "device": common.device,
            "classes": self.classes,
            "input_shape": self.shape,
            "data_dir": common.data_dir,
        }


def numbers(option: str, text: str, *, whole: bool = False) -> tuple[float, ...]:
    """Read ``0.05, 8/255`` as numbers, for every command that takes several."""
    try:
        found = []
        for word in text.split(","):
            top, _, bottom = word.partition("/")
            found.append(float(top) / float(bottom or 1))
    except (ValueError, ZeroDivisionError):
        found = [math.nan]
    if not all(math.isfinite(number) for number in found):
        raise InputError(f"{option} is {text!r}, which is not a list of numbers such as 0.05,0.1 or 8/255")
    if whole and any(number != int(number) or number < 1 for number in found):
        raise InputError(f"{option} is {text!r}, which is not a list of whole numbers from 1 up, such as 1,5,50")
    return tuple(found)


def number(option: str, text: str) -> float:
    """Read one number."""
    found = numbers(option, text)
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
    sides = numbers("--input-shape", text.replace("x", ","), whole=True)
    if len(sides) != 3:
        raise InputError(f"--input-shape is {text}, but must be channels, height and width, such as 3,224,224")
    return int(sides[0]), int(sides[1]), int(sides[2])


def size(text: str | None) -> tuple[int, int] | None:
    """Read ``64`` or ``48,64`` as height and width."""
    if text is None:
        return None
    sides = numbers("--size", text.replace("x", ","), whole=True)
    if len(sides) > 2:
        raise InputError(f"--size is {text}, but must be one side or height and width, such as 64 or 48,64")
    return int(sides[0]), int(sides[-1])


def command_line() -> str:
    """The command line as it was given, for the record."""
    return " ".join(["nndefense", *(shlex.quote(word) for word in sys.argv[1:])])
