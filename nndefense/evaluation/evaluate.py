"""Accuracy of defences under attacks: each attacked batch is made once, shown to all that it is for, and kept."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from nndefense import attacks
from nndefense.attacks.retrieval import RetrievalSurface
from nndefense.database import Rule
from nndefense.datasets import ImageDataset
from nndefense.errors import DataError, InputError, plain
from nndefense.evaluation.cells import CellStore
from nndefense.evaluation.judging import FRESH_DRAWS, confident, draw_seeds, is_random, judges_of, refuted_among
from nndefense.evaluation.ladder import to_hex
from nndefense.evaluation.threats import AttackSettings, Plan, ThreatModel, attacks_by, peak_memory_mb, run_attack
from nndefense.memory import reused_memory
from nndefense.statistics import wilson_interval


@dataclass(frozen=True)
class Subject:
    """A defence under test, or the bare classifier.

    Attributes:
        name: ``none`` for the bare classifier, ``nearest-neighbor`` for the defence over the database, or any other.
        model: images N x C x H x W in [0, 1] -> scores N x K (logits or log-probabilities).
        variant: what it is in the comparison: ``none``, ``calibrated``, ``weighting``, ``layer``, ``rows`` or
            ``defense``; in a comparison the kind of its row, such as ``jpeg``.
        database: fingerprint of its database, or None.
        database_rows: number of rows that it searches, or None.
        every_eps: whether it is run in every cell, or only clean and at the headline budget.
        identity: what else tells it apart from others of its name, for finished cells to be found again.
        white: what an attacker who knows it differentiates: images -> scores N x K; None: he is not sent against it.
        surface: for the attacks on its retrieval, or None.
        also: attacks that who knows it runs beside those of the plan: names in :mod:`nndefense.attacks.registry`.
    """

    name: str
    model: nn.Module
    variant: str
    database: str | None = None
    database_rows: int | None = None
    every_eps: bool = True
    identity: str = ""
    white: nn.Module | None = None
    surface: RetrievalSurface | None = None
    also: tuple[str, ...] = ()


# Takes a threat model, an attack, one of its radii and a batch of images that it made there.
Seen = Callable[[ThreatModel, AttackSettings, float, Tensor], object]

# What belongs to some attacks only.
OWN = ("query_limit", "attack_sha256", "certified", "draw_seeds", "refuted")


@dataclass(frozen=True)
class Record:
    """One accuracy with all that is needed to say what it is an accuracy of.

    ``accuracy`` is the fraction of all n images that are classified rightly after the attack; ``ci_low`` and
    ``ci_high`` are its Wilson 95 % interval; ``correct`` says which images, as hexadecimal digits of one bit each.
    ``accuracy_8bit`` is the same after rounding to 8-bit pixels, at the headline budget, else None.

    ``confidence`` is the mean over the images of the probability of the class that is answered, and
    ``confidence_wrong`` that over the wrong answers, None where there is none.

    ``steps`` are gradient steps (0 where the attack counts queries, and ``query_limit`` is how many for each image);
    ``attack_sha256`` is of the code of an attack that is not the library's, ``attack_version`` that of one which is.

    ``eps`` is in units of ``norm``; ``eps_raw`` is the mean radius over the images in raw pixels of [0, 1] (per entry
    for linf, an l2 length otherwise), and ``budget_excess`` by how much any image passes its own.

    ``seconds`` is the time of the defence's predictions. ``attack_seconds``, ``forwards``, ``backwards`` and
    ``queries`` (images x passes) are the cost of the attack, which all defences of a cell share; ``peak_memory_mb`` is
    the process's, up to then. ``certified`` says of the exact attack, like ``correct``, which images are proven to
    stand: the other right ones are open, and the interval begins at that of the certified ones.

    A defence that draws at random is judged over fresh draws, each from one of the ``draw_seeds`` and none of them an
    attacker's: ``accuracy`` is the mean over them, and ``correct`` says which images are right on most. Of a smoothed
    one ``refuted`` says, like ``correct``, of which images another class is beyond doubt.
    """

    dataset: str
    defense: str
    variant: str
    attack: str
    steps: int
    restarts: int
    loss: str
    threat_model: str
    knowledge: str
    norm: str
    eps: float
    eps_raw: float
    budget_excess: float
    n: int
    accuracy: float
    ci_low: float
    ci_high: float
    correct: str
    accuracy_8bit: float | None
    confidence: float
    confidence_wrong: float | None
    seed: int
    seconds: float
    attack_seconds: float
    forwards: int
    backwards: int
    queries: int
    peak_memory_mb: float
    classifier: str
    database: str | None
    database_rows: int | None
    surrogate: str | None
    query_limit: int = 0
    attack_sha256: str = ""
    attack_version: int = 1
    certified: str = ""
    draw_seeds: list[int] = field(default_factory=list)
    refuted: str = ""

    def to_json(self) -> dict[str, Any]:
        """Plain values for a results file; some only where there is something to say."""
        plain = asdict(self)
        return {name: value for name, value in plain.items() if value or name not in OWN}


@reused_memory()
def evaluate(
    dataset: ImageDataset,
    subjects: Sequence[Subject],
    threats: Sequence[ThreatModel],
    attack: Plan,
    *,
    headline_eps: float,
    classifier: str,
    label_maps: Mapping[str, Tensor],
    headline_norm: str | None = None,
    seed: int = 0,
    batch_size: int = 128,
    device: str | torch.device = "cpu",
    store: CellStore | None = None,
    seen: Seen | None = None,
    progress: Callable[[int], object] = lambda images: None,
) -> list[Record]:
    """Measure every subject clean and under every threat model at every radius.

    The random starts of a cell (threat model, attack and radius) depend on the seed alone, so that cells can be
    compared and repeated one by one.

    Args:
        dataset: labelled images.
        subjects: what to measure.
        threats: whom to attack.
        attack: how; one for all threat models, or several for each, by its name.
        headline_eps: the radius at which even subjects without ``every_eps`` are run, and 8-bit pixels are tried.
        classifier: fingerprint of the classifier, for the records.
        label_maps: for each threat model's name, and ``clean`` for the subjects, the class number of the attacked
            (measured) model for each class of the data set.
        headline_norm: the norm of ``headline_eps``; by default any.
        seed: draws the random starts.
        batch_size: images per forward pass.
        device: where the images are put.
        store: where finished cells are kept and found again; nowhere by default.
        seen: called with every batch of attacked images; those of finished cells are made again for it.
        progress: called with the number of images after each batch of each cell.

    Raises:
        DataError: an empty data set, or images without labels.
        InputError: two subjects of one name, or a threat model without attacks.
    """
    dataset = dataset.usable
    _check(dataset, subjects, threats, attack)
    seed, batch_size, headline_eps = plain(seed), plain(batch_size), plain(headline_eps)
    cells: list[_Cell] = [_Cell(None, None, 0.0)]
    for threat in threats:
        for settings in attacks_by(threat, attack):
            cells += [_Cell(threat, settings, eps) for eps in settings.eps]
    run = _Run(dataset, classifier, label_maps, seed, batch_size, device, progress, seen)
    records: list[Record] = []
    for cell in cells:
        headline = cell.at(headline_eps, headline_norm)
        active = [
            subject
            for subject in subjects
            if cell.is_for(subject) and (cell.threat is None or subject.every_eps or headline)
        ]
        key = run.key(cell, active, headline)
        stored = store.get(cell.name, key) if store is not None else None
        if stored is not None:
            records += [Record(**record) for record in stored]
            if seen is None or cell.threat is None:
                progress(len(dataset))
                continue
        # What is random without a generator of its own (a defence's draws under attack) repeats with its cell.
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            measured = run.measure(cell, active, headline)
        if store is not None and stored is None:
            store.put(cell.name, key, [record.to_json() for record in measured])
        records += measured if stored is None else []
    return records


@dataclass(frozen=True)
class _Cell:
    """One attack at one radius under one threat model; without them, the clean images."""

    threat: ThreatModel | None
    attack: AttackSettings | None
    eps: float

    @property
    def name(self) -> str:
        """A readable name; the key says the rest."""
        if self.threat is None or self.attack is None:
            return "clean"
        whose = f" {self.threat.subject}" if self.threat.subject else ""
        return f"{self.threat.name}{whose} {self.attack.name} {self.attack.norm} {self.eps:g}"

    def is_for(self, subject: Subject) -> bool:
        """Whether the cell's images are shown to a subject."""
        return self.threat is None or self.threat.subject in (None, subject.name)

    def at(self, eps: float, norm: str | None) -> bool:
        """Whether it is at the headline budget."""
        return self.attack is not None and self.eps == eps and norm in (None, self.attack.norm)


