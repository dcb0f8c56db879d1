"""``nndefense classify``."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from nndefense.cli.declare import Only
from nndefense.cli.options import BatchOption, Common, DatabaseOptions, RuleOptions
from nndefense.cli.streams import one_line
from nndefense.errors import InputError, NNDefenseError

if TYPE_CHECKING:
    from torch import Tensor


def classify(
    images: Annotated[list[Path], typer.Argument(help="Image files.")],
    *,
    data: DatabaseOptions,
    rule: RuleOptions,
    top: Annotated[int, typer.Option(min=1, help="Classes and neighbours to show.")] = 5,
    convert: Annotated[bool, typer.Option("--convert", help="Turn grey images to colour, or colour to grey.")] = False,
    reject_rate: Annotated[
        float | None, typer.Option(help="Mark images farther away than all but this share of clean ones.")
    ] = None,
    batch_size: BatchOption = 64,
    common: Annotated[Common, Only("device", "json", "quiet", "debug")],
) -> None:
    """Classify image files from their nearest neighbours, beside what the bare classifier says.

    A file that cannot be classified is named and the others are answered; the exit code is then that of its error.
    """
    from nndefense.datasets import SourceError, image_channels, load_image
    from nndefense.guard import Guard

    guard = Guard.open(**data.guard(common), **rule.asked(), reject_rate=reject_rate)
    channels, *size = guard.input_shape
    bad: dict[int, NNDefenseError] = {}

    def readable() -> Iterator[Tensor]:
        """The images that can be classified, and note of the others."""
        for place, path in enumerate(images):
            try:
                if not convert and image_channels(path) != channels:
                    kind, wanted = ("in colour", "grey") if channels == 1 else ("grey", "colour")
                    raise InputError(f"{path} is {kind}, but the classifier takes {wanted} images: give --convert")
                yield load_image(path, channels=channels, size=(size[0], size[1]))
            except SourceError:  # noqa: PERF203
                raise
            except NNDefenseError as error:
                bad[place] = error

    said_of = list(guard.stream(readable(), top=top, neighbors=top, batch_size=batch_size))
    answers, found, lines = iter(said_of), [], []
    for place, path in enumerate(images):
        if place in bad:
            found.append({"file": str(path), "error": str(bad[place])})
            continue
        said = next(answers)
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
    if said_of or common.json:
        common.show({**guard.rule.settings, "images": found}, "\n".join(lines))
    for error in bad.values():
        print(f"nndefense: error: {one_line(error)}", file=sys.stderr)
    if bad:
        raise typer.Exit(next(iter(bad.values())).exit_code)
