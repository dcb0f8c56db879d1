"""The rows that transform the image before the net sees it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from index_build.patches import build_patches
from nndefense.comparison.recipe import RowSpec
from nndefense.comparison.row import Row
from nndefense.defenses.quilting import PatchDatabase, quilting
from nndefense.defenses.transforms import bit_depth_reduction, crop_ensemble, jpeg_compression, tv_minimization
from nndefense.errors import DatabaseError
from nndefense.pipeline.materials import Materials

_FACTORIES: dict[str, Callable[..., Any]] = {
    "crop-ensemble": crop_ensemble,
    "tv-minimization": tv_minimization,
    "jpeg": jpeg_compression,
    "bit-depth": bit_depth_reduction,
}
# What is told of each where the recipe says nothing.
_WORDS = {
    "tv-minimization": "half of the pixels kept at random, isotropic, weight 0.03",
    "quilting": "the nearest patch of 5 x 5 pixels, overlap 2",
    "jpeg": "quality 75",
    "bit-depth": "3 bits",
}


def transformed(materials: Materials, spec: RowSpec) -> Row:
    """Crops, total variation, JPEG or fewer bits before the classifier."""
    options, form = dict(spec.options), _form(spec)
    if spec.kind == "crop-ensemble":
        size = options.setdefault("size", materials.scope.crop)
        form = f"{options.get('crops', 30)} crops of {size:.2g} of the side"
    defense = _FACTORIES[spec.kind](materials.classifier, **options)
    return Row(spec, defense, facts={"form": form}, white=_white(materials, spec, defense))


def quilted(materials: Materials, spec: RowSpec) -> Row:
    """Image quilting with patches of the comparison's own images."""
    patches = _patches(materials)
    defense = quilting(materials.classifier, patches, **spec.options)
    return Row(
        spec,
        defense,
        facts={"form": _form(spec), "patches": len(patches), "fingerprint": patches.fingerprint[:16]},
        white=_white(materials, spec, defense),
        database=patches.fingerprint,
        database_rows=len(patches),
    )


def _patches(materials: Materials) -> PatchDatabase:
    folder, rows = materials.out / "patches", materials.rows
    try:
        found = PatchDatabase.open(folder)
        if found.manifest.data["fingerprint"] == rows.fingerprint:
            return found
    except DatabaseError:
        pass
    materials.say(f"cutting {materials.scope.patches:,} patches")
    return build_patches(
        rows,
        folder,
        patches=materials.scope.patches,
        specs=materials.specs,
        seed=materials.seed,
        overwrite=True,
        progress=materials.progress,
    )


def _form(spec: RowSpec) -> str:
    given = ", ".join(f"{name} {value}" for name, value in spec.options.items())
    return given or _WORDS.get(spec.kind, "")


def _white(materials: Materials, spec: RowSpec, defense: Any) -> nn.Module | None:
    if not spec.informed:
        return None
    found: nn.Module = defense.attack_model(draws=materials.scope.draws)
    return found
