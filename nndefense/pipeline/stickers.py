"""Stickers for photos of an object: search a place, optimise, measure on photos set apart, and write it all down."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nndefense.attacks.rp2 import (
    Mode,
    Optimised,
    Settings,
    Sticker,
    ViewChanges,
    as_photographed,
    default_palette,
    nearest_printable,
    non_printability,
    search_mask,
)
from nndefense.attacks.rp2 import rp2 as optimise
from nndefense.errors import InputError
from nndefense.files import sealed, write_json
from nndefense.locks import writes
from nndefense.pipeline import sticker_files
from nndefense.pipeline.sticker_scene import Scene
from nndefense.pipeline.sticker_sheet import Answer, search_picture, sheet, write_figure
from nndefense.versions import library_versions


@writes("out")
def make_sticker(
    scene: Scene,
    mask: Path,
    settings: Settings,
    out: Path,
    *,
    palette: Path | None = None,
    hold_out: float = 0.5,
    splits: int = 1,
    views: int = 50,
    width_cm: float = 75.0,
    dpi: int = 100,
) -> dict[str, Any]:
    """Optimise a sticker on a part of the photos, and measure it on the others.

    Args:
        scene: what is attacked.
        mask: a picture of the object's frame, white where stickers may be.
        settings: of the optimiser; with ``seed``, ``seed + 1``, ... for further splits.
        out: folder for ``sticker.npz``, ``sticker.png`` to print, ``sheet.png`` and ``rp2.json``.
        palette: file of printable colours, or None for 30 of ours.
        hold_out: share of the photos set apart, 0 to 0.95.
        splits: how often all is done; the first sticker is kept.
        views: changed views of each photo to measure on.
        width_cm, dpi: of the picture to print.

    Returns:
        Plain values, as in ``rp2.json``.
    """
    area = sticker_files.read_mask(mask, scene.classifier.input_shape[1:])
    colours = default_palette() if palette is None else sticker_files.read_palette(palette)
    scene.halves(hold_out, settings.seed)
    runs = []
    for number in range(splits):
        chosen = replace(settings, seed=settings.seed + number)
        made, run = _one(scene, area, chosen, colours, hold_out, views)
        runs.append(run)
        if number == 0:
            first, (used, apart) = made, scene.halves(hold_out, settings.seed)
    sticker_files.write_sticker(out / "sticker.npz", first.sticker)
    printed = first.sticker.printed(scene.reference(used, (area.shape[1], area.shape[2])))
    size = sticker_files.write_print(out / "sticker.png", printed, area, width_cm=width_cm, dpi=dpi)
    shown, rows = ("held-out", apart) if apart else ("optimised", used)
    _draw(scene, first.sticker, printed, rows, settings, views, out, shown)
    value = {
        "format": "nndefense-rp2-attack",
        "version": 1,
        **scene.to_json(),
        "photos": len(scene.photos),
        "mask": {"pixels": int(area.sum()), "share": float(area.mean())},
        "settings": asdict(settings),
        "palette": "default" if palette is None else str(palette),
        "print": {"width_cm": width_cm, "dpi": dpi, "pixels": list(size)},
        "runs": runs,
        "versions": library_versions(),
    }
    value = sealed(value)
    write_json(out / "rp2.json", value)
    return value


def _one(
    scene: Scene, mask: Tensor, settings: Settings, palette: Tensor, hold_out: float, views: int
) -> tuple[Optimised, dict[str, Any]]:
    """One split: optimise on one part, measure on both."""
    used, apart = scene.halves(hold_out, settings.seed)
    photos, reference = scene.photos.at(used), scene.reference(used, (mask.shape[1], mask.shape[2]))
    made = optimise(
        scene.classifier,
        photos.images,
        mask,
        scene.target,
        matrices=photos.matrices,
        light=scene.light[used],
        reference=reference,
        palette=palette,
        settings=settings,
    )
    rates = scene.rates(made.sticker, apart, "held-out", settings, views) if apart else []
    rates += scene.rates(made.sticker, used, "optimised", settings, views)
    score = 0.0
    if scene.classifier.input_shape[0] == 3:
        scores = non_printability(made.sticker.printed(reference), palette)
        score = float((scores * made.sticker.mask[0]).sum())
        if made.sticker.mode == "replace":
            # What is left of it if every pixel is rounded to a colour that the printer has.
            rounded = nearest_printable(made.sticker.delta, palette) * made.sticker.mask
            rows, name = (apart, "held-out") if apart else (used, "optimised")
            found = scene.rates(replace(made.sticker, delta=rounded), rows, name, settings, views)
            rates += [{**rate, "colours": "rounded to the palette"} for rate in found]
    return made, {
        "seed": settings.seed,
        "optimised_on": photos.names,
        "held_out": scene.photos.at(apart).names,
        "non_printability": score,
        "history": list(made.history),
        "forwards": made.forwards,
        "rates": rates,
    }


@writes("out")
def measure_sticker(
    scene: Scene,
    sticker: str,
    changes: ViewChanges,
    out: Path,
    *,
    mask: Path | None = None,
    mode: Mode = "replace",
    views: int = 50,
    hold_out: float = 0.0,
    seed: int = 0,
) -> dict[str, Any]:
    """Measure a finished sticker on photos.

    Args:
        scene: what is attacked.
        sticker: ``sticker.npz``, or ``FILE.npz:NAME`` of an array h x w x C, with ``mask`` and ``mode`` from elsewhere.
        changes: of the views.
        out: folder for ``sheet.png`` and ``evaluation.json``.
        views: changed views of each photo.
        hold_out: above 0, only the share that :func:`make_sticker` sets apart with the same seed.
        seed: of the views and the share.

    Returns:
        Plain values, as in ``evaluation.json``.
    """
    read = sticker_files.read_sticker(sticker, mask, mode)
    place = scene.photos.images.device
    read = Sticker(read.delta.to(place), read.mask.to(place), read.mode)
    if read.delta.shape[0] != scene.classifier.input_shape[0]:
        raise InputError(f"{sticker} has {read.delta.shape[0]} channels, unlike the photos: use one made for them")
    rows = scene.halves(hold_out, seed)[1] if hold_out else list(range(len(scene.photos)))
    settings = Settings(mode=read.mode, changes=changes, seed=seed)
    rates = scene.rates(read, rows, "measured", settings, views)
    printed = read.printed(scene.reference(rows, (read.mask.shape[1], read.mask.shape[2])))
    _draw(scene, read, printed, rows, settings, views, out, "measured")
    value = {
        "format": "nndefense-rp2-evaluation",
        "version": 1,
        **scene.to_json(),
        "sticker": sticker,
        "mode": read.mode,
        "mask": {"pixels": int(read.mask.sum()), "share": float(read.mask.mean())},
        "photos": scene.photos.at(rows).names,
        "changes": asdict(changes),
        "seed": seed,
        "rates": rates,
        "versions": library_versions(),
    }
    value = sealed(value)
    write_json(out / "evaluation.json", value)
    return value


@writes("out")
def find_mask(
    scene: Scene,
    settings: Settings,
    out: Path,
    *,
    region: Path | None = None,
    area: float = 0.1,
    rectangles: int = 4,
    hold_out: float = 0.5,
) -> dict[str, Any]:
    """Search where a sticker works best, by the l_1 norm, on the photos that are not set apart.

    Args:
        scene: what is attacked.
        settings: of the search.
        out: folder for ``mask.png``, ``saliency.png``, ``search.png`` and ``mask.json``.
        region: a picture, white where a sticker may be at all; None for everywhere.
        area: of the mask, as a share of the region.
        rectangles: at most; 0 for single pixels.
        hold_out: share of the photos that are not looked at, the same as :func:`make_sticker` sets apart.

    Returns:
        Plain values, as in ``mask.json``.
    """
    size = scene.classifier.input_shape[1:]
    allowed = torch.ones(1, *size) if region is None else sticker_files.read_mask(region, size)
    used, _ = scene.halves(hold_out, settings.seed)
    photos = scene.photos.at(used)
    found = search_mask(
        scene.classifier,
        photos.images,
        allowed,
        scene.target,
        area=area,
        rectangles=rectangles or None,
        matrices=photos.matrices,
        light=scene.light[used],
        settings=settings,
    )
    sticker_files.write_grey(out / "mask.png", found.mask[0])
    sticker_files.write_grey(out / "saliency.png", found.saliency / found.saliency.max())
    reference = scene.reference(used, (size[0], size[1]))
    write_figure(out / "search.png", search_picture(reference, found.saliency, found.mask))
    value = {
        "format": "nndefense-rp2-mask",
        "version": 1,
        **scene.to_json(),
        "searched_on": photos.names,
        "pixels": int(found.mask.sum()),
        "region_pixels": int(allowed.sum()),
        "area": area,
        "rectangles": rectangles,
        "settings": asdict(settings),
        "forwards": found.forwards,
        "versions": library_versions(),
    }
    value = sealed(value)
    write_json(out / "mask.json", value)
    return value


def _draw(
    scene: Scene,
    sticker: Sticker,
    printed: Tensor,
    rows: list[int],
    settings: Settings,
    views: int,
    out: Path,
    name: str,
) -> None:
    """Write the sheet: photos as they are and from one changed view, without and with the sticker."""
    photos, drawn = scene.photos.at(rows), []
    pasted = sticker.on(photos.images, photos.matrices, scene.light[rows])
    for title, changes in (("photo", None), ("changed view", settings.changes)):
        if changes is None and title != "photo":
            continue
        generator = torch.Generator().manual_seed(settings.seed + 1_000_003)
        view = as_photographed(len(rows)) if changes is None else changes.draw(len(rows), generator)
        for suffix, images in (("", photos.images), (" + sticker", pasted)):
            seen = view(images)
            drawn.append((title + suffix, seen, _answers(scene, seen)))
    rate = scene.seen(sticker, rows, None, 1, settings.seed).rate(scene.truth, scene.target)
    title = f"{scene.aim}: {rate.hits} of {rate.views} {name} photos"
    if settings.changes is not None:
        changed = scene.seen(sticker, rows, settings.changes, views, settings.seed).rate(scene.truth, scene.target)
        title += f", {changed.hits} of {changed.views} of their changed views"
    write_figure(out / "sheet.png", sheet(photos.names, drawn, printed, sticker.mask, title))


@torch.no_grad()
def _answers(scene: Scene, images: Tensor) -> list[Answer]:
    values, places = scene.classifier(images).softmax(1).max(1)
    kinds = {scene.target: "target", scene.truth: "truth"}
    return [
        (scene.classifier.classes[int(place)], float(value), kinds.get(int(place), "other"))
        for value, place in zip(values, places, strict=True)
    ]
