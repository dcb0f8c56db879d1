"""Shared fixtures: where the real data sets are, and what happens when they are not there."""

from __future__ import annotations

import os
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest
import torch

REPOSITORY = Path(__file__).resolve().parent.parent


def pytest_configure(config: pytest.Config) -> None:
    # The nets here are small: on a busy machine a second thread waits for longer than it helps.
    torch.set_num_threads(1)
    # FAISS may be missing where only the torch backend is used.
    with suppress(ImportError):
        import faiss

        faiss.omp_set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    # Forked children train here: torch refuses that in a process that has used autograd's threads (which a backward
    # pass within 60 others does), so these files come before all others.
    items.sort(key=lambda item: item.path.name not in ("test_training_durable.py", "test_ensemble_adversarial.py"))


def _data_root() -> Path | None:
    named = os.environ.get("NNDEFENSE_DATA")
    for folder in [Path(named)] if named else [REPOSITORY.parent / "shared" / "data"]:
        if (folder / "mnist").is_dir() and (folder / "unpack.py").is_file():
            return folder
    return None


@pytest.fixture(scope="session")
def data_root() -> Path:
    """The folder of real data sets; without it the case is skipped, but under CI it fails."""
    root = _data_root()
    if root is None:
        message = "the shared data sets are not here: set NNDEFENSE_DATA to their folder"
        if os.environ.get("CI") == "true":
            pytest.fail(message)
        pytest.skip(message)
    return root


@pytest.fixture(scope="session")
def unpacked(data_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """CIFAR-10 as HDF5, Imagenette and the ImageNet sample as image folders."""
    out = tmp_path_factory.mktemp("data")
    subprocess.run([sys.executable, str(data_root / "unpack.py"), str(out)], check=True, capture_output=True)
    return out
