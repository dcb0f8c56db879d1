"""The attack of ensemble adversarial training: by one of several nets, of which only one is in training.

What a static one makes of a training set is computed once, kept in HDF5, and read row by row. A folder holds any number
of such sets, each in a folder named by the hash of all that it depends on. Each is written in shards that are whole or
absent, so that a job that was killed goes on after the last of them, and its bits are those of one that was not.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from nndefense.attacks import Model
from nndefense.bars import progress_bar
from nndefense.datasets import ImageDataset
from nndefense.errors import DataError, InputError
from nndefense.files import (
    HDF5_ERRORS,
    held_array,
    make_folder,
    not_read,
    open_hdf5,
    read_json,
    write_json,
    write_part,
)
from nndefense.models import Classifier
from nndefense.parts import sweep
from nndefense.training.inner_attack import InnerAttack
from nndefense.training.launcher import Team
from nndefense.training.random_state import kept, reseed

FORMAT, VERSION = "nndefense-attacked-images", 1
_MANIFEST = "manifest.json"
# What a kill can cost: some seconds of work.
_SHARD_BYTES = 1 << 24
_BATCH = 256


class AttackedImages:
    """N attacked images in float32, mapped into memory (``shards``): a batch touches only its own rows.

    Attributes:
        folder: where they are.
        shape: channels, height and width.
    """

    def __init__(self, folder: Path, shape: tuple[int, ...], shards: list[NDArray[np.float32]]) -> None:
        self.folder = folder
        self.shape = shape
        self._shards = shards
        self._starts = np.cumsum([0, *map(len, shards)], dtype=np.int64)

    @classmethod
    def open(
        cls, folder: str | Path, dataset: ImageDataset, source: Classifier, attack: InnerAttack, *, verify: bool = True
    ) -> AttackedImages:
        """Open what :func:`write_attacked_images` wrote into ``folder`` for the same data set, source and attack.

        Args:
            folder, dataset, source, attack: as there.
            verify: read everything once and compare the checksums.

        Raises:
            DataError: it is missing, unfinished or damaged.
        """
        plan = _Plan(Path(folder).expanduser(), dataset, source, attack)
        if not plan.finished():
            raise DataError(
                f"{plan.folder} does not hold {dataset.name} as attacked by this source: write it by "
                "write_attacked_images, which goes on where it stopped"
            )
        shards = []
        for number in range(plan.count):
            found = plan.shard(number, verify=verify)
            if found is None:
                raise DataError(f"{plan.path(number)} is missing or damaged: write it again by write_attacked_images")
            shards.append(found)
        return cls(plan.folder, dataset.shape, shards)

    def __len__(self) -> int:
        return int(self._starts[-1])

    def read(self, rows: Tensor) -> Tensor:
        """The images n x C x H x W, float32 in [0, 1], at n row numbers of the data set."""
        wanted = rows.cpu().numpy()
        found = np.empty((len(wanted), *self.shape), dtype=np.float32)
        owners = np.searchsorted(self._starts, wanted, side="right") - 1
        for owner in np.unique(owners):
            here = owners == owner
            found[here] = self._shards[owner][wanted[here] - self._starts[owner]]
        return torch.from_numpy(found)


def write_attacked_images(
    source: Classifier,
    dataset: ImageDataset,
    attack: InnerAttack,
    folder: str | Path,
    *,
    progress: bool = True,
) -> AttackedImages:
    """Attack every image of a data set through a net, where that has not been done yet.

    Args:
        source: in any mode; it is left as it is, and computes where it is.
        dataset: N images of the shape that it takes. Their labels are not looked at.
        attack: with the target ``predicted`` or ``least-likely``. Its random starts depend on the row alone.
        folder: the sets of attacked images; 4 bytes a pixel are needed for another.
        progress: show a bar.

    Returns:
        The attacked images, opened; the shards that were there already are compared with their checksums.

    Raises:
        InputError: the attack needs labels, or the images do not fit the source.
        DataError: the disk is full, or an image cannot be read.
    """
    if attack.target == "label":
        raise InputError(
            "images that are attacked beforehand must not depend on labels: choose the target 'predicted' or "
            "'least-likely'"
        )
    source.check_shape((1, *dataset.shape))
    plan = _Plan(Path(folder).expanduser(), dataset, source, attack)
    if not plan.finished():
        make_folder(plan.folder)
    missing = [number for number in range(plan.count) if plan.shard(number) is None]
    wanted = sum(len(plan.rows(number)) for number in missing)
    need, free = wanted * 4 * math.prod(dataset.shape), shutil.disk_usage(plan.folder).free if wanted else 0
    if need > free:
        raise DataError(
            f"the attacked images take {need / 2**30:.1f} GiB in {plan.folder}, where {free / 2**30:.1f} are free: "
            "choose another folder, or do without the cache"
        )
    device = source.device
    done = len(dataset) - wanted
    what = "attacking by a static source"
    with progress_bar(total=len(dataset), initial=done, desc=what, unit=" images", shown=progress) as bar:
        for number in missing:
            parts = []
            rows = plan.rows(number)
            for first in range(0, len(rows), _BATCH):
                images, _ = dataset.batch(rows[first : first + _BATCH])
                unseen = torch.zeros(len(images), dtype=torch.int64, device=device)
                with kept(device), torch.enable_grad():
                    reseed(0, 0, f"{plan.key} {rows[first]}", device)
                    parts.append(attack(source, images.to(device), unseen).cpu())
                bar.update(len(images))
            plan.save(number, torch.cat(parts).numpy())
    plan.finish()
    return AttackedImages.open(folder, dataset, source, attack, verify=False)


class _Plan:
    """Where the shards of one set are, and which rows each has."""

    def __init__(self, root: Path, dataset: ImageDataset, source: Classifier, attack: InnerAttack) -> None:
        each = max(1, _SHARD_BYTES // (4 * math.prod(dataset.shape)))
        # Whole batches, so that no image's result depends on where a shard ends.
        self.images = each - each % _BATCH if each > _BATCH else each
        self.total, self.shape = len(dataset), dataset.shape
        self.identity = {
            "format": FORMAT,
            "version": VERSION,
            "data": dataset.fingerprint,
            "n": len(dataset),
            "shape": list(dataset.shape),
            "source": source.fingerprint,
            "attack": attack.as_dict(),
            "shard_images": self.images,
            "batch_size": _BATCH,
        }
        self.key = hashlib.sha256(json.dumps(self.identity, sort_keys=True).encode()).hexdigest()
        self.names = {"dataset": dataset.name, "source": source.source}
        self.folder = root / self.key[:16]
        self.count = -(-self.total // self.images)

    def rows(self, number: int) -> NDArray[np.int64]:
        """The data set's rows in a shard."""
        return np.arange(number * self.images, min((number + 1) * self.images, self.total), dtype=np.int64)

    def path(self, number: int) -> Path:
        """The file of a shard."""
        return self.folder / f"images-{number:06d}.h5"

    def finished(self) -> bool:
        """Whether the manifest is there, which is written last."""
        path = self.folder / _MANIFEST
        return path.is_file() and read_json(path).get("identity") == self.identity

    def shard(self, number: int, *, verify: bool = True) -> NDArray[np.float32] | None:
        """The images of a shard, mapped; None where it is missing, damaged or another job's.

        Raises:
            DataError: the system does not read it.
        """
        path = self.path(number)
        try:
            with open_hdf5(path) as file:
                images, own = held_array(file, "images", path), file.attrs["key"] == self.key
                offset, shape, digest = images.id.get_offset(), images.shape, file.attrs["sha256"]
                fitting = images.dtype == np.dtype("<f4") and shape == (len(self.rows(number)), *self.shape)
            if not (own and fitting and offset is not None):
                return None
            found: NDArray[np.float32] = np.memmap(path, mode="r", dtype="<f4", shape=shape, offset=offset)
        except HDF5_ERRORS as error:
            told = not_read(path, error)
            if told:
                raise DataError(told) from error
            return None
        return found if not verify or hashlib.sha256(found.data).hexdigest() == digest else None

    def save(self, number: int, images: NDArray[np.float32]) -> None:
        """Write a shard: one contiguous array, which a reader can map."""
        import h5py

        # By way of memory: where the disk is full, HDF5 itself can crash the whole process when it closes the file.
        buffer = io.BytesIO()
        images = np.ascontiguousarray(images, dtype="<f4")
        with h5py.File(buffer, "w") as file:
            file.create_dataset("images", data=images)
            file.attrs.update(key=self.key, sha256=hashlib.sha256(images.data).hexdigest())
        write_part(self.path(number), buffer.getbuffer())

    def finish(self) -> None:
        """Write the manifest, and remove what killed writers left."""
        if not self.finished():
            write_json(self.folder / _MANIFEST, {"identity": self.identity, **self.names})
        sweep(self.folder)


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
        """Raise :class:`InputError` unless the sources can attack ``dataset``, and none is the
        ``classifier`` in training."""
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
        """The images of ``dataset`` as each static source attacks them; none without a cache.

        What the cache lacks is computed by the leading process of the ``team``, with a bar if ``progress``; others
        wait.

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
