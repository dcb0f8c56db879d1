"""How a layer's output is laid out, looked at and not assumed: maps with the channels first or last, or tokens."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from nndefense.errors import InputError
from nndefense.features.taps import PROBES, tapped
from nndefense.images import shape_text
from nndefense.modes import evaluating

# A class token, a distillation token and some registers; more than that is no prefix but another grid.
_MOST_PREFIX = 16
_LAST = (nn.Linear, nn.LayerNorm)
_FIRST = (nn.Conv1d, nn.Conv2d, nn.BatchNorm1d, nn.BatchNorm2d, nn.GroupNorm)


@dataclass(frozen=True)
class OutputLayout:
    """Which axis of a layer's output is which.

    Attributes:
        channels_last: N x H x W x C or N x T x C, as in Swin and ViT, and not N x C x H x W or N x C x T.
        batch_second: T x N x C, as in transformers that are not "batch first".
        prefix: tokens before those of the patches: a class token, and perhaps a distillation token or registers.
        grid: H and W of the patches on the image that was looked at, or None where tokens form no grid.
    """

    channels_last: bool = False
    batch_second: bool = False
    prefix: int = 0
    grid: tuple[int, int] | None = None

    def arranged(self, output: Tensor) -> Tensor:
        """The output as N x C x H x W, or tokens, prefix and all, as N x C x T."""
        if self.batch_second:
            output = output.transpose(0, 1)
        return output.movedim(-1, 1) if self.channels_last else output

    def side(self, patches: int) -> tuple[int, int] | None:
        """H and W of so many patches: those of the grid, or of one of its proportions on an image of another size."""
        if self.grid is None:
            return None
        height, width = self.grid
        scaled = round(math.sqrt(patches * height / width))
        return (scaled, patches // scaled) if scaled and patches % scaled == 0 else None


@torch.no_grad()
def layouts_in(net: nn.Module, layers: Sequence[str], example: Tensor) -> dict[str, OutputLayout]:
    """The layouts of these layers' outputs, in the order that they are named.

    Maps: on a square image the two equal sides tell; where they do not, a pass with an image of twice the width shows
    which axis grows; for a net that takes no other width, the kind of the last module that ran. Tokens: their number
    is that of the patches of the last convolution (or a square), and the few before that.

    Args:
        net: the whole classifier.
        layers: paths in it.
        example: images N x C x H x W that it takes; the first is used.

    Raises:
        InputError: a layer whose output has no axis for the images, as windows of attention have none.
    """
    images = example[:1].repeat(PROBES, 1, 1, 1)
    with evaluating(net):
        seen = _look(net, layers, images)
        wider: dict[str, _Seen] | None = None
        found = {}
        for name, own in seen.items():
            batch_second = len(own.shape) == 3 and own.shape[0] != PROBES == own.shape[1]
            if own.shape[:1] != (PROBES,) and not batch_second:
                raise InputError(
                    f"the layer {name!r} gives {shape_text(own.shape)} for {PROBES} images, and not one output an "
                    "image: choose the module around it"
                )
            if len(own.shape) == 3:
                found[name] = _tokens(own, batch_second)
            elif len(own.shape) == 4:
                last = _last_by_shape(own.shape, own.image)
                if last is None:
                    wider = _look_wider(net, layers, images[:1]) if wider is None else wider
                    last = _last_by_growth(own.shape, wider[name].shape) if name in wider else None
                found[name] = OutputLayout(channels_last=own.channels_last if last is None else last)
            else:
                found[name] = OutputLayout()
    return found


@dataclass(frozen=True)
class _Seen:
    """A layer's output, and what ran up to it: the last module that knows its axes, and the last convolution's map."""

    shape: tuple[int, ...]
    module: type[nn.Module]
    map: tuple[int, int, int] | None
    image: tuple[int, int]

    @property
    def channels_last(self) -> bool:
        """Whether the last module that ran has its channels in the last axis."""
        return issubclass(self.module, _LAST)


def _look(net: nn.Module, layers: Sequence[str], images: Tensor) -> dict[str, _Seen]:
    ran: type[nn.Module] = nn.Module
    map_: tuple[int, int, int] | None = None
    image = (images.shape[2], images.shape[3])

    def watch(module: nn.Module, args: object, output: object) -> None:
        nonlocal ran, map_
        if isinstance(output, Tensor) and output.dim() > 2:
            ran = type(module)
            if isinstance(module, nn.Conv2d) and output.dim() == 4:
                map_ = (output.shape[1], output.shape[2], output.shape[3])

    hooks = [module.register_forward_hook(watch) for module in net.modules() if isinstance(module, (*_LAST, *_FIRST))]
    try:
        with tapped(
            net, list(dict.fromkeys(layers)), lambda name, output: _Seen(tuple(output.shape), ran, map_, image)
        ) as seen:
            net(images)
            return {name: seen[name] for name in layers}
    finally:
        for hook in hooks:
            hook.remove()


def _look_wider(net: nn.Module, layers: Sequence[str], images: Tensor) -> dict[str, _Seen]:
    try:
        return _look(net, layers, torch.cat([images, images], dim=3))
    except Exception:
        # A stranger's forward method, on an image of a size that it may not take, fails in ways of its own.
        return {}


def _last_by_shape(shape: Sequence[int], image: Sequence[int]) -> bool | None:
    """Whether a map's channels are last, from the proportions of the image; None where they do not tell."""
    (_, a, b, c), (height, width) = shape, image
    first, last = _similar(b, c, height, width), _similar(a, b, height, width)
    return None if first == last else last


def _similar(rows: int, columns: int, height: int, width: int) -> bool:
    """Whether a map has the proportions of the image, up to rounding; exactly where the image is square."""
    return abs(rows * width - columns * height) < max(height, width)


def _last_by_growth(shape: Sequence[int], wider: Sequence[int]) -> bool | None:
    """The same, from the shape for an image of twice the width."""
    grown = [axis for axis in range(1, 4) if shape[axis] != wider[axis]]
    return True if grown == [2] else False if grown == [3] else None


def _tokens(seen: _Seen, batch_second: bool) -> OutputLayout:
    a, b = seen.shape[0 if batch_second else 1], seen.shape[2]
    last = not issubclass(seen.module, (nn.Conv1d, nn.BatchNorm1d))
    if seen.map is not None:
        channels, height, width = seen.map
        before, behind = (count - height * width for count in (a, b))
        fits, fits_behind = 0 <= before <= _MOST_PREFIX, 0 <= behind <= _MOST_PREFIX
        # A map whose places were only strung together: N x C x T.
        strung = issubclass(seen.module, nn.Conv2d) and a == channels and not (b == channels and fits)
        if fits_behind and not batch_second and (strung or not last or not (fits or seen.channels_last)):
            return OutputLayout(False, prefix=behind, grid=(height, width))
        if fits and last:
            return OutputLayout(True, batch_second, before, (height, width))
    count = a if last else b
    for prefix in (0, 1):
        rows = round(math.sqrt(max(count - prefix, 0) * seen.image[0] / seen.image[1]))
        if rows and (count - prefix) % rows == 0 and _similar(rows, (count - prefix) // rows, *seen.image):
            return OutputLayout(last, batch_second, prefix, (rows, (count - prefix) // rows))
    return OutputLayout(last, batch_second)
