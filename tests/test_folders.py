"""Folders as people have them: what systems leave in them, links that lead back, pictures under other names."""

from __future__ import annotations

import os
import pickle
import re
import tarfile
import zipfile
from pathlib import Path

import pytest
from command import fails
from dirty import encoded, noise

from nndefense.datasets import open_dataset
from nndefense.datasets.picture_names import Unread
from nndefense.errors import DataError
from nndefense.pipeline.sticker_files import read_photos

# As macOS, Windows, Synology, QNAP, ext4, chkdsk and Python write them.
LITTER = (
    ["@eaDir", "$RECYCLE.BIN", "$Recycle.Bin", "RECYCLER", "__MACOSX", "lost+found", "System Volume Information"]
    + ["#recycle", "@Recycle", ".@__thumb", "@__thumb", "found.000", "Temporary Items", "__pycache__", ".Trashes"]
)  # fmt: skip


def lay(root: Path, *names: str) -> Path:
    """Put a picture of its own at each of these names below ``root``."""
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encoded(noise(sum(name.encode()), 8, 8), "PNG"))
    return root


@pytest.mark.parametrize("litter", LITTER)
def test_what_systems_leave_is_no_class_and_no_picture(litter: str, tmp_path: Path) -> None:
    root = lay(tmp_path / "p", "cat/0.png", "dog/deep/1.png", f"{litter}/x/a.png", f"{litter}/b.png")
    lay(root, f"cat/{litter}/0.png/thumb.png", f"dog/deep/{litter}/c.png", "cat/._0.png")
    found = open_dataset(f"imagefolder:{root}")
    assert (found.classes, list(found.ids)) == (("cat", "dog"), ["cat/0.png", "dog/deep/1.png"])
    assert open_dataset(f"images:{root}").ids == ["cat/0.png", "dog/deep/1.png"]
    lay(tmp_path / "s", "train/cat/0.png", "val/cat/1.png", f"{litter}/x/0.png")
    assert open_dataset(f"imagefolder:{tmp_path / 's'}").ids == ["train/cat/0.png"]
    # In a zip and in a tar it is the same.
    with zipfile.ZipFile(tmp_path / "p.zip", "w") as archive, tarfile.open(tmp_path / "p.tar", "w") as tar:
        for path in sorted(path for path in root.rglob("*") if path.is_file()):
            archive.write(path, str(path.relative_to(root)))
            tar.add(path, str(path.relative_to(root)))
    pytest.importorskip("fsspec")
    zipped = open_dataset(f"imagefolder:zip://::{tmp_path / 'p.zip'}")
    assert (zipped.classes, list(zipped.ids)) == (found.classes, list(found.ids))
    assert open_dataset(f"webdataset:{tmp_path / 'p.tar'}").ids == ["cat/0", "dog/deep/1"]


def test_names_that_only_resemble_litter_are_classes(tmp_path: Path) -> None:
    names = ["$1 bill", "@home", "foundation", "lost", "macosx", "recycled"]
    assert open_dataset(f"imagefolder:{lay(tmp_path, *(f'{name}/0.png' for name in names))}").classes == tuple(names)


@pytest.mark.parametrize("target", ["..", ".", "../..", "../dog", "../dog/deep", "loop", "nowhere", "/"])
def test_links_within_the_folder_add_nothing(target: str, tmp_path: Path) -> None:
    root = lay(tmp_path / "all" / "p", "cat/0.png", "dog/deep/1.png")
    (root / "cat" / "loop").symlink_to(target)
    (root / "dog" / "deep" / "again").symlink_to(root / "cat" / target)
    dataset = open_dataset(f"imagefolder:{root}")
    assert dataset.ids == ["cat/0.png", "dog/deep/1.png"]
    assert dataset.labels.tolist() == [0, 1]
    assert open_dataset(f"images:{root}").ids == dataset.ids


