"""Classifiers from torchvision, with its published weights or with random ones."""

from __future__ import annotations

import difflib
import urllib.error
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from unittest import mock
from urllib.parse import urlsplit

import torch
from torch import nn

from nndefense.errors import ModelError, one_line
from nndefense.models.class_names import imagenet_classes
from nndefense.models.classifier import Classifier

TORCHVISION = "torchvision:"

# What the weights' own recipe sets beside the weights, and what a net must be built with to take them again.
_OPTIONS = ("transform_input", "aux_logits", "image_size")


def load_torchvision(source: str, *, data_dir: Path | None = None) -> Classifier:
    """Return the classifier ``torchvision:NAME:WEIGHTS``, on the CPU and in evaluation mode.

    WEIGHTS is a name such as ``IMAGENET1K_V2``, ``DEFAULT``, or ``none`` for random weights under a fixed seed, with
    the classes, size and normalisation of the default weights. torchvision downloads the weights where they are not
    there yet, and checks their hash.

    Args:
        source: the text above.
        data_dir: where weights are kept, in its folder ``torchvision``; torch's own cache by default.

    Raises:
        ModelError: no such net or weights, or the download fails.
    """
    name, colon, label = source.removeprefix(TORCHVISION).partition(":")
    known = _weights_of(name)
    best = known.DEFAULT
    names = [*known.__members__, "none"]
    if not colon or not label:
        raise ModelError(f"{source} names no weights: give {TORCHVISION}{name}:WEIGHTS with one of {', '.join(names)}")
    if label.lower() == "none":
        weights = best
        with torch.random.fork_rng(devices=[]), torch.device("cpu"):
            torch.default_generator.manual_seed(0)
            net = build_torchvision(name, len(best.meta["categories"]), {})
    elif label in known.__members__:
        weights = known[label]
        if not weights.meta.get("categories"):
            raise ModelError(f"the weights {label} of {name} do not classify: choose one of {', '.join(names)}")
        net = _with_weights(name, label, weights, data_dir)
    else:
        raise ModelError(f"torchvision's {name} has no weights {label!r}: choose one of {', '.join(names)}")
    preset = weights.transforms()
    side = int(preset.crop_size[0])
    return Classifier(
        net,
        arch=TORCHVISION + name,
        input_shape=(3, side, side),
        classes=weights.meta["categories"],
        class_ids=_ids_of(weights.meta["categories"]),
        mean=preset.mean,
        std=preset.std,
        source=source,
        fixed_size=hasattr(net, "image_size") or name.startswith("maxvit"),
    ).eval()


def weights_at_hand(source: str) -> bool:
    """Whether :func:`load_torchvision` finds the weights of a source in torch's cache, or needs none."""
    name, _, label = source.removeprefix(TORCHVISION).partition(":")
    known = _weights_of(name).__members__
    if label not in known:
        return True
    file = Path(urlsplit(known[label].url).path).name
    return Path(torch.hub.get_dir(), "checkpoints", file).is_file()


def _ids_of(names: Sequence[str]) -> Sequence[str] | None:
    """WordNet ids, where these are ImageNet's 1,000 names."""
    known = imagenet_classes()
    return [wnid for wnid, _ in known] if list(names) == [name for _, name in known] else None


def build_torchvision(name: str, classes: int, options: Mapping[str, Any]) -> nn.Module:
    """Return torchvision's net ``name`` with fresh weights, K = ``classes`` outputs and no in-place operations.

    Raises:
        ModelError: torchvision has no such net.
    """
    _weights_of(name)
    from torchvision.models import get_model

    settings = {key: value for key, value in options.items() if key in _OPTIONS}
    if name in ("googlenet", "inception_v3"):
        # Their own initialisation takes a minute; they also warn when it is left open.
        settings["init_weights"] = False
    return without_in_place(get_model(name, weights=None, num_classes=classes, **settings))


def torchvision_options(net: nn.Module) -> dict[str, Any]:
    """The options with which :func:`build_torchvision` gives this net again."""
    return {key: getattr(net, key) for key in _OPTIONS if isinstance(getattr(net, key, None), (bool, int))}


def _weights_of(name: str) -> Any:
    """The enumeration of the weights of a classification net."""
    try:
        import torchvision
    except ImportError:
        raise ModelError("torchvision: sources need the package torchvision: install it") from None
    known = torchvision.models.list_models(module=torchvision.models)
    if name not in known:
        close = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean {close[0]}?" if close else "see torchvision's table of classification models"
        raise ModelError(f"torchvision has no classification model {name!r}: {hint}")
    return torchvision.models.get_model_weights(name)


def _with_weights(name: str, label: str, weights: Any, data_dir: Path | None) -> nn.Module:
    """Build a net by torchvision's own recipe for these weights, but read the weights without running pickled code."""
    from torchvision.models import get_model

    folder = None if data_dir is None else str(Path(data_dir) / "torchvision")
    try:
        state = weights.get_state_dict(model_dir=folder, progress=True, check_hash=True, weights_only=True)
    except (urllib.error.URLError, OSError) as error:
        raise ModelError(
            f"the weights {label} of torchvision's {name} could not be downloaded ({one_line(error)}): "
            "check the connection, or give a classifier of your own"
        ) from error
    except Exception as error:  # a wrong hash is a RuntimeError, a pickle that does more than weights another one
        raise ModelError(
            f"the weights {label} of torchvision's {name} could not be read ({one_line(error)}): "
            "delete the file from the cache and load them again"
        ) from error
    # The recipe would fetch the weights itself, with full unpickling; it gets those just read.
    with mock.patch.object(weights, "get_state_dict", return_value=state):
        return without_in_place(get_model(name, weights=weights))


def without_in_place(net: nn.Module) -> nn.Module:
    """Make activations leave their input as it is, so that a feature taken before one of them is not overwritten."""
    for module in net.modules():
        if getattr(module, "inplace", False) is True:
            module.inplace = False  # type: ignore[assignment]
    return net
