"""How far a job is: lines a minute apart where there is no terminal, nothing where it is to be quiet."""

from __future__ import annotations

from pathlib import Path

import pytest

from nndefense import bars
from nndefense.cli.options import Common
from nndefense.cli.reproduce import _scale

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


def test_on_a_terminal_it_is_a_bar(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    list(bars.progress_bar(range(3), desc="working", delay=0))
    assert "\rworking: 100%" in capsys.readouterr().err


def test_every_bar_is_one_of_these() -> None:
    sources = [*(REPOSITORY / "nndefense").rglob("*.py"), *(REPOSITORY / "index_build").rglob("*.py")]
    makers = {path.name for path in sources if " tqdm(" in path.read_text(encoding="utf-8")}
    assert makers == {"bars.py"}


def test_without_a_gpu_the_small_scale_is_taken_and_said(capsys: pytest.CaptureFixture[str]) -> None:
    assert _scale(Common(device="cpu")) == "small"
    assert "no GPU here, so the small scale is taken; --scale full" in capsys.readouterr().err
    assert _scale(Common(device="cpu", quiet=True)) == "small"
    assert capsys.readouterr().err == ""
