"""Classifiers by the names that timm and transformers (Hugging Face) have for them; both packages are extras."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from nndefense.errors import ModelError, one_line
from nndefense.models.classifier import Classifier
from nndefense.models.torchvision_source import without_in_place

TIMM, HF = "timm:", "hf:"
_PRETRAINED = ":pretrained"


def load_timm(source: str) -> Classifier:
    """Return the classifier ``timm:NAME`` (random weights under a fixed seed) or ``timm:NAME:pretrained``, on the CPU.

    NAME is what ``timm.create_model`` takes: ``resnet18.a1_in1k``, ``hf-hub:OWNER/MODEL``, ``local-dir:FOLDER``. Size
    and normalisation are those of the model's own configuration; classes are its ``label_names``, those of ImageNet for
    a model with 1,000, else numbers. timm reads published weights from safetensors, or with torch's ``weights_only``.

    Raises:
        ModelError: timm is not installed, does not know the model, or cannot fetch its weights.
    """
    try:
        import timm
    except ImportError:
        raise _missing(source, "timm") from None
    pretrained = source.endswith(_PRETRAINED)
    name = source.removeprefix(TIMM).removesuffix(_PRETRAINED)
    net = _made(source, lambda: timm.create_model(name, pretrained=pretrained))
    own = timm.data.resolve_model_data_config(net)
    count = int(net.num_classes)
    names, ids = net.pretrained_cfg.get("label_names"), None
    if not names and count == 1000:
        table = timm.data.ImageNetInfo()
        names, ids = [table.index_to_description(number) for number in range(count)], table.label_names()
    if not names or len(names) != count:
        names = [str(number) for number in range(count)]
    return _classifier(source, net, own["input_size"], names, own["mean"], own["std"], ids)


def load_hf(source: str) -> Classifier:
    """Return the classifier ``hf:MODEL``, on the CPU and in evaluation mode.

    MODEL is a model for image classification on Hugging Face's hub, or a folder that ``save_pretrained`` wrote. Classes
    come from its configuration, size and normalisation from that of its image processor. Only safetensors are read, and
    no code that comes with a model is run.

    Raises:
        ModelError: transformers is not installed, the model cannot be fetched or read, or it does not say how images
            are normalised.
    """
    try:
        from transformers import AutoModelForImageClassification
        from transformers.image_processing_base import ImageProcessingMixin
    except ImportError:
        raise _missing(source, "transformers") from None
    name = source.removeprefix(HF)

    def make() -> Any:
        return AutoModelForImageClassification.from_pretrained(name, use_safetensors=True, trust_remote_code=False)

    model = _made(source, make).float()
    prepare = _made(source, lambda: ImageProcessingMixin.get_image_processor_dict(name)[0])
    shape = (int(getattr(model.config, "num_channels", 3)), *_size_of(source, prepare, model.config))
    mean, std = _normalization(source, prepare, shape[0])
    labels = model.config.id2label
    names = [str(labels[number]) for number in range(len(labels))]
    return _classifier(source, HFLogits(model), shape, names, mean, std)


class HFLogits(nn.Module):
    """A model of transformers as a net from images N x C x H x W to logits N x K."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        """The field ``logits`` of what the model returns."""
        logits: Tensor = self.model(pixel_values=images, return_dict=True).logits
        return logits


def _size_of(source: str, prepare: Mapping[str, Any], config: Any) -> tuple[int, int]:
    """Height and width after the image processor: those of its crop, else of its resizing, else of the model."""
    crop = prepare.get("crop_size") if prepare.get("do_center_crop") else None
    for given in (crop, prepare.get("size"), getattr(config, "image_size", None)):
        if isinstance(given, int):
            return given, given
        if isinstance(given, Mapping):
            if "height" in given:
                return int(given["height"]), int(given["width"])
            if "shortest_edge" in given:
                return int(given["shortest_edge"]), int(given["shortest_edge"])
        elif isinstance(given, Sequence) and len(given) == 2:
            return int(given[0]), int(given[1])
    raise ModelError(f"{source} does not say the size of its images: load it in code of your own (python:FILE:FACTORY)")


def _normalization(source: str, prepare: Mapping[str, Any], channels: int) -> tuple[list[float], list[float]]:
    """Mean and standard deviation per channel for pixels in [0, 1]."""
    # The processor rescales pixels 0..255 by this factor, then normalises.
    scale = 255 * float(prepare.get("rescale_factor", 1 / 255)) if prepare.get("do_rescale", True) else 255.0
    mean, std = prepare.get("image_mean"), prepare.get("image_std")
    if not prepare.get("do_normalize", mean is not None):
        mean, std = [0.0], [1.0]
    if mean is None or std is None:
        raise ModelError(
            f"{source} does not say how its images are normalised: load it in code of your own (python:FILE:FACTORY)"
        )
    mean, std = ([value] if isinstance(value, int | float) else list(value) for value in (mean, std))
    spread = channels if len(mean) == 1 else 1
    return [float(m) / scale for m in mean] * spread, [float(s) / scale for s in std] * spread


def _classifier(
    source: str,
    net: nn.Module,
    shape: Sequence[int],
    names: Sequence[str],
    mean: Sequence[float],
    std: Sequence[float],
    ids: Sequence[str] | None = None,
) -> Classifier:
    net = without_in_place(net.eval())
    return Classifier(
        net,
        arch=source,
        input_shape=shape,
        classes=names,
        class_ids=ids,
        mean=mean,
        std=std,
        source=source,
        fixed_size=_takes_only(net, shape),
    ).eval()


def _takes_only(net: nn.Module, shape: Sequence[int]) -> bool:
    """Whether the net refuses images 32 pixels larger each way."""
    try:
        with torch.no_grad():
            net(torch.zeros(1, shape[0], shape[1] + 32, shape[2] + 32))
    except Exception:
        return True
    return False


def _made(source: str, make: Callable[[], Any]) -> Any:
    """Run a library's loader under a fixed seed; whatever it raises means that the model is not to be had."""
    try:
        with torch.random.fork_rng(devices=[]), torch.device("cpu"):
            torch.default_generator.manual_seed(0)
            return make()
    except Exception as error:
        raise ModelError(
            f"{source} cannot be loaded ({type(error).__name__}: {one_line(error)}): check the name and the connection"
        ) from error


def _missing(source: str, package: str) -> ModelError:
    return ModelError(f"{source} needs the package {package}, which is missing: pip install {package}")
