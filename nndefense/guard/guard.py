"""The guard: the whole defence behind one call, for images that strangers send."""

from __future__ import annotations

import datetime
import logging
import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from nndefense.database import ImageDatabase, Rule
from nndefense.database.weighting import CBW_D_POWER, CBW_D_TERMS
from nndefense.datasets import ImageDataset
from nndefense.defenses import NearestNeighborDefense
from nndefense.defenses.stored import open_stored
from nndefense.errors import InputError, plain
from nndefense.guard.batch_invariant import SteadyForward
from nndefense.guard.batches import batches
from nndefense.guard.nearest_rows import NearestRows, clean_distances, record
from nndefense.guard.percentile import FILE, Percentile, check_rate
from nndefense.guard.pictures import Pictures, Sample, varied
from nndefense.guard.prediction import Defended
from nndefense.guard.verdicts import Verdicts
from nndefense.images import shape_text
from nndefense.models import Classifier
from nndefense.versions import library_versions

Given = Tensor | Image.Image | NDArray[np.uint8] | str | Path | ImageDataset

#: Rows up to half of the machine's memory are held in it; a reload holds two databases at once for a moment.
HELD_BYTES = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2 if hasattr(os, "sysconf") else 2**31
_SAMPLES = 64
_log = logging.getLogger(__name__)


