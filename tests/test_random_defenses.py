"""Randomness that an attacker does not know, and what is said of a defence whose seed he does."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from nndefense.attacks import Counted, eot_pgd, pgd
from nndefense.comparison.recipe import RowSpec
from nndefense.comparison.runner import make_rows
from nndefense.defenses.transformed import TransformDefense
from nndefense.defenses.transforms import TotalVariation, crop_ensemble, jpeg_compression, tv_minimization
from nndefense.errors import InputError
from nndefense.evaluation import AttackSettings, Subject, evaluate, threats_of
from nndefense.evaluation.audit_runs import AuditSubject, _repeats
from nndefense.evaluation.judging import FRESH_DRAWS, draw_seeds, is_random
from nndefense.evaluation.ladder import bits
from nndefense.evaluation.report.records import accuracy_cell
from nndefense.evaluation.subjects import known_of
from nndefense.evaluation.threats import attacks_by
from nndefense.pipeline import Materials, MaterialSettings
from tests.helpers import digits, trained
from tests.helpers import images as pictures


def crops(**options: object) -> torch.nn.Module:
    return crop_ensemble(trained(), crops=3, size=0.8, **options)


class TestDraws:
    def test_a_seed_that_is_not_given_is_a_secret_and_calls_differ(self) -> None:
        images, _ = pictures("test", 4)
        torch.manual_seed(0)
        first = crops()(images)
        torch.manual_seed(0)
        other = crops()
        assert not torch.equal(first, other(images))
        assert not torch.equal(other(images), other(images))

    def test_images_of_a_batch_and_single_images_meet_draws_of_their_own(self) -> None:
        image = pictures("test", 1)[0].expand(6, -1, -1, -1)
        defense = tv_minimization(trained())
        together = defense(image)
        assert len(torch.unique(together, dim=0)) > 1
        assert not torch.equal(defense(image[:1]), defense(image[:1]))

    def test_a_given_seed_repeats_the_sequence_of_calls(self) -> None:
        images, _ = pictures("test", 4)
        defense, again = crops(seed=3), crops(seed=3)
        for _ in range(2):
            assert torch.equal(defense(images), again(images))
        assert torch.equal(defense.with_seed(3)(images), crops(seed=3)(images))

    def test_of_a_known_seed_every_image_meets_the_same_draws_and_so_does_the_attacker(self) -> None:
        images, _ = pictures("test", 6)
        known = crops().fixed(7)
        assert not is_random(known)
        said = known(images)
        assert torch.equal(said, known(images))
        torch.testing.assert_close(torch.cat([known(image[None]) for image in images]), said)
        torch.testing.assert_close(known.attack_model(draws=9)(images), said)
        torch.testing.assert_close(known.attack_model().predictions(images)[0], said)

    def test_an_attacker_draws_as_his_own_generator_says(self) -> None:
        images, _ = pictures("test", 4)
        defense = crops()
        one, other = (defense.attack_model(draws=6, generator=torch.Generator().manual_seed(s)) for s in (1, 1))
        found = one.predictions(images, 0.0)
        # Two answers of three crops each.
        assert found.shape == (2, 4, 10)
        assert torch.equal(found, other.predictions(images, 0.0))
        assert not torch.equal(found, one.predictions(images, 0.0))

    def test_a_random_transformation_must_say_what_it_draws(self) -> None:
        with pytest.raises(InputError, match="draw"):
            TransformDefense(trained(), lambda images: images, differentiable=True, random=True)


class TestAttack:
    def test_the_implicit_gradient_breaks_what_the_identity_leaves(self) -> None:
        images, labels = pictures("test", 40)
        settings: dict[str, Any] = {"keep": 0.8, "weight": 0.05, "tolerance": 1e-2}
        known = tv_minimization(trained(), **settings).fixed(0)
        passed = TransformDefense(trained(), TotalVariation(**settings), differentiable=False, random=True).fixed(0)
        assert torch.equal(known(images), passed(images))
        budget: dict[str, Any] = {"eps": 0.15, "norm": "normalized-l2"}
        left = []
        for defense in (known, passed):
            generator = torch.Generator().manual_seed(0)
            made = pgd(defense.attack_model(), images, labels, steps=10, generator=generator, **budget)
            left.append(int((known(made).argmax(1) == labels).sum()))
        generator = torch.Generator().manual_seed(0)
        made = eot_pgd(known.attack_model(), images, labels, steps=10, targets=1, generator=generator, **budget)
        size = (made - images).flatten(1).norm(dim=1) / images.flatten(1).norm(dim=1)
        assert float(size.max()) <= 0.15 + 1e-6
        assert int((known(made).argmax(1) == labels).sum()) < left[1], left
        assert left[0] < left[1] - 2, left

    def test_of_a_net_without_draws_it_keeps_the_worst_point(self) -> None:
        images, labels = pictures("test", 40)
        net = Counted(trained())
        made = eot_pgd(net, images, labels, eps=0.1, steps=10, targets=3, generator=torch.Generator().manual_seed(0))
        plain = pgd(trained(), images, labels, eps=0.1, norm="normalized-l2", steps=10, random_start=False)
        right = [(trained()(attacked).argmax(1) == labels).sum() for attacked in (made, plain)]
        assert right[0] <= right[1]
        assert 0 < net.backwards < net.forwards < 2 * net.backwards

    def test_it_asks_a_counted_surface_for_single_answers(self) -> None:
        images, labels = pictures("test", 5)
        surface = Counted(crops().attack_model(draws=6))
        assert surface.predictions(images, 0.0).shape == (2, 5, 10)
        before = surface.forwards
        eot_pgd(surface, images, labels, eps=0.1, steps=2, targets=0)
        assert surface.backwards == 2 * 5 * 6
        # The clean images, two steps, and twice what came of them.
        assert surface.forwards - before == 5 * 5 * 6

    def test_what_is_counted_is_attacked_as_it_is(self) -> None:
        images, labels = pictures("test", 8)
        made = []
        for wrap in (lambda surface: surface, Counted):
            surface = wrap(tv_minimization(trained()).attack_model(draws=3, generator=torch.Generator().manual_seed(0)))
            generator = torch.Generator().manual_seed(1)
            made.append(eot_pgd(surface, images, labels, eps=0.1, steps=2, targets=1, generator=generator))
        assert torch.equal(*made)

    @pytest.mark.parametrize("change", [{"steps": 0}, {"targets": -1}, {"restarts": 0}])
    def test_refuses(self, change: dict[str, int]) -> None:
        images, labels = pictures("test", 2)
        with pytest.raises(InputError, match=next(iter(change))):
            eot_pgd(trained(), images, labels, eps=0.1, **change)


class TestEvaluation:
    @pytest.mark.slow
    def test_it_judges_over_fresh_draws_that_are_recorded_and_repeats(self) -> None:
        dataset = digits("test").subset(range(30))
        maps = dict.fromkeys(("clean", "white"), torch.arange(10))
        defense = crops()
        subjects = [
            Subject("crops", defense, "defense", **known_of(defense, trained(), draws=2)),
            Subject("known", known := defense.fixed(0), "defense", **known_of(known, trained())),
        ]
        threats = threats_of(["white"], subjects, trained(), None)
        plan = {"white": [AttackSettings("pgd", eps=0.1, steps=2)]}
        assert [(one.name, one.steps) for one in attacks_by(threats[0], plan)] == [("pgd", 2), ("eot", 10)]

        def measured() -> list[object]:
            return evaluate(
                dataset, subjects, threats, plan, headline_eps=0.1, classifier="net", label_maps=maps, seed=5
            )

        first, second = measured(), measured()
        own = [record for record in first if record.defense == "crops"]
        assert [r.correct for r in first] == [r.correct for r in second]
        assert [r.accuracy for r in first] == [r.accuracy for r in second]
        assert all(record.draw_seeds == draw_seeds(5) for record in own)
        assert all("draw_seeds" not in r.to_json() for r in first if r.defense == "known")
        assert len(set(draw_seeds(5))) == FRESH_DRAWS
        clean = own[0]
        images, labels = dataset.batch(range(30))
        right = torch.stack([defense.with_seed(s)(images).argmax(1) == labels for s in draw_seeds(5)]).double()
        assert clean.accuracy == pytest.approx(float(right.mean()))
        assert bits(clean.to_json()).tolist() == (right.mean(0) > 0.5).tolist()
        assert clean.ci_low < clean.accuracy < clean.ci_high
        shown = accuracy_cell(clean.to_json(), "")
        assert shown.below == f"right on most draws: {100 * bits(clean.to_json()).mean():.1f}"
        assert not accuracy_cell(next(r for r in first if r.defense == "known").to_json(), "").below

    def test_a_random_defence_is_two_rows_of_a_comparison(self, tmp_path: object) -> None:
        settings = MaterialSettings(crop=0.8)
        materials = Materials(settings, None, tmp_path, torch.device("cpu"), given=trained())  # type: ignore[arg-type]
        rows = make_rows(materials, RowSpec("crops", "crop-ensemble", published="crop-ensemble"))
        assert [row.name for row in rows] == ["crops", "crops, seed known"]
        assert rows[1].spec.published is None
        assert rows[1].subject is not None
        assert not is_random(rows[1].subject.model)
        assert len(make_rows(materials, RowSpec("JPEG", "jpeg"))) == 1

    def test_the_audit_says_whether_draws_are_fresh_and_can_be_made_again(self) -> None:
        images, labels = pictures("test", 4)

        def line(model: torch.nn.Module) -> tuple[bool | None, str]:
            threat = threats_of(["gray"], (), trained(), None)[0]
            subject = AuditSubject(model, trained(), images, labels, threat, AttackSettings(), 0.1)
            found = _repeats(subject)
            return found.passed, found.text

        assert line(crops()) == (True, "It draws afresh; under the same seed it gives the same output, bit for bit.")
        assert line(crops().fixed(0))[0] is True
        assert line(jpeg_compression(trained()))[0] is True
        stuck = crops()
        stuck.with_seed = lambda seed: stuck  # type: ignore[method-assign]
        assert line(stuck)[0] is False
