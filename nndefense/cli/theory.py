"""``nndefense theory``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from nndefense.cli.declare import Commas, Group, OneOf, Only
from nndefense.cli.options import BatchOption, ClassifierOptions, Common, LimitOption, MeasuredOption, numbers
from nndefense.locks import writes

if TYPE_CHECKING:
    from nndefense.theory.studies import Study

theory = Group("theory", "Why robustness can cost accuracy, and how self-training mends it: figures and JSON.")

OutOption = Annotated[Path, typer.Option(help="Folder for the figures (PNG and SVG) and the JSON.")]
NoiseOption = Annotated[float, typer.Option(help="Weight of the half-points in the standard error.")]
KnotsOption = Annotated[str, OneOf("Outer knots on the left; the sources differ.", ("-4..-2", "-3..-1"))]
Drawn = Annotated[Common, Only("seed", "json", "quiet", "debug")]
OUT = Path("runs/theory")


@theory.command("decompose")
@writes("out", lend=True)
def decompose(
    *,
    problem: Annotated[
        Path | None,
        typer.Option(help="JSON with x_std, x_ext, theta_star, sigma and perhaps norm [default: a 3-D example]."),
    ] = None,
    draws: Annotated[int, typer.Option(min=0, help="Random problems for each condition; 0 for none.")] = 2000,
    out: OutOption = OUT,
    common: Drawn,
) -> None:
    """Split the effect of augmentation on the standard error into benefit and cost."""
    from nndefense.theory import studies

    _show(studies.decomposition(problem, draws, seed=common.seed), out, common)


@theory.command("spline")
@writes("out", lend=True)
def spline(
    *,
    stairs: Annotated[int, typer.Option(min=2, help="Stairs of the staircase.")] = 7,
    labelled: Annotated[str, Commas("Labelled points, with commas: 0, 0.5, 1, ...")] = "0,1,2,3",
    x_noise: NoiseOption = 0.1,
    left_knots: KnotsOption = "-4..-2",
    teacher: Annotated[str, OneOf("Whose predictions are the pseudo-labels.", ("std", "aug"))] = "std",
    out: OutOption = OUT,
    common: Annotated[Common, Only("json", "quiet", "debug")],
) -> None:
    """Fit the spline staircase by the three estimators, and try every single point that could be added."""
    from nndefense.theory import Staircase, studies

    _show(
        studies.spline(Staircase(stairs, x_noise, left_knots), numbers("--labelled", labelled), teacher=teacher),
        out,
        common,
    )


@theory.command("directions")
@writes("out", lend=True)
def directions(
    *,
    theta: Annotated[str, Commas("theta*, two numbers.")] = "1,0.2",
    variances: Annotated[
        list[str] | None, typer.Option(help="Diagonal of Sigma, two numbers; repeat it [default: 1,1  1,4  1,25].")
    ] = None,
    out: OutOption = OUT,
    common: Annotated[Common, Only("json", "quiet", "debug")],
) -> None:
    """Draw which directions of one augmented point hurt, in two dimensions."""
    from nndefense.theory import studies

    diagonals = [numbers("--variances", text) for text in variances or ["1,1", "1,4", "1,25"]]
    _show(studies.directions(numbers("--theta", theta), diagonals), out, common)


@theory.command("gap")
@writes("out", lend=True)
def gap(
    *,
    trials: Annotated[int, typer.Option(min=2, help="Draws of labelled points for each size.")] = 2000,
    sizes: Annotated[
        str, Commas("Numbers of labelled points, with commas.")
    ] = "22,30,35,40,50,80,100,200,300,400,500,1000",
    unlabelled: Annotated[
        int, typer.Option(min=0, help="Unlabelled points of each self-training; 0 for the whole population.")
    ] = 0,
    stairs: Annotated[int, typer.Option(min=2, help="Stairs of the staircase.")] = 10,
    x_noise: NoiseOption = 0.01,
    left_knots: KnotsOption = "-3..-1",
    p: Annotated[float, typer.Option(help="Tsipras' toy: reliability of the robust feature.")] = 0.95,
    eta: Annotated[float, typer.Option(help="Tsipras' toy: mean of the weak features.")] = 0.3,
    d: Annotated[int, typer.Option(min=1, help="Tsipras' toy: number of weak features.")] = 100,
    intervals: Annotated[int, typer.Option(min=2, max=16, help="TRADES' toy: number of intervals.")] = 10,
    out: OutOption = OUT,
    common: Drawn,
) -> None:
    """Measure how the gap closes with data on the staircase, and two toys in which it never does."""
    from nndefense.theory import Intervals, RobustFeature, Staircase, studies

    found = studies.gap(
        Staircase(stairs, x_noise, left_knots),
        RobustFeature(p, eta, d),
        Intervals(intervals),
        tuple(int(n) for n in numbers("--sizes", sizes, whole=True)),
        trials=trials,
        unlabelled=unlabelled or None,
        seed=common.seed,
    )
    _show(found, out, common)


@theory.command("examples")
@writes("out", lend=True)
def examples(
    *,
    height: Annotated[float, typer.Option(help="Of the middle point of three, above 0 and below --eps.")] = 0.5,
    eps: Annotated[float, typer.Option(help="How far each coordinate may be moved, below 1.")] = 0.9,
    out: OutOption = OUT,
    common: Annotated[Common, Only("json", "quiet", "debug")],
) -> None:
    """Show a class that is too small, and robust statistics beside robust optimisation."""
    from nndefense.theory import RobustFeature, ThreePoints, studies

    _show(studies.examples(ThreePoints(height, eps), RobustFeature()), out, common)


@theory.command("units")
@writes("out", lend=True)
def units(
    *,
    dataset: MeasuredOption,
    model: ClassifierOptions,
    layer: Annotated[str, typer.Option(help="Module of the net, such as pool3, or conv_5_1.")],
    pooling: Annotated[
        str, typer.Option(help="flatten: a unit for each place; avg, max: one for each channel.")
    ] = "flatten",
    count: Annotated[int, typer.Option(min=1, help="Images for each unit and direction.")] = 8,
    draws: Annotated[int, typer.Option(min=1, help="Random directions, and random sets of images.")] = 1000,
    limit: LimitOption = None,
    out: OutOption = OUT,
    batch_size: BatchOption = 128,
    common: Common,
) -> None:
    """Show that what excites a unit of a net looks no other than what excites a random direction."""
    from nndefense.datasets import measured_spec
    from nndefense.features import FeatureSpec
    from nndefense.pipeline import open_datasets, study_units

    feature = FeatureSpec(layer, pooling, pca=0)
    dataset = measured_spec(dataset, data_dir=common.data_dir)
    net = model.open(common, specs=[dataset])
    images = open_datasets([dataset], data_dir=common.data_dir, like=net, limit=limit, seed=common.seed)
    settings = {"count": count, "draws": draws, "batch_size": batch_size, "seed": common.seed}
    _show(study_units(net, images, feature, **settings, progress=common.progress), out, common)


def _show(found: Study, out: Path, common: Common) -> None:
    """Write the study and print it."""
    file, *figures = found.write(out)
    common.show(found.value, f"{found.text}\n{', '.join(map(str, figures))}; numbers in {file}")
