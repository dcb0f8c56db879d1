"""Training RA-CNN (Zhao and Cho, CVPR 2019) with the loop of every other training, on a database of the project's."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nndefense.attacks.checks import at_least, not_negative
from nndefense.database import ImageDatabase
from nndefense.datasets import ImageDataset
from nndefense.errors import InputError, ModelError
from nndefense.locks import locked
from nndefense.models import Classifier, build_classifier, resolve_device
from nndefense.models.architectures import ATTENTIVE
from nndefense.models.architectures.attentive import projected
from nndefense.models.racnn import (
    DESCRIPTION_FILE,
    NET_FOLDER,
    RaCnn,
    RowTable,
    attentive,
    clear_racnn,
    features_of,
    load_racnn,
    save_racnn,
    shard_rows,
)
from nndefense.training.batch import Batch, BatchAttack, Outcome
from nndefense.training.batches import DeviceImages
from nndefense.training.launcher import leads
from nndefense.training.loop import train_classifier
from nndefense.training.neighbors import nearest_others, row_images
from nndefense.training.progress import HistoryRow
from nndefense.training.settings import SettingsOptions

if TYPE_CHECKING:
    from typing_extensions import Unpack

_BATCH = 256
# What the loop would measure is the net on its own, without the retrieval, which is not what is trained here.
_NOT_HERE = ("keep_best", "patience", "stop_on_collapse", "unlabelled_per_batch")


def train_racnn(
    classifier: Classifier,
    database: ImageDatabase,
    dataset: ImageDataset,
    *,
    arch: str = "small-cnn",
    k: int = 5,
    mixup_draws: int = 5,
    mixup_weight: float = 1.0,
    images: ImageDataset | None = None,
    data_dir: str | Path | None = None,
    device: str | torch.device = "auto",
    out: str | Path | None = None,
    resume: bool = False,
    overwrite: bool = False,
    checkpoint_steps: int | None = None,
    checkpoint_seconds: float | None = 300.0,
    tensorboard: bool = False,
    progress: bool = True,
    on_epoch: Callable[[HistoryRow], None] | None = None,
    **settings: Unpack[SettingsOptions],
) -> RaCnn:
    """Train phi, U and g on the neighbours that the database's fixed features phi' find.

    The neighbours of every training image are found once, since phi' is fixed; the image itself, which may stand in
    the database, is left out. So the training accuracy of the history is that of images whose answer is not stored.
    When all is trained, phi of every row is computed once and kept in a table, so that a prediction costs two forward
    passes (one for phi', one for phi), a search and a look-up, not K + 2 passes.

    K is 5 or 10 in the paper, with 5 draws of local mixup; the weight of local mixup, the length of phi(x), the
    optimiser's settings and the shape of g are not known. Those of :class:`TrainingSettings` apply.

    Args:
        classifier: the one that the database was made with; its features retrieve, it is not trained.
        database: the rows to retrieve from, whole.
        dataset: labelled training images; they may be the database's own.
        arch: architecture of phi, one of :data:`nndefense.models.ARCHITECTURES`.
        k: neighbours, at least 1.
        mixup_draws, mixup_weight: as for :class:`RetrievalAugmented`.
        images: a data set with the image of every row; by default as :func:`row_images` finds them.
        data_dir: the folder of the data sets.
        device: as for :func:`nndefense.models.resolve_device`; the classifier is moved there.
        out: the folder for the result; by default nothing is written, and the table is held in memory.
        resume, overwrite, checkpoint_steps, checkpoint_seconds, tensorboard, progress, on_epoch, **settings: as for
            :func:`train_classifier`; ``seed`` also draws the first weights.

    Returns:
        The trained net with its table.

    Raises:
        InputError: settings, data or ``out`` cannot be used, or differ from those of the training to resume.
        DataError: the images of the rows are not at hand.
        DatabaseError: the database was made with another classifier.
        ModelError: the loss is no longer finite, or a checkpoint is damaged.
    """
    given = [name for name in _NOT_HERE if settings.get(name)]
    if given:
        raise InputError(f"a training of RA-CNN has no {given[0].replace('_', ' ')}: leave it out")
    folder = None if out is None else Path(out).expanduser()
    if folder is not None and (folder / DESCRIPTION_FILE).exists() and not (resume or overwrite):
        raise InputError(f"{folder} already holds an RA-CNN: choose another --out, or replace it with --overwrite")
    if folder is not None and resume and not folder.is_dir():
        raise InputError(f"{folder} holds no training to resume: leave --resume out to start one")
    with locked(folder) if folder is not None and leads() else nullcontext(False) as killed:
        if folder is not None and resume and killed:
            # Perhaps before the training of its net had begun, which begins anew in an empty folder.
            (folder / NET_FOLDER).mkdir(exist_ok=True)
        target = resolve_device(device)
        database.check_classifier(classifier)
        classifier.to(target).eval()
        rows = row_images(classifier, database, images, None if data_dir is None else Path(data_dir))
        dataset = dataset.usable
        neighbors = nearest_others(classifier, database, dataset, k, progress=progress and leads())
        objective = RetrievalAugmented(
            neighbors,
            rows,
            database.labels(database.row_numbers),
            draws=mixup_draws,
            weight=mixup_weight,
            description=f"ra-cnn(k={k}, draws={mixup_draws}, weight={float(mixup_weight)}, "
            f"database={database.fingerprint[:16]})",
        )
        net = build_classifier(
            arch if arch.startswith(ATTENTIVE) else ATTENTIVE + arch,
            input_shape=classifier.input_shape,
            classes=classifier.classes,
            mean=classifier.mean.flatten().tolist(),
            std=classifier.std.flatten().tolist(),
            seed=settings.get("seed", 0),
        )
        net.class_ids = classifier.class_ids
        if folder is not None and overwrite and leads():
            clear_racnn(folder)
        net = train_classifier(
            net,
            dataset,
            objective=objective,
            device=target,
            out=None if folder is None else folder / NET_FOLDER,
            resume=resume,
            overwrite=overwrite,
            checkpoint_steps=checkpoint_steps,
            checkpoint_seconds=checkpoint_seconds,
            tensorboard=tensorboard,
            progress=progress,
            on_epoch=on_epoch,
            **settings,
        )
        made: dict[str, Any] = {
            "k": k,
            "classifier": {"fingerprint": classifier.fingerprint, "source": classifier.source},
            "database": {
                "fingerprint": database.fingerprint,
                "rows": len(database),
                "name": str(database.manifest.data["name"]),
            },
            "training": {
                "mixup_draws": mixup_draws,
                "mixup_weight": float(mixup_weight),
                "objective": objective.description,
                "data": net.info.get("data"),
            },
        }
        if folder is None:
            return RaCnn(net, RowTable([torch.cat(list(_features(net, rows)))]), **made)
        if resume and (folder / DESCRIPTION_FILE).exists():
            found = load_racnn(folder, device=target)
            # Its net was compared by the training already.
            if found.k != k or found.database["fingerprint"] != database.fingerprint:
                raise ModelError(f"{folder} was trained with another K or database: start anew with --overwrite")
            return found
        if leads():
            save_racnn(folder, net, _features(net, rows), **made)
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            # So that no process looks for the table before it is there.
            torch.distributed.barrier()
        return load_racnn(folder, device=target)


@torch.no_grad()
def _features(net: Classifier, rows: ImageDataset) -> Iterator[Tensor]:
    """phi of every row's image, M x d at a time: as many rows as a file of the table holds."""
    net.eval()
    device, parts, held = net.device, list[Tensor](), 0
    each = shard_rows(attentive(net).dimension)
    for images, _, _ in rows.batches(_BATCH):
        found = features_of(net, images.to(device)).float().cpu()
        while held + len(found) >= each:
            yield torch.cat([*parts, found[: each - held]])
            found, parts, held = found[each - held :], [], 0
        if len(found):
            parts, held = [*parts, found], held + len(found)
    if parts:
        yield torch.cat(parts)


def simplex_draws(
    shape: Sequence[int],
    k: int,
    *,
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
) -> Tensor:
    """Weights over k items, uniform on the simplex: the gaps between k - 1 sorted uniforms, 0 and 1.

    This is Dirichlet(1, ..., 1). Uniforms divided by their sum are not: they crowd in the middle.

    Args:
        shape: how many draws.
        k: at least 1.
        generator, device: as for :func:`torch.rand`.

    Returns:
        ``shape`` x k, at least 0, every row summing to 1.

    Raises:
        InputError: k below 1.
    """
    k = at_least("k", k)
    cuts = torch.rand((*shape, k - 1), generator=generator, device=device).sort(-1).values
    ends = cuts.new_zeros((*shape, 1))
    return torch.cat([cuts, ends + 1], -1) - torch.cat([ends, cuts], -1)


def local_mixup(net: nn.Module, neighbors: Tensor, targets: Tensor, draws: int) -> Tensor:
    """``1/M sum_m CE(g(sum_k a_mk phi(x'_k)), sum_k a_mk y'_k)`` with a_m uniform on the simplex, in nats.

    Args:
        net: g, features ... x d -> logits ... x C.
        neighbors: N x K x d.
        targets: N x K x C, the neighbours' classes as distributions.
        draws: M, at least 1, for each of the N images; from torch's default generator.

    Returns:
        The mean over images and draws.
    """
    weights = simplex_draws((len(neighbors), draws), neighbors.shape[1], device=neighbors.device).to(neighbors)
    log_p = net(projected(weights, neighbors)).log_softmax(-1)
    loss: Tensor = -(projected(weights, targets.to(log_p)) * log_p).sum(-1).mean()
    return loss


class RetrievalAugmented:
    """``mean_i CE(g(P(x_i)), y_i) + weight * local mixup``, with each image's neighbours found beforehand.

    The neighbours' images go through phi in the same pass as the batch, each distinct one once, so that phi learns
    from both sides and batch normalisation sees both. The images of the batch may be augmented; their neighbours are
    those of the images as they are.
    """

    def __init__(
        self,
        neighbors: Tensor,
        images: ImageDataset,
        labels: Tensor,
        *,
        draws: int = 5,
        weight: float = 1.0,
        description: str = "",
    ) -> None:
        """
        Args:
            neighbors: N x K, for each training image its neighbours' numbers in ``images``.
            images: M images, the database's rows.
            labels: M classes of theirs, in the classifier's numbers; -1 where unknown.
            draws: of local mixup a step and image (N_MU of the paper), at least 1.
            weight: of local mixup against the cross-entropy; the paper's is unknown. 0 leaves it out.
            description: identifies the objective with all that it holds, for records.

        Raises:
            InputError: numbers that cannot be used, or, with local mixup, a neighbour without a label.
        """
        draws = at_least("draws", draws)
        not_negative("the weight of local mixup", weight)
        if weight and len(neighbors) and bool((labels[torch.unique(neighbors)] < 0).any()):
            raise InputError(
                "local mixup mixes the neighbours' labels, but some rows of the database have none: build it from "
                "labelled images, or set the weight of local mixup to 0"
            )
        self.neighbors, self.labels, self.draws, self.weight = neighbors, labels, draws, weight
        self.description = description or f"ra-cnn(draws={draws}, weight={float(weight)})"
        self._dataset = images
        self._images: DeviceImages | None = None

    def __call__(self, model: nn.Module, batch: Batch, attack: BatchAttack | None = None) -> Outcome:
        """The loss on one batch; ``attack`` is not used.

        Raises:
            InputError: a batch that does not know which images it holds.
        """
        if batch.rows is None or batch.labelled is not None:
            raise InputError("the objective ra-cnn needs batches of the training set that its neighbours were found in")
        net = attentive(_bare(model))
        near = self.neighbors.to(batch.rows.device)[batch.rows]
        distinct, place = torch.unique(near, return_inverse=True)
        pictures = self._fetch(distinct)
        found = features_of(_bare(model), torch.cat([batch.images, pictures]))
        query, neighbors = found[: len(near)], found[len(near) :][place]
        logits = net.answer(query, neighbors)
        loss = F.cross_entropy(logits, batch.labels)
        if not self.weight:
            return Outcome(loss, clean=logits.detach())
        targets = F.one_hot(self.labels.to(near.device)[near], logits.shape[1])
        mixed = local_mixup(net.g, neighbors, targets, self.draws)
        parts = {"projected_loss": loss.detach(), "mixup_loss": mixed.detach()}
        return Outcome(loss + self.weight * mixed, clean=logits.detach(), parts=parts)

    def _fetch(self, rows: Tensor) -> Tensor:
        """Images of the database: from the device where the set is small enough to be kept there, else read."""
        if self._images is None or self._images.device != rows.device:
            self._images = DeviceImages(self._dataset, rows.device)
        return self._images.at(rows) if self._images.resident is not None else self._images.fetch(rows.cpu())


def _bare(model: nn.Module) -> Classifier:
    """The classifier itself, where ``torch.compile`` has wrapped it: phi, U and g are called one by one."""
    bare = getattr(model, "_orig_mod", model)
    assert isinstance(bare, Classifier)
    return bare
