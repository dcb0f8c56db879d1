"""Index-building jobs: a collection of images -> an image database that the defence can search."""

from index_build.grow import compact_database, grow_database, remove_images
from index_build.runner import build_database, build_databases

__all__ = ["build_database", "build_databases", "compact_database", "grow_database", "remove_images"]
