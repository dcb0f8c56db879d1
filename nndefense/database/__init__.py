"""The image database: HDF5 rows, a FAISS index and a manifest in one folder, behind one class."""

from nndefense.database.database import ImageDatabase
from nndefense.database.manifest import Manifest
from nndefense.database.weighting import WEIGHTINGS, Weighting, combine, neighbor_weights, weight_shares
from nndefense.database.writer import DatabaseWriter, check_vacant

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
