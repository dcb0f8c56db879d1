"""docs/slides.md: the commands that take seconds run as they stand there, one after the other, and all others exist."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import typer
from command import nndefense

from nndefense.cli.app import build

REPOSITORY = Path(__file__).resolve().parent.parent
BLOCKS = re.findall(
    r"```sh\n(.*?)```", (REPOSITORY / "docs" / "slides.md").read_text(encoding="utf-8"), flags=re.DOTALL
)
LINES = [line for block in BLOCKS for line in block.splitlines()]
SHORT = [line for line in LINES if "#" not in line]


def test_every_line_is_a_command_that_exists_and_says_how_long_it_takes() -> None:
    assert len(SHORT) >= 12
    found = typer.main.get_command(build())
    for line in LINES:
        program, *words = shlex.split(line, comments=True)
        assert program == "nndefense"
        command = found
        while words and words[0] in getattr(command, "commands", {}):
            command = command.commands[words.pop(0)]
        assert command is not found, line
        flags = {flag for option in command.params for flag in (*option.opts, *option.secondary_opts)}
        assert {word for word in words if word.startswith("--")} <= flags | {"--help"}, line
        assert re.search(r"# (minutes|hours)$", line) or line in SHORT


@pytest.mark.slow
def test_the_short_commands_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    said = {}
    for line in SHORT:
        done = nndefense(*shlex.split(line)[1:])
        assert done.code == 0, (line, done.err)
        said[line] = done.out
    text = "\n".join(said.values())
    assert "target least-likely: reached by" in text
    assert "mean confidence in wrong answers" in text
    assert "those that most excite a random direction" in text
    assert re.search(r"Sigma = I\n", text)
    assert "the median predicts 0.140: error 1.020" in text
