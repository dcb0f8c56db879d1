"""The rows of a comparison: each defence, made from the materials, or the reason why it is not there."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from nndefense.attacks.retrieval import Knowledge
from nndefense.comparison.recipe import TRAINED, RowSpec
from nndefense.comparison.row import Row
from nndefense.comparison.trained import alp, ensemble_adversarial, ra_cnn
from nndefense.comparison.transforms import quilted, transformed
from nndefense.defenses import NearestNeighborDefense, RelaxedDefense
from nndefense.pipeline.materials import Materials

Maker = Callable[[Materials, RowSpec], Row]


def make_row(materials: Materials, spec: RowSpec) -> Row:
    """Make a row's defence, or say why it is not there."""
    if spec.kind in TRAINED and not materials.scope.training:
        return Row(spec, reason="not trained: this data set has no training settings here, or training was left out")
    return _MAKERS[spec.kind](materials, spec)


def _bare(materials: Materials, spec: RowSpec) -> Row:
    classifier = materials.classifier
    return Row(spec, classifier, facts={"net": classifier.arch or classifier.source})


def _nearest(materials: Materials, spec: RowSpec) -> Row:
    options = dict(spec.options)
    pooling, share = str(options.pop("pooling", "avg")), float(options.pop("share", 1.0))
    chosen = materials.chosen(pooling)
    whole = materials.database(chosen.feature, pooling)
    database = whole
    if share < 1:
        count = max(round(share * len(whole)), 1)
        # One order for all sizes, so that a smaller database is a part of every larger one.
        database = whole.subset(np.random.default_rng(materials.seed).permutation(len(whole))[:count])
    k, weighting = min(int(options.get("k", chosen.k)), len(database)), str(options.get("weighting", chosen.weighting))
    defense = NearestNeighborDefense(materials.classifier, database, k, weighting)
    surface = defense.surface(Knowledge.WHITE, images=materials.rows) if spec.informed else None
    return Row(
        spec,
        defense,
        facts={
            "layer": chosen.feature.layer,
            "pooling": chosen.feature.pooling,
            "dimensions": database.dimension,
            "rows": len(database),
            "k": k,
            "weighting": weighting,
            "calibrated on": chosen.calibration["n"],
            "within the bound on clean accuracy": chosen.calibration["within_bound"],
        },
        white=RelaxedDefense(surface) if surface is not None else None,
        surface=surface,
        database=database.fingerprint,
        database_rows=len(database),
    )


_MAKERS: dict[str, Maker] = {
    "none": _bare,
    "crop-ensemble": transformed,
    "tv-minimization": transformed,
    "jpeg": transformed,
    "bit-depth": transformed,
    "quilting": quilted,
    "ensemble-adversarial": ensemble_adversarial,
    "alp": alp,
    "ra-cnn": ra_cnn,
    "nearest-neighbor": _nearest,
}