@dataclass(frozen=True)
class _Run:
    """What all cells share."""

    dataset: ImageDataset
    classifier: str
    label_maps: Mapping[str, Tensor]
    seed: int
    batch_size: int
    device: str | torch.device
    progress: Callable[[int], object]
    seen: Seen | None

    def measure(self, cell: _Cell, active: Sequence[Subject], headline: bool) -> list[Record]:
        """Attack the images once, and show them to every subject."""
        answers: dict[str, list[Tensor]] = {subject.name: [] for subject in active}
        proven: list[Tensor] = []
        refuted: dict[str, list[Tensor]] = {subject.name: [] for subject in active}
        judges = {subject.name: judges_of(subject.model, self.seed) for subject in active}
        rounded = dict.fromkeys(answers, 0.0)
        seconds = dict.fromkeys(answers, 0.0)
        generator = torch.Generator().manual_seed(self.seed)
        attack_seconds = radii = excess = 0.0
        forwards = backwards = queries = 0
        for images, labels, _ in self.dataset.batches(self.batch_size):
            images, truth = images.to(self.device), self.label_maps["clean"][labels].to(self.device)
            if cell.threat is not None and cell.attack is not None:
                clean, radius = images, attacks.radius(images, cell.eps, cell.attack.norm)
                radii += float(radius.sum())
                begun = time.perf_counter()
                aims = self.label_maps[cell.threat.name][labels].to(self.device)
                made = run_attack(cell.attack, cell.threat.target, images, aims, cell.eps, generator)
                attack_seconds += time.perf_counter() - begun
                images = made.images
                forwards, backwards = forwards + made.forwards, backwards + made.backwards
                queries += made.queries
                if self.seen is not None:
                    self.seen(cell.threat, cell.attack, cell.eps, images)
                proven += [] if made.certified is None else [made.certified.cpu()]
                moved = attacks.distance(clean.double(), images.double(), cell.attack.norm)
                excess = max(excess, float((moved - radius.double()).max()))
            for subject in active:
                begun = time.perf_counter()
                answers[subject.name].append(_answers(judges[subject.name], images, truth))
                seconds[subject.name] += time.perf_counter() - begun
                refuted[subject.name] += refuted_among(subject.model, answers[subject.name][-1][0], images, truth)
                if headline and subject.every_eps:
                    again = _answers(judges[subject.name], (images * 255).round() / 255, truth)[0]
                    rounded[subject.name] += float(again.mean(0).sum())
            self.progress(len(images))
        n = len(self.dataset)
        plain: dict[str, Any] = (
            cell.attack.to_json() if cell.attack else {"name": "none", "norm": "none", "steps": 0, "restarts": 0}
        )
        records = []
        for subject in active:
            right, sure = torch.cat(answers[subject.name], 2)
            shares, wrong = right.mean(0), sure[right == 0]
            bits, count = (shares > 0.5).numpy(), float(shares.sum())
            certified = torch.cat(proven).numpy() if proven else bits
            low, high = wilson_interval(int(certified.sum()) if proven else count, n)[0], wilson_interval(count, n)[1]
            records.append(
                Record(
                    dataset=self.dataset.name,
                    defense=subject.name,
                    variant=subject.variant,
                    attack=plain["name"],
                    steps=plain.get("steps", 0),
                    restarts=plain["restarts"],
                    loss=plain.get("loss", "cross-entropy" if cell.threat else "none"),
                    threat_model=cell.threat.name if cell.threat else "clean",
                    knowledge=cell.threat.knowledge if cell.threat else "",
                    norm=plain["norm"],
                    eps=cell.eps,
                    eps_raw=radii / n,
                    budget_excess=max(excess, 0.0),
                    n=n,
                    accuracy=count / n,
                    ci_low=low,
                    ci_high=high,
                    correct=to_hex(bits),
                    accuracy_8bit=rounded[subject.name] / n if headline and subject.every_eps else None,
                    confidence=round(float(sure.mean()), 6),
                    confidence_wrong=round(float(wrong.mean()), 6) if len(wrong) else None,
                    seed=self.seed,
                    seconds=round(seconds[subject.name], 4),
                    attack_seconds=round(attack_seconds, 4),
                    forwards=forwards,
                    backwards=backwards,
                    queries=queries,
                    peak_memory_mb=round(peak_memory_mb(), 1),
                    classifier=self.classifier,
                    database=subject.database,
                    database_rows=subject.database_rows,
                    surrogate=cell.threat.surrogate if cell.threat else None,
                    query_limit=plain.get("queries", 0),
                    attack_sha256=plain.get("sha256", ""),
                    attack_version=plain.get("version", 1),
                    certified=to_hex(certified) if proven else "",
                    draw_seeds=draw_seeds(self.seed) if is_random(subject.model) else [],
                    refuted=to_hex(torch.cat(refuted[subject.name]).numpy()) if refuted[subject.name] else "",
                )
            )
        return records

    def key(self, cell: _Cell, active: Sequence[Subject], headline: bool) -> dict[str, Any]:
        """All that the records of a cell depend on."""
        threat = cell.threat
        return {
            "data": [self.dataset.name, self.dataset.fingerprint],
            "classifier": self.classifier,
            "subjects": [identity_of(subject) for subject in active],
            "threat": [threat.name, threat.surrogate, threat.knowledge, threat.subject, starts_at_images(threat)]
            if threat
            else None,
            "attack": {**cell.attack.to_json(), "eps": cell.eps} if cell.attack else None,
            "headline": headline,
            "seed": self.seed,
            # The random starts of a batch follow those of the one before it.
            "batch_size": self.batch_size,
        }