@pytest.mark.parametrize("target", ["..", ".", "../..", "/"])
def test_links_up_the_tree_are_no_classes(target: str, tmp_path: Path) -> None:
    root = lay(tmp_path / "all" / "p", "cat/0.png", "dog/1.png")
    (root / "up").symlink_to(target)
    assert open_dataset(f"imagefolder:{root}").classes == ("cat", "dog")


def test_links_to_pictures_elsewhere_are_followed(tmp_path: Path) -> None:
    store = lay(tmp_path / "store", "one/0.png", "two/1.png", "two/more/2.png")
    (store / "two" / "more" / "back").symlink_to("../..")
    root = lay(tmp_path / "p", "dog/3.png", ".kept/cat/4.png")
    (root / "cat").symlink_to(store / "one")
    (root / "dog" / "more").symlink_to(store / "two")
    (root / "fox").symlink_to(".kept/cat")
    dataset = open_dataset(f"imagefolder:{root}")
    assert dataset.ids == ["cat/0.png", "dog/3.png", "dog/more/1.png", "dog/more/more/2.png", "fox/4.png"]
    # The folder that is opened may be a link itself.
    (tmp_path / "link").symlink_to(root)
    assert open_dataset(f"imagefolder:{tmp_path / 'link'}").ids == dataset.ids


@pytest.mark.parametrize("target", ["cat", "cat/small"])
def test_two_classes_with_the_same_pictures_are_refused(target: str, tmp_path: Path) -> None:
    root = lay(tmp_path, "cat/0.png", "cat/small/1.png")
    (root / "kitten").symlink_to(target)
    with pytest.raises(DataError, match=r"the folders cat and kitten .* have images in common.*: remove one"):
        open_dataset(f"imagefolder:{root}")


def test_stickers_are_not_put_on_what_macos_leaves(tmp_path: Path) -> None:
    (lay(tmp_path, "a.png") / "._a.png").write_bytes(b"\0\5\x16\7junk")
    assert read_photos(tmp_path, (3, 8, 8), None).names == ["a.png"]


@pytest.mark.parametrize(
    ("name", "form"),
    [("a.jfif", "JPEG"), ("a.JPE", "JPEG"), ("a.pjpeg", "JPEG"), ("a.dib", "BMP"), ("a", "PNG"), ("a", "JPEG")]
    + [("a", "BMP"), ("a", "GIF"), ("a", "TIFF"), ("a", "WEBP"), ("a.2", "PNG"), ("a.jpg_large", "JPEG")],
)
def test_pictures_under_other_names_are_read(name: str, form: str, tmp_path: Path) -> None:
    lay(tmp_path, "cat/0.png")
    (tmp_path / "cat" / name).write_bytes(encoded(noise(5, 8, 8), form))
    (tmp_path / "cat" / "README").write_text("BMW and other cats: no picture")
    (tmp_path / "cat" / "void").touch()
    os.mkfifo(tmp_path / "cat" / "pipe")
    for kind in ("imagefolder", "images"):
        dataset = open_dataset(f"{kind}:{tmp_path}")
        assert dataset.ids == sorted(["cat/0.png", f"cat/{name}"])
        assert not dataset.read_each(range(2)).rejected


@pytest.mark.parametrize("name", ["b.heic", "b.HEIF", "b.avif", "b.jxl", "b.CR2", "b"])
def test_pictures_that_are_not_read_are_named(name: str, tmp_path: Path) -> None:
    root = lay(tmp_path / "p", "cat/a.png")
    (root / "cat" / name).write_bytes(b"\0\0\0\x18ftypheic\0\0\0\0")
    for kind in ("imagefolder", "images"):
        with pytest.warns(UserWarning, match=rf"left out a picture .*\({name}\): convert to JPEG or PNG"):
            assert open_dataset(f"{kind}:{root}").ids == ["cat/a.png"]
    if "." in name:
        with tarfile.open(tmp_path / "p.tar", "w") as tar:
            tar.add(root / "cat" / "a.png", "a.png")
            tar.add(root / "cat" / name, name)
        with pytest.warns(UserWarning, match=re.escape(name)):
            assert open_dataset(f"webdataset:{tmp_path / 'p.tar'}").ids == ["a"]
    (root / "cat" / "a.png").unlink()
    with pytest.warns(UserWarning, match="left out a picture"), pytest.raises(DataError, match="has no images"):
        open_dataset(f"imagefolder:{root}")


