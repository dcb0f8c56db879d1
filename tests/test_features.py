"""Features: poolings against plain loops, PCA against NumPy, and the path from pixels to vectors."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from helpers import images, trained, untrained
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from nndefense.errors import InputError
from nndefense.features import (
    LAYER_ALIASES,
    PCA,
    FeatureExtractor,
    FeatureSpec,
    extractor,
    fit_pca,
    layer_in,
    pool,
    resolve_layer,
    rmac,
    spatial_layers,
    spread,
    tapped,
)
from nndefense.features.pooling import rmac_regions
from nndefense.features.taps import Truncated
from nndefense.models import load_classifier

# -- pooling -----------------------------------------------------------------------------------------------------------


def activation(height: int, width: int, seed: int = 0) -> Tensor:
    """A map of 3 images and 5 channels, as after a ReLU; one channel is dead."""
    maps = torch.randn(3, 5, height, width, generator=torch.Generator().manual_seed(seed)).relu()
    maps[:, 4] = 0
    return maps


def grid_by_loop(maps: np.ndarray, side: int) -> np.ndarray:
    """Averages over cells from floor(i * H / G) up to ceil((i + 1) * H / G)."""
    n, channels, height, width = maps.shape
    rows, columns = min(side, height), min(side, width)
    out = np.zeros((n, channels, rows, columns))
    for i in range(rows):
        for j in range(columns):
            top, bottom = i * height // rows, -(-(i + 1) * height // rows)
            left, right = j * width // columns, -(-(j + 1) * width // columns)
            out[:, :, i, j] = maps[:, :, top:bottom, left:right].mean((2, 3))
    return out.reshape(n, -1)


def rmac_by_loop(maps: np.ndarray) -> np.ndarray:
    """Regional maxima, written after the published description: scales 1..3, overlap near 0.4."""
    n, channels, height, width = maps.shape
    short = min(height, width)
    extra = 0
    if height != width:
        best = None
        for windows in range(2, 8):
            stride = (max(height, width) - short) / (windows - 1)
            distance = abs((short * short - short * stride) / (short * short) - 0.4)
            if best is None or distance < best:
                best, extra = distance, windows - 1
    total = np.zeros((n, channels))
    for scale in (1, 2, 3):
        side = max(2 * short // (scale + 1), 1)
        counts = [scale + (extra if own > other else 0) for own, other in ((height, width), (width, height))]
        steps = [
            (length - side) / (count - 1) if count > 1 else 0.0
            for length, count in zip((height, width), counts, strict=True)
        ]
        for i in range(counts[0]):
            for j in range(counts[1]):
                top, left = int(np.floor(i * steps[0] + 1e-9)), int(np.floor(j * steps[1] + 1e-9))
                region = maps[:, :, top : top + side, left : left + side].reshape(n, channels, -1).max(2)
                total += region / np.maximum(np.linalg.norm(region, axis=1, keepdims=True), 1e-12)
    return total / np.maximum(np.linalg.norm(total, axis=1, keepdims=True), 1e-12)


@pytest.mark.parametrize(("height", "width"), [(8, 8), (7, 5), (4, 9), (1, 1), (2, 3), (14, 14)])
def test_poolings_against_plain_loops(height, width):
    maps = activation(height, width)
    plain = maps.double().numpy()
    expected = {
        "avg": plain.sum((2, 3)) / (height * width),
        "max": plain.reshape(3, 5, -1).max(2),
        "flatten": plain.reshape(3, -1),
        "rmac": rmac_by_loop(plain),
        **{f"grid{side}": grid_by_loop(plain, side) for side in (1, 2, 3, 4, 10)},
    }
    for pooling, values in expected.items():
        got = pool(maps, pooling)
        assert got.shape == values.shape, pooling
        np.testing.assert_allclose(got.numpy(), values, atol=1e-6, err_msg=pooling)


@pytest.mark.parametrize("side", [1, 2, 3, 4, 7, 8, 14, 28])
def test_rmac_has_14_regions_on_a_square_map(side):
    regions = list(rmac_regions(side, side))
    assert len(regions) == 1 + 4 + 9
    assert regions[0] == (0, 0, side)
    assert all(0 <= top <= side - size and 0 <= left <= side - size for top, left, size in regions)


@given(st.integers(1, 30), st.integers(1, 30))
@settings(max_examples=200, deadline=None)
def test_rmac_regions_cover_the_map(height, width):
    covered = np.zeros((height, width), dtype=bool)
    for top, left, side in rmac_regions(height, width):
        assert 0 <= top <= height - side
        assert 0 <= left <= width - side
        covered[top : top + side, left : left + side] = True
    # Beyond 7 : 1 even the most windows that the method allows leave gaps.
    if max(height, width) <= 7 * min(height, width):
        assert covered.all()


def test_rmac_is_of_length_1_and_zero_for_a_dead_map():
    assert torch.allclose(rmac(activation(6, 9)).norm(dim=1), torch.ones(3))
    assert torch.equal(rmac(torch.zeros(2, 4, 5, 5)), torch.zeros(2, 4))


def test_vectors_pass_every_pooling_unchanged():
    vectors = torch.rand(4, 7)
    for pooling in ("avg", "max", "grid3", "rmac", "flatten"):
        assert pool(vectors, pooling) is vectors


@pytest.mark.parametrize("pooling", ["mean", "grid0", "grid", "grid<G>", "grid4x", "grid100", ""])
def test_unknown_pooling(pooling):
    with pytest.raises(InputError, match=r"must be one of avg, max, grid<G>, rmac, flatten, cls \(as grid4\)"):
        FeatureSpec("block1", pooling)


def test_layer_of_another_form():
    with pytest.raises(InputError, match="5 dimensions, but pooling needs"):
        pool(torch.rand(2, 3, 4, 2, 2), "avg")


# -- PCA ---------------------------------------------------------------------------------------------------------------


def sample(n: int, width: int, seed: int = 0) -> Tensor:
    """Correlated vectors with a mean far from 0 and clearly different variances."""
    generator = np.random.default_rng(seed)
    spectrum = 2.0 ** -np.arange(width)[: min(n, width)]
    basis = np.linalg.qr(generator.normal(size=(width, width)))[0][: len(spectrum)]
    return torch.from_numpy(generator.normal(size=(n, len(spectrum))) * 4 * spectrum @ basis + 3).float()


@pytest.mark.parametrize(("n", "width", "dimension"), [(200, 12, 5), (12, 40, 6), (30, 30, 8), (50, 6, 6)])
@pytest.mark.parametrize("whiten", [False, True])
def test_pca_is_numpys_svd_up_to_sign(n, width, dimension, whiten):
    vectors = sample(n, width)
    pca = PCA.fit(vectors, dimension, whiten=whiten)
    centred = vectors.double().numpy() - vectors.double().numpy().mean(0)
    _, singular, axes = np.linalg.svd(centred, full_matrices=False)
    signs = np.sign((pca.axes.double().numpy() * axes[:dimension].T).sum(0))
    expected = centred @ axes[:dimension].T * signs
    if whiten:
        expected /= singular[:dimension] / np.sqrt(n - 1)
    np.testing.assert_allclose(pca(vectors).numpy(), expected, atol=2e-4)
    assert torch.allclose(pca.axes.T @ pca.axes, torch.eye(dimension), atol=1e-5)
    # The sign rule: an axis's entry of largest size is positive.
    largest = pca.axes.gather(0, pca.axes.abs().argmax(0, keepdim=True))
    assert bool((largest > 0).all())
    if whiten:
        assert torch.allclose(pca(vectors).std(0), torch.ones(dimension), atol=1e-3)


@pytest.mark.parametrize(("n", "width"), [(60, 10), (9, 30)])
def test_pca_axes_do_not_depend_on_the_order_or_the_sign_of_the_sample(n, width):
    vectors = sample(n, width)
    reference = PCA.fit(vectors, 4).axes
    assert torch.allclose(PCA.fit(vectors.flip(0), 4).axes, reference, atol=1e-5)
    # Mirrored data has the same axes, and the rule gives them the same sign.
    assert torch.allclose(PCA.fit(-vectors, 4).axes, reference, atol=1e-5)


@pytest.mark.parametrize("whiten", [False, True])
@pytest.mark.parametrize(("n", "width"), [(40, 12), (12, 40)])
def test_pca_of_a_sample_with_less_variance_than_axes(n, width, whiten):
    # Duplicates and dead channels leave 3 directions; 8 axes are asked for.
    distinct = sample(4, width)
    vectors = distinct[torch.arange(n) % 4]
    pca = PCA.fit(vectors, 8, whiten=whiten)
    assert torch.allclose(pca.axes.T @ pca.axes, torch.eye(8), atol=1e-5)
    projected = pca(vectors)
    assert bool(torch.isfinite(projected).all())
    assert float(projected[:, 3:].abs().max()) < 1e-3
    # Distances survive, since nothing is lost.
    if not whiten:
        short, long = projected.double(), vectors.double()
        assert torch.allclose(torch.cdist(short, short), torch.cdist(long, long), atol=1e-3)


def test_pca_of_a_constant_sample_is_finite():
    pca = PCA.fit(torch.full((9, 5), 2.5), 3, whiten=True)
    assert torch.equal(pca(torch.full((2, 5), 2.5)), torch.zeros(2, 3))


def test_pca_errors():
    with pytest.raises(InputError, match="at least 6 images"):
        PCA.fit(torch.rand(5, 10), 5)
    with pytest.raises(InputError, match="as many feature dimensions"):
        PCA.fit(torch.rand(50, 3), 4)
    with pytest.raises(InputError, match="NaN or infinite"):
        PCA.fit(torch.tensor([[1.0, 2.0], [float("nan"), 1.0], [0.0, 1.0]]), 1)
    with pytest.raises(InputError, match="vectors of length 7, but the PCA was fitted on 10"):
        PCA.fit(torch.rand(50, 10), 4)(torch.rand(2, 7))


def test_fit_pca_only_where_it_is_needed():
    vectors = sample(50, 10)
    assert fit_pca(vectors, FeatureSpec("x", pca=0)) is None
    assert fit_pca(vectors, FeatureSpec("x", pca=10)) is None
    assert fit_pca(vectors, FeatureSpec("x", pca=9)).axes.shape == (10, 9)
    assert fit_pca(vectors, FeatureSpec("x", pca=64, whiten=True)).axes.shape == (10, 10)


def test_feature_spec_refuses_what_makes_no_sense_and_names_itself():
    with pytest.raises(InputError, match="PCA dimension is -1"):
        FeatureSpec("x", pca=-1)
    with pytest.raises(InputError, match="whitening"):
        FeatureSpec("x", pca=0, whiten=True)
    spec = FeatureSpec("block2", "grid4", pca=32, whiten=True, normalize=True)
    assert str(spec) == "block2:grid4:pca32w:unit"
    assert FeatureSpec(**spec.to_json()) == spec


# -- from pixels to vectors --------------------------------------------------------------------------------------------


class Untraceable(nn.Module):
    """A net whose forward pass depends on the pixels' values."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 4, 3)
        self.conv2 = nn.Conv2d(4, 5, 3)
        self.fc = nn.Linear(5, 10)
        self.spare = nn.Conv2d(1, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        if float(x.detach().sum()) < -1e9:
            return self.spare(x)
        return self.fc(self.conv2(self.conv1(x).relu()).mean((2, 3)))


class InPlace(nn.Module):
    """A net that overwrites a layer's output, and runs one module twice."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 6, 3)
        self.bn = nn.BatchNorm2d(6)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(6, 6, 3)
        self.fc = nn.Linear(6, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.bn(self.conv(x)))
        return self.fc(self.relu(self.conv2(x)).mean((2, 3)))


def by_hook(net: nn.Module, layer: str, batch: Tensor) -> Tensor:
    """A layer's output, copied while a whole forward pass runs."""
    kept = []
    handle = net.get_submodule(layer).register_forward_hook(lambda module, args, output: kept.append(output.clone()))
    net(batch)
    handle.remove()
    return kept[0]


@pytest.mark.parametrize("layer", ["block1", "block2.0", "block3", "pool3", "fc"])
def test_extractor_is_the_layers_output_pooled(layer):
    classifier, batch = trained(), images("test", 6)[0]
    extractor = FeatureExtractor(classifier, FeatureSpec(layer, "max", pca=0), None, batch[:2])
    with torch.no_grad():
        assert torch.allclose(extractor(batch), pool(by_hook(classifier.net, layer, batch), "max"), atol=1e-6)
    assert extractor.truncated.traced is not None
    assert extractor.dimension(batch[:1]) == extractor(batch).shape[1]


def test_extractor_applies_pca_and_unit_length():
    classifier, batch = trained(), images("test", 40)[0]
    raw = pool(by_hook(classifier.net, "block2", batch).detach(), "avg")
    spec = FeatureSpec("block2", pca=7, whiten=True, normalize=True)
    pca = fit_pca(raw, spec)
    vectors = FeatureExtractor(classifier, spec, pca, batch[:2])(batch)
    assert vectors.shape == (40, 7)
    assert torch.allclose(vectors, F.normalize((raw - pca.mean) @ pca.axes / pca.scale, dim=1), atol=1e-5)


@pytest.mark.parametrize("make", [trained, Untraceable])
def test_gradients_reach_the_pixels_and_agree_between_the_two_paths(make):
    torch.manual_seed(0)
    net, batch = make(), images("test", 4)[0]
    layer = "block2" if net is trained() else "conv2"
    spec = FeatureSpec(layer, "avg", pca=5, normalize=True)
    pca = PCA.fit(
        pool(by_hook(net.get_submodule("net") if net is trained() else net, layer, batch).detach(), "avg")
        + 0.01 * torch.randn(4, 1),
        3,
    )
    extractor = FeatureExtractor(net, spec, pca, batch[:2])
    grads = []
    for _ in range(2):
        pixels = batch.clone().requires_grad_()
        vectors = extractor(pixels)
        (vectors * torch.arange(1.0, 4)).sum().backward()
        grads.append(pixels.grad)
        # The second time round, by the hook alone.
        extractor.truncated.traced = None
    assert float(grads[0].abs().amax((1, 2, 3)).min()) > 0
    assert torch.allclose(grads[0], grads[1], atol=1e-6)


def test_a_net_that_cannot_be_traced_falls_back_to_the_hook():
    torch.manual_seed(0)
    net, batch = Untraceable().eval(), images("test", 5)[0]
    truncated = Truncated(net, "conv1", batch[:2])
    assert truncated.traced is None
    assert torch.equal(truncated(batch), by_hook(net, "conv1", batch))


@pytest.mark.parametrize(("make", "layer", "later"), [(trained, "net.block2", "net.fc"), (Untraceable, "conv1", "fc")])
def test_later_layers_are_not_run(make, layer, later):
    net, batch = make(), images("test", 3)[0]
    truncated = Truncated(net, layer, batch[:2])
    runs = []
    handle = net.get_submodule(later).register_forward_pre_hook(lambda *_: runs.append(later))
    truncated(batch)
    assert not runs
    net(batch)
    assert runs == [later]
    handle.remove()


@pytest.mark.parametrize("layer", ["conv", "bn", "conv2"])
def test_a_layer_whose_output_is_overwritten_later(layer):
    torch.manual_seed(0)
    net, batch = InPlace().eval(), images("test", 5)[0]
    expected = by_hook(net, layer, batch)
    assert bool((expected < 0).any())
    with torch.no_grad(), tapped(net, [layer]) as outputs:
        net(batch)
    assert torch.equal(outputs[layer], expected)
    assert torch.allclose(Truncated(net, layer, batch[:2])(batch), expected, atol=1e-6)


def test_a_layer_that_runs_twice_is_refused_everywhere_alike():
    net, batch = InPlace().eval(), images("test", 2)[0]
    with pytest.raises(InputError, match="'relu' runs more than once"), tapped(net, ["relu"]):
        net(batch)
    with pytest.raises(InputError, match="'relu' runs more than once"):
        Truncated(net, "relu", batch)
    # The hooks are gone and a second pass inside one context is a new one.
    net(batch)
    with tapped(net, ["conv"]) as outputs:
        net(batch)
        net(batch[:1])
    assert len(outputs["conv"]) == 1


def test_a_layer_that_a_pass_does_not_reach():
    net, batch = Untraceable(), images("test", 2)[0]
    with pytest.raises(InputError, match="does not reach the layer 'spare'"):
        Truncated(net, "spare", batch)
    with tapped(net, ["spare"]) as outputs:
        net(batch)
    with pytest.raises(InputError, match="does not reach the layer 'spare'"):
        outputs["spare"]


def test_a_layer_that_gives_no_tensor():
    class Pair(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return x, x

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.pair = Pair()

        def forward(self, x: Tensor) -> Tensor:
            return self.pair(x)[0]

    with pytest.raises(InputError, match="gives tuple, not one tensor"):
        Truncated(Net(), "pair", torch.zeros(2, 1, 8, 8))


def test_unknown_layer_names_some_that_exist():
    with pytest.raises(InputError) as caught:
        layer_in(trained(), "layer4")
    text = str(caught.value)
    assert text.startswith("the classifier has no layer 'layer4'; its layers are block1, ")
    assert "\n" not in text
    assert resolve_layer(trained().net, "block2") == "block2"


def test_making_an_extractor_leaves_a_net_in_training_as_it_was():
    classifier = copy.deepcopy(trained()).train()
    classifier.net.block1.eval()
    before = {name: tensor.clone() for name, tensor in classifier.state_dict().items()}
    modes = [module.training for module in classifier.modules()]
    FeatureExtractor(classifier, FeatureSpec("block3"), None, images("test", 2)[0])
    assert [module.training for module in classifier.modules()] == modes
    for name, tensor in classifier.state_dict().items():
        assert torch.equal(tensor, before[name]), name


def test_extractor_follows_its_classifier_in_type():
    classifier, batch = copy.deepcopy(trained()), images("test", 20)[0]
    spec = FeatureSpec("block2", pca=6)
    pca = fit_pca(pool(by_hook(classifier.net, "block2", batch).detach(), "avg"), spec)
    extractor = FeatureExtractor(classifier, spec, pca, batch[:2])
    single = extractor(batch)
    extractor.to(torch.float64)
    double = extractor(batch.double())
    assert single.dtype == double.dtype == torch.float32
    assert torch.allclose(single, double, atol=1e-4)
    half = extractor.to(torch.bfloat16)(batch.bfloat16())
    assert half.dtype == torch.float32
    assert torch.allclose(single, half, atol=0.3)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_extractor_follows_its_classifier_to_a_gpu():
    classifier, batch = copy.deepcopy(trained()), images("test", 20)[0]
    spec = FeatureSpec("block2", pca=6)
    pca = fit_pca(pool(by_hook(classifier.net, "block2", batch).detach(), "avg"), spec)
    extractor = FeatureExtractor(classifier, spec, pca, batch[:2])
    expected = extractor(batch)
    assert torch.allclose(extractor.to("cuda")(batch.cuda()).cpu(), expected, atol=1e-3)


def test_layer_aliases_on_resnet50():
    classifier = load_classifier("torchvision:resnet50:none")
    batch = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    channels = {"conv_2_3": 256, "conv_3_4": 512, "conv_4_6": 1024, "conv_5_1": 2048}
    modules = {"conv_2_3": "layer1.2", "conv_3_4": "layer2.3", "conv_4_6": "layer3.5", "conv_5_1": "layer4.0"}
    assert modules == LAYER_ALIASES
    with torch.no_grad(), tapped(classifier, [f"net.{name}" for name in modules.values()]) as outputs:
        classifier(batch)
    for alias, module in modules.items():
        assert layer_in(classifier, alias) == f"net.{module}"
        assert outputs[f"net.{module}"].shape[1] == channels[alias]
    extractor = FeatureExtractor(classifier, FeatureSpec("conv_4_6", pca=0), None, batch)
    with torch.no_grad():
        assert torch.allclose(extractor(batch), outputs["net.layer3.5"].mean((2, 3)), atol=1e-5)


def test_spatial_layers_are_the_maps_in_order():
    # Plain containers are looked into, and what has no weights before it is left out.
    blocks = [[f"block{b}.0", f"block{b}.1", f"block{b}.2", f"pool{b}"] for b in (1, 2, 3)]
    assert spatial_layers(trained().net, images("test", 1)[0]) == [name for block in blocks for name in block]
    net = nn.Sequential(nn.ReLU(), nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(72, 10))
    assert spatial_layers(net, images("test", 1)[0]) == ["1"]
    # A module that runs twice is no candidate, since it could not be used.
    assert spatial_layers(InPlace().eval(), images("test", 1)[0]) == ["conv", "bn", "conv2"]
    deep = untrained(arch="cifar-resnet18")
    found = spatial_layers(deep.net, torch.zeros(1, *deep.input_shape))
    assert all("." in name or hasattr(deep.net, name) for name in found)
    assert len(found) > 8


def test_spread_takes_the_ends_and_keeps_the_order():
    names = [str(i) for i in range(11)]
    assert spread(names, 3) == ["0", "5", "10"]
    assert spread(names, 20) == names
    assert spread(names, 1) == ["0"]


@pytest.mark.parametrize(("n", "width"), [(300, 40), (40, 300)])
def test_a_pca_in_blocks_has_the_axes_of_one_in_one_piece(n, width, monkeypatch):
    vectors = torch.randn(n, width, generator=torch.Generator().manual_seed(0)) * torch.linspace(3, 1, width) + 5
    whole = PCA.fit(vectors, 8, whiten=True)
    centred = vectors.double() - vectors.double().mean(0)
    # By another road: the singular values of the centred sample.
    _, values, right = torch.linalg.svd(centred, full_matrices=False)
    for block in (1 << 23, 700, 1):
        monkeypatch.setattr(extractor, "_BLOCK", block)
        pca = PCA.fit(vectors, 8, whiten=True)
        assert torch.allclose((pca.axes.double() * right[:8].T).sum(0).abs(), torch.ones(8, dtype=torch.float64))
        assert torch.allclose(pca.scale.double(), values[:8] / (n - 1) ** 0.5)
        assert torch.allclose(pca.axes, whole.axes, atol=1e-6)
        assert torch.allclose(pca.mean, vectors.mean(0))
