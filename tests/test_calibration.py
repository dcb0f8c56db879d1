"""Calibration against the attacker who knows: what is attacked, what is chosen, and what is said and built of it."""

from __future__ import annotations

import copy
import itertools
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from command import nndefense
from helpers import digits, images, trained
from torch import Tensor, nn

from index_build import build_databases
from nndefense.attacks import pgd
from nndefense.database import ImageDatabase, Rule
from nndefense.defenses import AdaptiveAttacker, HalvingRung, NearestNeighborDefense, calibrate, informed
from nndefense.defenses.calibration import PairedTest, kernel_scales, rules_to_try
from nndefense.defenses.halving import RUNGS, Setting, halve
from nndefense.errors import InputError
from nndefense.evaluation import AttackSettings, calibration_text
from nndefense.evaluation.ladder import from_hex
from nndefense.evaluation.report.run import calibration_section, verdict_text
from nndefense.features import FeatureSpec
from nndefense.guard import Guard
from nndefense.models import Classifier, save_classifier
from nndefense.pipeline import Candidates, NothingBetterError, build_calibrated, choose
from nndefense.statistics import mcnemar_p

CHEAP = (HalvingRung(2, 5, 1), HalvingRung(1, None, 1))


class Pixels(nn.Module):
    """Three pixels that tell two classes: the net looks at the last, the layer ``shaky`` at another weak one, and the
    layer ``firm`` at a strong one, which is wrong on one image in ten."""

    def __init__(self) -> None:
        super().__init__()
        self.firm, self.shaky, self.head = (nn.Conv2d(3, width, 1, bias=False) for width in (1, 1, 2))
        with torch.no_grad():
            self.firm.weight[:] = torch.tensor([1.0, 0, 0]).view(1, 3, 1, 1)
            self.shaky.weight[:] = torch.tensor([0, 1.0, 0]).view(1, 3, 1, 1)
            self.head.weight[:] = torch.tensor([[0, 0, -9.0], [0, 0, 9.0]]).view(2, 3, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        seen = 0 * (self.firm(x) + self.shaky(x)).flatten(1)
        return self.head(x - 0.5).flatten(1) + seen


def pixels(count: int, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % 2
    sign = (2 * labels - 1).float()
    noise = 0.01 * torch.rand(count, 3, generator=generator)
    firm = torch.where(torch.arange(count) % 10 < 9, sign, -sign)
    x = 0.5 + torch.stack([0.3 * firm, 0.05 * sign, 0.05 * sign], 1) + noise
    return x.view(count, 3, 1, 1), labels


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> tuple[Classifier, list[ImageDatabase]]:
    net = Classifier(Pixels(), arch="own", input_shape=(3, 1, 1), classes=["no", "yes"]).eval()
    x, labels = pixels(60, 0)
    # The rows are right: of the images that are classified, one in ten is not.
    x[:, 0] = (0.5 + 0.3 * (2 * labels - 1)).view(-1, 1, 1) + 0.01 * torch.rand(60, 1, 1)
    found = []
    for layer in ("shaky", "firm"):
        folder = tmp_path_factory.mktemp("toy") / layer
        begun = ImageDatabase.create(folder, classifier=net, feature=FeatureSpec(layer, "flatten", pca=0))
        with torch.no_grad():
            begun.add(getattr(net.net, layer)(x).flatten(1), net(x).softmax(1), [str(i) for i in range(60)], labels)
        begun.finish()
        found.append(ImageDatabase.open(folder))
    return net, found


def test_gray_and_informed_choose_what_each_attacker_leaves(toy: tuple[Classifier, list[ImageDatabase]]) -> None:
    net, databases = toy
    x, labels = pixels(20, 1)
    attacked = pgd(net, x, labels, eps=0.1, steps=10, random_start=False)
    options: dict[str, Any] = {"ks": (3,), "weightings": ("uniform",), "max_clean_loss": 0.2}
    gray = calibrate(net, databases, x, attacked, labels, **options)
    assert (gray.chosen.layer, gray.by, gray.bare_attacked, gray.bare_worst) == ("shaky", "gray", 0, None)
    assert gray.chosen.attacked == 1
    assert "worst" not in gray.to_json()["chosen"]
    attacker = AdaptiveAttacker(net, "linf", 0.1)
    informed = calibrate(net, databases, x, attacked, labels, informed=attacker, rungs=CHEAP, **options)
    chosen = informed.chosen
    assert (chosen.layer, chosen.attacked, chosen.worst, chosen.images) == ("firm", 0.9, 0.9, 20)
    assert informed.bare_worst == 0
    assert informed.paired == PairedTest(18, 0, mcnemar_p(18, 0), better=True)
    # Who knows it leaves the other none, where he was sent against it.
    assert {row.worst for row in informed.table if row.layer == "shaky" and row.images} <= {0.0}
    assert informed.table[0] == chosen


def test_outcomes_are_kept_image_by_image(toy: tuple[Classifier, list[ImageDatabase]]) -> None:
    net, databases = toy
    x, labels = pixels(37, 2)
    attacked = pgd(net, x, labels, eps=0.02, steps=5, random_start=False)
    attacker = AdaptiveAttacker(net, "linf", 0.02)
    found = calibrate(net, databases, x, attacked, labels, informed=attacker, rungs=CHEAP, ks=(3,), max_clean_loss=1)
    kept = {who: {how: from_hex(bits, 37) for how, bits in rows.items()} for who, rows in found.outcomes.items()}
    assert kept["chosen"]["clean"].mean() == found.chosen.clean
    assert kept["chosen"]["worst"].mean() == found.chosen.worst
    assert kept["bare"]["worst"].mean() == found.bare_worst
    for rows in kept.values():
        assert not (rows["worst"] & ~(rows["clean"] & rows["attacked"])).any()
    won = int((kept["chosen"]["worst"] & ~kept["bare"]["worst"]).sum())
    lost = int((kept["bare"]["worst"] & ~kept["chosen"]["worst"]).sum())
    assert found.paired == PairedTest(won, lost, mcnemar_p(won, lost), better=False)


# -- successive halving


def settings(*right: tuple[int, int, str]) -> list[Setting]:
    """Settings of ten images each: candidate, K, and which are right under the gray-box attack, as 0 and 1."""
    whole = torch.ones(10, dtype=torch.bool)
    return [
        Setting(candidate, {}, Rule(k), whole, torch.tensor([bit == "1" for bit in bits]))
        for candidate, k, bits in right
    ]


def test_each_rung_meets_the_best_of_the_one_before_on_the_first_images_of_one_order() -> None:
    given = settings((0, 1, "1111111111"), (0, 5, "1111111110"), (1, 1, "1111111100"), (1, 5, "1111111000"),
                     (2, 1, "1110000000"), (3, 1, "1100000000"))  # fmt: skip
    order, met = torch.tensor([3, 1, 4, 0, 5, 9, 2, 6, 8, 7]), []

    def attack(setting: Setting, index: Tensor, steps: int) -> None:
        met.append((setting.candidate, setting.rule.k, index.tolist(), steps))
        for other in given:
            # What breaks a setting of candidate 0 breaks all of it, but K = 5 on one image.
            if setting.candidate == other.candidate == 0:
                other.worst[index[other.rule.k == 5 :]] = False

    rungs = (HalvingRung(3, 4, 1), HalvingRung(3, 5, 2, each=2), HalvingRung(2, None, 3))
    found = halve(given, rungs, order, attack)
    first, second, third = order[:4].tolist(), order[:5].tolist(), order.tolist()
    assert met[:3] == [(0, 1, first, 1), (1, 1, first, 1), (2, 1, first, 1)]
    assert met[3:6] == [(1, 1, second, 2), (1, 5, second, 2), (2, 1, second, 2)]
    assert met[6:] == [(1, 1, third, 3), (2, 1, third, 3)]
    assert found == [given[2], given[4]]
    assert [(s.rung, s.images) for s in given] == [(0, 4), (-1, 0), (2, 10), (1, 5), (2, 10), (-1, 0)]


def test_few_settings_meet_the_last_rung_alone_and_those_that_did_alike_are_one() -> None:
    given, met = settings((0, 1, "1111111111"), (0, 3, "1111111111"), (1, 1, "1111100000")), []
    found = halve(given, RUNGS, torch.arange(10), lambda setting, index, steps: met.append((setting, len(index))))
    assert found == [given[0], given[2]]
    assert met == [(given[0], 10), (given[2], 10)]


@pytest.mark.parametrize("values", [(0, 1, 1), (1, 0, 1), (1, None, 0), (1, 1, 1, 0)])
def test_rungs_that_attack_nothing_are_refused(values: tuple[Any, ...]) -> None:
    with pytest.raises(InputError, match="at least 1"):
        HalvingRung(*values)
    with pytest.raises(InputError, match="at least one rung"):
        halve(settings((0, 1, "1111111111")), (), torch.arange(10), lambda *_: None)


def test_the_paired_test_is_exact_and_one_sided_in_its_verdict() -> None:
    right = torch.ones(20, dtype=torch.bool)
    for won, lost in itertools.product(range(8), range(3)):
        chosen, bare = right.clone(), right.clone()
        bare[:won] = chosen[won : won + lost] = False
        found = PairedTest.of(chosen, bare)
        assert (found.only_chosen, found.only_bare, found.p) == (won, lost, mcnemar_p(won, lost))
        assert found.better == (won > lost and mcnemar_p(won, lost) <= 0.05)
        assert not PairedTest.of(bare, chosen).better or won < lost


# -- the rule's other settings


def tried(ks: Any = (1, 5), weightings: Any = ("uniform",), votes: Any = ("posteriors",),
          temperatures: Any = (None,), alphas: Any = (0.0,), scales: Any = None) -> list[Rule]:  # fmt: skip
    return rules_to_try(ks, weightings, votes, temperatures, alphas, scales)


def test_rules_that_decide_alike_are_tried_once() -> None:
    assert tried() == [Rule(1, "uniform"), Rule(5, "uniform")]
    found = tried(votes=("posteriors", "labels"), temperatures=(None, 0.5, np.float32(0.5)), alphas=(0, 0.0, 0.25, 1))
    # K = 1 has no use for a kernel, and the classifier alone none for K, votes and kernel.
    assert len(found) == len(set(found)) == 2 * 2 + 2 * 2 * 2 + 1
    assert [rule for rule in found if rule.alpha == 1] == [Rule(1, "uniform", alpha=1.0)]
    assert {rule.temperature for rule in found if rule.k == 1} == {None}
    # The usual rule goes first, so that ties go to it.
    assert found[0] == Rule(1, "uniform")
    assert tried((3,), temperatures=(0.5, None), scales=(9.0, 9.0, 4.0)) == [
        Rule(3, "uniform", temperature=2.0),
        Rule(3, "uniform"),
    ]
    # Where the K-th row is no distance away a kernel has no unit.
    assert tried((3,), temperatures=(0.5, None), scales=(0.0, 0.0, 0.0)) == [Rule(3, "uniform")]


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"votes": ("label",)}, "votes is 'label'"),
        ({"votes": ()}, "no votes to try"),
        ({"temperatures": (0,)}, "a temperature to try is 0, but must be above 0 .* or none for no kernel"),
        ({"temperatures": (None, np.inf)}, "a temperature to try is inf"),
        ({"temperatures": ("wide",)}, "a temperature to try is 'wide'"),
        ({"alphas": (0, 1.5)}, "alpha is 1.5"),
        ({"weightings": ("x",)}, "weighting is 'x'"),
    ],
)
def test_settings_that_no_rule_has_are_refused_before_anything_is_built(values: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        tried(**values)
    with pytest.raises(InputError, match=said):
        Candidates(**values)


@pytest.fixture(scope="module")
def sixty(tmp_path_factory: pytest.TempPathFactory) -> ImageDatabase:
    rows, folder = digits("train").subset(np.arange(60)), tmp_path_factory.mktemp("sixty") / "db"
    return build_databases(rows, trained(), {folder: FeatureSpec("block2", "grid2", pca=24)}, progress=False)[0]


def test_every_rule_of_the_table_scores_as_its_defence_and_kernels_are_in_the_images_own_distances(
    sixty: ImageDatabase,
) -> None:
    clean, labels = images("test", 21)
    attacked = pgd(trained(), clean, labels, norm="normalized-l2", eps=0.2, steps=3)
    found = calibrate(
        trained(), [sixty], clean, attacked, labels, ks=(1, 7), weightings=("cbw-e",), votes=("posteriors", "labels"),
        temperatures=(None, 0.3), alphas=(0, 0.5), max_clean_loss=1, batch_size=8,
    )  # fmt: skip
    with torch.no_grad():
        vectors = sixty.extractor(trained())(clean).double()
    squared = torch.cdist(vectors, sixty.features(sixty.row_numbers).double()).square().sort(1).values
    scale = float(squared.median(0).values[6])
    assert kernel_scales(trained(), sixty, [clean], 7)[6] == pytest.approx(scale, rel=1e-4)
    warm = {row.rule.temperature for row in found.table} - {None}
    assert list(warm) == [pytest.approx(0.3 * scale, rel=1e-4)]
    assert len(found.table) == 2 * 2 + 2 * 2 * 2
    for row in found.table:
        defense = NearestNeighborDefense(trained(), sixty, **row.rule.to_json())
        for batch, accuracy in ((clean, row.clean), (attacked, row.attacked)):
            assert accuracy == float((defense(batch).argmax(1) == labels).double().mean())
    assert len({(row.clean, row.attacked) for row in found.table}) > 2


def test_each_setting_is_attacked_through_its_own_rule(sixty: ImageDatabase) -> None:
    clean, labels = images("test", 3)
    met = list[Rule]()

    class Watched(AdaptiveAttacker):
        def on_defense(self, database: ImageDatabase, rule: Rule, *rest: Any) -> Tensor:
            met.append(rule)
            return super().on_defense(database, rule, *rest)

    options: dict[str, Any] = {"ks": (5,), "weightings": ("uniform",), "votes": ("labels",), "max_clean_loss": 1}
    watched = Watched(trained(), "normalized-l2", 0.2)
    rungs = (HalvingRung(1, None, 1),)
    found = calibrate(trained(), [sixty], clean, clean, labels, informed=watched, rungs=rungs, temperatures=(0.5,),
                      alphas=(0.5,), **options)  # fmt: skip
    assert met == [found.chosen.rule]
    assert (met[0].votes, met[0].alpha, met[0].temperature is None) == ("labels", 0.5, False)


def test_a_database_keeps_the_rule_that_was_chosen_and_whoever_opens_it_takes_it(tmp_path: Path) -> None:
    save_classifier(trained(), tmp_path / "net")
    words = ["calibrate", "--dataset", "digits:train[:60]", "--holdout", 12, "--classifier", tmp_path / "net",
             "--ks", "1,5", "--layers", "block3", "--poolings", "avg", "--steps", 1, "--objective", "gray",
             "--out", tmp_path / "db", "--build-anyway", "--quiet", "--max-clean-loss", 1]  # fmt: skip
    for name, value in (("--temperatures", "none,0"), ("--votes", "label"), ("--alphas", "0,2")):
        refused = nndefense(*words, name, value)
        assert refused.code == 2, refused.out
        assert refused.err.count("\n") == 1
    done = nndefense(*words, "--votes", "labels", "--temperatures", 0.5, "--alphas", "0.25,0.5")
    assert done.code == 0, done.err
    heading = next(line for line in done.out.splitlines() if line.split()[:1] == ["layer"])
    assert heading.split()[-5:] == ["votes", "temperature", "alpha", "clean", "attacked"]
    chosen = json.loads((tmp_path / "db" / "calibration.json").read_text())["chosen"]
    rule = NearestNeighborDefense.open(tmp_path / "db").rule
    assert (rule.votes, rule.k, rule.alpha, rule.temperature) == (
        "labels", chosen["k"], chosen["alpha"], chosen.get("temperature"),
    )  # fmt: skip
    assert rule.alpha in (0.25, 0.5)
    assert Guard.open(tmp_path / "db").rule == rule


def test_labels_that_should_vote_must_be_there(tmp_path: Path) -> None:
    data = digits("train").subset(np.arange(40))
    unlabelled = copy.copy(data)
    unlabelled.labels = np.full(40, -1)
    with pytest.raises(InputError, match="has a label to vote with: leave labels out of the votes"):
        choose(trained(), unlabelled, digits("test").subset(np.arange(4)), ATTACK, 0.2, Candidates(votes=("labels",)),
               progress=False)  # fmt: skip


def test_who_knows_the_retrieval_begins_at_the_pictures_of_the_rows_too(
    sets: tuple[Any, Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    met, attack = list[Any](), informed.run_adaptive

    def watched(surface: Any, *args: Any, **options: Any) -> Any:
        met.append(surface.rows)
        return attack(surface, *args, **options)

    monkeypatch.setattr(informed, "run_adaptive", watched)
    choose(trained(), sets[1], sets[2].subset([0, 1, 2]), ATTACK, 0.2, LAST, progress=False)
    assert met
    for rows in met:
        assert rows.images is not None
        assert torch.equal(rows.images(torch.tensor([59, 0])), sets[1].batch([59, 0])[0])


# -- what is said and built


@pytest.fixture
def sets() -> tuple[Any, Any, Any]:
    rows = digits("train").subset(np.arange(60))
    return rows, rows, digits("test").subset(np.arange(12))


ATTACK = AttackSettings("pgd", "normalized-l2", (0.2,), 2)
# The last layer falls with the classifier.
LAST = Candidates(layers=["block3"], poolings=("avg",), ks=(1, 3), rungs=(HalvingRung(1, None, 1),))


def test_where_nothing_helps_nothing_is_built_or_left_unless_asked_to(
    sets: tuple[Any, Any, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "passing").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "passing"))
    said: list[str] = []
    options: dict[str, Any] = {"progress": False, "say": said.append}
    with pytest.raises(NothingBetterError, match=r"nothing was built in .*: .*--build-anyway") as refused:
        build_calibrated(trained(), sets, tmp_path / "out", ATTACK, LAST, **options)
    assert not (tmp_path / "out").exists()
    assert said[-1].startswith("comparing 1 candidate over 60 rows: 0.")
    assert said[-1].endswith("and at most 156 gradients of who knows them")
    database, chosen = build_calibrated(trained(), sets, tmp_path / "out", ATTACK, LAST, build_anyway=True, **options)
    assert chosen.calibration == refused.value.chosen.calibration
    stored = json.loads((tmp_path / "out" / "calibration.json").read_text())
    assert (stored["by"], stored["paired"]["better"], len(database)) == ("informed", False, 60)
    assert stored["rungs"] == [{"settings": 1, "images": None, "steps": 1, "each": 1}]
    assert not any((tmp_path / "passing").iterdir())
    # Without a folder of its own the comparison stands among the system's temporary files, and goes, too.
    choose(trained(), *sets[1:], ATTACK, 0.2, LAST, **options)
    assert not any((tmp_path / "passing").iterdir())


@pytest.mark.parametrize("objective", ["gray", pytest.param("informed", marks=pytest.mark.slow)])
def test_the_command_says_first_that_nothing_helps_and_ends_with_1(objective: str, tmp_path: Path) -> None:
    save_classifier(trained(), tmp_path / "net")
    words = ["calibrate", "--dataset", "digits:train[:60]", "--holdout", 12, "--classifier", tmp_path / "net",
             "--ks", 1, "--layers", "block3", "--poolings", "avg", "--steps", 2, "--out", tmp_path / "db",
             "--quiet"]  # fmt: skip
    done = nndefense(*words, "--objective", objective)
    assert done.code == 1
    lines = done.out.splitlines()
    assert lines[0].startswith(
        "Nothing helps: none of 3 settings is shown to keep more images than the bare classifier"
    )
    assert "no defence" in done.out
    assert done.err.count("\n") == 1
    assert "nothing was built in" in done.err
    assert not (tmp_path / "db").exists()
    told = nndefense(*words, "--objective", objective, "--json")
    value = json.loads(told.out)
    assert (told.code, value["database"], value["calibration"]["paired"]["better"]) == (1, None, False)
    built = nndefense(*words, "--objective", objective, "--build-anyway")
    assert built.code == 0, built.err
    assert built.out.startswith("Nothing helps")
    assert "built" in built.out.splitlines()[-1]


def record(**changes: Any) -> dict[str, Any]:
    """A calibration with many settings, of which the last was chosen."""
    table = [
        {"layer": f"block{i}", "pooling": "avg", "dimension": 9, "k": 5, "weighting": "uniform", "clean": 0.9 - i / 100,
         "attacked": 0.7, "worst": 0.4 - i / 100, "images": 20}
        for i in range(30)
    ]  # fmt: skip
    paired = {"only_chosen": 3, "only_bare": 5, "p": mcnemar_p(3, 5), "better": False}
    found = {"n": 20, "dataset": "digits", "objective": "best", "by": "informed", "bare_clean": 0.95,
             "bare_attacked": 0.5, "bare_worst": 0.45, "within_bound": True, "chosen": table[-1], "table": table,
             "paired": paired}  # fmt: skip
    return found | changes


def test_the_chosen_row_and_the_bare_classifier_show_wherever_the_table_is_cut() -> None:
    text = calibration_text(record(), rows=4)
    assert text.startswith(
        "Nothing helps: none of 30 settings is shown to keep more images than the bare classifier under"
    )
    assert "(the best one keeps 11.0 %, the bare classifier 45.0 % of 20; paired test, p = 0.727)." in text
    lines = text.splitlines()
    assert lines[3].split() == [">", "block29", "avg", "9", "5", "uniform", "61.0", "70.0", "11.0", "20"]
    assert lines[4].split() == ["no", "defence", "95.0", "50.0", "45.0", "20"]
    assert lines[-1] == "... and 27 more"
    page = calibration_section({"calibration": record()})
    assert "<strong>Nothing helps" in page
    assert page.index("block29") < page.index("no defence</th>") < page.index("block0")
    assert "Without defence: clean 95.0, attacked 50.0, worst 45.0." in page
    assert "Out of 30 candidates" in page


def test_rows_that_differ_in_votes_alone_are_told_apart() -> None:
    table = record()["table"][:3]
    mixed = [{**table[0], "votes": "labels", "temperature": 2.5}, {**table[0], "alpha": 0.5}, *table]
    for place, row in enumerate(mixed[:3]):
        text = calibration_text(record(table=mixed, chosen=row)).splitlines()
        rows = [line.split()[-7:-4] for line in text[3:]]
        wanted = [["labels", "2.5", "0"], ["posteriors", "none", "0.5"], *3 * [["posteriors", "none", "0"]]]
        assert rows == [wanted[place], rows[1], *wanted[:place], *wanted[place + 1 :]]


def test_what_is_said_of_a_gain_of_the_gray_box_and_of_older_records() -> None:
    better = {**record()["paired"], "better": True}
    assert verdict_text(record(paired=better)) == ""
    assert calibration_text(record(paired=better)).startswith("calibrated on 20 images")
    gray = record(bare_worst=None, by="gray")
    assert "under the gray-box attack (the best one keeps 70.0 %, the bare classifier 50.0 %" in verdict_text(gray)
    assert "the one that loses least is not shown" in verdict_text(record(within_bound=False))
    # Records from before this had neither a paired test nor a worst case.
    names = ("n", "dataset", "objective", "bare_clean", "bare_attacked", "within_bound")
    old = {name: record()[name] for name in names}
    row = {name: value for name, value in record()["chosen"].items() if name not in ("worst", "images")}
    text = calibration_text(old | {"chosen": row, "table": [row]})
    assert text.startswith("calibrated on 20 images of digits: best\n")
    assert "worst" not in text


def test_the_objective_is_named_or_refused() -> None:
    with pytest.raises(InputError, match="must be one of informed, gray"):
        Candidates(objective="adaptive")


@pytest.mark.slow
def test_the_informed_choice_is_no_worse_against_who_knows_it(tmp_path: Path) -> None:
    x, labels = images("test", 40)
    attacked = pgd(trained(), x, labels, norm="normalized-l2", eps=0.2, steps=10)
    specs = {tmp_path / str(i): FeatureSpec(f"block{1 + i}", "grid4", pca=64) for i in range(3)}
    databases = build_databases(digits("train").subset(np.arange(400)), trained(), specs, progress=False)
    attacker = AdaptiveAttacker(trained(), "normalized-l2", 0.2)
    options: dict[str, Any] = {"ks": (1, 5, 20), "max_clean_loss": 1}
    gray = calibrate(trained(), databases, x, attacked, labels, **options)
    informed, again = (
        calibrate(trained(), databases, x, attacked, labels, informed=attacker, **options) for _ in range(2)
    )
    assert again.to_json() == informed.to_json()
    rule = gray.chosen.rule
    found = attacker.on_defense(databases[gray.candidate], rule, x, labels, RUNGS[-1].steps)
    database = databases[gray.candidate]
    alone = calibrate(trained(), [database], x, found, labels, ks=(rule.k,), weightings=(rule.weighting,),
                      max_clean_loss=1)  # fmt: skip
    assert informed.chosen.worst is not None
    assert informed.chosen.worst >= alone.chosen.attacked - 0.05
