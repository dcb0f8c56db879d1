"""The photos of an object with the classifier that is to take it for another thing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nndefense.attacks.rp2 import RELEASED, Rate, Seen, Settings, Sticker, ViewChanges, look, paper_white, warp
from nndefense.errors import InputError
from nndefense.models import Classifier
from nndefense.pipeline import sticker_files

_CAMERA, _CHANGED, _RELEASED = "as photographed", "changed views", "the released code's view changes"


@dataclass(frozen=True)
class Scene:
    """What is attacked.

    Attributes:
        classifier: that is to be fooled; its parameters need no gradients.
        truth, target: the class of the object, and the one to be seen instead.
        photos: of the object.
        light: N, what share of full light falls on each photo's sticker.
        shade: whether that was judged from the photos.
    """

    classifier: Classifier
    truth: int
    target: int
    photos: sticker_files.Photos
    light: Tensor
    shade: bool

    @property
    def aim(self) -> str:
        """The two classes in words."""
        return f"{self.classifier.classes[self.truth]} -> {self.classifier.classes[self.target]}"

    def halves(self, hold_out: float, seed: int) -> tuple[list[int], list[int]]:
        """The photos to optimise on, and those set apart; the same whenever the seed is the same."""
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

    def seen(self, sticker: Sticker, rows: list[int], changes: ViewChanges | None, views: int, seed: int) -> Seen:
        """What the classifier sees on some photos with the sticker and without it."""
        photos = self.photos.at(rows)
        return look(
            self.classifier,
            photos.images,
            sticker,
            matrices=photos.matrices,
            light=self.light[rows],
            changes=changes,
            views=views,
            # Not the views that the optimiser saw, which are drawn from the same seed.
            seed=seed + 1_000_003,
        )

    def rates(
        self, sticker: Sticker, rows: list[int], name: str, settings: Settings, views: int
    ) -> list[dict[str, Any]]:
        """The paper's ratio on some photos: as they are, with the view changes, and with the released code's."""
        found = []
        for title, changes in ((_CAMERA, None), (_CHANGED, settings.changes), (_RELEASED, RELEASED)):
            if changes is None and title != _CAMERA:
                continue
            rate = self.seen(sticker, rows, changes, views, settings.seed).rate(self.truth, self.target)
            found.append({"photos": name, "views": title, **_rate_json(rate)})
        return found


def open_scene(
    classifier: Classifier, photos: Path, true: str, target: str, *, corners: Path | None = None, shade: bool = True
) -> Scene:
    """Read the photos of a folder.

    Args:
        classifier: that is to be fooled, on the device where all is computed.
        photos: the folder.
        true: the object's class, by its name or number.
        target: the class to be seen instead.
        corners: where the object's frame is in each photo; see :func:`read_photos`.
        shade: make the sticker as dark as each photo.

    Raises:
        InputError: classes that do not exist, or are one.
        DataError: photos or corners that cannot be read.
    """
    classifier.requires_grad_(False)
    truth, aim = _class(classifier, true, "--true"), _class(classifier, target, "--target")
    if truth == aim:
        raise InputError(f"--true and --target are both {classifier.classes[truth]}: aim at another class")
    read = sticker_files.read_photos(photos, classifier.input_shape, corners)
    place = classifier.device
    read = sticker_files.Photos(read.names, read.images.to(place), read.matrices.to(place))
    light = paper_white(read.images, read.matrices) if shade else torch.ones(len(read), device=place)
    return Scene(classifier, truth, aim, read, light, shade)


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
