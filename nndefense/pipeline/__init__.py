"""The pipeline: from names of images and nets to a calibrated defence and its measurement, every step checked.

The names are imported when they are first used, so that :mod:`nndefense.pipeline.defenses` lists the defences at once.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from nndefense.faces import importing

if TYPE_CHECKING:
    from nndefense.pipeline import defenses
    from nndefense.pipeline.attacking import write_attacked
    from nndefense.pipeline.calibrating import Candidates, Chosen, NothingBetterError, build_calibrated, choose
    from nndefense.pipeline.certifying import CertifySettings, certified_text, certify, certify_images
    from nndefense.pipeline.checks import (
        check_disjoint,
        check_not_calibrated_on,
        check_not_in_database,
        check_surrogate,
    )
    from nndefense.pipeline.demo import DemoSettings, run_demo
    from nndefense.pipeline.evaluating import evaluate, headline_of
    from nndefense.pipeline.making import Made, make_defense, subject_of, with_known_seed
    from nndefense.pipeline.materials import Materials, MaterialSettings
    from nndefense.pipeline.opening import (
        drawn,
        open_classifier,
        open_datasets,
        reported_split,
        split,
        training_shape,
    )
    from nndefense.pipeline.sealing import check_parts, seal_records
    from nndefense.pipeline.units import study_units

_NAMES = {
    "attacking": "write_attacked",
    "calibrating": "Candidates Chosen NothingBetterError build_calibrated choose",
    "certifying": "CertifySettings certified_text certify certify_images",
    "checks": "check_disjoint check_not_calibrated_on check_not_in_database check_surrogate",
    "demo": "DemoSettings run_demo",
    "evaluating": "evaluate headline_of",
    "making": "Made make_defense subject_of with_known_seed",
    "materials": "MaterialSettings Materials",
    "opening": "drawn open_classifier open_datasets reported_split split training_shape",
    "sealing": "check_parts seal_records",
    "units": "study_units",
}
_HOMES = {name: f"{__name__}.{module}" for module, names in _NAMES.items() for name in names.split()}
__getattr__ = importing(__name__, _HOMES | {"defenses": f"{__name__}.defenses"})

__all__ = [
    "Candidates", "CertifySettings", "Chosen", "DemoSettings", "Made", "MaterialSettings", "Materials",
    "NothingBetterError", "build_calibrated", "certified_text", "certify", "certify_images", "check_disjoint",
    "check_not_calibrated_on", "check_not_in_database", "check_parts", "check_surrogate", "choose", "defenses",
    "drawn", "evaluate", "headline_of", "make_defense", "open_classifier", "open_datasets", "reported_split",
    "run_demo", "seal_records", "split", "study_units", "subject_of", "training_shape", "with_known_seed",
    "write_attacked",
]  # fmt: skip
