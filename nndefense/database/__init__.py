"""The image database: HDF5 rows, a FAISS index and a manifest in one folder, behind one class."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nndefense.database.database import ImageDatabase
    from nndefense.database.manifest import Manifest
    from nndefense.database.weighting import WEIGHTINGS, Weighting, combine, neighbor_weights, weight_shares
    from nndefense.database.writer import DatabaseWriter, check_vacant

# Imported when they are first used: an actor that only searches a part of an index needs no torch.
_HOMES = {
    "WEIGHTINGS": "weighting",
    "DatabaseWriter": "writer",
    "ImageDatabase": "database",
    "Manifest": "manifest",
    "Weighting": "weighting",
    "check_vacant": "writer",
    "combine": "weighting",
    "neighbor_weights": "weighting",
    "weight_shares": "weighting",
}

__all__ = [
    "WEIGHTINGS",
    "DatabaseWriter",
    "ImageDatabase",
    "Manifest",
    "Weighting",
    "check_vacant",
    "combine",
    "neighbor_weights",
    "weight_shares",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(f"nndefense.database.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'nndefense.database' has no attribute {name!r}")
