"""How commands declare their options: records, choices that are asked for, lists given several times; and the help."""

from __future__ import annotations

import contextlib
import io
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import pytest
import typer
from command import fails, nndefense
from typer.testing import CliRunner

import nndefense as package
from nndefense.cli.app import build
from nndefense.cli.declare import Commas, Group, OneOf, Only, spread
from nndefense.cli.options import Common

SAID: list[Any] = []
WORDS = ["mild", "strong"]


def words() -> list[str]:
    return WORDS


@dataclass(frozen=True, kw_only=True)
class Place:
    """A record with a field that must be given, and with every kind of option."""

    name: Annotated[str, typer.Option(help="Of the place [default: none].")]
    kind: Annotated[str, OneOf("What kind.", words, python=True)] = "mild"
    sizes: Annotated[str | None, Commas("Sizes, with commas.")] = None
    far: Annotated[int, typer.Option(min=0)] = 3


FAR = Place(name="there", far=9)


def records_first(
    place: Place,
    count: Annotated[int, typer.Argument()] = 1,
    eps: Annotated[str, Commas("Budgets.")] = "1,2",
    *,
    common: Annotated[Common, Only("json", "debug")],
) -> None:
    """Do it."""
    SAID.append((place, count, eps, common))


@dataclass(frozen=True, kw_only=True)
class Coloured(Common):
    """A record of a record."""

    colour: str = "red"


def records_last(
    count: Annotated[int, typer.Argument()],
    *,
    place: Place = FAR,
    coloured: Annotated[Coloured, Only("seed", "colour")],
) -> None:
    SAID.append((count, place, coloured))


def plain(text: str) -> str:
    """Text without the frames and line breaks of its table."""
    return " ".join(text.replace("│", "").split())


def run(function: Any, *words: str) -> Any:
    app = typer.Typer(rich_markup_mode="markdown")
    app.command()(spread(function))
    done = CliRunner().invoke(app, words)
    return SAID.pop() if done.exit_code == 0 and SAID else done


def test_the_command_gets_records_and_typer_their_fields() -> None:
    assert run(records_first, "--name", "x") == (Place(name="x"), 1, "1,2", Common())
    said = run(records_first, "7", "--name", "x", "--kind", "strong", "--sizes", "3", "--far", "0", "--json")
    assert said == (Place(name="x", kind="strong", sizes="3", far=0), 7, "1,2", Common(json=True))
    # Only the fields that are named are options.
    assert "No such option" in run(records_first, "--name", "x", "--seed", "1").output
    assert run(records_first).exit_code == 2
    assert run(records_first, "--name", "x", "--far", "-1").exit_code == 2


def test_a_default_of_the_command_stands_before_those_of_the_record() -> None:
    assert run(records_last, "2") == (2, FAR, Coloured())
    said = run(records_last, "2", "--far", "1", "--colour", "blue", "--seed", "4")
    assert said == (2, Place(name="there", far=1), Coloured(colour="blue", seed=4))


def test_lists_may_be_given_several_times() -> None:
    assert run(records_first, "--name", "x", "--eps", "1,8/255", "--eps", "3")[2] == "1,8/255,3"
    assert run(records_first, "--name", "x", "--sizes", "a", "--sizes", "b,c")[0].sizes == "a,b,c"
    table = ("evaluate", "table2", "--dataset", "digits")
    fails(2, "--only names magic, sorcery", *table, "--only", "magic", "--only", "none,sorcery")
    # Said and empty is not the default.
    assert run(records_first, "--name", "x", "--eps", "")[2] == ""


@dataclass(frozen=True, kw_only=True)
class Files:
    """A record with files."""

    database: Path | None = None


def with_files(
    images: Annotated[list[Path], typer.Argument()],
    *,
    out: Annotated[Path, typer.Option()] = Path("~/of the default"),
    files: Files,
    word: str = "~/no path",
) -> None:
    SAID.append((images, out, files, word))


def test_paths_begin_at_home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    # Shells expand neither --out=~/x nor what is quoted.
    monkeypatch.setenv("HOME", str(tmp_path))
    said = run(with_files, "~/a.png", "b/~/c.png", "--database=~/db")
    assert said == (
        [tmp_path / "a.png", Path("b/~/c.png")],
        tmp_path / "of the default",
        Files(database=tmp_path / "db"),
        "~/no path",
    )
    assert run(with_files, "~", "--out=~")[:2] == ([tmp_path], tmp_path)
    stranger = run(with_files, "a.png", "--out=~nobody-of-this-name/x")
    assert "a user who is not known here" in str(stranger.exception)


def test_a_command_writes_at_home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    home, here = tmp_path / "home", tmp_path / "here"
    home.mkdir()
    here.mkdir()
    (home / "mine.py").write_text(
        "import torch\ndef net():\n    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10))"
    )
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(here)
    net = ("--classifier=python:~/mine.py:net", "--input-shape=1,8,8")
    done = nndefense("attack", "--dataset=digits:test[:4]", *net, "--steps=1", "--eps=0.1", "--out=~/a.h5", "--json")
    assert done.json["n"] == 4
    assert (home / "a.h5").exists()
    assert nndefense("train", "--dataset=digits[:20]", "--epochs=1", "--out=~/net", "--quiet").code == 0
    assert (home / "net").is_dir()
    assert list(here.iterdir()) == []


