"""The checks of the self-audit that make small runs of their own: on the strongest attack, the defence and the net."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nndefense.attacks import norms, registry
from nndefense.attacks.losses import likeliest_others
from nndefense.attacks.retrieval import RetrievalSurface
from nndefense.defenses import NearestNeighborDefense
from nndefense.evaluation.audit import UNDEFENDED, AuditLine
from nndefense.evaluation.judging import is_random, judges_of
from nndefense.evaluation.threats import AttackSettings, ThreatModel, run_attack
from nndefense.own_code import taken
from nndefense.statistics import mcnemar_p, wilson_interval

# Draws of noise in all, shared out over the images that are tried.
NOISE_DRAWS = 10_000
# Of probabilities alone and together: rounding gives up to 2.4e-6 in float32 (MobileNetV2 on a CPU), a batch's own
# statistics give hundredths.
_SAME = 1e-5
# Further random starts, and classes that are aimed at: those of APGD-T.
_STARTS, _CLASSES = 2, 9

# Images N x C x H x W with their labels N -> attacked ones.
Attempt = Callable[[Tensor, Tensor], Tensor]


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
        _other_ways(subject, survivors),
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


def _called(subject: AuditSubject) -> str:
    """Who attacks, and by what, each said once."""
    threat, attack = subject.threat.name, registry.attack_name(subject.attack.name)
    who = f"{threat} box" if threat in ("gray", "black", "white") else threat
    return attack if threat in attack.split() else f"{who}, {attack}"


def _more_steps(subject: AuditSubject, before: Tensor) -> AuditLine:
    attack, unit = subject.attack, subject.attack.attack.effort
    if not unit:
        return AuditLine("more steps", None, f"{attack.name} has its standard effort, and no other.")
    after = _attacked_right(subject, attack.times(2), subject.eps)
    n, first, second = len(before), int(before.sum()), int(after.sum())
    p = mcnemar_p(int((before & ~after).sum()), int((after & ~before).sum()))
    text = (
        f"{_called(subject)}, {attack.effort} {unit}: {100 * first / n:.1f} %; twice as "
        f"many: {100 * second / n:.1f} % of {n} images"
    )
    converged = abs(first - second) / n < 0.005
    text += "." if converged else " (it has not converged: read the accuracies as upper bounds)."
    return AuditLine("more steps", second <= first or p > 0.05, text)


def _other_ways(subject: AuditSubject, survivors: Tensor) -> AuditLine:
    """The attack from other starts, towards other classes and with other objectives, each on what it left right.

    An objective that is stuck stays so however many steps it is given.
    """
    if not bool(survivors.any()):
        return AuditLine("other ways", True, f"{subject.attack.name} left no image right for other ways to try.")
    found = {way: _broken(subject, survivors, tries) for way, tries in _ways(subject).items() if tries}
    if not found:
        return AuditLine("other ways", None, f"There is no other way to run {subject.attack.name}.")
    allowed = _allowed(int(survivors.sum()), len(survivors))
    (first, count), *rest = found.items()
    listed = ", ".join([f"{first} break {count}", *(f"{way} {number}" for way, number in rest)])
    text = (
        f"Of the {int(survivors.sum())} images that {subject.attack.name} left right, {listed} (the interval allows "
        f"{allowed})"
    )
    passed = max(found.values()) <= allowed
    return AuditLine("other ways", passed, f"{text}." if passed else f"{text}: the attack is stuck.")


def _ways(subject: AuditSubject) -> dict[str, list[Attempt]]:
    """The other ways, each as what is tried in it, in turn."""
    given, target, scores = subject.attack, subject.threat.target, _scores(subject, subject.images[:1]).shape[1]
    again = replace(given, restarts=given.restarts + _STARTS) if given.attack.restarts else given
    drawn = bool(taken(given.attack.load(), {"generator": None}))
    ways = {"other starts": [_attempt(subject, again, seed=1)] if drawn else []}
    if isinstance(target, RetrievalSurface):
        near = [attack for attack in map(registry.get, registry.names("adaptive")) if _on_rows(attack, target)]
        soft = next((attack for attack in near if attack.name == "soft-retrieval"), None)
        others = range(min(_CLASSES, scores - 1)) if soft is not None else ()
        ways["other classes"] = [_towards(subject, soft, place) for place in others if soft is not None]
        ways["other objectives"] = [_attempt(subject, _like(subject, a.name)) for a in near if a.name != given.name]
        return ways
    targeted = scores >= 4 and given.name not in ("apgd-t", "autoattack", "apgd-square")
    ways["other classes"] = [_attempt(subject, _like(subject, "apgd-t"))] if targeted else []
    loss = "margin" if given.loss == "cross-entropy" and given.attack.loss else "cross-entropy"
    other = replace(given, loss=loss) if given.attack.loss else _like(subject, "apgd")
    ways["other objectives"] = [_attempt(subject, other)]
    return ways


def _on_rows(attack: registry.Attack, surface: RetrievalSurface) -> bool:
    """Whether an attack pulls at rows alone, and the surface has what it needs."""
    return (
        attack.on_retrieval
        and "rows" in attack.needs
        and "classifier" not in attack.needs
        and (surface.rows is not None and surface.features is not None)
    )


def _like(subject: AuditSubject, name: str) -> AttackSettings:
    """Another attack in the same norm, with as many steps where both count them."""
    given = subject.attack
    steps = given.effort if given.attack.effort == "steps" and registry.get(name).effort == "steps" else None
    return AttackSettings(name, given.norm, (subject.eps,), steps)


def _attempt(subject: AuditSubject, settings: AttackSettings, seed: int = 0) -> Attempt:
    generator = torch.Generator().manual_seed(subject.seed + seed)
    return lambda x, y: run_attack(settings, subject.threat.target, x, y, subject.eps, generator).images


def _towards(subject: AuditSubject, attack: registry.Attack, place: int) -> Attempt:
    """An attack on retrieval towards the class that the classifier holds for the likeliest wrong one, or the next."""
    settings, surface = _like(subject, attack.name), subject.threat.target

    def run(x: Tensor, y: Tensor) -> Tensor:
        with torch.no_grad():
            aim = likeliest_others(subject.classifier(x), y, place + 1)[:, -1]
        aimed = replace(attack, settings={**attack.settings, "target": aim})
        budget = {"eps": subject.eps, "norm": settings.norm}
        made: Tensor = aimed.run(surface, x, y, effort=settings.effort, restarts=1, loss=settings.loss, **budget)
        return made

    return run


def _broken(subject: AuditSubject, survivors: Tensor, tries: Sequence[Attempt]) -> int:
    """How many images that an attack left right one of these breaks; those that are broken are not tried again."""
    standing = survivors.nonzero()[:, 0]
    for attempt in tries:
        left = []
        for rows in torch.split(standing, subject.batch_size):
            images, labels = subject.images[rows], subject.labels[rows]
            left.append(rows[_scores(subject, attempt(images, labels)).argmax(1) == labels])
        standing = torch.cat(left)
        if not len(standing):
            break
    return int(survivors.sum()) - len(standing)


def _allowed(right: int, n: int) -> int:
    """How many of the images that an attack left right may fall before it leaves the interval of what it left."""
    return math.floor(right - n * wilson_interval(right, n)[0])


def undefended_run(subject: AuditSubject, chance: float) -> AuditLine:
    """Whether a net that an attack does not bring down to guessing is robust, or the attack weak.

    A robust net falls to no other attack either, and to a larger budget; one that only hides its gradient stands
    whatever the budget is.

    Args:
        subject: the net as its own ``model``, under the gray-box attack.
        chance: the accuracy of guessing, in [0, 1].
    """
    name, given, n = UNDEFENDED, subject.attack, len(subject.images)
    survivors = _attacked_right(subject, given, subject.eps)
    right = int(survivors.sum())
    told = (
        f"{given.name} leaves the undefended net {100 * right / n:.1f} % of {n} images at {given.norm} {subject.eps:g}"
    )
    loss = "cross-entropy" if given.loss != "cross-entropy" else "margin"
    other = AttackSettings("apgd", given.norm, (subject.eps,), loss=loss)
    more, allowed = _broken(subject, survivors, [_attempt(subject, other)]), _allowed(right, n)
    if more > allowed:
        return AuditLine(name, False, f"{told}, and APGD on the {loss} {more} fewer: the attack is weak.")
    # At the last a ball that holds the whole box around most images.
    diagonal, length = math.sqrt(subject.images[0].numel()), float(norms.length(subject.images).median())
    free = {"linf": 1.0, "l2": diagonal, "normalized-l2": diagonal / max(length, 1e-6)}[given.norm]
    eps, left = subject.eps, right
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        while wilson_interval(left, n)[0] > chance and eps < free:
            eps = min(2 * eps, free)
            left = int(_attacked_right(subject, replace(given, eps=(eps,)), eps).sum())
    down = wilson_interval(left, n)[0] <= chance
    text = f"{told}; APGD on the {loss} breaks {more} more (the interval allows {allowed}), and {given.norm} {eps:.3g} "
    text += f"leaves {100 * left / n:.1f} %: " + (
        "the net is robust there." if down else "something hides its gradient."
    )
    return AuditLine(name, down, text)


def _unbounded(subject: AuditSubject) -> AuditLine:
    norm = next((norm for norm in ("linf", "l2") if norm in subject.attack.attack.norms), None)
    if norm is None:
        return AuditLine("unbounded budget", None, f"{subject.attack.name} has no radius that frees every pixel.")
    # A ball that holds the whole box.
    size = subject.images[0].numel() ** 0.5 if norm == "l2" else 1.0
    attack = replace(subject.attack.times(1, least=50), norm=norm, eps=(size,))
    with warnings.catch_warnings():
        # It is meant here.
        warnings.simplefilter("ignore")
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
    radii = norms.radius(images, subject.eps, subject.attack.norm)
    broken = torch.zeros(len(images), dtype=torch.bool, device=images.device)
    # Few images fill whole batches with their draws.
    for rows in torch.split(torch.arange(each * len(images), device=images.device) % len(images), subject.batch_size):
        noise = norms.random_in_ball(images[rows], radii[rows], subject.attack.norm, generator)
        moved = (images[rows] + noise).clamp(0, 1)
        broken[rows[_scores(subject, moved).argmax(1) != labels[rows]]] = True
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
    # Of logits as of log-probabilities.
    largest = float((together.softmax(1) - alone.softmax(1)).abs().max())
    same = bool((together.argmax(1) == alone.argmax(1)).all())
    differ = f"differ by up to {largest:.1e}" if largest else "do not differ"
    text = f"{len(images)} images give the same classes alone and together; probabilities {differ}."
    return AuditLine("batch size", same and largest < _SAME, text if same else "Classes depend on the batch.")


def _modes(model: nn.Module) -> AuditLine:
    training = [name for name, module in model.named_modules() if module.training]
    text = f"{len(training)} modules are in training mode, such as {training[0] or 'the defence'}." if training else ""
    return AuditLine("evaluation mode", not training, text or "Every module is in evaluation mode.")


def _repeats(subject: AuditSubject) -> AuditLine:
    """The same answer twice; of a defence that draws, afresh at each call and the same again under the same seed."""
    images, model = subject.images[: min(len(subject.images), 64)], subject.model
    first, second = _scores(subject, images), _scores(subject, images)
    same = torch.equal(first, second)
    if not is_random(model):
        text = "A second run gives the same output, bit for bit."
        return AuditLine("determinism", same, text if same else "Two runs give different outputs: use EOT.")
    begun = [_scores(replace(subject, model=judges_of(model, subject.seed)[0]), images) for _ in range(2)]
    repeats = torch.equal(*begun)
    drawn = "It draws the same at every call, so that its draws can be found out" if same else "It draws afresh"
    again = "gives the same output, bit for bit" if repeats else "does not repeat: figures cannot be made again"
    return AuditLine("determinism", repeats and not same, f"{drawn}; under the same seed it {again}.")


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
