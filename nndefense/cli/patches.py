"""What ``nndefense index patches`` and ``patches-info`` do: open, build and print."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from index_build.patches import build_patches
from nndefense.cli import inputs, output
from nndefense.datasets import open_dataset
from nndefense.defenses.quilting import PatchDatabase
from nndefense.errors import DataError
from nndefense.images import shape_text


def build(
    specs: Sequence[str],
    out: Path,
    *,
    input_shape: tuple[int, int, int] | None,
    data_dir: Path | None,
    limit: int | None,
    as_json: bool,
    options: dict[str, Any],
) -> None:
    """Build a patch database and describe it."""
    if not specs:
        raise DataError("no data set was named: give --dataset")
    channels, size = (None, None) if input_shape is None else (input_shape[0], input_shape[1:])
    opened = [open_dataset(spec, data_dir=data_dir, size=size, channels=channels) for spec in specs]
    images = opened[0] if len(opened) == 1 else inputs.joined(opened)
    if limit is not None:
        images = inputs.drawn(images, limit, options["seed"])
    _describe(build_patches(images, out, specs=specs, **options), as_json)


def info(folder: Path, *, as_json: bool) -> None:
    """Describe a patch database; opening it compares every byte with its checksum."""
    _describe(PatchDatabase.open(folder), as_json)


def _describe(patches: PatchDatabase, as_json: bool) -> None:
    manifest = patches.manifest
    size = sum(entry.bytes for entry in manifest.files.values())
    found = {
        "patches": str(patches.path),
        "count": len(patches),
        "shape": [patches.channels, patches.side, patches.side],
        "storage": manifest.storage,
        "data": manifest.data,
        "seed": manifest.seed,
        "index": manifest.index,
        "fingerprint": patches.fingerprint,
        "bytes": size,
        "created": manifest.created,
        "versions": manifest.versions,
    }
    factory, probes = manifest.index["factory"], manifest.index["probes"]
    search = "none, exact search in torch" if factory is None else factory
    text = (
        f"{patches.path}: {len(patches):,} patches {shape_text((patches.channels, patches.side, patches.side))}, "
        f"{manifest.storage}\n"
        f"index      {search}{f', {probes} lists a search' if probes else ''}\n"
        f"data       {manifest.data['name']} ({manifest.data['images']:,} images)\n"
        f"size       {size / 1e6:.1f} MB, built {manifest.created}"
    )
    output.show(found, text, as_json)
