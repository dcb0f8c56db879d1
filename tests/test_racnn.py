"""RA-CNN: its attention, its hull, its local mixup, its files, and what its attackers differentiate."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import DIGITS, digits, images, trained, untrained
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import optimize, stats
from torch import Tensor

from index_build import build_database
from nndefense.attacks import pgd
from nndefense.attacks.retrieval import Knowledge, run_adaptive
from nndefense.database import ImageDatabase
from nndefense.defenses import RaCnnDefense
from nndefense.errors import DatabaseError, InputError, ModelError, NNDefenseError
from nndefense.features import FeatureSpec
from nndefense.files import sealed
from nndefense.models import build_classifier, load_classifier, save_classifier
from nndefense.models.architectures.attentive import AttentiveNet, attention_scores, projected
from nndefense.models.racnn import RaCnn, RowTable, attentive, features_of, load_racnn, save_racnn
from nndefense.training.racnn import RetrievalAugmented, local_mixup, simplex_draws, train_racnn

K = 5


@pytest.fixture(scope="module")
def database(tmp_path_factory) -> ImageDatabase:
    feature = FeatureSpec("block2", "grid4", pca=48)
    out = tmp_path_factory.mktemp("database")
    return build_database(digits("train"), trained(), feature, out, specs=["digits"], progress=False)


@pytest.fixture(scope="module")
def folder(database, tmp_path_factory) -> Path:
    """A trained RA-CNN: two epochs on all training digits."""
    out = tmp_path_factory.mktemp("racnn") / "trained"
    train_racnn(
        trained(), database, digits("train"), k=K, out=out, epochs=2, batch_size=64, device="cpu", progress=False
    )
    return out


@pytest.fixture(scope="module")
def defense(folder, database) -> RaCnnDefense:
    return RaCnnDefense.load(folder, trained(), database)


@pytest.fixture(scope="module")
def batch(defense) -> tuple[Tensor, Tensor]:
    """Test digits that the defence gets right."""
    x, y = images("test", 60)
    right = defense(x).argmax(1) == y
    return x[right][:40], y[right][:40]


def accuracy(model, x: Tensor, y: Tensor) -> float:
    with torch.no_grad():
        return float((model(x).argmax(1) == y).double().mean())


def in_hull(point: np.ndarray, corners: np.ndarray, slack: float = 1e-4) -> bool:
    """Whether weights >= 0 that sum to 1 bring the corners K x d within ``slack`` of the point, by a linear program."""
    k, d = corners.shape
    # Variables: K weights, then d bounds of the error of each coordinate; their sum is what is made small.
    cost = np.concatenate([np.zeros(k), np.ones(d)])
    upper = np.block([[corners.T, -np.eye(d)], [-corners.T, -np.eye(d)]])
    sums = np.concatenate([np.ones(k), np.zeros(d)])[None]
    found = optimize.linprog(cost, A_ub=upper, b_ub=np.concatenate([point, -point]), A_eq=sums, b_eq=[1.0])
    assert found.status == 0
    return bool(found.fun <= slack * max(1.0, float(np.abs(corners).sum(1).max())))


# -- attention and projection ------------------------------------------------------------------------------------------


def test_scores_are_the_bilinear_form():
    generator = torch.Generator().manual_seed(0)
    query, near, matrix = (
        torch.randn(s, generator=generator, dtype=torch.float64) for s in ((3, 4), (3, 5, 4), (4, 4))
    )
    found = attention_scores(query, near, matrix)
    for i in range(3):
        for k in range(5):
            assert found[i, k] == pytest.approx(float(near[i, k] @ matrix @ query[i]), rel=1e-12)


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 12), st.integers(1, 8), st.integers(0, 2**31), st.floats(0.01, 30), st.sampled_from([1e-3, 1.0, 1e3])
)
def test_weights_sum_to_one_and_the_projection_lies_in_the_hull(k, d, seed, sharpness, size):
    generator = torch.Generator().manual_seed(seed)
    net = AttentiveNet(torch.nn.Identity(), d, 3)
    with torch.no_grad():
        net.matrix.copy_(torch.randn(d, d, generator=generator) * sharpness / size**2)
    query = size * torch.randn(2, d, generator=generator)
    near = size * torch.randn(2, k, d, generator=generator)
    with torch.no_grad():
        weights = net.attention(query, near)
        points = projected(weights, near)
    assert bool((weights >= 0).all())
    assert torch.allclose(weights.sum(1), torch.ones(2), atol=1e-5)
    for point, corners in zip(points.double().numpy() / size, near.double().numpy() / size, strict=True):
        assert in_hull(point, corners)
    # And the program does tell a point outside: beyond the farthest corner in some direction.
    corners = near[0].double().numpy() / size
    outside = corners[corners[:, 0].argmax()] + np.eye(d)[0] * (1 + np.abs(corners).sum())
    assert not in_hull(outside, corners)


def test_the_defence_projects_into_the_hull_of_its_own_neighbours(defense, batch):
    x, _ = batch
    # Also where the image is noise, and where it is far from everything.
    x = torch.cat([x[:4], torch.rand(2, 1, 8, 8, generator=torch.Generator().manual_seed(0)), torch.ones(1, 1, 8, 8)])
    found = defense.explain(x)
    assert found.weights.shape == (7, K)
    assert bool((found.weights >= 0).all())
    assert torch.allclose(found.weights.sum(1), torch.ones(7), atol=1e-6)
    for point, corners in zip(found.projections.double().numpy(), found.features.double().numpy(), strict=True):
        scale = np.abs(corners).max()
        assert in_hull(point / scale, corners / scale)
    assert torch.equal(found.log_probabilities, defense(x))
    assert torch.allclose(found.log_probabilities.exp().sum(1), torch.ones(7), atol=1e-5)
    distances, rows = defense.database.search(defense.extractor(x), K)
    assert torch.equal(found.rows, rows)
    assert torch.equal(found.distances, distances)
    assert found.ids == [defense.database.ids(r) for r in rows]
    # phi of the neighbours' images, computed afresh, is what the table holds.
    pictures, _ = digits("train").batch([digits("train").index_of(i) for i in found.ids[0]])
    with torch.no_grad():
        assert torch.allclose(features_of(defense.net, pictures), found.features[0], atol=1e-4)


def test_the_net_alone_is_an_image_that_is_its_own_hull(defense, batch):
    x, _ = batch
    with torch.no_grad():
        query = features_of(defense.net, x)
        assert torch.allclose(
            defense.net(x), defense.attentive.answer(query, query[:, None].expand(-1, 3, -1)), atol=1e-5
        )


# -- local mixup -------------------------------------------------------------------------------------------------------


def uniformity(draws: np.ndarray) -> float:
    """The least p-value, corrected for their number, of tests that draws n x K are uniform on the simplex.

    If they are, ``1 - (1 - a_i / rest)^(K - i)``, taken one coordinate after another, are independent uniforms
    (Rosenblatt's transformation); tested each and in pairs, together with every coordinate's own law Beta(1, K - 1).
    """
    n, k = draws.shape
    rest, uniforms = np.ones(n), []
    for i in range(k - 1):
        uniforms.append(1 - (1 - draws[:, i] / rest).clip(0, 1) ** (k - 1 - i))
        rest = (rest - draws[:, i]).clip(1e-12)
    p = [stats.kstest(u, "uniform").pvalue for u in uniforms]
    p += [stats.kstest(draws[:, i], stats.beta(1, k - 1).cdf).pvalue for i in range(k)]
    for i in range(k - 1):
        for j in range(i):
            table = np.histogram2d(uniforms[i], uniforms[j], bins=5, range=[[0, 1], [0, 1]])[0]
            p.append(stats.chisquare(table.ravel()).pvalue)
    return float(min(p) * len(p))


@pytest.mark.parametrize("k", [2, 3, 5, 10])
def test_draws_are_uniform_on_the_simplex_and_normalised_uniforms_are_not(k):
    generator = torch.Generator().manual_seed(k)
    draws = simplex_draws((4000, 5), k, generator=generator)
    assert draws.shape == (4000, 5, k)
    assert bool((draws >= 0).all())
    assert torch.allclose(draws.sum(-1), torch.ones(4000, 5), atol=1e-6)
    assert uniformity(draws.reshape(-1, k).double().numpy()) > 0.01
    wrong = torch.rand(20000, k, generator=generator).double().numpy()
    assert uniformity(wrong / wrong.sum(1, keepdims=True)) < 1e-6
    # Nor are softmaxes of normals, nor exponentials of another shape (Dirichlet(2, ..., 2)).
    assert uniformity(torch.randn(20000, k, generator=generator).softmax(1).double().numpy()) < 1e-6
    assert uniformity(np.random.default_rng(0).dirichlet([2.0] * k, 20000)) < 1e-6


def test_draws_of_one_item_and_of_none():
    assert torch.equal(simplex_draws((3, 2), 1), torch.ones(3, 2, 1))
    with pytest.raises(InputError, match="k is 0"):
        simplex_draws((3,), 0)


def test_local_mixup_is_what_it_says():
    torch.manual_seed(0)
    net = torch.nn.Linear(4, 3).double()
    near, targets = torch.randn(2, 5, 4).double(), torch.nn.functional.one_hot(torch.randint(3, (2, 5)), 3)
    torch.manual_seed(1)
    found = local_mixup(net, near, targets, 6)
    torch.manual_seed(1)
    weights = simplex_draws((2, 6), 5).double()
    total = 0.0
    for i in range(2):
        for m in range(6):
            mixed = sum(weights[i, m, k] * near[i, k] for k in range(5))
            wanted = sum(weights[i, m, k] * targets[i, k] for k in range(5))
            total -= float((wanted * net(mixed).log_softmax(0)).sum().detach())
    assert float(found.detach()) == pytest.approx(total / 12, rel=1e-9)


# -- files -------------------------------------------------------------------------------------------------------------


def test_a_table_in_shards_is_the_same_table():
    whole = torch.randn(23, 4, generator=torch.Generator().manual_seed(0))
    table = RowTable(torch.split(whole, 7))
    rows = torch.tensor([[0, 6, 7], [13, 14, 22], [22, 0, 3]])
    assert (len(table), table.dimension) == (23, 4)
    assert torch.equal(table.take(rows), whole[rows])
    assert torch.equal(RowTable([whole]).take(rows), whole[rows])
    assert table.take(rows[:0]).shape == (0, 3, 4)
    with pytest.raises(InputError, match="same number of rows"):
        RowTable([whole[:3], whole[:4], whole[:2]])
    with pytest.raises(InputError):
        RowTable([])


def test_saved_and_loaded_it_answers_alike(folder, defense, database, batch, tmp_path, monkeypatch):
    x, _ = batch
    again = RaCnnDefense.load(folder, trained(), database)
    assert torch.equal(again(x), defense(x))
    assert (again.k, again.settings()) == (K, defense.settings())
    # In many small files instead of one, read back from them.
    copied = tmp_path / "copied"
    copied.mkdir()
    shutil.copytree(folder / "net", copied / "net")
    first = load_racnn(folder)
    shards = torch.split(first.table.take(torch.arange(len(database))), 100)
    save_racnn(
        copied, first.net, shards, k=K, classifier=first.classifier, database=first.database, training=first.training
    )
    assert len(list(copied.glob("features-*.safetensors"))) == 13
    many = load_racnn(copied)
    assert torch.equal(RaCnnDefense(trained(), database, many)(x), defense(x))
    # The net is a classifier like any other.
    assert load_classifier(copied / "net").fingerprint == first.net.fingerprint
    assert not [path for path in copied.rglob("*") if path.suffix in (".pt", ".pkl", ".bin")]


def damaged(folder: Path, out: Path, what: str) -> Path:
    shutil.copytree(folder, out)
    table, told = out / "features-00000.safetensors", out / "racnn.json"
    description = json.loads(told.read_text())
    if what == "no description":
        told.unlink()
    elif what == "broken description":
        told.write_text("{")
    elif what == "of another format":
        told.write_text(json.dumps(sealed({**description, "format": "other"})))
    elif what == "of a newer version":
        told.write_text(json.dumps(sealed({**description, "version": 99})))
    elif what == "without k":
        del description["k"]
        told.write_text(json.dumps(sealed(description)))
    elif what == "k too large":
        told.write_text(json.dumps(sealed({**description, "k": 10**6})))
    elif what == "fewer rows":
        description["database"]["rows"] -= 1
        told.write_text(json.dumps(sealed(description)))
    elif what == "path out of the folder":
        description["features"][0]["file"] = "../../" + table.name
        told.write_text(json.dumps(sealed(description)))
        table.unlink()
    elif what == "table missing":
        table.unlink()
    elif what == "table cut":
        table.write_bytes(table.read_bytes()[:-100])
    elif what == "table changed":
        data = bytearray(table.read_bytes())
        data[-5] ^= 1
        table.write_bytes(bytes(data))
    elif what == "another net":
        save_classifier(build_classifier("ra-small-cnn", input_shape=(1, 8, 8), classes=DIGITS, seed=9), out / "net")
    elif what == "net missing":
        (out / "net" / "model.safetensors").unlink()
    return out


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("no description", "no finished RA-CNN"),
        ("broken description", "cannot be read"),
        ("of another format", "not of the format"),
        ("of a newer version", "format version 99"),
        ("without k", "it has no 'k'"),
        ("k too large", "k is 1000000"),
        ("fewer rows", "promises"),
        ("path out of the folder", "missing"),
        ("table missing", "missing"),
        ("table cut", "damaged or cut short"),
        ("table changed", "damaged or cut short"),
        ("another net", "another one than"),
        ("net missing", "missing"),
    ],
)
def test_a_damaged_folder_is_refused(folder, tmp_path, what, message):
    with pytest.raises(ModelError, match=message):
        load_racnn(damaged(folder, tmp_path / "copy", what))


def test_what_does_not_belong_together_is_refused(folder, database, tmp_path):
    found = load_racnn(folder)
    with pytest.raises(DatabaseError, match="another classifier"):
        RaCnnDefense(untrained(3), database, found)
    other = build_database(
        digits("train").subset(range(300)), trained(), FeatureSpec("block1"), tmp_path / "other", progress=False
    )
    with pytest.raises(DatabaseError, match="not the database"):
        RaCnnDefense(trained(), other, found)
    with pytest.raises(DatabaseError, match="not the database"):
        RaCnnDefense(trained(), database.subset(np.arange(100)), found)
    for k in (0, len(database) + 1, 2.0):
        with pytest.raises(InputError, match="k is"):
            RaCnnDefense(trained(), database, found, k=k)  # type: ignore[arg-type]
    with pytest.raises(ModelError, match="no attention"):
        attentive(trained())
    classes = build_classifier("ra-small-cnn", input_shape=(1, 8, 8), classes=[f"c{i}" for i in range(10)])
    with pytest.raises(ModelError, match="other classes"):
        RaCnnDefense(trained(), database, RaCnn(classes, found.table, K, found.classifier, found.database))


def test_images_that_cannot_be_used_are_refused(defense):
    for wrong in (
        torch.rand(2, 3, 8, 8),
        torch.rand(2, 8, 8),
        2 * torch.ones(1, 1, 8, 8),
        torch.full((1, 1, 8, 8), torch.nan),
    ):
        with pytest.raises(InputError):
            defense(wrong)
        with pytest.raises(InputError):
            defense.explain(wrong)
    assert defense(torch.rand(0, 1, 8, 8)).shape == (0, 10)


# -- attacks -----------------------------------------------------------------------------------------------------------


def test_attack_models_say_what_the_defence_says(defense, batch):
    x, y = batch
    own = defense(x)
    assert not own.requires_grad
    for name in ("straight-through", "fresh"):
        assert torch.allclose(defense.attack_model(retrieval=name)(x), own, atol=1e-5)
    assert torch.allclose(defense.attack_model(retrieval="held", held=x)(x), own, atol=1e-5)
    # The uniform contract of all defences.
    assert torch.allclose(defense.attack_model(draws=7, generator=torch.Generator())(x), own, atol=1e-5)
    soft = defense.attack_model(retrieval="soft")(x)
    assert torch.allclose(soft.exp().sum(1), torch.ones(len(x)), atol=1e-4)
    assert float((soft.argmax(1) == y).double().mean()) > 0.8


def test_the_gradient_through_the_attention_is_that_of_finite_differences(defense, batch):
    # Equal pixels side by side are ties of the maximum pooling, where there is no derivative: noise breaks them.
    noise = torch.rand(3, 1, 8, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    x, y = (0.8 * batch[0][:3] + 0.2 * noise).double(), batch[1][:3]
    exact = copy.deepcopy(defense)
    exact.net.double()
    direction = torch.randn(x.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    step = 1e-8
    for model in (exact.attack_model(retrieval="fresh"), exact.attack_model(retrieval="held", held=x)):
        at = x.clone().requires_grad_(True)
        loss = model(at).gather(1, y[:, None])[:, 0]
        (gradient,) = torch.autograd.grad(loss.sum(), at)
        with torch.no_grad():
            ahead, behind = (model(x + sign * step * direction).gather(1, y[:, None])[:, 0] for sign in (1, -1))
        slopes = (gradient * direction).flatten(1).sum(1)
        assert float(gradient.abs().max()) > 0
        # So short a step that hardly any of the net's kinks lies within it.
        assert torch.allclose(slopes, (ahead - behind) / (2 * step), rtol=1e-3, atol=1e-6)


def test_the_straight_through_gradient_is_that_of_attention_and_choice(defense, batch):
    x, y = batch[0][:8], batch[1][:8]

    def gradient(retrieval: str) -> Tensor:
        at = x.clone().requires_grad_(True)
        loss = defense.attack_model(retrieval=retrieval)(at).gather(1, y[:, None]).sum()
        return torch.autograd.grad(loss, at)[0]

    through, soft, fresh = (gradient(name) for name in ("straight-through", "soft", "fresh"))
    assert torch.allclose(through, soft + fresh, atol=1e-4 * float(through.abs().max()))
    # The choice of neighbours has a gradient of its own on every image.
    assert bool((soft.flatten(1).abs().amax(1) > 1e-6).all())


def test_the_relaxation_tends_to_the_mean_answer_of_the_true_neighbours(defense, batch):
    x, _ = batch
    found = defense.explain(x)
    with torch.no_grad():
        mean = defense.attentive.g(found.features).softmax(2).mean(1)
        cold = defense.attack_model(retrieval="soft", temperature=1e-5)(x).exp()
        hot = defense.attack_model(retrieval="soft", temperature=1.0)(x).exp()
    assert torch.allclose(cold, mean, atol=1e-3)
    assert float((hot - mean).abs().max()) > 1e-2


def test_held_neighbours_stay_and_fresh_ones_follow(defense, batch):
    x, _ = batch
    other = x.flip(0)
    held = defense.attack_model(retrieval="held", held=x)
    with torch.no_grad():
        kept = defense.answer(other, defense.explain(x).features).log_softmax(1)
        assert torch.allclose(held(other), kept, atol=1e-6)
        assert torch.allclose(defense.attack_model(retrieval="fresh")(other), defense(other), atol=1e-5)
        assert float((held(other) - defense(other)).abs().max()) > 0.1
    with pytest.raises(InputError, match="neighbours of 40 images are held"):
        held(x[:3])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"retrieval": "stale"}, "retrieval is 'stale'"),
        ({"retrieval": "held"}, "held"),
        ({"held": torch.rand(1, 1, 8, 8)}, "held"),
        ({"retrieval": "held", "held": 3 * torch.ones(1, 1, 8, 8)}, "range"),
        ({"temperature": 0.0}, "temperature"),
        ({"draws": 0}, "draws"),
    ],
)
def test_attack_models_that_make_no_sense(defense, options, message):
    with pytest.raises(InputError, match=message):
        defense.attack_model(**options)


def test_following_the_choice_of_neighbours_is_what_breaks_it(defense, batch):
    x, y = batch
    attack = {"eps": 0.25, "norm": "linf", "steps": 20, "loss": "margin"}

    def left(model) -> float:
        return accuracy(defense, pgd(model, x, y, generator=torch.Generator().manual_seed(0), **attack), y)

    held = left(defense.attack_model(retrieval="held", held=x))
    through = left(defense.attack_model())
    assert through < held - 0.2
    assert through < left(defense.net) - 0.1
    # And with everything that is known against retrievals, little stands.
    found = run_adaptive(defense.surface(images=digits("train")), x, y, eps=0.25, norm="linf", steps=20)
    assert float((~found.fooled).double().mean()) < through + 1e-9
    assert torch.equal(found.fooled, defense(found.images).argmax(1) != y)
    assert float((found.images - x).abs().max()) <= 0.25 + 1e-6


def test_the_surface_tells_what_it_is_asked_for(defense, batch):
    x, y = batch
    gray = defense.surface(Knowledge.GRAY)
    assert gray.rows is None
    assert gray.classify is not None
    assert torch.equal(gray.classify(x), defense.net(x))
    white = defense.surface(images=digits("train"))
    assert white.rows is not None
    assert white.rows.count == len(defense.database)
    rows = torch.tensor([3, 700])
    assert torch.equal(white.rows.vectors(rows), defense.database.features(rows))
    assert torch.equal(white.rows.weights(rows), torch.ones(2))
    assert white.rows.images is not None
    with torch.no_grad():
        alone = defense.net(white.rows.images(rows)).softmax(1)
    assert torch.allclose(white.rows.posteriors(rows), alone, atol=1e-4)
    assert torch.equal(white.fooled(x, y), defense(x).argmax(1) != y)
    with pytest.raises(InputError, match="L0 or L3"):
        defense.surface(Knowledge.PARTIAL)


def test_errors_are_the_projects(database):
    with pytest.raises(NNDefenseError):
        RetrievalAugmented(torch.zeros(1, 2, dtype=torch.int64), digits("train"), torch.tensor([-1]), draws=5)


@pytest.mark.parametrize("copied", [False, True])
def test_a_defence_answers_as_in_evaluation_mode_whatever_mode_its_nets_are_in(defense, batch, copied):
    x, _ = batch
    expected, explained = defense(x), defense.explain(x).log_probabilities
    other = copy.deepcopy(defense)
    torch.nn.Sequential(other).train()
    if not copied:
        other.net.train()
        other.extractor.truncated.net.train()
    before = copy.deepcopy(other.state_dict())
    torch.testing.assert_close(other(x), expected)
    torch.testing.assert_close(other.explain(x).log_probabilities, explained)
    assert other.net.training is not copied
    torch.testing.assert_close(other.attack_model(retrieval="fresh")(x), expected)
    assert all(torch.equal(value, before[key]) for key, value in other.state_dict().items())
