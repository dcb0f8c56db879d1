"""What every report is made of: the frame, the table in its three forms, figures on a page, and typed recipes."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import pytest
from matplotlib.figure import Figure

from nndefense import recipes
from nndefense.errors import InputError
from nndefense.reporting import (
    Cell,
    Table,
    charts,
    facts_list,
    fingerprint,
    folded,
    inline,
    limits_list,
    page,
    paragraphs,
    picture,
    section,
)
from nndefense.reporting.wording import budget, p_text, percent, percent_in, rough

TABLE = Table(
    ("defence", Cell("time", "s"), "gray", "black"),
    (
        ("none & <b>", "1", Cell("18.4", "15.2–22.0", below="PGD"), Cell(reason="no surrogate")),
        ("ours", "12", Cell(reason="not run"), Cell(reason="not run")),
    ),
    title="What holds",
    note="In percent.",
    kinds=("", "chosen"),
)


def test_a_table_on_a_page() -> None:
    html = TABLE.html("plain dense", "Of <all>")
    root = ET.fromstring(html.replace("<br>", "<br/>"))
    head, *rows = root.iter("tr")
    assert ["".join(cell.itertext()) for cell in head] == ["defence", "time s", "gray", "black"]
    assert [["".join(cell.itertext()) for cell in row] for row in rows] == [
        ["none & <b>", "1", "18.4 15.2–22.0PGD", "no surrogate"],
        # One reason is said once.
        ["ours", "12", "not run"],
    ]
    assert rows[1].get("class") == "chosen"
    assert [cell.get("colspan") for cell in rows[1]] == [None, None, "2"]
    assert root.find(".//table").get("class") == "plain dense"  # type: ignore[union-attr]
    assert root.findtext(".//caption/span") == "Of <all>"


def test_a_row_of_one_cell_is_a_heading() -> None:
    html = Table(("", "a"), (("Others",), ("x", "1")), kinds=("", "")).html()
    assert '<tr class="group"><th colspan="2" scope="colgroup">Others</th></tr>' in html
    assert html.startswith('<div class="scroll"><table class="plain"><thead><tr><td></td><th scope="col">a</th>')
    table = Table(("", "a|b"), (("Others",), ("x|y", "1")))
    assert table.markdown() == "|  | a\\|b |\n| --- | --: |\n| Others |  |\n| x\\|y | 1 |\n"
    assert table.text() == "        a|b\nOthers\nx|y       1"


def test_a_table_in_markdown_and_in_a_terminal() -> None:
    assert TABLE.markdown() == (
        "**What holds**\n\n| defence | time (s) | gray | black |\n| --- | --: | --: | --: |\n"
        "| none & <b> | 1 | 18.4 (15.2–22.0) | – (no surrogate) |\n| ours | 12 | – (not run) | – (not run) |\n\n"
        "In percent.\n"
    )
    lines = TABLE.text().splitlines()
    assert lines[0] == "What holds"
    assert len({len(line) for line in lines[1:]}) == 1
    assert lines[2].startswith("none & <b>         1  ")
    assert TABLE.first(1).rows + TABLE.after(1).rows == TABLE.rows
    assert TABLE.after(1).kinds == ("chosen",)


def test_a_page_is_whole_and_leaves_out_what_is_empty() -> None:
    html = page("A & B", [section("One", paragraphs("x <y>\nz\n\nw"), "one"), section("Two", ""), folded("More", "")],
                facts=("5 images", "<today>"))  # fmt: skip
    assert "<title>A &amp; B</title>" in html
    assert "<p>x &lt;y&gt; z</p><p>w</p>" in html
    assert '<section id="one">' in html
    assert "&lt;today&gt;" in html
    for absent in ("Two", "More", "<script", "http:", "https:"):
        assert absent not in html
    assert facts_list([("a", "1"), ("b", "")]).count("<dt>") == 1
    assert "<b>Few.</b> Only <3>.".replace("<3>", "&lt;3&gt;") in limits_list([("Few.", "Only <3>.")])


def drawn() -> Figure:
    figure, (axes,) = charts.panels(1)
    charts.curve(axes, [1, 2], [(0.5, 0.4, 0.7), (0.25, 0.25, 0.5)], 0, "ours")
    axes.plot([1, 2], [10, 20], "o", color=charts.DEFENDED, gid="marks")
    return figure


def test_a_figure_on_a_page_follows_it_and_clashes_with_nothing() -> None:
    first, second = (inline(drawn(), "T <1>", "D", name=name, tips={"marks": ["a & b", "c"]}) for name in ("x", "y"))
    ids = [set(re.findall(r' id="([^"]*)"', svg)) for svg in (first, second)]
    assert ids[0]
    assert not ids[0] & ids[1]
    root = ET.fromstring(first)
    assert [use.findtext("title") for use in root.iter("use") if use.find("title") is not None] == ["a & b", "c"]
    assert root.findtext("title") == "T <1>"
    assert all(use.get("href", "#")[1:] in ids[0] for use in root.iter("use"))
    for word in ("var(--defended)", "currentColor", "var(--sans)"):
        assert word in first
    for word in ("url(", "http", charts.DEFENDED, "#000000", "clip-path", "DejaVu"):
        assert word not in first
    # The points of the curve stand where they were measured: 50 % and 25 %.
    assert charts.reaches([(0.5, 0.4, 0.7)]) == [[pytest.approx(10)], [pytest.approx(20)]]


@pytest.mark.parametrize("kind", ["png", "svg"])
def test_the_same_figure_gives_the_same_bytes(kind: str) -> None:
    assert picture(drawn(), kind) == picture(drawn(), kind)


def test_words() -> None:
    assert (percent(0.1236), percent(None), percent(0.97371, 2)) == ("12.4", "–", "97.37")
    assert percent_in(0.99, 0.9, 1.2) == "99.00 [90.00, 100.00]"
    assert (p_text(0.0654), p_text(0.0004), p_text(0.0, 1e-300), p_text(3.2e-15, 1e-300)) == (
        "0.065", "< 0.001", "< 1e-300", "3.2e-15",
    )  # fmt: skip
    assert (budget("linf", "8/255"), budget("normalized-l2", 0.06)) == ("ℓ∞ 8/255", "normalised ℓ₂ 0.06")
    assert rough(1637.2) == "1,600"


# -- typed recipes


@dataclass(frozen=True)
class Part:
    name: str
    eps: tuple[float, ...] = ()


@dataclass(frozen=True)
class Whole:
    parts: tuple[Part, ...] = field(metadata=recipes.at("part"))
    size: tuple[int, int] = (1, 2)
    kind: Literal["round", "square"] = "round"
    limit: int | None = field(default=None, metadata=recipes.at("data.limit"))
    lr: float = 0.5
    more: Mapping[str, Any] = field(default_factory=dict)
    on: bool = False

    def __post_init__(self) -> None:
        recipes.check_least(self, 1, "limit")


def test_a_recipe_becomes_what_its_fields_say() -> None:
    values = {
        "part": [{"name": "a", "eps": ["8/255", 1]}, {"name": "b", "eps": 0.5}],
        "size": [3, 4], "kind": "square", "data": {"limit": 5}, "lr": 1, "more": {"x": {"y": 1}}, "on": True,
    }  # fmt: skip
    made = recipes.build(Whole, values)
    assert made == Whole(
        (Part("a", (8 / 255, 1.0)), Part("b", (0.5,))), (3, 4), "square", 5, 1.0, {"x": {"y": 1}}, True
    )
    assert recipes.entries(Whole, {"lr": "1/2"}) == {"lr": 0.5}
    assert recipes.build(Part, {}, given={"name": "c"}) == Part("c")
    assert recipes.identity({"b": 1, "a": 2}) == recipes.identity({"a": 2, "b": 1})


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, "needs part"),
        ({"part": [{}]}, "needs part.name"),
        ({"part": [{"name": 3}]}, "part.name is 3, but must be text"),
        ({"part": [{"name": "a", "eps": ["1/0"]}]}, "part.eps is '1/0', but must be a number or a quotient"),
        ({"part": [3]}, "part is 3, but must be a table"),
        ({"part": [], "colour": 1}, "no entry colour: choose from part, size"),
        ({"part": [], "data": {"limits": 1}}, "no entry data.limits"),
        ({"part": [], "data.limit": 7}, 'no entry "data.limit"'),
        ({"part": [{"name": "a", "eps.x": 7}]}, 'no entry part."eps.x"'),
        ({"part": [], "data": 3}, "data is 3, but must be a table"),
        ({"part": [], "data": {"limit": True}}, "data.limit is True, but must be a whole number"),
        ({"part": [], "data": {"limit": 0}}, "limit is 0, but must be at least 1"),
        ({"part": [], "size": [1]}, "size is \\[1\\], but must be a list of 2"),
        ({"part": [], "kind": "oval"}, "kind is 'oval', but must be one of round, square"),
        ({"part": [], "lr": False}, "lr is False, but must be a number"),
        ({"part": [], "on": 1}, "on is 1, but must be true or false"),
        ({"part": [], "more": 1}, "more is 1, but must be a table"),
    ],
)
def test_an_entry_that_cannot_be_is_named(values: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        recipes.build(Whole, values)


def test_rows_of_a_stacked_table_carry_their_headings() -> None:
    table = Table(("", "a<b", "c"), (("one", "1", Cell(reason="none")), ("two", Cell(reason="no"), Cell(reason="no"))))
    assert "data-head" not in table.html()
    html = table.html("plain stacked")
    assert '<td data-head="a&lt;b">1</td><td class="blank" data-head="c">' in html
    assert '<td class="blank" colspan="2" data-head="a&lt;b"><small>no</small></td>' in html


def test_a_fingerprint_is_short_until_it_is_asked_for() -> None:
    assert fingerprint(None) == fingerprint("") == ""
    assert fingerprint("abc") == "<code>abc</code>"
    html = fingerprint("sha256:" + "0123456789abcdef" * 4)
    assert "<summary><code>0123456789ab</code></summary>" in html
    assert html.count("0123456789abcdef" * 4) == 1
    assert "<b>" not in fingerprint("<b>" * 40)