class Guard:
    """Defended predictions from a database, made to be relied on.

    The same image gives the same answer, to the last digit of its JSON, whatever it is classified together with, in one
    call or another, in this thread or that: batches have fixed shapes that were measured to agree (see
    :mod:`~nndefense.guard.batch_invariant`), and distances are worked out row by row
    (:mod:`~nndefense.guard.nearest_rows`).
    :meth:`predict` may be called from several threads at once.

    Attributes:
        classifier: the classifier, in evaluation mode; its ``input_shape`` is that of the database.
        database: the database.
        rule: how the neighbours decide; ``k`` and ``weighting`` are its K and the name of its weights.
        calibration: the distances of clean images, or None: then there are no percentiles and nobody abstains.
        fingerprint: the classifier's, as it was when the guard was opened.
        classes: the names of the classes, in the order of the probabilities.
        input_shape: C, H, W of the tensors that it takes.
        threshold: the distance beyond which it abstains, or None.
        reject_rate: the share of clean images that it may abstain on, or None where it never abstains.
        observe: where set, it is called with ``forward``, ``search`` or ``explain`` and the seconds that this part of a
            batch took.
    """

    def __init__(
        self,
        classifier: Classifier,
        database: ImageDatabase,
        k: int,
        weighting: str,
        *,
        power: float = CBW_D_POWER,
        terms: int = CBW_D_TERMS,
        votes: str = "posteriors",
        temperature: float | None = None,
        alpha: float = 0.0,
        calibration: Percentile | None = None,
        reject_rate: float | None = None,
        data_dir: Path | None = None,
        images: Sequence[str] | None = None,
    ) -> None:
        """Most callers want :meth:`open`, which says what ``classifier``, ``database``, ``images``, ``data_dir`` and
        ``reject_rate`` are. ``k``, ``weighting``, ``power``, ``terms``, ``votes``, ``temperature`` and ``alpha`` are of
        the :class:`~nndefense.database.Rule`; ``calibration`` has the distances of clean images, where there are any.

        Raises:
            InputError: a rule or a rate that cannot be used.
            DatabaseError: the database was made with another classifier, or the calibration for another database.
        """
        database.check_classifier(classifier)
        self.rule = Rule.fitting(database, k, weighting, power, terms, votes, temperature, alpha)
        channels, height, width = database.manifest.classifier["input_shape"]
        if classifier.input_shape != (channels, height, width):
            raise InputError(
                f"the classifier is set to images {shape_text(classifier.input_shape)}, but the database was made with "
                f"{shape_text((channels, height, width))}: set its input_shape to that"
            )
        self.classifier, self.database = classifier.eval(), database
        self.k, self.weighting = self.rule.k, self.rule.weighting
        self.calibration, self.reject_rate = calibration, reject_rate
        self.observe: Callable[[str, float], None] | None = None
        self.fingerprint, self.classes = classifier.fingerprint, database.classes
        self.input_shape = classifier.input_shape
        self.threshold = self._checked_threshold()
        self._forward = SteadyForward(classifier, database.feature, database.pca, classifier.input_shape)
        self._nearest = NearestRows(database, self.k)
        self._verdicts = Verdicts(database, self.rule)
        named = (images,) if isinstance(images, str) else tuple(images or ())
        self._pictures = Pictures(database, calibration, classifier.input_shape, data_dir, named)
        if named and not self._pictures.at_hand:
            raise InputError(
                f"{' and '.join(named)} cannot be opened, or does not hold the images that {database.path} was built "
                "from: give --images the data set that it was built from, or leave it out"
            )
        self._making = threading.Lock()
        self._defense: NearestNeighborDefense | None = None

    @classmethod
    def open(
        cls,
        database: str | Path | ImageDatabase,
        classifier: str | Path | Classifier | None = None,
        *,
        k: int | None = None,
        weighting: str | None = None,
        votes: str | None = None,
        temperature: float | None = None,
        alpha: float | None = None,
        device: str = "auto",
        reject_rate: float | None = None,
        calibration: str | Path | bool = True,
        classes: str | Path | None = None,
        input_shape: tuple[int, int, int] | None = None,
        data_dir: str | Path | None = None,
        images: Sequence[str] | None = None,
        verify: bool = True,
    ) -> Guard:
        """Open a database folder with its classifier, and check both.

        Args:
            database: the folder, or a database that is open.
            classifier: the classifier or where it comes from. None: the one that the manifest names, or the folder
                ``classifier`` beside the database; one that is Python code must be named, since naming it runs it.
            k, weighting, votes, temperature, alpha: of the rule; None: as calibrated, else as the manifest has it, else
                50, ``cbw-d`` and no more. An infinite temperature asks for no kernel.
            device: where the net runs.
            reject_rate: abstain on images that are farther away than all but this share of clean ones, above 0 and
                below 1. None: the rate that was stored with the calibration, if any.
            calibration: True: ``guard.json`` of the database's folder, where there is one; False: none; or a file.
            classes: names of the classes, or a file of them, for a classifier that does not know them.
            input_shape: C, H, W of the images, for a classifier that does not know them; default: the database's.
            data_dir: the folder of the data sets that the pictures of neighbours come from.
            images: the specs of the data sets that they come from. None: those that the database names, where they are
                digits, MNIST, Fashion-MNIST or CIFAR-10 in the folder of the data sets, or files in the database's own
                folder; what else a database names is not opened.
            verify: compare the sha256 of every file with the manifest before any is loaded (about a second per GB).
                Weights are always compared, with the classifier's own record and with the database's.

        Raises:
            DatabaseError: a database that is missing, damaged or made with another classifier, or a ``guard.json`` that
                belongs to another state of it.
            ModelError: the classifier cannot be found or read.
            InputError: an argument cannot be used; a rate without a calibration.
            DataError: a calibration file that cannot be read.
        """
        if reject_rate is not None:
            check_rate(reject_rate)
        found = open_stored(
            database,
            classifier,
            k=k,
            weighting=weighting,
            votes=votes,
            temperature=temperature,
            alpha=alpha,
            device=device,
            classes=classes,
            input_shape=input_shape,
            verify=verify,
        )
        folder = found.database.path
        # What was verified is what is used: files that change under a running service must not change its answers.
        if not isinstance(database, ImageDatabase) and not found.database.hold_rows(HELD_BYTES):
            _log.warning("%s is too large to be held in memory: replace its files, never write into them", folder)
        return cls(
            found.classifier,
            found.database,
            **found.rule.to_json(),
            calibration=_calibration(found.database, calibration),
            reject_rate=reject_rate,
            data_dir=None if data_dir is None else Path(data_dir).expanduser(),
            images=images,
        )

    # -- predicting ---------------------------------------------------------------------------------------------

    def predict(
        self,
        images: Given | Sequence[Given],
        *,
        top: int = 5,
        neighbors: int | None = None,
        batch_size: int = 64,
    ) -> list[Defended]:
        """Classify images.

        Args:
            images: one image or many, of mixed kinds too, as for :func:`~nndefense.guard.batches.batches`: what is no
                tensor and no data set is turned into the classifier's shape.
            top: how many of the most probable classes to list, at least 1.
            neighbors: how many of the K neighbours to list, at least 0. None: all.
            batch_size: how many images are in memory at once. It changes no digit.

        Returns:
            A prediction for each image, in their order.

        Raises:
            InputError: an argument that cannot be used, or something that is not clearly an image.
            DataError: an image file that is missing or damaged.
        """
        return list(self.stream(images, top=top, neighbors=neighbors, batch_size=batch_size))

    def stream(
        self, images: Given | Iterable[Given], *, top: int = 5, neighbors: int | None = None, batch_size: int = 64
    ) -> Iterator[Defended]:
        """As :meth:`predict`, one prediction after another: for any number of images, in bounded memory. ``images``,
        ``top``, ``neighbors``, ``batch_size`` and errors are as there.
        """
        top, batch_size = plain(top), plain(batch_size)
        shown = self.k if neighbors is None else min(plain(neighbors), self.k)
        if top < 1 or shown < 0:
            raise InputError(f"top must be at least 1 and neighbors at least 0, but they are {top} and {neighbors}")
        # The check above must not wait for the first prediction, so the loop is a function of its own.
        return self._stream(images, top, shown, batch_size)

    def _stream(self, images: Given | Iterable[Given], top: int, shown: int, batch_size: int) -> Iterator[Defended]:
        for batch in batches(images, self.classifier.input_shape, batch_size):
            begun = time.perf_counter()
            vectors, bare = self._forward(batch)
            passed = time.perf_counter()
            rows, distances = self._nearest(vectors)
            found = time.perf_counter()
            done = self._verdicts(bare, rows, distances, top, shown, self.calibration, self.threshold)
            if self.observe is not None:
                ended = time.perf_counter()
                self.observe("forward", passed - begun)
                self.observe("search", found - passed)
                self.observe("explain", ended - found)
            yield from done

    # -- calibrating --------------------------------------------------------------------------------------------

    def calibrate(
        self,
        dataset: ImageDataset,
        *,
        specs: Sequence[str] = (),
        reject_rate: float | None = None,
        batch_size: int = 64,
    ) -> Percentile:
        """Measure how far clean images lie from the database; later predictions of this guard use it.

        The guarantee holds for images that come from where these come from. They must not stand in the database, nor
        have trained the classifier.

        Args:
            dataset: images of the classifier's shape; labels are not needed.
            specs: what opens the data set again, to show some of its images.
            reject_rate: the rate to abstain at from now on, which is stored with it. None: do not abstain.
            batch_size: images in memory at once.

        Returns:
            The calibration; :meth:`Percentile.write` keeps it, as ``guard.json`` in the database's folder.

        Raises:
            DataError: no images, or images that stand in the database.
            InputError: images of another shape, or a rate that is too small for so few images.
        """
        dataset = dataset.usable
        distances = clean_distances(
            dataset,
            batches(dataset, self.classifier.input_shape, batch_size),
            lambda batch: self._forward(batch)[0],
            self._nearest,
        )
        found = Percentile(
            distances=distances,
            manifest=self.database.manifest.identity,
            classifier=self.fingerprint,
            dataset=record(dataset, specs),
            samples=tuple(dataset.ids[place] for place in varied(dataset.labels, _SAMPLES)) if specs else (),
            reject_rate=reject_rate,
            created=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        )
        threshold = None if reject_rate is None else found.threshold(reject_rate)
        self.calibration, self.reject_rate, self.threshold = found, reject_rate, threshold
        shown = self._pictures
        self._pictures = Pictures(self.database, found, shown.shape, shown.data_dir, shown.images)
        return found

    def _checked_threshold(self) -> float | None:
        made = self.calibration
        if made is None:
            if self.reject_rate is not None:
                raise InputError(
                    f"the database {self.database.path} has no calibration to abstain by: make one with 'nndefense "
                    "guard calibrate', or choose no rejection rate"
                )
            return None
        made.check_database(self.database.path, self.database.manifest)
        if self.reject_rate is None:
            self.reject_rate = made.reject_rate
        return None if self.reject_rate is None else made.threshold(self.reject_rate)

    # -- what it is and what it shows ---------------------------------------------------------------------------

    @property
    def defense(self) -> NearestNeighborDefense:
        """The same defence as a module, for its attack surface; made when it is first asked for."""
        with self._making:
            if self._defense is None:
                self._defense = NearestNeighborDefense(self.classifier, self.database, **self.rule.to_json())
            return self._defense

    def neighbor_image(self, row: int | str) -> NDArray[np.uint8] | None:
        """The picture of a row, by its number or id: uint8 H x W x C of the classifier's size, C 1 or 3.

        None where its images are not at hand: see ``images`` of :meth:`open`.

        Raises:
            InputError: there is no such row.
        """
        return self._pictures.of(row)

    def samples(self, count: int = 8) -> list[Sample]:
        """Some images to try, at most ``count``, one of each class before a second of any.

        Clean calibration images, else images of the database (``held_out`` says which), else none.
        """
        return self._pictures.samples(count)

    def describe(self) -> dict[str, Any]:
        """What it is, as plain values without any path."""
        manifest, made = self.database.manifest, self.calibration
        return {
            "classes": list(self.classes),
            "input_shape": list(self.input_shape),
            "k": self.k,
            "weighting": self.weighting,
            "rule": self.rule.to_json() | {"text": str(self.rule)},
            "feature": dict(manifest.feature),
            "rows": len(self.database),
            "dimension": self.database.dimension,
            "index": {"factory": manifest.index["factory"], "metric": manifest.index["metric"]},
            "classifier": {"arch": manifest.classifier.get("arch", ""), "fingerprint": self.fingerprint},
            "database": {
                "fingerprint": self.database.fingerprint,
                "data": manifest.data["name"],
                "created": manifest.created,
            },
            "calibrated": made is not None,
            "calibration": None
            if made is None
            else {"n": len(made), "dataset": made.dataset.get("name", ""), "created": made.created},
            "reject_rate": self.reject_rate,
            "threshold": self.threshold,
            "pictures": self._pictures.at_hand,
            "batches": list(self._forward.sizes),
            "versions": library_versions(),
        }


def _calibration(database: ImageDatabase, wanted: str | Path | bool) -> Percentile | None:
    if isinstance(wanted, bool):
        value = database.manifest.read_beside(database.path, FILE) if wanted else None
        return None if value is None else Percentile.of_values(value, database.path / FILE)
    return Percentile.read(Path(wanted).expanduser())
