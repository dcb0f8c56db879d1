"""Recipes, outcomes, finished cells, worst cases and paired tests: by hand, by property, and after a kill."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from command import fails, nndefense
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binomtest

from nndefense.errors import DataError, InputError
from nndefense.evaluation import AttackSettings, CellStore, Recipe, Rung, compare, mcnemar_p, read_recipe, worst_cases
from nndefense.evaluation.ladder import from_hex, to_hex
from nndefense.evaluation.recipe import recipe_from

BITS = st.lists(st.booleans(), min_size=1, max_size=200)


# -- outcomes and paired tests -----------------------------------------------------------------------------------------


@given(BITS)
def test_outcomes_survive_being_written(bits: list[bool]) -> None:
    assert from_hex(to_hex(bits), len(bits)).tolist() == bits


@pytest.mark.parametrize(("text", "n"), [("zz", 8), ("ff", 9), ("ffff", 8), ("f", 4)])
def test_outcomes_that_do_not_fit(text: str, n: int) -> None:
    with pytest.raises(InputError, match="evaluate again"):
        from_hex(text, n)


@given(st.integers(0, 60), st.integers(0, 60))
def test_mcnemar_is_the_exact_binomial_test(first: int, second: int) -> None:
    expected = 1.0 if first + second == 0 else float(binomtest(first, first + second).pvalue)
    assert mcnemar_p(first, second) == pytest.approx(expected)
    assert mcnemar_p(first, second) == mcnemar_p(second, first)


def test_mcnemar_of_many_images_and_of_none() -> None:
    assert mcnemar_p(0, 0) == 1
    assert mcnemar_p(3000, 2500) == pytest.approx(float(binomtest(2500, 5500).pvalue), rel=1e-9)
    with pytest.raises(InputError, match="at least 0"):
        mcnemar_p(-1, 2)


# -- worst cases -------------------------------------------------------------------------------------------------------


def record(
    defense: str, threat: str, eps: float, right: list[int], *, norm: str = "linf", **more: Any
) -> dict[str, Any]:
    return {
        "defense": defense,
        "threat_model": threat,
        "attack": "none" if threat == "clean" else "pgd",
        "norm": "none" if threat == "clean" else norm,
        "eps": eps,
        "steps": 5,
        "restarts": 1,
        "n": len(right),
        "accuracy": sum(right) / len(right),
        "correct": to_hex(right),
        "knowledge": "",
        **more,
    }


def test_worst_case_is_image_by_image_and_over_smaller_budgets() -> None:
    records = [
        record("none", "clean", 0, [1, 1, 1, 0]),
        record("none", "gray", 0.1, [1, 0, 1, 1]),
        record("none", "gray", 0.2, [0, 1, 1, 1]),
        record("nearest-neighbor", "gray", 0.2, [1, 1, 1, 1]),
        record("nearest-neighbor", "adaptive", 0.2, [1, 1, 0, 1], knowledge="L3", attack="adaptive"),
        record("none", "gray", 0.3, [1, 1, 1, 1], norm="l2"),
        record("other", "gray", 0.2, [1, 1, 1, 1]),
    ]
    worst = {(r["defense"], r["norm"], r["eps"]): r for r in worst_cases(records)}
    # No attacker who knows it was sent against "other", so its worst case is not known.
    cells = {("none", "linf", 0.1), ("none", "linf", 0.2), ("none", "l2", 0.3), ("nearest-neighbor", "linf", 0.2)}
    assert set(worst) == cells
    assert from_hex(worst["none", "linf", 0.1]["correct"], 4).tolist() == [True, False, True, False]
    # The image that only the smaller budget broke counts at the larger one too.
    assert from_hex(worst["none", "linf", 0.2]["correct"], 4).tolist() == [False, False, True, False]
    assert from_hex(worst["none", "l2", 0.3]["correct"], 4).tolist() == [True, True, True, False]
    assert worst["none", "linf", 0.2]["accuracy"] == 0.25
    assert worst["nearest-neighbor", "linf", 0.2]["knowledge"] == "L3"
    assert worst["nearest-neighbor", "linf", 0.2]["accuracy"] == 0.75
    assert all(r["threat_model"] == "worst" for r in worst.values())
    # It is no stronger for being worked out twice.
    assert worst_cases([*records, *worst.values()]) == list(worst.values())


@given(st.lists(st.lists(st.booleans(), min_size=12, max_size=12), min_size=1, max_size=6))
def test_worst_case_is_never_above_any_attack_and_falls_with_the_budget(outcomes: list[list[bool]]) -> None:
    records = [record("d", "gray", 0.1 * (i + 1), [int(b) for b in bits]) for i, bits in enumerate(outcomes)]
    worst = [r["accuracy"] for r in worst_cases(records)]
    assert worst == sorted(worst, reverse=True)
    assert all(w <= r["accuracy"] for w, r in zip(worst, records, strict=True))


def test_comparisons_count_images_that_one_alone_gets_right() -> None:
    records = [
        record("none", "gray", 0.1, [1, 0, 0, 0, 0, 1]),
        record("nearest-neighbor", "gray", 0.1, [0, 1, 1, 1, 0, 1]),
        record("nearest-neighbor", "adaptive", 0.1, [0, 1, 1, 1, 0, 1]),
    ]
    (found,) = compare(records)
    assert (found.only_defended, found.only_bare) == (3, 1)
    assert found.p == pytest.approx(mcnemar_p(3, 1))
    assert json.loads(json.dumps(found.to_json()))["threat_model"] == "gray"


# -- finished cells ----------------------------------------------------------------------------------------------------


def test_cells_are_found_under_their_key_only(tmp_path: Path) -> None:
    store = CellStore(tmp_path / "cells")
    assert store.get("gray pgd", {"seed": 0}) is None
    store.put("gray pgd", {"seed": 0, "eps": [0.1]}, [{"accuracy": 0.5}])
    assert store.get("gray pgd", {"eps": [0.1], "seed": 0}) == [{"accuracy": 0.5}]
    assert store.get("gray pgd", {"seed": 1, "eps": [0.1]}) is None
    # A file that was damaged is measured again, not believed.
    (file,) = (tmp_path / "cells").iterdir()
    file.write_text(file.read_text()[:-20])
    assert store.get("gray pgd", {"seed": 0, "eps": [0.1]}) is None
    file.write_text(json.dumps({"format": "nndefense-cell", "version": 1, "key": {"seed": 2}, "value": 7}))
    assert store.get("gray pgd", {"seed": 0, "eps": [0.1]}) is None


# -- recipes -----------------------------------------------------------------------------------------------------------

RECIPE = """
title = "digits"
seed = 3

