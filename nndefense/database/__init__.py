"""The image database: HDF5 rows, a FAISS index and a manifest in one folder, behind one class."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nndefense.database.choosing import Choice, choose_index
    from nndefense.database.database import ImageDatabase
    from nndefense.database.index import FaissIndex
    from nndefense.database.index_training import train_index
    from nndefense.database.manifest import Manifest
    from nndefense.database.merging import merge_parts
    from nndefense.database.tuning import Tuned, exact_neighbours, recall_at, tune
    from nndefense.database.weighting import WEIGHTINGS, Weighting, combine, neighbor_weights, weight_shares
    from nndefense.database.writer import DatabaseWriter, check_vacant

# Imported when they are first used: an actor that only searches a part of an index needs no torch.
_HOMES = {
    "WEIGHTINGS": "weighting",
    "Choice": "choosing",
    "DatabaseWriter": "writer",
    "FaissIndex": "index",
    "ImageDatabase": "database",
    "Manifest": "manifest",
    "Tuned": "tuning",
    "Weighting": "weighting",
    "check_vacant": "writer",
    "choose_index": "choosing",
    "combine": "weighting",
    "exact_neighbours": "tuning",
    "merge_parts": "merging",
    "neighbor_weights": "weighting",
    "recall_at": "tuning",
    "train_index": "index_training",
    "tune": "tuning",
    "weight_shares": "weighting",
}

__all__ = [
    "WEIGHTINGS",
    "Choice",
    "DatabaseWriter",
    "FaissIndex",
    "ImageDatabase",
    "Manifest",
    "Tuned",
    "Weighting",
    "check_vacant",
    "choose_index",
    "combine",
    "exact_neighbours",
    "merge_parts",
    "neighbor_weights",
    "recall_at",
    "train_index",
    "tune",
    "weight_shares",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(f"nndefense.database.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'nndefense.database' has no attribute {name!r}")
