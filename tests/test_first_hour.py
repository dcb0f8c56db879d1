"""The commands of docs/first-hour.md, one after the other, on drawn photos of mixed sizes: nothing else is needed."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import httpx
import numpy as np
import pytest
import served
from command import nndefense
from PIL import Image

PAGE = Path(__file__).parents[1] / "docs" / "first-hour.md"
# What makes minutes of it seconds; nothing else is changed.
SMALLER = {"train": ["--epochs", "6"], "evaluate": ["--adaptive-steps", "5", "--steps", "5"]}


def commands() -> list[list[str]]:
    """Every command line of the page's ``sh`` blocks, as words."""
    blocks = re.findall(r"^```sh\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    return [shlex.split(line) for block in blocks for line in block.replace("\\\n", " ").splitlines()]


def draw(folder: Path, count: int, seed: int) -> None:
    """Bright, dark and striped photos of many sizes, with the suffixes of several cameras."""
    draws = np.random.default_rng(seed)
    for name in ("church", "parachute", "spaniel"):
        (folder / name).mkdir(parents=True)
        for number in range(count):
            height, width = draws.integers(40, 90, 2)
            pixels = draws.normal(80 if name == "spaniel" else 170, 30, (height, width, 3))
            if name == "church":
                pixels[:, ::4] *= 0.3
            suffix = ("png", "JPG", "jpeg", "jpg")[number % 4]
            Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / name / f"IMG_{1000 + number}.{suffix}")


@pytest.mark.slow
def test_the_commands_of_the_first_hour_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    draw(Path("photos/train"), 24, 0)
    draw(Path("photos/val"), 8, 1)
    wanted = commands()
    assert [words[1] for words in wanted] == [
        "train", "train", "calibrate", "index", "index", "classify", "evaluate", "guard", "serve", "--data-binary",
    ]  # fmt: skip
    for words in wanted[:-2]:
        done = nndefense(*words[1:], *SMALLER.get(words[1], ()))
        assert done.code == 0, done.err
    *_, serve, curl = wanted
    child = subprocess.Popen(
        [sys.executable, "-m", "nndefense", *serve[1:], "--port", "0"],
        stdout=subprocess.PIPE, text=True, env=served.environment(),
    )  # fmt: skip
    try:
        assert child.stdout is not None
        url = child.stdout.readline().split(" on ")[1].split(";")[0].strip()
        served.until(lambda: httpx.get(f"{url}/readyz").status_code == 200, 60)
        photo = curl[curl.index("--data-binary") + 1]
        kind, path = curl[curl.index("-H") + 1].split(": "), curl[-1].partition("8000")[2]
        answer = httpx.post(url + path, content=Path(photo.removeprefix("@")).read_bytes(), headers={kind[0]: kind[1]})
        assert answer.status_code == 200, answer.text
        assert answer.json()["predictions"][0]["class"]
    finally:
        child.terminate()
        child.communicate(timeout=30)