def starts_at_images(threat: ThreatModel) -> bool:
    """Whether attacks of this attacker also start on the way to the images of the defence's rows."""
    return getattr(getattr(threat.target, "rows", None), "images", None) is not None


def _answers(judges: Sequence[nn.Module], images: Tensor, truth: Tensor) -> Tensor:
    """What each judge gets right (1 or 0), and the probability of what it answers: 2 x judges x N, float64."""
    with torch.no_grad():
        said, sure = zip(*(confident(judge(images)) for judge in judges), strict=True)
    return torch.stack([(torch.stack(said) == truth).double(), torch.stack(sure).double()]).cpu()


def _check(dataset: ImageDataset, subjects: Sequence[Subject], threats: Sequence[ThreatModel], attack: Plan) -> None:
    if len(dataset) == 0:
        raise DataError(f"the data set {dataset.name} is empty: there is nothing to evaluate on")
    if (dataset.labels < 0).any():
        raise DataError(f"the data set {dataset.name} has images without a label: an accuracy needs a label for each")
    names = [subject.name for subject in subjects]
    if len(set(names)) != len(names):
        raise InputError(f"two subjects have the same name among {', '.join(names)}: name them apart")
    for threat in threats:
        if threat.subject is not None and threat.subject not in names:
            raise InputError(f"the {threat.name} attack is on {threat.subject!r}, which is no subject")
        if not isinstance(attack, AttackSettings) and not attack.get(threat.name):
            raise InputError(f"no attack is given for the threat model {threat.name!r}")


def identity_of(subject: Subject) -> list[Any]:
    """What tells a subject apart from others, for finished cells to be found again."""
    # Two defences over the same database differ in these.
    rule = getattr(subject.model, "rule", subject.model)
    names = ("k", "weighting", "power", "terms")
    settings = [getattr(rule, name, None) for name in names]
    if isinstance(rule, Rule):
        # What is beyond these stands only where it is not the default: older cells are found again.
        settings += [[name, value] for name, value in rule.settings.items() if name not in names]
    named = [subject.name, subject.variant, subject.database, subject.database_rows, settings]
    named += [subject.identity] if subject.identity else []
    return [*named, FRESH_DRAWS] if is_random(subject.model) else named
