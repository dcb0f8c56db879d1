"""Data sets of images as float tensors in [0, 1], all opened with :func:`open_dataset`."""

from nndefense.datasets.arrays import ArrayDataset
from nndefense.datasets.base import (
    ConcatenatedDataset,
    ImageDataset,
    SubsetDataset,
    concatenate,
    holdout,
)
from nndefense.datasets.folder import ImageFolderDataset
from nndefense.datasets.hdf5 import HDF5Dataset, write_hdf5
from nndefense.datasets.image_files import image_channels, load_image
from nndefense.datasets.spec import KNOWN_SPECS, default_data_dir, open_dataset
from nndefense.datasets.transform import TransformedDataset
from nndefense.datasets.webdataset import WebDataset

__all__ = [
    "KNOWN_SPECS",
    "ArrayDataset",
    "ConcatenatedDataset",
    "HDF5Dataset",
    "ImageDataset",
    "ImageFolderDataset",
    "SubsetDataset",
    "TransformedDataset",
    "WebDataset",
    "concatenate",
    "default_data_dir",
    "holdout",
    "image_channels",
    "load_image",
    "open_dataset",
    "write_hdf5",
]
