"""The image database: HDF5 rows, a FAISS index and a manifest in one folder, behind one class."""

from __future__ import annotations

from typing import TYPE_CHECKING

from nndefense.faces import importing

if TYPE_CHECKING:
    from nndefense.database.classifier_source import classifier_of, source_of
    from nndefense.database.database import ImageDatabase
    from nndefense.database.index import FaissIndex
    from nndefense.database.index_training import IndexChoice, choose_index, train_index
    from nndefense.database.manifest import Manifest
    from nndefense.database.merging import merge_parts
    from nndefense.database.rule import VOTES, Rule
    from nndefense.database.tuning import Tuned, exact_neighbours, recall_at, tune
    from nndefense.database.weighting import WEIGHTINGS, Weighting, combine, neighbor_weights, weight_shares
    from nndefense.database.writer import DatabaseWriter, check_vacant

# Imported when they are first used: an actor that only searches a part of an index needs no torch.
_NAMES = {
    "classifier_source": "classifier_of source_of",
    "database": "ImageDatabase",
    "index": "FaissIndex",
    "index_training": "IndexChoice choose_index train_index",
    "manifest": "Manifest",
    "merging": "merge_parts",
    "rule": "VOTES Rule",
    "tuning": "Tuned exact_neighbours recall_at tune",
    "weighting": "WEIGHTINGS Weighting combine neighbor_weights weight_shares",
    "writer": "DatabaseWriter check_vacant",
}
__getattr__ = importing(
    __name__, {name: f"{__name__}.{module}" for module, names in _NAMES.items() for name in names.split()}
)

__all__ = [
    "VOTES", "WEIGHTINGS", "DatabaseWriter", "FaissIndex", "ImageDatabase", "IndexChoice", "Manifest", "Rule", "Tuned",
    "Weighting", "check_vacant", "choose_index", "classifier_of", "combine", "exact_neighbours", "merge_parts",
    "neighbor_weights", "recall_at", "source_of", "train_index", "tune", "weight_shares",
]  # fmt: skip
