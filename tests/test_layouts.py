"""Layouts of layers' outputs: what transformers give is pooled along the right axes, whatever the sizes are."""

from __future__ import annotations

import pytest
import torch
import torchvision
from helpers import images, trained
from test_features import by_hook
from torch import Tensor, nn

from nndefense.errors import InputError
from nndefense.features import FeatureExtractor, FeatureSpec, layouts_in, pool, raw_vectors, spatial_layers
from nndefense.features.taps import evaluating
from nndefense.models import Classifier
from nndefense.pipeline.calibrating import Candidates


def seeded(make, *args: object, **options: object) -> nn.Module:
    torch.manual_seed(0)
    return make(*args, **options).eval()


def swin(kind: str = "SwinTransformer", block: type[nn.Module] | None = None, width: int = 12) -> nn.Module:
    options = {} if block is None else {"block": block}
    return seeded(getattr(torchvision.models, kind), [2, 2], width, [1, 1], [2, 4], [4, 4], num_classes=3, **options)


def vit(hidden: int = 24, patch: int = 8, side: int = 32, layers: int = 2) -> nn.Module:
    make = torchvision.models.VisionTransformer
    return seeded(make, side, patch, layers, 2, hidden, 48, num_classes=3)


def convnext(width: int) -> nn.Module:
    from torchvision.models.convnext import CNBlockConfig

    return seeded(torchvision.models.ConvNeXt, [CNBlockConfig(width, 2 * width, 1), CNBlockConfig(2 * width, None, 1)])


class Plain(nn.Module):
    """Patches -> tokens with some in front -> an encoder; with the images in the second axis or the first."""

    def __init__(self, prefix: int, *, batch_first: bool, width: int = 8, by_linear: bool = False) -> None:
        super().__init__()
        self.embed: nn.Module = nn.Linear(3 * 16, width) if by_linear else nn.Conv2d(3, width, 4, 4)
        self.front = nn.Parameter(torch.randn(1, prefix, width))
        self.block = nn.TransformerEncoderLayer(width, 2, 16, batch_first=batch_first)
        self.head = nn.Linear(width, 3)
        self.first = batch_first

    def forward(self, x: Tensor) -> Tensor:
        if isinstance(self.embed, nn.Linear):
            tokens = self.embed(nn.functional.unfold(x, 4, stride=4).transpose(1, 2))
        else:
            tokens = self.embed(x).flatten(2).transpose(1, 2)
        tokens = torch.cat([self.front.expand(len(x), -1, -1), tokens], 1)
        tokens = self.block(tokens if self.first else tokens.transpose(0, 1))
        return self.head(tokens[:, 0] if self.first else tokens[0])


