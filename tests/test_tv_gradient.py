"""The implicit gradient of total variation minimisation, against finite differences of the true minimiser."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from nndefense.defenses.transforms import TotalVariation, TvProblem, minimize_total_variation
from nndefense.defenses.transforms.tv_gradient import adjoint
from tests.helpers import images as pictures


def minimised(images: Tensor, keep: Tensor | None, kind: str, data: str, tolerance: float = 1e-12) -> Tensor:
    return minimize_total_variation(
        images, 0.1, keep=keep, kind=kind, data=data, tolerance=tolerance, max_iterations=10_000
    ).images


@pytest.mark.filterwarnings("ignore:total variation")
@pytest.mark.parametrize(
    ("kind", "data", "masked"),
    [
        ("isotropic", "squared", True),
        ("isotropic", "squared", False),
        # With a mask, a dropped pixel's best value is not always one: what lies between its neighbours is as good.
        ("anisotropic", "squared", False),
        ("lines", "squared", True),
        ("isotropic", "norm", True),
    ],
)
def test_it_is_the_derivative_of_the_minimiser(kind: str, data: str, masked: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    images = torch.rand((3, 1, 5, 5), generator=generator, dtype=torch.float64)
    keep = torch.rand(images.shape, generator=generator) < 0.7 if masked else None
    way, weight = (torch.randn(images.shape, generator=generator, dtype=torch.float64) for _ in range(2))
    step = 1e-5
    ahead, behind = (minimised(images + s * step * way, keep, kind, data) for s in (1, -1))
    slope = ((ahead - behind) * weight).sum((1, 2, 3)) / (2 * step)
    kept = None if keep is None else keep.to(images)
    problem = TvProblem(images, kept, 0.1, kind, data)
    z = minimised(images, keep, kind, data)
    found = adjoint(problem, z, weight, smoothing=1e-5, iterations=300)
    torch.testing.assert_close((found * way).sum((1, 2, 3)), slope, rtol=0.05, atol=0.02)
    if kept is not None:
        assert bool((found[kept == 0] == 0).all())


def test_autograd_takes_it_where_a_gradient_is_asked_for() -> None:
    images, _ = pictures("test", 5)
    transform = TotalVariation(tolerance=1e-2)
    drawn = transform.draw(images, torch.Generator().manual_seed(0))
    weight = torch.randn(images.shape, generator=torch.Generator().manual_seed(1))
    leaf = images.clone().requires_grad_()
    out = transform(leaf, drawn)
    (out * weight).sum().backward()
    problem = TvProblem(images, drawn.to(images), 0.03, "isotropic", "squared")
    with torch.no_grad():
        torch.testing.assert_close(out.detach(), transform(images, drawn))
    torch.testing.assert_close(leaf.grad, adjoint(problem, out.detach(), weight))


def test_25_iterations_are_enough_for_nearly_all_images() -> None:
    images, _ = pictures("test", 20)
    drawn = torch.rand(images.shape, generator=torch.Generator().manual_seed(0)) < 0.5
    problem = TvProblem(images, drawn.to(images), 0.03, "isotropic", "squared")
    z = minimize_total_variation(images, 0.03, keep=drawn, tolerance=1e-2).images
    weight = torch.randn(images.shape, generator=torch.Generator().manual_seed(1))
    few, many = (adjoint(problem, z, weight, iterations=count).flatten(1) for count in (25, 500))
    assert float(torch.cosine_similarity(few, many).quantile(0.1)) > 0.99
