"""Vectors that other programs have made become a database, and its rows such files again."""

from __future__ import annotations

import pickle
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from command import fails, nndefense
from helpers import BLOCK2, digits, table, untrained

from index_build import build_database
from index_build.vectors import export_vectors, import_vectors
from nndefense.database import ImageDatabase
from nndefense.errors import DatabaseError, DataError, InputError, ModelError
from nndefense.pipeline import open_classifier

arrow = pytest.importorskip("pyarrow")
parquet = pytest.importorskip("pyarrow.parquet")


def clip_folder(root: Path, data, sizes=(7, 12)) -> tuple[Path, Path]:
    """Folders as img2dataset and clip-retrieval leave them; the tenth file comes after the second."""
    first = 0
    for number, size in zip((2, 10), sizes, strict=True):
        part = data.cut(first, first + size)
        for name in ("img_emb", "metadata"):
            (root / name).mkdir(parents=True, exist_ok=True)
        np.save(root / "img_emb" / f"img_emb_{number}.npy", part.features.numpy().astype(np.float16))
        labels = [None if label < 0 else f"class {label}" for label in part.labels.tolist()]
        rows = arrow.table({"image_path": list(part.ids), "label": labels, "caption": ["x"] * size})
        parquet.write_table(rows, root / "metadata" / f"metadata_{number}.parquet")
        first += size
    return root / "img_emb", root / "metadata"


def test_numbered_files_with_metadata_become_rows_in_their_order(tmp_path):
    data = table(19)
    vectors, metadata = clip_folder(tmp_path, data)
    out = tmp_path / "db"
    made = import_vectors(vectors, out, metadata=metadata)
    rows = np.arange(19)
    assert made.ids(rows) == list(data.ids)
    assert torch.equal(made.features(rows), data.features.half().float())
    names = [made.classes[label] if label >= 0 else None for label in made.labels(rows).tolist()]
    assert names == [f"class {label}" if label >= 0 else None for label in data.labels.tolist()]
    found = made.posteriors(rows)
    for label, posterior in zip(made.labels(rows).tolist(), found, strict=True):
        expected = torch.full((len(made.classes),), 1 / len(made.classes))
        assert torch.allclose(posterior, expected if label < 0 else torch.eye(len(made.classes))[label])
    made.verify()
    assert torch.equal(made.search(made.features(rows), 1)[1][:, 0], torch.arange(19))
    # What it cannot do is said.
    with pytest.raises(DatabaseError, match="no classifier is known that makes them"):
        ImageDatabase.open(out, classifier=untrained())
    with pytest.raises(ModelError, match="searched by vectors alone"):
        open_classifier(None, database=out)
    assert "none: its vectors were imported" in nndefense("index", "info", out).out
    fails(4, "searched by vectors alone", "index", "add", out, "--dataset", "digits:test[:3]")


@pytest.mark.parametrize("form", ["npy", "parquet", "hdf5"])
def test_what_is_exported_comes_back_the_same(tmp_path, form):
    vectors, metadata = clip_folder(tmp_path / "raw", table(19))
    held = import_vectors(vectors, tmp_path / "a", metadata=metadata)
    rows, out, settings = np.arange(19), tmp_path / "files", {}
    if form == "hdf5":
        with h5py.File(tmp_path / "v.h5", "w") as file:
            file["embedding"], file["posterior"] = held.features(rows).numpy(), held.posteriors(rows).numpy()
        found, settings = tmp_path / "v.h5", {"metadata": metadata, "classes": held.classes}
    else:
        written = export_vectors(held, out, form=form)
        with pytest.raises(InputError, match="is there already"):
            export_vectors(held, out, form=form)
        found = written[0]
        if form == "npy":
            # Folders as clip-retrieval has them.
            found, posteriors, metadata = (path.parent for path in written)
            assert [place.name for place in (found, posteriors, metadata)] == ["img_emb", "posteriors", "metadata"]
            settings = {"posteriors": posteriors, "metadata": metadata}
        settings["classes"] = held.classes
    back = import_vectors(found, tmp_path / "b", **settings)
    for column in ("features", "posteriors", "labels"):
        assert torch.equal(getattr(back, column)(rows), getattr(held, column)(rows)), column
    assert back.ids(rows) == held.ids(rows)
    assert back.classes == held.classes


