"""Data sets of images as float tensors in [0, 1], all opened with :func:`open_dataset`."""

from nndefense.datasets.arrays import ArrayDataset, HDF5Dataset, write_hdf5
from nndefense.datasets.base import ImageDataset, SubsetDataset, holdout
from nndefense.datasets.derived import ConcatenatedDataset, TransformedDataset, concatenate
from nndefense.datasets.folder import ImageFolderDataset
from nndefense.datasets.hub import HubDataset
from nndefense.datasets.image_files import image_channels, load_image
from nndefense.datasets.listing import FileListDataset
from nndefense.datasets.parquet import ParquetDataset
from nndefense.datasets.pixels import pixel_digests
from nndefense.datasets.recorded import open_recorded, recorded_specs, specs_at_hand
from nndefense.datasets.rejected import REJECTED_KINDS, BadImage, Reading, Rejected, SourceError
from nndefense.datasets.spec import KNOWN_SPECS, default_data_dir, measured_spec, open_dataset
from nndefense.datasets.torchvision_set import TorchvisionDataset
from nndefense.datasets.webdataset import WebDataset

__all__ = [
    "KNOWN_SPECS",
    "REJECTED_KINDS",
    "ArrayDataset",
    "BadImage",
    "ConcatenatedDataset",
    "FileListDataset",
    "HDF5Dataset",
    "HubDataset",
    "ImageDataset",
    "ImageFolderDataset",
    "ParquetDataset",
    "Reading",
    "Rejected",
    "SourceError",
    "SubsetDataset",
    "TorchvisionDataset",
    "TransformedDataset",
    "WebDataset",
    "concatenate",
    "default_data_dir",
    "holdout",
    "image_channels",
    "load_image",
    "measured_spec",
    "open_dataset",
    "open_recorded",
    "pixel_digests",
    "recorded_specs",
    "specs_at_hand",
    "write_hdf5",
]
