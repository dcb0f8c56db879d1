"""Every Python block of README and docs runs, as a reader would run it: page by page, from the first block to the last.

A page's blocks share their names. What a page takes for granted (a trained classifier, a folder of photos) is made of
the digits, at the places that it names, and figures that would take minutes are made smaller; nothing else is changed.
"""

from __future__ import annotations

import ast
import contextlib
import importlib
import inspect
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import served
import torch
from helpers import BLOCK2, digits, images, trained, untrained
from PIL import Image

import nndefense as nnd
from index_build import build_database
from index_build.patches import build_patches
from nndefense.features import FeatureSpec
from nndefense.guard import Guard
from nndefense.training import InnerAttack, train_classifier
from nndefense.training.labellers import Teacher
from nndefense.training.pseudo_job import write_pseudo_labels

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
FENCE = re.compile(r"^```python([^\n]*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
# What cannot run here, by page; such a block says so on its fence (```python no-run), and its names are looked up.
NOT_RUN = {"docs/ray.md": "the block joins a cluster at an address of its own"}
# Pages whose blocks another test runs.
ELSEWHERE = {"docs/compare-your-own.md": "tests/test_compare_your_own.py"}


class Block(NamedTuple):
    page: str
    line: int
    runs: bool
    code: str


def blocks_of(text: str, page: str) -> list[Block]:
    found = []
    for match in FENCE.finditer(text):
        assert match[1].strip() in ("", "no-run"), f"{page}: what does the fence python{match[1]} mean?"
        found.append(Block(page, text[: match.start()].count("\n") + 2, not match[1].strip(), match[2]))
    return found


BLOCKS = [
    block
    for path in PAGES
    if (page := path.relative_to(ROOT).as_posix()) not in ELSEWHERE
    for block in blocks_of(path.read_text(encoding="utf-8"), page)
]


# -- what the pages take for granted ------------------------------------------------------------------------------


def photos(folder: Path, first: int, count: int) -> None:
    """Digits as files in one folder a class, from the one numbered ``first`` on."""
    for number in range(10):
        place = folder / f"{number}"
        place.mkdir(parents=True)
        for row in np.flatnonzero(digits("train").labels == number)[first : first + count]:
            save(place / f"{row}.png", int(row))


def save(path: Path, row: int) -> None:
    """One training digit as a picture."""
    pixels = (digits("train")[row][0][0] * 255).round().byte().numpy()
    Image.fromarray(pixels).save(path)


def readme() -> dict[str, Any]:
    photos(Path("photos/train"), 0, 12)
    photos(Path("photos/val"), 12, 7)
    train = nnd.open_dataset("imagefolder:photos:train")
    net = nnd.build_classifier("small-cnn", input_shape=train.shape, classes=train.classes)
    net = train_classifier(net, train, epochs=1, batch_size=40, out="runs/net", progress=False)
    build_database(train, net, BLOCK2, "runs/db", specs=["imagefolder:photos:train"], progress=False)
    return {}


def baselines() -> dict[str, Any]:
    train_images = digits("train").subset(range(80))
    build_patches(train_images, "runs/mnist-patches", patches=300, progress=False)
    specs = ["digits:train[:80]"]
    database = build_database(train_images, trained(), BLOCK2, "runs/database", specs=specs, progress=False)
    return {
        "classifier": trained(),
        "database": database,
        "train_images": train_images,
        "images": images("test", 3)[0],
        "one": untrained(1),
        "two": untrained(2),
        "net": untrained(3),
    }


def pseudo_labels() -> dict[str, Any]:
    pool = digits("train").subset(range(100, 180))
    write_pseudo_labels(Teacher(trained()), pool, "runs/pool.h5", progress=False)
    return {
        "teacher": trained(),
        "labelled": digits("train").subset(range(100)),
        "pool": pool,
        "net": untrained(),
        "attack": InnerAttack(eps=0.1, steps=1),
        "train_classifier": lambda *given, **options: train_classifier(
            *given, epochs=1, batch_size=50, progress=False, **options
        ),
    }


def retrieval_attacks() -> dict[str, Any]:
    training_images = digits("train").subset(range(200))
    database = build_database(training_images, trained(), BLOCK2, "runs/database", progress=False)
    first = FeatureSpec("block1.0", "grid4", pca=48)
    affine = build_database(training_images, trained(), first, "runs/affine", progress=False)
    x, y = images("test", 2)
    return {
        "affine_defense": nnd.NearestNeighborDefense(trained(), affine, k=3),
        "defense": nnd.NearestNeighborDefense(trained(), database, k=10),
        "training_images": training_images,
        "x": x,
        "y": y,
        "gray_images": nnd.attacks.pgd(trained(), x, y, eps=0.1, steps=2),
    }


def guarded() -> dict[str, Any]:
    shutil.copytree(served.home(), "runs/demo")
    # Of images that stand in no database.
    guard = Guard.open("runs/demo/database", calibration=False)
    guard.calibrate(digits("train").subset(range(900, 1000))).write(Path("runs/demo/database/guard.json"))
    for row, name in enumerate(("a.png", "b.jpg", "cat.jpg", "dog.png")):
        save(Path(name), row)
    return {}


GIVEN: Mapping[str, Callable[[], dict[str, Any]]] = {
    "README.md": readme,
    "docs/commands.md": readme,
    "docs/baselines.md": baselines,
    "docs/evaluation.md": dict,
    "docs/guard.md": guarded,
    "docs/pseudo-labels.md": pseudo_labels,
    "docs/retrieval-attacks.md": retrieval_attacks,
    "docs/serving.md": guarded,
    "docs/training.md": dict,
}
# What would take minutes, or is another machine's: as the page has it, and as it is run.
SMALLER: Mapping[str, Mapping[str, str]] = {
    "docs/baselines.md": {
        "train_classifier(net, images, ": "train_classifier(net, train_images, epochs=1, batch_size=40, ",
        'k=5, out="runs/racnn")': 'k=5, out="runs/racnn", epochs=1, batch_size=40)',
        'arch="strided-cnn"': 'arch="small-cnn"',
    },
    "docs/pseudo-labels.md": {"per_class=3000": "per_class=3"},
    "docs/retrieval-attacks.md": {'norm="linf", ': 'norm="linf", steps=2, '},
    "docs/serving.md": {"http://127.0.0.1:8000": "URL"},
    "docs/training.md": {
        "mnist:train": "digits:train[:120]",
        "holdout(images, 1000": "holdout(images, 20",
        '"madry-mnist"': '"small-cnn"',
        "epochs=10": "epochs=1, batch_size=50",
    },
}


def made_smaller(code: str, page: str, used: set[str], url: str = "") -> str:
    for was, runs in SMALLER.get(page, {}).items():
        if was in code:
            used.add(was)
            code = code.replace(was, url if runs == "URL" else runs)
    return code


def run(blocks: list[Block], names: dict[str, Any], url: str = "") -> None:
    """Run a page's blocks one after another in one namespace; whatever fails names its line on the page."""
    used: set[str] = set()
    for block in blocks:
        code = "\n" * (block.line - 1) + made_smaller(block.code, block.page, used, url)
        exec(compile(code, block.page, "exec"), names)
    page = blocks[0].page
    assert used == set(SMALLER.get(page, {})), f"{page} no longer has what is made smaller here"


@pytest.fixture
def url(request: pytest.FixtureRequest) -> Iterator[str]:
    """The address of a service, for the page that asks one."""
    with contextlib.ExitStack() as stack:
        asked = "URL" in SMALLER.get(request.getfixturevalue("page"), {}).values()
        yield stack.enter_context(served.serving()).url if asked else ""


@pytest.mark.parametrize("page", sorted({block.page for block in BLOCKS if block.runs}))
def test_the_blocks_of_a_page_run(
    page: str, url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert page in GIVEN, f"{page} has Python blocks: say in GIVEN what they take for granted"
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    run([block for block in BLOCKS if block.page == page and block.runs], GIVEN[page](), url)
    assert "Traceback" not in capsys.readouterr().err


def test_a_block_that_does_not_run_would_be_seen() -> None:
    text = "Words.\n\n```python\nx = 1\n```\n\nMore.\n\n```python\ny = x + 1\nnnd.nothing\n```\n\n```sh\nls\n```\n"
    blocks = blocks_of(text, "page.md")
    assert [(block.line, block.runs) for block in blocks] == [(4, True), (10, True)]
    with pytest.raises(AttributeError, match="nothing") as caught:
        run(blocks, {"nnd": nnd})
    assert caught.traceback[-2].lineno + 1 == 11


# -- names ----------------------------------------------------------------------------------------------------------


def missing_names(code: str) -> list[str]:
    """What a piece of code takes from the project that is not there: imports, and attributes of what it imported."""
    tree, known, missing = ast.parse(code), {"nnd": nnd}, []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] in ("nndefense", "index_build"):
                    known[alias.asname or alias.name] = importlib.import_module(alias.name)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in ("nndefense", "index_build"):
            module = importlib.import_module(str(node.module))
            for alias in node.names:
                if not hasattr(module, alias.name):
                    with contextlib.suppress(ModuleNotFoundError):
                        importlib.import_module(f"{node.module}.{alias.name}")
                if hasattr(module, alias.name):
                    known[alias.asname or alias.name] = getattr(module, alias.name)
                else:
                    missing.append(f"{node.module}.{alias.name}")
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in known:
            owner = known[node.value.id]
            # Attributes that only an object has are not looked for on its class.
            if (inspect.ismodule(owner) or inspect.isclass(owner)) and not hasattr(owner, node.attr):
                missing.append(f"{node.value.id}.{node.attr}")
    return missing


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: f"{block.page}:{block.line}")
def test_names_of_a_block_exist(block: Block) -> None:
    assert not missing_names(block.code)


