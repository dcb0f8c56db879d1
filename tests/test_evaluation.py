"""Accuracies under attack: the numbers are those of a loop written by hand, and every record says what it is of."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from index_build import build_database
from nndefense import attacks
from nndefense.database import ImageDatabase
from nndefense.datasets import ArrayDataset, ImageDataset, open_dataset
from nndefense.defenses import NearestNeighborDefense
from nndefense.errors import DataError, InputError
from nndefense.evaluation import (
    AttackSettings,
    Recipe,
    Record,
    Subject,
    ThreatModel,
    assemble,
    evaluate,
    illustrate,
    run_attack,
    rungs_for,
    summary,
    threats_of,
    wilson_interval,
    worst_cases,
)
from nndefense.evaluation.audit import audit_records
from nndefense.evaluation.judging import confident
from nndefense.evaluation.subjects import known_of
from nndefense.evaluation.threats import attacks_by
from nndefense.features import FeatureSpec
from nndefense.models import Classifier

DIGITS = tuple(str(digit) for digit in range(10))
# What every record must say, so that nobody has to guess what a number is a number of.
REQUIRED = {
    "dataset", "defense", "attack", "threat_model", "norm", "eps", "eps_raw", "n", "accuracy", "ci_low", "ci_high",
    "seed", "seconds", "classifier", "database",
}  # fmt: skip


def fitted(images: ImageDataset, order: Sequence[int] = range(10), seed: int = 0) -> Classifier:
    """Random filters and a linear layer fitted by least squares: a real classifier of digits in milliseconds."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        net = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 64, 10))
    x, y = images.batch(range(len(images)))
    with torch.no_grad():
        vectors = net[:3](x).double()
        place = torch.empty(10, dtype=torch.int64)
        place[torch.tensor(list(order))] = torch.arange(10)
        targets = 2 * nn.functional.one_hot(place[y], 10).double() - 1
        gram = vectors.T @ vectors + 10 * torch.eye(vectors.shape[1], dtype=torch.float64)
        net[3].weight.copy_(torch.linalg.solve(gram, vectors.T @ targets).T * 5)
        net[3].bias.zero_()
    classes = [DIGITS[digit] for digit in order]
    return Classifier(net, arch="fitted", input_shape=(1, 8, 8), classes=classes, source="test").eval()


@pytest.fixture(scope="module")
def train() -> ImageDataset:
    return open_dataset("digits:train[:600]")


@pytest.fixture(scope="module")
def data() -> ImageDataset:
    return open_dataset("digits:test[:50]")


@pytest.fixture(scope="module")
def classifier(train: ImageDataset) -> Classifier:
    return fitted(train)


@pytest.fixture(scope="module")
def surrogate(train: ImageDataset) -> Classifier:
    """Another net, whose classes stand in another order than those of the data set."""
    return fitted(train, order=(3, 1, 4, 0, 5, 9, 2, 6, 8, 7), seed=1)


@pytest.fixture(scope="module")
def defense(
    train: ImageDataset, classifier: Classifier, tmp_path_factory: pytest.TempPathFactory
) -> NearestNeighborDefense:
    folder = tmp_path_factory.mktemp("evaluation") / "database"
    database = build_database(train, classifier, FeatureSpec("1", "flatten", pca=32), folder, progress=False)
    return NearestNeighborDefense(classifier, database, k=5, weighting="uniform")


def run(
    data: ImageDataset,
    classifier: Classifier,
    subjects: Sequence[Subject],
    surrogate: Classifier | None = None,
    **more: Any,
) -> list[Record]:
    threats, maps = [ThreatModel("gray", classifier)], {"clean": classifier.label_map(data.classes)}
    maps["gray"] = maps["clean"]
    if surrogate is not None:
        threats.append(ThreatModel("black", surrogate, surrogate.fingerprint))
        maps["black"] = surrogate.label_map(data.classes)
    settings = more.pop("attack", AttackSettings(eps=(0.1, 0.3), steps=3))
    options = {"headline_eps": 0.3, "classifier": "c", "label_maps": maps, "seed": 7, "batch_size": 20, **more}
    return evaluate(data, subjects, threats, settings, **options)


