"""Image quilting (Guo et al., ICLR 2018): an image made anew from patches of other images that look like its own."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from nndefense.attacks import Bpda
from nndefense.attacks.checks import at_least
from nndefense.database.exact_search import squared_distances
from nndefense.defenses.quilting.layout import Layout, boundary_cut, check_tiling, lay_out
from nndefense.defenses.quilting.patches import PatchDatabase
from nndefense.defenses.transformed import TransformDefense
from nndefense.errors import InputError, check_choice
from nndefense.images import channel_message
from nndefense.models import Classifier

OVERLAP = 2
SUBSTITUTES = ("soft", "identity")
# Neighbours that the substitute weighs, the least temperature, for patches that are all equally near, and how far it
# falls in the course of an attack.
SOFT = 30
_SPREAD = 1e-3
_HARDEST = 0.1
# How many patches are searched and laid together: bounds the memory to a few hundred MB whatever the batch.
_TOGETHER = 1 << 17


class Quilt:
    """The transformation: images N x C x H x W in [0, 1] -> images of the same shape, made of database patches.

    Each patch of the image is replaced by one of the ``k`` database patches nearest to the whole of it, drawn
    uniformly; the patches are joined along seams of least error
    (:func:`~nndefense.defenses.quilting.boundary_cut`). Every pixel of the result is a pixel of a database patch.

    With ``k`` = 1 (the default of the code of Guo et al., which stands behind their table) nothing is random. The code
    of Athalye et al. takes 10, and the paper's text says K without a number.

    The nearest patches of the last batch are kept, so that further draws for the same images cost no search.
    """

    def __init__(self, patches: PatchDatabase, *, k: int = 1, overlap: int = OVERLAP) -> None:
        """
        Args:
            patches: the patch database.
            k: how many of the nearest patches are drawn from, 1 to all of them.
            overlap: pixels that neighbouring patches share, 0 to less than the patch's side; 2 in the code of Guo
                et al., and more for the last row and column where the patches do not come out even.

        Raises:
            InputError: a k or an overlap that does not fit the database.
        """
        k = at_least("k", k)
        if k > len(patches):
            raise InputError(f"k is {k}, but the database {patches.path} has only {len(patches):,} patches: lower k")
        check_tiling(patches.side, overlap)
        self.patches, self.k, self.overlap = patches, k, overlap
        self._last: tuple[Tensor, Tensor] | None = None

    def draw(self, images: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Which of the nearest patches is taken at each position of each image, by ``generator``: N x P of 0 to
        ``k`` - 1.
        """
        shape = (len(images), len(self._layout(images)))
        return torch.randint(self.k, shape, generator=generator).to(images.device)

    @torch.no_grad()
    def __call__(self, images: Tensor, drawn: Tensor | None = None) -> Tensor:
        """Quilt a batch by what :meth:`draw` gave, drawn here by default.

        Raises:
            InputError: images with other channels than the patches, or smaller than one.
        """
        layout, near = self._layout(images), self.nearest(images, self.k)
        if self.k == 1:
            picked = near[..., 0]
        else:
            picked = near.gather(2, (self.draw(images) if drawn is None else drawn)[..., None])[..., 0]
        together = max(_TOGETHER // len(layout), 1)
        parts = [stitch(self.patches.pixels(rows), layout) for rows in torch.split(picked, together)]
        return torch.cat(parts).to(images.dtype) if parts else images.clone()

    def soft(self, images: Tensor, progress: float = 0.0) -> Tensor:
        """A smooth stand-in for the quilt, for the gradient of an attack: N x C x H x W in [0, 1], differentiable.

        At each position the nearest patches (``k``, and 30 at least) are averaged with weights softmax(-d^2 / t), where
        patches overlap, they are averaged too. At first t is by how much their mean squared distance exceeds the
        least, and it falls to a tenth of that as ``progress`` goes from 0 to 1, so that the choice grows ever harder.
        The gradient tells which pixels make another patch the nearest one, of which the identity knows nothing.
        """
        layout = self._layout(images)
        queries = cut(images, layout).flatten(0, 1).flatten(1)
        rows = self.nearest(images, self.candidates).flatten(0, 1)
        patches = self.patches.pixels(rows).flatten(2).to(queries)
        squared = squared_distances(queries, patches)
        known = squared.detach()
        spread = (known.mean(1, keepdim=True) - known.amin(1, keepdim=True)).clamp_min(_SPREAD)
        mixed = ((-squared / (spread * _HARDEST**progress)).softmax(1)[..., None] * patches).sum(1)
        # N P x (C p p) -> N x C x (P p p), which is added up where it lies.
        mixed = mixed.view(len(images), len(layout), images.shape[1], -1).transpose(1, 2).flatten(2)
        places = layout.pixels.to(images.device).flatten()
        total = images.new_zeros(images.shape).flatten(2).index_add(2, places, mixed)
        covered = images.new_zeros(total.shape[2]).index_add(0, places, torch.ones_like(places, dtype=images.dtype))
        return (total / covered).view(images.shape)

    @property
    def candidates(self) -> int:
        """How many patches the stand-in weighs at each position."""
        return min(max(self.k, SOFT), len(self.patches))

    @torch.no_grad()
    def nearest(self, images: Tensor, count: int) -> Tensor:
        """The rows of the nearest patches at each position: N x P x count, nearest first, on the images' device."""
        last = self._last
        enough = last is not None and last[1].shape[2] >= count and last[0].device == images.device
        if last is not None and enough and torch.equal(last[0], images):
            return last[1][..., :count]
        layout = self._layout(images)
        together = max(_TOGETHER // len(layout), 1)
        found = [
            self.patches.search(cut(part, layout).flatten(0, 1).flatten(1), count)[1]
            for part in torch.split(images.detach(), together)
        ]
        near = torch.cat(found).view(len(images), len(layout), count)
        self._last = (images.detach().clone(), near)
        return near

    def _layout(self, images: Tensor) -> Layout:
        if images.shape[1] != self.patches.channels:
            raise InputError(
                channel_message(images.shape[1], self.patches.channels).replace(
                    "the classifier takes", "the patches are"
                )
            )
        return lay_out(images.shape[2], images.shape[3], self.patches.side, self.overlap)


def cut(images: Tensor, layout: Layout) -> Tensor:
    """The patches of images, as a layout has them: N x C x H x W -> N x P x C x p x p."""
    pixels = layout.pixels.to(images.device)
    taken = images.flatten(2).index_select(2, pixels.flatten())
    shape = (*images.shape[:2], len(layout), layout.patch, layout.patch)
    return taken.view(shape).transpose(1, 2)


@torch.no_grad()
def stitch(patches: Tensor, layout: Layout) -> Tensor:
    """Lay patches in raster order, each cut along the seam of least squared error: N x P x C x p x p -> N x C x H x W.

    Patches that do not depend on each other, a diagonal of every image of the batch, are laid at the same time; the
    result is that of laying one after the other.

    Raises:
        InputError: patches that do not fit the layout.
    """
    if patches.dim() != 5 or patches.shape[1] != len(layout) or patches.shape[3:] != (layout.patch, layout.patch):
        raise InputError(
            f"the layout has {len(layout)} patches of {layout.patch} x {layout.patch} pixels, "
            f"but was given {tuple(patches.shape)}"
        )
    count, _, channels = patches.shape[:3]
    order = torch.cat(layout.waves)
    pixels, left, top = (found[order].to(patches.device) for found in (layout.pixels, layout.left, layout.top))
    fresh = patches[:, order.to(patches.device)].transpose(1, 2).float().contiguous()
    canvas = fresh.new_zeros((count, channels, layout.height * layout.width))
    widest, first = layout.widest, 0
    for wave in layout.waves:
        here = slice(first, first + len(wave))
        first += len(wave)
        places, laid = pixels[here].flatten(), fresh[:, :, here]
        there = canvas.index_select(2, places).view(laid.shape)
        errors = (there - laid).square_().sum(1)
        shows, _ = boundary_cut(errors, left[here], top[here], widest=widest)
        canvas.index_copy_(2, places, torch.where(shows[:, None], laid, there).flatten(2))
    return canvas.view(count, channels, layout.height, layout.width).to(patches.dtype)


class QuiltingDefense(TransformDefense):
    """A classifier behind quilting, made by :func:`quilting`; its attack model knows how patches are chosen."""

    def __init__(self, classifier: Classifier, quilt: Quilt, *, substitute: str = "soft", **options: Any) -> None:
        """
        Args:
            classifier: any classifier.
            quilt: the transformation.
            substitute: whose gradient an attack takes for the quilt's: ``soft`` or ``identity``.
            options: ``draws``, ``attack_draws`` and ``seed`` of the base class.

        Raises:
            InputError: an unknown substitute, or a number of draws that cannot be used.
        """
        check_choice("substitute", substitute, SUBSTITUTES)
        super().__init__(classifier, quilt, differentiable=False, random=quilt.k > 1, **options)
        self.quilt, self.substitute = quilt, substitute

    def attacked(self, images: Tensor, drawn: Tensor | None) -> Tensor:
        """The true quilt of ``images`` with the draws ``drawn`` forward, the substitute's gradient backward (BPDA)."""
        if self.substitute == "identity":
            return super().attacked(images, drawn)
        # The substitute needs more neighbours than the quilt; found before, they serve both.
        self.quilt.nearest(images, self.quilt.candidates)
        passed: Tensor = Bpda(lambda seen: self.transformed(seen, drawn), self.quilt.soft)(images)
        return passed

    @property
    def softened(self) -> bool:
        """Attacks climb the soft quilt itself; where patches are drawn, the true quilt with its gradient."""
        return self.quilt.k == 1 and self.substitute == "soft"

    def stand_in(self, images: Tensor, drawn: Tensor | None, progress: float) -> Tensor:
        """The soft quilt, ever harder as ``progress`` goes from 0 to 1, or the true one with its substitute's gradient;
        ``images`` and ``drawn`` as for :meth:`attacked`.
        """
        return self.quilt.soft(images, progress) if self.softened else self.attacked(images, drawn)


def quilting(
    classifier: Classifier,
    patches: PatchDatabase,
    *,
    k: int = 1,
    overlap: int = OVERLAP,
    draws: int = 1,
    attack_draws: int | None = None,
    seed: int | None = None,
    substitute: str = "soft",
) -> QuiltingDefense:
    """The defence: quilt the image, then classify it.

    It has no useful gradient; attacks go backward through a substitute (BPDA), and average over draws where ``k`` > 1
    (EOT). Athalye et al. (2018) take the identity; :meth:`Quilt.soft` makes much stronger attacks where the database
    resembles the images closely, as on MNIST, and is the default.

    Args:
        classifier: any classifier of images with the patches' channels.
        patches: the patch database, which should hold no image that is to be classified.
        k, overlap: see :class:`Quilt`.
        draws: quilts that a prediction averages; more than one makes sense for ``k`` > 1 alone.
        attack_draws, seed: see :class:`~nndefense.defenses.transformed.TransformDefense`.
        substitute: ``soft`` or ``identity``.

    Raises:
        InputError: a classifier for images of other channels, or settings that do not fit.
    """
    if classifier.input_shape[0] != patches.channels:
        raise InputError(
            channel_message(patches.channels, classifier.input_shape[0], f"the patches of {patches.path}").split(":")[0]
            + ": build patches from images with as many channels"
        )
    quilt = Quilt(patches, k=k, overlap=overlap)
    return QuiltingDefense(classifier, quilt, substitute=substitute, draws=draws, attack_draws=attack_draws, seed=seed)