def test_choices_are_asked_for_when_the_command_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = run(records_first, "--name", "x", "--kind", "late")
    assert wrong.exit_code == 2
    assert "'late' is not one of 'mild', 'strong', 'python:FILE:NAME'" in plain(wrong.output)
    assert run(records_first, "--name", "x", "--kind", "python:mine.py:f")[0].kind == "python:mine.py:f"
    monkeypatch.setattr(sys.modules[__name__], "WORDS", [*WORDS, "late"])
    assert run(records_first, "--name", "x", "--kind", "late")[0].kind == "late"
    assert "late" in run(records_first, "--help").output


def test_help_shows_what_stands_in_brackets() -> None:
    assert "[default: none]" in plain(run(records_first, "--help").output)
    assert "[default: any]" in plain(nndefense("index", "build", "--help").out)


def leaves(found: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Every command with the words that call it."""
    for name, command in getattr(found, "commands", {}).items():
        yield from leaves(command, (*path, name))
    if not hasattr(found, "commands"):
        yield path, found


def shown_default(option: Any) -> str | None:
    """What the help of an option must say of its default: nothing where there is none, or of a flag that is off."""
    if option.default is None or option.required:
        return None
    if isinstance(option.default, bool):
        # Of two flags the one that holds is named.
        pair = {True: option.opts[0], False: [*option.secondary_opts, ""][0]}
        return pair[option.default].lstrip("-") or None
    several = isinstance(option.default, list | tuple)
    return ", ".join(map(str, option.default)) if several else str(option.default)


# As a table, and as the list that narrow consoles get: a pipe is one of 80.
@pytest.mark.parametrize("columns", [80, 300])
def test_the_help_of_every_command_shows_all_that_is_declared(columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    whole, missing, defaults = typer.main.get_command(build()), [], 0
    for path, command in leaves(whole):
        with contextlib.redirect_stdout(io.StringIO()) as out:
            whole.main([*path, "--help"], "nndefense", standalone_mode=False)
        # A line may end behind a hyphen.
        text = plain(out.getvalue()).replace("- ", "-")
        for option in command.params:
            wanted = plain(option.help or "").replace("`", "").replace("- ", "-")
            default = shown_default(option)
            defaults += "[default: " in wanted or default is not None
            pieces = [wanted, *([] if default is None else [f"[default: {default}".replace("- ", "-")])]
            missing += [(*path, option.opts[0], piece) for piece in pieces if piece not in text]
        assert "…" not in text, path
        assert not re.search(r"\w [.,;:](\s|$)|\(\s*\)|\[\s*\]", text), path
    assert not missing
    assert defaults > 250


def test_help_that_loses_a_default_would_be_seen() -> None:
    # Rich's markup takes what stands in brackets for a style.
    app = typer.Typer(rich_markup_mode="rich")
    app.command()(spread(records_first))
    assert "Of the place ." in plain(CliRunner().invoke(app, ["--help"], env={"COLUMNS": "300"}).output)


def test_a_group() -> None:
    group = Group("places", "Of places.")

    @group.command("one")
    @group.command("two", "Another help.")
    def one(*, common: Annotated[Common, Only("json")]) -> None:
        """The help."""
        SAID.append(common)

    app = typer.Typer()
    app.add_typer(group.typer(), name=group.name)
    assert CliRunner().invoke(app, ["places", "two", "--json"]).exit_code == 0
    assert SAID.pop() == Common(json=True)
    shown = CliRunner().invoke(app, ["places", "--help"]).output
    assert "The help." in shown
    assert "Another help." in shown


# -- the whole command ------------------------------------------------------------------------------------------------


def test_version_and_short_help() -> None:
    assert nndefense("--version").out == f"nndefense {package.__version__}\n"
    for words in ([], ["train"], ["index"], ["index", "build"]):
        assert nndefense(*words, "-h").out == nndefense(*words, "--help").out != ""


def test_help_has_four_groups() -> None:
    text = nndefense("--help").out
    places = [text.index(title) for title in ("Use it", "Measure", "Train", "Learn")]
    assert places == sorted(places)
    use, measure, train, learn = (text[a:b] for a, b in zip(places, [*places[1:], None], strict=True))
    for panel, names in (
        (use, ("demo", "index", "calibrate", "classify", "guard", "serve")),
        (measure, ("evaluate", "certify", "attack", "reproduce", "rp2")),
        (train, ("train", "pseudo-label", "racnn")),
        (learn, ("theory",)),
    ):
        assert all(f"│ {name} " in panel for name in names)


def test_shell_completion(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "--show-completion" in nndefense("--help").out
    assert "--show-completion" not in nndefense("train", "--help").out
    monkeypatch.setenv("_NNDEFENSE_COMPLETE", "complete_bash")
    monkeypatch.setenv("COMP_WORDS", "nndefense train --norm l")
    monkeypatch.setenv("COMP_CWORD", "3")
    assert nndefense().out.split() == ["linf", "l2"]


def test_a_wrong_choice_is_told_in_one_line() -> None:
    fails(2, "'l0' is not one of 'linf', 'l2', 'normalized-l2'", "train", "--norm", "l0")


def test_every_command_can_be_made() -> None:
    # Each can be quiet, and has a way to show an error's traceback, and none has an option twice.
    for path, command in leaves(typer.main.get_command(build())):
        flags = [flag for option in command.params for flag in option.opts]
        assert len(flags) == len(set(flags)), path
        assert {"--debug", "--quiet"} <= set(flags), path
