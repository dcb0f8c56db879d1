"""What callers hold (images, labels and numbers of any type) is taken at every door, and the ball is kept exactly."""

from __future__ import annotations

import copy
import functools
import json
from typing import Any

import numpy as np
import pytest
import torch
from helpers import digits, images, trained
from torch import Tensor

from index_build import build_database
from nndefense import attacks
from nndefense.attacks import Attack, Eot, SpatialAttack, registry, retrieval, rp2
from nndefense.attacks.norms import radius
from nndefense.defenses import NearestNeighborDefense, RelaxedDefense
from nndefense.defenses.transforms import bit_depth_reduction, crop_ensemble, jpeg_compression
from nndefense.errors import InputError
from nndefense.evaluation import AttackSettings
from nndefense.features import FeatureSpec
from nndefense.guard import Guard
from nndefense.training import Batch, InnerAttack, TrainingSettings, standard

HALVES = (torch.float16, torch.bfloat16)
OTHERS = (*HALVES, torch.float64)
EPS = 0.1
ON_MODELS = [name for name in registry.names() if not registry.get(name).on_retrieval]
ON_RETRIEVAL = [name for name in registry.names() if registry.get(name).on_retrieval and name != "exact"]


@functools.cache
def batch() -> tuple[Tensor, Tensor]:
    """Digits that the net gets right."""
    x, y = images("test", 12)
    right = trained()(x).argmax(1) == y
    return x[right][:8], y[right][:8]


def run(entry: Attack, target: Any, x: Tensor, y: Tensor, **given: Any) -> Tensor:
    """The images that an attack of the registry makes with little effort, from one seed."""
    given = {"effort": 4, "restarts": 1, "loss": "cross-entropy", "norm": entry.norms[0], "eps": EPS, **given}
    settings = {"settings": {**entry.settings, "steps": 3, "queries": 10}} if entry.name == "autoattack" else {}
    entry = Attack(**{**vars(entry), **settings})
    found = entry.run(target, x, y, **given, generator=torch.Generator().manual_seed(0))
    return getattr(found, "images", found)


def excess(found: Tensor, x: Tensor, norm: str, eps: float = EPS) -> float:
    """By how much, as a share of the radius and measured in float64, the worst image leaves its ball."""
    delta, clean = (found.double() - x.double()).flatten(1), x.double().flatten(1)
    size = delta.abs().amax(1) if norm == "linf" else delta.norm(dim=1)
    return float((size / (eps * (clean.norm(dim=1) if norm == "normalized-l2" else 1)) - 1).max())


