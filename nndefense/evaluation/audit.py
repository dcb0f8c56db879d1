"""Self-audit: was the attack strong enough, and is the number what it says? (Carlini et al. 2019, section 5.)

Each check has a name and passes, fails, or could not be made; a report shows them all. The first half reads records,
the second makes small runs of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nndefense import attacks
from nndefense.attacks.norms import random_in_ball
from nndefense.defenses import NearestNeighborDefense
from nndefense.evaluation.evaluate import Record
from nndefense.evaluation.ladder import BARE, DEFENDED
from nndefense.evaluation.threats import AttackSettings, ThreatModel, run_attack
from nndefense.statistics import mcnemar_p

# Draws of noise in all, shared out over the images that are tried.
NOISE_DRAWS = 10_000
_SAME = 1e-4


@dataclass(frozen=True)
class AuditLine:
    """One check: ``passed`` is None where it could not be made, and ``text`` says what was found."""

    name: str
    passed: bool | None
    text: str

    def to_json(self) -> dict[str, Any]:
        """Plain values for a results file."""
        return asdict(self)


# -- checks on records ---------------------------------------------------------------------------------------------


def audit_records(records: Sequence[Record], classes: int) -> list[AuditLine]:
    """The checks that need nothing but the records; ``classes`` is the number of classes that guessing chooses from."""
    return [
        _budget(records),
        _undefended(records, classes),
        _eight_bits(records),
        _larger_budgets(records),
        _stronger_than_transfer(records),
        _adaptive_is_strongest(records),
    ]


def _budget(records: Sequence[Record]) -> AuditLine:
    attacked = [record for record in records if record.threat_model != "clean"]
    if not attacked:
        return AuditLine("budget", None, "No attack was run.")
    worst = max(record.budget_excess for record in attacked)
    text = f"No attacked image passes its budget by more than {worst:.1e} (raw pixels, allowed 1e-6)."
    return AuditLine("budget", worst <= 1e-6, text if worst <= 1e-6 else f"A budget is passed by {worst:.1e}.")


def _undefended(records: Sequence[Record], classes: int) -> AuditLine:
    gray = _of(records, BARE, "gray")
    if not gray:
        return AuditLine("undefended net falls", None, "The classifier alone was not attacked.")
    strongest = min(gray, key=lambda record: record.accuracy)
    chance = 1 / classes if classes else 0.0
    text = (
        f"The attack leaves the undefended net {100 * strongest.accuracy:.1f} % at {strongest.norm} {strongest.eps:g} "
        f"(guessing: {100 * chance:.1f} %)."
    )
    return AuditLine("undefended net falls", strongest.ci_low <= chance, text)


def _eight_bits(records: Sequence[Record]) -> AuditLine:
    tried = [r for r in records if r.accuracy_8bit is not None and r.defense in (BARE, DEFENDED)]
    if not tried:
        return AuditLine("8-bit images", None, "Rounding to 8-bit pixels was not tried.")
    lost = [record for record in tried if (record.accuracy_8bit or 0.0) > record.ci_high]
    largest = max(abs((record.accuracy_8bit or 0.0) - record.accuracy) for record in tried)
    text = f"Rounding the attacked images to 8-bit pixels changes an accuracy by at most {100 * largest:.1f} points."
    if lost:
        names = ", ".join(f"{r.defense} {r.threat_model}" for r in lost)
        text = f"Rounding to 8-bit pixels undoes the attack on {names} beyond the interval."
    return AuditLine("8-bit images", not lost, text)


def _larger_budgets(records: Sequence[Record]) -> AuditLine:
    rises, compared = [], 0
    series: dict[tuple[str, ...], list[Record]] = {}
    for record in records:
        if record.threat_model != "clean":
            series.setdefault((record.defense, record.threat_model, record.attack, record.norm), []).append(record)
    for (defense, threat_model, attack, _), found in series.items():
        for before, after in pairwise(sorted(found, key=lambda record: record.eps)):
            compared += 1
            if after.ci_low > before.ci_high:
                rises.append(f"{defense}, {threat_model} {attack}, eps {before.eps:g} to {after.eps:g}")
    if not compared:
        return AuditLine("larger budgets", None, "Each attack was run at one budget.")
    text = f"A larger budget raises an accuracy beyond its interval: {'; '.join(rises)}."
    return AuditLine("larger budgets", not rises, text if rises else "A larger budget never helps the defender.")


def _stronger_than_transfer(records: Sequence[Record]) -> AuditLine:
    both = [r for r in records if r.defense in (BARE, DEFENDED)]
    black = [r for r in both if r.threat_model == "black"]
    compared, weaker = _weaker(black, [r for r in both if r.threat_model in ("gray", "white", "adaptive")])
    text = f"The transferred attack is stronger: {', '.join(f'{r.defense} at {r.norm} {r.eps:g}' for r in weaker)}."
    if not compared:
        text = "No black-box attack stands beside a stronger one."
    elif not weaker:
        text = "With the model in hand no attack is weaker than the transferred one."
    return AuditLine("white box beats transfer", not weaker if compared else None, text)


def _adaptive_is_strongest(records: Sequence[Record]) -> AuditLine:
    ignorant = _of(records, DEFENDED, "gray") + _of(records, DEFENDED, "black")
    compared, weaker = _weaker(ignorant, _of(records, DEFENDED, "adaptive"))
    names = ", ".join(f"{r.threat_model} box at {r.norm} {r.eps:g}" for r in weaker)
    text = f"An attack that ignores the database is stronger: {names}."
    if not compared:
        text = "No adaptive attack was run, so the accuracies are upper bounds only."
    elif not weaker:
        text = "Against the defence nothing that ignores the database is stronger than the adaptive attack."
    return AuditLine("adaptive is the strongest", not weaker if compared else None, text)


def _weaker(ignorant: Sequence[Record], informed: Sequence[Record]) -> tuple[bool, list[Record]]:
    """Whether there is anything to compare, and which ignorant attacks beat all informed ones at their budget."""
    cells = [
        (
            record,
            [r.ci_low for r in informed if (r.defense, r.norm, r.eps) == (record.defense, record.norm, record.eps)],
        )
        for record in ignorant
    ]
    return any(lows for _, lows in cells), [record for record, lows in cells if lows and min(lows) > record.ci_high]


def _of(records: Sequence[Record], defense: str, threat_model: str) -> list[Record]:
    return [record for record in records if record.defense == defense and record.threat_model == threat_model]


# -- checks that run something -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class AuditSubject:
    """What the runs need: the defence, the images to try, and the strongest attack on it.

    Attributes:
        model: what is judged: images N x C x H x W in [0, 1] -> scores N x K.
        classifier: the net whose gradients are looked at; ``model`` itself, where there is no defence.
        images: N x C x H x W in [0, 1], on the classifier's device.
        labels: N class numbers of the classifier.
        threat: the strongest threat model that was run against it.
        attack: that attack's settings.
        eps: the budget to try it at.
        seed: draws random starts and noise.
        batch_size: images per forward pass.
    """

    model: nn.Module
    classifier: nn.Module
    images: Tensor
    labels: Tensor
    threat: ThreatModel
    attack: AttackSettings
    eps: float
    seed: int = 0
    batch_size: int = 128


def audit_runs(subject: AuditSubject, noise_draws: int = NOISE_DRAWS) -> list[AuditLine]:
    """The checks that make small runs of their own."""
    survivors = _attacked_right(subject, subject.attack, subject.eps)
    return [
        _more_steps(subject, survivors),
        _unbounded(subject),
        _noise(subject, survivors, noise_draws),
        _zero_gradients(subject),
        _batch_size(subject),
        _modes(subject.model),
        _repeats(subject),
        _near_duplicates(subject),
    ]


def _attacked_right(subject: AuditSubject, attack: AttackSettings, eps: float) -> Tensor:
    """Which images the defence still gets right after an attack, N booleans."""
    generator, right = torch.Generator().manual_seed(subject.seed), []
    for images, labels in _batches(subject):
        made = run_attack(attack, subject.threat.target, images, labels, eps, generator)
        right.append(_scores(subject, made.images).argmax(1) == labels)
    return torch.cat(right)


def _more_steps(subject: AuditSubject, before: Tensor) -> AuditLine:
    attack, unit = subject.attack, subject.attack.attack.effort
    if not unit:
        return AuditLine("more steps", None, f"{attack.name} has its standard effort, and no other.")
    after = _attacked_right(subject, attack.times(2), subject.eps)
    n, first, second = len(before), int(before.sum()), int(after.sum())
    p = mcnemar_p(int((before & ~after).sum()), int((after & ~before).sum()))
    text = (
        f"{subject.threat.name} {attack.name}, {attack.effort} {unit}: {100 * first / n:.1f} %; twice as "
        f"many: {100 * second / n:.1f} % of {n} images"
    )
    converged = abs(first - second) / n < 0.005
    text += "." if converged else " (it has not converged: read the accuracies as upper bounds)."
    return AuditLine("more steps", second <= first or p > 0.05, text)


def _unbounded(subject: AuditSubject) -> AuditLine:
    norm = next((norm for norm in ("linf", "l2") if norm in subject.attack.attack.norms), None)
    if norm is None:
        return AuditLine("unbounded budget", None, f"{subject.attack.name} has no radius that frees every pixel.")
    # A ball that holds the whole box.
    size = subject.images[0].numel() ** 0.5 if norm == "l2" else 1.0
    attack = replace(subject.attack.times(1, least=50), norm=norm, eps=(size,))
    right = int(_attacked_right(subject, attack, size).sum())
    text = f"With pixels free to take any value the attack leaves {right} of {len(subject.images)} images right."
    return AuditLine("unbounded budget", right == 0, text)


def _noise(subject: AuditSubject, survivors: Tensor, draws: int) -> AuditLine:
    """Random draws from the ball around images that the attack could not move."""
    images, labels = subject.images[survivors], subject.labels[survivors]
    if not len(images):
        return AuditLine("random noise", True, "The attack left no image right for noise to try.")
    each = max(draws // len(images), 1)
    generator = torch.Generator().manual_seed(subject.seed)
    radii = attacks.radius(images, subject.eps, subject.attack.norm)
    broken = torch.zeros(len(images), dtype=torch.bool, device=images.device)
    for _ in range(each):
        for rows in torch.split(torch.arange(len(images)), subject.batch_size):
            noise = random_in_ball(images[rows], radii[rows], subject.attack.norm, generator)
            moved = (images[rows] + noise).clamp(0, 1)
            broken[rows.to(broken.device)] |= _scores(subject, moved).argmax(1) != labels[rows]
    found = int(broken.sum())
    text = f"{each * len(images):,} random draws around {len(images)} images that the attack left right break {found}."
    return AuditLine("random noise", found == 0, text)


def _zero_gradients(subject: AuditSubject) -> AuditLine:
    zero = total = 0
    for images, labels in _batches(subject):
        images = images.clone().requires_grad_(True)
        with torch.enable_grad():
            loss = F.cross_entropy(subject.classifier(images), labels, reduction="sum")
            (gradient,) = torch.autograd.grad(loss, images)
        zero += int((gradient.flatten(1).abs().amax(1) == 0).sum())
        total += len(images)
    text = f"The classifier's gradient is exactly 0 on {zero} of {total} images."
    return AuditLine("zero gradients", zero <= 0.01 * total, text)


def _batch_size(subject: AuditSubject) -> AuditLine:
    images = subject.images[: min(len(subject.images), 16)]
    together, alone = _scores(subject, images), torch.cat([_scores(subject, image[None]) for image in images])
    largest = float((together.exp() - alone.exp()).abs().max())
    same = bool((together.argmax(1) == alone.argmax(1)).all())
    text = (
        f"{len(images)} images give the same classes alone and together; probabilities differ by up to {largest:.1e}."
    )
    return AuditLine("batch size", same and largest < _SAME, text if same else "Classes depend on the batch.")


def _modes(model: nn.Module) -> AuditLine:
    training = [name for name, module in model.named_modules() if module.training]
    text = f"{len(training)} modules are in training mode, such as {training[0] or 'the defence'}." if training else ""
    return AuditLine("evaluation mode", not training, text or "Every module is in evaluation mode.")


def _repeats(subject: AuditSubject) -> AuditLine:
    images = subject.images[: min(len(subject.images), 64)]
    first, second = _scores(subject, images), _scores(subject, images)
    same = torch.equal(first, second)
    text = "A second run gives the same output, bit for bit." if same else "Two runs give different outputs: use EOT."
    return AuditLine("determinism", same, text)


@torch.no_grad()
def _near_duplicates(subject: AuditSubject) -> AuditLine:
    """A test image that stands in the database is its own nearest neighbour, at a distance of 0 but for rounding."""
    if not isinstance(subject.model, NearestNeighborDefense):
        return AuditLine("near-duplicates", None, "There is no database that test images could stand in.")
    count = 0
    for images, _ in _batches(subject):
        vectors = subject.model.extractor(images).cpu()
        distances, _ = subject.model.database.search(vectors, 1)
        count += int((distances[:, 0] <= 1e-3 * vectors.norm(dim=1)).sum())
    text = f"{count} of {len(subject.images)} test images have an (almost) equal feature vector in the database."
    return AuditLine("near-duplicates", count == 0, text)


@torch.no_grad()
def _scores(subject: AuditSubject, images: Tensor) -> Tensor:
    found: Tensor = subject.model(images)
    return found


def _batches(subject: AuditSubject) -> list[tuple[Tensor, Tensor]]:
    return list(zip(*(torch.split(part, subject.batch_size) for part in (subject.images, subject.labels)), strict=True))
