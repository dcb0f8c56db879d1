"""The handwritten digits that come with scikit-learn: 1,797 grey images 8 x 8, available without a download.

A test set of the UCI "Optical Recognition of Handwritten Digits" data (Alpaydin and Kaynak, 1998).
"""

from __future__ import annotations

import numpy as np

from nndefense.datasets.arrays import ArrayDataset
from nndefense.datasets.base import stratified_rows
from nndefense.datasets.ids import NumberedIds, PickedIds
from nndefense.errors import DataError

CLASSES = tuple(str(digit) for digit in range(10))
_TEST_IMAGES = 500


def open_digits(split: str) -> ArrayDataset:
    """Return the 1,297 ``train`` or 500 ``test`` images, 1 x 8 x 8; a fixed split that keeps the shares of classes.

    The ids count through scikit-learn's order: ``digits/00000`` to ``digits/01796``.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise DataError("the digits data set comes with scikit-learn: pip install scikit-learn") from error
    bunch = load_digits()
    labels = np.asarray(bunch.target, dtype=np.int64)
    test = stratified_rows(labels, _TEST_IMAGES, seed=0)
    rows = test if split == "test" else np.setdiff1d(np.arange(len(labels)), test)
    # Values are 0..16, so a sixteenth of them is exact in float32.
    images = (np.asarray(bunch.images)[rows, None] / 16).astype(np.float32)
    ids = PickedIds(NumberedIds("digits", len(labels)), rows)
    return ArrayDataset(images, labels[rows], name=f"digits:{split}", classes=CLASSES, ids=ids)