# -- intervals ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("successes", "n", "low", "high"),
    [
        (0, 10, 0.0, 0.27753),
        (5, 10, 0.23659, 0.76341),
        (10, 10, 0.72247, 1.0),
        (1, 1, 0.20655, 1.0),
        (81, 263, 0.25526, 0.36623),  # Newcombe, Statistics in Medicine 1998, table I: 0.2553 to 0.3662
        (15, 148, 0.06235, 0.16052),  # the same: 0.0624 to 0.1605
    ],
)
def test_wilson_interval_against_known_values(successes: int, n: int, low: float, high: float) -> None:
    assert wilson_interval(successes, n) == pytest.approx((low, high), abs=5e-5)


@given(st.integers(1, 5000).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_wilson_interval_properties(counts: tuple[int, int]) -> None:
    successes, n = counts
    low, high = wilson_interval(successes, n)
    assert 0 <= low < high <= 1
    assert low - 1e-12 <= successes / n <= high + 1e-12
    # Failures are successes of the other kind.
    assert wilson_interval(n - successes, n) == pytest.approx((1 - high, 1 - low), abs=1e-12)
    # The same share of more images is known better; more successes move both ends up.
    closer = wilson_interval(2 * successes, 2 * n)
    assert closer[1] - closer[0] < high - low
    if successes < n:
        more = wilson_interval(successes + 1, n)
        assert more[0] > low
        assert more[1] >= high


@pytest.mark.parametrize(("successes", "n"), [(0, 0), (-1, 10), (11, 10), (1, -1)])
def test_wilson_interval_refuses_what_is_no_count(successes: int, n: int) -> None:
    with pytest.raises(InputError, match=f"{successes} of {n}"):
        wilson_interval(successes, n)


# -- settings -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "lbfgs"}, "must be one of fgsm, pgd"),
        ({"norm": "l1"}, "normalized-l2"),
        ({"eps": ()}, "at least one eps"),
        ({"eps": (0.1, 0.0)}, "above 0"),
        ({"eps": (-0.1,)}, "above 0"),
        ({"eps": (math.nan,)}, "finite"),
        ({"eps": (0.1, math.inf)}, "finite"),
        ({"steps": 0}, "at least 1 step"),
        ({"restarts": 0}, "1 restart"),
        ({"loss": "hinge"}, "cross-entropy, margin, dlr"),
        ({"queries": 0}, "at least 1 step or query"),
        ({"name": "fgsm", "steps": 50}, r"the effort of fgsm is fixed: leave steps \(--steps\) out, or take pgd"),
        ({"name": "autoattack", "steps": 20}, "or take pgd or apgd"),
        ({"name": "autoattack", "queries": 20}, r"leave queries \(--queries\) out, or take square"),
        ({"name": "square", "steps": 20}, r"square counts queries, not steps: give queries \(--queries\) instead"),
        ({"queries": 20}, "pgd counts steps, not queries"),
        ({"name": "fgsm", "restarts": 2}, r"fgsm takes no restarts: leave them \(--restarts\) out"),
        ({"name": "square", "restarts": 2}, r"leave them \(--restarts\) out, or give more queries"),
        ({"name": "deepfool", "loss": "dlr"}, "objective of its own"),
        ({"name": "cw", "norm": "linf"}, "looks for the least change in l2 and normalized-l2"),
    ],
)
def test_attack_settings_refuse(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        AttackSettings(**options)


def test_attack_settings_run_what_they_say(classifier: Classifier, data: ImageDataset) -> None:
    x, y = data.batch(range(8))
    settings = AttackSettings("pgd", "linf", (0.1,), steps=4, restarts=2)
    given = run_attack(settings, classifier, x, y, 0.1, torch.Generator().manual_seed(3))
    direct = attacks.pgd(
        classifier, x, y, eps=0.1, norm="linf", steps=4, restarts=2, generator=torch.Generator().manual_seed(3)
    )
    assert torch.equal(given.images, direct)
    # The second start is for images that still stand alone.
    assert 8 * 4 <= given.backwards < 8 * 4 * 2
    fast = AttackSettings("fgsm", "l2", (0.1,))
    assert torch.equal(
        run_attack(fast, classifier, x, y, 0.5, torch.Generator()).images,
        attacks.fgsm(classifier, x, y, eps=0.5, norm="l2"),
    )
    # FGSM has one step, and a record says so.
    assert fast.to_json() == {"name": "fgsm", "norm": "l2", "eps": [0.1], "steps": 1, "restarts": 1}
    assert json.loads(json.dumps(settings.to_json()))["steps"] == 4


# -- evaluate -----------------------------------------------------------------------------------------------------


def test_counts_are_those_of_a_loop_by_hand(
    data: ImageDataset, classifier: Classifier, surrogate: Classifier, defense: NearestNeighborDefense
) -> None:
    subjects = [Subject("none", classifier, "none"), Subject("nearest-neighbor", defense, "calibrated", "d", 600)]
    records = run(data, classifier, subjects, surrogate)

    x, y = data.batch(range(len(data)))
    expected: dict[tuple[str, str, float], float] = {}
    for threat, target, eps in [
        ("clean", None, 0.0),
        *((name, net, eps) for name, net in (("gray", classifier), ("black", surrogate)) for eps in (0.1, 0.3)),
    ]:
        generator, shown = torch.Generator().manual_seed(7), []
        for images, labels in zip(x.split(20), y.split(20), strict=True):
            if target is not None:
                # The class numbers of the attacked net, found by name.
                aims = torch.tensor([target.classes.index(DIGITS[label]) for label in labels])
                images = attacks.pgd(target, images, aims, eps=eps, norm="normalized-l2", steps=3, generator=generator)
            shown.append(images)
        for name, model in (("none", classifier), ("nearest-neighbor", defense)):
            with torch.no_grad():
                right = (model(torch.cat(shown)).argmax(1) == y).sum()
            expected[name, threat, eps] = int(right) / 50
    assert {(r.defense, r.threat_model, r.eps): r.accuracy for r in records} == expected
    # The setting is one in which something could go wrong: attacks succeed, and less so from a surrogate.
    bare = {(r.threat_model, r.eps): r.accuracy for r in records if r.defense == "none"}
    assert bare["clean", 0.0] > 0.85
    assert bare["gray", 0.3] < bare["black", 0.3] < bare["clean", 0.0]
    assert bare["gray", 0.3] < bare["gray", 0.1]


def test_who_holds_a_nets_own_gradient_also_runs_apgd_and_square(
    data: ImageDataset, classifier: Classifier, defense: NearestNeighborDefense, train: ImageDataset
) -> None:
    # Another net stands for one that was trained for a defence.
    known = known_of(fitted(train, seed=2), classifier)
    assert known["also"] == ("apgd-square",)
    assert known_of(defense, classifier)["also"] == ()
    subjects = [Subject("none", classifier, "none"), Subject("net", known["white"], "defense", **known)]
    threats = threats_of(["gray", "white"], subjects, classifier, None)
    maps = {name: classifier.label_map(data.classes) for name in ("clean", "gray", "white")}

    def measured(*white: AttackSettings) -> list[Record]:
        options = {"headline_eps": 0.1, "classifier": "c", "label_maps": maps, "batch_size": 50}
        plan = {"gray": [AttackSettings(eps=(0.1,), steps=2)], "white": white}
        records = evaluate(data, subjects, threats, plan, **options)
        return [record for record in records if record.threat_model == "white"]

    records = measured(AttackSettings(eps=(0.1,), steps=2), AttackSettings(eps=(0.05, 0.1), steps=1))
    assert [(r.attack, r.eps, r.steps) for r in records] == [
        ("pgd", 0.1, 2), ("pgd", 0.05, 1), ("pgd", 0.1, 1), ("apgd-square", 0.1, 10), ("apgd-square", 0.05, 10),
    ]  # fmt: skip
    assert {r.defense for r in records} == {"net"}
    assert records[3].accuracy <= records[0].accuracy
    plain = [r.to_json() for r in records]
    assert worst_cases(plain)[-1]["accuracy"] <= records[3].accuracy
    # Asked for by name it runs once, with the effort that is asked for.
    assert [(r.attack, r.steps) for r in measured(AttackSettings("apgd-square", eps=(0.1,), steps=3))] == [
        ("apgd-square", 3)
    ]
    # Five times the steps, up to the standard, and never fewer than were asked for.
    for asked, own in ((20, 100), (50, 100), (200, 200)):
        assert attacks_by(threats[1], AttackSettings(steps=asked))[1].steps == own
    assert attacks_by(threats[1], AttackSettings("fgsm"))[1].steps == 100
    assert attacks_by(threats[0], AttackSettings()) == [AttackSettings()]


def test_records_are_complete(
    data: ImageDataset, classifier: Classifier, surrogate: Classifier, defense: NearestNeighborDefense
) -> None:
    subjects = [Subject("none", classifier, "none"), Subject("nearest-neighbor", defense, "calibrated", "print", 600)]
    records = run(data, classifier, subjects, surrogate)
    assert {field.name for field in fields(Record)} == REQUIRED | {
        "variant", "steps", "restarts", "attack_seconds", "database_rows", "surrogate", "loss", "knowledge",
        "budget_excess", "correct", "accuracy_8bit", "forwards", "backwards", "queries", "peak_memory_mb",
        "query_limit", "attack_sha256", "attack_version", "certified", "draw_seeds", "refuted",
        "confidence", "confidence_wrong",
    }  # fmt: skip
    assert len(records) == 2 * (1 + 2 * 2)
    norms = torch.linalg.vector_norm(data.batch(range(50))[0].flatten(1), dim=1)
    for record in records:
        values = json.loads(json.dumps(record.to_json(), allow_nan=False))
        assert set(values) >= REQUIRED
        assert values["dataset"] == data.name
        assert (values["n"], values["seed"], values["classifier"]) == (50, 7, "c")
        low, high = wilson_interval(round(values["accuracy"] * 50), 50)
        assert (values["ci_low"], values["ci_high"]) == (low, high)
        assert values["seconds"] >= 0
        assert values["database"] == (None if values["defense"] == "none" else "print")
        assert values["database_rows"] == (None if values["defense"] == "none" else 600)
        assert values["surrogate"] == (surrogate.fingerprint if values["threat_model"] == "black" else None)
        if values["threat_model"] == "clean":
            assert (values["attack"], values["norm"], values["steps"], values["restarts"]) == ("none", "none", 0, 0)
            assert values["eps"] == values["eps_raw"] == values["attack_seconds"] == 0
        else:
            assert (values["attack"], values["norm"], values["steps"]) == ("pgd", "normalized-l2", 3)
            assert values["eps_raw"] == pytest.approx(values["eps"] * float(norms.mean()), rel=1e-5)
    flat = run(data, classifier, subjects[:1], attack=AttackSettings("fgsm", "linf", (0.3,)))
    assert [(r.eps, round(r.eps_raw, 6), r.steps) for r in flat] == [(0.0, 0.0, 0), (0.3, 0.3, 1)]


class Watch:
    """Counts what a classifier is asked for: forward passes with and without a gradient to the images."""

    def __init__(self, *models: nn.Module) -> None:
        self.calls = [[0, 0] for _ in models]
        self.handles = [
            model.register_forward_pre_hook(lambda _m, given, count=count: self.count(count, given[0]))
            for model, count in zip(models, self.calls, strict=True)
        ]

    @staticmethod
    def count(calls: list[int], images: Tensor) -> None:
        calls[int(images.requires_grad)] += 1

    def __enter__(self) -> Watch:
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self.handles:
            handle.remove()


class Constant(nn.Module):
    """Answers one class, and remembers what it was shown."""

    def __init__(self, answer: int) -> None:
        super().__init__()
        self.answer, self.seen = answer, []  # type: ignore[var-annotated]

    def forward(self, images: Tensor) -> Tensor:
        self.seen.append(images.clone())
        return nn.functional.one_hot(torch.full((len(images),), self.answer), 10).float()


def test_each_attacked_batch_is_made_once_for_all(
    data: ImageDataset, classifier: Classifier, surrogate: Classifier
) -> None:
    blind = [Constant(0), Constant(1), Constant(2)]
    subjects = [Subject(f"nearest-neighbor ({i})", model, "weighting") for i, model in enumerate(blind)]
    done: list[int] = []
    with Watch(classifier, surrogate) as watch:
        records = run(data, classifier, subjects, surrogate, progress=done.append)
    # 3 batches, 2 radii, 3 steps; however many subjects there are.
    assert watch.calls == [[0, 3 * 2 * 3], [0, 3 * 2 * 3]]
    # All saw the very same images.
    for model in blind[1:]:
        assert all(torch.equal(a, b) for a, b in zip(blind[0].seen, model.seen, strict=True))
    # Clean and four attacked cells, of which two are at the headline budget and shown in 8 bits too.
    assert len(blind[0].seen) == 3 * (5 + 2)
    assert sum(done) == 50 * 5
    labels = [label for _, label in data]
    for record in records:
        assert record.accuracy == labels.count(int(record.defense[-2])) / 50


def test_black_box_follows_the_surrogate_alone(
    data: ImageDataset, classifier: Classifier, surrogate: Classifier
) -> None:
    maps = {"clean": classifier.label_map(data.classes), "black": surrogate.label_map(data.classes)}
    with Watch(classifier, surrogate) as watch:
        evaluate(
            data,
            [Subject("none", classifier, "none")],
            [ThreatModel("black", surrogate, "s")],
            AttackSettings(eps=(0.2,), steps=4),
            headline_eps=0.2,
            classifier="c",
            label_maps=maps,
            batch_size=25,
        )
    # The classifier only answers: 2 batches clean, 2 attacked, 2 of those in 8 bits. The surrogate gives gradients.
    assert watch.calls == [[6, 0], [0, 8]]


def test_subjects_of_the_comparison_run_clean_and_at_the_headline_alone(
    data: ImageDataset, classifier: Classifier
) -> None:
    subjects = [
        Subject("none", classifier, "none"),
        Subject("nearest-neighbor (x)", classifier, "rows", every_eps=False),
    ]
    records = run(data, classifier, subjects)
    cells = {
        name: [(r.threat_model, r.eps) for r in records if r.defense == name] for name in ("none", subjects[1].name)
    }
    assert cells["none"] == [("clean", 0.0), ("gray", 0.1), ("gray", 0.3)]
    assert cells[subjects[1].name] == [("clean", 0.0), ("gray", 0.3)]


def test_records_say_how_sure_the_answers_are(data: ImageDataset, classifier: Classifier) -> None:
    watcher = Constant(3)
    clean, _, attacked = run(data, classifier, [Subject("none", classifier, "none"), Subject("3", watcher, "none")])[
        ::2
    ]
    with torch.no_grad():
        scores = classifier(data.batch(range(50))[0])
    best, wrong = scores.softmax(1).max(1).values, scores.argmax(1) != classifier.label_map(data.classes)[data.labels]
    assert clean.confidence == pytest.approx(float(best.mean()), abs=1e-6)
    assert clean.confidence_wrong == pytest.approx(float(best[wrong].mean()), abs=1e-6)
    assert attacked.confidence_wrong is not None
    assert 0.1 < attacked.confidence_wrong < 1
    right = data.subset(np.flatnonzero(~wrong.numpy()))
    assert run(right, classifier, [Subject("none", classifier, "none")])[0].confidence_wrong is None


@pytest.mark.parametrize("scores", [[[math.inf, 0.0], [0.0, math.nan]], [[-math.inf] * 2, [0.0, math.inf]]])
def test_scores_that_are_no_numbers_are_no_confidence(scores: list[list[float]]) -> None:
    said, sure = confident(torch.tensor(scores))
    assert torch.equal(said, torch.tensor(scores).argmax(1))
    assert bool(sure.isfinite().all())


def test_permuted_classes_change_nothing(data: ImageDataset, train: ImageDataset) -> None:
    plain, permuted = fitted(train), fitted(train, order=(9, 8, 7, 6, 5, 4, 3, 2, 1, 0))
    found = [run(data, net, [Subject("none", net, "none")]) for net in (plain, permuted)]
    # The same filters, fitted to the same images: only the order of the logits differs.
    assert [r.accuracy for r in found[0]] == [r.accuracy for r in found[1]]
    assert found[0][0].accuracy > 0.85


def test_runs_repeat_and_cells_do_not_depend_on_each_other(data: ImageDataset, classifier: Classifier) -> None:
    def timeless(records: list[Record]) -> list[Record]:
        return [replace(record, seconds=0.0, attack_seconds=0.0, peak_memory_mb=0.0) for record in records]

    subjects = [Subject("none", classifier, "none")]
    both = timeless(run(data, classifier, subjects))
    assert timeless(run(data, classifier, subjects)) == both
    alone = timeless(run(data, classifier, subjects, attack=AttackSettings(eps=(0.3,), steps=3)))
    assert alone == [both[0], both[2]]
    # And the seed is what draws the starts.
    starts = {}
    for seed in (7, 8):
        watcher = Constant(0)
        run(data, classifier, [Subject("none", watcher, "none")], seed=seed)
        starts[seed] = watcher.seen[-1]
    assert not torch.equal(starts[7], starts[8])


def test_evaluate_refuses(data: ImageDataset, classifier: Classifier) -> None:
    subject = Subject("none", classifier, "none")
    with pytest.raises(DataError, match="is empty"):
        run(data.subset([]), classifier, [subject])
    images, _ = data.batch(range(3))
    unknown = ArrayDataset(images.numpy(), [1, -1, 2], name="some", classes=DIGITS)
    with pytest.raises(DataError, match="without a label"):
        run(unknown, classifier, [subject])
    with pytest.raises(InputError, match="same name"):
        run(data, classifier, [subject, subject])


# -- pictures and results -----------------------------------------------------------------------------------------


def pictured(
    data: ImageDataset, defense: NearestNeighborDefense, pictures: ImageDataset | None, **more: Any
) -> list[Any]:
    maps = {"clean": defense.classifier.label_map(data.classes)}
    maps["gray"] = maps["clean"]
    options = {"eps": 0.3, "label_maps": maps, "pictures": pictures, "count": 6, "seed": 5, **more}
    return illustrate(
        data, defense, ThreatModel("gray", defense.classifier), AttackSettings(eps=(0.3,), steps=3), **options
    )


def test_gallery(data: ImageDataset, train: ImageDataset, defense: NearestNeighborDefense) -> None:
    rows = pictured(data, defense, train)
    assert len(rows) == 6
    names = dict(zip(data.ids, data.labels.tolist(), strict=True))
    for row in rows:
        assert row.clean.shape == row.attacked.shape == (1, 8, 8)
        moved, length = np.linalg.norm(row.attacked - row.clean), np.linalg.norm(row.clean)
        assert 0 < moved <= 0.3 * length * (1 + 1e-5)
        assert row.label == DIGITS[names[row.id]]
        assert row.clean == pytest.approx(data[data.index_of(row.id)][0].numpy())
        assert (row.threat_model, row.eps) == ("gray", 0.3)
        assert len(row.neighbors) == 5
        assert sum(neighbor.weight for neighbor in row.neighbors) == pytest.approx(1, abs=1e-5)
        distances = [neighbor.distance for neighbor in row.neighbors]
        assert distances == sorted(distances)
        for neighbor in row.neighbors:
            image, label = train[train.index_of(neighbor.id)]
            assert np.array_equal(neighbor.image, image.numpy())
            assert neighbor.label == DIGITS[label]
        with torch.no_grad():
            for said, shown, model in (
                (row.bare_clean, row.clean, defense.classifier),
                (row.bare, row.attacked, defense.classifier),
                (row.defended, row.attacked, defense),
            ):
                probabilities = model(torch.from_numpy(shown)[None]).softmax(1)[0]
                assert said[0] == DIGITS[int(probabilities.argmax())]
                assert said[1] == pytest.approx(float(probabilities.max()), abs=1e-4)


def test_gallery_is_a_random_draw_that_no_outcome_changes(
    data: ImageDataset, train: ImageDataset, defense: NearestNeighborDefense
) -> None:
    ids = [row.id for row in pictured(data, defense, None)]
    assert len(set(ids)) == 6
    assert ids == [row.id for row in pictured(data, defense, None, eps=0.01)]
    assert ids != [row.id for row in pictured(data, defense, None, seed=6)]
    assert ids != list(data.ids[:6])
    # Over many draws every image turns up: none is left out because of how it fares.
    drawn = {row.id for seed in range(12) for row in pictured(data, defense, None, seed=seed, count=20)}
    assert drawn == set(data.ids)


def test_gallery_without_pictures_or_rows(data: ImageDataset, defense: NearestNeighborDefense) -> None:
    for row in pictured(data, defense, None):
        assert all(neighbor.image is None and neighbor.id.startswith("digits/") for neighbor in row.neighbors)
    assert pictured(data, defense, None, count=0) == []


def test_results_are_plain_and_the_summary_is_a_table(
    data: ImageDataset,
    classifier: Classifier,
    surrogate: Classifier,
    defense: NearestNeighborDefense,
    tmp_path: Path,
) -> None:
    database: ImageDatabase = defense.database
    subjects = [
        Subject("none", classifier, "none"),
        Subject("nearest-neighbor", defense, "calibrated", database.fingerprint, len(database)),
    ]
    records = run(data, classifier, subjects, surrogate)
    attack = AttackSettings(eps=(0.1, 0.3), steps=3)
    recipe = Recipe(
        dataset="digits:test[:50]",
        classifier="c",
        database="d",
        surrogate="s",
        rungs=rungs_for(("gray", "black"), attack),
        headline_norm="normalized-l2",
        headline_eps=0.3,
        seed=7,
    )
    common: dict[str, Any] = {
        "recipe": recipe,
        "dataset": data,
        "classifier": classifier,
        "defense": defense,
        "calibration": None,
        "audit": audit_records(records, 10),
        "command": "nndefense evaluate",
    }
    results = assemble(records, surrogate=surrogate, **common)
    assert json.loads(json.dumps(results, allow_nan=False)) == results
    assert (results["format"], results["version"]) == ("nndefense-results", 2)
    assert results["recipe"]["sha256"] == recipe.sha256
    assert results["classifier"]["fingerprint"] == classifier.fingerprint
    assert results["surrogate"]["fingerprint"] == surrogate.fingerprint
    assert results["database"]["fingerprint"] == database.fingerprint
    assert results["database"]["rows"] == 600
    assert results["dataset"] == {
        "name": data.name, "n": 50, "classes": list(DIGITS), "fingerprint": data.fingerprint, "shape": [1, 8, 8],
    }  # fmt: skip
    assert results["headline"] == {"attack": "pgd", "norm": "normalized-l2", "eps": 0.3}
    # The worst cases follow: for each defence one at each budget.
    assert len(results["records"]) == len(records) + 4
    assert [r["threat_model"] for r in results["records"][-4:]] == ["worst"] * 4
    assert len(results["comparisons"]) == 1 + 4 + 2

    lines = summary(results).splitlines()
    assert lines[0] == "digits:test[:50]: accuracy in % on 50 images [95 % interval]; normalised ℓ₂ 0.3"
    assert lines[1].split() == ["clean", "black", "gray", "worst"]
    cells = {(r.threat_model, r.eps): r for r in records if r.defense == "nearest-neighbor"}
    assert lines[3].startswith("nearest-neighbor")
    # The headline's radius, not the other one.
    shown = [
        f"{100 * cells[key].accuracy:.1f} [{100 * cells[key].ci_low:.1f}" for key in (("gray", 0.3), ("black", 0.3))
    ]
    assert all(text in lines[3] for text in shown)

    alone = assemble([r for r in records if r.threat_model != "black"], surrogate=None, **common)
    assert alone["surrogate"] is None
    assert "black" not in summary(alone)
