"""Classifiers from a user's own Python code."""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import importlib.util
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from nndefense.errors import InputError, ModelError
from nndefense.images import shape_text
from nndefense.models.classes import Classes, given_classes
from nndefense.models.classifier import Classifier, check_input_shape
from nndefense.models.files import one_line

PYTHON = "python:"


def load_python(
    source: str,
    *,
    device: torch.device,
    input_shape: Sequence[int] | None = None,
    classes: Classes | None = None,
) -> Classifier:
    """Return the net that ``python:FILE_OR_MODULE:FACTORY`` makes as a classifier in evaluation mode on ``device``.

    FACTORY is called without arguments and returns a module from images N x C x H x W in [0, 1] to logits N x K. The
    module may have attributes ``input_shape`` (C, H, W) and ``classes`` (names), which the arguments override. While
    FILE runs, its folder comes first among the places of imports; afterwards nothing of that is left, so that two
    files may each have a helper of the same name beside them.

    Raises:
        ModelError: the code cannot be found or run, or what it makes is not such a module.
    """
    target, _, factory = source.removeprefix(PYTHON).rpartition(":")
    if not target or not factory:
        raise ModelError(f"{source} is not complete: write python:FILE:FACTORY, such as python:models.py:build")
    net = _make(target, factory)
    if not isinstance(net, nn.Module):
        raise ModelError(f"{factory} in {target} returned {type(net).__name__}: it must return a torch.nn.Module")
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
    return (
        Classifier(
            net,
            arch=type(net).__qualname__,
            input_shape=checked,
            classes=names,
            class_ids=ids,
            source=source,
        )
        .to(device)
        .eval()
    )


def _make(target: str, factory: str) -> Any:
    """Import ``target`` and call its ``factory``; every failure becomes a ModelError of one line."""
    is_file = target.endswith(".py") or os.sep in target or "/" in target or Path(target).is_file()
    path = Path(target).expanduser().resolve()
    if is_file and not path.is_file():
        raise ModelError(f"there is no file {target}: check the path before the last colon")
    with _imports_beside(path) if is_file else contextlib.nullcontext():
        try:
            module = _run_file(path) if is_file else importlib.import_module(target)
        except (Exception, SystemExit) as error:
            if isinstance(error, ModuleNotFoundError) and not is_file and error.name == target.partition(".")[0]:
                raise ModelError(f"there is no Python module {target}: install it, or give a file's path") from None
            raise ModelError(f"{target} could not be imported ({type(error).__name__}: {one_line(error)})") from error
        make = getattr(module, factory, None)
        if not callable(make):
            raise ModelError(f"{target} has no function {factory}: name one that returns the net")
        try:
            return make()
        except (Exception, SystemExit) as error:
            raise ModelError(
                f"{factory} in {target} raised {type(error).__name__}: {one_line(error)}; "
                "it must run without arguments and return the net"
            ) from error


def _run_file(path: Path) -> ModuleType:
    """Run a file as a module under a name that no other module has."""
    name = f"_nndefense_{hashlib.sha256(str(path).encode()).hexdigest()[:16]}_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ImportError("not a Python file: its name must end with .py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and type hints look their module up here
    try:
        spec.loader.exec_module(module)
    except BaseException:
        sys.modules.pop(name, None)
        raise
    return module


@contextlib.contextmanager
def _imports_beside(path: Path) -> Iterator[None]:
    """Let imports find the modules beside ``path``, and forget those modules afterwards.

    Otherwise the ``utils`` beside a second file would silently be the one beside the first.
    """
    folder = path.parent
    before = set(sys.modules)
    packages = {name.partition(".")[0] for name in before}
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        with contextlib.suppress(ValueError):
            sys.path.remove(str(folder))
        for name in set(sys.modules) - before:
            top = name.partition(".")[0]
            file = getattr(sys.modules[name], "__file__", None)
            # Only what the folder itself offers: an environment of installed packages may lie further down in it.
            if top not in packages and file and Path(file) in (folder / f"{top}.py", folder / top / "__init__.py"):
                _forget(top)


def _forget(top: str) -> None:
    for name in [name for name in sys.modules if name == top or name.startswith(f"{top}.")]:
        del sys.modules[name]


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
