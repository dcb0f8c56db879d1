"""The pipeline: from names of images and nets to a calibrated defence and its measurement, every step checked."""

from __future__ import annotations

from typing import TYPE_CHECKING

from nndefense.faces import importing

if TYPE_CHECKING:
    from nndefense.pipeline import defenses
    from nndefense.pipeline.attacking import write_attacked
    from nndefense.pipeline.calibrating import (
        DEFAULT_POOLINGS,
        Candidates,
        Chosen,
        attacked_images,
        build_calibrated,
        choose,
    )
    from nndefense.pipeline.checks import (
        check_disjoint,
        check_not_calibrated_on,
        check_not_in_database,
        check_surrogate,
    )
    from nndefense.pipeline.demo import DemoSettings, run_demo
    from nndefense.pipeline.evaluating import Opened, evaluate, headline_of, measure, open_recipe
    from nndefense.pipeline.finished import find_or_build, find_or_train
    from nndefense.pipeline.making import Made, make_defense, subject_of
    from nndefense.pipeline.materials import Materials, MaterialSettings
    from nndefense.pipeline.opening import (
        drawn,
        joined,
        neighbor_pictures,
        open_classifier,
        open_datasets,
        reported_split,
        split,
    )

_NAMES = {
    "attacking": ("write_attacked",),
    "calibrating": (
        "DEFAULT_POOLINGS", "Candidates", "Chosen", "attacked_images", "build_calibrated", "choose",
    ),
    "checks": ("check_disjoint", "check_not_calibrated_on", "check_not_in_database", "check_surrogate"),
    "demo": ("DemoSettings", "run_demo"),
    "evaluating": ("Opened", "evaluate", "headline_of", "measure", "open_recipe"),
    "finished": ("find_or_build", "find_or_train"),
    "making": ("Made", "make_defense", "subject_of"),
    "materials": ("MaterialSettings", "Materials"),
    "opening": (
        "drawn", "joined", "neighbor_pictures", "open_classifier", "open_datasets", "split", "reported_split",
    ),
}  # fmt: skip

# Imported when they are first used: the registry of defences is asked by commands that need no torch.
__getattr__ = importing(
    __name__,
    {name: f"{__name__}.{home}" for home, names in _NAMES.items() for name in names}
    | {"defenses": f"{__name__}.defenses"},
)

__all__ = [
    "DEFAULT_POOLINGS",
    "Candidates",
    "Chosen",
    "DemoSettings",
    "Made",
    "MaterialSettings",
    "Materials",
    "Opened",
    "attacked_images",
    "build_calibrated",
    "check_disjoint",
    "check_not_calibrated_on",
    "check_not_in_database",
    "check_surrogate",
    "choose",
    "defenses",
    "drawn",
    "evaluate",
    "find_or_build",
    "find_or_train",
    "headline_of",
    "joined",
    "make_defense",
    "measure",
    "neighbor_pictures",
    "open_classifier",
    "open_datasets",
    "open_recipe",
    "reported_split",
    "run_demo",
    "split",
    "subject_of",
    "write_attacked",
]
