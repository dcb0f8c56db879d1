"""The laboratory's figures, as matplotlib figures; whoever asked for them decides where they are saved."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from nndefense.theory.activations import Exciting
from nndefense.theory.decomposition import Decomposition, boundaries, change, harmless_share
from nndefense.theory.estimators import Estimators
from nndefense.theory.experiments import Count
from nndefense.theory.solve import Array
from nndefense.theory.staircase import Curve, Staircase
from nndefense.theory.toys import Intervals, RobustFeature, ThreePoints

# Colours that colour-blind readers can tell apart (Okabe and Ito, 2008); markers and lines differ too.
COLOURS = {"std": "#0072b2", "aug": "#d55e00", "rst": "#009e73"}
NAMES = {"std": "standard", "aug": "augmented", "rst": "robust self-training"}
_LINES = {"std": "-", "aug": "--", "rst": "-."}
_MARKERS = {"std": "o", "aug": "s", "rst": "^"}
_GREY = "#555555"


def staircase_fits(staircase: Staircase, labelled: Sequence[float], fits: Estimators) -> Figure:
    """What the three estimators predict between the labelled stairs and beyond them."""
    figure, (axes,) = _figure(1, width=7.2, height=4.4)
    t = np.linspace(0, staircase.stairs - 0.5, 600)
    for name, theta in fits.thetas.items():
        label = f"{NAMES[name]}: $L_{{std}}$ {fits.standard[name]:.3g}, $L_{{rob}}$ {fits.robust[name]:.3g}"
        axes.plot(t, staircase.predict(theta, t), _LINES[name], color=COLOURS[name], linewidth=1.8, label=label)
    stairs = np.arange(staircase.stairs)
    for stair in stairs:
        axes.plot([stair, stair + 0.5], [stair, stair], color="#bbbbbb", linewidth=5, zorder=0, solid_capstyle="round")
    axes.plot(labelled, np.floor(labelled), "o", color="black", markersize=6, label="labelled points", zorder=4)
    axes.set(xlabel="t", ylabel="prediction", title="Fitting both points of the labelled stairs bends the spline away")
    axes.set_xticks(stairs)
    axes.legend(loc="upper left")
    return figure


def extra_point(extra: Array, changes: Array) -> Figure:
    """How much one more correct label changes the standard error, by where it is (figure 7)."""
    figure, (axes,) = _figure(1, width=7.2, height=3.6)
    half = np.mod(extra, 1) > 0.25
    for chosen, colour, label in ((~half, COLOURS["std"], "t on the line"), (half, COLOURS["aug"], "t + 1/2")):
        axes.bar(extra[chosen], changes[chosen], width=0.36, color=colour, label=label)
    axes.set_yscale("symlog", linthresh=1e-3)
    axes.set(xlabel="the added point t", ylabel="change of $L_{std}$", title="One more correct label, and what it does")
    axes.axhline(0, color="black", linewidth=0.8)
    axes.legend(loc="upper right")
    return figure


def gap(curve: Curve, shown_from: int = 33) -> Figure:
    """Standard error against the number of labels (figure 6a), and the gap that augmentation opens."""
    figure, (left, right) = _figure(2)
    shown = np.array([n >= shown_from for n in curve.sizes])
    sizes = np.array(curve.sizes)[shown]
    floor = 1e-6  # smaller errors are rounding, and a logarithmic axis must end somewhere
    for name, errors in curve.standard.items():
        mean, error = curve.mean_and_error(errors[shown])
        low, high = (mean - 1.96 * error).clip(floor), (mean + 1.96 * error).clip(floor)
        style: dict[str, Any] = {"color": COLOURS[name], "linewidth": 1.8, "marker": _MARKERS[name], "markersize": 4}
        left.plot(sizes, mean.clip(floor), _LINES[name], label=NAMES[name], **style)
        left.fill_between(sizes, low, high, color=COLOURS[name], alpha=0.18, linewidth=0)
    left.set(xscale="log", yscale="log", xlabel="labelled points n", title="Standard error")
    left.set_ylabel("mean $L_{std}$ (what is below $10^{-6}$ is drawn there)")
    left.set_ylim(bottom=floor)
    left.legend()
    mean, error = curve.mean_and_error((curve.standard["aug"] - curve.standard["std"])[shown])
    right.errorbar(sizes, mean, 1.96 * error, color=COLOURS["aug"], marker="s", markersize=4, capsize=2)
    right.axhline(0, color="black", linewidth=0.8)
    right.set(xscale="log", xlabel="labelled points n", title="The price of augmentation closes with data")
    right.set_ylabel("$L_{std}$(augmented) - $L_{std}$(standard)")
    for axes in (left, right):
        axes.set_xticks([n for n in (40, 100, 300, 1000) if sizes[0] <= n <= sizes[-1]])
        axes.get_xaxis().set_major_formatter("{x:.0f}")
        axes.minorticks_off()
    return figure


def toys(feature: RobustFeature, intervals: Intervals) -> Figure:
    """Two distributions whose tradeoff no amount of data closes."""
    figure, (left, right) = _figure(2)
    eps = 2 * feature.eta
    ratios = [0.0, *np.logspace(-2, 3, 400)]  # of the weight of x_1 to that of each other feature
    points = np.array([(feature.accuracy(r, 1.0), feature.accuracy(r, 1.0, eps=eps)) for r in ratios])
    left.plot(points[:, 0], points[:, 1], color=COLOURS["std"], linewidth=1.8, label="linear classifiers")
    accuracies = np.linspace(min(points[:, 0].min(), 0.9), 1, 400)
    bound = [feature.robust_bound(a) for a in accuracies]
    left.plot(accuracies, bound, "--", color=COLOURS["aug"], linewidth=1.5, label="upper bound")
    left.set(xlabel="standard accuracy", ylabel=f"robust accuracy at eps = {eps:g}", ylim=(-0.03, 1.03))
    left.set_title(f"Tsipras et al.: p = {feature.p:g}, eta = {feature.eta:g}, d = {feature.d}")
    left.legend(loc="lower left")
    natural, robust = intervals.errors(intervals.every_rule(), intervals.eps)
    corners, counts = np.unique(np.stack([natural, robust], 1).round(9), axis=0, return_counts=True)
    right.scatter(corners[:, 0], corners[:, 1], s=6 + 2 * np.sqrt(counts), color="#999999", label="every rule")
    for rule, colour, marker, label in (
        (intervals.labels, COLOURS["aug"], "s", "Bayes rule"),
        (0 * intervals.labels, COLOURS["rst"], "^", "constant rule"),
    ):
        own = intervals.errors(rule, intervals.eps)
        right.plot(*own, marker, color=colour, markersize=8, label=label, clip_on=False)
    right.set(xlabel="natural error", ylabel=f"robust error at radius {intervals.eps:g}")
    right.set_title(f"Zhang et al.: labels alternate on {intervals.count} intervals")
    right.legend(loc="lower right")
    return figure


def too_small(points: ThreePoints) -> Figure:
    """A class that is too small: what lines can do with three kinds of points, and what an interval can."""
    figure, (left, right) = _figure(2)
    for x, y, label, _ in points.kinds:
        colour = COLOURS["aug"] if label > 0 else COLOURS["std"]
        corner = (x - points.eps, y - points.eps)
        left.add_patch(Rectangle(corner, 2 * points.eps, 2 * points.eps, color=colour, alpha=0.25, linewidth=0))
        left.plot(x, y, "o" if label > 0 else "s", color=colour, markersize=8)
    left.axhline(points.height / 2, color=_GREY, linestyle="--", label="a line without standard error")
    left.axvline(1, color="black", linestyle=":", label="a line of least robust error")
    left.axvspan(-1, 1, color=COLOURS["rst"], alpha=0.15, label="|x| < 1: neither error")
    left.set(xlim=(-3.4, 3.4), ylim=(-2, 3.1), title="Three kinds of points, and where each may be moved")
    left.legend(loc="upper center", ncols=1)
    found = np.array([points.line(*line) for line in points.lines()])
    right.plot(found[:, 0], found[:, 1], "o", color="#999999", label="lines")
    right.plot(*points.interval(1.0), "^", color=COLOURS["rst"], markersize=9, label="|x| < 1", clip_on=False)
    right.set(xlabel="standard error", ylabel="robust error", title="No line has both small, an interval has")
    right.set(xlim=(-0.03, 1.03), ylim=(-0.03, 1.03))
    right.legend(loc="lower right")
    return figure


def directions(theta_star: Array, sigmas: Sequence[Array]) -> Figure:
    """Which directions of an augmented point hurt, on the unit circle, for several covariances."""
    figure, panels = _figure(len(sigmas), width=3.4 * len(sigmas), height=4.0)
    for axes, sigma in zip(panels, sigmas, strict=True):
        edges = boundaries(theta_star, sigma)
        edges = np.append(edges, edges[0] + np.pi)
        for first, last in itertools.pairwise(edges):
            hurts = bool(change((first + last) / 2, theta_star, sigma) > 0)
            for turn in (0, np.pi):  # x and -x are the same point with the label's sign changed
                arc = np.linspace(first + turn, last + turn, max(int(60 * (last - first)), 2))
                corner = np.concatenate([[[0, 0]], np.stack([np.cos(arc), np.sin(arc)], 1)])
                colour = COLOURS["aug"] if hurts else COLOURS["std"]
                axes.fill(corner[:, 0], corner[:, 1], color=colour, alpha=0.75 if hurts else 0.3, linewidth=0)
        # The points of equal standard error around theta*: where Sigma is large they lie close together.
        turned = np.linspace(0, 2 * np.pi, 200)
        circle = np.stack([np.cos(turned), np.sin(turned)])
        values, vectors = np.linalg.eigh(sigma)
        ellipse = vectors @ (circle / np.sqrt(values.clip(1e-12))[:, None]) * np.sqrt(values.clip(1e-12).min()) * 0.5
        axes.plot(theta_star[0] + ellipse[0], theta_star[1] + ellipse[1], color=_GREY, linewidth=1)
        arrow = {"arrowstyle": "-|>", "color": "black", "linewidth": 1.6}
        axes.annotate("", tuple(theta_star), (0, 0), arrowprops=arrow)
        axes.text(theta_star[0] * 0.86, theta_star[1] + 0.09, "$\\theta^*$", fontsize=11)
        spread = ", ".join(f"{value:g}" for value in np.diag(sigma))
        share = harmless_share(theta_star, sigma)
        title = f"$\\Sigma$ = diag({spread})\n{100 * share:.1f} % of directions do not hurt"
        # Inside the axes, which a layout cannot cut.
        axes.text(0.25, 1.22, title, fontsize=10, ha="center", va="bottom")
        axes.set(xlim=(-1.15, 1.65), ylim=(-1.1, 1.8), aspect="equal")
        axes.set_axis_off()
    figure.set_layout_engine("constrained", h_pad=0.12)
    handles = [
        panels[0].fill([], [], color=COLOURS["aug"], alpha=0.75, label="a point here hurts")[0],
        panels[0].fill([], [], color=COLOURS["std"], alpha=0.3, label="it does not hurt")[0],
        panels[0].plot([], [], color=_GREY, label="equal $L_{std}$")[0],
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=3, frameon=False)
    return figure


def decomposition(found: Decomposition, counts: Sequence[Count] = ()) -> Figure:
    """Benefit and cost of one problem, and how often augmentation hurts in random ones."""
    figure, (axes, *others) = _figure(2 if counts else 1, width=9.6 if counts else 4.4, height=3.6)
    bars = [
        ("benefit\n$v^T \\Sigma v$", found.benefit, COLOURS["rst"]),
        ("cost\n$-2 w^T \\Sigma v$", found.cost, COLOURS["aug"]),
        ("$L_{std}$\nstandard", found.loss_std, COLOURS["std"]),
        ("$L_{std}$\naugmented", found.loss_aug, COLOURS["aug"]),
    ]
    drawn = axes.bar([bar[0] for bar in bars], [bar[1] for bar in bars], color=[bar[2] for bar in bars])
    axes.bar_label(drawn, fmt="%.3g", padding=2, fontsize=9)
    axes.margins(y=0.14)
    axes.axhline(0, color="black", linewidth=0.8)
    axes.set_title("Augmentation " + ("hurts: cost > benefit" if found.hurts else "does not hurt here"))
    for right in others:
        names, shares = [count.name for count in counts][::-1], np.array([count.share for count in counts][::-1])
        ends = np.array([count.interval for count in counts][::-1])
        right.barh(names, 100 * shares, color=COLOURS["aug"])
        reach = np.abs(ends.T - shares) * 100
        right.errorbar(100 * shares, range(len(names)), xerr=reach, fmt="none", color="black", capsize=2, linewidth=1)
        right.set(xlabel=f"% of {counts[0].draws:,} random problems", title="How often augmentation hurts")
    return figure


def excited(images: Array, found: Mapping[str, Exciting], *, shown: int = 5, seed: int = 0) -> Figure:
    """The images that most excite some units (left), and some random directions (right), drawn by the seed."""
    sides = [(found["units"], "Units"), (found["directions"], "Random directions")]
    figure = Figure(figsize=(9.6, 0.55 * shown + 0.9), layout="constrained")
    panels = figure.subfigures(1, 2, wspace=0.04, squeeze=False)[0]
    for panel, (side, title) in zip(panels, sides, strict=True):
        panel.suptitle(f"{title}: on average {100 * side.shares.mean():.0f} % of a row have one label", fontsize=10)
        drawn = np.random.default_rng(seed).permutation(len(side.names))[:shown]
        grid = panel.subplots(len(drawn), side.chosen.shape[1], squeeze=False)
        for row, number in zip(grid, drawn, strict=True):
            for axes, image in zip(row, images[side.chosen[number]], strict=True):
                axes.imshow(image.squeeze(-1) if image.shape[-1] == 1 else image, cmap="gray", vmin=0, vmax=1)
                axes.set(xticks=[], yticks=[])
            name = side.names[number].replace("direction ", "v")
            row[0].set_ylabel(name, rotation=0, ha="right", va="center", fontsize=8)
    return figure


def _figure(panels: int, *, width: float = 9.6, height: float = 3.9) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(width, height), layout="constrained")
    found = figure.subplots(1, panels, squeeze=False)[0]
    for axes in found:
        axes.grid(color="#dddddd", linewidth=0.6)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    return figure, list(found)
