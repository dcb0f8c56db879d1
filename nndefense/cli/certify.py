"""``nndefense certify``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from nndefense.attacks import registry as attacks
from nndefense.certificates import registry
from nndefense.cli.declare import OneOf
from nndefense.cli.options import (
    Common,
    EpsOption,
    ImagesOption,
    LimitOption,
    MeasuredOption,
    OwnOptions,
    RuleOptions,
    SigmaOption,
    command_line,
    numbers,
)


def certify(
    *,
    dataset: MeasuredOption,
    out: Annotated[Path, typer.Option(help="Folder for certificates.json and finished cells.")],
    method: Annotated[str, OneOf("How.", registry.names)] = "smoothing",
    classifier: Annotated[
        str | None,
        typer.Option(help="As for the other commands [default: the one that --database names]."),
    ] = None,
    database: Annotated[
        Path | None, typer.Option(help="Folder of the image database [default: the classifier alone].")
    ] = None,
    images: ImagesOption = None,
    rule: RuleOptions,
    norm: Annotated[str | None, OneOf("Of the radii [default: l2, or the method's own].", attacks.NORMS)] = None,
    eps: EpsOption = "0.05,0.1,0.15,0.2,0.25,0.3",
    sigma: SigmaOption = None,
    draws_select: Annotated[int, typer.Option(min=1, help="Draws that choose an image's class.")] = 100,
    draws: Annotated[int, typer.Option(min=1, help="Draws that bound its chance.")] = 10_000,
    confidence: Annotated[
        float, typer.Option(help="1 - alpha: the least chance, for each image, that what is said of it holds.")
    ] = 0.999,
    limit: LimitOption = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Images, or noisy copies of them, per forward pass.")] = 512,
    own: OwnOptions,
    common: Common,
) -> None:
    """Prove how far no change of an image changes what is answered: a radius for each image.

    Started again with the same --out, it goes on where it was stopped.
    """
    from nndefense import pipeline

    settings = pipeline.CertifySettings(
        method=method,
        dataset=dataset,
        eps=numbers("--eps", eps),
        norm=norm,
        sigma=sigma,
        draws_select=draws_select,
        draws=draws,
        confidence=confidence,
        limit=limit,
        batch_size=batch_size,
        seed=common.seed,
    )
    results = pipeline.certify(
        settings,
        out,
        classifier=classifier,
        database=database,
        **rule.asked(),
        classes=own.classes,
        input_shape=own.shape,
        images=images or (),
        data_dir=common.data_dir,
        device=common.device,
        progress=common.progress,
        command=command_line(),
        say=common.say,
    )
    common.show(results, f"{pipeline.certified_text(results)}\nresults: {out / 'certificates.json'}")
