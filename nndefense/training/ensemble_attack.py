"""The attack of ensemble adversarial training: by one of several nets, of which only one is in training."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nndefense.attacks import Model
from nndefense.datasets import ImageDataset
from nndefense.errors import InputError
from nndefense.models import Classifier
from nndefense.training.attacked_images import AttackedImages, write_attacked_images
from nndefense.training.inner_attack import InnerAttack
from nndefense.training.launcher import Team


class EnsembleAttack:
    """Attack a whole batch through one net, drawn anew each time (Tramer et al., ICLR 2018).

    The net is drawn uniformly from {static sources, the model in training}, from torch's default generator of the
    CPU; in a training in several processes, each draws for its own share of the batch. What the static sources make
    of an image does not depend on the model in training, so it can be computed once.

    With a ``cache``, each source attacks the training images once, as they stand in the data set, and a batch's
    attacked images are then shifted and mirrored as the clean ones are: the difference stays within the same budget
    of linf and l2, but it was made for the image before it moved, and a random start is drawn once for the whole
    training. Without one, the source attacks the batch as it is, augmentation included.

    Attributes:
        sources: the static sources.
        step: the attack, on sources and model alike; its target is the net's own prediction or its least likely
            class, never the label.
        cache: the folder of what was attacked beforehand, or None.
    """

    def __init__(self, sources: Sequence[Classifier], step: InnerAttack, *, cache: str | Path | None = None) -> None:
        """
        Args:
            sources: trained classifiers of images of one shape; their classes need not be those of the model. None
                at all leaves the model in training alone.
            step: such as :meth:`InnerAttack.fgsm` or :meth:`InnerAttack.r_fgsm`.
            cache: a folder for the attacked images of the static sources, shared by any number of trainings.

        Raises:
            InputError: a source that is no classifier, or a step that looks at labels.
        """
        for source in sources:
            if not isinstance(source, Classifier):
                raise InputError(f"a source is a Classifier, not {type(source).__name__}: load it by load_classifier")
        if not isinstance(step, InnerAttack) or step.target == "label":
            raise InputError(
                "the step of an EnsembleAttack must not see the label, which would leak into the attacked images: "
                "choose the target 'predicted' or 'least-likely', as InnerAttack.fgsm(eps) does"
            )
        self.sources = tuple(sources)
        self.step = step
        self.cache = None if cache is None else Path(cache).expanduser()

    def __call__(
        self,
        model: Model,
        images: Tensor,
        y: Tensor,
        *,
        loss: str = "cross-entropy",
        others: Callable[[int], Tensor] | None = None,
    ) -> Tensor:
        """Attack a batch through a net that is drawn.

        Args:
            model: the net in training, N x C x H x W in [0, 1] -> logits N x K.
            images: N x C x H x W in [0, 1].
            y: labels N, which nothing looks at.
            loss: ``cross-entropy`` alone.
            others: the batch as attacked beforehand by the static source of a number; by default the source attacks.

        Returns:
            Attacked images, detached: same shape, dtype and device.

        Raises:
            InputError: another loss.
        """
        if loss != "cross-entropy":
            raise InputError(f"an EnsembleAttack raises the cross-entropy, not {loss}: give an InnerAttack")
        number = int(torch.randint(len(self.sources) + 1, ()))
        if number == len(self.sources):
            return self.step(model, images, y)
        if others is not None:
            return others(number)
        source = self.sources[number]
        if source.device != images.device:
            source.to(images.device)
        return self.step(source, images, y)

    def check(self, classifier: Classifier, dataset: ImageDataset) -> None:
        """Raise :class:`InputError` unless the sources can attack the images, and none is the net in training."""
        for number, source in enumerate(self.sources, 1):
            if source is classifier:
                raise InputError(
                    f"source {number} is the net in training, a source anyway but no static one: name others"
                )
            try:
                source.check_shape((1, *dataset.shape))
            except InputError as error:
                raise InputError(f"source {number} cannot attack {dataset.name}: {error}") from None

    def prepare(self, dataset: ImageDataset, team: Team, *, progress: bool = True) -> tuple[AttackedImages, ...]:
        """The training images as each static source attacks them; none without a cache.

        What the cache lacks is computed by the leading process; the others wait.

        Raises:
            DataError: the disk is full, or the cache is damaged.
        """
        if self.cache is None:
            return ()
        if team.leads:
            for source in self.sources:
                source.to(team.device)
                write_attacked_images(source, dataset, self.step, self.cache, progress=progress)
        team.wait()
        # Whole a moment ago, or just written.
        return tuple(
            AttackedImages.open(self.cache, dataset, source, self.step, verify=False) for source in self.sources
        )

    def as_dict(self) -> dict[str, Any]:
        """What the weights depend on, as plain JSON values, for a record."""
        return {
            "name": "ensemble",
            "step": self.step.as_dict(),
            "sources": [source.fingerprint for source in self.sources],
            "cached": self.cache is not None,
        }
