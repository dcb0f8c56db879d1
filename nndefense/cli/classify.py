"""``nndefense classify``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from nndefense.cli.declare import Only
from nndefense.cli.options import BatchOption, Common, DatabaseOptions, KOption, WeightingOption
from nndefense.cli.streams import one_line
from nndefense.errors import InputError


def classify(
    images: Annotated[list[Path], typer.Argument(help="Image files.")],
    *,
    data: DatabaseOptions,
    k: KOption = None,
    weighting: WeightingOption = None,
    top: Annotated[int, typer.Option(min=1, help="Classes and neighbours to show.")] = 5,
    convert: Annotated[bool, typer.Option("--convert", help="Turn grey images to colour, or colour to grey.")] = False,
    reject_rate: Annotated[
        float | None, typer.Option(help="Mark images farther away than all but this share of clean ones.")
    ] = None,
    batch_size: BatchOption = 64,
    common: Annotated[Common, Only("device", "json", "debug")],
) -> None:
    """Classify image files from their nearest neighbours, beside what the bare classifier says."""
    from nndefense.datasets import image_channels
    from nndefense.guard import Guard

    guard = Guard.open(**data.guard(common), k=k, weighting=weighting, reject_rate=reject_rate)
    channels = guard.input_shape[0]
    for path in images:
        if not convert and image_channels(path) != channels:
            kind, wanted = ("in colour", "grey") if channels == 1 else ("grey", "colour")
            raise InputError(f"{path} is {kind}, but the classifier takes {wanted} images: give --convert")
    found, lines = [], []
    said_of = guard.stream(list(images), top=top, neighbors=top, batch_size=batch_size)
    for path, said in zip(images, said_of, strict=True):
        found.append({"file": str(path), **said.to_json()})
        marks = ["they disagree"] if not said.agree else []
        marks += [] if said.percentile is None else [f"farther than {said.percentile:.1f} % of clean images"]
        marks += ["too far: rejected"] if said.abstained else []
        lines.append(
            f"{one_line(path)}: {one_line(said.class_name)} {said.probability:.3f}; "
            f"bare classifier: {one_line(said.bare.class_name)} {said.bare.probability:.3f}"
            + (f"   ({'; '.join(marks)})" if marks else "")
        )
        lines += [
            f"    {one_line(n.class_name):<12} weight {n.weight:.3f}  distance {n.distance:.3f}  {one_line(n.id)}"
            for n in said.neighbors
        ]
    common.show({"k": guard.k, "weighting": guard.weighting, "images": found}, "\n".join(lines))
