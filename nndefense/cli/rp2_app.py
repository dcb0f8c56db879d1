"""Options of ``nndefense rp2``; the work is imported when it is asked for."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from nndefense.cli.options import (
    ClassesOption,
    ClassifierOption,
    DebugOption,
    Device,
    DeviceOption,
    JsonOption,
    SeedOption,
    ShapeOption,
)

if TYPE_CHECKING:
    from nndefense.attacks.rp2 import ViewChanges
    from nndefense.cli.rp2 import Scene

rp2_app = typer.Typer(
    no_args_is_help=True,
    help="A sticker that makes a classifier take an object for another, from every view (RP2, Eykholt et al. 2018).",
)


class Mode(str, Enum):
    """How a sticker meets the photo."""

    # In capitals, since a str has a method called replace.
    REPLACE = "replace"
    ADD = "add"


PhotosOption = Annotated[Path, typer.Option("--photos", help="Folder of photos of the object.")]
TrueOption = Annotated[str, typer.Option("--true", help="The object's class: its name or number.")]
TargetOption = Annotated[str, typer.Option("--target", help="The class to be seen instead: its name or number.")]
CornersOption = Annotated[
    Path | None,
    typer.Option(
        "--corners",
        help="JSON: for each file name the four corners of the object's frame in that photo, in pixels, clockwise "
        "from the top left [default: every photo is a crop to the frame].",
    ),
]
ShadeOption = Annotated[
    bool,
    typer.Option(
        "--shade/--no-shade", help="Make the sticker as dark as each photo, judged by its brightest twentieth."
    ),
]
HoldOutOption = Annotated[
    float, typer.Option("--hold-out", min=0, max=0.95, help="Share of the photos set apart, drawn by the seed.")
]
ModeOption = Annotated[Mode, typer.Option("--mode", help="replace what is under the sticker, or add to it.")]
StepsOption = Annotated[int, typer.Option("--steps", min=1, help="Steps of Adam.")]
RateOption = Annotated[float, typer.Option("--learning-rate", help="Adam's, at the start.")]
BatchOption = Annotated[int | None, typer.Option("--batch-size", min=1, help="Photos per step [default: all].")]
ViewsOption = Annotated[int, typer.Option("--views", min=1, help="Changed views of each photo to measure on.")]
BrightnessOption = Annotated[str, typer.Option("--brightness", help="View changes: least and largest factor.")]
CropOption = Annotated[float, typer.Option("--crop", help="View changes: most of the side cut off at each edge.")]
PerspectiveOption = Annotated[
    float, typer.Option("--perspective", help="View changes: spread of the corners, as a share of the side.")
]
OutOption = Annotated[Path, typer.Option("--out", help="Folder for the results.")]
BRIGHTNESS = "0.6,1.4"
OUT = Path("runs/rp2")


@rp2_app.command()
def attack(
    photos: PhotosOption,
    mask: Annotated[Path, typer.Option("--mask", help="Picture of the object's frame, white where stickers may be.")],
    classifier: ClassifierOption,
    true: TrueOption,
    target: TargetOption,
    corners: CornersOption = None,
    shade: ShadeOption = True,
    hold_out: HoldOutOption = 0.5,
    splits: Annotated[int, typer.Option(min=1, help="Repeat with so many seeds; the first one's is kept.")] = 1,
    mode: ModeOption = Mode.REPLACE,
    norm_weight: Annotated[float, typer.Option(help="lambda, the weight of the l_2 norm.")] = 0.02,
    nps_weight: Annotated[float, typer.Option(help="Weight of the non-printability score.")] = 1.0,
    palette: Annotated[
        Path | None, typer.Option(help="Printable colours, one a line: #rrggbb or r,g,b [default: 30 of ours].")
    ] = None,
    steps: StepsOption = 400,
    learning_rate: RateOption = 0.1,
    batch_size: BatchOption = None,
    views: ViewsOption = 50,
    brightness: BrightnessOption = BRIGHTNESS,
    crop: CropOption = 0.1,
    perspective: PerspectiveOption = 0.03,
    width_cm: Annotated[float, typer.Option(min=0.1, help="Width of the object's frame, for the printer.")] = 75.0,
    dpi: Annotated[int, typer.Option(min=10, max=1200, help="Resolution of the picture to print.")] = 100,
    classes: ClassesOption = None,
    input_shape: ShapeOption = None,
    device: DeviceOption = Device.auto,
    out: OutOption = OUT,
    seed: SeedOption = 0,
    json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Make a sticker on a part of the photos, measure it on the others, and write it for the printer."""
    from nndefense.attacks.rp2 import Settings
    from nndefense.cli import rp2

    settings = Settings(
        mode=mode.value,
        norm_weight=norm_weight,
        nps_weight=nps_weight,
        changes=_changes(brightness, crop, perspective),
        steps=steps,
        learning_rate=learning_rate,
        batch_size=batch_size,
        seed=seed,
    )
    rp2.attack(
        _scene(photos, classifier, true, target, corners, shade, classes, input_shape, device.value),
        mask,
        settings,
        palette=palette,
        hold_out=hold_out,
        splits=splits,
        views=views,
        width_cm=width_cm,
        dpi=dpi,
        out=out,
        as_json=json,
    )


