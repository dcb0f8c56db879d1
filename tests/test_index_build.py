"""Jobs that build databases, against a plain loop over the images."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from command import nndefense
from helpers import DIGITS, digits, trained, untrained
from PIL import Image

from index_build import build_database, build_databases, stages
from index_build.mapper import Mapper
from index_build.reader import read
from nndefense.database import ImageDatabase, neighbor_weights
from nndefense.datasets import ImageDataset, open_dataset
from nndefense.datasets.arrays import ArrayDataset
from nndefense.errors import DatabaseError, DataError, InputError, ModelError
from nndefense.features import FeatureSpec, fit_pca, pool
from nndefense.models import build_classifier
from nndefense.models.class_names import imagenet_classes

SPECS = (
    FeatureSpec("block2", "avg", pca=0),
    FeatureSpec("block2", "grid2", pca=16),
    FeatureSpec("block1", "rmac", pca=8, whiten=True, normalize=True),
    FeatureSpec("fc", "avg", pca=64),
)


def few(count: int = 90) -> ImageDataset:
    return digits("train").subset(np.arange(count))


def features_of(database: ImageDatabase) -> torch.Tensor:
    return torch.from_numpy(np.array(database._table.slice("features", 0, len(database))))


def build(dataset: ImageDataset, feature: FeatureSpec, out: Path, **options) -> ImageDatabase:
    return build_database(dataset, trained(), feature, out, progress=False, **options)


@pytest.mark.parametrize("feature", SPECS, ids=str)
def test_rows_are_those_of_a_plain_loop(tmp_path, feature):
    dataset = few()
    database = build(dataset, feature, tmp_path, batch_size=32, specs=["digits:train[:90]"])
    kept: list[torch.Tensor] = []
    handle = trained().net.get_submodule(feature.layer).register_forward_hook(lambda m, a, out: kept.append(out))
    posteriors, labels = [], []
    with torch.no_grad():
        for i in range(len(dataset)):
            image, label = dataset[i]
            posteriors.append(trained()(image[None]).softmax(1)[0])
            labels.append(label)
    handle.remove()
    raw = torch.cat([pool(activation, feature.pooling) for activation in kept])
    pca = fit_pca(raw, feature)
    expected = raw if pca is None else pca(raw)
    if feature.normalize:
        expected = expected / expected.norm(dim=1, keepdim=True)
    assert torch.allclose(features_of(database), expected, atol=1e-3)
    assert torch.allclose(database.posteriors(np.arange(90)), torch.stack(posteriors), atol=1e-5)
    assert database.labels(np.arange(90)).tolist() == labels
    assert database.ids(np.arange(90)) == list(dataset.ids)
    stored = database.weights(np.arange(90), "cbw-d")
    assert torch.equal(stored, neighbor_weights(database.posteriors(np.arange(90)), "cbw-d"))
    assert database.feature == feature
    assert database.manifest.data == {
        "name": dataset.name,
        "fingerprint": dataset.fingerprint,
        "specs": ["digits:train[:90]"],
    }
    database.verify()
    # A query takes the same way as the rows did.
    extractor = ImageDatabase.open(tmp_path).extractor(trained())
    with torch.no_grad():
        assert torch.allclose(extractor(dataset.batch(np.arange(90))[0]), features_of(database), atol=1e-4)


def test_several_features_in_one_pass_are_those_of_separate_builds(tmp_path):
    passes = []
    handle = trained().register_forward_pre_hook(lambda module, args: passes.append(len(args[0])))
    together = build_databases(
        few(), trained(), {tmp_path / f"all{i}": spec for i, spec in enumerate(SPECS)}, batch_size=30, progress=False
    )
    handle.remove()
    # Three images show how layers are laid out, in both stages, one the lengths; then the PCA's sample (here: all),
    # then the rows; for all features at once.
    assert passes == [3, 1, 30, 30, 30, 3, 30, 30, 30]
    for i, (spec, database) in enumerate(zip(SPECS, together, strict=True)):
        alone = build(few(), spec, tmp_path / f"one{i}", batch_size=30)
        assert alone.fingerprint == database.fingerprint, spec
        assert database.feature == spec


def test_two_builds_are_the_same_to_the_byte_and_the_seed_draws_the_sample(tmp_path):
    first, second, other = (
        build(few(), SPECS[1], tmp_path / str(i), pca_sample=40, seed=seed) for i, seed in enumerate((0, 0, 1))
    )
    assert first.fingerprint == second.fingerprint
    assert other.fingerprint != first.fingerprint
    assert torch.equal(features_of(first), features_of(second))


def test_batch_size_changes_nothing_but_rounding(tmp_path):
    one, many = (build(few(40), SPECS[0], tmp_path / str(size), batch_size=size) for size in (1, 64))
    assert torch.allclose(features_of(one), features_of(many), atol=1e-5)
    assert one.ids(np.arange(40)) == many.ids(np.arange(40))


def test_labels_are_mapped_by_the_names_of_classes(tmp_path):
    source = few(30)
    pictures = source.batch(np.arange(30))[0].numpy()
    # The same digits under other numbers; every third is unknown.
    names = ("7", "3", "0", "1", "2", "4", "5", "6", "8", "9")
    labels = [-1 if i % 3 == 0 else names.index(DIGITS[label]) for i, label in enumerate(source.labels)]
    database = build(ArrayDataset(pictures, labels, name="renumbered", classes=names), SPECS[0], tmp_path / "a")
    expected = [-1 if i % 3 == 0 else int(label) for i, label in enumerate(source.labels)]
    assert database.labels(np.arange(30)).tolist() == expected
    # Some of the classes are enough, and so are none at all where every label is unknown.
    fewer = ArrayDataset(pictures[:2], [0, 1], name="two", classes=("9", "4"))
    assert build(fewer, SPECS[0], tmp_path / "b").labels(np.arange(2)).tolist() == [9, 4]
    unlabelled = ArrayDataset(pictures[:2], [-1, -1], name="web", classes=())
    assert build(unlabelled, SPECS[0], tmp_path / "c").labels(np.arange(2)).tolist() == [-1, -1]
    # Retrieval uses no labels: classes that the net does not know stop nothing, nor do two that it would take for one.
    zoo = ArrayDataset(pictures[:5], [0, 1, 2, 3, -1], name="zoo", classes=("zebra", "7", "3", " 3"))
    with pytest.warns(UserWarning, match=r"3 of the 4 classes of zoo \(such as 'zebra'\).*without a label.*: 4$"):
        stored = build(zoo, SPECS[0], tmp_path / "d")
    assert stored.labels(np.arange(5)).tolist() == [-1, 7, -1, -1, -1]
    with pytest.raises(ModelError, match="'3' shares the classifier's class"):
        trained().label_map(zoo.classes)


@pytest.mark.filterwarnings("error")
def test_folders_of_wnids_are_labels_of_a_net_of_imagenets_names(tmp_path):
    pictures = few(3).batch(np.arange(3))[0].numpy()
    net = build_classifier("small-cnn", input_shape=(1, 8, 8), classes=[name for _, name in imagenet_classes()], seed=0)
    folders = ArrayDataset(pictures, [0, 1, 2], name="folders", classes=("n02102040", "n01440764", "n15075141"))
    database = build_database(folders, net, SPECS[0], tmp_path / "db", progress=False)
    assert database.labels(np.arange(3)).tolist() == [217, 0, 999]


def test_an_empty_data_set_and_settings_that_make_no_build(tmp_path):
    with pytest.raises(DataError, match="is empty: there is nothing to build"):
        build(few(0), SPECS[0], tmp_path / "x")
    for options in ({"batch_size": 0}, {"pca_sample": 1}):
        with pytest.raises(InputError, match="batch size of at least 1"):
            build(few(5), SPECS[0], tmp_path / "x", **options)
    with pytest.raises(InputError, match="needs at least 17 images"):
        build(few(16), SPECS[1], tmp_path / "x")
    with pytest.raises(InputError, match="no layer 'layer9'"):
        build(few(5), FeatureSpec("layer9"), tmp_path / "x")
    with pytest.raises(InputError, match="Flatt"):
        build(few(5), SPECS[0], tmp_path / "y", index="Flatt")
    assert not (tmp_path / "x").exists()
    assert not (tmp_path / "y").exists()


def test_an_occupied_folder_is_refused_before_any_work(tmp_path):
    old = build(few(5), SPECS[0], tmp_path / "b")
    passes = []
    handle = trained().register_forward_pre_hook(lambda *_: passes.append(1))
    with pytest.raises(DatabaseError, match="already holds a database"):
        build_databases(few(5), trained(), {tmp_path / "a": SPECS[0], tmp_path / "b": SPECS[0]}, progress=False)
    handle.remove()
    assert not passes
    assert not (tmp_path / "a").exists()
    assert ImageDatabase.open(tmp_path / "b").fingerprint == old.fingerprint
    assert len(build(few(6), SPECS[0], tmp_path / "b", overwrite=True)) == 6


def folder_of_digits(root: Path, count: int) -> Path:
    """An image folder of PNG files."""
    source = few(count)
    for i in range(count):
        image, label = source[i]
        home = root / str(label)
        home.mkdir(parents=True, exist_ok=True)
        Image.fromarray((image[0].numpy() * 255).round().astype(np.uint8)).save(home / f"{i:03d}.png")
    return root


@pytest.mark.parametrize("pca", [0, 4])
@pytest.mark.parametrize("overwrite", [False, True])
def test_a_corrupt_image_is_named_and_leaves_nothing_that_opens(tmp_path, pca, overwrite):
    root = folder_of_digits(tmp_path / "pictures", 40)
    dataset = open_dataset(f"imagefolder:{root}", channels=1)
    out = tmp_path / "database"
    before = None
    if overwrite:
        before = build(dataset, SPECS[0], out).fingerprint
    broken = root / dataset.ids[33]
    broken.write_bytes(broken.read_bytes()[:60])
    with pytest.raises(DataError, match=broken.name) as error:
        build(dataset, FeatureSpec("block2", pca=pca), out, batch_size=8, overwrite=overwrite, max_rejected=0)
    assert "\n" not in str(error.value)
    if overwrite and pca:
        # The PCA's sample met it before anything was replaced.
        assert ImageDatabase.open(out).fingerprint == before
    else:
        with pytest.raises(DatabaseError):
            ImageDatabase.open(out)


def test_an_image_folder_keeps_its_paths_as_ids(tmp_path):
    root = folder_of_digits(tmp_path / "pictures", 12)
    (root / "0" / "größe 猫.png").write_bytes((next((root / "0").iterdir())).read_bytes())
    dataset = open_dataset(f"imagefolder:{root}", channels=1)
    database = build(dataset, SPECS[0], tmp_path / "database", batch_size=5)
    assert database.ids(np.arange(13)) == list(dataset.ids)
    assert any("größe 猫.png" in name for name in database.ids(np.arange(13)))
    assert database.labels(np.arange(13)).tolist() == [int(dataset.classes[label]) for label in dataset.labels]


def test_a_classifier_that_gives_nan(tmp_path):
    classifier = copy.deepcopy(trained())
    with torch.no_grad():
        classifier.net.block1[0].weight[0].fill_(float("nan"))
    for i, feature in enumerate((FeatureSpec("block2", pca=0), FeatureSpec("block2", pca=4))):
        with pytest.raises(InputError, match="NaN or infinite") as error:
            build_database(few(20), classifier, feature, tmp_path / str(i), progress=False)
        assert "\n" not in str(error.value)
        with pytest.raises(DatabaseError):
            ImageDatabase.open(tmp_path / str(i))


def test_a_classifier_in_training_is_mapped_as_trained(tmp_path):
    classifier = copy.deepcopy(trained()).train()
    database = build_database(few(20), classifier, SPECS[0], tmp_path / "a", progress=False)
    assert database.fingerprint == build(few(20), SPECS[0], tmp_path / "b").fingerprint
    ImageDatabase.open(tmp_path / "a", classifier=trained())


def test_mapper_checks_images_and_reader_keeps_order():
    mapper = Mapper(untrained(), SPECS[:1], torch.device("cpu"))
    with pytest.raises(InputError, match=r"must lie in \[0, 1\]"):
        mapper(torch.full((1, 1, 8, 8), 2.0))
    with pytest.raises(InputError, match="colour"):
        mapper(torch.zeros(1, 3, 8, 8))
    dataset = few(10)
    batches = list(read(dataset, np.array([9, 0, 3, 3, 1]), 4))
    assert [list(batch.ids) for batch in batches] == [[dataset.ids[i] for i in (9, 0, 3, 3)], [dataset.ids[1]]]
    assert torch.equal(batches[0].images, dataset.batch([9, 0, 3, 3])[0])
    assert not list(read(dataset, np.array([], dtype=int), 4))
    assert sum(len(batch.ids) for batch in read(dataset, np.arange(10), 3)) == 10


# -- rows of noisy images


def test_noise_is_one_draw_of_seed_and_position_whatever_the_shards_and_labels_and_ids_stay(tmp_path):
    dataset, feature = few(40), FeatureSpec("block2", "grid2", pca=8)
    plain = build(dataset, feature, tmp_path / "plain", batch_size=8)
    one = build(dataset, feature, tmp_path / "one", batch_size=8, row_noise=0.25)
    many = build(dataset, feature, tmp_path / "many", batch_size=8, row_noise=np.float64(0.25), shard_rows=16)
    assert torch.equal(features_of(one), features_of(many))
    batches = [batch.under_noise(0.25, 0) for batch in read(dataset, np.arange(40), 8)]
    alone = next(read(dataset, np.array([23]), 1)).under_noise(0.25, 0)
    assert torch.equal(alone[0], torch.cat(batches)[23])
    clean = dataset.batch(np.arange(40))[0]
    inner = torch.cat(batches)[(clean > 0.4) & (clean < 0.6)] - clean[(clean > 0.4) & (clean < 0.6)]
    assert float(inner.std()) == pytest.approx(0.23, abs=0.04)
    with torch.no_grad():
        wanted = torch.cat([one.extractor(trained())(batch) for batch in batches])
        posteriors = trained()(torch.cat(batches)).softmax(1)
    torch.testing.assert_close(features_of(one), wanted, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(one.posteriors(one.row_numbers), posteriors, rtol=1e-4, atol=1e-4)
    assert one.ids(one.row_numbers) == plain.ids(plain.row_numbers)
    assert torch.equal(one.labels(one.row_numbers), plain.labels(plain.row_numbers))
    other = build(dataset, feature, tmp_path / "other", batch_size=8, row_noise=0.25, seed=1)
    assert not torch.allclose(other.posteriors(other.row_numbers), posteriors, atol=1e-2)


def test_the_manifest_has_the_noise_under_its_checksum_and_only_where_there_is_some(tmp_path):
    build(few(20), FeatureSpec("block1", pca=0), tmp_path / "plain", row_noise=0)
    noisy = build(few(20), FeatureSpec("block1", pca=0), tmp_path / "noisy", row_noise=0.12)
    assert "row_noise" not in ImageDatabase.open(tmp_path / "plain").manifest.build
    assert noisy.manifest.build["row_noise"] == 0.12
    told = nndefense("index", "info", tmp_path / "noisy")
    assert "row noise  0.12 (standard deviation, in pixels of [0, 1])" in told.out.splitlines()
    assert json.loads(nndefense("index", "info", tmp_path / "plain", "--json").out)["row_noise"] == 0
    manifest = tmp_path / "noisy" / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"row_noise": 0.12', '"row_noise": 0.25'))
    with pytest.raises(DatabaseError, match="has changed since it was written"):
        ImageDatabase.open(tmp_path / "noisy")


@pytest.mark.parametrize("value", [-0.1, float("nan"), float("inf"), "0.1", None])
def test_noise_that_is_no_standard_deviation_is_refused(tmp_path, value):
    with pytest.raises(InputError, match=r"row noise is .* standard deviation of at least 0"):
        build(few(20), FeatureSpec("block1", pca=0), tmp_path / "db", row_noise=value)
    assert not (tmp_path / "db" / "job.json").exists()


def test_an_unfinished_build_goes_on_with_its_own_noise_alone(tmp_path):
    settings = {"progress": False, "batch_size": 8}
    feature, whole = FeatureSpec("block1", pca=4), build(few(20), FeatureSpec("block1", pca=4), tmp_path / "whole",
                                                         batch_size=8, row_noise=0.1)  # fmt: skip
    stages.extract(few(20), trained(), feature, tmp_path / "db", row_noise=0.1, **settings)
    for other in ({}, {"row_noise": 0.2}):
        with pytest.raises(DatabaseError, match=r"other settings \(row noise 0\.1, now"):
            build_database(few(20), trained(), feature, tmp_path / "db", **other, **settings)
    again = build_database(few(20), trained(), feature, tmp_path / "db", row_noise=0.1, **settings)
    assert again.fingerprint == whole.fingerprint
