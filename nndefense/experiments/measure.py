"""How accurate a net is, clean and under attack: kept block by block, so that a killed run goes on where it stood."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from nndefense import attacks
from nndefense.attacks.retrieval import run_adaptive
from nndefense.attacks.spatial import spatial_grid
from nndefense.certificates import registry as certificates
from nndefense.datasets import ImageDataset
from nndefense.defenses import NearestNeighborDefense
from nndefense.errors import ModelError
from nndefense.evaluation import CellStore, run_attack, wilson_interval
from nndefense.evaluation.ladder import Bits, from_hex, to_hex
from nndefense.experiments.recipe import ExperimentRecipe
from nndefense.experiments.threat import SPATIAL, Threat
from nndefense.models import Classifier

Used = Classifier | NearestNeighborDefense
"""How a net is used: on its own, or with a database."""

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
    # Of the last net and threat, by the first image of each block: its forms are shown the same ones.
    _made: dict[tuple[str, str], dict[int, Tensor]] = field(default_factory=dict)

    def measured(self, used: Used, threats: Sequence[Threat]) -> list[dict[str, Any]]:
        """All measurements of a net or of a defence with it: clean, and under each threat."""
        found = [self.clean(used)]
        for threat in threats:
            found += [self.robust(used, threat)] if isinstance(used, Classifier) else self.retrieved(used, threat)
            plain = isinstance(used, Classifier) or used.rule.plain_vote
            if self.recipe.certified and plain and threat.norm != SPATIAL:
                found.append(self.certified(used, threat, from_hex(found[-1]["outcomes"], found[-1]["n"])))
        return found

    def clean(self, used: Used) -> dict[str, Any]:
        """Accuracy on the test images as they are."""
        classifier = _net(used)
        labels_of = classifier.label_map(self.test.classes)
        right = []
        for images, labels, _ in self.test.batches(self.recipe.batch_size):
            right.append(_right(used, images.to(classifier.device), labels_of[labels]).cpu().numpy())
            self.step(len(labels))
        return {"kind": "clean", "threat": None, **rate(np.concatenate(right))}

    def robust(self, classifier: Classifier, threat: Threat) -> dict[str, Any]:
        """Accuracy under the worst of the recipe's attacks for each image.

        An image counts as right only if the clean one and all attacked ones are. Each attack sees the images that
        still stand after those before it, the first one all of them, to say how sure the net is of what is wrong:
        ``confidence_wrong``, the mean probability of the likeliest wrong class; None where nothing is wrong.
        """
        key = [classifier.fingerprint, self._key(threat), "confidence_wrong"]
        blocks = self._blocks(threat.name, key, lambda rows: self._block(classifier, threat, rows)[0])
        return {
            "kind": "robust",
            "threat": threat.name,
            "norm": threat.norm,
            "eps": threat.eps,
            **(shares := rate(_bits(blocks, "right"))),
            "confidence_wrong": (
                sum(one["confidence_wrong"] for one in blocks) / wrong
                if (wrong := shares["n"] - shares["right"])
                else None
            ),
            "attacks": [attack.to_json() for attack in self.recipe.evaluation_of(threat)] or [self._grid()],
            **_totals(blocks, self._attack_names(threat)),
        }

    def retrieved(self, defense: NearestNeighborDefense, threat: Threat) -> list[dict[str, Any]]:
        """Accuracy of a defence under the worst images for its net (``gray``), and under all attacks (``robust``).

        The adaptive attack knows everything, and begins with the gray box's images.
        """
        rule, steps, restarts = defense.rule, self.recipe.adaptive_steps, self.recipe.adaptive_restarts
        key = [
            defense.classifier.fingerprint, defense.database.fingerprint, len(defense.database), rule.to_json(),
            self._key(threat), steps, restarts,
        ]  # fmt: skip
        name = f"{threat.name} {len(defense.database)} rows"
        blocks = self._blocks(name, key, lambda rows: self._retrieved_block(defense, threat, rows))
        shared = {"threat": threat.name, "norm": threat.norm, "eps": threat.eps}
        attacks = [attack.to_json() for attack in self.recipe.evaluation_of(threat)]
        informed = {"name": "adaptive", "steps": steps, "restarts": restarts}
        return [
            {"kind": "gray", **shared, **rate(_bits(blocks, "gray")), "attacks": attacks},
            {
                "kind": "robust", **shared, **rate(_bits(blocks, "right")), "attacks": [*attacks, informed],
                **_totals(blocks, ["adaptive"]),
            },
        ]  # fmt: skip

    def certified(self, used: Used, threat: Threat, standing: Bits) -> dict[str, Any]:
        """The share of the first attacked images that linear bounds prove to stand: a floor below the attacks' ceiling.

        Args:
            used: a net, or a defence whose rule is a plain vote.
            threat: within which no image may be answered otherwise.
            standing: N, which attacked images stand after all attacks.

        Raises:
            ModelError: an image that is proven to stand has fallen to an attack, so that one of the two is wrong.
        """
        classifier = _net(used)
        target: Any = used
        method, key = "bounds-net", list[Any]()
        if isinstance(used, NearestNeighborDefense):
            method, target = "bounds", used.surface()
            key = [used.database.fingerprint, len(used.database), used.rule.to_json()]
        n = min(self.recipe.certified, len(self.attacked))

        def proven(rows: np.ndarray[Any, Any]) -> dict[str, Any]:
            started = time.perf_counter()
            images, labels = self.attacked.batch(rows)
            moved = images.to(classifier.device)
            found = certificates.get(method).run(target, moved, eps=[threat.eps], norm=threat.norm)
            stands = found.stands(classifier.label_map(self.attacked.classes)[labels], threat.eps).numpy()
            return {"right": to_hex(stands), "seconds": round(time.perf_counter() - started, 3)}

        key = [classifier.fingerprint, *key, threat.norm, threat.eps]
        (found,) = self._blocks(f"certified {threat.name}", key, proven, n)
        right = from_hex(found["right"], n)
        if broken := int((right & ~standing[:n]).sum()):
            raise ModelError(f"{broken} images are proven to stand and have fallen: the attack or the proof is wrong")
        shared = {"threat": threat.name, "norm": threat.norm, "eps": threat.eps}
        return {"kind": "certified", **shared, **rate(right), "by": "linear bounds", "seconds": found["seconds"]}

    def _blocks(
        self,
        name: str,
        key: list[Any],
        made: Callable[[np.ndarray[Any, Any]], dict[str, Any]],
        count: int | None = None,
    ) -> list[dict[str, Any]]:
        """What was found on every block of the attacked images, or of the first ones, now or at an earlier time."""
        blocks, count = [], len(self.attacked) if count is None else count
        for first in range(0, count, BLOCK):
            rows = np.arange(first, min(first + BLOCK, count))
            own = [*key, self.attacked.fingerprint, first, len(rows)]
            found = self.store.get(f"{name} {first}", own)
            if found is None:
                found = {"n": len(rows), **made(rows)}
                self.store.put(f"{name} {first}", own, found)
            else:
                self.step(len(rows))
            blocks.append(found)
        return blocks

    def _attack_names(self, threat: Threat) -> list[str]:
        return [f"{number} {one.name}" for number, one in enumerate(self.recipe.evaluation_of(threat), 1)] or ["grid"]

    def _grid(self) -> dict[str, Any]:
        return {"name": "grid", "rotations": self.recipe.grid[0], "shifts": self.recipe.grid[1]}

    def _key(self, threat: Threat) -> list[Any]:
        if threat.norm == SPATIAL:
            return [self._grid(), threat.degrees, threat.shift]
        return [attack.to_json() for attack in self.recipe.evaluation_of(threat)]

    def _batches(self, rows: np.ndarray[Any, Any]) -> list[np.ndarray[Any, Any]]:
        return np.array_split(rows, -(-len(rows) // self.recipe.batch_size))

    def _block(
        self, classifier: Classifier, threat: Threat, rows: np.ndarray[Any, Any]
    ) -> tuple[dict[str, Any], Tensor]:
        """Attack some of the images: what was found, and the image that broke each, else the last that was tried."""
        started = time.perf_counter()
        device = classifier.device
        counted = attacks.Counted(classifier)
        broken, largest, right = dict.fromkeys(self._attack_names(threat), 0), 0.0, []
        labels_of = classifier.label_map(self.attacked.classes)
        forwards = backwards = 0
        sure, kept = 0.0, []
        for batch in self._batches(rows):
            images, labels = self.attacked.batch(batch)
            images, labels = images.to(device), labels_of[labels].to(device)
            standing, worst = _right(classifier, images, labels), images.clone()
            if threat.norm == SPATIAL:
                here = standing.nonzero()[:, 0]
                worst[here] = spatial_grid(
                    counted,
                    images[here],
                    labels[here],
                    degrees=threat.degrees,
                    shift=threat.shift,
                    rotations=self.recipe.grid[0],
                    shifts=self.recipe.grid[1],
                )
                standing[here] = _right(classifier, worst[here], labels[here])
                broken["grid"] += int((~standing[here]).sum())
                forwards, backwards = counted.forwards, counted.backwards
            for number, attack in enumerate(self.recipe.evaluation_of(threat), 1):
                here = (standing | (number == 1)).nonzero()[:, 0]
                if len(here) == 0:
                    break
                stood = standing[here]
                generator = torch.Generator().manual_seed(_seed(int(batch[0]), number))
                found = run_attack(attack, classifier, images[here], labels[here], threat.eps, generator)
                worst[here] = found.images
                standing[here] = stood & _right(classifier, found.images, labels[here])
                broken[f"{number} {attack.name}"] += int((stood & ~standing[here]).sum())
                size = attacks.distance(images[here], found.images, threat.norm)
                largest = max(largest, float(size.max()))
                forwards, backwards = forwards + found.forwards, backwards + found.backwards
            sure += _confidence(classifier, worst[~standing], labels[~standing])
            right.append(standing.cpu().numpy())
            kept.append(worst)
            self.step(len(batch))
        record = {
            "right": to_hex(np.concatenate(right)),
            "broken": broken,
            "confidence_wrong": sure,
            "largest_change": largest,
            "forwards": forwards,
            "backwards": backwards,
            "seconds": round(time.perf_counter() - started, 3),
        }
        made = torch.cat(kept)
        if self.recipe.forms:
            self._keep(classifier, threat)[int(rows[0])] = made
        return record, made

    def _keep(self, classifier: Classifier, threat: Threat) -> dict[int, Tensor]:
        """The attacked images of one net and threat; those of any other are let go."""
        name = classifier.fingerprint, threat.name
        if name not in self._made:
            self._made.clear()
        return self._made.setdefault(name, {})

    def _retrieved_block(
        self, defense: NearestNeighborDefense, threat: Threat, rows: np.ndarray[Any, Any]
    ) -> dict[str, Any]:
        """Attack some of the images as they are retrieved."""
        classifier, surface = defense.classifier, defense.surface()
        made = self._keep(classifier, threat).get(int(rows[0]))
        if made is None:
            made = self._block(classifier, threat, rows)[1]
        started = time.perf_counter()
        labels_of = classifier.label_map(self.attacked.classes)
        gray, right, largest = [], [], 0.0
        surface.counts.reset()
        for batch in self._batches(rows):
            images, labels = self.attacked.batch(batch)
            images, labels = images.to(classifier.device), labels_of[labels].to(classifier.device)
            start = made[batch - rows[0]]
            gray.append((_right(defense, images, labels) & _right(defense, start, labels)).cpu().numpy())
            found = run_adaptive(
                surface,
                images,
                labels,
                eps=threat.eps,
                norm=threat.norm,
                steps=self.recipe.adaptive_steps,
                restarts=self.recipe.adaptive_restarts,
                generator=torch.Generator().manual_seed(_seed(int(batch[0]), 0)),
                start=start,
            )
            right.append((~found.fooled).cpu().numpy())
            largest = max(largest, float(attacks.distance(images, found.images, threat.norm).max()))
            self.step(len(batch))
        before, after = np.concatenate(gray), np.concatenate(right)
        return {
            "gray": to_hex(before),
            "right": to_hex(after),
            "broken": {"adaptive": int((before & ~after).sum())},
            "largest_change": largest,
            "forwards": surface.counts.forwards,
            "backwards": surface.counts.backwards,
            "seconds": round(time.perf_counter() - started, 3),
        }


def _net(used: Used) -> Classifier:
    return used if isinstance(used, Classifier) else used.classifier


def _bits(blocks: list[dict[str, Any]], name: str) -> Bits:
    sizes = [block["n"] for block in blocks]
    return np.concatenate([from_hex(block[name], n) for block, n in zip(blocks, sizes, strict=True)])


def _totals(blocks: list[dict[str, Any]], names: list[str]) -> dict[str, Any]:
    return {
        "broken_by": {name: sum(one["broken"][name] for one in blocks) for name in names},
        "largest_change": max(one["largest_change"] for one in blocks),
        **{name: sum(one[name] for one in blocks) for name in ("seconds", "forwards", "backwards")},
    }


def rate(right: Bits) -> dict[str, Any]:
    """A share of images with its Wilson interval, and the images themselves, one bit each."""
    n, count = len(right), int(right.sum())
    low, high = wilson_interval(count, n)
    return {"n": n, "right": count, "accuracy": count / n, "ci_low": low, "ci_high": high, "outcomes": to_hex(right)}


def _right(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    with torch.no_grad():
        scores: Tensor = model(images)
    return scores.argmax(1) == labels.to(scores.device)


@torch.no_grad()
def _confidence(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """The summed probabilities of the likeliest wrong class of each image; there may be none."""
    if not len(images):
        return 0.0
    shares = model(images).softmax(1)
    return float(shares.scatter(1, labels[:, None], -1).amax(1).double().sum())


def _seed(first: int, number: int) -> int:
    """Of the random starts: the same for every net, and others for every batch and attack."""
    return int.from_bytes(hashlib.sha256(f"{first} {number}".encode()).digest()[:7], "big")
