"""The record of a certificate: for each image what is answered, and how far no change of the image changes that."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from nndefense.attacks import norms
from nndefense.attacks.registry import NORMS
from nndefense.errors import InputError, check_choice
from nndefense.statistics import wilson_interval

ABSTAINED = -1


@dataclass(frozen=True)
class CertifiedAccuracy:
    """The share of all n images that are right and proven to stay so at ``eps``, with its Wilson 95 % interval."""

    eps: float
    accuracy: float
    ci_low: float
    ci_high: float
    n: int


@dataclass(frozen=True)
class Certified:
    """What is proven of N images.

    Attributes:
        prediction: N, the class that the certified classifier gives (int64), -1 where it abstains.
        radius: N, float64: every image of [0, 1] no farther away than this gets the same class; 0 where nothing is
            proven, and where it abstains. Infinite where nothing can change it. A method that decides at given budgets
            gives the largest of them that it proves.
        norm: that the radii are lengths in; for ``normalized-l2`` they are shares of the image's own length.
        alpha: the chance, for each image, that what is said of it is wrong; 0 for a proof.
    """

    prediction: Tensor
    radius: Tensor
    norm: str
    alpha: float = 0.0

    def __post_init__(self) -> None:
        check_choice("norm", self.norm, NORMS)
        object.__setattr__(self, "prediction", self.prediction.detach().cpu().long())
        object.__setattr__(self, "radius", self.radius.detach().cpu().double())
        if self.prediction.dim() != 1 or self.prediction.shape != self.radius.shape:
            raise InputError(
                f"a certificate has one prediction and one radius for each image, not {tuple(self.prediction.shape)} "
                f"and {tuple(self.radius.shape)}"
            )
        if not bool((self.radius >= 0).all()) or bool((self.radius[self.abstained] > 0).any()):
            raise InputError("certified radii must be at least 0 and no NaN, and 0 where the classifier abstains")
        if not 0 <= self.alpha < 1:
            raise InputError(f"alpha is {self.alpha}, but is a chance: from 0 to below 1")

    def __len__(self) -> int:
        return len(self.prediction)

    @property
    def abstained(self) -> Tensor:
        """N: no class is given."""
        return self.prediction == ABSTAINED

    def correct(self, labels: Tensor) -> Tensor:
        """N: the class given is that of ``labels`` (N class numbers of the classifier)."""
        return self.prediction == labels.cpu()

    def stands(self, labels: Tensor, eps: float | Tensor) -> Tensor:
        """N: right by ``labels``, and proven to stay so within ``eps`` (one number or N) of the certificate's norm."""
        return self.correct(labels) & (self.radius >= torch.as_tensor(eps, dtype=torch.float64).cpu())

    def accuracy(self, labels: Tensor, eps: float) -> CertifiedAccuracy:
        """The certified accuracy within ``eps`` by ``labels`` N: over all images, also those wrong or abstained on."""
        count, n = int(self.stands(labels, eps).sum()), len(self)
        return CertifiedAccuracy(eps, count / max(n, 1), *wilson_interval(count, n), n)

    def in_norm(self, norm: str, images: Tensor) -> Certified:
        """The same certificate with its radii in another norm, never larger than is proven.

        Args:
            norm: that is asked for. A ball of l2 in the same place holds the ball of linf of 1/sqrt(C*H*W) times its
                radius, and a ball of linf that of l2 of the same radius; normalised l2 is l2 over the image's length.
            images: those of the certificate, N x C x H x W.
        """
        check_choice("norm", norm, NORMS)
        if norm == self.norm:
            return self
        lengths = norms.length(images.double()).cpu()
        # An image of length 0 has no ball but itself.
        raw = (
            torch.where(lengths > 0, self.radius * lengths, torch.inf) if self.norm == "normalized-l2" else self.radius
        )
        raw = torch.where(self.radius > 0, raw, 0.0)
        if norm == "linf":
            raw = raw / math.sqrt(images.shape[1:].numel())
        elif norm == "normalized-l2":
            raw = raw / lengths
        return replace(self, radius=torch.where(self.radius > 0, raw, 0.0), norm=norm)

    def to_json(self) -> dict[str, Any]:
        """Plain values for a results file; an infinite radius is None."""
        radii = [radius if math.isfinite(radius) else None for radius in self.radius.tolist()]
        return {"prediction": self.prediction.tolist(), "radius": radii, "norm": self.norm, "alpha": self.alpha}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Certified:
        """The certificate whose ``values`` :meth:`to_json` wrote."""
        radii = [math.inf if radius is None else radius for radius in values["radius"]]
        return cls(
            torch.tensor(values["prediction"]),
            torch.tensor(radii, dtype=torch.float64),
            values["norm"],
            values["alpha"],
        )

    @classmethod
    def joined(cls, parts: Sequence[Certified]) -> Certified:
        """The ``parts``, certificates of one kind, one after another; at least one.

        Raises:
            InputError: none, or in several norms or with several chances.
        """
        if len({(part.norm, part.alpha) for part in parts}) != 1:
            raise InputError("certificates are joined where there is at least one, all in one norm and with one alpha")
        prediction, radius = (torch.cat([getattr(part, name) for part in parts]) for name in ("prediction", "radius"))
        return cls(prediction, radius, parts[0].norm, parts[0].alpha)
