"""The image database: HDF5 rows, a FAISS index and a manifest in one folder, behind one class."""

from __future__ import annotations

from typing import TYPE_CHECKING

from nndefense.faces import importing

if TYPE_CHECKING:
    from nndefense.database.classifier_source import classifier_of
    from nndefense.database.database import ImageDatabase
    from nndefense.database.index import FaissIndex
    from nndefense.database.index_choice import IndexChoice, choose_index
    from nndefense.database.index_training import train_index
    from nndefense.database.manifest import Manifest
    from nndefense.database.merging import merge_parts
    from nndefense.database.tuning import Tuned, exact_neighbours, recall_at, tune
    from nndefense.database.weighting import WEIGHTINGS, Weighting, combine, neighbor_weights, weight_shares
    from nndefense.database.writer import DatabaseWriter, check_vacant

# Imported when they are first used: an actor that only searches a part of an index needs no torch.
__getattr__ = importing(
    __name__,
    {
        "WEIGHTINGS": "nndefense.database.weighting",
        "IndexChoice": "nndefense.database.index_choice",
        "DatabaseWriter": "nndefense.database.writer",
        "FaissIndex": "nndefense.database.index",
        "ImageDatabase": "nndefense.database.database",
        "Manifest": "nndefense.database.manifest",
        "Tuned": "nndefense.database.tuning",
        "Weighting": "nndefense.database.weighting",
        "check_vacant": "nndefense.database.writer",
        "choose_index": "nndefense.database.index_choice",
        "classifier_of": "nndefense.database.classifier_source",
        "combine": "nndefense.database.weighting",
        "exact_neighbours": "nndefense.database.tuning",
        "merge_parts": "nndefense.database.merging",
        "neighbor_weights": "nndefense.database.weighting",
        "recall_at": "nndefense.database.tuning",
        "train_index": "nndefense.database.index_training",
        "tune": "nndefense.database.tuning",
        "weight_shares": "nndefense.database.weighting",
    },
)

__all__ = [
    "WEIGHTINGS",
    "DatabaseWriter",
    "FaissIndex",
    "ImageDatabase",
    "IndexChoice",
    "Manifest",
    "Tuned",
    "Weighting",
    "check_vacant",
    "choose_index",
    "classifier_of",
    "combine",
    "exact_neighbours",
    "merge_parts",
    "neighbor_weights",
    "recall_at",
    "train_index",
    "tune",
    "weight_shares",
]
