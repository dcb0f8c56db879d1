"""``nndefense certify``: on digits, sealed, gone on with after a stop, and what is refused."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from command import fails, nndefense
from helpers import digits, images, trained

from index_build import build_database
from nndefense.certificates import Certified, certify_smoothing, registry
from nndefense.features import FeatureSpec
from nndefense.files import unsealed
from nndefense.models import load_classifier, save_classifier
from nndefense.statistics import wilson_interval


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("certify")
    save_classifier(trained(), folder / "net")
    build_database(
        digits("train").subset(list(range(200))),
        load_classifier(folder / "net"),
        FeatureSpec("block3", "avg", 0),
        folder / "db",
        progress=False,
    )
    return {"classifier": folder / "net", "database": folder / "db"}


def quick(work: dict[str, Path], out: Path, **changes: object) -> list[object]:
    options: dict[str, object] = {
        "dataset": "digits:test", "database": work["database"], "out": out, "sigma": 0.15, "draws": 64,
        "draws_select": 16, "eps": "0.05,0.1,0.5", "limit": 24, **changes,
    }  # fmt: skip
    flags = ((f"--{name.replace('_', '-')}", value) for name, value in options.items() if value is not None)
    return ["certify", *(word for flag in flags for word in flag)]


def test_certificates_of_digits_are_written_sealed_and_found_again(
    work: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = nndefense(*quick(work, tmp_path / "out"))
    assert done.code == 0, done.err
    assert "80 draws x 24 images" in done.err
    assert "right and certified" in done.out
    stored: dict[str, Any] = json.loads((tmp_path / "out" / "certificates.json").read_text())
    assert unsealed(stored)[1]
    found, labels = Certified.from_json(stored["certified"]), torch.tensor(stored["labels"])
    assert (len(found), stored["dataset"]["n"], len(stored["ids"])) == (24, 24, 24)
    assert stored["rule"]["k"] == 50
    for line in stored["accuracy"]:
        right = int(found.stands(labels, line["eps"]).sum())
        assert line["accuracy"] == right / 24
        assert (line["ci_low"], line["ci_high"]) == wilson_interval(right, 24)
    assert stored["accuracy"][0]["accuracy"] > 0.5
    # Killed after the first cell, it certifies the rest alone, and ends at the same radii.
    cells = sorted((tmp_path / "out" / "cells").iterdir())
    assert len(cells) == 2
    next(path for path in cells if "smoothing-20-" in path.name).unlink()
    (tmp_path / "out" / "certificates.json").unlink()
    asked = []
    method = registry.get("smoothing")

    @functools.wraps(certify_smoothing)
    def counted(target: Any, pixels: Any, **given: Any) -> Certified:
        asked.append(len(pixels))
        return certify_smoothing(target, pixels, **given)

    monkeypatch.setitem(registry._METHODS, "smoothing", type(method)(**{**vars(method), "function": counted}))
    again = nndefense(*quick(work, tmp_path / "out", batch_size=33), "--json", "--quiet").json
    assert again["certified"] == stored["certified"]
    assert asked == [4]


def test_a_net_alone_is_certified_as_from_python(work: dict[str, Path], tmp_path: Path) -> None:
    words = quick(work, tmp_path, database=None, classifier=work["classifier"], dataset="digits:test[:9]", limit=None)
    found = nndefense(*words, "--json", "--quiet", "--norm", "normalized-l2", "--seed", 3, "--confidence", 0.99).json
    x, _ = images("test", 9)
    mine = certify_smoothing(trained(), x, sigma=0.15, draws_select=16, draws=64, alpha=0.01, seed=3)
    assert (found["defense"], found["rule"], found["database"]) == ("none", None, None)
    assert found["certified"]["prediction"] == mine.prediction.tolist()
    assert found["certified"]["radius"] == pytest.approx(mine.in_norm("normalized-l2", x).radius.tolist(), rel=1e-12)


def test_exact_certificates_by_the_command(work: dict[str, Path], tmp_path: Path) -> None:
    rows, net = digits("train").subset(list(range(40))), load_classifier(work["classifier"])
    build_database(rows, net, FeatureSpec("block1.0", "avg", 0), tmp_path / "db", progress=False)
    words = quick(work, tmp_path / "out", database=tmp_path / "db", sigma=None, limit=3, k=1, method="exact")
    found = nndefense(*words, "--json", "--quiet", "--norm", "linf", "--eps", "0.01").json
    assert set(found["certified"]["radius"]) <= {0.0, 0.01, 0.05, 0.1, 0.5}
    assert (found["certified"]["norm"], found["certified"]["alpha"]) == ("linf", 0.0)


@pytest.mark.parametrize(
    ("changes", "code", "message"),
    [
        ({"sigma": None}, 2, "--sigma"),
        ({"sigma": 0}, 2, "(--sigma) is 0"),
        ({"method": "exact"}, 2, "leave sigma (--sigma) out"),
        ({"method": "exact", "sigma": None, "database": None, "classifier": "net"}, 2, "--database"),
        ({"method": "bounds-net", "sigma": None}, 2, "leave the database (--database) out"),
        ({"method": "exact", "sigma": None}, 2, "of its size: take such a layer (nndefense index build --layer)\n"),
        ({"method": "exact", "sigma": None, "alpha": 0.5}, 2, "leave them out (--temperature inf --alpha 0)\n"),
        ({"confidence": 0.001}, 2, "--confidence"),
        ({"eps": "0"}, 2, "--eps"),
        ({"eps": "8", "norm": "linf"}, 2, "8/255"),
        ({"database": None, "classifier": "net", "k": 3}, 2, "nearest neighbours"),
        ({"database": None}, 2, "--classifier"),
        ({"dataset": "digits:train"}, 3, "stand in"),
    ],
)
def test_what_cannot_be_certified_is_said_in_one_line(
    work: dict[str, Path], tmp_path: Path, changes: dict[str, object], code: int, message: str
) -> None:
    if changes.get("classifier"):
        changes = {**changes, "classifier": work["classifier"]}
    fails(code, message, *quick(work, tmp_path / "out", **changes))
    assert not (tmp_path / "out" / "certificates.json").exists()
