"""How far a job is: lines a minute apart where there is no terminal, nothing where it is to be quiet."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from nndefense import bars, experiments
from nndefense.cli.options import Common
from nndefense.cli.reproduce import reproduce
from nndefense.experiments import ExperimentRecipe

REPOSITORY = Path(__file__).resolve().parent.parent


def test_without_a_terminal_a_short_job_says_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    assert list(bars.progress_bar(range(500), desc="working")) == list(range(500))
    assert capsys.readouterr().err == ""


def test_without_a_terminal_a_long_job_prints_whole_lines(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bars, "MINUTE", 0.0)
    list(bars.progress_bar(range(3), desc="working", unit=" images"))
    shown = capsys.readouterr().err
    assert "\r" not in shown
    assert all(line.startswith("working: ") for line in shown.splitlines())
    assert "3/3" in shown.splitlines()[-1]
    list(bars.progress_bar(range(3), desc="working", shown=False))
    assert capsys.readouterr().err == ""


def test_without_a_terminal_a_new_figure_is_no_new_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bars, "MINUTE", 0.05)
    with bars.progress_bar(total=100, desc="working") as bar:
        for number in range(100):
            bar.update()
            bar.set_postfix_str(f"loss {number}")
            time.sleep(0.002)
    shown = capsys.readouterr().err.splitlines()
    assert 1 <= len(shown) <= 10
    assert "loss" in shown[-1]


def test_on_a_terminal_it_is_a_bar(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    list(bars.progress_bar(range(3), desc="working", delay=0))
    assert "\rworking: 100%" in capsys.readouterr().err


def test_every_bar_is_one_of_these() -> None:
    sources = [*(REPOSITORY / "nndefense").rglob("*.py"), *(REPOSITORY / "index_build").rglob("*.py")]
    makers = {path.name for path in sources if "tqdm(" in path.read_text(encoding="utf-8")}
    assert makers == {"bars.py"}


def test_without_a_gpu_the_small_scale_is_taken_and_said(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Taken(Exception):
        pass

    def taken(recipe: ExperimentRecipe, *_: object, **__: object) -> None:
        raise Taken(recipe.scale)

    monkeypatch.setattr(experiments, "open_images", lambda *_: None)
    monkeypatch.setattr(experiments, "run", taken)
    for quiet, said in ((False, "there is no GPU here, so the small scale is taken; --scale full has"), (True, "")):
        with pytest.raises(Taken, match="small"):
            reproduce(name="madry-mnist", common=Common(device="cpu", quiet=quiet))
        shown = capsys.readouterr().err
        assert shown.startswith(said) if said else not shown
    with pytest.raises(Taken, match="full"):
        reproduce(name="madry-mnist", scale="full", common=Common(device="cpu"))
    assert capsys.readouterr().err == ""
