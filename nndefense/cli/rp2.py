"""What ``nndefense rp2`` does: read, search or optimise, measure on photos set apart, write and print."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nndefense.attacks.rp2 import (
    RELEASED,
    Mode,
    Optimised,
    Rate,
    Seen,
    Settings,
    Sticker,
    ViewChanges,
    as_photographed,
    default_palette,
    look,
    nearest_printable,
    non_printability,
    paper_white,
    search_mask,
    warp,
)
from nndefense.attacks.rp2 import rp2 as optimise
from nndefense.cli import inputs, rp2_files
from nndefense.cli.rp2_sheet import Answer, rate_line, search_picture, sheet, write_figure
from nndefense.errors import InputError
from nndefense.files import json_text, make_folder, write_json
from nndefense.models import Classifier
from nndefense.versions import library_versions

_CAMERA, _CHANGED, _RELEASED = "as photographed", "changed views", "the released code's view changes"


@dataclass(frozen=True)
class Scene:
    """What every subcommand starts from."""

    classifier: Classifier
    truth: int
    target: int
    photos: rp2_files.Photos
    light: Tensor
    shade: bool

    def halves(self, hold_out: float, seed: int) -> tuple[list[int], list[int]]:
        """The photos to optimise on, and those set apart; the same in every subcommand with the same seed."""
        n = len(self.photos)
        apart = round(hold_out * n)
        if apart >= n:
            raise InputError(f"{n} photos leave none to optimise on: give more photos, or lower --hold-out")
        if hold_out > 0 and apart == 0:
            raise InputError(f"{n} photos leave none to measure on: give more photos, or set --hold-out 0")
        order = torch.randperm(n, generator=torch.Generator().manual_seed(seed)).tolist()
        return sorted(order[apart:]), sorted(order[:apart])

    def reference(self, rows: Sequence[int], size: tuple[int, int]) -> Tensor:
        """The object as it looks on average in the canonical frame under full light: C x h x w."""
        photos = self.photos.at(rows)
        flat = warp(photos.images, torch.linalg.inv(photos.matrices), size, padding="border")
        return (flat / self.light[list(rows)].to(flat).view(-1, 1, 1, 1)).clamp(0, 1).mean(0)

    def to_json(self) -> dict[str, Any]:
        """What was attacked, for a results file."""
        names = self.classifier.classes
        return {
            "classifier": {"source": self.classifier.source, "fingerprint": self.classifier.fingerprint},
            "true": {"index": self.truth, "name": names[self.truth]},
            "target": {"index": self.target, "name": names[self.target]},
            "shade": self.shade,
        }


def open_scene(
    photos: Path,
    source: str,
    true: str,
    target: str,
    *,
    corners: Path | None,
    shade: bool,
    classes: Path | None,
    input_shape: tuple[int, int, int] | None,
    device: str,
) -> Scene:
    """Load the classifier and the photos."""
    classifier = inputs.open_classifier(source, device=device, classes=classes, input_shape=input_shape)
    classifier.requires_grad_(False)
    truth, aim = _class(classifier, true, "--true"), _class(classifier, target, "--target")
    if truth == aim:
        raise InputError(f"--true and --target are both {classifier.classes[truth]}: aim at another class")
    read = rp2_files.read_photos(photos, classifier.input_shape, corners)
    place = classifier.device
    read = rp2_files.Photos(read.names, read.images.to(place), read.matrices.to(place))
    light = paper_white(read.images, read.matrices) if shade else torch.ones(len(read), device=place)
    return Scene(classifier, truth, aim, read, light, shade)


def attack(
    scene: Scene,
    mask: Path,
    settings: Settings,
    *,
    palette: Path | None,
    hold_out: float,
    splits: int,
    views: int,
    width_cm: float,
    dpi: int,
    out: Path,
    as_json: bool,
) -> None:
    """Optimise a sticker on a part of the photos, and measure it on the others."""
    area = rp2_files.read_mask(mask, scene.classifier.input_shape[1:])
    colours = default_palette() if palette is None else rp2_files.read_palette(palette)
    scene.halves(hold_out, settings.seed)
    make_folder(out)
    runs = []
    for number in range(splits):
        chosen = replace(settings, seed=settings.seed + number)
        made, run = _one(scene, area, chosen, colours, hold_out, views)
        runs.append(run)
        if number == 0:
            first, (used, apart) = made, scene.halves(hold_out, settings.seed)
    rp2_files.write_sticker(out / "sticker.npz", first.sticker)
    printed = first.sticker.printed(scene.reference(used, (area.shape[1], area.shape[2])))
    size = rp2_files.write_print(out / "sticker.png", printed, area, width_cm=width_cm, dpi=dpi)
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
    write_json(out / "rp2.json", value)
    text = f"{_aim(scene)}, mask {value['mask']['share']:.1%} of the frame"
    for run in runs:
        text += f"\nsplit {run['seed']}: optimised on {len(run['optimised_on'])} photos"
        text += "".join(f"\n  {rate_line(row)}" for row in run["rates"])
    text += f"\nto print: {out / 'sticker.png'}; sheet: {out / 'sheet.png'}; numbers: {out / 'rp2.json'}"
    print(json_text(value).rstrip() if as_json else text)


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
    rates = _rates(scene, made.sticker, apart, "held-out", settings, views) if apart else []
    rates += _rates(scene, made.sticker, used, "optimised", settings, views)
    score = 0.0
    if scene.classifier.input_shape[0] == 3:
        scores = non_printability(made.sticker.printed(reference), palette)
        score = float((scores * made.sticker.mask[0]).sum())
        if made.sticker.mode == "replace":
            # What is left of it if every pixel is rounded to a colour that the printer has.
            rounded = nearest_printable(made.sticker.delta, palette) * made.sticker.mask
            rows, name = (apart, "held-out") if apart else (used, "optimised")
            found = _rates(scene, replace(made.sticker, delta=rounded), rows, name, settings, views)
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


def evaluate(
    scene: Scene,
    sticker: str,
    mask: Path | None,
    mode: Mode,
    changes: ViewChanges,
    *,
    views: int,
    hold_out: float,
    seed: int,
    out: Path,
    as_json: bool,
) -> None:
    """Measure a finished sticker on photos."""
    read = rp2_files.read_sticker(sticker, mask, mode)
    place = scene.photos.images.device
    read = Sticker(read.delta.to(place), read.mask.to(place), read.mode)
    if read.delta.shape[0] != scene.classifier.input_shape[0]:
        raise InputError(f"{sticker} has {read.delta.shape[0]} channels, unlike the photos: use one made for them")
    rows = scene.halves(hold_out, seed)[1] if hold_out else list(range(len(scene.photos)))
    settings = Settings(mode=read.mode, changes=changes, seed=seed)
    make_folder(out)
    rates = _rates(scene, read, rows, "measured", settings, views)
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
    write_json(out / "evaluation.json", value)
    text = "\n".join([_aim(scene), *(rate_line(row) for row in rates)])
    text += f"\nsheet: {out / 'sheet.png'}; numbers: {out / 'evaluation.json'}"
    print(json_text(value).rstrip() if as_json else text)


def find_mask(
    scene: Scene,
    region: Path | None,
    settings: Settings,
    *,
    area: float,
    rectangles: int,
    hold_out: float,
    out: Path,
    as_json: bool,
) -> None:
    """Search where a sticker works best, by the l_1 norm, on the photos that are not set apart."""
    size = scene.classifier.input_shape[1:]
    allowed = torch.ones(1, *size) if region is None else rp2_files.read_mask(region, size)
    used, _ = scene.halves(hold_out, settings.seed)
    photos = scene.photos.at(used)
    make_folder(out)
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
    rp2_files.write_grey(out / "mask.png", found.mask[0])
    rp2_files.write_grey(out / "saliency.png", found.saliency / found.saliency.max())
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
    write_json(out / "mask.json", value)
    text = f"{value['pixels']} of {value['region_pixels']} pixels of the region, found on {len(used)} photos"
    text += f"\nmask: {out / 'mask.png'}; picture: {out / 'search.png'}"
    print(json_text(value).rstrip() if as_json else text)


def _rates(
    scene: Scene, sticker: Sticker, rows: list[int], name: str, settings: Settings, views: int
) -> list[dict[str, Any]]:
    """The paper's ratio on some photos: as they are, with the view changes, and with the released code's."""
    found = []
    for title, changes in ((_CAMERA, None), (_CHANGED, settings.changes), (_RELEASED, RELEASED)):
        if changes is None and title != _CAMERA:
            continue
        rate = _look(scene, sticker, rows, changes, views, settings.seed).rate(scene.truth, scene.target)
        found.append({"photos": name, "views": title, **_rate_json(rate)})
    return found


def _look(scene: Scene, sticker: Sticker, rows: list[int], changes: ViewChanges | None, views: int, seed: int) -> Seen:
    photos = scene.photos.at(rows)
    return look(
        scene.classifier,
        photos.images,
        sticker,
        matrices=photos.matrices,
        light=scene.light[rows],
        changes=changes,
        views=views,
        # Not the views that the optimiser saw, which are drawn from the same seed.
        seed=seed + 1_000_003,
    )


def _rate_json(rate: Rate) -> dict[str, Any]:
    interval = rate.interval
    return {
        "hits": rate.hits,
        "right_without": rate.views,
        "shown": rate.shown,
        "photos_counted": rate.photos,
        "rate": rate.value,
        "interval": None if interval is None else list(interval),
    }


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
    rate = _look(scene, sticker, rows, None, 1, settings.seed).rate(scene.truth, scene.target)
    title = f"{_aim(scene)}: {rate.hits} of {rate.views} {name} photos"
    if settings.changes is not None:
        changed = _look(scene, sticker, rows, settings.changes, views, settings.seed).rate(scene.truth, scene.target)
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


def _class(classifier: Classifier, text: str, option: str) -> int:
    """A class by its name or its number."""
    names = classifier.classes
    if text in names:
        if names.count(text) > 1:
            raise InputError(f"{option}: several classes are called {text}: give the number")
        return names.index(text)
    if text.isdigit() and int(text) < len(names):
        return int(text)
    raise InputError(
        f"{option} is {text}, which is no class: give one of {len(names)} names ({names[0]} ... {names[-1]}) "
        f"or a number from 0 to {len(names) - 1}"
    )


def _aim(scene: Scene) -> str:
    names = scene.classifier.classes
    return f"{names[scene.truth]} -> {names[scene.target]}"
