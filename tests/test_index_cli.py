"""The subcommands of ``nndefense index``: stage by stage, and what they say to wrong arguments."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from command import fails, nndefense
from helpers import trained

from nndefense.cli.index import rejections, size
from nndefense.database import Manifest
from nndefense.errors import InputError
from nndefense.models import save_classifier


@pytest.fixture(scope="module")
def net(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trained classifier's folder."""
    folder = tmp_path_factory.mktemp("net") / "classifier"
    save_classifier(trained(), folder)
    return folder


def options(net: Path, out: Path) -> list[object]:
    return [
        "--dataset", "digits:train[:200]", "--classifier", net, "--layer", "block2", "--pca", 8, "--index", "IVF4,Flat",
        "--shard-rows", 64, "--pca-sample", 100, "--quiet", "--json", "--out", out,
    ]  # fmt: skip


def test_stage_by_stage_is_a_build(net: Path, tmp_path: Path) -> None:
    out = tmp_path / "staged"
    built = nndefense("index", "build", *options(net, tmp_path / "whole")).json
    assert nndefense("index", "extract", *options(net, out)).json == {"database": str(out), "rows": 200, "rejected": {}}
    fails(5, "unfinished build with other settings (seed 0, now 3)", "index", "build", *options(net, out), "--seed", 3)
    fails(5, "index fit' first", "index", "add", out)
    fails(5, "no finished database", "index", "info", out)
    fitted = nndefense("index", "fit", out, "--json").json
    assert (fitted["factory"], fitted["mergeable"]) == ("IVF4,Flat", True)
    assert nndefense("index", "add", out, "--workers", 2, "--quiet", "--json").json["parts"] == 1
    assert nndefense("index", "merge", out, "--json").json["rows"] == 200
    said = nndefense("index", "verify", out, "--json").json
    assert (said["rows"], said["index_rows"]) == (200, 200)
    assert said["search"]["recall"] >= 0.95
    info = nndefense("index", "info", out, "--json").json
    assert info["fingerprint"] == built["fingerprint"]
    assert info["storage"] == {"features": "float32", "posteriors": "dense"}
    text = nndefense("index", "info", out).out
    assert "recall@50" in text
    fails(5, "no unfinished build", "index", "fit", out)
    # Measured with images that stand in no row.
    queries = ["--queries", "digits:test", "--limit", 40]
    again = nndefense("index", "verify", out, "--recall", 0.5, "--recall-k", 5, *queries, "--json").json["search"]
    assert (again["queries"], again["queries_from"], again["wanted"]) == (40, "digits:test", 0.5)
    assert Manifest.read(out).index["search"] == again
    assert "is whole" in nndefense("index", "verify", out).out


def test_what_is_kept_out_and_how_it_is_stored(net: Path, tmp_path: Path) -> None:
    out = tmp_path / "x"
    words = [word for word in options(net, out) if word != "--json"]
    said = nndefense(
        "index", "build", *words, "--exclude", "digits:train[:20]", "--exclude-eps", 0, "--dedupe", "--storage",
        "float16", "--posteriors", "top-3", "--memory", "1G", "--max-rejected", "5%",
    )  # fmt: skip
    assert "left out" in said.out
    manifest = Manifest.read(out)
    assert manifest.rows == 180
    assert manifest.rejected == {"excluded": 20}
    assert manifest.storage == {"features": "float16", "posteriors": "top-3"}
    assert manifest.build["memory"] == 1 << 30
    lines = (out / "rejected.jsonl").read_text().splitlines()
    assert {json.loads(line)["kind"] for line in lines} == {"excluded"}
    fails(5, "already holds a database", "index", "extract", *words)


def test_wrong_arguments(net: Path, tmp_path: Path) -> None:
    build = ["index", "build", *options(net, tmp_path / "x")]
    fails(2, "must be a size such as", *build, "--memory", "lots")
    fails(2, "must be a number or a share", *build, "--max-rejected", "some")
    fails(2, "must be auto, dense or top-M", *build, "--posteriors", "few")
    fails(2, "no images to exclude", *build, "--exclude-eps", 1)
    fails(3, "unknown data set", *build, "--exclude", "nothing")
    fails(2, "recall must be above 0", *build, "--recall", 2)
    fails(2, "there is no device 'tpu'", *build, "--device", "tpu")
    fails(2, "there is no device 'tpu'", *build, "--index-device", "tpu")
    if not torch.cuda.is_available():
        for device in ("cuda", "cuda:0", "all-gpus"):
            fails(2, "no CUDA GPU can be used here", *build, "--device", device)
            fails(2, "FAISS can use no GPU here", *build, "--index-device", device)
    fails(2, "FAISS cannot build an index", *build, "--index", "IVF")
    for stage in ("fit", "add", "merge"):
        fails(5, "no unfinished build", "index", stage, tmp_path / "x")
    fails(5, "no database at", "index", "verify", tmp_path / "x")
    assert not (tmp_path / "x").exists()
    for words in (
        ["fit"],
        ["add", tmp_path, "--workers", 0],
        ["build", "--out", tmp_path],
        ["merge", tmp_path, "more"],
    ):
        assert nndefense("index", *words).code == 2


@pytest.mark.parametrize(
    ("text", "count"), [("1", 1), ("2K", 2048), ("1.5M", 3 << 19), ("15GB", 15 << 30), ("2 TiB", 2 << 40), (None, None)]
)
def test_sizes(text: str | None, count: int | None) -> None:
    assert size("--memory", text) == count


@pytest.mark.parametrize("text", ["", "G", "-1", "1X", "1e9", "1,5G"])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(InputError, match="--memory is"):
        size("--memory", text)


def test_rejections_are_told_by_kind() -> None:
    assert rejections({}) == ""
    assert rejections({"damaged": 1200, "empty": 2}) == (
        ", 1,202 images left out (1,200 damaged, 2 empty; see rejected.jsonl)"
    )