class TestAttacks:
    @pytest.mark.parametrize("kind", [torch.bfloat16, torch.float64])
    @pytest.mark.parametrize("name", ON_MODELS)
    def test_images_of_every_type_come_back_in_it_and_in_the_ball(self, name: str, kind: torch.dtype) -> None:
        entry, (x, y) = registry.get(name), batch()
        found = run(entry, trained(), x.to(kind), y)
        assert found.dtype == kind
        assert float(found.min()) >= 0
        assert float(found.max()) <= 1
        if not entry.least:
            assert excess(found, x.to(kind), entry.norms[0]) <= 1e-12
        # What it finds is about what it finds of float32 images, and stands after the rounding.
        left = [
            float((trained()(each).argmax(1) == y).double().mean()) for each in (found, run(entry, trained(), x, y))
        ]
        assert abs(left[0] - left[1]) <= 3 / 8

    @pytest.mark.parametrize("kind", HALVES)
    @pytest.mark.parametrize("norm", attacks.NORMS)
    @pytest.mark.parametrize("eps", [0.004, 0.05, 0.3])
    def test_half_precision_keeps_to_small_and_large_balls_of_every_norm(
        self, kind: torch.dtype, norm: str, eps: float
    ) -> None:
        x, y = batch()
        found = attacks.pgd(trained(), x.to(kind), y, eps=eps, norm=norm, steps=4)
        assert excess(found, x.to(kind), norm, eps) <= 1e-12
        if eps > 0.1:
            assert excess(found, x.to(kind), norm, eps) > -0.05

    @pytest.mark.parametrize("name", ON_MODELS)
    def test_labels_and_numbers_of_every_integer_type_mean_the_same(self, name: str) -> None:
        entry, (x, y) = registry.get(name), batch()
        numbers = {"eps": np.float64(EPS), "effort": np.int64(4), "restarts": np.int32(1)}
        assert torch.equal(run(entry, trained(), x, y.int(), **numbers), run(entry, trained(), x, y))

    def test_steps_may_be_any_librarys_whole_number_and_no_truth_value(self) -> None:
        x, y = batch()
        wanted = attacks.pgd(trained(), x, y, eps=EPS, steps=2, random_start=False)
        for steps in (np.int64(2), np.uint8(2), np.array(2), torch.tensor(2)):
            found = attacks.pgd(trained(), x, y, eps=np.float32(EPS), steps=steps, random_start=False)
            torch.testing.assert_close(found, wanted)
        for steps in (True, np.True_, torch.tensor(True), 2.0, np.float64(2), np.array([2, 2])):
            with pytest.raises(InputError, match="steps"):
                attacks.pgd(trained(), x, y, eps=EPS, steps=steps)

    def test_eps_may_be_an_array_a_list_or_a_tensor_of_any_type(self) -> None:
        x, y = batch()
        wanted = attacks.fgsm(trained(), x, y, eps=torch.full((8,), EPS))
        for eps in (np.full(8, EPS), [EPS] * 8, torch.full((8,), EPS, dtype=torch.float64), np.array(EPS)):
            torch.testing.assert_close(attacks.fgsm(trained(), x, y, eps=eps), wanted)
            torch.testing.assert_close(radius(x, eps, "linf"), torch.full((8,), EPS))

    def test_labels_that_are_no_class_numbers_are_refused_with_the_remedy(self) -> None:
        x, y = batch()
        with pytest.raises(InputError, match=r"labels\.long\(\)"):
            attacks.pgd(trained(), x, y.float(), eps=EPS, steps=1)
        with pytest.raises(InputError, match="type bool"):
            attacks.pgd(trained(), x, y > 4, eps=EPS, steps=1)

    @pytest.mark.parametrize("kind", [torch.float32, *OTHERS])
    @pytest.mark.parametrize("made", ["double", "bfloat16", "lambda", "eot", "no parameters"])
    def test_nets_of_another_type_and_functions_are_attacked(self, kind: torch.dtype, made: str) -> None:
        x, y = batch()
        net = trained()
        flat = net.net.state_dict() and torch.randn(10, 64, generator=torch.Generator().manual_seed(0))
        model = {
            "double": lambda: copy.deepcopy(net.net).double().eval(),
            "bfloat16": lambda: copy.deepcopy(net.net).bfloat16().eval(),
            "lambda": lambda: lambda z: net.net(z),
            "eot": lambda: Eot(lambda z: net.net(z), np.int64(2)),
            "no parameters": lambda: lambda z: z.flatten(1) @ flat.to(z.dtype).T,
        }[made]()
        found = attacks.pgd(model, x.to(kind), y, eps=EPS, steps=2)
        assert found.dtype == kind
        # In float32 x + eps itself is rounded.
        assert excess(found, x.to(kind), "linf") <= (1e-5 if kind is torch.float32 else 1e-12)
        bill = attacks.run(attacks.pgd, model, x.to(kind), y.int(), eps=EPS, steps=2)
        assert bill.images.dtype == kind

    def test_pixels_that_are_not_changed_are_the_same_to_the_bit(self) -> None:
        x, y = (part.clone() for part in batch())
        x = (x.double() * 0.98765).clamp(0, 1)
        assert torch.equal(attacks.pgd(trained(), x, y, eps=0.0, steps=2), x)
        # What is misclassified already is given back as it was.
        assert torch.equal(attacks.fab(trained(), x, (y + 1) % 10, steps=1), x)

    @pytest.mark.parametrize("kind", OTHERS)
    def test_inner_attacks_and_rotations(self, kind: torch.dtype) -> None:
        x, y = batch()
        inner = InnerAttack(eps=np.float32(EPS), steps=np.int64(2), norm="l2")
        found = inner(trained(), x.to(kind), y.int())
        assert found.dtype == kind
        assert excess(found, x.to(kind), "l2", inner.eps) <= 1e-12
        worst = SpatialAttack(draws=np.int64(3), choice="highest-loss")(trained(), x.to(kind), y.int())
        grid = attacks.spatial_grid(trained(), x.to(kind), y.int(), rotations=np.int64(3), shifts=1)
        assert worst.dtype == grid.dtype == kind

    @pytest.mark.parametrize("kind", OTHERS)
    def test_stickers_are_made_on_photos_of_every_type(self, kind: torch.dtype) -> None:
        x, _ = batch()
        mask = torch.zeros(1, 8, 8)
        mask[:, 2:5, 2:5] = 1
        settings = rp2.Settings(steps=np.int64(3), nps_weight=0)
        sticker = rp2.rp2(trained(), x[:3].to(kind), mask, np.int64(1), settings=settings).sticker
        seen = rp2.look(trained(), x[:3].to(kind), sticker, views=np.int64(2))
        assert seen.attacked.shape[1] == 3


