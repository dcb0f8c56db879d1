"""Classifiers by name from timm and transformers, with models that these libraries make here: nothing is fetched."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from command import fails, nndefense

from nndefense.errors import ModelError
from nndefense.models import load_classifier

TIMM_MISSING = "timm is not installed (extra timm)"
HF_MISSING = "transformers is not installed (extra hf)"
PROCESSOR = {
    "image_processor_type": "ViTImageProcessor", "do_normalize": True, "do_rescale": True, "do_resize": True,
    "image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.25, 0.3], "rescale_factor": 1 / 255,
    "size": {"height": 32, "width": 32},
}  # fmt: skip


def saved(folder: Path, kind: str, processor: dict[str, Any] | None = PROCESSOR) -> Any:
    """A small model of transformers in a folder, as ``save_pretrained`` writes it; returned in evaluation mode."""
    transformers = pytest.importorskip("transformers", reason=HF_MISSING)
    labels: dict[str, Any] = {"id2label": {0: "cat", 1: "dog", 2: "owl"}, "label2id": {"cat": 0, "dog": 1, "owl": 2}}
    torch.manual_seed(1)
    if kind == "vit":
        config = transformers.ViTConfig(
            hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, image_size=32,
            patch_size=8, **labels,
        )  # fmt: skip
        model = transformers.ViTForImageClassification(config)
    else:
        config = transformers.ResNetConfig(
            embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", **labels
        )
        model = transformers.ResNetForImageClassification(config)
    model.save_pretrained(folder)
    if processor is not None:
        (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    return model.eval()


@pytest.mark.parametrize("kind", ["vit", "resnet"])
def test_a_model_of_transformers(kind: str, tmp_path: Path) -> None:
    model = saved(tmp_path / "m", kind)
    classifier = load_classifier(f"hf:{tmp_path}/m")
    assert classifier.classes == ("cat", "dog", "owl")
    assert classifier.input_shape == (3, 32, 32)
    assert classifier.fixed_size == (kind == "vit")
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    mean, std = (torch.tensor(PROCESSOR[key]).view(1, 3, 1, 1) for key in ("image_mean", "image_std"))
    with torch.no_grad():
        assert torch.allclose(classifier(images), model((images - mean) / std).logits, atol=1e-6)
    assert load_classifier(f"hf:{tmp_path}/m").fingerprint == classifier.fingerprint


@pytest.mark.parametrize(
    ("changes", "size", "mean", "std"),
    [
        ({"do_center_crop": True, "crop_size": {"height": 24, "width": 40}}, (24, 40), 0.5, 0.2),
        ({"size": {"shortest_edge": 48}}, (48, 48), 0.5, 0.2),
        ({"size": 48}, (48, 48), 0.5, 0.2),
        ({"do_normalize": False}, (32, 32), 0.0, 1.0),
        ({"rescale_factor": 2 / 255}, (32, 32), 0.25, 0.1),
        ({"do_rescale": False, "image_mean": [51, 51, 51], "image_std": [102, 102, 102]}, (32, 32), 0.2, 0.4),
    ],
)
def test_sizes_and_normalisation_of_image_processors(
    changes: dict[str, Any], size: tuple[int, int], mean: float, std: float, tmp_path: Path
) -> None:
    saved(tmp_path / "m", "resnet", PROCESSOR | changes)
    classifier = load_classifier(f"hf:{tmp_path}/m")
    assert classifier.input_shape == (3, *size)
    assert float(classifier.mean[0, 0, 0, 0]) == pytest.approx(mean)
    assert float(classifier.std[0, 0, 0, 0]) == pytest.approx(std)


def test_models_of_transformers_that_cannot_be_used(tmp_path: Path) -> None:
    saved(tmp_path / "none", "resnet", None)
    with pytest.raises(ModelError, match="cannot be loaded"):
        load_classifier(f"hf:{tmp_path}/none")
    saved(
        tmp_path / "silent", "resnet", {"image_processor_type": "ViTImageProcessor", "do_normalize": True, "size": 32}
    )
    with pytest.raises(ModelError, match="does not say how its images are normalised"):
        load_classifier(f"hf:{tmp_path}/silent")
    fails(4, "cannot be loaded", "attack", "--dataset", "digits:test[:2]", "--classifier", f"hf:{tmp_path}/nowhere",
          "--out", tmp_path / "a.h5")  # fmt: skip


def test_a_model_of_timm_with_random_and_with_stored_weights(tmp_path: Path) -> None:
    timm = pytest.importorskip("timm", reason=TIMM_MISSING)
    classifier = load_classifier("timm:test_resnet")
    own = timm.data.resolve_model_data_config(classifier.net)
    assert classifier.input_shape == own["input_size"]
    assert torch.allclose(classifier.mean.flatten(), torch.tensor(own["mean"]))
    assert torch.allclose(classifier.std.flatten(), torch.tensor(own["std"]))
    assert len(classifier.classes) == 1000
    assert classifier.class_ids is not None
    assert classifier.class_ids[0] == "n01440764"
    assert not classifier.fixed_size
    assert not any(getattr(module, "inplace", False) for module in classifier.net.modules())
    assert load_classifier("timm:test_resnet").fingerprint == classifier.fingerprint
    assert load_classifier("timm:deit_tiny_patch16_224").fixed_size

    # Weights are stored as timm stores them for the hub, and read again by name.
    config = {
        "mean": (0.1, 0.2, 0.3),
        "std": (0.4, 0.5, 0.6),
        "input_size": (3, 64, 64),
        "label_names": ["a", "b", "c"],
    }
    torch.manual_seed(5)
    net = timm.create_model("test_resnet", num_classes=3, pretrained_cfg_overlay=config)
    timm.models.save_for_hf(net, tmp_path / "m", model_config=dict(config), safe_serialization=True)
    stored = load_classifier(f"timm:local-dir:{tmp_path}/m:pretrained")
    assert stored.classes == ("a", "b", "c")
    assert stored.input_shape == (3, 64, 64)
    assert torch.allclose(stored.mean.flatten(), torch.tensor(config["mean"]))
    for name, value in net.state_dict().items():
        assert torch.equal(stored.net.state_dict()[name], value)
    with pytest.raises(ModelError, match="timm:resnet5000 cannot be loaded"):
        load_classifier("timm:resnet5000")


def test_a_database_finds_its_model_by_name(tmp_path: Path) -> None:
    pytest.importorskip("timm", reason=TIMM_MISSING)
    from PIL import Image

    for number, name in enumerate(("n01440764", "n01443537")):
        (tmp_path / "p" / name).mkdir(parents=True)
        for shade in range(3):
            Image.new("RGB", (40, 30), (80 * shade, 90 * number, 0)).save(tmp_path / "p" / name / f"{shade}.png")
    built = nndefense("index", "build", "--dataset", f"imagefolder:{tmp_path}/p", "--classifier", "timm:test_resnet",
                      "--layer", "layer3", "--pca", 0, "--out", tmp_path / "db", "--quiet")  # fmt: skip
    assert built.code == 0, built.err
    said = nndefense("classify", tmp_path / "p/n01440764/0.png", "--database", tmp_path / "db", "--k", 1, "--json")
    assert said.code == 0, said.err


@pytest.mark.parametrize(("source", "package"), [("timm:resnet18", "timm"), ("hf:x/y", "transformers")])
def test_a_missing_package_is_named(source: str, package: str) -> None:
    with mock.patch.dict(sys.modules, {package: None}), pytest.raises(ModelError, match=f"pip install {package}$"):
        load_classifier(source)
