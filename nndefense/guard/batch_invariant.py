"""Forward passes whose digits do not depend on the company an image is in.

The libraries below torch choose their kernels by the shape of a batch, and with the kernel the order of a sum and so
its last bits. Among batches of the same shape the rows of most nets do agree, and shapes of 4, 8, ... 64 images often
agree with each other; but neither is promised anywhere. So it is measured when a database is opened, on this machine
and for this net: images go through batches of each shape at several places, and only the shapes whose rows are equal
to the last bit are used afterwards. Smaller batches are filled up to one of them.

The number of threads can change a sum's order, too, and on some processors some nets agree with themselves under
another number at no shape. So every pass runs with the number that the shapes were measured with, whatever the caller
has set.
"""

from __future__ import annotations

import copy
import math
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from nndefense.errors import InputError
from nndefense.features import PCA, FeatureSpec, OutputLayout, layer_in, layouts_in, pooled, reduced
from nndefense.models import Classifier
from nndefense.modes import evaluating

Vectors = NDArray[np.float32]

_LARGEST = 64
# A processor is no faster for more than a few big images at a time, and a lone one should not wait for many others.
_LARGEST_OF_BIG_IMAGES = {"cpu": 4}
_BIG = 3 * 64 * 64
_PROBES = 8


class SteadyForward:
    """Images -> feature vectors and the bare classifier's probabilities, in one pass through the whole net.

    May be called from several threads at once; forward passes that others make through the same classifier are not
    disturbed and do not disturb.

    Attributes:
        threads: the number of torch's threads in every pass: that of the thread that made this object.
        sizes: the batch sizes in use, largest first.
        exact: whether a shape was found whose rows agree to the last bit (false only where the kernels themselves are
            not deterministic).
    """

    def __init__(
        self, classifier: Classifier, feature: FeatureSpec, pca: PCA | None, shape: tuple[int, int, int]
    ) -> None:
        """``shape`` is C, H, W of the images; the other arguments are those of a feature extractor."""
        self.classifier, self.feature, self.shape = classifier, feature, shape
        self.device = classifier.device
        # A copy: moving a module moves it for all who hold it.
        self.pca = copy.deepcopy(pca).to(self.device) if pca is not None else None
        self._caught = threading.local()
        name = layer_in(classifier, feature.layer)
        layout = layouts_in(classifier, [name], torch.full((1, *shape), 0.5, device=self.device))[name]
        layer = classifier.get_submodule(name)
        # The hook stays, and does nothing in passes that are not this object's.
        weakref.finalize(self, layer.register_forward_hook(_catcher(self._caught, feature, layout)).remove)
        self.threads = torch.get_num_threads()
        found = self._measure()
        self.exact, self.sizes = bool(found), found or (1,)

    def __call__(self, images: Tensor) -> tuple[Vectors, Vectors]:
        """Images N x C x H x W, float32 in [0, 1] -> vectors N x d and probabilities N x classes, both float32."""
        vectors, bare, first = [], [], 0
        for size, count in _plan(len(images), self.sizes):
            found = self._run(_filled(images[first : first + count], size))
            vectors.append(found[0][:count])
            bare.append(found[1][:count])
            first += count
        if not vectors:
            raise InputError("there are no images to run through the net: give at least one")
        return np.concatenate(vectors), np.concatenate(bare)

    @torch.inference_mode()
    def _run(self, images: Tensor) -> tuple[Vectors, Vectors]:
        with _threads(self.threads), evaluating(self.classifier):
            self._caught.outputs = []
            try:
                probabilities = self.classifier(images.to(self.device)).float().softmax(1)
                outputs = self._caught.outputs
            finally:
                self._caught.outputs = None
            if len(outputs) != 1:
                raise InputError(f"a forward pass runs the layer {self.feature.layer} {len(outputs)} times, not once")
            vectors = reduced(outputs[0], self.feature, self.pca)
        return vectors.cpu().numpy(), probabilities.cpu().numpy()

    def _measure(self) -> tuple[int, ...]:
        """The sizes whose rows agree with those of the largest one that agrees with itself; empty where none does."""
        probes, rows = _probes(self.shape), dict[int, tuple[Vectors, Vectors]]()
        largest = _LARGEST
        if math.prod(self.shape) > _BIG:
            largest = _LARGEST_OF_BIG_IMAGES.get(self.device.type, 32)
        kept = []
        for size in (largest >> n for n in range(largest.bit_length())):
            table = dict(rows)
            if self._agrees(probes, size, table):
                kept.append(size)
                rows = table
        return tuple(kept)

    def _agrees(self, probes: Tensor, size: int, table: dict[int, tuple[Vectors, Vectors]]) -> bool:
        """Whether every probe, at two places or more, gives the rows of the table; missing ones are added."""
        for shift in (0, 3):
            for first in range(0, max(size, _PROBES), size):
                numbers = [(first + place + shift) % _PROBES for place in range(size)]
                vectors, bare = self._run(probes[numbers])
                for place, number in enumerate(numbers):
                    seen = table.setdefault(number, (vectors[place].copy(), bare[place].copy()))
                    if not (np.array_equal(seen[0], vectors[place]) and np.array_equal(seen[1], bare[place])):
                        return False
        return True


@contextmanager
def _threads(count: int) -> Iterator[None]:
    """Let torch use this many threads for a while; OpenMP keeps the number for each calling thread."""
    before = torch.get_num_threads()
    # Only where it differs: setting it makes oneDNN forget the kernels that it has prepared.
    if count == before:
        yield
        return
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _catcher(
    caught: threading.local, feature: FeatureSpec, layout: OutputLayout
) -> Callable[[nn.Module, object, object], None]:
    def hook(module: nn.Module, args: object, output: object) -> None:
        outputs = getattr(caught, "outputs", None)
        if outputs is not None and isinstance(output, Tensor):
            # Pooled at once: the layer after this one may work in place.
            outputs.append(pooled(output, feature, layout))

    return hook


def _plan(count: int, sizes: tuple[int, ...]) -> Iterator[tuple[int, int]]:
    """Cut ``count`` images into batches: their size, and how many of it are filled with images."""
    while count > 0:
        over = [size for size in sizes if size >= count]
        under = [size for size in sizes if size <= count]
        # A batch that is at most half as large again as its images costs less than two.
        size = over[-1] if over and (not under or 2 * over[-1] <= 3 * count) else under[0]
        yield size, min(count, size)
        count -= size


def _filled(images: Tensor, size: int) -> Tensor:
    """Repeat the last image until there are ``size`` of them."""
    return images if len(images) == size else torch.cat([images, images[-1:].expand(size - len(images), -1, -1, -1)])


def _probes(shape: tuple[int, int, int]) -> Tensor:
    """Images of several kinds, from noise to smooth ones: the kernels' sums must have something to round."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.rand(_PROBES, *shape, generator=generator)
    coarse = torch.rand(_PROBES, shape[0], 4, 4, generator=generator)
    smooth = nn.functional.interpolate(coarse, size=shape[1:], mode="bilinear", align_corners=False)
    share = torch.linspace(0, 1, _PROBES).view(-1, 1, 1, 1)
    return (share * noise + (1 - share) * smooth).clamp(0, 1)
