"""A classifier in a folder: ``model.safetensors`` holds the weights, ``classifier.json`` everything else."""

from __future__ import annotations

import datetime
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nndefense.errors import InputError, ModelError, one_line
from nndefense.files import MOST_CLASSES, make_folder, tell_unsealed
from nndefense.images import shape_text
from nndefense.models.architectures import ARCHITECTURES, KNOWN
from nndefense.models.classifier import Classifier
from nndefense.models.files import read_json, read_tensors, write_json, write_tensors
from nndefense.models.named_sources import HF, TIMM
from nndefense.models.torchvision_source import TORCHVISION, build_torchvision, torchvision_options
from nndefense.versions import library_versions

FORMAT = "nndefense-classifier"
VERSION = 1
DESCRIPTION_FILE = "classifier.json"
WEIGHTS_FILE = "model.safetensors"

PICKLES = frozenset({".bin", ".ckpt", ".pickle", ".pkl", ".pt", ".pth", ".tar", ".th"})
# Names and other notes in a file of weights.
_SPARE = 16 << 20
_REMEDY = "copy the folder again or train the classifier again"


def save_classifier(classifier: Classifier, folder: str | Path) -> None:
    """Write a classifier of a built-in or torchvision architecture to a folder, which is created if need be.

    Each file is replaced in one step and ``classifier.json`` comes last, so a crash never leaves a folder that loads
    as something it is not.

    Raises:
        InputError: the architecture is a user's own, or the folder cannot be written.
    """
    check_savable(classifier)
    folder = Path(folder).expanduser()
    make_folder(folder)
    sha256 = write_tensors(folder / WEIGHTS_FILE, classifier.state_dict())
    data = classifier.info.get("data")
    description = {
        "format": FORMAT,
        "version": VERSION,
        "created": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "architecture": classifier.arch,
        "options": torchvision_options(classifier.net) if classifier.arch.startswith(TORCHVISION) else {},
        "classes": classifier.classes,
        "class_ids": classifier.class_ids,
        "input_shape": classifier.input_shape,
        "fixed_size": classifier.fixed_size,
        "normalization": {"mean": classifier.mean.flatten().tolist(), "std": classifier.std.flatten().tolist()},
        "weights": {"file": WEIGHTS_FILE, "sha256": sha256},
        "fingerprint": classifier.fingerprint,
        "data_fingerprint": data.get("fingerprint") if isinstance(data, Mapping) else None,
        "info": classifier.info,
        "versions": library_versions(),
    }
    write_json(folder / DESCRIPTION_FILE, description)


def check_savable(classifier: Classifier) -> None:
    """Raise :class:`InputError` if the architecture could not be built again from its name."""
    if classifier.arch not in ARCHITECTURES and not classifier.arch.startswith(TORCHVISION):
        how = f"as {classifier.arch}" if classifier.arch.startswith((TIMM, HF)) else "with python:FILE:FACTORY"
        raise InputError(
            f"a classifier of the architecture {classifier.arch} cannot be saved to a folder, because a folder holds "
            f"no code: load it {how} each time, and keep its weights in a file of your own"
        )


def load_folder(folder: Path) -> Classifier:
    """Read a classifier that :func:`save_classifier` wrote; on the CPU and in evaluation mode.

    Raises:
        ModelError: anything is missing, damaged or does not fit.
    """
    classifier, had_digest = _load(folder)
    if not had_digest:
        tell_unsealed(folder, folder)
    return classifier


def seal_folder(folder: Path) -> None:
    """Give ``classifier.json`` the digest that those of older versions lack, once the whole folder was looked through.

    Raises:
        ModelError: anything is missing, damaged or does not fit, or the weights are others than it says.
    """
    classifier, _ = _load(folder)
    path = folder / DESCRIPTION_FILE
    description, _ = read_json(path, FORMAT, VERSION, _REMEDY)
    if description.get("fingerprint") != classifier.fingerprint:
        raise ModelError(f"{path} was written for other weights or another architecture: {_REMEDY}")
    write_json(path, description)


def _load(folder: Path) -> tuple[Classifier, bool]:
    """The classifier of a folder, and whether its description has a digest."""
    path = folder / DESCRIPTION_FILE
    if not path.exists():
        raise ModelError(_why_not(folder))
    description, had_digest = read_json(path, FORMAT, VERSION, _REMEDY)
    try:
        _check_size(description, folder)
        tensors = read_tensors(folder / WEIGHTS_FILE, str(description["weights"]["sha256"]), _REMEDY)
        classifier = _build(description, str(folder))
    except (KeyError, TypeError, ValueError, AttributeError, ArithmeticError, IndexError, RuntimeError) as error:
        # InputError is a ValueError: here it is the file that is wrong, not an argument.
        what = f"it has no {error}" if isinstance(error, KeyError) else one_line(error)
        raise ModelError(f"{path} does not describe a classifier ({what}): {_REMEDY}") from error
    _check_fit(classifier, tensors, folder / WEIGHTS_FILE)
    classifier.load_state_dict(tensors)
    return classifier.eval(), had_digest


