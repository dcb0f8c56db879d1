"""Rotations and translations against SciPy and torchvision, and which of them an attack keeps."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from scipy import ndimage
from torch import Tensor, nn
from torchvision.transforms import InterpolationMode
from torchvision.transforms.functional import rotate

from nndefense.attacks import SpatialAttack, rotated_and_shifted, spatial_grid
from nndefense.errors import InputError


def images(n: int = 3, channels: int = 2, height: int = 9, width: int = 9, seed: int = 0) -> Tensor:
    return torch.rand(n, channels, height, width, generator=torch.Generator().manual_seed(seed))


def moved_by_scipy(image: np.ndarray, degrees: float, left: float, up: float) -> np.ndarray:
    """Each output pixel looks up its source: rotated about the centre, in pixels, then shifted."""
    height, width = image.shape
    angle = math.radians(degrees)
    middle = np.array([(height - 1) / 2, (width - 1) / 2])
    # Rows run downwards: a picture that turns counterclockwise looks its sources up clockwise.
    matrix = np.array([[math.cos(angle), math.sin(angle)], [-math.sin(angle), math.cos(angle)]])
    shift = np.array([up * (height - 1), left * (width - 1)])
    return np.asarray(
        ndimage.affine_transform(
            image, matrix, middle - matrix @ middle + shift, order=1, mode="grid-constant", cval=0.0
        )
    )


@pytest.mark.parametrize("size", [(9, 9), (8, 13), (14, 6)])
def test_it_is_scipys_affine_transform(size: tuple[int, int]) -> None:
    x = images(6, 2, *size).double()
    generator = np.random.default_rng(0)
    degrees, shifts = generator.uniform(-180, 180, 6), generator.uniform(-0.3, 0.3, (6, 2))
    ours = rotated_and_shifted(x, torch.from_numpy(degrees), torch.from_numpy(shifts))
    for i in range(6):
        for channel in range(2):
            expected = moved_by_scipy(x[i, channel].numpy(), degrees[i], *shifts[i])
            assert np.allclose(ours[i, channel].numpy(), expected, atol=1e-9)


@pytest.mark.parametrize("degrees", [-90.0, -30.0, 7.5, 30.0, 145.0])
def test_it_turns_as_torchvision_does(degrees: float) -> None:
    x = images()
    ours = rotated_and_shifted(x, torch.full((3,), degrees), torch.zeros(3, 2))
    assert torch.allclose(ours, rotate(x, degrees, InterpolationMode.BILINEAR), atol=1e-5)


def test_turns_and_shifts_that_need_no_interpolation() -> None:
    x = images(1, 1, 9, 9).double()

    def moved(degrees: float, left: float, up: float) -> Tensor:
        return rotated_and_shifted(x, torch.tensor([degrees]).double(), torch.tensor([[left, up]]).double())

    assert torch.allclose(moved(0, 0, 0), x, atol=1e-12)
    assert torch.allclose(moved(90, 0, 0), torch.rot90(x, 1, (2, 3)), atol=1e-12)
    expected = torch.zeros_like(x)
    expected[..., :, :-2] = x[..., :, 2:]  # two of the eight steps to the left
    assert torch.allclose(moved(0, 2 / 8, 0), expected, atol=1e-12)
    expected = torch.zeros_like(x)
    expected[..., :-1, :] = x[..., 1:, :]
    assert torch.allclose(moved(0, 0, 1 / 8), expected, atol=1e-12)


@pytest.mark.parametrize("size", [(2, 2), (7, 5), (28, 28)])
def test_nothing_moves_at_zero(size: tuple[int, int]) -> None:
    x = images(2, 1, *size)
    assert torch.allclose(rotated_and_shifted(x, torch.zeros(2), torch.zeros(2, 2)), x, atol=2e-5)
    attacked = SpatialAttack(draws=3, degrees=0, shift=0)(Score(), x, torch.zeros(2, dtype=torch.int64))
    assert torch.allclose(attacked, x, atol=2e-5)


class Score(nn.Module):
    """Says 0 or 1 by comparing two halves of the image; counts its passes."""

    def __init__(self, bias: float = 0.0) -> None:
        super().__init__()
        self.bias, self.passes, self.modes = bias, 0, set[bool]()

    def forward(self, x: Tensor) -> Tensor:
        self.passes += 1
        self.modes.add(self.training)
        half = x.shape[3] // 2
        score = x[..., :half].mean((1, 2, 3)) - x[..., half:].mean((1, 2, 3)) + self.bias
        return torch.stack([3 * score, -3 * score], dim=1)


def draws_by_hand(x: Tensor, count: int) -> list[Tensor]:
    """The same draws from the same seed: angle, then the two shifts, each uniform either way."""
    found = []
    for _ in range(count):
        chance = torch.rand(len(x), 3, dtype=x.dtype) * 2 - 1
        found.append(rotated_and_shifted(x, 30 * chance[:, 0], 3 / 28 * chance[:, 1:]))
    return found


@pytest.mark.parametrize("choice", ["first-wrong", "highest-loss"])
@pytest.mark.parametrize("goal", ["labels", "clean"])
def test_the_worst_of_ten_draws(choice: str, goal: str) -> None:
    x, model = images(24, 1).double(), Score().double().train()
    y = model(x).argmax(1)
    y[:4] = 1 - y[:4]
    logits = model(x)
    if goal == "clean":
        y = logits.argmax(1)
    torch.manual_seed(4)
    draws = draws_by_hand(x, 10)
    kept, firsts = [], []
    for i in range(len(x)):
        outputs = [model(draw[i : i + 1])[0] for draw in draws]
        wrong = [k for k, output in enumerate(outputs) if int(output.argmax()) != int(y[i])]
        p = logits[i].softmax(0)
        losses = [
            float((p * (p.log() - z.log_softmax(0))).sum()) if goal == "clean" else -float(z.log_softmax(0)[y[i]])
            for z in outputs
        ]
        firsts.append(wrong[0] if wrong else 0)
        kept.append(firsts[-1] if choice == "first-wrong" else losses.index(max(losses)))
    model.passes, model.modes = 0, set()
    torch.manual_seed(4)
    attack = SpatialAttack(choice=choice)
    ours = attack(model, x, logits, loss="kl") if goal == "clean" else attack(model, x, y)
    assert torch.equal(ours, torch.stack([draws[k][i] for i, k in enumerate(kept)]))
    assert model.passes == 10
    assert model.modes == {False}
    assert model.training
    # The case is worth something: some images have a later draw, some the first, and the choices differ.
    assert len(set(firsts)) > 2
    assert goal == "clean" or choice == "first-wrong" or kept != firsts


def test_a_single_draw_asks_the_model_nothing() -> None:
    x, model = images(5), Score().train()
    torch.manual_seed(8)
    (expected,) = draws_by_hand(x, 1)
    torch.manual_seed(8)
    ours = SpatialAttack(draws=1)(model, x, torch.zeros(5, dtype=torch.int64))
    assert torch.equal(ours, expected)
    assert model.passes == 0


def centres(x: Tensor) -> tuple[Tensor, Tensor]:
    """The centre of mass of each picture, rightwards and downwards from the middle."""
    mass = x[:, 0] / x[:, 0].sum((1, 2), keepdim=True)
    steps = torch.arange(x.shape[3]) - (x.shape[3] - 1) / 2
    return (mass.sum(1) * steps).sum(1), (mass.sum(2) * steps).sum(1)


def test_draws_fill_their_range_and_no_more() -> None:
    labels = torch.zeros(400, dtype=torch.int64)
    x = torch.zeros(400, 1, 57, 57)
    x[..., 28, 28] = 1.0
    torch.manual_seed(0)
    across, down = centres(SpatialAttack(draws=1, degrees=0, shift=0.25)(Score(), x, labels))
    for offset in (across, down):
        assert float(offset.abs().max()) <= 14.01
        assert float(offset.max()) > 13
        assert float(offset.min()) < -13
    assert abs(float(torch.corrcoef(torch.stack([across, down]))[0, 1])) < 0.15
    x = torch.zeros(400, 1, 57, 57)
    x[..., 28, 48] = 1.0
    across, down = centres(SpatialAttack(draws=1, degrees=30, shift=0)(Score(), x, labels))
    angle = torch.rad2deg(torch.atan2(-down, across))
    assert 28 < float(angle.max()) < 30.5
    assert -30.5 < float(angle.min()) < -28
    assert abs(float(angle.mean())) < 4


@pytest.mark.parametrize(("rotations", "shifts"), [(5, 3), (1, 1), (4, 2)])
def test_the_grid_is_searched_in_full(rotations: int, shifts: int) -> None:
    x = images(12, 1).double()
    model = Score(bias=0.12).double().eval()
    y = model(x).argmax(1)
    attacked = spatial_grid(model, x, y, degrees=10, shift=0.1, rotations=rotations, shifts=shifts)
    angles = np.linspace(-10, 10, rotations) if rotations > 1 else [0.0]
    steps = np.linspace(-0.1, 0.1, shifts) if shifts > 1 else [0.0]
    expected = x.clone()
    for i in range(len(x)):
        tried = [
            rotated_and_shifted(x[i : i + 1], torch.tensor([a]).double(), torch.tensor([[b, c]]).double())
            for a in angles
            for b in steps
            for c in steps
        ]
        wrong = [one for one in tried if int(model(one).argmax()) != int(y[i])]
        if wrong:
            expected[i] = wrong[0][0]
    assert torch.allclose(attacked, expected, atol=1e-12)
    if rotations == 5:
        changed = (attacked != x).flatten(1).any(1)
        assert 0 < int(changed.sum()) < len(x)
        assert bool((model(attacked)[changed].argmax(1) != y[changed]).all())


def test_the_papers_grid_has_775_points() -> None:
    x = images(2, 1, 4, 4)
    model = Score(bias=10.0).eval()  # never wrong
    assert torch.equal(spatial_grid(model, x, torch.zeros(2, dtype=torch.int64)), x)
    assert model.passes == 775
    model.passes = 0
    spatial_grid(model, x, torch.ones(2, dtype=torch.int64))  # always wrong
    assert model.passes == 1


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"draws": 0}, "draws is 0"),
        ({"draws": 1.5}, "draws is 1.5"),
        ({"degrees": -1}, "degrees is -1"),
        ({"degrees": 181}, "degrees is 181"),
        ({"degrees": math.nan}, "degrees is nan"),
        ({"shift": 1.1}, "shift is 1.1"),
        ({"shift": "far"}, "shift is far"),
        ({"choice": "worst"}, "choice is 'worst'"),
        ({"mode": "test"}, "mode is 'test'"),
    ],
)
def test_settings_out_of_range(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        SpatialAttack(**settings)


def test_calls_that_cannot_be_answered() -> None:
    x, y, model = images(), torch.zeros(3, dtype=torch.int64), Score()
    with pytest.raises(InputError, match="loss is 'entropy'"):
        SpatialAttack()(model, x, y, loss="entropy")
    with pytest.raises(InputError, match="labels have shape"):
        SpatialAttack()(model, x, y[:2])
    with pytest.raises(InputError, match="clean logits have shape"):
        SpatialAttack()(model, x, y, loss="kl")
    with pytest.raises(InputError, match="training mode"):
        spatial_grid(model.train(), x, y)
    model.eval()
    with pytest.raises(InputError, match="rotations is 0"):
        spatial_grid(model, x, y, rotations=0)
    with pytest.raises(InputError, match="shift is 2"):
        spatial_grid(model, x, y, shift=2)
    with pytest.raises(InputError, match=r"\[0, 1\]"):
        spatial_grid(model, x * 255, y)
    with pytest.raises(InputError, match="labels range"):
        spatial_grid(model, x, y + 5)


def test_the_record_is_plain() -> None:
    assert SpatialAttack(draws=1, shift=0.1).as_dict() == {
        "name": "spatial",
        "draws": 1,
        "degrees": 30.0,
        "shift": 0.1,
        "choice": "first-wrong",
        "mode": "eval",
    }
