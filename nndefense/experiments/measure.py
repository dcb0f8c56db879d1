"""How accurate a net is, clean and under attack: kept block by block, so that a killed run goes on where it stood."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nndefense import attacks
from nndefense.attacks.spatial import spatial_grid
from nndefense.datasets import ImageDataset
from nndefense.evaluation import CellStore, run_attack, wilson_interval
from nndefense.evaluation.ladder import Bits, from_hex, to_hex
from nndefense.experiments.recipe import SPATIAL, ExperimentRecipe, Threat
from nndefense.models import Classifier

# Test images a cell: some seconds to minutes of work that a kill can cost.
BLOCK = 500


@dataclass(frozen=True)
class Judge:
    """Measures nets as a recipe says.

    Attributes:
        recipe: attacks, their strength and the seed-free draw of images.
        test, attacked: the test images, and those of them that are attacked.
        store: where finished blocks are kept.
        step: called with the number of images after every batch.
    """

    recipe: ExperimentRecipe
    test: ImageDataset
    attacked: ImageDataset
    store: CellStore
    step: Callable[[int], object] = lambda images: None

    def clean(self, classifier: Classifier) -> dict[str, Any]:
        """Accuracy on the test images as they are."""
        labels_of = classifier.label_map(self.test.classes)
        right = []
        with torch.inference_mode():
            for images, labels, _ in self.test.batches(self.recipe.batch_size):
                logits = classifier(images.to(classifier.device))
                right.append((logits.argmax(1).cpu() == labels_of[labels]).numpy())
                self.step(len(labels))
        return {"kind": "clean", "threat": None, **rate(np.concatenate(right))}

    def robust(self, classifier: Classifier, threat: Threat) -> dict[str, Any]:
        """Accuracy under the worst of the recipe's attacks for each image.

        An image counts as right only if the clean one and all attacked ones are. Each attack sees the images that
        still stand after those before it.
        """
        fingerprint = classifier.fingerprint
        right: list[Bits] = []
        blocks = []
        for first in range(0, len(self.attacked), BLOCK):
            rows = np.arange(first, min(first + BLOCK, len(self.attacked)))
            key = [fingerprint, self.attacked.fingerprint, first, len(rows), self._key(threat)]
            found = self.store.get(f"{threat.name} {first}", key)
            if found is None:
                found = self._block(classifier, threat, rows)
                self.store.put(f"{threat.name} {first}", key, found)
            else:
                self.step(len(rows))
            right.append(from_hex(found["right"], len(rows)))
            blocks.append(found)
        return {
            "kind": "robust",
            "threat": threat.name,
            "norm": threat.norm,
            "eps": threat.eps,
            **rate(np.concatenate(right)),
            "attacks": [attack.to_json() for attack in self.recipe.evaluation_of(threat)] or [self._grid()],
            "broken_by": {name: sum(one["broken"][name] for one in blocks) for name in self._attack_names(threat)},
            "largest_change": max(one["largest_change"] for one in blocks),
            **{name: sum(one[name] for one in blocks) for name in ("seconds", "forwards", "backwards")},
        }

    def _attack_names(self, threat: Threat) -> list[str]:
        return [f"{number} {one.name}" for number, one in enumerate(self.recipe.evaluation_of(threat), 1)] or ["grid"]

    def _grid(self) -> dict[str, Any]:
        return {"name": "grid", "rotations": self.recipe.grid[0], "shifts": self.recipe.grid[1]}

    def _key(self, threat: Threat) -> list[Any]:
        if threat.norm == SPATIAL:
            return [self._grid(), threat.degrees, threat.shift]
        return [attack.to_json() for attack in self.recipe.evaluation_of(threat)]

    def _block(self, classifier: Classifier, threat: Threat, rows: np.ndarray[Any, Any]) -> dict[str, Any]:
        """Attack some of the images."""
        started = time.perf_counter()
        device = classifier.device
        counted = attacks.Counted(classifier)
        broken, largest, right = dict.fromkeys(self._attack_names(threat), 0), 0.0, []
        labels_of = classifier.label_map(self.attacked.classes)
        forwards = backwards = 0
        for batch in np.array_split(rows, -(-len(rows) // self.recipe.batch_size)):
            images, labels = self.attacked.batch(batch)
            images, labels = images.to(device), labels_of[labels].to(device)
            standing = _right(classifier, images, labels)
            if threat.norm == SPATIAL:
                here = standing.nonzero()[:, 0]
                made = spatial_grid(
                    counted,
                    images[here],
                    labels[here],
                    degrees=threat.degrees,
                    shift=threat.shift,
                    rotations=self.recipe.grid[0],
                    shifts=self.recipe.grid[1],
                )
                standing[here] = _right(classifier, made, labels[here])
                broken["grid"] += int((~standing[here]).sum())
                forwards, backwards = counted.forwards, counted.backwards
            for number, attack in enumerate(self.recipe.evaluation_of(threat), 1):
                here = standing.nonzero()[:, 0]
                if len(here) == 0:
                    break
                generator = torch.Generator().manual_seed(_seed(int(batch[0]), number))
                found = run_attack(attack, classifier, images[here], labels[here], threat.eps, generator)
                standing[here] = _right(classifier, found.images, labels[here])
                broken[f"{number} {attack.name}"] += int((~standing[here]).sum())
                size = attacks.distance(images[here], found.images, threat.norm)
                largest = max(largest, float(size.max()))
                forwards, backwards = forwards + found.forwards, backwards + found.backwards
            right.append(standing.cpu().numpy())
            self.step(len(batch))
        return {
            "right": to_hex(np.concatenate(right)),
            "broken": broken,
            "largest_change": largest,
            "forwards": forwards,
            "backwards": backwards,
            "seconds": round(time.perf_counter() - started, 3),
        }


def rate(right: Bits) -> dict[str, Any]:
    """A share of images with its Wilson interval, and the images themselves, one bit each."""
    n, count = len(right), int(right.sum())
    low, high = wilson_interval(count, n)
    return {"n": n, "right": count, "accuracy": count / n, "ci_low": low, "ci_high": high, "outcomes": to_hex(right)}


def _right(classifier: Classifier, images: Tensor, labels: Tensor) -> Tensor:
    with torch.no_grad():
        found: Tensor = classifier(images).argmax(1) == labels
    return found


def _seed(first: int, number: int) -> int:
    """Of the random starts: the same for every net, and others for every batch and attack."""
    return int.from_bytes(hashlib.sha256(f"{first} {number}".encode()).digest()[:7], "big")
