"""``nndefense rp2``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from nndefense.cli.declare import Commas, Group, OneOf, Only
from nndefense.cli.options import ClassifierOptions, Common, numbers
from nndefense.errors import InputError

if TYPE_CHECKING:
    from nndefense.attacks.rp2 import Mode, ViewChanges
    from nndefense.pipeline.sticker_scene import Scene

rp2 = Group(
    "rp2",
    "A sticker that makes a classifier take an object for another, from every view (RP2, Eykholt et al. 2018).",
)
Shown = Annotated[Common, Only("device", "seed", "json", "quiet", "debug")]
HoldOutOption = Annotated[
    float, typer.Option(min=0, max=0.95, help="Share of the photos set apart, drawn by the seed.")
]
ModeOption = Annotated["Mode", OneOf("replace what is under the sticker, or add to it.", ("replace", "add"))]
StepsOption = Annotated[int, typer.Option(min=1, help="Steps of Adam.")]
RateOption = Annotated[float, typer.Option(help="Adam's, at the start.")]
BatchOption = Annotated[int | None, typer.Option(min=1, help="Photos per step [default: all].")]
ViewsOption = Annotated[int, typer.Option(min=1, help="Changed views of each photo to measure on.")]
OutOption = Annotated[Path, typer.Option(help="Folder for the results.")]
BRIGHTNESS = "0.6,1.4"
OUT = Path("runs/rp2")


@dataclass(frozen=True, kw_only=True)
class SceneOptions(ClassifierOptions):
    """The photos, the classifier, and what it shall see."""

    photos: Annotated[Path, typer.Option(help="Folder of photos of the object.")]
    true: Annotated[str, typer.Option(help="The object's class: its name or number.")]
    target: Annotated[str, typer.Option(help="The class to be seen instead: its name or number.")]
    corners: Annotated[
        Path | None,
        typer.Option(
            help="JSON: for each file name the four corners of the object's frame in that photo, in pixels, clockwise "
            "from the top left [default: every photo is a crop to the frame].",
        ),
    ] = None
    shade: Annotated[
        bool,
        typer.Option(
            "--shade/--no-shade", help="Make the sticker as dark as each photo, judged by its brightest twentieth."
        ),
    ] = True

    def scene(self, common: Common) -> Scene:
        """Load the classifier and the photos."""
        from nndefense.pipeline.sticker_scene import open_scene

        net = self.open(common)
        return open_scene(net, self.photos, self.true, self.target, corners=self.corners, shade=self.shade)


@dataclass(frozen=True, kw_only=True)
class ViewOptions:
    """The views that a sticker is made or measured for."""

    brightness: Annotated[str, Commas("View changes: least and largest factor.")] = BRIGHTNESS
    crop: Annotated[float, typer.Option(help="View changes: most of the side cut off at each edge.")] = 0.1
    perspective: Annotated[float, typer.Option(help="View changes: spread of the corners, as a share of the side.")] = (
        0.03
    )

    @property
    def changes(self) -> ViewChanges:
        """The changes."""
        from nndefense.attacks.rp2 import ViewChanges

        factors = numbers("--brightness", self.brightness)
        if len(factors) != 2:
            raise InputError(f"--brightness is {self.brightness}, but must be two factors such as {BRIGHTNESS}")
        return ViewChanges((factors[0], factors[1]), self.crop, self.perspective)


@rp2.command("attack")
def attack(
    *,
    subject: SceneOptions,
    mask: Annotated[Path, typer.Option(help="Picture of the object's frame, white where stickers may be.")],
    hold_out: HoldOutOption = 0.5,
    splits: Annotated[int, typer.Option(min=1, help="Repeat with so many seeds; the first one's is kept.")] = 1,
    mode: ModeOption = "replace",
    norm_weight: Annotated[float, typer.Option(help="lambda, the weight of the l_2 norm.")] = 0.02,
    nps_weight: Annotated[float, typer.Option(help="Weight of the non-printability score.")] = 1.0,
    palette: Annotated[
        Path | None, typer.Option(help="Printable colours, one a line: #rrggbb or r,g,b [default: 30 of ours].")
    ] = None,
    steps: StepsOption = 400,
    learning_rate: RateOption = 0.1,
    batch_size: BatchOption = None,
    views: ViewsOption = 50,
    seen: ViewOptions,
    width_cm: Annotated[float, typer.Option(min=0.1, help="Width of the object's frame, for the printer.")] = 75.0,
    dpi: Annotated[int, typer.Option(min=10, max=1200, help="Resolution of the picture to print.")] = 100,
    out: OutOption = OUT,
    common: Shown,
) -> None:
    """Make a sticker on a part of the photos, measure it on the others, and write it for the printer."""
    from nndefense.attacks.rp2 import Settings
    from nndefense.pipeline.stickers import make_sticker

    settings = Settings(
        mode=mode,
        norm_weight=norm_weight,
        nps_weight=nps_weight,
        changes=seen.changes,
        steps=steps,
        learning_rate=learning_rate,
        batch_size=batch_size,
        seed=common.seed,
    )
    scene = subject.scene(common)
    value = make_sticker(
        scene,
        mask,
        settings,
        out,
        palette=palette,
        hold_out=hold_out,
        splits=splits,
        views=views,
        width_cm=width_cm,
        dpi=dpi,
    )
    text = f"{scene.aim}, mask {value['mask']['share']:.1%} of the frame"
    for run in value["runs"]:
        text += f"\nsplit {run['seed']}: optimised on {len(run['optimised_on'])} photos"
        text += "".join(f"\n  {_rate_line(row)}" for row in run["rates"])
    text += f"\nto print: {out / 'sticker.png'}; sheet: {out / 'sheet.png'}; numbers: {out / 'rp2.json'}"
    common.show(value, text)


@rp2.command("mask")
def mask(
    *,
    subject: SceneOptions,
    region: Annotated[
        Path | None, typer.Option(help="Picture, white where a sticker may be at all [default: everywhere].")
    ] = None,
    area: Annotated[float, typer.Option(help="Area of the mask, as a share of the region.")] = 0.1,
    rectangles: Annotated[int, typer.Option(min=0, help="Most rectangles; 0 for single pixels.")] = 4,
    norm_weight: Annotated[float, typer.Option(help="lambda, the weight of the l_1 norm.")] = 0.02,
    hold_out: HoldOutOption = 0.5,
    steps: StepsOption = 200,
    learning_rate: RateOption = 0.1,
    batch_size: BatchOption = None,
    seen: ViewOptions,
    out: OutOption = OUT,
    common: Shown,
) -> None:
    """Search by the l_1 norm where a sticker works best; with the same seed and share, attack sets apart the same."""
    from nndefense.attacks.rp2 import Settings
    from nndefense.pipeline.stickers import find_mask

    settings = Settings(
        mode="add",
        norm=1,
        norm_weight=norm_weight,
        nps_weight=0.0,
        changes=seen.changes,
        steps=steps,
        learning_rate=learning_rate,
        batch_size=batch_size,
        seed=common.seed,
    )
    scene = subject.scene(common)
    value = find_mask(scene, settings, out, region=region, area=area, rectangles=rectangles, hold_out=hold_out)
    text = f"{value['pixels']} of {value['region_pixels']} pixels of the region, found on "
    text += f"{len(value['searched_on'])} photos\nmask: {out / 'mask.png'}; picture: {out / 'search.png'}"
    common.show(value, text)


@rp2.command("evaluate")
def evaluate(
    *,
    subject: SceneOptions,
    sticker: Annotated[str, typer.Option(help="sticker.npz of an attack, or FILE.npz:NAME of an array h x w x C.")],
    mask: Annotated[Path | None, typer.Option(help="The mask of an array FILE.npz:NAME.")] = None,
    mode: ModeOption = "replace",
    hold_out: Annotated[
        float, typer.Option(min=0, max=0.95, help="Measure only on the part that attack sets apart.")
    ] = 0.0,
    views: ViewsOption = 50,
    seen: ViewOptions,
    out: OutOption = OUT,
    common: Shown,
) -> None:
    """Measure a finished sticker by the paper's ratio; use photos that it was not made with."""
    from nndefense.pipeline.stickers import measure_sticker

    changes, scene = seen.changes, subject.scene(common)
    value = measure_sticker(
        scene,
        sticker,
        changes,
        out,
        mask=mask,
        mode=mode,
        views=views,
        hold_out=hold_out,
        seed=common.seed,
    )
    text = "\n".join([scene.aim, *map(_rate_line, value["rates"])])
    common.show(value, f"{text}\nsheet: {out / 'sheet.png'}; numbers: {out / 'evaluation.json'}")


def _rate_line(row: dict[str, Any]) -> str:
    """One rate of a results file as a line of text."""
    name = f"{row['photos']} photos, {row['views']}"
    name += f", {row['colours']}" if "colours" in row else ""
    if row["rate"] is None:
        return f"{name}: none of {row['shown']} views is classified correctly without the sticker"
    low, high = row["interval"]
    return (
        f"{name}: {100 * row['rate']:.1f} % ({row['hits']} of {row['right_without']}; 95 % interval "
        f"{100 * low:.0f} to {100 * high:.0f} %, {row['photos_counted']} photos)"
    )