def test_a_missing_name_would_be_seen() -> None:
    code = (
        "from nndefense import attacks, nothing\nimport nndefense as n\nattacks.pgd\nattacks.pgdd\nn.Guardd\nnnd.Gard"
    )
    assert missing_names(code) == ["nndefense.nothing", "attacks.pgdd", "n.Guardd", "nnd.Gard"]


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_names_in_the_text_exist(page: Path) -> None:
    """``nnd.X`` and ``nndefense.a.b`` anywhere on a page, also in a line of text."""
    for found in set(
        re.findall(r"(?<![\w./-])(?:nnd|nndefense|index_build)(?:\.[A-Za-z_]\w*)+(?![\w./-])", page.read_text("utf-8"))
    ):
        if found == "nndefense.lock":  # a file
            continue
        parts = found.replace("nnd.", "nndefense.", 1).split(".")
        owner: Any = importlib.import_module(parts[0])
        for depth, name in enumerate(parts[1:], 2):
            if not hasattr(owner, name) and inspect.ismodule(owner):
                importlib.import_module(".".join(parts[:depth]))
            owner = getattr(owner, name)


def test_what_is_not_run_has_a_reason() -> None:
    assert {block.page for block in BLOCKS if not block.runs} == set(NOT_RUN)
    for page, test in ELSEWHERE.items():
        assert not (ROOT / page).exists() or (ROOT / test).exists(), f"{page} has no test {test}"
