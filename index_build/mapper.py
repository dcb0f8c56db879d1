"""Mapper: a batch of images -> posteriors and raw feature vectors, in one forward pass for any number of layers."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from index_build import pieces
from index_build.job import BuildJob, BuildTarget
from nndefense.database.near_images import NearSearch
from nndefense.database.tuning import fastest
from nndefense.database.writer import PCA_FILE, load_pca
from nndefense.datasets import ImageDataset
from nndefense.errors import DatabaseError, check_choice, warn
from nndefense.features import PCA, FeatureSpec, OutputLayout, layer_in, layouts_in, pooled, tapped
from nndefense.images import check_images
from nndefense.models import Classifier
from nndefense.models.class_names import match_classes
from nndefense.models.folding import fold_batch_norms

T = TypeVar("T")
PRECISIONS = ("auto", "float32", "bfloat16", "float16")
POSTERIOR_TOLERANCE = 0.02
"""How far any posterior of the probe batch may be from its float32 value."""
VECTOR_TOLERANCE = 0.02
"""How far any raw vector of the probe batch may be from its float32 value, as a share of its length."""
_WORTH = 1.05
_PROBE_SECONDS = 0.5


@dataclass(frozen=True)
class Mapped:
    """What the classifier says of N images: posteriors N x classes, and N x D raw vectors for each feature; float32."""

    posteriors: Tensor
    vectors: tuple[Tensor, ...]

    def finite(self) -> Tensor:
        """Which of the images have no NaN or infinite value in anything: N truth values."""
        return torch.stack([torch.isfinite(part).all(1) for part in (self.posteriors, *self.vectors)]).all(0)


@dataclass(frozen=True)
class PrecisionChoice:
    """In what precision and memory layout a job runs the classifier.

    Attributes:
        precision: ``float32``, ``bfloat16`` or ``float16``.
        channels_last: whether images and filters lie in memory with the channels last.
        why: the reason, in one sentence.
        rates: images per second of what was tried on the probe batch; empty where the precision was given.
        posterior_error: the largest difference of a posterior from float32, on the probe batch.
        vector_error: the largest difference of a vector from float32, as a share of its length.
    """

    precision: str
    channels_last: bool
    why: str
    rates: dict[str, float]
    posterior_error: float
    vector_error: float


class Mapper:
    """Runs the classifier once per batch and pools every layer that is asked for (Dubey et al. 2019, section 3).

    The pass goes to its end, since the posteriors need it, and each layer is pooled as soon as it is there. Where batch
    normalisations can be folded into convolutions, and in another precision or layout than the classifier's own, a copy
    of it is used; the caller's stays as it is.
    """

    def __init__(
        self,
        classifier: Classifier,
        features: Sequence[FeatureSpec],
        device: torch.device,
        *,
        precision: str = "float32",
        channels_last: bool | None = None,
    ) -> None:
        """
        Args:
            classifier: on ``device``, in evaluation mode.
            features: the layers and poolings.
            device: where it runs.
            precision: ``float32``, ``bfloat16``, ``float16``, or ``auto``: what :meth:`resolve` finds to be fastest;
                it is asked with the first batch unless it was before.
            channels_last: the memory layout; None: channels last in bfloat16 and float16 alone.

        Raises:
            InputError: an unknown precision, or a layer that the classifier does not have.
        """
        check_choice("precision", precision, PRECISIONS)
        self.classifier, self.features, self.device = classifier, tuple(features), device
        self.layers = [layer_in(classifier, feature.layer) for feature in self.features]
        self.choice: PrecisionChoice | None = None
        self._net: nn.Module = classifier
        self._plan = ("float32", False)
        if precision != "auto":
            last = precision != "float32" if channels_last is None else channels_last
            self._use(PrecisionChoice(precision, last, f"{precision} was asked for", {}, 0.0, 0.0))

    @cached_property
    def _layouts(self) -> dict[str, OutputLayout]:
        # Looked at with the first batch: a job that has nothing left to map makes no pass.
        example = torch.full((1, *self.classifier.input_shape), 0.5, device=self.device)
        return layouts_in(self.classifier, self.layers, example)

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Mapped:
        """Map images N x C x H x W in [0, 1].

        Raises:
            InputError: images that are not finite, not in [0, 1] or of another shape than the classifier takes, or a
                layer whose output has no axis for the images.
        """
        check_images(images, channels=self.classifier.input_shape[0])
        if self.choice is None:
            self.resolve(images)
        return self._map(self._sent(images))

    def over(self, pairs: Iterable[tuple[T, Tensor]]) -> Iterator[tuple[T, Mapped]]:
        """Map one batch after another; results are on the CPU, in the same order.

        On a GPU the next batch travels while one is computed, from pinned memory, and a result is fetched when the
        next batch is already under way. On a CPU this is a plain loop.

        Args:
            pairs: anything, and images N x C x H x W.

        Raises:
            InputError: as for a call.
        """
        if self.device.type != "cuda":
            for what, images in pairs:
                mapped = self(images)
                yield what, Mapped(mapped.posteriors.cpu(), tuple(vectors.cpu() for vectors in mapped.vectors))
            return
        yield from self._overlapped(pairs)

    @torch.no_grad()
    def resolve(self, probe: Tensor) -> PrecisionChoice:
        """Choose the fastest precision and layout that stays within the tolerances, and use it from now on.

        Tried are float32 in both layouts, bfloat16, and on a GPU float16; each for about half a second. Another than
        plain float32 must be at least 5 % faster. On the probe batch no posterior may differ from plain float32 by
        more than 0.02, and no raw vector by more than 2 % of its length.

        Args:
            probe: images as they will come, in a batch as large as they will come.

        Raises:
            InputError: as for a call.
        """
        check_images(probe, channels=self.classifier.input_shape[0])
        plans = [("float32", False), ("float32", True), ("bfloat16", True)]
        if self.device.type == "cuda":
            plans.append(("float16", True))
        rates: dict[str, float] = {}
        errors: dict[tuple[str, bool], tuple[float, float]] = {}
        exact: Mapped | None = None
        for plan in plans:
            self._prepare(*plan)
            mapped = self._map(self._sent(probe))
            exact = mapped if exact is None else exact
            errors[plan] = _errors(mapped, exact)
            rates[_name(*plan)] = self._rate(probe)
        fit = [p for p in plans if errors[p][0] <= POSTERIOR_TOLERANCE and errors[p][1] <= VECTOR_TOLERANCE]
        # Plain float32 is always within the tolerances, being what they are measured from.
        best = max(fit, key=lambda plan: rates[_name(*plan)])
        if rates[_name(*best)] < _WORTH * rates[_name(*plans[0])]:
            best = plans[0]
        why = f"{_name(*best)} does {rates[_name(*best)] / rates[_name(*plans[0])]:.2f} times the images of float32"
        if best == plans[0]:
            why = "nothing that stays within the tolerances is 5 % faster than float32"
        return self._use(PrecisionChoice(*best, why, {n: round(r, 2) for n, r in rates.items()}, *errors[best]))

    def _use(self, choice: PrecisionChoice) -> PrecisionChoice:
        self._prepare(choice.precision, choice.channels_last)
        self.choice = choice
        return choice

    def _prepare(self, precision: str, channels_last: bool) -> None:
        self._plan = (precision, channels_last)
        plain = self._plan == ("float32", False)
        try:
            self._net = copy.deepcopy(self.classifier)
        except Exception:
            # Not every net can be copied, and in plain float32 none need be.
            if not plain:
                raise
            self._net = self.classifier
            return
        if not fold_batch_norms(self._net, self.layers) and plain:
            # A second one in memory would gain nothing.
            self._net = self.classifier
        if precision != "float32":
            # Autocast would turn the filters into that precision anew with every batch.
            for module in self._net.modules():
                if isinstance(module, (nn.Conv2d, nn.Linear)):
                    module.to(getattr(torch, precision))
        if channels_last:
            self._net = self._net.to(memory_format=torch.channels_last)

    def _sent(self, images: Tensor) -> Tensor:
        """The images where and how the net wants them."""
        if self.device.type == "cuda" and images.device.type == "cpu":
            images = images.pin_memory()
        images = images.to(self.device, non_blocking=True)
        return images.contiguous(memory_format=torch.channels_last) if self._plan[1] else images

    @torch.no_grad()
    def _map(self, images: Tensor) -> Mapped:
        precision = self._plan[0]
        cast: Any = nullcontext()
        if precision != "float32":
            cast = torch.autocast(self.device.type, dtype=getattr(torch, precision))
        pools = partial(self._pooled, self._layouts)
        with tapped(self._net, sorted(set(self.layers)), pools) as outputs, cast:
            logits = self._net(images)
        vectors = tuple(outputs[layer][place] for place, layer in enumerate(self.layers))
        return Mapped(logits.float().softmax(1), vectors)

    def _pooled(self, layouts: dict[str, OutputLayout], name: str, output: Tensor) -> dict[int, Tensor]:
        """The vectors of all features of a layer, by their place; pooled where it is, without a copy of the map."""
        whole = output.float()
        found = {}
        for place, (layer, feature) in enumerate(zip(self.layers, self.features, strict=True)):
            if layer == name:
                vectors = pooled(whole, feature, layouts[name])
                shared = vectors.untyped_storage().data_ptr() == output.untyped_storage().data_ptr()
                found[place] = vectors.clone() if shared else vectors
        return found

    def _rate(self, probe: Tensor) -> float:
        """Images per second on the probe: the best of at least two passes in half a second."""
        # Fetching the posteriors waits for a GPU.
        return len(probe) / fastest(lambda: self._map(self._sent(probe)).posteriors.cpu(), _PROBE_SECONDS)

    def _overlapped(self, pairs: Iterable[tuple[T, Tensor]]) -> Iterator[tuple[T, Mapped]]:
        copies = torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]
        computes = torch.cuda.current_stream(self.device)

        def upload(images: Tensor) -> Tensor:
            check_images(images, channels=self.classifier.input_shape[0])
            if self.choice is None:
                self.resolve(images)
            with torch.cuda.stream(copies):
                return self._sent(images)

        def fetch(mapped: Mapped) -> tuple[Mapped, torch.cuda.Event]:
            held = [torch.empty(t.shape, pin_memory=True) for t in (mapped.posteriors, *mapped.vectors)]
            for host, tensor in zip(held, (mapped.posteriors, *mapped.vectors), strict=True):
                host.copy_(tensor, non_blocking=True)
            event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            event.record(computes)
            return Mapped(held[0], tuple(held[1:])), event

        waiting: tuple[T, Mapped, torch.cuda.Event] | None = None
        coming = iter(pairs)
        sent = next(((what, upload(images)) for what, images in coming), None)
        while sent is not None:
            what, images = sent
            computes.wait_stream(copies)
            # The copy's memory must not be given away before the computation is done with it.
            images.record_stream(computes)
            result, event = fetch(self._map(images))
            sent = next(((other, upload(more)) for other, more in coming), None)
            if waiting is not None:
                waiting[2].synchronize()
                yield waiting[0], waiting[1]
            waiting = what, result, event
        if waiting is not None:
            waiting[2].synchronize()
            yield waiting[0], waiting[1]


def _name(precision: str, channels_last: bool) -> str:
    return precision + (", channels last" if channels_last else "")


def _errors(mapped: Mapped, exact: Mapped) -> tuple[float, float]:
    """The largest difference of a posterior, and of a vector as a share of its length; infinite for NaN."""
    # An image that plain float32 has no answer for is left out of the database.
    fine = exact.finite()
    if not bool(fine.any()):
        return 0.0, 0.0
    posterior = float((mapped.posteriors - exact.posteriors)[fine].abs().max())
    shares = [
        float(((some - true).norm(dim=1) / true.norm(dim=1).clamp_min(1e-12))[fine].max())
        for some, true in zip(mapped.vectors, exact.vectors, strict=True)
        if true.shape[1]
    ]
    worst = max(shares, default=0.0)
    return (posterior if posterior == posterior else float("inf"), worst if worst == worst else float("inf"))


@dataclass(frozen=True)
class ShardTools:
    """Made once in a process, for all shards that it makes.

    Attributes:
        dataset: the images.
        mapper: classifier and layers, in the precision of the job.
        pcas: for each target its PCA, on the mapper's results' device (the CPU), or None.
        numbers: the data set's class numbers as the classifier's, and -1 at the end, where the label -1 finds it.
        near: finds images that are to be kept out, or None.
        workers: threads that read and decode; None for one for each CPU.
    """

    dataset: ImageDataset
    mapper: Mapper
    pcas: Sequence[PCA | None]
    numbers: Tensor
    near: NearSearch | None = None
    workers: int | None = None

    @classmethod
    def of(
        cls,
        job: BuildJob,
        dataset: ImageDataset,
        classifier: Classifier,
        exclude: ImageDataset | None = None,
        *,
        workers: int | None = None,
    ) -> ShardTools:
        """Prepare to work on a job that has begun; what is given must be what it was begun with.

        Raises:
            DatabaseError: a PCA that is missing or damaged.
        """
        precision, last = job.precision["precision"], job.precision["channels_last"]
        features = [target.feature for target in job.targets]
        mapper = Mapper(classifier.eval(), features, classifier.device, precision=precision, channels_last=last)
        near = None
        if exclude is not None and job.excluded is not None:
            near = NearSearch(exclude, job.excluded["eps"], device=classifier.device)
        pcas = [pca_of(target) for target in job.targets]
        return cls(dataset, mapper, pcas, label_numbers(dataset, classifier), near, workers)

    def labels(self, labels: Tensor) -> Tensor:
        """The data set's class numbers as the classifier's; -1 stays -1."""
        return self.numbers[labels].to(labels)


def label_numbers(dataset: ImageDataset, classifier: Classifier) -> Tensor:
    """For each class of the data set its number among the classifier's, -1 where it has none of its own; -1 at the end.

    A database needs no labels: they are stored for whoever wants to look at the rows.
    """
    found = match_classes(dataset.classes, classifier.classes, classifier.class_ids).numbers
    counts = Counter(found)
    placed = [number if number is not None and counts[number] == 1 else -1 for number in found]
    return torch.tensor([*placed, -1])


def tell_unplaced(dataset: ImageDataset, classifier: Classifier) -> None:
    """Warn of classes that :func:`label_numbers` cannot place, and of an order that it has to guess."""
    numbers = label_numbers(dataset, classifier)
    if count := numbers[:-1].tolist().count(-1):
        images = int((numbers[torch.from_numpy(dataset.labels)] < 0).sum())
        name = dataset.classes[numbers.tolist().index(-1)]
        told = (
            f"{count:,} of the {len(dataset.classes):,} classes of {dataset.name} (such as {name!r}) cannot be placed "
            f"among the classifier's: images stored without a label, which a search never uses: {images:,}"
        )
    else:
        told = match_classes(dataset.classes, classifier.classes, classifier.class_ids).doubt
    if told:
        warn(told)


def pca_of(target: BuildTarget) -> PCA | None:
    """The PCA of a target of a job that has begun.

    Raises:
        DatabaseError: it is missing or damaged.
    """
    if not target.pca:
        return None
    path = target.folder / PCA_FILE
    if pieces.finished(path, checksum=True) is None:
        raise DatabaseError(f"{path} is missing or damaged: begin again with 'nndefense index build --overwrite'")
    return load_pca(path)
