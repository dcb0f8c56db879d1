"""What ``nndefense theory`` does: work out, draw, write and print."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from nndefense.errors import InputError
from nndefense.files import json_text, make_folder, read_json, write_atomically, write_json
from nndefense.theory import (
    Intervals,
    RobustFeature,
    Staircase,
    boundaries,
    error_against_size,
    figures,
    harm_by_condition,
    harmless_share,
    rst_guarantees,
)
from nndefense.theory import decompose as decompose_problem
from nndefense.versions import library_versions

# Two axes that nobody has labelled and the labelled third; errors along the second are 25 times as expensive.
EXAMPLE = {
    "x_std": [[0.0, 0.0, 1.0]],
    "x_ext": [[1.0, 1.0, 0.0]],
    "theta_star": [1.0, 0.2, 1.0],
    "sigma": [[1.0, 0.0, 0.0], [0.0, 25.0, 0.0], [0.0, 0.0, 1.0]],
}
_DPI = 144


def decompose(problem: Path | None, draws: int, out: Path, *, seed: int, as_json: bool) -> None:
    """Decompose one problem, and count harm and broken guarantees in random ones."""
    given = EXAMPLE if problem is None else _read_problem(problem)
    found = decompose_problem(**given)
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
    _finish(out, "decompose", value, {"decompose": figures.decomposition(found, counts)}, text, as_json)


def spline(
    stairs: int,
    labelled: Sequence[float],
    *,
    x_noise: float,
    left_knots: str,
    teacher: str,
    out: Path,
    as_json: bool,
) -> None:
    """Fit the staircase, and add every single point of it in turn."""
    staircase = Staircase(stairs, x_noise, left_knots)
    fits = staircase.fit(labelled, teacher=teacher)
    support = np.arange(2 * stairs) / 2
    extra = np.setdiff1d(support, labelled)
    changes = staircase.one_extra_point(labelled, extra)
    thetas = {"std": fits.std, "aug": fits.aug, "rst": fits.rst}
    value = {
        "stairs": stairs,
        "labelled": list(labelled),
        "x_noise": x_noise,
        "left_knots": left_knots,
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
    _finish(out, "spline", value, drawn, "\n".join(lines), as_json)


def directions(theta: Sequence[float], variances: Sequence[Sequence[float]], out: Path, *, as_json: bool) -> None:
    """The share of harmless directions for each covariance, and the picture."""
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
    _finish(out, "directions", value, {"directions": figures.directions(star, sigmas)}, text, as_json)


def gap(
    staircase: Staircase,
    sizes: tuple[int, ...],
    feature: RobustFeature,
    intervals: Intervals,
    *,
    trials: int,
    unlabelled: int | None,
    out: Path,
    seed: int,
    as_json: bool,
) -> None:
    """Monte Carlo of the staircase, and the two toys' exact figures."""
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
            "p": feature.p,
            "eta": feature.eta,
            "d": feature.d,
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
    _finish(out, "gap", value, drawn, "\n".join(lines), as_json)


def _read_problem(path: Path) -> dict[str, Any]:
    value = read_json(path)
    names = {"x_std", "x_ext", "theta_star", "sigma"}
    if not isinstance(value, dict) or not names <= set(value) <= names | {"norm"}:
        raise InputError(f"{path} must hold x_std, x_ext, theta_star and sigma, perhaps norm, and nothing else")
    return value


def _finish(out: Path, name: str, value: dict[str, Any], drawn: dict[str, Figure], text: str, as_json: bool) -> None:
    """Write ``NAME.json`` and each figure as PNG and SVG, and print the text or the JSON."""
    make_folder(out)
    value = {"format": f"nndefense-theory-{name}", "version": 1, **value, "versions": library_versions()}
    write_json(out / f"{name}.json", value)
    for title, figure in drawn.items():
        for suffix, metadata in ((".png", {"Software": None}), (".svg", {"Date": None})):

            def save(part: Path, figure: Figure = figure, suffix: str = suffix, metadata: Any = metadata) -> None:
                figure.savefig(part, format=suffix[1:], dpi=_DPI, metadata=metadata)

            write_atomically(out / f"{title}{suffix}", save)
    files = ", ".join(str(out / f"{title}.png") for title in drawn)
    print(json_text(value).rstrip() if as_json else f"{text}\n{files}; numbers in {out / f'{name}.json'}")
