"""The report: what it says follows from the numbers, and the page stands alone whatever is missing."""

from __future__ import annotations

import copy
import json
import math
import re
import xml.etree.ElementTree as ET
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from browsing import chromium, faint, sideways, visit
from hypothesis import given
from hypothesis import strategies as st
from sklearn.datasets import load_digits

from nndefense.comparison.report import page_of
from nndefense.errors import InputError
from nndefense.evaluation.ladder import to_hex, worst_cases
from nndefense.evaluation.report import (
    GalleryNeighbor,
    GalleryRow,
    accuracy_vs_eps,
    accuracy_vs_rows,
    ladder,
    obscurity,
    report_html,
    summary,
    table2,
    verdict,
    write_report,
)
from nndefense.evaluation.report.gallery import amplification, picture
from nndefense.evaluation.report.table import side_by_side
from nndefense.reporting.charts import log_ticks, nice_ticks, spread

VOID = {"meta", "link", "img", "br"}


def wilson(accuracy: float, n: int) -> tuple[float, float]:
    z = 1.959964
    center = (accuracy + z * z / (2 * n)) / (1 + z * z / n)
    half = z * math.sqrt(accuracy * (1 - accuracy) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    return max(0.0, center - half), min(1.0, center + half)


def record(defense: str, threat_model: str, eps: float, right: int, *, n: int = 500, **more: Any) -> dict[str, Any]:
    low, high = wilson(right / n, n)
    variant = "calibrated" if defense == "nearest-neighbor" else ""
    return {
        "dataset": "digits:test",
        "defense": defense,
        "variant": variant,
        "attack": "none" if threat_model == "clean" else "pgd",
        "steps": 0 if threat_model == "clean" else 50,
        "threat_model": threat_model,
        "norm": "normalized-l2",
        "eps": eps,
        "eps_raw": 3.42 * eps,
        "n": n,
        "accuracy": right / n,
        "ci_low": low,
        "ci_high": high,
        "correct": to_hex(np.arange(n) < right),
        "seed": 0,
        "seconds": 1.25,
        "classifier": "4be0" * 16,
        "database": "" if defense == "none" else "91cd" * 16,
        "database_rows": 0 if defense == "none" else 1037,
        "surrogate": "77aa" * 16 if threat_model == "black" else "",
        **more,
    }


def fake_results() -> dict[str, Any]:
    """A run on the digits as it might come out: 500 images, four budgets, five database sizes, some variants."""
    records = [record("none", "clean", 0, 492), record("nearest-neighbor", "clean", 0, 487)]
    budgets = (0.05, 0.1, 0.2, 0.3)
    curves = {
        ("none", "gray"): (451, 288, 62, 9),
        ("none", "black"): (477, 436, 281, 129),
        ("nearest-neighbor", "gray"): (478, 451, 341, 178),
        ("nearest-neighbor", "black"): (482, 470, 401, 262),
    }
    for (defense, threat_model), curve in curves.items():
        records += [record(defense, threat_model, eps, right) for eps, right in zip(budgets, curve, strict=True)]
    for name, rights in {"uniform": (486, 329, 395), "cbw-e": (487, 336, 398)}.items():
        for threat_model, right in zip(("clean", "gray", "black"), rights, strict=True):
            eps = 0 if threat_model == "clean" else 0.2
            records.append(record(f"nearest-neighbor ({name})", threat_model, eps, right, variant="weighting"))
    for name, rights in {"block1, avg": (431, 302, 351), "block3, avg": (489, 222, 340)}.items():
        for threat_model, right in zip(("clean", "gray", "black"), rights, strict=True):
            eps = 0 if threat_model == "clean" else 0.2
            records.append(record(f"nearest-neighbor ({name})", threat_model, eps, right, variant="layer"))
    for rows, rights in {520: (478, 318, 381), 60: (352, 190, 243), 150: (431, 257, 317)}.items():
        for threat_model, right in zip(("clean", "gray", "black"), rights, strict=True):
            eps = 0 if threat_model == "clean" else 0.2
            name = f"nearest-neighbor (rows={rows})"
            records.append(record(name, threat_model, eps, right, variant="rows", database_rows=rows))
    table = [
        {
            "layer": layer,
            "pooling": "avg",
            "k": k,
            "weighting": weighting,
            "clean": 0.985 - 0.03 * step - k / 5000,
            "attacked": 0.70 - 0.08 * abs(step - 1) - k / 2000 + 0.01 * (weighting == "cbw-d"),
            "dimension": 64,
            "bare_clean": 0.984,
            "bare_attacked": 0.12,
        }
        for step, layer in enumerate(("block1", "block2", "block3"))
        for k in (10, 50, 100)
        for weighting in ("uniform", "cbw-d")
    ]
    chosen = max(table, key=lambda row: row["attacked"])
    return {
        "format": "nndefense-results",
        "version": 2,
        "created": "2026-11-22T20:17:05+00:00",
        "command": "nndefense evaluate --classifier runs/digits-cnn --database runs/digits-db --data digits:test",
        "dataset": {
            "name": "digits:test",
            "n": 500,
            "classes": [str(digit) for digit in range(10)],
            "fingerprint": "c0ffee" * 10 + "abcd",
            "shape": [1, 8, 8],
        },
        "classifier": {"source": "runs/digits-cnn", "arch": "small-cnn", "fingerprint": "4be0" * 16},
        "surrogate": {"source": "runs/digits-mlp", "arch": "mlp", "fingerprint": "77aa" * 16},
        "database": {
            "rows": 1037,
            "dimension": 64,
            "layer": "block2",
            "pooling": "avg",
            "index": "flat",
            "fingerprint": "91cd" * 16,
            "data": "digits:train",
            "path": "runs/digits-db",
        },
        "defense": {"k": 10, "weighting": "cbw-d"},
        "calibration": {
            "objective": "mean of clean and attacked accuracy",
            "n": 260,
            "dataset": "digits:train[1037:]",
            "attack": {"attack": "pgd", "norm": "normalized-l2", "eps": 0.2, "steps": 20},
            "chosen": chosen,
            "table": table,
        },
        "headline": {"attack": "pgd", "norm": "normalized-l2", "eps": 0.2},
        "versions": {"nndefense": "0.1.0", "torch": "2.15.0", "numpy": "2.4.0"},
        "records": records,
    }


def fake_gallery(count: int = 10, *, side: int | None = None, channels: int = 1) -> list[GalleryRow]:
    """Rows made of real digits with a made-up change; ``side`` enlarges the pictures."""
    digits = load_digits()
    rng = np.random.default_rng(0)
    scale = 1 if side is None else side // 8

    def enlarge(image: np.ndarray) -> np.ndarray:
        large = np.kron(image / 16, np.ones((scale, scale)))
        return np.repeat(large[None], channels, axis=0).astype(np.float32)

    rows = []
    for index in range(count):
        digit = int(digits.target[1000 + index])
        clean = enlarge(digits.images[1000 + index])
        noise = rng.normal(size=clean.shape)
        noise *= 0.2 * np.linalg.norm(clean) / np.linalg.norm(noise)
        attacked = np.clip(clean + noise, 0, 1).astype(np.float32)
        near = np.argsort(((digits.data[:1000] - digits.data[1000 + index]) ** 2).sum(axis=1))[
            : 10 * (1 + index % 2) : 2
        ]
        weights = rng.dirichlet(np.full(50, 2.0))
        weights = np.sort(weights)[::-1]
        neighbors = tuple(
            GalleryNeighbor(
                image=None if index == 2 and rank == 1 else enlarge(digits.images[row]),
                id=f"digits:train/{row:05d}",
                label=str(digits.target[row]) if not (index % 4 == 3 and rank % 2) else str((digit + 5) % 10),
                weight=float(weights[rank]),
                distance=1.5 + 0.2 * rank,
            )
            for rank, row in enumerate(near)
        )
        rows.append(
            GalleryRow(
                clean=clean,
                attacked=attacked,
                label=str(digit),
                bare=(str((digit + 5) % 10) if index != 5 else str(digit), 0.93 - index / 40),
                bare_clean=(str(digit), 0.998),
                defended=(str(digit) if index % 4 != 3 else str((digit + 5) % 10), 0.71 - index / 50),
                neighbors=neighbors,
                threat_model="gray",
                eps=0.2,
                id=f"digits:test/{index:05d}",
            )
        )
    return rows


class Page(HTMLParser):
    """Checks that every element is closed in order, and keeps ids, addresses, alt texts and the text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.addresses: list[str] = []
        self.alts: list[str | None] = []
        self.tags: set[str] = set()
        self.words: list[str] = []
        self.feed(html)
        self.close()
        assert not self.open
        self.text = " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        names = [name for name, _ in attrs]
        assert len(names) == len(set(names)), f"<{tag}> repeats an attribute"
        for name, value in attrs:
            assert not name.startswith("on")
            if name == "id":
                self.ids.append(value or "")
            if name in ("src", "href", "xlink:href", "action", "data", "poster", "srcset"):
                self.addresses.append(value or "")
        if tag == "img":
            self.alts.append(dict(attrs).get("alt"))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag, f"</{tag}> closes another element"

    def handle_data(self, data: str) -> None:
        if not self.open or self.open[-1] != "style":
            self.words.append(data)


def check_page(html: str) -> Page:
    """Well-formed, alone in the world, and every figure valid XML."""
    page = Page(html)
    assert len(page.ids) == len(set(page.ids))
    assert all(re.match(r"data:|#", address) for address in page.addresses), page.addresses
    assert all(address[1:] in page.ids for address in page.addresses if address.startswith("#"))
    assert not page.tags & {"script", "iframe", "object", "embed", "base", "form"}
    assert all(page.alts)
    for word in ("http:", "https:", "url(", "@import", "src="):
        rest = html.replace('src="data:', "")
        assert word not in rest, word
    for svg in re.findall(r"<svg.*?</svg>", html, flags=re.DOTALL):
        root = ET.fromstring(svg)
        assert root.find("title") is not None
        assert root.find("desc") is not None
        assert set(root.attrib["aria-labelledby"].split()) <= set(page.ids)
        assert "nan" not in svg.lower().replace("nance", "")
    return page


def without(results: dict[str, Any], keep: Any) -> dict[str, Any]:
    return {**results, "records": [row for row in results["records"] if keep(row)]}


def with_gray(bare: int, defended: int, n: int = 500) -> dict[str, Any]:
    results = fake_results()
    rest = without(results, lambda row: not (row["threat_model"] == "gray" and row["eps"] == 0.2))
    rights = {"none": bare, "nearest-neighbor": defended}
    rest["records"] += [record(name, "gray", 0.2, right, n=n) for name, right in rights.items()]
    return rest


# -- the page


def test_page_is_well_formed_and_complete(tmp_path: Path) -> None:
    results, path = fake_results(), tmp_path / "new" / "report.html"
    write_report(results, fake_gallery(), path)
    html = path.read_text(encoding="utf-8")
    page = check_page(html)
    assert path.stat().st_size < 1_500_000
    assert list(path.parent.iterdir()) == [path]
    for row in results["records"]:
        assert f">{100 * row['accuracy']:.2f}<" in html
        assert f">{100 * row['ci_low']:.2f}<" in html
    for row in table2(results):
        for cell in row.cells:
            assert cell.accuracy is not None
            assert f">{100 * cell.accuracy:.1f}<" in html
    assert html.count("<svg") == 2
    assert results["command"] in page.text
    assert f"</summary><code>{results['dataset']['fingerprint']}</code>" in html
    assert "22 November 2026, 20:17 UTC" in page.text
    for word in ("adaptive attacks", "retrieval", "web-scale", "not comparable", "calibration images", "upper bounds"):
        assert word in page.text


def test_same_input_gives_the_same_bytes(tmp_path: Path) -> None:
    results, gallery = fake_results(), fake_gallery(4)
    before = copy.deepcopy(results)
    write_report(results, gallery, tmp_path / "a.html")
    write_report(copy.deepcopy(results), fake_gallery(4), tmp_path / "b.html")
    assert (tmp_path / "a.html").read_bytes() == (tmp_path / "b.html").read_bytes()
    assert results == before


def test_an_old_report_survives_a_failed_write(tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    path.write_text("old")
    bad = fake_gallery(1)[0]
    bad = GalleryRow(**{**bad.__dict__, "attacked": np.zeros((1, 4, 4), np.float32)})
    with pytest.raises(InputError, match="two different shapes"):
        write_report(fake_results(), [bad], path)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_foreign_text_is_escaped() -> None:
    nasty = '<b onclick="x">&\'</b>\x00\x1b'
    results = fake_results()
    results["dataset"]["name"] = nasty
    results["dataset"]["classes"] = [nasty] * 10
    results["command"] = f"run --data {nasty}"
    results["classifier"]["source"] = results["surrogate"]["source"] = nasty
    results["versions"] = {nasty: nasty}
    results["calibration"]["objective"] = nasty
    results["calibration"]["table"][0]["layer"] = nasty
    results["headline"]["attack"] = nasty
    for row in results["records"]:
        row["dataset"] = nasty
        if row["attack"] != "none":
            row["attack"] = nasty
        if row["variant"] == "layer":
            row["defense"] = f"nearest-neighbor ({nasty})"
    gallery = [
        GalleryRow(
            **{
                **row.__dict__,
                "label": nasty,
                "id": f"folder/{nasty}/a.png",
                "bare": (nasty, 0.5),
                "neighbors": tuple(GalleryNeighbor(n.image, nasty, nasty, n.weight, n.distance) for n in row.neighbors),
            }
        )
        for row in fake_gallery(2)
    ]
    html = report_html(results, gallery)
    check_page(html)
    assert "<b onclick" not in html
    assert "\x00" not in html
    assert "\x1b" not in html
    assert "&lt;b onclick=&quot;x&quot;&gt;&amp;&#x27;&lt;/b&gt;" in html


def test_lone_surrogates_of_undecodable_paths_are_writable(tmp_path: Path) -> None:
    results = fake_results()
    results["command"] = "nndefense evaluate caf\udce9"
    write_report(results, [], tmp_path / "report.html")
    check_page((tmp_path / "report.html").read_text(encoding="utf-8"))


def remove_calibration(results: dict[str, Any]) -> dict[str, Any]:
    return {**results, "calibration": None}


def remove_surrogate(results: dict[str, Any]) -> dict[str, Any]:
    return without({**results, "surrogate": None}, lambda row: row["threat_model"] != "black")


def remove_sizes(results: dict[str, Any]) -> dict[str, Any]:
    return without(results, lambda row: row["variant"] != "rows")


def one_budget(results: dict[str, Any]) -> dict[str, Any]:
    return without(results, lambda row: row["eps"] in (0, 0.2))


def only_clean(results: dict[str, Any]) -> dict[str, Any]:
    return without(results, lambda row: row["threat_model"] == "clean")


def no_clean(results: dict[str, Any]) -> dict[str, Any]:
    return without(one_budget(results), lambda row: row["threat_model"] != "clean")


def no_records(results: dict[str, Any]) -> dict[str, Any]:
    return {**results, "records": []}


def thousand_classes(results: dict[str, Any]) -> dict[str, Any]:
    classes = [f"class number {index} with a name of some length" for index in range(1000)]
    return {**results, "dataset": {**results["dataset"], "classes": classes}}


def linf(results: dict[str, Any]) -> dict[str, Any]:
    records = [{**row, "norm": "linf", "eps_raw": row["eps"]} for row in results["records"]]
    return {**results, "records": records, "headline": {"attack": "pgd", "norm": "linf", "eps": 0.2}}


def bare_essentials(results: dict[str, Any]) -> dict[str, Any]:
    keys = ("format", "version", "dataset", "headline", "records")
    return {key: results[key] for key in keys}


@pytest.mark.parametrize(
    "change",
    [
        remove_calibration,
        remove_surrogate,
        remove_sizes,
        one_budget,
        only_clean,
        no_clean,
        no_records,
        thousand_classes,
        linf,
        bare_essentials,
    ],
)
def test_missing_parts_leave_a_whole_page(change: Any) -> None:
    html = report_html(change(fake_results()), [])
    page = check_page(html)
    assert len(html) < 400_000
    assert "None" not in page.text.replace("None of the attacks", "")


def test_blank_cells_say_why() -> None:
    results = remove_surrogate(fake_results())
    assert {row.black.reason for row in table2(results)} == {"no surrogate given"}
    page = check_page(report_html(results))
    assert "no surrogate given" in page.text
    assert "none given, so no black-box attack" in page.text
    results = without(fake_results(), lambda row: row["eps"] != 0.2)
    assert [row.gray.reason for row in table2(results)[:2]] == ["not run at this budget"] * 2
    results = only_clean(fake_results())
    assert table2(results)[1].gray.reason == "not run"


def test_other_results_are_refused() -> None:
    with pytest.raises(InputError, match="nndefense-results version 2"):
        report_html({"format": "something else"})
    results = fake_results()
    del results["headline"]
    with pytest.raises(InputError, match="'headline'"):
        report_html(results)


def test_calibration_and_attack_as_the_evaluation_writes_them() -> None:
    results = fake_results()
    calibration = results["calibration"]
    calibration |= {"bare_clean": 0.984, "bare_attacked": 0.12, "within_bound": False}
    calibration["attack"] = {"name": "pgd", "norm": "normalized-l2", "eps": [0.2], "steps": 40, "restarts": 1}
    for row in results["records"]:
        clean = row["threat_model"] == "clean"
        row |= {"restarts": 0 if clean else 1, "attack_seconds": 0.0 if clean else 2.0}
        if clean:
            row["norm"] = "none"
        if row["defense"] == "none":
            row |= {"variant": "none", "database": None, "database_rows": None}
    text = check_page(report_html(results)).text
    assert "the attack: PGD, normalised ℓ₂ 0.2, 40 steps, restarts 1." in text
    assert "Without defence: clean 98.4, attacked 12.0." in text
    assert "No candidate met the bound" in text
    assert "PGD, 50 steps, 1 random start, normalised ℓ₂, ε 0.05, 0.1, 0.2, 0.3" in text
    assert "16 s attacking, 49 s classifying" in text  # 2 threat models, 4 budgets, 2 s each


# -- the main table


def test_table_order_and_numbers() -> None:
    rows = table2(fake_results())
    assert [row.label for row in rows] == [
        "No defence",
        "Nearest neighbours, calibrated",
        "uniform",
        "CBW-E",
        "block1, avg",
        "block3, avg",
        "60 images",
        "150 images",
        "520 images",
    ]
    assert rows[0].gray.accuracy == pytest.approx(62 / 500)
    assert rows[1].gray.accuracy == pytest.approx(341 / 500)
    assert rows[1].black.ci == pytest.approx(wilson(401 / 500, 500))
    assert rows[0].clean.n == 500


def test_table_takes_the_worst_of_repeats_and_only_the_headline_attack() -> None:
    results = fake_results()
    results["records"] += [
        record("nearest-neighbor", "gray", 0.2, 300, seed=1),
        record("nearest-neighbor", "gray", 0.2, 1, attack="fgsm"),
        record("nearest-neighbor", "gray", 0.2, 1, norm="linf"),
        record("nearest-neighbor", "gray", 0.2, 1, dataset="another"),
    ]
    assert table2(results)[1].gray.accuracy == pytest.approx(300 / 500)


# -- the verdict and the checks


def test_verdict_when_the_defence_helps() -> None:
    assert verdict(fake_results()) == (
        "Under gray-box PGD at normalised ℓ₂ 0.2 the bare classifier gets 12.4 % of 500 images right; the "
        "nearest-neighbour defence gets 68.2 % right, at a cost of 1.0 points of clean accuracy (which may be chance, "
        "p = 0.062)."
    )


def test_verdict_asks_which_images_and_not_whether_intervals_overlap() -> None:
    # The same two accuracies: once the defence keeps all that the net has, once other images.
    text = verdict(with_gray(62, 74))
    assert "gets 14.8 % right, at a cost" in text
    results = with_gray(62, 74)
    results["records"][-1]["correct"] = to_hex(np.arange(500) >= 426)
    text = verdict(results)
    assert "14.8 %, which may be chance (p = 0.346): this run does not show that the defence helps" in text
    assert "; it costs 1.0 points of clean accuracy" in text


def test_verdict_when_the_defence_hurts() -> None:
    text = verdict(with_gray(300, 62))
    assert "here the defence hurts" in text
    assert "only 12.4 %" in text


def test_verdict_without_gray_box_speaks_of_black_box() -> None:
    results = without(fake_results(), lambda row: row["threat_model"] != "gray")
    assert verdict(results).startswith("Under black-box PGD")


def test_verdict_without_an_attack_claims_nothing() -> None:
    assert "does not show whether the defence helps" in verdict(only_clean(fake_results()))


@pytest.mark.parametrize(
    ("bare", "defended", "words"),
    [
        (490, 490, "at no cost in clean accuracy."),
        (490, 300, "at a cost of 38.0 points of clean accuracy."),
        (480, 483, "and 0.6 points more on clean images (which may be chance, p = 0.250)."),
    ],
)
def test_verdict_on_clean_accuracy(bare: int, defended: int, words: str) -> None:
    results = without(fake_results(), lambda row: row["threat_model"] != "clean")
    results["records"] += [record("none", "clean", 0, bare), record("nearest-neighbor", "clean", 0, defended)]
    assert verdict(results).endswith(words)


# -- the ladder and the audit


def informed(adaptive: int, white: int = 200) -> dict[str, Any]:
    """The run with attackers who know the database, at the headline budget; gray box leaves 341 of 500."""
    results = fake_results()
    results["records"] += [
        record("nearest-neighbor", "white", 0.2, white, knowledge="L3"),
        record("nearest-neighbor", "adaptive", 0.2, adaptive + 20, attack="push-pull", knowledge="L3"),
        record("nearest-neighbor", "adaptive", 0.2, adaptive, attack="adaptive", knowledge="L3", peak_memory_mb=512.0),
    ]
    results["records"] += worst_cases(results["records"])
    return results


def outcomes(**right: list[int]) -> dict[str, Any]:
    """A run at one budget with these images right of 500, by ``none_gray``, ``defended_adaptive`` and the like."""
    results = fake_results()
    results["records"] = []
    for name, which in right.items():
        defense, _, threat = name.partition("_")
        made = record(
            "none" if defense == "none" else "nearest-neighbor", threat, 0.2 * (threat != "clean"), len(which)
        )
        made["correct"] = to_hex(np.isin(np.arange(500), which))
        results["records"].append(made)
    results["records"] += worst_cases(results["records"])
    return results


def test_the_report_says_how_sure_the_answers_are_where_it_was_measured() -> None:
    results = informed(40)
    assert "How sure the answers are" not in report_html(results)
    results["records"][0] |= {"confidence": 0.9312, "confidence_wrong": None}
    results["records"][1] |= {"confidence": 0.8765, "confidence_wrong": 0.4321}
    text = report_html(results).partition("How sure the answers are")[2].partition("</table>")[0]
    assert re.findall(r"<td>([^<]*)</td>", text) == ["93.1", "", "87.6", "43.2"]


def test_ladder_goes_from_clean_to_worst_and_takes_the_strongest() -> None:
    rungs = {rung.name: rung for rung in ladder(informed(40))}
    assert list(rungs) == ["clean", "black", "gray", "white", "adaptive", "worst"]
    assert rungs["adaptive"].defended is not None
    assert rungs["adaptive"].defended["attack"] == "adaptive"
    assert rungs["adaptive"].bare is None
    # Of 62 images 22 are lost in the worst case, and none is won.
    assert rungs["worst"].p == pytest.approx(2 * 0.5**22)
    assert rungs["white"].p is None
    # Any gray-box attack counts here, not only the headline's.
    results = informed(40)
    results["records"].append(record("nearest-neighbor", "gray", 0.2, 300, attack="apgd"))
    found = {rung.name: rung for rung in ladder(results)}["gray"].defended
    assert found is not None
    assert found["attack"] == "apgd"
    assert [rung.name for rung in ladder(fake_results())] == ["clean", "black", "gray"]


def test_each_stands_beside_the_other_under_the_strongest_attack_on_it() -> None:
    assert side_by_side(fake_results()) == []
    results = informed(102, 120)
    results["records"] += [record("none", "gray", 0.2, 7, attack="autoattack")]
    found = [(label, attack, round(500 * row["accuracy"])) for label, attack, row in side_by_side(results)]
    assert found == [("no defence", "AutoAttack", 7), ("nearest neighbours", "adaptive", 102)]
    text = summary({**results, "audit": []})
    assert (
        "no defence under AutoAttack: 1.4 [0.7, 2.9] %\nnearest neighbours under adaptive: 20.4 [17.1, 24.2] %" in text
    )
    page = check_page(report_html(results))
    assert "Side by side: each under the attack that leaves it least" in page.text
    # Another defence that its own attacker takes stands there, too.
    own = [record("own", "gray", 0.2, 300), record("own", "white", 0.2, 90, attack="apgd-square")]
    results["records"] += [{**row, "variant": "defense"} for row in own]
    assert side_by_side(results)[2][:2] == ("own", "APGD-CE, APGD-T, Square")


def test_a_gain_that_the_informed_attacker_takes_is_called_obscurity() -> None:
    assert obscurity(fake_results()) == ""
    said = obscurity(informed(102, 120))
    assert said == (
        "Attackers who know the database leave the defence 20.4 %: of the 341 images that it gets right under the "
        "gray-box attack it loses 239, and wins 0 others. Each in its own worst case, it gets 40 images right that "
        "fall without it, and loses 0 that stand without it (p < 0.001). That is 14 % of its gain under the gray-box "
        "attack: the gain is mostly obscurity."
    )
    assert "98 % of its gain under the gray-box attack: the gain is not obscurity alone" in obscurity(
        informed(335, 340)
    )
    page = report_html(informed(102, 120))
    # The verdict above it has said what is left.
    assert obscurity(informed(102, 120), after=True).replace("<", "&lt;") in page.replace("p\u00a0=", "p =")
    assert "leave the defence" not in page
    assert "No attack here knows" not in page
    assert "worst case" in page
    assert "512\u00a0MB" in page or "512&nbsp;MB" in page
    assert "0.062" in page


def test_a_defence_that_is_worse_than_none_is_called_so() -> None:
    # 310 of 500 right without it, 333 with it under the gray box, and 293 once the attacker knows it.
    everything = [*range(500)]
    adaptive = [*range(280), *range(310, 323)]
    results = outcomes(
        none_clean=everything, defended_clean=everything[:322] + everything[323:], none_gray=everything[:310],
        defended_gray=[*adaptive, *range(400, 440)], defended_adaptive=adaptive,
    )  # fmt: skip
    said = obscurity(results)
    assert said.startswith("Attackers who know the database leave the defence 58.6 %: of the 333 images")
    assert "it loses 40, and wins 0 others" in said
    assert "it gets 12 images right that fall without it, and loses 30 that stand without it (p = 0.008)" in said
    assert said.endswith(": it is worse than no defence.")
    assert verdict(results).endswith("it gets 58.6 %, and is worse than no defence.")
    assert said in summary({**results, "audit": []})
    # The two intervals overlap, which says nothing of that.
    low = next(r["ci_low"] for r in results["records"] if (r["defense"], r["threat_model"]) == ("none", "gray"))
    assert next(r["ci_high"] for r in results["records"] if r["threat_model"] == "adaptive") > low


def test_a_gain_that_chance_explains_is_no_gain() -> None:
    adaptive = [*range(8, 300), *range(310, 316)]
    some = {"none_clean": [*range(500)], "none_gray": [*range(300)], "defended_clean": [*range(500)]}
    said = obscurity(outcomes(**some, defended_gray=[*range(333)], defended_adaptive=adaptive))
    assert "it gets 6 images right that fall without it, and loses 8 that stand without it (p = 0.791)" in said
    assert said.endswith(
        "no gain is left that this run can show, and what it gains under the gray-box attack is obscurity."
    )
    nothing = obscurity(outcomes(**some, defended_gray=[*range(301)], defended_adaptive=[*range(299)]))
    assert nothing.endswith("no gain is left that this run can show.")
    # Nobody ignored the defence: there is no gain that could have been obscurity, and the page says what there is.
    results = outcomes(none_clean=[*range(500)], defended_clean=[*range(500)], defended_adaptive=adaptive)
    assert obscurity(results) == ""
    page = report_html(results)
    assert "None of the attacks knows" not in page
    assert 'href="#ladder"' in page


def test_audit_is_shown_line_by_line() -> None:
    results = fake_results()
    results["audit"] = [
        {"name": "budget", "passed": True, "text": "within 1e-6"},
        {"name": "random noise", "passed": False, "text": "noise <breaks> 3"},
        {"name": "more steps", "passed": None, "text": "not run"},
    ]
    page = report_html(results)
    for word in ("holds", "fails", "not known", "noise &lt;breaks&gt; 3", "random noise."):
        assert word in page


# -- figures


def test_figures_hold_every_point() -> None:
    results = fake_results()
    eps = ET.fromstring(accuracy_vs_eps(results))
    assert len(eps.findall(".//use/title")) == 4 * 5
    rows = ET.fromstring(accuracy_vs_rows(results))
    assert len(rows.findall(".//use/title")) == 3 * 4
    assert "defended, gray: 68.2 % (64.0 to 72.1)" in {title.text for title in eps.iter("title")}
    text = " ".join(rows.itertext())
    assert "bare, gray" in text
    assert "defended, black" in text


def test_any_name_of_a_defence_can_be_drawn() -> None:
    results = fake_results()
    name = 'own & <b> "$x_$" $\\no$'
    for eps, right in ((0, 400), (0.2, 200)):
        threat_model = "gray" if eps else "clean"
        results["records"].append(record(name, threat_model, eps, right, variant="defense"))
    drawn = ET.fromstring(accuracy_vs_eps(results, others=True))
    assert [title.text for title in drawn.iter("title")][-2:] == [
        f"{name}, gray: 80.0 % (76.3 to 83.3)",
        f"{name}, gray: 40.0 % (35.8 to 44.4)",
    ]
    assert f"{name}, gray" in {text.text for text in drawn.iter("text")}


def test_figures_that_cannot_be_drawn_are_empty() -> None:
    assert accuracy_vs_rows(remove_sizes(fake_results())) == ""
    assert accuracy_vs_eps(only_clean(fake_results())) == ""


def test_figure_names_raw_units() -> None:
    assert "mean ℓ₂ radius" in accuracy_vs_eps(fake_results())
    assert "1/255" in accuracy_vs_eps(linf(fake_results()))


def test_figure_ids_can_be_kept_apart() -> None:
    results = fake_results()
    assert 'id="two-title"' in accuracy_vs_eps(results, uid="two")


@given(
    st.floats(-1e6, 1e6),
    st.floats(1e-6, 1e6),
    st.integers(1, 12),
)
def test_ticks_are_round_even_and_inside(low: float, width: float, count: int) -> None:
    high = low + width
    if not low < high or width < 1e-9 * max(abs(low), abs(high)):
        return
    ticks = nice_ticks(low, high, count)
    assert len(ticks) <= count + 1
    assert all(low <= tick <= high for tick in ticks)
    assert ticks == sorted(ticks)
    steps = np.diff(ticks)
    assert steps.size == 0 or np.allclose(steps, steps[0], rtol=1e-3)
    if count >= 3:
        assert ticks


@given(st.floats(1e-3, 1e9), st.floats(1.0001, 1e9), st.integers(1, 8))
def test_log_ticks_are_inside_and_few(low: float, ratio: float, count: int) -> None:
    high = low * ratio
    ticks = log_ticks(low, high, count)
    assert len(ticks) <= count
    assert ticks == sorted(set(ticks))
    assert all(low * (1 - 1e-8) <= tick <= high * (1 + 1e-8) for tick in ticks)


def test_ticks_of_common_axes() -> None:
    assert nice_ticks(0, 0.3) == [0.0, 0.1, 0.2, 0.3]
    assert nice_ticks(0, 0.06) == [0.0, 0.02, 0.04, 0.06]
    assert log_ticks(60, 1037, 5) == [100.0, 200.0, 500.0, 1000.0]
    with pytest.raises(ValueError, match="ascending"):
        nice_ticks(1, 1)
    with pytest.raises(ValueError, match="positive"):
        log_ticks(0, 1)


@given(st.lists(st.floats(0, 300), max_size=8))
def test_labels_do_not_collide(targets: list[float]) -> None:
    places = spread(targets, gap=31, low=20, high=280)
    order = np.argsort(targets, kind="stable")
    ordered = np.asarray(places)[order]
    assert all(19.9 <= place <= 280.1 for place in places)
    assert np.all(np.diff(ordered) >= min(31, 260 / max(1, len(targets) - 1)) - 1e-6)


# -- gallery


@pytest.mark.parametrize(("side", "channels"), [(None, 1), (32, 3), (224, 3)])
def test_ten_rows_of_pictures_stay_small(side: int | None, channels: int) -> None:
    html = report_html(fake_results(), fake_gallery(10, side=side, channels=channels))
    page = check_page(html)
    assert len(html.encode()) < 1_500_000
    assert ("image/jpeg" in html) == (side == 224)
    assert ('class="crisp"' in html) == (side != 224)
    assert "no picture" in page.text


def test_gallery_marks_right_and_wrong_in_words() -> None:
    page = check_page(report_html(fake_results(), fake_gallery(4)))
    assert "✓ right" in page.text
    assert "✗ wrong" in page.text
    assert "the defence mends 3, fails together with the bare classifier on 1" in page.text


def test_gallery_row_without_neighbours_or_change() -> None:
    row = fake_gallery(1)[0]
    same = GalleryRow(**{**row.__dict__, "attacked": row.clean, "neighbors": ()})
    black = GalleryRow(**{**row.__dict__, "clean": 0 * row.clean, "attacked": 0 * row.clean})
    assert amplification([same]) == 1
    assert "no neighbours at hand" in check_page(report_html(fake_results(), [same, black])).text


def test_amplification_is_round_and_common() -> None:
    clean = np.full((1, 8, 8), 0.5, np.float32)
    rows = [
        GalleryRow(**{**fake_gallery(1)[0].__dict__, "clean": clean, "attacked": clean + change})
        for change in (0.01, 0.04)
    ]
    assert amplification(rows) == 10


def test_small_pictures_keep_their_pixels() -> None:
    markup = picture(np.zeros((3, 28, 28), np.float32), "a", display=104)
    assert 'width="112"' in markup
    assert "image/png" in markup
    with pytest.raises(InputError, match="C x H x W"):
        picture(np.zeros((28, 28), np.float32), "a", display=104)


def test_rows_that_the_defence_holds_stand_beside_those_where_it_falls() -> None:
    drawn, held = fake_gallery(4), fake_gallery(2)
    page = report_html(fake_results(), [*(replace(row, threat_model="adaptive") for row in drawn), *held])
    assert "Of these 4 images" in page
    assert "And 2 of these images under the gray-box attack" in page
    assert page.index("adaptive, ε 0.2") < page.index("And 2 of these images") < page.index("gray box, ε 0.2")
    alone = report_html(fake_results(), drawn)
    assert "Of these 4 images" in alone
    assert "chosen because" not in alone


def test_the_attacks_of_a_run_are_those_that_were_run() -> None:
    results = informed(102, 120)
    page = report_html(results)
    listed = page[page.index("<dt>Attacks</dt>") :].partition("</div>")[0]
    worst = {row["attack"] for row in results["records"] if row["threat_model"] == "worst"}
    assert worst
    assert not any(f">{name}," in listed for name in worst)
    for name in ("gray box", "worst case"):
        assert f'<th scope="row">{name}</th>' in page


@pytest.mark.parametrize("scheme", [pytest.param("light", marks=pytest.mark.slow), "dark"])
def test_reports_fit_every_screen_and_can_be_read(tmp_path: Path, scheme: str) -> None:
    results = json.loads((Path(__file__).parent.parent / "docs/results/table2-digits.json").read_text())
    pages = {"evaluation": report_html(informed(102, 120), fake_gallery(4)), "comparison": page_of(results)}
    with chromium() as browser:
        for name, content in pages.items():
            place = tmp_path / f"{name}.html"
            place.write_text(content)
            with visit(browser, place.as_uri(), 1280, 800, color_scheme=scheme) as page:
                assert faint(page) == []
                for width in (1280, 768, 390):
                    page.set_viewport_size({"width": width, "height": 800})
                    assert sideways(page) == 0
                    # The tables that say what was found are not cut off either.
                    assert (
                        page.evaluate(
                            """() => [...document.querySelectorAll(".scroll:has(.stacked), .scroll:has(.main), figure")]
                        .filter((e) => e.checkVisibility() && e.scrollWidth > e.clientWidth + 1)
                        .map((e) => e.outerHTML.slice(0, 90))"""
                        )
                        == []
                    )