def test_a_classifier_is_taken_only_where_it_makes_these_vectors(tmp_path):
    images, net = digits("train").subset(np.arange(20)), untrained()
    built = build_database(images, net, BLOCK2, tmp_path / "built", progress=False, workers=1)
    files = export_vectors(built, tmp_path / "files", form="parquet")
    settings = {"classifier": net, "feature": BLOCK2, "images": images}
    made = import_vectors(files[0], tmp_path / "db", **settings)
    made.extractor(net)
    with pytest.raises(InputError, match="together with its layer and images"):
        import_vectors(files[0], tmp_path / "no", classifier=net)
    for change, message in (
        ({"classifier": untrained(1)}, "gives other vectors for the images"),
        ({"images": digits("test").subset(np.arange(5))}, "no image of .* has the id of a row"),
    ):
        with pytest.raises(DataError, match=message):
            import_vectors(files[0], tmp_path / "no", **settings | change)
    assert not (tmp_path / "no").exists()


def test_files_that_are_none_or_do_harm_are_refused_in_one_line(tmp_path):
    good = table(6).features.numpy()

    class Harm:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "ran",))

    np.save(tmp_path / "good.npy", good)
    whole = (tmp_path / "good.npy").read_bytes()
    (tmp_path / "short.npy").write_bytes(whole[:-8])
    (tmp_path / "huge.npy").write_bytes(whole.replace(b"(6, 16)", b"(9, 1e9)"[:6] + b")"))
    (tmp_path / "more.npy").write_bytes(whole.replace(b"(6, 16), }    ", b"(6, 16000000)}"))
    np.save(tmp_path / "flat.npy", good.ravel())
    np.save(tmp_path / "text.npy", np.array([["a", "b"]]))
    np.save(tmp_path / "objects.npy", np.array([[Harm()]], dtype=object), allow_pickle=True)
    (tmp_path / "pickle.npy").write_bytes(pickle.dumps(Harm()))
    (tmp_path / "noise.parquet").write_bytes(b"PAR1" + bytes(40))
    (tmp_path / "noise.h5").write_bytes(b"no HDF5")
    parquet.write_table(arrow.table({"embedding": [[1.0], [1.0, 2.0]], "id": ["a", "b"]}), tmp_path / "ragged.parquet")
    posteriors = np.full((6, 2), 0.5, dtype=np.float32)
    np.save(tmp_path / "posteriors.npy", posteriors)
    for name in ("short.npy", "huge.npy", "more.npy", "flat.npy", "text.npy", "objects.npy", "pickle.npy",
                 "noise.parquet", "noise.h5", "ragged.parquet", "missing.npy", "good.txt"):  # fmt: skip
        with pytest.raises(DataError) as error:
            import_vectors(tmp_path / name, tmp_path / "db", posteriors=tmp_path / "posteriors.npy")
        assert "\n" not in str(error.value)
    assert not (tmp_path / "ran").exists()
    assert len(import_vectors(tmp_path / "good.npy", tmp_path / "db", posteriors=tmp_path / "posteriors.npy")) == 6
    with pytest.raises(DataError, match=r"several kinds \(\.h5, \.npy, \.parquet\)"):
        import_vectors(tmp_path, tmp_path / "other")
    with pytest.raises(DataError, match=r"nothing to import: give a file that ends in \.parquet"):
        import_vectors(tmp_path / "good.npy", tmp_path / "other", metadata=tmp_path / "good.npy")
    np.save(tmp_path / "few.npy", posteriors[:5])
    for settings, message in (
        ({"posteriors": tmp_path / "few.npy"}, "fewer posteriors than vectors"),
        ({}, "nothing says which classes there are"),
    ):
        with pytest.raises((DataError, InputError), match=message):
            import_vectors(tmp_path / "good.npy", tmp_path / "other", **settings)