@pytest.fixture(scope="module")
def defense(tmp_path_factory: pytest.TempPathFactory) -> NearestNeighborDefense:
    spec = FeatureSpec("block2", "grid4", pca=np.int64(48))
    folder = tmp_path_factory.mktemp("d")
    numbers = {"batch_size": np.int64(64), "seed": np.int64(0), "k": np.int32(5), "recall": np.float64(0.9)}
    database = build_database(digits("train"), trained(), spec, folder, progress=False, **numbers)
    return NearestNeighborDefense(trained(), database, np.int64(5), "cbw-d", power=np.float32(3), terms=np.int64(20))


class TestDefenses:
    @pytest.mark.parametrize("kind", OTHERS)
    def test_every_defence_answers_images_of_every_type_as_it_does_float32(
        self, defense: NearestNeighborDefense, kind: torch.dtype
    ) -> None:
        # What all types hold exactly.
        x = (batch()[0] * 16).round() / 16
        net = trained()
        made = [defense, jpeg_compression(net, quality=np.int64(75)), bit_depth_reduction(net, bits=np.int64(3)),
                crop_ensemble(net, grid=True, crops=np.int64(4)), net, defense.extractor]  # fmt: skip
        for each in made:
            torch.testing.assert_close(each(x.to(kind)), each(x), rtol=0, atol=0)
        assert torch.equal(defense.explain(x.to(kind)).rows, defense.explain(x).rows)

    @pytest.mark.parametrize("name", ON_RETRIEVAL)
    def test_attacks_on_retrieval(self, defense: NearestNeighborDefense, name: str) -> None:
        entry, (x, y) = registry.get(name), batch()
        x = x.double() * 0.9
        found = run(entry, defense.surface(), x, y.int(), eps=np.float64(EPS), effort=np.int64(2))
        assert found.dtype == torch.float64
        assert excess(found, x, entry.norms[0]) <= 1e-12
        with pytest.raises(InputError, match=r"give x\.float\(\)"):
            run(entry, defense.surface(), x.half(), y)

    def test_targets_of_any_integer_type(self, defense: NearestNeighborDefense) -> None:
        x, y = batch()
        goal = (y + 1) % 10
        found = [
            retrieval.rank_margin(defense.surface(), x, y, eps=EPS, steps=2, target=each) for each in (goal, goal.int())
        ]
        assert torch.equal(*found)

    def test_a_relaxed_defence_is_attacked_in_every_type(self, defense: NearestNeighborDefense) -> None:
        x, y = batch()
        for kind in OTHERS:
            found = attacks.pgd(RelaxedDefense(defense.surface()), x.to(kind), y, eps=EPS, steps=2)
            assert excess(found, x.to(kind), "linf") <= 1e-12

    def test_numbers_of_numpy_can_be_written(self, defense: NearestNeighborDefense) -> None:
        guard = Guard(defense.classifier, defense.database, np.int64(5), "cbw-d")
        json.dumps(guard.describe())
        assert (
            len(guard.predict(batch()[0].double(), top=np.int64(2), neighbors=np.int64(1), batch_size=np.int8(4))) == 8
        )
        table = NearestNeighborDefense.calibrate(
            defense.classifier, [defense.database], *2 * [batch()[0].double()], batch()[1].int(), ks=np.array([1, 3])
        )[1]
        assert type(table.chosen.k) is int
        for k in (True, 2.5, np.float64(2), len(defense.database) + 1):
            with pytest.raises(InputError, match="k is"):
                NearestNeighborDefense(defense.classifier, defense.database, k)


def test_records_hold_plain_numbers() -> None:
    eps = np.array([0.1, 0.2])
    records = (
        AttackSettings(norm="linf", eps=eps, steps=np.int64(3), restarts=np.int64(2)).to_json(),
        TrainingSettings(epochs=np.int64(1), batch_size=np.int64(8), lr=np.float32(0.1)).as_dict(),
        InnerAttack(eps=np.float32(0.1), steps=np.int64(2)).as_dict(),
        SpatialAttack(draws=np.int64(2), degrees=np.float32(3)).as_dict(),
        FeatureSpec("block2", pca=np.int64(8)).to_json(),
    )
    assert json.loads(json.dumps(records))[0]["eps"] == [0.1, 0.2]


def test_a_training_step_takes_labels_of_any_integer_type() -> None:
    x, y = batch()
    losses = [standard(trained(), Batch(x, y.to(kind))).loss for kind in (torch.int64, torch.int32, torch.uint8)]
    assert losses[0] == losses[1] == losses[2]


@pytest.mark.parametrize("attack", [attacks.fgsm, attacks.pgd, attacks.apgd])
def test_a_warning_from_inside_names_the_line_that_called_the_library(attack: Any) -> None:
    x, y = batch()
    with pytest.warns(UserWarning, match="holds every image") as told:
        attack(trained(), x, y, eps=100.0, norm="l2", **({} if attack is attacks.fgsm else {"steps": 1}))
    assert [one.filename for one in told] == [__file__]
