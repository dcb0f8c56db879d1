"""Every figure from a paper that a recipe names, held against one list of them: value, source, setting."""

from __future__ import annotations

from pathlib import Path

import pytest

from nndefense.experiments import recipe_names, shipped_recipe

LIST = Path(__file__).parent / "published.tsv"


def listed() -> dict[str, list[dict[str, str]]]:
    """By recipe: method, threat, figures in percent, the objective it was trained by, setting and source."""
    head, *lines = (line.split("\t") for line in LIST.read_text(encoding="utf-8").splitlines())
    found: dict[str, list[dict[str, str]]] = {}
    for line in lines:
        figure = dict(zip(head, line, strict=True))
        found.setdefault(figure.pop("recipe"), []).append(figure)
    return found


@pytest.mark.parametrize("scale", ["full", "small"])
def test_recipes_name_the_figures_of_their_sources_and_no_others(scale: str) -> None:
    figures = listed()
    for name in recipe_names():
        recipe = shipped_recipe(name, scale)
        objectives = {method.name: method.objective for method in recipe.methods}
        named = [
            {
                "method": one.method,
                "threat": one.threat,
                **{
                    kind: "" if getattr(one, kind) is None else f"{getattr(one, kind):g}"
                    for kind in ("standard", "robust", "error", "confidence")
                },
                "setting": one.setting or recipe.published_setting,
                "source": one.source or recipe.published_source,
            }
            for one in recipe.published
        ]
        wanted = [{key: value for key, value in one.items() if key != "trained by"} for one in figures.get(name, [])]
        # Figures of a recipe's full scale alone are for that scale.
        if named or scale == "full":
            assert named == wanted, name
        assert all(one["source"] and one["setting"] for one in named), name
        # A figure stands for a method only if that trains as the source's net was trained.
        for one in figures.get(name, []) if named else []:
            assert one["method"] in ("", *objectives), name
            assert not one["method"] or objectives[one["method"]] == one["trained by"], (name, one["method"])


def test_every_listed_figure_is_of_a_recipe() -> None:
    assert set(listed()) <= set(recipe_names())


def test_the_dilemma_is_what_the_slides_print() -> None:
    first = listed()["trades-cifar10"][:3]
    assert [(row["method"], row["standard"], row["robust"]) for row in first] == [
        ("standard", "95.2", "0"), ("robust", "87.3", "45.8"), ("trades", "84.8", "55.4"),
    ]  # fmt: skip
    assert all("slides" in row["source"] for row in first)


def test_one_net_has_one_figure_for_one_setting_in_every_recipe() -> None:
    seen: dict[tuple[str, ...], tuple[str, ...]] = {}
    for rows in listed().values():
        for row in rows:
            whose = (row["trained by"], row["threat"], row["setting"], row["source"])
            figures = tuple(row[kind] for kind in ("standard", "robust", "error", "confidence"))
            # Of one objective the rotations train two nets, which differ in their draws.
            assert row["trained by"] == "rst-at" or seen.setdefault(whose, figures) == figures, whose