def _check_size(description: dict[str, Any], folder: Path) -> None:
    """Raise :class:`ModelError` where the net that is described has far more weights than the file, or far fewer.

    A line can describe a net of any size, and the net is built before its weights are compared.
    """
    # On this device tensors have shapes and no memory.
    try:
        with torch.device("meta"):
            net = _net(description, str(folder))
    except NotImplementedError:
        # RegNets compute with tensors while they are built; torchvision's are of known sizes.
        return
    wanted = sum(tensor.numel() * tensor.element_size() for tensor in net.state_dict().values())
    path = folder / WEIGHTS_FILE
    found = path.stat().st_size if path.is_file() else -1
    if found >= 0 and (wanted > 2 * found + _SPARE or found > 2 * wanted + _SPARE):
        raise ModelError(
            f"the net that {folder / DESCRIPTION_FILE} describes has {wanted:,} bytes of weights, but {path.name} has "
            f"{found:,} bytes: {_REMEDY}"
        )


def _net(description: dict[str, Any], source: str) -> nn.Module:
    """The net that is described, with fresh weights."""
    arch, count = description["architecture"], len(description["classes"])
    if count > MOST_CLASSES:
        raise ModelError(f"the classifier in {source} has {count:,} classes, more than the {MOST_CLASSES:,} allowed")
    if isinstance(arch, str) and arch.startswith(TORCHVISION):
        return build_torchvision(arch.removeprefix(TORCHVISION), count, description.get("options") or {})
    if arch not in ARCHITECTURES:
        raise ModelError(
            f"{Path(source, DESCRIPTION_FILE)} names the architecture {arch!r}, which is unknown here "
            f"(known are {KNOWN}): use the version of nndefense that wrote it"
        )
    return ARCHITECTURES[arch].build(tuple(description["input_shape"]), count)


def _build(description: dict[str, Any], source: str) -> Classifier:
    return Classifier(
        _net(description, source),
        arch=description["architecture"],
        input_shape=description["input_shape"],
        classes=description["classes"],
        class_ids=description.get("class_ids"),
        mean=description["normalization"]["mean"],
        std=description["normalization"]["std"],
        source=source,
        info=description.get("info"),
        fixed_size=bool(description.get("fixed_size")),
    )


def _check_fit(classifier: Classifier, tensors: dict[str, Tensor], path: Path) -> None:
    """Say in one line where stored weights differ from those that the architecture has."""
    expected = classifier.state_dict()
    problem = ""
    if missing := sorted(expected.keys() - tensors.keys()):
        problem = f"{len(missing)} tensors such as {missing[0]} are missing"
    elif extra := sorted(tensors.keys() - expected.keys()):
        problem = f"{len(extra)} tensors such as {extra[0]} do not belong to it"
    else:
        for name, tensor in expected.items():
            if tensor.shape != tensors[name].shape or tensor.dtype != tensors[name].dtype:
                given, wanted = (
                    f"{shape_text(t.shape)} {str(t.dtype).removeprefix('torch.')}" for t in (tensors[name], tensor)
                )
                problem = f"{name} is {given}, not {wanted}"
                break
    if problem:
        raise ModelError(f"the weights in {path} do not fit the architecture {classifier.arch} ({problem}): {_REMEDY}")


def _why_not(folder: Path) -> str:
    """Why there is no classifier to load at ``folder``, and what to do, in one line."""
    forms = "give a trained folder, torchvision:NAME:WEIGHTS, timm:NAME, hf:MODEL or python:FILE:FACTORY"
    if not folder.exists():
        if folder.suffix.lower() in PICKLES:
            return f"there is no {folder}, and pickled weights would not be loaded: {forms}"
        if str(folder) in ARCHITECTURES:
            return f"{folder} is an architecture, not a trained classifier: train it first and give its folder"
        return f"there is no classifier at {folder}: {forms}"
    if folder.is_file():
        if folder.suffix.lower() in PICKLES:
            return _no_pickles(folder)
        if folder.suffix == ".py":
            return f"{folder} is Python code: name the function in it that builds the net, as python:{folder}:FACTORY"
        if folder.name in (DESCRIPTION_FILE, WEIGHTS_FILE):
            return f"{folder} is one file of a classifier: give its folder {folder.parent}"
        return f"{folder} is a file, not the folder of a classifier: {forms}"
    if (folder / "training.json").exists():
        return f"{folder} holds a training that is not finished: finish it with --resume of the command that trains it"
    pickles = sorted(path for path in folder.iterdir() if path.suffix.lower() in PICKLES and path.name[0] != ".")
    if pickles:
        return _no_pickles(pickles[0])
    return f"{folder} is not the folder of a classifier, because it has no {DESCRIPTION_FILE}: {forms}"


def _no_pickles(path: Path) -> str:
    return (
        f"{path} is a pickle, which could run any code and is never loaded: build the net in your own code and give "
        "python:FILE:FACTORY, or convert the weights to safetensors"
    )
