"""Choosing a setting of the nearest-neighbour defence from images, and building the database with it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from index_build import build_database
from index_build.job import NAME as JOB
from nndefense.bars import progress_bar
from nndefense.database import WEIGHTINGS, ImageDatabase, Rule, check_vacant
from nndefense.datasets import ImageDataset
from nndefense.defenses import DEFAULT_KS, OBJECTIVES, RUNGS, AdaptiveAttacker, HalvingRung, calibrate
from nndefense.defenses.calibration import rules_to_try
from nndefense.defenses.informed import EFFORT
from nndefense.errors import InputError, NNDefenseError, check_choice
from nndefense.evaluation import AttackSettings, run_attack
from nndefense.features import WIDEST, FeatureSpec, raw_vectors, spatial_layers, spread
from nndefense.locks import passing_folder, writes
from nndefense.models import Classifier
from nndefense.pipeline.checks import check_disjoint
from nndefense.pipeline.finished import find_or_build
from nndefense.pipeline.opening import drawn
from nndefense.reporting.wording import plural, rough

DEFAULT_POOLINGS = ("avg", "rmac", "grid4", "grid8", "cls")
# Candidates are compared, not kept: half of a database's own sample serves their PCA.
_PCA_SAMPLE = 2048


@dataclass(frozen=True)
class Candidates:
    """Which settings are compared.

    Attributes:
        layers: by name, or None for ``count`` that are spread over the depth of the net.
        poolings, ks, weightings, votes, temperatures, alphas: to be tried with each of them; the last five are of the
            rule, temperatures as multiples of a distance: see :func:`~nndefense.defenses.calibration.rules_to_try`.
        pca: dimensions kept of each vector, 0 for all.
        max_clean_loss: clean accuracy that may be lost, as a fraction.
        rows: how many database images, drawn at random, they are compared on.
        count: of the layers.
        objective: ``informed``: the best is who keeps most images in the worst case of the gray-box attack and one by
            who knows the retrieval; ``gray``: under the gray-box attack alone.
        rungs: how he who knows it is sent against them.

    Raises:
        InputError: another objective, or settings that no rule can have.
    """

    layers: Sequence[str] | None = None
    poolings: Sequence[str] = DEFAULT_POOLINGS
    ks: Sequence[int] = DEFAULT_KS
    weightings: Sequence[str] = field(default=WEIGHTINGS)
    pca: int = 256
    max_clean_loss: float = 0.02
    rows: int = 20_000
    count: int = 6
    objective: str = "informed"
    rungs: Sequence[HalvingRung] = RUNGS
    votes: Sequence[str] = ("posteriors",)
    temperatures: Sequence[float | None] = (None,)
    alphas: Sequence[float] = (0.0,)

    def __post_init__(self) -> None:
        check_choice("the objective", self.objective, OBJECTIVES)
        # Found wrong before anything is built.
        rules_to_try((2,), self.weightings, self.votes, self.temperatures, self.alphas)

    def features(self, classifier: Classifier) -> list[FeatureSpec]:
        """The layers and poolings of ``classifier`` worth trying; errors as for :meth:`widths`."""
        return list(self.widths(classifier))

    def widths(self, classifier: Classifier) -> dict[FeatureSpec, int]:
        """The layers and poolings of ``classifier`` worth trying, and how long the vectors of each are before PCA.

        Left out: those whose vectors equal those of one before them, but for the order of their entries (a finer grid
        than the layer's map, any pooling of a map of 1 x 1 or of vectors, a layer that passes on what it is given), raw
        vectors of over 8,192 dimensions, and poolings that a layer does not allow, as ``cls`` where it has no class
        token.

        Raises:
            InputError: nothing is left.
        """
        generator = torch.Generator().manual_seed(0)
        example = torch.rand((1, *classifier.input_shape), generator=generator).to(classifier.device)
        names = list(self.layers) if self.layers else spread(spatial_layers(classifier.net, example), self.count)
        features, entries = dict[FeatureSpec, int](), list[Tensor]()
        for name, vectors in zip(names, raw_vectors(classifier, names, self.poolings, example), strict=True):
            for pooling, vector in zip(self.poolings, vectors, strict=True):
                if vector is None or not 0 < vector.numel() <= WIDEST:
                    continue
                found = vector.flatten().sort().values
                if not any(_same(found, other) for other in entries):
                    features[FeatureSpec(name, pooling, pca=self.pca)] = len(found)
                    entries.append(found)
        if not features:
            raise InputError("no layer gives vectors of a usable length: name layers and poolings yourself")
        return features


def _same(one: Tensor, other: Tensor) -> bool:
    """Whether two layers' sorted entries are the same, and say something: dead ones are not all alike."""
    return one.shape == other.shape and bool(one.any()) and torch.allclose(one, other, rtol=1e-5, atol=0)


def _cost(wanted: Candidates, widths: Mapping[FeatureSpec, int], classifier: Classifier, rows: int, held: int) -> str:
    """What the comparison takes, for people, before any of it is taken."""
    numbers = sum(min(width, wanted.pca or width) for width in widths.values())
    # Each vector stands in its shard and in the index; beside it posteriors, weights, label and id.
    size = 4 * rows * (2 * numbers + len(widths) * (len(classifier.classes) + 24))
    count = plural(len(widths), "candidate")
    text = f"comparing {count} over {rows:,} rows: {rough(size / 1e6)} MB until they are compared"
    if wanted.objective == "gray":
        return text
    gradients = sum(
        min(rung.settings, rung.each * len(widths)) * min(rung.images or held, held) * rung.steps
        for rung in wanted.rungs
    )
    return f"{text}, and at most {EFFORT * gradients:,} gradients of who knows them"


@dataclass(frozen=True)
class Chosen:
    """A setting and what it was chosen from.

    Attributes:
        feature: layer and pooling.
        rule: of the defence.
        calibration: plain values: the table, the images it was made on, the attack and the number of candidate rows.
        features: all that were compared, from the front of the net to its end.
    """

    feature: FeatureSpec
    rule: Rule
    calibration: dict[str, Any]
    features: Sequence[FeatureSpec]


class NothingBetterError(NNDefenseError):
    """No setting is better than the bare classifier, and nothing was built in the folder ``out``.

    Attributes:
        chosen: the best setting, and what it was chosen from.
    """

    def __init__(self, out: Path, chosen: Chosen) -> None:
        super().__init__(
            f"nothing was built in {out}, since no setting is better than the bare classifier: build the best one all "
            "the same with --build-anyway (build_anyway=True), or look for a classifier that is robust by itself"
        )
        self.chosen = chosen


def attacked_images(
    classifier: Classifier,
    held: ImageDataset,
    attack: AttackSettings,
    eps: float,
    *,
    batch_size: int,
    seed: int,
    progress: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    """Calibration images, which must fit in memory: N x C x H x W, attacked (gray box), and class numbers N."""
    labels_of, generator = classifier.label_map(held.classes), torch.Generator().manual_seed(seed)
    found = []
    with progress_bar(total=len(held), desc="attacking calibration images", unit=" images", shown=progress) as bar:
        for batch, labels, _ in held.batches(batch_size):
            images, aims = batch.to(classifier.device), labels_of[labels].to(classifier.device)
            found.append((images, run_attack(attack, classifier, images, aims, eps, generator).images, aims))
            bar.update(len(images))
    clean, attacked, truth = map(torch.cat, zip(*found, strict=True))
    return clean, attacked, truth


def choose(
    classifier: Classifier,
    images: ImageDataset,
    held: ImageDataset,
    attack: AttackSettings,
    eps: float,
    candidates: Candidates | None = None,
    *,
    attacked: tuple[Tensor, Tensor, Tensor] | None = None,
    folder: Path | None = None,
    beside: Path | None = None,
    batch_size: int = 128,
    seed: int = 0,
    progress: bool = True,
    say: Callable[[str], object] = lambda text: None,
) -> Chosen:
    """Compare settings on held-out images, in databases of candidate rows that do not hold them.

    Args:
        classifier: what the defence is for.
        images: candidate rows are drawn from them, under ``seed``.
        held: labelled images to calibrate on.
        attack, eps: what the defence is chosen for; the attack sees the classifier alone.
        candidates: the settings to compare; by default the usual ones.
        attacked: ``held`` as :func:`attacked_images` gave it, where that was done.
        folder: where candidate databases are kept and found again; None for nowhere.
        beside: the folder in which they stand until they have been compared, where they are not kept; None: the
            system's for temporary files.
        batch_size: images per forward pass.
        seed: of the rows; one more is that of the attack and of the databases.
        progress: whether to show bars.
        say: called with a line for people on what the comparison will take, and before it where there are too few
            candidate rows for the PCA that is wanted: half as many dimensions are kept then.

    Raises:
        DataError: held-out images stand among the candidate rows.
        InputError: no usable layer, or no setting to compare.
    """
    wanted = candidates or Candidates()
    check_disjoint(held, images)
    rows = drawn(images, wanted.rows, seed)
    if "labels" in wanted.votes and bool((rows.labels < 0).all()):
        raise InputError(
            f"no image of {images.name} has a label to vote with: leave labels out of the votes (--votes), or give "
            "labelled images"
        )
    if wanted.pca >= len(rows) > 1:
        # Half, so that images that turn out to be unreadable do not matter.
        say(f"{len(rows):,} images are too few for a PCA to {wanted.pca} dimensions: {len(rows) // 2} are kept")
        wanted = replace(wanted, pca=len(rows) // 2)
    widths = wanted.widths(classifier)
    features = list(widths)
    say(_cost(wanted, widths, classifier, len(rows), len(held)))
    if attacked is None:
        attacked = attacked_images(
            classifier, held, attack, eps, batch_size=batch_size, seed=seed + 1, progress=progress
        )

    informed = None
    if wanted.objective == "informed":
        informed = AdaptiveAttacker(classifier, attack.norm, eps, seed + 1, batch_size, rows)

    def bar(found: Iterable[ImageDatabase]) -> Iterable[ImageDatabase]:
        yield from progress_bar(found, desc="comparing settings", unit=" layers", shown=progress)

    with nullcontext(folder) if folder is not None else passing_folder(beside) as place:
        places = {place / f"candidate-{i:02d}": feature for i, feature in enumerate(features)}
        found = calibrate(
            classifier,
            find_or_build(
                rows,
                classifier,
                places,
                batch_size=batch_size,
                pca_sample=_PCA_SAMPLE,
                seed=seed + 1,
                progress=progress,
            ),
            *attacked,
            informed=informed,
            rungs=wanted.rungs,
            seed=seed + 1,
            ks=wanted.ks,
            weightings=wanted.weightings,
            votes=wanted.votes,
            temperatures=wanted.temperatures,
            alphas=wanted.alphas,
            max_clean_loss=wanted.max_clean_loss,
            batch_size=batch_size,
            progress=bar,
        )
    calibration = {
        **found.to_json(),
        "dataset": held.name,
        "ids": list(held.ids),
        "candidate_rows": len(rows),
        "attack": {**attack.to_json(), "eps": [eps]},
        "seed": seed + 1,
    }
    return Chosen(features[found.candidate], found.chosen.rule, calibration, features)


@writes("out", lend=True)
def build_calibrated(
    classifier: Classifier,
    sets: tuple[ImageDataset, ImageDataset, ImageDataset],
    out: Path,
    attack: AttackSettings,
    candidates: Candidates | None = None,
    *,
    build_anyway: bool = False,
    specs: Sequence[str] = (),
    overwrite: bool = False,
    batch_size: int = 128,
    seed: int = 0,
    progress: bool = True,
    say: Callable[[str], object] = lambda text: None,
) -> tuple[ImageDatabase, Chosen]:
    """Choose a setting on held-out images, and build the database of all images with it.

    Args:
        classifier, candidates, batch_size, seed, progress, say: as for :func:`choose`.
        sets: all database images, those to draw candidates from, and those to calibrate on, as
            :func:`~nndefense.pipeline.split` gives them.
        out: the database's folder; the calibration is stored with it. A build that was killed there goes on.
        attack: what the setting is chosen for, at the first of its budgets.
        build_anyway: build the best setting even where it is not better than the bare classifier.
        specs: of the database images, so that they can be opened again.
        overwrite: replace what is there.

    Raises:
        DataError, InputError: as for :func:`choose`.
        DatabaseError: the folder cannot be used.
        NothingBetterError: no setting is better than the bare classifier; nothing was built.
    """
    rows, rest, held = sets
    # A build that was killed after its manifest is finished, not refused.
    check_vacant(out, overwrite=overwrite or (out / JOB).exists())
    options: dict[str, Any] = {"batch_size": batch_size, "seed": seed, "progress": progress}
    chosen = choose(classifier, rest, held, attack, attack.eps[0], candidates, beside=out, say=say, **options)
    if not build_anyway and chosen.calibration.get("paired", {}).get("better") is False:
        raise NothingBetterError(out, chosen)
    options |= {"specs": specs, "overwrite": overwrite, "calibrations": {out: chosen.calibration}}
    return build_database(rows, classifier, chosen.feature, out, **options), chosen
