"""One collection in three forms: image folders, WebDataset shards and HDF5 must give the same database.

The folders are laid out as shards (the files' own bytes, with a `.cls` each) and as one HDF5 file (the decoded pixels,
8 bits). `nndefense index build` makes a database of each, in a process of its own; then every column of the rows is
compared bit by bit, and the index. Ids are those of the folders; in shards without the suffix, because a key has none.

Usage: python benchmarks/index_forms.py --folder imagefolder:photos:train --folder imagefolder:photos:val \
    --size 224 --classes CLASSES --work EMPTY_FOLDER --out benchmarks/index_forms.json \
    -- --classifier python:FILE.py:FUNCTION --layer features --classes CLASSES --input-shape 3,224,224

What follows `--` goes to the builder as it is.
"""

from __future__ import annotations

import argparse
import io
import json
import re
import subprocess
import sys
import tarfile
import time
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from nndefense.database import ImageDatabase
from nndefense.database.rows import StoredRows
from nndefense.datasets import ImageDataset, ImageFolderDataset, open_dataset
from nndefense.models import read_classes

IMAGES_PER_SHARD = 1000


def main() -> None:
    """Lay out, build, compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", action="append", required=True, help="an image folder; repeat it to join several")
    parser.add_argument("--size", type=int, required=True, help="the side of the images, which must all have it")
    parser.add_argument("--classes", type=Path, required=True, help="all classes: a line each, or a CSV file")
    parser.add_argument("--work", type=Path, required=True, help="where the forms and the databases go")
    parser.add_argument("--out", type=Path, default=None)
    parser.add_argument("build", nargs="*", help="the builder's options, after --")
    options = parser.parse_args()
    names, keys = read_classes(options.classes)
    classes = list(keys or names)
    parts = [open_dataset(spec, size=options.size) for spec in options.folder]
    labels = np.concatenate([[classes.index(part.classes[label]) for label in part.labels] for part in parts])
    options.work.mkdir(parents=True, exist_ok=True)
    write_tars(parts, labels, classes, options.work / "shards")
    write_pixels(parts, labels, classes, options.work / "images.h5", options.size)
    forms = {
        "folders": options.folder,
        "shards": [f"webdataset:{options.work / 'shards'}"],
        "hdf5": [f"hdf5:{options.work / 'images.h5'}"],
    }
    found: dict[str, Any] = {"images": len(labels), "options": visible(options.build), "forms": {}}
    for form, specs in forms.items():
        found["forms"][form] = build(form, specs, options.work / form, options.build)
    found["equal"] = {form: compare(options.work / "folders", options.work / form) for form in ("shards", "hdf5")}
    for form, same in found["equal"].items():
        print(
            f"{form} against folders: "
            + ", ".join(f"{name} {'equal' if ok else 'NOT EQUAL'}" for name, ok in same.items())
        )
    if options.out:
        options.out.write_text(json.dumps(found, indent=2) + "\n")
    sys.exit(0 if all(ok for same in found["equal"].values() for ok in same.values()) else 1)


def visible(arguments: list[str]) -> list[str]:
    """The builder's options without the folders that files lie in, which say nothing to others."""
    return [re.sub(r"(^|:)[^:]*/", r"\1", word) for word in arguments]


def write_tars(parts: list[ImageDataset], labels: Any, classes: list[str], folder: Path) -> None:
    """The images' files as they are, 1,000 a shard, in the order of the folders."""
    folder.mkdir(exist_ok=True)
    (folder / "classes.txt").write_text("\n".join(classes) + "\n", encoding="utf-8")
    files = [(name, part.path(row)) for part in parts if isinstance(part, ImageFolderDataset)
             for row, name in enumerate(part.ids)]  # fmt: skip
    for first in range(0, len(files), IMAGES_PER_SHARD):
        with tarfile.open(folder / f"images-{first // IMAGES_PER_SHARD:03d}.tar", "w") as tar:
            for (name, path), label in zip(files[first : first + IMAGES_PER_SHARD], labels[first:], strict=False):
                for inside, data in ((name, path.read_bytes()), (stem(name) + ".cls", str(label).encode())):
                    entry = tarfile.TarInfo(inside)
                    entry.size = len(data)
                    tar.addfile(entry, io.BytesIO(data))


def write_pixels(parts: list[ImageDataset], labels: Any, classes: list[str], path: Path, side: int) -> None:
    """The decoded pixels, 8 bits, with the folders' ids."""
    ids = [name.encode() for part in parts for name in part.ids]
    with h5py.File(path, "w", libver=("v110", "v110")) as file:
        images = file.create_dataset("images", (len(ids), side, side, 3), np.uint8)
        file["labels"], file["ids"] = labels, np.array(ids)
        file.attrs["classes"] = np.array(classes, dtype=h5py.string_dtype())
        first = 0
        for part in parts:
            for some, _, _ in part.batches(128):
                # Pixels of 8-bit files are k / 255, so nothing is lost.
                images[first : first + len(some)] = some.mul(255).round().byte().permute(0, 2, 3, 1).numpy()
                first += len(some)


def build(form: str, specs: list[str], folder: Path, more: list[str]) -> dict[str, Any]:
    """One database, by the command."""
    command = [sys.executable, "-m", "nndefense", "index", "build", "--out", str(folder), "--overwrite", *more]
    start = time.perf_counter()
    subprocess.run(command + [word for spec in specs for word in ("--dataset", spec)], check=True)
    seconds = time.perf_counter() - start
    database = ImageDatabase.open(folder)
    found = {"rows": len(database), "rejected": database.manifest.rejected, "seconds": seconds,
             "images_per_second": len(database) / seconds}  # fmt: skip
    print(f"{form}: {len(database):,} rows, rejected {database.manifest.rejected}, {seconds:.0f} s in all", flush=True)
    return found


def compare(folder: Path, other: Path) -> dict[str, bool]:
    """For each column, the PCA and the index whether every bit agrees."""
    first, second = (StoredRows(sorted(path.glob("rows-*.h5"))) for path in (folder, other))
    found = {}
    for name in ("features", "posteriors", "top_classes", "top_values", "cbw_e", "cbw_d", "labels", "digest", "ids"):
        try:
            a, b = (rows.slice(name, 0, len(rows)) for rows in (first, second))
        except KeyError:
            continue
        if name == "ids":
            a, b = ([stem(item.decode()) for item in ids.tolist()] for ids in (a, b))
            found[name] = a == b
        else:
            found[name] = a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()
    for file in ("pca.safetensors", "index.faiss"):
        if (folder / file).exists():
            found[file] = (folder / file).read_bytes() == (other / file).read_bytes()
    return found


def stem(name: str) -> str:
    """An id without the suffix of its file: the key in a tar, which ends at the first dot of the last part."""
    home, slash, last = name.rpartition("/")
    return home + slash + last.partition(".")[0]


if __name__ == "__main__":
    main()
