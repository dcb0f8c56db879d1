"""Image quilting: the patch database, seams of least error, and the defence (Guo et al., ICLR 2018)."""

from nndefense.defenses.quilting.layout import Layout, boundary_cut, lay_out
from nndefense.defenses.quilting.patches import PatchDatabase, PatchManifest
from nndefense.defenses.quilting.quilt import Quilt, QuiltingDefense, cut, quilting, stitch
from nndefense.defenses.quilting.writer import check_patch_folder, write_patches

__all__ = [
    "Layout",
    "PatchDatabase",
    "PatchManifest",
    "Quilt",
    "QuiltingDefense",
    "boundary_cut",
    "check_patch_folder",
    "cut",
    "lay_out",
    "quilting",
    "stitch",
    "write_patches",
]