[data]
dataset = "digits:test"
limit = 200

[models]
classifier = "runs/demo/classifier"
surrogate = "runs/demo/surrogate"

[defense]
database = "runs/demo/database"

[report]
headline_norm = "linf"
headline_eps = "8/255"

[[attack]]
threat_model = ["gray", "black"]
norm = "linf"
eps = ["4/255", "8/255"]
steps = 10

[[attack]]
threat_model = "adaptive"
name = "adaptive"
norm = "linf"
eps = ["8/255"]
steps = 20
"""


def written(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "recipe.toml"
    path.write_text(text)
    return path


def test_a_recipe_is_read_and_identified(tmp_path: Path) -> None:
    recipe = read_recipe(written(tmp_path, RECIPE))
    assert [(rung.threat_model, rung.attack.name, rung.attack.eps) for rung in recipe.rungs] == [
        ("gray", "pgd", (4 / 255, 8 / 255)),
        ("black", "pgd", (4 / 255, 8 / 255)),
        ("adaptive", "adaptive", (8 / 255,)),
    ]
    assert (recipe.title, recipe.seed, recipe.limit, recipe.headline_eps) == ("digits", 3, 200, 8 / 255)
    assert json.loads(json.dumps(recipe.to_json(), allow_nan=False))["rungs"][2]["threat_model"] == "adaptive"
    assert len(recipe.sha256) == 64
    # Spaces and order are nothing, a setting is something.
    again = read_recipe(written(tmp_path, RECIPE.replace("limit = 200", "limit   =  200 # images")))
    other = read_recipe(written(tmp_path, RECIPE.replace("seed = 3", "seed = 4")))
    assert again.sha256 == recipe.sha256 != other.sha256


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('dataset = "digits:test"\n', "", "needs data.dataset"),
        ("limit = 200", "limit = 0", "limit is 0"),
        ("limit = 200", 'limit = "all"', "data.limit is 'all', but must be a whole number"),
        ("limit = 200", "limits = 200", "no entry data.limits"),
        ("seed = 3", "seed = true", "seed is True"),
        ("seed = 3", "sed = 3", "no entry sed"),
        ("[defense]", "[defence]", "no entry defence"),
        ('surrogate = "runs/demo/surrogate"\n', "", "needs a surrogate"),
        ('"8/255"]\nsteps = 20', '"8/0"]\nsteps = 20', "quotient"),
        ('headline_eps = "8/255"', "headline_eps = 0.5", "is not run"),
        ('headline_norm = "linf"', 'headline_norm = "l2"', "is not run"),
        ("steps = 10", "steps = 0", "at least 1 step"),
        ("steps = 10", "step = 10", "no entry attack.step"),
        ("steps = 10", 'steps = "ten"', "attack.steps is 'ten', but must be a whole number"),
        ('eps = ["4/255", "8/255"]\n', "", "needs attack.eps"),
        ('classifier = "runs/demo/classifier"', "classifier = 3", "models.classifier is 3, but must be text"),
        ('name = "adaptive"', 'name = "apgd"', "not one for the threat model 'adaptive'"),
        ('threat_model = "adaptive"', 'threat_model = "grey"', "must be one of"),
        ('threat_model = "adaptive"\n', "", "needs attack.threat_model"),
        ('norm = "linf"\neps = ["8/255"]', 'norm = "l1"\neps = ["8/255"]', "norm is 'l1'"),
    ],
)
def test_recipes_that_cannot_be_run(old: str, new: str, message: str, tmp_path: Path) -> None:
    assert old in RECIPE
    with pytest.raises(InputError, match=message) as caught:
        read_recipe(written(tmp_path, RECIPE.replace(old, new)))
    assert "recipe.toml" in str(caught.value)


def test_recipes_that_are_no_files_or_no_toml(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="there is no recipe"):
        read_recipe(tmp_path / "none.toml")
    with pytest.raises(DataError, match="is no TOML"):
        read_recipe(written(tmp_path, "seed = "))
    (tmp_path / "bytes.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(DataError, match="UTF-8"):
        read_recipe(tmp_path / "bytes.toml")
    for values, message in (
        ({"attack": [1]}, r"\[\[attack\]\]"),
        ({"data": 3}, "must be a table"),
        ({}, "needs"),
    ):
        with pytest.raises(InputError, match=message):
            recipe_from(values)


def test_a_recipe_without_attacks_is_refused() -> None:
    common: dict[str, Any] = {"dataset": "d", "classifier": "c", "database": "b", "headline_norm": "linf"}
    with pytest.raises(InputError, match="at least one"):
        Recipe(**common, rungs=(), headline_eps=0.1)
    rung = Rung("gray", AttackSettings(norm="linf", eps=(0.1,)))
    for name in ("audit_images", "batch_size", "seed", "gallery"):
        with pytest.raises(InputError, match=name):
            Recipe(**common, rungs=(rung,), headline_eps=0.1, **{name: -1})


def test_bits_are_of_the_record(tmp_path: Path) -> None:
    right = np.array([1, 0, 1, 1, 0, 0, 0, 0, 1])
    assert to_hex(right) == "b080"


CODE = """
import pathlib
pathlib.Path(__file__).with_name("ran").touch()
def make(*given, **named):
    raise ValueError("made")