@rp2_app.command()
def mask(
    photos: PhotosOption,
    classifier: ClassifierOption,
    true: TrueOption,
    target: TargetOption,
    region: Annotated[
        Path | None, typer.Option(help="Picture, white where a sticker may be at all [default: everywhere].")
    ] = None,
    area: Annotated[float, typer.Option(help="Area of the mask, as a share of the region.")] = 0.1,
    rectangles: Annotated[int, typer.Option(min=0, help="Most rectangles; 0 for single pixels.")] = 4,
    norm_weight: Annotated[float, typer.Option(help="lambda, the weight of the l_1 norm.")] = 0.02,
    corners: CornersOption = None,
    shade: ShadeOption = True,
    hold_out: HoldOutOption = 0.5,
    steps: StepsOption = 200,
    learning_rate: RateOption = 0.1,
    batch_size: BatchOption = None,
    brightness: BrightnessOption = BRIGHTNESS,
    crop: CropOption = 0.1,
    perspective: PerspectiveOption = 0.03,
    classes: ClassesOption = None,
    input_shape: ShapeOption = None,
    device: DeviceOption = Device.auto,
    out: OutOption = OUT,
    seed: SeedOption = 0,
    json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Search by the l_1 norm where a sticker works best; with the same seed and share, attack sets apart the same."""
    from nndefense.attacks.rp2 import Settings
    from nndefense.cli import rp2

    settings = Settings(
        mode="add",
        norm=1,
        norm_weight=norm_weight,
        nps_weight=0.0,
        changes=_changes(brightness, crop, perspective),
        steps=steps,
        learning_rate=learning_rate,
        batch_size=batch_size,
        seed=seed,
    )
    rp2.find_mask(
        _scene(photos, classifier, true, target, corners, shade, classes, input_shape, device.value),
        region,
        settings,
        area=area,
        rectangles=rectangles,
        hold_out=hold_out,
        out=out,
        as_json=json,
    )


@rp2_app.command()
def evaluate(
    photos: PhotosOption,
    sticker: Annotated[
        str, typer.Option("--sticker", help="sticker.npz of an attack, or FILE.npz:NAME of an array h x w x C.")
    ],
    classifier: ClassifierOption,
    true: TrueOption,
    target: TargetOption,
    mask: Annotated[Path | None, typer.Option("--mask", help="The mask of an array FILE.npz:NAME.")] = None,
    mode: ModeOption = Mode.REPLACE,
    corners: CornersOption = None,
    shade: ShadeOption = True,
    hold_out: Annotated[
        float, typer.Option("--hold-out", min=0, max=0.95, help="Measure only on the part that attack sets apart.")
    ] = 0.0,
    views: ViewsOption = 50,
    brightness: BrightnessOption = BRIGHTNESS,
    crop: CropOption = 0.1,
    perspective: PerspectiveOption = 0.03,
    classes: ClassesOption = None,
    input_shape: ShapeOption = None,
    device: DeviceOption = Device.auto,
    out: OutOption = OUT,
    seed: SeedOption = 0,
    json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Measure a finished sticker by the paper's ratio; use photos that it was not made with."""
    from nndefense.cli import rp2

    rp2.evaluate(
        _scene(photos, classifier, true, target, corners, shade, classes, input_shape, device.value),
        sticker,
        mask,
        mode.value,
        _changes(brightness, crop, perspective),
        views=views,
        hold_out=hold_out,
        seed=seed,
        out=out,
        as_json=json,
    )


def _scene(
    photos: Path,
    classifier: str,
    true: str,
    target: str,
    corners: Path | None,
    shade: bool,
    classes: Path | None,
    input_shape: str | None,
    device: str,
) -> Scene:
    from nndefense.cli import rp2
    from nndefense.cli.options import shape

    return rp2.open_scene(
        photos,
        classifier,
        true,
        target,
        corners=corners,
        shade=shade,
        classes=classes,
        input_shape=shape(input_shape),
        device=device,
    )


def _changes(brightness: str, crop: float, perspective: float) -> ViewChanges:
    from nndefense.attacks.rp2 import ViewChanges
    from nndefense.cli.options import numbers
    from nndefense.errors import InputError

    factors = numbers(brightness)
    if len(factors) != 2:
        raise InputError(f"--brightness is {brightness}, but must be two factors such as {BRIGHTNESS}")
    return ViewChanges((factors[0], factors[1]), crop, perspective)
