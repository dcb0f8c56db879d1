"""The comparison of defences: recipe, table, and a whole run on digits."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from command import nndefense
from torch import nn

from nndefense.comparison import (
    CAVEATS,
    PUBLISHED,
    RowSpec,
    changed,
    comparison_from,
    comparison_names,
    markdown_of,
    read_comparison,
    run_comparison,
    shipped_comparison,
    table_of,
    write_comparison,
)
from nndefense.comparison.report import page_of
from nndefense.comparison.rows import verdict_parts, weaker_than_ignorant
from nndefense.comparison.runner import make_rows
from nndefense.datasets import open_dataset
from nndefense.errors import DataError, InputError, NNDefenseError
from nndefense.pipeline import Materials, defenses
from nndefense.pipeline.makers import InClassesOf
from nndefense.reporting.wording import rough

SMALL = {
    "title": "small",
    "row": [
        {"name": "bare", "kind": "none", "published": "none"},
        {"name": "neighbours", "kind": "nearest-neighbor", "options": {"pooling": "avg"}},
        {"name": "few", "kind": "nearest-neighbor", "options": {"share": 0.1, "k": 3}, "informed": False},
        {"name": "not trained", "kind": "alp", "published": "alp"},
    ],
    "scope": {
        "default": {
            "eps": ["1/10", 0.2], "headline": 0.2, "limit": 40, "steps": 3, "white_steps": 3, "adaptive_steps": 3,
        },
        "digits": {
            "layers": 2, "holdout": 40, "batch_size": 64, "candidate_rows": 200,
            "classifier": {"arch": "small-cnn", "epochs": 3}, "surrogate": {"arch": "madry-mnist", "epochs": 1},
        },
    },
}  # fmt: skip


def materials(out: Path, values: dict[str, Any] | None = None) -> Materials:
    recipe = comparison_from(values or SMALL, "small", "digits")
    return Materials(
        recipe.scope, open_dataset("digits:train[:600]"), out, torch.device("cpu"), recipe.seed, progress=False
    )


def run_small(out: Path, command: str = "") -> dict[str, Any]:
    recipe = comparison_from(SMALL, "small", "digits")
    return run_comparison(recipe, materials(out), open_dataset("digits:test[:40]"), command)


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    out = tmp_path_factory.mktemp("comparison")
    return out, run_small(out, "nndefense evaluate small")


def test_shipped_recipes_have_every_kind_of_defence() -> None:
    assert comparison_names() == ("table2",)
    for dataset in ("digits", "mnist:train", "cifar10", "imagefolder:photos"):
        recipe = shipped_comparison("table2", dataset)
        assert {row.kind for row in recipe.rows} == defenses.SHIPPED
        assert bool(recipe.scope.training) == (not dataset.startswith("imagefolder"))
    assert shipped_comparison("table2", "digits").scope != shipped_comparison("table2", "mnist").scope


def test_published_figures_are_those_of_the_slides() -> None:
    """Every figure of the table, typed once more from the slides' rows, in their order."""
    printed = [
        (0.761, 0.038, 0.046), (0.652, 0.456, 0.512), (0.635, 0.338, 0.597), (0.414, 0.379, 0.618),
        (None, None, 0.051), (0.557, 0.279, 0.348), (0.609, 0.259, None), (0.676, 0.427, 0.491),
        (0.681, 0.462, 0.587), (0.613, 0.309, 0.395), (0.471, 0.286, 0.312),
    ]  # fmt: skip
    assert [(row.clean, row.gray, row.black) for row in PUBLISHED.values()] == printed
    assert len(CAVEATS) == 6


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"row": []}, "needs rows"),
        ({"row": [SMALL["row"][1]]}, "first row must be of the kind none"),
        ({"row": [SMALL["row"][0], {**SMALL["row"][0]}]}, "a name of its own"),
        ({"row": [{"name": "x", "kind": "magic"}]}, "of the kind 'magic'"),
        ({"row": [{"name": "x", "kind": "none", "published": "y"}]}, "stands beside 'y'"),
        ({"row": [{"name": "x", "kind": "none", "colour": 1}]}, "no entry row.colour"),
        ({"scope": {"default": {"speed": 1}}}, "no entry scope.speed"),
        ({"scope": {"default": {"eps": [0.1], "headline": 0.3}}}, "not among the eps"),
        ({"scope": {"default": {"eps": [-0.1]}}}, "eps above 0"),
        ({"scope": {"default": {"norm": "l7"}}}, "norm is 'l7'"),
        ({"scope": {"default": {"draws": 0}}}, "draws is 0"),
        ({"scope": {"default": {"holdout": 1}}}, "at least 20"),
        ({"scope": {"default": {"eps": [0.1, 0.2], "informed_eps": [0.1]}}}, "must hold the headline"),
        ({"colour": 1}, "no entry colour"),
        ({"row": [{"name": "x", "kind": "none", "informed": "no"}]}, "row.informed is 'no', but must be true or false"),
        ({"scope": {"default": {"limit": "all"}}}, "scope.limit is 'all', but must be a whole number"),
        ({"scope": {"default": {"training": 3}}}, "scope.training is 3, but must be a table"),
        ({"title": None}, "title is None, but must be text"),
        *(
            ({"row": [SMALL["row"][0], {"name": "x", "kind": kind, "options": options}]}, words)
            for kind, options, words in [
                (
                    "nearest-neighbor",
                    {"layerr": "block1"},
                    "the row 'x' has no option layerr: it takes layer, pooling, pca",
                ),
                ("nearest-neighbor", {"k": "many"}, "k of the row 'x' is 'many', but must be a whole number"),
                ("nearest-neighbor", {"pca": 2.5}, "pca of the row 'x' is 2.5"),
                ("crop-ensemble", {"weight": 1}, "no option weight: it takes crops, size"),
                ("tv-minimization", {"wieght": 1}, "no option wieght"),
                ("quilting", {"patches": 3}, "no option patches"),
                ("jpeg", {"quality": "high"}, "quality of the row 'x' is 'high'"),
                ("alp", {"eps": 1}, "no option eps: it takes none"),
            ]
        ),
        ({"scope": {"default": {"weighting": "cbw"}}}, "weighting is 'cbw'"),
        ({"scope": {"default": {"k": 0}}}, "k is 0"),
        ({"scope": {"default": {"layer": "x", "k": 3, "holdout": 0}}}, "holdout is 0, but must be at least 20"),
        ({"scope": {"default": 3}}, "scope.default is 3, but must be a table"),
    ],
)
def test_bad_recipes_are_refused(change: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        comparison_from({**SMALL, **change}, "small", "digits")


def test_every_shipped_rows_options_are_taken() -> None:
    for row in (
        {"name": "x", "kind": "crop-ensemble", "options": {"crops": 3, "size": 0.5}},
        {"name": "x", "kind": "tv-minimization", "options": {"weight": 0.015, "data": "norm", "draws": 2}},
        {"name": "x", "kind": "quilting", "options": {"k": 5, "overlap": 1}},
        {"name": "x", "kind": "ra-cnn", "options": {"k": 3}},
        {"name": "x", "kind": "nearest-neighbor", "options": {
            "layer": "block2", "pooling": "rmac", "k": 5, "weighting": "uniform", "pca": 8, "share": "1/3"}},
        {"name": "x", "kind": "nearest-neighbor", "options": {"database": "runs/database"}},
    ):  # fmt: skip
        values: dict[str, Any] = {**SMALL, "row": [SMALL["row"][0], row]}  # type: ignore[index]
        found = comparison_from(values, "small", "digits").rows[1]
        assert set(found.options) == set(row["options"])  # type: ignore[arg-type]


def test_a_users_own_defence_takes_what_it_says() -> None:
    def blurred(classifier: nn.Module, *, sigma: NowhereDefined = 1, **more: Any) -> nn.Module:  # type: ignore[name-defined]  # noqa: F821
        return classifier

    name = defenses.register(blurred)
    try:
        assert RowSpec("x", name, {"sigma": [1, 2], "other": "y"}).options == {"sigma": [1, 2], "other": "y"}
    finally:
        defenses.unregister(name)


def test_the_scope_imagenet_pins_what_the_paper_used() -> None:
    recipe = shipped_comparison("table2", "imagefolder:photos", scope="imagenet")
    scope = recipe.scope
    assert (scope.layer, scope.k, scope.weighting, scope.pca) == ("conv_5_1", 50, "cbw-d", 256)
    assert (scope.norm, scope.headline, scope.steps) == ("normalized-l2", 0.06, 10)
    assert scope.net == "torchvision:resnet50:IMAGENET1K_V1"
    ours = [row for row in recipe.rows if row.kind == "nearest-neighbor"]
    assert [(row.options["pooling"], row.published) for row in ours][:2] == [("avg", "in-1.3m"), ("rmac", None)]
    # Where all is named nothing is held out, and the database is all of the training set.
    found = Materials(scope, open_dataset("digits:train[:60]"), Path("unused"), torch.device("cpu"))
    assert len(found.rows) == 60
    assert found.chosen("rmac").feature.layer == "conv_5_1"
    assert not found.chosen("rmac").calibration


@pytest.mark.parametrize("dataset", ["digits", "mnist", "cifar10", "imagefolder:photos"])
def test_budgets_of_ones_own_work_in_every_scope(dataset: str) -> None:
    scope = shipped_comparison("table2", dataset).scope
    other = changed(scope, {"eps": (0.07, 0.3)})
    assert (other.eps, other.headline) == ((0.07, 0.3), 0.3)
    # Where the scope keeps attackers who know the defence to some budgets, they meet the one that the table shows.
    assert other.informed_eps == (scope.informed_eps and (0.3,))
    least = changed(scope, {"headline": scope.eps[0]})
    assert least.informed_eps == (scope.informed_eps and (scope.eps[0],))
    assert changed(scope, {"eps": (0.07, 0.3), "informed_eps": (0.07, 0.3)}).informed_eps == (0.07, 0.3)


def test_rows_name_their_feature_and_a_few_rows_are_all_neighbours(tmp_path: Path) -> None:
    pinned = {"pooling": "avg", "layer": "block2", "k": 30, "weighting": "cbw-e", "pca": 6}
    values: dict[str, Any] = {
        **SMALL,
        "row": [
            SMALL["row"][0],  # type: ignore[index]
            {"name": "named", "kind": "nearest-neighbor", "options": pinned},
            {"name": "few", "kind": "nearest-neighbor", "options": {**pinned, "share": 0.05}},
        ],
    }
    found = materials(tmp_path, values)
    recipe = comparison_from(values, "small", "digits")
    (named,), (few,) = (make_rows(found, spec) for spec in recipe.rows[1:])
    wanted = {"layer": "block2", "pooling": "avg", "dimensions": 6, "rows": 560, "k": 30, "weighting": "cbw-e"}
    assert {key: named.facts[key] for key in wanted} == wanted
    assert named.spec.name == "named"
    assert few.spec.name == "few, K = all rows"
    assert few.facts["rows"] == few.facts["k"] == 28
    # The same database by its folder, with another K.
    folder = str(next((tmp_path / "databases").iterdir()))
    again = RowSpec("again", "nearest-neighbor", {"database": folder, "k": 7, "weighting": "uniform"})
    (opened,) = make_rows(found, again)
    assert {key: opened.facts[key] for key in ("layer", "rows", "k", "weighting")} == {
        "layer": "block2", "rows": 560, "k": 7, "weighting": "uniform"
    }  # fmt: skip
    with pytest.raises(InputError, match="has its own layer: leave that out"):
        make_rows(found, RowSpec("again", "nearest-neighbor", {"database": folder, "layer": "block2"}))
    with pytest.raises(InputError, match="no layer 'conv_5_1'"):
        make_rows(found, RowSpec("x", "nearest-neighbor", {**pinned, "layer": "conv_5_1"}))


def test_an_unknown_comparison_is_refused() -> None:
    with pytest.raises(InputError, match="choose one of table2"):
        shipped_comparison("table3", "digits")


def test_a_change_of_budgets_moves_the_headline() -> None:
    scope = changed(shipped_comparison("table2", "digits").scope, {"eps": ["8/255", 0.01]})
    assert scope.eps == (8 / 255, 0.01)
    assert scope.headline == 8 / 255


def test_every_row_is_measured_or_has_a_reason(done: tuple[Path, dict[str, Any]]) -> None:
    _, results = done
    rows = {row.name: row for row in table_of(results)}
    assert list(rows) == ["bare", "neighbours", "few", "not trained"]
    for row in rows.values():
        for cell in (*row.cells.values(), *row.published.values()):
            assert (cell.accuracy is None) == bool(cell.reason)
            if cell.low is not None and cell.high is not None and cell.accuracy is not None:
                assert 0 <= cell.low <= cell.accuracy <= cell.high <= 1
    assert rows["neighbours"].cells["informed"].accuracy is not None
    # Who knows the bare net does more than the gray box's PGD: the defences' attackers do, too.
    assert "APGD" in rows["bare"].cells["informed"].attack or rows["bare"].cells["informed"].accuracy == 0
    assert rows["few"].cells["informed"].reason == "not run for this row"
    assert rows["not trained"].cells["clean"].reason.startswith("not trained")
    assert rows["not trained"].published["gray"].accuracy == 0.279
    assert rows["bare"].cells["worst"].accuracy <= rows["bare"].cells["gray"].accuracy  # type: ignore[operator]


@pytest.mark.parametrize(("milliseconds", "text"), [(0.4512, "0.45"), (12.34, "12"), (1637.2, "1,600")])
def test_times_are_written_without_exponents(milliseconds: float, text: str) -> None:
    assert rough(milliseconds) == text


def test_what_is_held_out_stands_in_no_database(tmp_path: Path) -> None:
    found = materials(tmp_path)
    assert not set(found.held.ids) & set(found.rows.ids)
    assert len(found.held) + len(found.rows) == len(found.train)


def test_smaller_databases_are_parts_of_larger_ones(done: tuple[Path, dict[str, Any]]) -> None:
    _, results = done
    facts = {row["name"]: row["facts"] for row in results["rows"]}
    assert facts["few"]["rows"] == round(0.1 * facts["neighbours"]["rows"])
    assert facts["few"]["k"] == 3


def test_a_second_run_makes_nothing_again(done: tuple[Path, dict[str, Any]], monkeypatch: pytest.MonkeyPatch) -> None:
    out, results = done

    def refuse(*arguments: object, **options: object) -> None:
        raise AssertionError("made again")

    monkeypatch.setattr("nndefense.pipeline.finished.build_databases", refuse)
    monkeypatch.setattr(importlib.import_module("nndefense.evaluation.evaluate")._Run, "measure", refuse)
    again = run_small(out, "nndefense evaluate small")
    assert again["records"] == results["records"]


@pytest.mark.slow
def test_outcomes_repeat(done: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    _, results = done
    again = run_small(tmp_path)
    assert [r["correct"] for r in again["records"]] == [r["correct"] for r in results["records"]]


def test_files_follow_from_the_results(done: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    out, results = done
    stored = read_comparison(out / "results.json")
    assert stored["records"] == json.loads(json.dumps(results["records"]))
    paths = write_comparison(stored, tmp_path)
    assert all(path.stat().st_size > 1000 for path in paths)
    page = paths[2].read_text()
    for word in ("<script", "http://", "https://www"):
        assert word not in page.replace("http://www.w3.org", "")
    for row in table_of(stored):
        assert row.name in page
        assert row.name in markdown_of(stored)
    for caveat in CAVEATS:
        assert caveat.split(":")[0] in markdown_of(stored)
    (tmp_path / "other.json").write_text("{}")
    with pytest.raises(DataError, match="does not hold the results of a comparison"):
        read_comparison(tmp_path / "other.json")


def test_the_page_leads_with_what_was_found(done: tuple[Path, dict[str, Any]]) -> None:
    _, results = done
    said = "".join(text for _, text in verdict_parts(results))
    assert said.startswith("Under the attack that ignores it ")
    rows = {row.name: row.cells["worst"] for row in table_of(results)}
    best = max((cell.accuracy for name, cell in rows.items() if name != "bare" and cell.accuracy is not None))
    assert f"{100 * best:.1f} %" in said
    page = page_of(results)
    assert '<p class="verdict">' in page
    # Where no defence keeps more, none is praised.
    same = json.loads(json.dumps(results))
    for one in same["records"]:
        if one["threat_model"] == "worst":
            alike = {"defense": "none", "threat_model": "worst", "eps": one["eps"]}
            found = next(record for record in same["records"] if alike.items() <= record.items())
            one.update(accuracy=found["accuracy"], correct=found["correct"])
    told = "".join(text for _, text in verdict_parts(same))
    assert "no defence is shown to keep more than the bare net" in told
    assert told.endswith("% (p = 1.000).")
    # What was not measured is not spoken of.
    bare = {**results, "records": [one for one in results["records"] if one["defense"] == "none"]}
    assert verdict_parts(bare) == []
    assert '<p class="verdict">' not in page_of(bare)
    # Fingerprints are short, and whole where they are asked for.
    whole = results["dataset"]["fingerprint"]
    assert f"<summary><code>{whole[:12]}</code></summary><code>{whole}</code>" in page
    assert page.count(whole) == 1


def test_names_are_escaped(done: tuple[Path, dict[str, Any]]) -> None:
    _, results = done
    changed_results = json.loads(json.dumps(results))
    changed_results["rows"][1]["name"] = changed_results["recipe"]["title"] = "<b onclick=x>"
    assert "<b onclick" not in page_of(changed_results)


def test_an_informed_attack_that_is_too_weak_is_told(done: tuple[Path, dict[str, Any]]) -> None:
    _, results = done
    weak = json.loads(json.dumps(results))
    for record in weak["records"]:
        if record["threat_model"] in ("white", "adaptive"):
            record.update(accuracy=1.0, ci_low=0.99, ci_high=1.0)
        if record["threat_model"] == "gray":
            record.update(accuracy=0.1, ci_low=0.05, ci_high=0.2)
    assert weaker_than_ignorant(weak) == ["bare", "neighbours"]
    assert "Attackers who know it did worse" in markdown_of(weak)
    assert "too weak" in page_of(weak)


def test_a_net_answers_in_the_classes_of_another() -> None:
    net = nn.Linear(4, 2)
    images = torch.rand(3, 4)
    found = InClassesOf(net, torch.tensor([5, 1]), 7)(images)
    own = net(images).log_softmax(1)
    assert found.shape == (3, 7)
    assert torch.equal(found[:, 5], own[:, 0])
    assert torch.equal(found[:, 1], own[:, 1])
    assert float(found.detach().exp().sum(1).sub(1).abs().max()) < 1e-5
    assert set(found.argmax(1).tolist()) <= {5, 1}


def test_too_few_images_are_refused(tmp_path: Path) -> None:
    few = materials(tmp_path)
    few.train = open_dataset("digits:train[:50]")
    with pytest.raises(InputError, match="to be held out"):
        _ = few.held


def test_a_data_set_without_settings_needs_a_classifier(tmp_path: Path) -> None:
    without = materials(tmp_path, {**SMALL, "scope": {"default": SMALL["scope"]["default"]}})  # type: ignore[index]
    with pytest.raises(InputError, match="give --classifier"):
        _ = without.classifier


def test_kinds_are_named_in_errors() -> None:
    with pytest.raises(NNDefenseError, match="nearest-neighbor"):
        RowSpec("x", "y")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["table2"], "give --dataset"),
        (["table3", "--dataset", "digits"], "choose one of table2"),
        (["table2", "--dataset", "digits", "--database", "x"], "--database is not for a comparison"),
        (["table2", "--dataset", "digits", "--k", "5", "--only", "jpeg"], "k is for rows of the kind nearest-neighbor"),
        (["table2", "--dataset", "digits", "--weighting", "cbw"], "cbw"),
        (["table2", "--dataset", "digits", "--scope", "imagnet"], "the scope is 'imagnet', but must be one of default"),
        (["table2", "--dataset", "digits", "--allow-code"], "--allow-code is for"),
        (["--dataset", "digits", "--classifier", "x", "--scope", "imagenet", "--out", "o"], "--scope belongs to"),
        (["table2", "--dataset", "digits", "--only", "magic"], "--only names magic"),
        (["table2", "--dataset", "imagefolder:nowhere"], "cannot be guessed"),
        (["--dataset", "digits", "--classifier", "x", "--only", "alp", "--out", "o"], "--only belongs to a comparison"),
        (["--dataset", "digits", "--classifier", "x"], "give --out"),
    ],
)
def test_wrong_commands_are_told(options: list[str], words: str) -> None:
    done = nndefense("evaluate", *options)
    assert done.code == 2
    assert words in done.err
