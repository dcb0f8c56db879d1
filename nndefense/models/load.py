"""One way to any classifier: a trained folder, torchvision, or a user's own code."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import torch

from nndefense.errors import ModelError
from nndefense.images import shape_text
from nndefense.models.checkpoint import load_folder
from nndefense.models.classes import Classes, given_classes
from nndefense.models.classifier import Classifier, check_input_shape
from nndefense.models.device import resolve_device
from nndefense.models.python_source import load_python
from nndefense.models.torchvision_source import TORCHVISION, load_torchvision
from nndefense.own_code import PYTHON


def load_classifier(
    source: str | Path,
    *,
    device: str | torch.device = "cpu",
    input_shape: Sequence[int] | None = None,
    classes: Classes | None = None,
    data_dir: str | Path | None = None,
) -> Classifier:
    """Return a classifier in evaluation mode on ``device``.

    Args:
        source: a folder that :func:`save_classifier` or a training wrote; ``torchvision:NAME:WEIGHTS``, such as
            ``torchvision:resnet50:IMAGENET1K_V2``, with ``none`` for random weights; or
            ``python:FILE_OR_MODULE:FACTORY``, a function that returns a module from images in [0, 1] to logits.
        device: as for :func:`resolve_device`.
        input_shape: channels, height and width, where the source does not know them or other ones are wanted.
        classes: names of the classes, or the path of a file for :func:`read_classes`, instead of the source's own.
        data_dir: the folder of downloads; torch's own cache by default.

    Raises:
        ModelError: the classifier cannot be found, read or used.
        InputError: the device or the input shape is impossible.
    """
    target = resolve_device(device)
    text = str(source)
    if text.startswith(PYTHON):
        return load_python(text, device=target, input_shape=input_shape, classes=classes)
    if text.startswith(TORCHVISION):
        classifier = load_torchvision(text, data_dir=None if data_dir is None else Path(data_dir))
    elif re.match(r"[a-z]\w+:", text) and not Path(text).exists():
        raise ModelError(f"{text} is no kind of classifier: write torchvision:NAME:WEIGHTS or python:FILE:FACTORY")
    else:
        classifier = load_folder(Path(text).expanduser())
    if input_shape is not None:
        _set_shape(classifier, check_input_shape(input_shape), text)
    if classes is not None:
        names, ids = given_classes(classes)
        if len(names) != len(classifier.classes):
            raise ModelError(
                f"{text} has {len(classifier.classes)} classes, but {len(names)} are named: give one name a class"
            )
        classifier.classes, classifier.class_ids = names, ids
    return classifier.to(target).eval()


def _set_shape(classifier: Classifier, shape: tuple[int, int, int], source: str) -> None:
    own = classifier.input_shape
    if shape[0] != own[0] or (classifier.fixed_size and shape != own):
        raise ModelError(f"{source} takes images {shape_text(own)}, not {shape_text(shape)}: leave the input shape out")
    classifier.input_shape = shape