def test_many_that_are_not_read_are_counted(tmp_path: Path) -> None:
    root = lay(tmp_path, "cat/a.png", *(f"dog/{n}.heic" for n in range(1200)), "dog/b.png")
    with pytest.warns(UserWarning, match=r"left out 1,200 pictures .*0\.heic, 1\.heic, .* and 1,197 more") as told:
        assert len(open_dataset(f"imagefolder:{root}")) == 2
    assert len(told) == 1
    unread = Unread()
    for number in range(100_000):
        unread.add(f"dog/{number}.heic")
    assert len(pickle.dumps(unread)) < 200  # their number and the first names alone are kept


# -- lists ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["txt", "csv"])
def test_a_list_with_backslashes_says_how_paths_are_written(kind: str, tmp_path: Path) -> None:
    lay(tmp_path, "cat/a.png", "cat/b.png")
    head = "path,label\n" if kind == "csv" else ""
    end = ",cat" if kind == "csv" else ""
    listed = tmp_path / f"l.{kind}"
    listed.write_text(f"{head}cat/a.png{end}\ncat\\b.png{end}\n")
    line = 3 if kind == "csv" else 2
    with pytest.raises(DataError, match=rf"line {line} of .* has backslashes \(cat\\b\.png\), .*: write cat/b\.png$"):
        open_dataset(f"files:{listed}")
    # On this system a backslash may stand in a name.
    lay(tmp_path, "cat\\b.png")
    assert len(open_dataset(f"files:{listed}")) == 2


@pytest.mark.parametrize("label", [" 3", "\t3", ",cat", "; cat", "  Persian cat"])
def test_a_list_of_paths_and_labels_says_how_labels_are_given(label: str, tmp_path: Path) -> None:
    lay(tmp_path, "a b.JPEG", "b.png", "c.png 3.png")
    listed = tmp_path / "l.txt"
    listed.write_text(f"a b.JPEG{label}\nb.png{label}\n")
    with pytest.raises(DataError, match=r"line 1 of .* is a path and '.*': .* \.csv .* first line is path,label$"):
        open_dataset(f"files:{listed}")
    # What a file's own name looks like is no matter, nor is one that is missing.
    listed.write_text("a b.JPEG\nc.png 3.png\nmissing.png 4.png\n")
    assert len(open_dataset(f"files:{listed}")) == 3
    (tmp_path / "b.png 3").write_bytes((tmp_path / "b.png").read_bytes())
    listed.write_text("b.png 3\n")
    assert len(open_dataset(f"files:{listed}")) == 1


def test_train_on_images_without_labels_says_what_to_give(tmp_path: Path) -> None:
    lay(tmp_path / "p", "a.png", "b.png")
    (tmp_path / "l.txt").write_text("p/a.png\np/b.png\n")
    for spec in (f"images:{tmp_path / 'p'}", f"files:{tmp_path / 'l.txt'}"):
        fails(2, "has no labels: give labelled images", "train", "--dataset", spec, "--out", tmp_path / "net")


def test_photos_of_stickers_are_those_that_data_sets_read(tmp_path: Path) -> None:
    lay(tmp_path, "a.JFIF", "b.tiff", "c", "notes.txt")
    lay(tmp_path, "d.heic")
    with pytest.warns(UserWarning, match=r"left out a picture .*d\.heic"):
        assert list(read_photos(tmp_path, (3, 8, 8), None).names) == ["a.JFIF", "b.tiff", "c"]
