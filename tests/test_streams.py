"""What is printed: JSON that is UTF-8 whatever the console is, and names that cannot command a terminal."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from command import nndefense
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from nndefense.cli.streams import json_of, one_line, visible
from nndefense.files import escaped_json, json_text, read_json, write_json

LATIN = os.fsdecode(b"caf\xe9.png")
EVIL = "a\x1b[2J\x1b]0;mine\x07\u202egnp.\n\x9b31m.png"
OBEYED = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")

# Every character, also the halves of characters by which Python writes bytes of names.
anything = st.text(st.characters(exclude_categories=()) | st.sampled_from(EVIL + LATIN))


@given(anything)
def test_json_can_be_read_back_and_is_utf8(text: str) -> None:
    for written in (json_text({text: [text]}), json_of({text: [text]})):
        assert not OBEYED.search(written)
        assert json.loads(written.encode("utf-8").decode("utf-8")) == {text: [text]}


@given(anything)
def test_text_commands_no_terminal(text: str) -> None:
    shown = visible(text)
    assert not OBEYED.search(shown)
    assert shown.count("\n") == text.count("\n")
    assert one_line(text).isprintable() or not text.isprintable()
    assert "\n" not in one_line(text)
    shown.encode("utf-8")


def test_ordinary_names_stay_as_they_are() -> None:
    for text in ("猫.png", "Füße – naïve.jpg", "👩‍🚀", "a\tb\nc", "C:\\new\\x.png"):
        assert visible(text) == text
        assert json.dumps(text, ensure_ascii=False) == escaped_json(json.dumps(text, ensure_ascii=False))
    assert one_line(LATIN) == r"caf\xe9.png"
    assert one_line("a\nb\r\t") == r"a\nb\r\t"


def test_files_keep_names_that_are_not_utf8(tmp_path: Path) -> None:
    write_json(tmp_path / "x.json", {"name": LATIN})
    assert read_json(tmp_path / "x.json") == {"name": LATIN}


def printed(words: list[str | bytes], encoding: str) -> tuple[int, bytes, bytes]:
    """The command in a process of its own, on a console of this encoding: exit code and the bytes that it prints."""
    environment = {**os.environ, "PYTHONIOENCODING": encoding}
    command: list[Any] = [sys.executable, "-m", "nndefense", *words]
    done = subprocess.run(command, capture_output=True, env=environment, check=False)
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize("encoding", ["cp1252", "utf-16"])
def test_consoles_of_any_encoding(encoding: str) -> None:
    code, out, err = printed(["--help"], encoding)
    assert (code, err) == (0, b"")
    assert "nndefense" in out.decode(encoding)
    code, _, err = printed(["index", "info", os.fsencode(LATIN) + "/猫".encode()], encoding)
    assert code == 5
    assert b"Traceback" not in err
    text = err.decode(encoding)
    assert text.count("\n") == 1
    assert "caf\\xe9.png" in text


@pytest.fixture(scope="module")
def classified(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """A database of images under names of all kinds, and options that classify with it."""
    folder = tmp_path_factory.mktemp("names")
    for name, shade in (("cat", 40), ("dog", 200)):
        (folder / "photos" / name).mkdir(parents=True)
        for i, ending in enumerate((LATIN, EVIL, "猫.png", "plain.png")):
            shades = bytes((shade + 7 * i + p) % 256 for p in range(64))
            with (folder / "photos" / name / ending).open("wb") as file:
                Image.frombytes("L", (8, 8), shades).save(file, "png")
    net = "import torch\n\n\ndef net():\n    torch.manual_seed(0)\n    return torch.nn.Sequential("
    net += "torch.nn.Conv2d(1, 4, 3), torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(4, 2))\n"
    (folder / "mine.py").write_text(net)
    (folder / "classes.txt").write_text("cat\ndog\n")
    options = ["--classifier", f"python:{folder}/mine.py:net", "--classes", f"{folder}/classes.txt"]
    options += ["--input-shape", "1,8,8"]
    images = ("--dataset", f"imagefolder:{folder}/photos", "--layer", "0", "--pca", 0, "--quiet")
    assert nndefense("index", "build", *images, *options, "--out", folder / "db").code == 0
    return folder, ["--database", str(folder / "db"), *options]


def test_warnings_of_libraries_are_one_line_without_their_place() -> None:
    code = "import warnings; from nndefense.cli.streams import prepare; prepare(); warnings.warn('a\\n\\x1b[2Jb')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("", "nndefense: warning: a\\n\\x1b[2Jb\n")


def test_classify_prints_names_of_all_kinds(classified: tuple[Path, list[str]]) -> None:
    folder, options = classified
    files = sorted((folder / "photos" / "cat").iterdir())
    said = nndefense("classify", *files, *options, "--top", 8)
    assert said.code == 0
    assert not OBEYED.search(said.out)
    # A line for each image and one for each neighbour: no name makes lines of its own.
    assert said.out.count("\n") == 4 * 9
    found = nndefense("classify", *files, *options, "--top", 8, "--json")
    assert not OBEYED.search(found.out)
    assert [one["file"] for one in found.json["images"]] == list(map(str, files))
    ids = {n["id"] for one in found.json["images"] for n in one["neighbors"]}
    assert ids == {f"{name}/{ending}" for name in ("cat", "dog") for ending in (LATIN, EVIL, "猫.png", "plain.png")}


def test_json_of_a_console_that_is_not_utf8(classified: tuple[Path, list[str]]) -> None:
    folder, options = classified
    names = [LATIN, "猫.png"]
    paths = [os.fsencode(folder / "photos" / "cat" / name) for name in names]
    code, out, err = printed(["classify", *paths, *options, "--json"], "cp1252")
    assert code == 0, err
    assert [Path(one["file"]).name for one in json.loads(out.decode("utf-8"))["images"]] == names


def test_other_commands_take_such_names(classified: tuple[Path, list[str]], tmp_path: Path) -> None:
    folder, options = classified
    root = tmp_path / LATIN
    (folder / "photos").rename(root)
    try:
        net, images = options[2:], ("--dataset", f"imagefolder:{root}", "--eps", "0.1", "--steps", 1)
        assert nndefense("attack", *images, *net, "--out", tmp_path / LATIN.upper()).code == 0
        few = ("--holdout", 2, "--ks", 1, "--layers", 0, "--poolings", "avg", "--pca", 0, "--candidate-rows", 4)
        few += ("--objective", "gray", "--build-anyway")
        done = nndefense("calibrate", *images, *net, *few, "--out", tmp_path / "db", "--quiet")
        assert done.code == 0, done.err
        assert LATIN in json.loads(nndefense("index", "info", tmp_path / "db", "--json").out)["data"]["name"]
    finally:
        root.rename(folder / "photos")
