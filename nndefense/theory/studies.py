"""Six studies, each as numbers, figures and a few lines of text: what ``nndefense theory`` shows."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from nndefense.errors import InputError
from nndefense.files import read_json, sealed, write_atomically, write_json
from nndefense.locks import writes
from nndefense.theory import figures
from nndefense.theory.activations import Numbers, exciting
from nndefense.theory.decomposition import boundaries, decompose, harmless_share
from nndefense.theory.experiments import harm_by_condition, rst_guarantees
from nndefense.theory.solve import Array
from nndefense.theory.staircase import SIZES, Staircase, error_against_size
from nndefense.theory.toys import Intervals, RobustFeature, ThreePoints, location
from nndefense.versions import library_versions

# Two axes that nobody has labelled and the labelled third; errors along the second are 25 times as expensive.
EXAMPLE = {
    "x_std": [[0.0, 0.0, 1.0]],
    "x_ext": [[1.0, 1.0, 0.0]],
    "theta_star": [1.0, 0.2, 1.0],
    "sigma": [[1.0, 0.0, 0.0], [0.0, 25.0, 0.0], [0.0, 0.0, 1.0]],
}
_DPI = 144


@dataclass(frozen=True)
class Study:
    """What a study found.

    Attributes:
        name: of the study and of its JSON file.
        value: plain values, as the file holds them, with their digest.
        drawn: the figures by name.
        text: for a terminal.
    """

    name: str
    value: dict[str, Any]
    drawn: dict[str, Figure]
    text: str

    def __post_init__(self) -> None:
        object.__setattr__(self, "value", sealed(self.value))

    @writes("out")
    def write(self, out: Path) -> list[Path]:
        """Write ``NAME.json`` and each figure as PNG and SVG into a folder.

        Returns:
            The JSON file and the PNG files.

        Raises:
            InputError: the folder cannot be made or written.
        """
        write_json(out / f"{self.name}.json", self.value)
        for title, figure in self.drawn.items():
            for kind, metadata in (("png", {"Software": None}), ("svg", {"Date": None})):
                save = functools.partial(figure.savefig, format=kind, dpi=_DPI, metadata=metadata)
                write_atomically(out / f"{title}.{kind}", save)
        return [out / f"{self.name}.json", *(out / f"{title}.png" for title in self.drawn)]


def decomposition(problem: Path | None = None, draws: int = 2000, *, seed: int = 0) -> Study:
    """Split the effect of augmentation on the standard error into benefit and cost.

    Args:
        problem: JSON with x_std, x_ext, theta_star, sigma and perhaps norm; None for :data:`EXAMPLE`.
        draws: random problems for each condition, in which harm and broken guarantees are counted; 0 for none.
        seed: of the random problems.

    Raises:
        InputError, DataError: a problem that cannot be used or read.
    """
    given = EXAMPLE if problem is None else _read_problem(problem)
    found = decompose(**given)
    counts = harm_by_condition(draws, seed=seed) if draws else []
    guarantees = rst_guarantees(draws, seed=seed) if draws else []
    value = {
        "problem": given,
        "decomposition": found.to_json(),
        "augmentation_hurts": [count.to_json() for count in counts],
        "robust_self_training": [count.to_json() for count in guarantees],
        "seed": seed,
    }
    text = (
        f"benefit v'Sv {found.benefit:.6g}, cost -2w'Sv {found.cost:.6g}: augmentation "
        f"{'hurts' if found.hurts else 'does not hurt'}; "
        f"L_std(std) {found.loss_std:.6g} -> L_std(aug) {found.loss_aug:.6g}"
    )
    for title, rows in (("augmentation hurts", counts), ("fails", guarantees)):
        text += "".join(f"\n{title} in {row.hits:>5,} of {row.draws:,}: {row.name}" for row in rows)
    return _study("decompose", value, {"decompose": figures.decomposition(found, counts)}, text)


def spline(staircase: Staircase, labelled: Sequence[float] = (0, 1, 2, 3), *, teacher: str = "std") -> Study:
    """Fit the staircase by the three estimators, and add every single point of it in turn.

    Args:
        staircase: the problem.
        labelled: labelled points, of the stairs and the half-points between them.
        teacher: whose predictions are the pseudo-labels: ``std`` or ``aug``.

    Raises:
        InputError: points that are not of the staircase.
    """
    fits = staircase.fit(labelled, teacher=teacher)
    support = np.arange(2 * staircase.stairs) / 2
    extra = np.setdiff1d(support, labelled)
    changes = staircase.one_extra_point(labelled, extra)
    thetas = fits.thetas
    value = {
        "stairs": staircase.stairs,
        "labelled": list(labelled),
        "x_noise": staircase.x_noise,
        "left_knots": staircase.left_knots,
        "teacher": teacher,
        "L_std": fits.standard,
        "L_rob": fits.robust,
        "penalty": {name: staircase.roughness(theta) for name, theta in thetas.items()},
        "t": support.tolist(),
        "predictions": {name: staircase.predict(theta, support).tolist() for name, theta in thetas.items()},
        "one_extra_point": {"t": extra.tolist(), "change_of_L_std": changes.tolist()},
    }
    lines = [f"{'':<4}  {'L_std':>10}  {'L_rob':>10}  {'penalty':>9}"]
    lines += [
        f"{name:<4}  {fits.standard[name]:>10.6f}  {fits.robust[name]:>10.6f}  {staircase.roughness(theta):>9.3f}"
        for name, theta in thetas.items()
    ]
    drawn = {"spline": figures.staircase_fits(staircase, labelled, fits)}
    if len(extra):
        worst = int(changes.argmax())
        lines.append(f"worst single point to add: t = {extra[worst]:g}, L_std {changes[worst]:+.4f}")
        drawn["extra-point"] = figures.extra_point(extra, changes)
    return _study("spline", value, drawn, "\n".join(lines))


def directions(theta: Sequence[float], variances: Sequence[Sequence[float]]) -> Study:
    """Find which directions of one augmented point hurt, in two dimensions.

    Args:
        theta: theta*, two numbers.
        variances: the diagonal of Sigma, two numbers, for each picture.

    Raises:
        InputError: other dimensions than two, or a negative variance.
    """
    if any(len(pair) != 2 for pair in [theta, *variances]):
        raise InputError("the picture of directions is one of two dimensions: give two numbers for theta and variances")
    star, sigmas = np.array(theta), [np.diag(pair) for pair in variances]
    shares = [harmless_share(star, sigma) for sigma in sigmas]
    rows = [
        {"sigma": sigma.tolist(), "harmless_share": share, "boundaries": boundaries(star, sigma).tolist()}
        for sigma, share in zip(sigmas, shares, strict=True)
    ]
    text = "\n".join(
        f"Sigma = diag({pair[0]:g}, {pair[1]:g}): {100 * share:.1f} % of directions do not hurt"
        for pair, share in zip(variances, shares, strict=True)
    )
    value = {"theta_star": list(theta), "covariances": rows}
    return _study("directions", value, {"directions": figures.directions(star, sigmas)}, text)


def gap(
    staircase: Staircase,
    feature: RobustFeature,
    intervals: Intervals,
    sizes: tuple[int, ...] = SIZES,
    *,
    trials: int = 2000,
    unlabelled: int | None = None,
    seed: int = 0,
) -> Study:
    """Measure how the gap closes with data on the staircase, and two toys in which it never does.

    Args:
        staircase: the problem of the Monte Carlo estimate.
        feature, intervals: the toys, worked out exactly.
        sizes: numbers of labelled points.
        trials: draws of labelled points for each size.
        unlabelled: points of each self-training, or None for the whole population.
        seed: of all draws.
    """
    curve = error_against_size(staircase, sizes, trials=trials, unlabelled=unlabelled, seed=seed)
    eps = 2 * feature.eta
    rules = {"bayes": intervals.labels, "constant": 0 * intervals.labels}
    errors = {name: intervals.errors(rule, intervals.eps) for name, rule in rules.items()}
    classifiers = {"averaging": (0.0, 1.0), "most_accurate": feature.optimal_weights, "first_feature": (1.0, 0.0)}
    value = {
        "staircase": {
            "stairs": staircase.stairs,
            "x_noise": staircase.x_noise,
            "train_noise": staircase.noise_in_training,
            "left_knots": staircase.left_knots,
            "unlabelled": unlabelled,
            "seed": seed,
        },
        "curve": curve.to_json(),
        "tsipras": {
            **asdict(feature),
            "eps": eps,
            "accuracy": {
                name: {"standard": feature.accuracy(*w), "robust": feature.accuracy(*w, eps=eps)}
                for name, w in classifiers.items()
            },
        },
        "trades": {
            "intervals": intervals.count,
            "radius": intervals.eps,
            "errors": {name: {"natural": float(n), "robust": float(r)} for name, (n, r) in errors.items()},
        },
    }
    lines = [f"mean L_std of {trials:,} trials (standard error)"]
    lines.append(f"{'n':>5}" + "".join(f"  {name:>18}" for name in curve.standard))
    means = {name: curve.mean_and_error(errors) for name, errors in curve.standard.items()}
    lines += [
        f"{n:>5}" + "".join(f"  {f'{mean[i]:.4f} ({error[i]:.4f})':>18}" for mean, error in means.values())
        for i, n in enumerate(curve.sizes)
    ]
    drawn = {
        "gap": figures.gap(curve, 33 if max(sizes) > 33 else 1),
        "toys": figures.toys(feature, intervals),
    }
    return _study("gap", value, drawn, "\n".join(lines))


def examples(points: ThreePoints, feature: RobustFeature) -> Study:
    """A class that is too small, and robust statistics beside robust optimisation.

    Args:
        points: on which no line is both accurate and robust, and an interval is.
        feature: the toy of the robust optimisation: ordinary training data, hard test data.
    """
    lines = [points.line(*line) for line in points.lines()]
    rules = {"most_accurate": feature.optimal_weights, "first_feature": (1.0, 0.0)}
    accuracies = {
        name: {"standard": feature.accuracy(*w), "robust": feature.accuracy(*w, eps=2 * feature.eta)}
        for name, w in rules.items()
    }
    value = {
        "too_small": {
            **asdict(points),
            "most_accurate_line": min(lines),
            "most_robust_line": min(lines, key=lambda pair: pair[::-1]),
            "interval": points.interval(1.0),
        },
        "robust_statistics": location(),
        "robust_optimisation": {**asdict(feature), "eps": 2 * feature.eta, "accuracy": accuracies},
    }
    small, values = value["too_small"], value["robust_statistics"]
    said = [f"{'a class that is too small':<44}  standard error  robust error"]
    for title, name in (
        ("the most accurate line", "most_accurate_line"),
        ("the most robust line", "most_robust_line"),
        ("an interval", "interval"),
    ):
        standard, robust = small[name]
        said.append(f"  {title:<42}  {standard:>14.2f}  {robust:>12.2f}")
    said.append("robust statistics: a tenth of the training values stands at 10, the test is ordinary")
    said += [f"  the {name} predicts {one['predicted']:.3f}: error {one['error']:.3f}" for name, one in values.items()]
    said.append(f"robust optimisation: the training is ordinary, the test moves each entry by {2 * feature.eta:g}")
    said += [
        f"  {name.replace('_', ' ')}: accuracy {100 * one['standard']:.2f} %, robust {100 * one['robust']:.2f} %"
        for name, one in accuracies.items()
    ]
    return _study("examples", value, {"too-small": figures.too_small(points)}, "\n".join(said))


def units(
    activations: Array,
    images: Array,
    labels: Numbers,
    *,
    facts: Mapping[str, Any],
    count: int = 8,
    draws: int = 1000,
    shown: int = 5,
    seed: int = 0,
) -> Study:
    """Compare the images that most excite single units with those that excite random directions.

    Args:
        activations: of a layer, N x D.
        images: N x H x W x 1 or 3, in [0, 1].
        labels: N.
        facts: where they come from, for the file.
        count, draws, seed: as :func:`nndefense.theory.exciting` takes them.
        shown: units and directions in the figure, drawn by the seed.

    Raises:
        InputError: too few images, or activations without a difference.
    """
    found = exciting(activations, labels, count=count, draws=draws, seed=seed)
    value = {**facts, "images": len(images), "count": count, "seed": seed}
    value |= {name: kind.to_json() for name, kind in found.items()}
    said = [f"{count} images, and how many of them have the most frequent label: mean (5 % to 95 %)"]
    for name, title in (
        ("units", "those that most excite a unit"),
        ("directions", "those that most excite a random direction"),
        ("chance", "drawn at random"),
    ):
        one = value[name]
        said.append(
            f"  {title:<42} {100 * one['share']:5.1f} % ({100 * one['low']:.1f} to {100 * one['high']:.1f}), "
            f"{one['directions']:,} of them"
        )
    drawn = figures.excited(images, found, shown=shown, seed=seed)
    return _study("units", value, {"units": drawn}, "\n".join(said))


def _read_problem(path: Path) -> dict[str, Any]:
    value = read_json(path)
    names = {"x_std", "x_ext", "theta_star", "sigma"}
    if not isinstance(value, dict) or not names <= set(value) <= names | {"norm"}:
        raise InputError(f"{path} must hold x_std, x_ext, theta_star and sigma, perhaps norm, and nothing else")
    return value


def _study(name: str, value: dict[str, Any], drawn: dict[str, Figure], text: str) -> Study:
    kept = {"format": f"nndefense-theory-{name}", "version": 1, **value, "versions": library_versions()}
    return Study(name, kept, drawn, text)