class Strung(nn.Module):
    """A map whose places are strung together: N x C x T."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, width, 4, 4)
        self.flat = nn.Flatten(2)
        self.mix = nn.Conv1d(width, width, 1)
        self.head = nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.mix(self.flat(self.conv(x))).mean(2))


def vectors(net: nn.Module, layer: str, pooling: str, batch: Tensor) -> Tensor:
    with torch.no_grad():
        return FeatureExtractor(net, FeatureSpec(layer, pooling, pca=0), None, batch[:2])(batch)


def looked_at(net: nn.Module, layer: str, pooling: str, batch: Tensor) -> Tensor:
    """As :func:`vectors`, without an extractor, whose making takes longer."""
    return pool(by_hook(net, layer, batch).detach(), pooling, layouts_in(net, [layer], batch)[layer])


@pytest.mark.parametrize("side", [32, 48])
def test_swins_maps_have_their_channels_last(side):
    # 12 channels on 48 pixels are a map of 12 x 12 x 12.
    net, batch = swin(), torch.rand(4, 3, side, side)
    for layer in ("features.0", "features.1", "features.1.0", "features.2", "features.3", "norm"):
        by_hand = by_hook(net, layer, batch).detach().movedim(3, 1)
        for pooling in ("avg", "max", "rmac", "grid2", "flatten"):
            assert torch.equal(looked_at(net, layer, pooling, batch), pool(by_hand, pooling)), (layer, pooling)
    torch.testing.assert_close(vectors(net, "features.1", "avg", batch), looked_at(net, "features.1", "avg", batch))


def test_swin_v2_on_a_wide_image():
    from torchvision.models.swin_transformer import PatchMergingV2, SwinTransformerBlockV2

    make = torchvision.models.SwinTransformer
    net = seeded(
        make, [2, 2], 12, [1, 1], [2, 4], [4, 4], block=SwinTransformerBlockV2, downsample_layer=PatchMergingV2
    )
    batch = torch.rand(2, 3, 32, 64)
    for layer in ("features.1", "features.3"):
        by_hand = by_hook(net, layer, batch).detach().mean((1, 2))
        torch.testing.assert_close(looked_at(net, layer, "avg", batch), by_hand)


@pytest.mark.parametrize("width", [8, 16])
def test_a_cube_with_its_channels_first_is_known_by_what_grows(width):
    # The last module of a ConvNeXt block that has weights works with the channels last; its output has them first.
    net, batch = convnext(width), torch.rand(2, 3, 32, 32)
    assert by_hook(net, "features.1", batch).shape[1:] == (width, 8, 8)
    assert not layouts_in(net, ["features.1"], batch)["features.1"].channels_last
    by_hand = by_hook(net, "features.1", batch).detach().mean((2, 3))
    torch.testing.assert_close(vectors(net, "features.1", "avg", batch), by_hand)


@pytest.mark.parametrize(("hidden", "patch"), [(24, 8), (16, 8), (64, 4), (16, 16)])
@pytest.mark.parametrize("layer", ["encoder.dropout", "encoder.layers.encoder_layer_0", "encoder.ln"])
def test_vits_patches_and_its_class_token(hidden, patch, layer):
    # With 16 channels on 16 patches, or 64 on 64, only the convolution's own channels tell the axes apart.
    net, batch = vit(hidden, patch), torch.rand(3, 3, 32, 32)
    tokens, side = by_hook(net, layer, batch).detach(), 32 // patch
    body = tokens[:, 1:].transpose(1, 2)
    expected = {
        "cls": tokens[:, 0],
        "avg": body.mean(2),
        "max": body.amax(2),
        "grid2": pool(body.reshape(3, hidden, side, side), "grid2"),
        "rmac": pool(body.reshape(3, hidden, side, side), "rmac"),
    }
    for pooling, values in expected.items():
        torch.testing.assert_close(looked_at(net, layer, pooling, batch), values, msg=pooling)
    torch.testing.assert_close(vectors(net, layer, "avg", batch), expected["avg"], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize(("prefix", "by_linear"), [(0, False), (1, False), (2, False), (5, False), (1, True)])
def test_prefixes_and_images_in_the_second_axis(prefix, by_linear, batch_first):
    net = seeded(Plain, prefix, batch_first=batch_first, by_linear=by_linear)
    batch = torch.rand(4, 3, 24, 24)
    tokens = by_hook(net, "block", batch).detach()
    tokens = tokens if batch_first else tokens.transpose(0, 1)
    torch.testing.assert_close(vectors(net, "block", "avg", batch), tokens[:, prefix:].mean(1), atol=1e-5, rtol=1e-4)
    if prefix:
        torch.testing.assert_close(vectors(net, "block", "cls", batch), tokens[:, 0], atol=1e-5, rtol=1e-4)
    else:
        with pytest.raises(InputError, match="no class token: choose another pooling"):
            vectors(net, "block", "cls", batch)


@pytest.mark.parametrize("shape", [(24, 24), (16, 32), (32, 12)])
def test_the_grid_of_an_image_of_another_size(shape):
    net = seeded(Plain, 1, batch_first=True)
    extractor = FeatureExtractor(net, FeatureSpec("block", "grid2", pca=0), None, torch.rand(2, 3, 8 * 4, 8 * 4))
    layout = layouts_in(net, ["block"], torch.rand(1, 3, *shape))["block"]
    assert layout.grid == (shape[0] // 4, shape[1] // 4)
    assert layout.side(shape[0] * shape[1] // 4) == (shape[0] // 2, shape[1] // 2)
    assert extractor(torch.rand(2, 3, 24, 24)).shape == (2, 32)


# Left out: 36 channels of 36 places that no convolution has seen since, where nothing can tell.
@pytest.mark.parametrize(
    ("width", "layer"), [(6, "flat"), (16, "flat"), (30, "flat"), (6, "mix"), (30, "mix"), (36, "mix"), (37, "mix")]
)
def test_places_strung_together_behind_the_channels(width, layer):
    net, batch = seeded(Strung, width), torch.rand(2, 3, 24, 24)
    expected = by_hook(net, layer, batch).detach().mean(2)
    torch.testing.assert_close(vectors(net, layer, "avg", batch), expected, atol=1e-5, rtol=1e-4)


def test_windows_of_attention_are_no_layer():
    class Windows(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.inside, self.head = nn.Conv2d(3, 8, 3, padding=1), nn.Linear(8, 8), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            cut = self.conv(x).unfold(2, 4, 4).unfold(3, 4, 4).permute(0, 2, 3, 4, 5, 1)
            places = self.inside(cut.reshape(-1, 16, 8))
            return self.head(places.reshape(len(x), -1, 8).mean(1))

    net, batch = seeded(Windows), torch.rand(2, 3, 8, 8)
    with pytest.raises(InputError, match="12 x 16 x 8 for 3 images, and not one output an image: choose the module"):
        vectors(net, "inside", "avg", batch)
    assert "inside" not in spatial_layers(net, batch)


def test_tokens_without_a_grid():
    with pytest.raises(InputError, match="7 tokens lie on no grid, which the pooling grid2 needs"):
        pool(torch.rand(2, 7, 5), "grid2")
    torch.testing.assert_close(pool(torch.ones(2, 7, 5), "avg"), torch.ones(2, 5))


def test_looking_changes_neither_modes_nor_statistics():
    net, batch = swin().train(), torch.rand(2, 3, 32, 32)
    net.norm.eval()
    modes = [module.training for module in net.modules()]
    layouts_in(net, ["features.1"], batch)
    spatial_layers(net, batch)
    assert [module.training for module in net.modules()] == modes
    with evaluating(net):
        assert not net.training


def test_calibration_tries_blocks_and_the_class_token_of_transformers():
    for net, side in ((vit(layers=4), 32), (swin(), 32)):
        found = Candidates(count=20).features(
            Classifier(net, arch="own", input_shape=(3, side, side), classes=list("abc"))
        )
        layers = {feature.layer for feature in found}
        if net.__class__.__name__ == "VisionTransformer":
            assert {f"encoder.layers.encoder_layer_{i}" for i in range(4)} | {"conv_proj", "encoder.ln"} <= layers
            assert {f.layer for f in found if f.pooling == "cls"} == layers - {"conv_proj"}
        else:
            assert {"features.1.0", "features.2", "features.3.0"} <= layers
            assert not any(f.pooling == "cls" for f in found)


def test_a_convolutional_net_has_no_class_token_to_try():
    net, batch = trained(), images("test", 1)[0]
    assert raw_vectors(net, ["block1", "fc"], ["avg", "cls", "flatten"], batch)[0][1] is None
    with pytest.raises(InputError, match="no class token"):
        vectors(net, "block1", "cls", images("test", 3)[0])


class Passing(torch.nn.Module):
    """Layers some of whose candidates are the same: a map of 1 x 1, vectors, and layers that pass on what they get."""

    def __init__(self) -> None:
        super().__init__()
        self.map = torch.nn.Conv2d(1, 6, 3, padding=1)
        self.small = torch.nn.Conv2d(6, 5, 8)
        self.again = torch.nn.Dropout(0.5)
        self.vector = torch.nn.Linear(5, 4)
        self.end = torch.nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.again(self.small(self.map(x).relu()))
        return self.end(self.vector(x.flatten(1)))


def test_candidates_that_are_the_same_are_tried_once():
    torch.manual_seed(0)
    net = Classifier(Passing().eval(), arch="own", input_shape=(1, 8, 8), classes=list("abc"))
    layers, poolings = ["map", "small", "again", "vector", "map"], ["avg", "max", "grid8", "grid9", "flatten", "cls"]
    found = [(each.layer, each.pooling) for each in Candidates(layers=layers, poolings=poolings).features(net)]
    # A grid of 8 x 8 cells is the map itself.
    assert found == [("map", "avg"), ("map", "max"), ("map", "grid8"), ("small", "avg"), ("vector", "avg")]
    # Vectors of length 1 are others.
    (_, unit) = Candidates(layers=["small"], poolings=["grid2", "rmac", "avg"]).features(net)
    assert unit.pooling == "rmac"


def test_dead_layers_are_not_taken_for_one_another():
    net = Passing().eval()
    for layer in (net.map, net.small):
        torch.nn.init.zeros_(layer.weight)
        torch.nn.init.zeros_(layer.bias)
    classifier = Classifier(net, arch="own", input_shape=(1, 8, 8), classes=list("abc"))
    assert len(Candidates(layers=["map"], poolings=["avg", "max"]).features(classifier)) == 2
