"""Every figure from a paper that a recipe names, held against one list of them: value, source, setting."""

from __future__ import annotations

from pathlib import Path

import pytest

from nndefense.experiments import recipe_names, shipped_recipe

LIST = Path(__file__).parent / "published.tsv"


def listed() -> dict[str, list[tuple[str, ...]]]:
    """By recipe: method, threat, standard and robust accuracy in percent, source with its net and data."""
    found: dict[str, list[tuple[str, ...]]] = {}
    for line in LIST.read_text(encoding="utf-8").splitlines()[1:]:
        recipe, *rest = line.split("\t")
        found.setdefault(recipe, []).append(tuple(rest))
    return found


@pytest.mark.parametrize("scale", ["full", "small"])
def test_recipes_name_the_figures_of_their_sources_and_no_others(scale: str) -> None:
    figures = listed()
    for name in recipe_names():
        recipe = shipped_recipe(name, scale)
        named = [
            (
                one.method, one.threat,
                *("" if value is None else f"{value:g}" for value in (one.standard, one.robust)),
                one.source or recipe.published_source,
            )
            for one in recipe.published
        ]  # fmt: skip
        # Figures of a recipe's full scale alone are for that scale.
        if named or scale == "full":
            assert named == figures.get(name, []), name
        assert all(source for *_, source in named), name


def test_the_dilemma_is_what_the_slides_print() -> None:
    first = listed()["trades-cifar10"][:3]
    assert [row[:4] for row in first] == [
        ("standard", "", "95.2", "0"), ("robust", "", "87.3", "45.8"), ("trades", "", "84.8", "55.4"),
    ]  # fmt: skip
    assert all("slides" in row[4] for row in first)
