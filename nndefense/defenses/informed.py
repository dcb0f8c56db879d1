"""The attacker that a setting is calibrated against, who knows the retrieval."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from nndefense.attacks import apgd
from nndefense.attacks.retrieval import run_adaptive
from nndefense.database import ImageDatabase, Rule
from nndefense.datasets import ImageDataset
from nndefense.defenses.nearest_neighbor import NearestNeighborDefense
from nndefense.models import Classifier

#: Gradients that the adaptive attack takes per step on an image that stands.
EFFORT = 13


@dataclass(frozen=True)
class AdaptiveAttacker:
    """Sends the adaptive attack against a defence, and APGD with as many gradients against the bare classifier.

    Attributes:
        classifier: that is defended.
        norm, eps: the budget.
        seed: of every call's random starts, so that they do not depend on the calls before.
        batch_size: images that are attacked at a time.
        images: of the databases' rows, found by their ids, so that attacks can begin on the way to them; None: they
            begin at the attacked images alone, and are weaker.
    """

    classifier: Classifier
    norm: str
    eps: float
    seed: int = 0
    batch_size: int = 128
    images: ImageDataset | None = None

    def on_defense(self, database: ImageDatabase, rule: Rule, images: Tensor, labels: Tensor, steps: int) -> Tensor:
        """Attack the defence over this database by the adaptive attack.

        Args:
            database: of the defence.
            rule: how its neighbours decide.
            images: N x C x H x W in [0, 1].
            labels: their class numbers, N.
            steps: of the attack, at least 1.

        Returns:
            The attacked images, N x C x H x W.
        """
        defense = NearestNeighborDefense(self.classifier, database, **rule.to_json())
        return run_adaptive(
            defense.surface(images=self.images), images, labels, eps=self.eps, norm=self.norm, steps=steps,
            generator=self._generator(), batch_size=self.batch_size,
        ).images  # fmt: skip

    def on_classifier(self, images: Tensor, labels: Tensor, steps: int) -> Tensor:
        """The same on the bare classifier: APGD on the cross-entropy, and on the margin where that fails; images,
        labels and steps as for :meth:`on_defense`.
        """
        made, generator = images.clone(), self._generator()
        for index in torch.split(torch.arange(len(images), device=images.device), self.batch_size):
            for loss in ("cross-entropy", "margin"):
                steps_each = max(EFFORT * steps // 2, 1)
                tried = apgd(
                    self.classifier, images[index], labels[index], eps=self.eps, norm=self.norm, steps=steps_each,
                    loss=loss, generator=generator,
                )  # fmt: skip
                made[index] = tried
                with torch.no_grad():
                    index = index[self.classifier(tried).argmax(1) == labels[index]]
                if not len(index):
                    break
        return made

    def _generator(self) -> torch.Generator:
        return torch.Generator().manual_seed(self.seed)
