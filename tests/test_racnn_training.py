"""Training RA-CNN: who its neighbours are, that it learns, repeats and resumes, and its command."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import digits, images, trained, untrained

from index_build import build_database
from nndefense.cli.app import build
from nndefense.database import ImageDatabase
from nndefense.datasets import concatenate, open_dataset
from nndefense.datasets.arrays import ArrayDataset
from nndefense.defenses import RaCnnDefense
from nndefense.errors import DatabaseError, DataError, InputError, ModelError
from nndefense.evaluation.racnn import measure_racnn
from nndefense.features import FeatureSpec
from nndefense.models import ARCHITECTURES, build_classifier, load_classifier, save_classifier
from nndefense.models.racnn import attentive, features_of, load_racnn
from nndefense.pipeline import check_not_in_database
from nndefense.training import Batch, TrainingSettings, neighbors
from nndefense.training.batches import EpochBatches
from nndefense.training.launcher import Team
from nndefense.training.neighbors import nearest_others, row_images
from nndefense.training.racnn import RetrievalAugmented, local_mixup, train_racnn

FEATURE = FeatureSpec("block2", "grid4", pca=48)
ROWS = 300
QUICK: dict[str, Any] = {
    "arch": "strided-cnn", "k": 3, "epochs": 2, "batch_size": 50, "device": "cpu", "progress": False
}  # fmt: skip


@pytest.fixture(scope="module")
def database(tmp_path_factory) -> ImageDatabase:
    """The first 300 training digits."""
    rows = digits("train").subset(range(ROWS))
    spec = [f"digits:train[:{ROWS}]"]
    return build_database(rows, trained(), FEATURE, tmp_path_factory.mktemp("d"), specs=spec, progress=False)


def few(count: int = 150):
    return digits("train").subset(range(count))


# -- neighbours --------------------------------------------------------------------------------------------------------


def test_an_image_is_not_among_its_neighbours(database):
    # 200 that stand in the database, and 100 that do not.
    dataset = digits("train").subset(range(100, 400))
    found = nearest_others(trained(), database, dataset, 4)
    assert found.shape == (300, 4)
    vectors = database.extractor(trained())(dataset.batch(range(300))[0]).detach()
    rows = database.features(database.row_numbers)
    apart = torch.cdist(vectors.double(), rows.double())
    apart[torch.arange(200), torch.arange(100, 300)] = torch.inf
    wanted = apart.topk(4, largest=False)
    # Equal distances may change places: compare distances.
    assert torch.allclose(apart.gather(1, found), wanted.values, atol=1e-4)
    names = database.ids(found)
    assert all(dataset.ids[i] not in names[4 * i : 4 * i + 4] for i in range(300))


def test_the_fast_search_and_the_index_find_the_same(database, monkeypatch):
    fast = nearest_others(trained(), database, few(100), 4)
    monkeypatch.setattr(neighbors, "_HELD_BYTES", 0)
    assert torch.equal(nearest_others(trained(), database, few(100), 4), fast)
    monkeypatch.undo()
    # An index that is not exact is asked itself, since predictions will ask it.
    rows, out = digits("train").subset(range(ROWS)), database.path.parent / "coarse"
    coarse = build_database(rows, trained(), FEATURE, out, index="SQ4", progress=False)
    asked = []
    monkeypatch.setattr(coarse, "search", lambda *given: asked.append(given) or ImageDatabase.search(coarse, *given))
    found = nearest_others(trained(), coarse, few(100), 4)
    assert asked
    assert not torch.equal(found, fast)


def test_a_copy_under_another_name_is_left_out_too(database):
    pictures = few(60).batch(range(60))[0].numpy()
    copies = ArrayDataset(pictures, few(60).labels, name="copies", classes=digits("train").classes)
    own = nearest_others(trained(), database, few(60), 3)
    assert torch.equal(nearest_others(trained(), database, copies, 3), own)
    # With four copies of everything as rows, the first place beside the copies is still found.
    crowd = concatenate([
        ArrayDataset(pictures, few(60).labels, name=f"crowd{i}", classes=digits("train").classes) for i in range(4)
    ])  # fmt: skip
    rows = build_database(crowd, trained(), FEATURE, database.path.parent / "crowd", progress=False)
    found = nearest_others(trained(), rows, copies, 3)
    assert bool((found % 60 != torch.arange(60)[:, None]).all())


def test_more_neighbours_than_there_are(database):
    with pytest.raises(InputError, match="lower k"):
        nearest_others(trained(), database, few(20), ROWS)
    with pytest.raises(InputError, match="k is 0"):
        nearest_others(trained(), database, few(20), 0)
    assert nearest_others(trained(), database, few(20), ROWS - 1).shape == (20, ROWS - 1)


def test_the_rows_images_are_found_by_id_and_looked_at(database):
    rows = row_images(trained(), database)
    assert list(rows.ids) == database.ids(database.row_numbers)
    # From a larger set in another order.
    shuffled = digits("train").subset(np.random.default_rng(0).permutation(len(digits("train"))))
    again = row_images(trained(), database, shuffled)
    assert torch.equal(again.batch(range(ROWS))[0], rows.batch(range(ROWS))[0])
    with pytest.raises(DataError, match="no image with id"):
        row_images(trained(), database, digits("test"))
    wrong = ArrayDataset(
        digits("train").batch(range(ROWS))[0].flip(0).numpy(), digits("train").labels[:ROWS], name="wrong",
        classes=digits("train").classes, ids=list(rows.ids),
    )  # fmt: skip
    with pytest.raises(DataError, match="are not those"):
        row_images(trained(), database, wrong)
    with pytest.raises(InputError, match="whole database"):
        row_images(trained(), database.subset(np.arange(10)))


def test_rows_of_unknown_origin_need_their_images(tmp_path):
    rows = build_database(few(40), trained(), FeatureSpec("block2"), tmp_path / "d", progress=False)
    with pytest.raises(DataError, match="give the data set"):
        row_images(trained(), rows)
    assert len(row_images(trained(), rows, digits("train"))) == 40


# -- the objective -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [None, 4])
def test_batches_know_which_images_they_hold(steps):
    dataset = few(100)
    settings = TrainingSettings(epochs=2, batch_size=30, steps_per_epoch=steps)
    batches = EpochBatches(dataset, torch.from_numpy(dataset.labels), settings, Team(torch.device("cpu")))
    everything, _ = dataset.batch(range(100))
    seen = []
    for share in batches.epoch(1):
        assert share.batch.rows is not None
        assert torch.equal(everything[share.batch.rows], share.batch.images)
        seen += share.batch.rows.tolist()
    assert sorted(seen) == list(range(100)) if steps is None else len(seen) == 120


def test_the_loss_is_that_of_the_projection_and_of_local_mixup(database):
    net = build_classifier("ra-strided-cnn", input_shape=(1, 8, 8), classes=digits("train").classes, seed=1)
    near = nearest_others(trained(), database, few(40), 3)
    labels = database.labels(database.row_numbers)
    x, y = few(40).batch([7, 2, 30])
    batch = Batch(x, y, rows=torch.tensor([7, 2, 30]))
    objective = RetrievalAugmented(near, row_images(trained(), database), labels, draws=4, weight=0.5)
    torch.manual_seed(3)
    outcome = objective(net, batch, None)
    pictures = digits("train").batch(near[[7, 2, 30]].flatten())[0]
    neighbors = features_of(net, pictures).view(3, 3, -1)
    logits = attentive(net).answer(features_of(net, x), neighbors)
    torch.manual_seed(3)
    targets = torch.nn.functional.one_hot(labels[near[[7, 2, 30]]], 10)
    mixed = local_mixup(attentive(net).g, neighbors, targets, 4)
    wanted = torch.nn.functional.cross_entropy(logits, y) + 0.5 * mixed
    assert float(outcome.loss.detach()) == pytest.approx(float(wanted.detach()), rel=1e-5)
    assert outcome.clean is not None
    assert torch.allclose(outcome.clean, logits, atol=1e-5)
    # All three parts learn, phi from the image's side and from the neighbours'.
    outcome.loss.backward()
    assert all(float(weight.grad.abs().max()) > 0 for weight in net.parameters() if weight.grad is not None)
    assert all(weight.grad is not None for weight in net.parameters())
    plain = RetrievalAugmented(near, row_images(trained(), database), labels, weight=0.0)(net, batch, None)
    projected_loss = torch.nn.functional.cross_entropy(logits, y)
    assert float(plain.loss.detach()) == pytest.approx(float(projected_loss.detach()), rel=1e-5)
    with pytest.raises(InputError, match="training set"):
        objective(net, Batch(x, y), None)
    with pytest.raises(ModelError, match="no attention"):
        objective(untrained(), batch, None)


@pytest.mark.parametrize("options", [{"draws": 0}, {"draws": 1.5}, {"weight": -1.0}, {"weight": float("nan")}])
def test_an_objective_that_cannot_be(options):
    with pytest.raises(InputError):
        RetrievalAugmented(torch.zeros(1, 2, dtype=torch.int64), few(), torch.zeros(5, dtype=torch.int64), **options)


def test_rows_without_labels_are_no_target_but_may_be_neighbours():
    near, labels = torch.tensor([[0, 1]]), torch.tensor([4, -1, -1])
    with pytest.raises(InputError, match="some rows of the database have none"):
        RetrievalAugmented(near, few(3), labels)
    RetrievalAugmented(near, few(3), labels, weight=0.0)
    # A row that is nobody's neighbour needs none.
    RetrievalAugmented(torch.tensor([[0]]), few(3), labels)


# -- training ----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_it_learns_the_digits(database):
    history = []
    found = train_racnn(
        trained(), database, digits("train"), k=5, arch="small-cnn", epochs=3, batch_size=64, device="cpu",
        progress=False, on_epoch=history.append,
    )  # fmt: skip
    defense = RaCnnDefense(trained(), database, found)
    x, y = images("test", 500)
    right = (defense(x).argmax(1) == y).double().mean()
    assert float(right) > 0.93
    # What the history calls accuracy leaves every image out of its own neighbours, and so tells the same.
    assert abs(history[-1]["accuracy"] - float(right)) < 0.05
    assert history[-1]["mixup_loss"] < history[0]["mixup_loss"]
    assert history[-1]["projected_loss"] < history[0]["projected_loss"]
    assert found.net.info["objective"].startswith("ra-cnn(k=5, draws=5, weight=1.0, database=")


def test_seeds_repeat_and_differ(database):
    one, two, other, heavier = (
        train_racnn(trained(), database, few(), **{**QUICK, **change})
        for change in ({}, {}, {"seed": 1}, {"mixup_weight": 3.0})
    )
    rows = torch.arange(ROWS)
    assert one.net.fingerprint == two.net.fingerprint
    assert torch.equal(one.table.take(rows), two.table.take(rows))
    assert other.net.fingerprint != one.net.fingerprint != heavier.net.fingerprint


class Stopped(Exception):
    """The training is interrupted here."""


def test_killed_and_resumed_it_is_the_same(database, tmp_path):
    straight = train_racnn(trained(), database, few(), out=tmp_path / "a", **QUICK)

    def stop(row: dict[str, Any]) -> None:
        raise Stopped

    out = tmp_path / "b"
    with pytest.raises(Stopped):
        train_racnn(trained(), database, few(), out=out, on_epoch=stop, **QUICK)
    with pytest.raises(ModelError, match="no finished RA-CNN"):
        load_racnn(out)
    with pytest.raises(InputError, match="not finished"):
        train_racnn(trained(), database, few(), out=out, **QUICK)
    with pytest.raises(InputError, match="objective"):
        train_racnn(trained(), database, few(), out=out, resume=True, **{**QUICK, "k": 4})
    resumed = train_racnn(trained(), database, few(), out=out, resume=True, **QUICK)
    assert resumed.net.fingerprint == straight.net.fingerprint
    assert torch.equal(resumed.table.take(torch.arange(ROWS)), straight.table.take(torch.arange(ROWS)))
    # Killed between the net and the table: resuming writes the table.
    (out / "racnn.json").unlink()
    train_racnn(trained(), database, few(), out=out, resume=True, **QUICK)
    assert load_racnn(out).net.fingerprint == straight.net.fingerprint
    # A finished one is given back as it is.
    before = (out / "racnn.json").read_bytes()
    train_racnn(trained(), database, few(), out=out, resume=True, **QUICK)
    assert (out / "racnn.json").read_bytes() == before
    with pytest.raises(InputError, match="already holds an RA-CNN"):
        train_racnn(trained(), database, few(), out=out, **QUICK)
    train_racnn(trained(), database, few(), out=out, overwrite=True, **{**QUICK, "k": 4})
    assert load_racnn(out).k == 4


def test_a_table_in_several_files(database, tmp_path, monkeypatch):
    from nndefense.models import racnn

    whole = train_racnn(trained(), database, few(), **QUICK)
    monkeypatch.setattr(racnn, "_SHARD_BYTES", 128 * 4 * 70)
    parts = train_racnn(trained(), database, few(), out=tmp_path / "a", **QUICK)
    assert [len(shard) for shard in parts.table.shards] == [70, 70, 70, 70, 20]
    assert torch.equal(parts.table.take(torch.arange(ROWS)), whole.table.take(torch.arange(ROWS)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"k": 0}, "k is 0"),
        ({"k": ROWS}, "lower k"),
        ({"arch": "resnet"}, "no architecture"),
        ({"mixup_weight": -1.0}, "weight of local mixup"),
        ({"mixup_draws": 0}, "draws"),
        ({"keep_best": True}, "no keep best"),
        ({"patience": 3}, "no patience"),
        ({"lr": -1.0}, "learning rate"),
        ({"resume": True}, "--out"),
    ],
)
def test_trainings_that_cannot_be(database, options, message):
    with pytest.raises(InputError, match=message):
        train_racnn(trained(), database, few(), **{**QUICK, **options})


def test_a_database_of_another_classifier(database):
    with pytest.raises(DatabaseError, match="another classifier"):
        train_racnn(untrained(), database, few(), **QUICK)


def test_every_architecture_has_one_with_attention():
    plain = [name for name in ARCHITECTURES if not name.startswith(("ra-", "nn-"))]
    assert [name for name in ARCHITECTURES if name.startswith("ra-")] == [f"ra-{name}" for name in plain]
    with torch.device("meta"):
        for name in plain:
            net = ARCHITECTURES[f"ra-{name}"].build((3, 32, 32), 7)
            assert net(torch.rand(2, 3, 32, 32)).shape == (2, 7)


# -- the command -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def words(database, tmp_path_factory) -> list[str]:
    """Where classifier and database are, as options."""
    folder = tmp_path_factory.mktemp("c") / "classifier"
    save_classifier(trained(), folder)
    return ["--classifier", str(folder), "--database", str(database.path), "--device", "cpu", "--quiet"]


def test_only_the_images_themselves_are_refused_not_their_namesakes(database):
    defense = RaCnnDefense(trained(), database, train_racnn(trained(), database, few(50), **{**QUICK, "epochs": 1}))
    pictures, labels = digits("test").batch(range(20))
    namesakes = ArrayDataset(
        pictures.numpy(), labels, name="namesakes", classes=digits("test").classes, ids=list(few(20).ids)
    )
    check_not_in_database(namesakes, defense)
    assert measure_racnn(defense, namesakes, ())["clean"]["ra-cnn"]["n"] == 20
    with pytest.raises(DataError, match="stand in the database"):
        check_not_in_database(few(20), defense)


def run(*given: object) -> None:
    build()(["racnn", *map(str, given)], standalone_mode=False)


def test_train_and_evaluate(words, tmp_path, capsys):
    out, figures = tmp_path / "racnn", tmp_path / "figures.json"
    run("train", "--dataset", f"digits:train[:{ROWS}]", *words, "--out", out, "--k", 3, "--epochs", 3, "--json",
        "--arch", "strided-cnn", "--mixup-weight", 0.5, "--mixup-draws", 2, "--batch-size", 50)  # fmt: skip
    told = json.loads(capsys.readouterr().out)
    assert told["objective"].startswith("ra-cnn(k=3, draws=2, weight=0.5")
    assert told["rows"] == ROWS
    assert load_classifier(out / "net").fingerprint == told["fingerprint"]
    run("evaluate", "--model", out, "--dataset", "digits:test[:60]", *words, "--attacked", 20, "--eps", "0.1,0.3",
        "--steps", 5, "--out", figures, "--batch-size", 15)  # fmt: skip
    text = capsys.readouterr().out
    found = json.loads(figures.read_text())
    assert found["clean"]["ra-cnn"]["n"] == 60
    classifier = load_classifier(words[1])
    defense = RaCnnDefense.load(out, classifier, ImageDatabase.open(words[3], classifier=classifier))
    x, y = open_dataset("digits:test[:60]").batch(range(60))
    assert found["clean"]["ra-cnn"]["accuracy"] == float((defense(x).argmax(1) == y).double().mean())
    rates = {(row["eps"], row["attack"]): row["accuracy"] for row in found["attacked"]}
    assert all(row["n"] == 20 for row in found["attacked"])
    assert {name for _, name in rates} == {
        "undefended", "no retrieval", "held", "fresh", "soft", "straight-through", "apgd", "adaptive", "worst"
    }  # fmt: skip
    for eps in (0.1, 0.3):
        assert rates[eps, "worst"] <= min(
            rate for (e, name), rate in rates.items() if e == eps and name != "undefended"
        )
    assert rates[0.3, "worst"] <= rates[0.1, "worst"]
    assert rates[0.3, "undefended"] < 0.2
    assert "RA-CNN, clean" in text
    assert text.count("worst of all, image by image") == 2


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        (["--dataset", "digits:train[:40]"], DataError, "stand in the database"),
        (["--dataset", "digits:test[:5]", "--model", "nowhere"], ModelError, "no finished RA-CNN"),
        (["--dataset", "digits:test[:5]", "--out", "no/such/folder/f.json"], InputError, "no folder"),
        (["--dataset", "digits:test[:5]", "--eps", "much"], InputError, "not a list of numbers"),
        (["--dataset", "digits:test[:5]", "--eps", "-1", "--no-adaptive"], InputError, "eps"),
    ],
)
def test_mistakes(words, tmp_path_factory, given, error, message):
    out = tmp_path_factory.getbasetemp() / "mistakes"
    if not (out / "racnn.json").exists():
        run("train", "--dataset", "digits:train[:60]", *words, "--out", out, "--k", 2, "--epochs", 1, "--arch",
            "strided-cnn", "--batch-size", 30)  # fmt: skip
    with pytest.raises(error, match=message):
        run("evaluate", "--model", out, *words, *given)


def test_a_net_is_no_racnn_by_itself(tmp_path: Path):
    save_classifier(untrained(), tmp_path)
    with pytest.raises(ModelError, match="no finished RA-CNN"):
        load_racnn(tmp_path)
