"""Classifiers from a user's own Python code."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from nndefense.errors import InputError, ModelError, one_line
from nndefense.images import shape_text
from nndefense.models.classes import Classes, given_classes
from nndefense.models.classifier import Classifier, check_input_shape
from nndefense.own_code import own_function


def load_python(
    source: str,
    *,
    device: torch.device,
    input_shape: Sequence[int] | None = None,
    classes: Classes | None = None,
) -> Classifier:
    """Return the net that ``python:FILE_OR_MODULE:FACTORY`` makes as a classifier in evaluation mode on ``device``.

    FACTORY is called without arguments and returns a module from images N x C x H x W in [0, 1] to logits N x K. The
    module may have attributes ``input_shape`` (C, H, W) and ``classes`` (names), which the arguments override.

    Raises:
        ModelError: the code cannot be found or run, or what it makes is not such a module.
    """
    net = own_function(source, returns="the net", call="without arguments", error=ModelError)()
    if not isinstance(net, nn.Module):
        raise ModelError(f"{source} returned {type(net).__name__}: it must return a torch.nn.Module")
    shape = input_shape if input_shape is not None else getattr(net, "input_shape", None)
    if shape is None:
        raise ModelError(
            f"the images that {source} takes are not known: give the input shape (channels, height, width), or set "
            "the attribute input_shape on the module"
        )
    try:
        checked = check_input_shape(tuple(shape))
    except (TypeError, InputError):
        raise ModelError(f"the input shape of {source} must be like 3, 32, 32 and not {shape!r}") from None
    net = net.to(device).eval()
    count = _probe(net, checked, source, device)
    if classes is None:
        own = getattr(net, "classes", None)
        classes = own if isinstance(own, (list, tuple)) else None
    if classes is None:
        classes = [str(number) for number in range(count)]
    names, ids = given_classes(classes)
    if len(names) != count:
        raise ModelError(f"{source} returns {count} logits, but {len(names)} classes are named: give one name a logit")
    arch = type(net).__qualname__
    classifier = Classifier(net, arch=arch, input_shape=checked, classes=names, class_ids=ids, source=source)
    return classifier.to(device).eval()


def _probe(net: nn.Module, shape: tuple[int, int, int], source: str, device: torch.device) -> int:
    """Run two flat images through the net and return the number of logits K."""
    images = torch.zeros((2, *shape), device=device)
    images[1] = 0.5
    try:
        with torch.no_grad():
            logits = net(images)
    except Exception as error:
        raise ModelError(
            f"{source} does not take images {shape_text(shape)} ({type(error).__name__}: {one_line(error)}): "
            "give the input shape that it was made for"
        ) from error
    if not isinstance(logits, Tensor):
        raise ModelError(f"{source} returns {type(logits).__name__} for a batch: it must return logits N x K")
    if logits.dim() != 2 or logits.shape[0] != 2 or logits.shape[1] < 2 or not logits.is_floating_point():
        raise ModelError(
            f"{source} returns {shape_text(logits.shape)} for 2 images {shape_text(shape)}: "
            "it must return logits N x K of at least 2 classes"
        )
    if not bool(logits.isfinite().all()):
        raise ModelError(f"{source} returns logits that are not finite for a black and a grey image: check its weights")
    if bool((logits >= 0).all()) and bool(((logits.sum(1) - 1).abs() < 1e-3).all()):
        raise ModelError(f"{source} returns probabilities: it must return logits, so leave the softmax out")
    return logits.shape[1]
