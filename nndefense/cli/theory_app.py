"""Options of ``nndefense theory``; the work is imported when it is asked for."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

theory_app = typer.Typer(
    no_args_is_help=True,
    help="Why robustness can cost accuracy, and how self-training mends it: figures and JSON.",
)

OutOption = Annotated[Path, typer.Option("--out", help="Folder for the figures (PNG and SVG) and the JSON.")]
SeedOption = Annotated[int, typer.Option("--seed", min=0, help="Seed of all random draws.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print the JSON too.")]
DebugOption = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]
NoiseOption = Annotated[float, typer.Option("--x-noise", help="Weight of the half-points in the standard error.")]
OUT = Path("runs/theory")


class LeftKnots(str, Enum):
    """Where the outer knots on the left lie."""

    four = "-4..-2"
    three = "-3..-1"


class Teacher(str, Enum):
    """Whose predictions are the pseudo-labels."""

    std = "std"
    aug = "aug"


KnotsOption = Annotated[LeftKnots, typer.Option("--left-knots", help="Outer knots on the left; the sources differ.")]


@theory_app.command()
def decompose(
    problem: Annotated[
        Path | None,
        typer.Option(help="JSON with x_std, x_ext, theta_star, sigma and perhaps norm [default: a 3-D example]."),
    ] = None,
    draws: Annotated[int, typer.Option(min=0, help="Random problems for each condition; 0 for none.")] = 2000,
    out: OutOption = OUT,
    seed: SeedOption = 0,
    json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Split the effect of augmentation on the standard error into benefit and cost."""
    from nndefense.cli import theory

    theory.decompose(problem, draws, out, seed=seed, as_json=json)


@theory_app.command()
def spline(
    stairs: Annotated[int, typer.Option(min=2, help="Stairs of the staircase.")] = 7,
    labelled: Annotated[str, typer.Option(help="Labelled points, with commas: 0, 0.5, 1, ...")] = "0,1,2,3",
    x_noise: NoiseOption = 0.1,
    left_knots: KnotsOption = LeftKnots.four,
    teacher: Annotated[Teacher, typer.Option(help="Whose predictions are the pseudo-labels.")] = Teacher.std,
    out: OutOption = OUT,
    json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Fit the spline staircase by the three estimators, and try every single point that could be added."""
    from nndefense.cli import theory
    from nndefense.cli.options import numbers

    theory.spline(
        stairs,
        list(numbers(labelled)),
        x_noise=x_noise,
        left_knots=left_knots.value,
        teacher=teacher.value,
        out=out,
        as_json=json,
    )


@theory_app.command()
def directions(
    theta: Annotated[str, typer.Option(help="theta*, two numbers.")] = "1,0.2",
    variances: Annotated[
        list[str] | None, typer.Option(help="Diagonal of Sigma, two numbers; repeat it [default: 1,1  1,4  1,25].")
    ] = None,
    out: OutOption = OUT,
    json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Draw which directions of one augmented point hurt, in two dimensions."""
    from nndefense.cli import theory
    from nndefense.cli.options import numbers

    diagonals = [list(numbers(text)) for text in variances or ["1,1", "1,4", "1,25"]]
    theory.directions(list(numbers(theta)), diagonals, out, as_json=json)


@theory_app.command()
def gap(
    trials: Annotated[int, typer.Option(min=2, help="Draws of labelled points for each size.")] = 2000,
    sizes: Annotated[
        str, typer.Option(help="Numbers of labelled points, with commas.")
    ] = "22,30,35,40,50,80,100,200,300,400,500,1000",
    unlabelled: Annotated[
        int, typer.Option(min=0, help="Unlabelled points of each self-training; 0 for the whole population.")
    ] = 0,
    stairs: Annotated[int, typer.Option(min=2, help="Stairs of the staircase.")] = 10,
    x_noise: NoiseOption = 0.01,
    left_knots: KnotsOption = LeftKnots.three,
    p: Annotated[float, typer.Option(help="Tsipras' toy: reliability of the robust feature.")] = 0.95,
    eta: Annotated[float, typer.Option(help="Tsipras' toy: mean of the weak features.")] = 0.3,
    d: Annotated[int, typer.Option(min=1, help="Tsipras' toy: number of weak features.")] = 100,
    intervals: Annotated[int, typer.Option(min=2, max=16, help="TRADES' toy: number of intervals.")] = 10,
    out: OutOption = OUT,
    seed: SeedOption = 0,
    json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Measure how the gap closes with data on the staircase, and two toys in which it never does."""
    from nndefense.cli import theory
    from nndefense.cli.options import numbers
    from nndefense.theory import Intervals, RobustFeature, Staircase

    theory.gap(
        Staircase(stairs, x_noise, left_knots.value),
        tuple(int(n) for n in numbers(sizes, whole=True)),
        RobustFeature(p, eta, d),
        Intervals(intervals),
        trials=trials,
        unlabelled=unlabelled or None,
        out=out,
        seed=seed,
        as_json=json,
    )