"""
PLACES = [
    ('classifier = "runs/demo/classifier"', 'classifier = "CODE"'),
    ('surrogate = "runs/demo/surrogate"', 'surrogate = "CODE"'),
    ('classifier = "runs/demo/classifier"', 'classifier = " CODE"'),
    ('name = "adaptive"', 'name = "CODE"'),
    ("[defense]", '[defense]\nnames = ["jpeg", "CODE"]'),
    ("[defense]", '[materials.classifier]\narch = "CODE"\n\n[defense]'),
    ("[defense]", '[materials.training]\n"CODE" = 3\n\n[defense]'),
    ("[defense]", '[materials]\ntraining = { x = [[1, ["CODE"]]] }\n\n[defense]'),
]


@pytest.mark.parametrize(("old", "new"), PLACES)
def test_code_in_a_recipe_is_not_run_unless_it_is_allowed(old: str, new: str, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(CODE)
    code = f"python:{tmp_path / 'mine.py'}:make"
    assert old in RECIPE
    path = written(tmp_path, RECIPE.replace(old, new.replace("CODE", code), 1))
    fails(
        2,
        f"recipe.toml names Python code ({new.count(' CODE') * ' '}{code})",
        "evaluate",
        "--recipe",
        path,
        "--out",
        tmp_path / "x",
    )
    with pytest.raises(InputError, match="give --allow-code once you have read that code"):
        read_recipe(path)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["mine.py", "recipe.toml"]


def test_code_in_a_recipe_that_is_allowed_runs(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(CODE)
    words = RECIPE.replace('"runs/demo/classifier"', f'"python:{tmp_path / "mine.py"}:make"')
    # Of the classifier alone.
    path = written(tmp_path, words.partition('[[attack]]\nthreat_model = "adaptive"')[0].replace("database =", "# "))
    assert read_recipe(path, allow_code=True).classifier.startswith("python:")
    assert not (tmp_path / "ran").exists()
    done = nndefense("evaluate", "--recipe", path, "--allow-code", "--out", tmp_path / "out")
    assert "raised ValueError: made" in done.err
    assert (tmp_path / "ran").exists()
    # What is typed is the user's own, and needs no leave.
    (tmp_path / "ran").unlink()
    fails(4, "raised ValueError: made", "evaluate", "--dataset", "digits:test[:4]", "--classifier",
          f"python:{tmp_path / 'mine.py'}:make", "--out", tmp_path / "typed")  # fmt: skip
    assert (tmp_path / "ran").exists()
    fails(2, "--allow-code is for the code that a --recipe names", "evaluate", "--allow-code", "--out", tmp_path / "o")
