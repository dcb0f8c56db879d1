"""One way to any classifier, on any device: a trained folder, torchvision, a user's own code, or fresh weights."""

from __future__ import annotations

import difflib
import random
import re
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from nndefense.errors import InputError, ModelError, one_line
from nndefense.images import shape_text
from nndefense.models.architectures import ARCHITECTURES, KNOWN
from nndefense.models.checkpoint import load_folder
from nndefense.models.classifier import Classes, Classifier, check_input_shape, given_classes
from nndefense.models.named_sources import HF, TIMM, load_hf, load_timm
from nndefense.models.torchvision_source import TORCHVISION, load_torchvision, weights_at_hand
from nndefense.modes import outside_inference_mode
from nndefense.own_code import PYTHON, own_function
from nndefense.unwrapping import unwrapped


@outside_inference_mode
def load_classifier(
    source: str | Path,
    *,
    device: str | torch.device = "cpu",
    input_shape: Sequence[int] | None = None,
    classes: Classes | None = None,
    data_dir: str | Path | None = None,
    guess: Callable[[], Sequence[int]] | None = None,
) -> Classifier:
    """Return a classifier in evaluation mode on ``device``.

    Args:
        source: a folder that :func:`save_classifier` or a training wrote; ``torchvision:NAME:WEIGHTS``, such as
            ``torchvision:resnet50:IMAGENET1K_V2``, with ``none`` for random weights;
            ``timm:NAME[:pretrained]`` and ``hf:MODEL`` (:mod:`nndefense.models.named_sources`); or
            ``python:FILE_OR_MODULE:FACTORY``, a function that returns a module from images in [0, 1] to logits.
        device: as for :func:`resolve_device`.
        input_shape: channels, height and width, where the source does not know them or other ones are wanted.
        classes: names of the classes, or the path of a file for :func:`read_classes`, instead of the source's own.
        data_dir: the folder of downloads; torch's own cache by default.
        guess: gives the input shape that a module is taken to have which does not say its own.

    Raises:
        ModelError: the classifier cannot be found, read or used.
        InputError: the device or the input shape is impossible.
    """
    target = resolve_device(device)
    text = str(source)
    if text.startswith(PYTHON):
        return load_python(text, device=target, input_shape=input_shape, classes=classes, guess=guess)
    if text.startswith(TORCHVISION):
        classifier = load_torchvision(text, data_dir=None if data_dir is None else Path(data_dir))
    elif text.startswith(TIMM):
        classifier = load_timm(text)
    elif text.startswith(HF):
        classifier = load_hf(text)
    elif re.match(r"[a-z]\w+:", text) and not Path(text).exists():
        raise ModelError(
            f"{text} is no kind of classifier: write torchvision:NAME:WEIGHTS, timm:NAME, hf:MODEL or "
            "python:FILE:FACTORY"
        )
    else:
        classifier = load_folder(Path(text).expanduser())
    if input_shape is not None:
        own, shape = classifier.input_shape, check_input_shape(input_shape)
        if shape[0] != own[0] or (classifier.fixed_size and shape != own):
            given = f"images {shape_text(own)}, not {shape_text(shape)}"
            raise ModelError(f"{text} takes {given}: leave the input shape out")
        classifier.input_shape = shape
    if classes is not None:
        names, ids = given_classes(classes)
        if len(names) != len(classifier.classes):
            raise ModelError(
                f"{text} has {len(classifier.classes)} classes, but {len(names)} are named: give one name a class"
            )
        classifier.classes, classifier.class_ids = names, ids
    return classifier.to(target).eval()


def is_named(source: str) -> bool:
    """Whether a source is a name of another library's, for a classifier that may be fetched."""
    return source.startswith((TORCHVISION, TIMM, HF))


def asks_nobody(source: str) -> bool:
    """Whether loading a classifier by such a name fetches nothing, and opens nothing but the library's own cache.

    Raises:
        ModelError: torchvision has no such net.
    """
    if source.startswith(TORCHVISION):
        return weights_at_hand(source)
    # Of timm's names those with a colon are of a hub or of a folder, or want published weights.
    return source.startswith(TIMM) and re.fullmatch(r"[\w.-]+", source.removeprefix(TIMM)) is not None


@outside_inference_mode
def build_classifier(
    arch: str,
    *,
    input_shape: Sequence[int],
    classes: Sequence[str],
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    seed: int = 0,
) -> Classifier:
    """Return an untrained classifier of a built-in architecture, on the CPU and in evaluation mode.

    Args:
        arch: a key of :data:`ARCHITECTURES`.
        input_shape: channels, height and width of the images.
        classes: the names of the K classes.
        mean, std: per channel, for pixels in [0, 1]; images are left as they are by default.
        seed: of the initial weights; the same seed gives the same weights, and the global random state is untouched.

    Raises:
        InputError: no such architecture, or it does not take such images.
    """
    if arch not in ARCHITECTURES:
        close = difflib.get_close_matches(arch, ARCHITECTURES, n=1)
        hint = f"did you mean {close[0]}?" if close else f"choose one of {KNOWN}"
        raise InputError(f"there is no architecture {arch!r}: {hint}")
    architecture = ARCHITECTURES[arch]
    shape = check_input_shape(input_shape)
    if min(shape[1:]) < architecture.smallest:
        side = architecture.smallest
        raise InputError(f"{arch} takes images from {side} x {side} up, not {shape[1]} x {shape[2]}: enlarge them")
    # The default generator alone is seeded: torch.manual_seed would seed those of the GPUs too, which are not forked.
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.default_generator.manual_seed(seed)
        net = architecture.build(shape, len(classes))
    size = architecture.fixed_size
    return Classifier(net, arch=arch, input_shape=shape, classes=classes, mean=mean, std=std, fixed_size=size).eval()


def resolve_device(name: str | torch.device = "auto") -> torch.device:
    """Return the device called ``name``: ``auto`` (a CUDA GPU if there is one, else the CPU), ``cpu``, ``cuda``, ...

    Raises:
        InputError: no such device, or it is not on this computer.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise InputError(f"there is no device {str(name)!r}: use auto, cpu, cuda or cuda:N") from None
    if device.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if count == 0:
            raise InputError("no CUDA GPU can be used here: choose the device cpu or auto")
        if device.index is not None and device.index >= count:
            raise InputError(f"there is no device {device}: this computer has cuda:0 to cuda:{count - 1}")
    elif device.type == "mps" and not torch.backends.mps.is_available():
        raise InputError("no Apple GPU can be used here: choose the device cpu or auto")
    return device


def load_python(
    source: str,
    *,
    device: torch.device,
    input_shape: Sequence[int] | None = None,
    classes: Classes | None = None,
    guess: Callable[[], Sequence[int]] | None = None,
) -> Classifier:
    """Return the net that ``python:FILE_OR_MODULE:FACTORY`` makes as a classifier in evaluation mode on ``device``.

    FACTORY is called without arguments and returns a module from images N x C x H x W in [0, 1] to logits N x K. The
    module may have attributes ``input_shape`` (C, H, W) and ``classes`` (names), which the arguments override;
    ``guess`` is asked for the shape only where nothing else says it.

    Raises:
        ModelError: the code cannot be found or run, or what it makes is not such a module.
    """
    made = own_function(source, returns="the net", call="without arguments", error=ModelError)()
    if not isinstance(made, nn.Module):
        raise ModelError(f"{source} returned {type(made).__name__}: it must return a torch.nn.Module")
    net = unwrapped(made)
    # What was said on a wrapper stands there alone.
    own_shape, own_classes = (getattr(made, name, getattr(net, name, None)) for name in ("input_shape", "classes"))
    shape = input_shape if input_shape is not None else own_shape
    if shape is None and guess is not None:
        shape = guess()
    if shape is None:
        raise ModelError(
            f"the images that {source} takes are not known: give the input shape (channels, height, width), or set "
            "the attribute input_shape on the module"
        )
    try:
        checked = check_input_shape(tuple(shape))
    except (TypeError, InputError):
        raise ModelError(f"the input shape of {source} must be like 3, 32, 32 and not {shape!r}") from None
    try:
        net = net.to(device).eval()
    except NotImplementedError as error:
        raise ModelError(
            f"{source} returned a net that cannot be put on {device} in evaluation mode ({one_line(error)}): return "
            "the net itself with its weights, or torch.export.unflatten(program) of an exported one"
        ) from error
    count = _probe(net, checked, source, device)
    if classes is None:
        classes = own_classes if isinstance(own_classes, (list, tuple)) else None
    if classes is None:
        classes = [str(number) for number in range(count)]
    names, ids = given_classes(classes)
    if len(names) != count:
        raise ModelError(f"{source} returns {count} logits, but {len(names)} classes are named: give one name a logit")
    arch = type(net).__qualname__
    classifier = Classifier(net, arch=arch, input_shape=checked, classes=names, class_ids=ids, source=source)
    return classifier.to(device).eval()


def _probe(net: nn.Module, shape: tuple[int, int, int], source: str, device: torch.device) -> int:
    """Run a few images through the net, together, one by one and again, and return the number of logits K."""
    images = torch.rand((4, *shape), generator=torch.Generator().manual_seed(0)).to(device)
    images[:3] = torch.tensor([0, 0.5, 1], device=device).view(3, 1, 1, 1)
    with torch.no_grad(), torch.random.fork_rng([device] if device.type == "cuda" else []):
        before = _chance(device)
        try:
            logits = net(images)
        except Exception as error:
            raise ModelError(_why_none(net, images, source, error)) from error
        if not isinstance(logits, Tensor):
            raise ModelError(f"{source} returns {type(logits).__name__} for a batch: it must return logits N x K")
        if logits.dim() != 2 or len(logits) != len(images) or logits.shape[1] < 2 or not logits.is_floating_point():
            raise ModelError(
                f"{source} returns {shape_text(logits.shape)} for {len(images)} images {shape_text(shape)}: "
                "it must return logits N x K of at least 2 classes"
            )
        finite = logits.isfinite().all(1)
        if not finite[-1]:
            raise ModelError(f"{source} returns logits that are not finite for random images: check its weights")
        if not finite.all():
            # It divides by the image's spread, say. A flat image that it has no answer to is the image's fault.
            images = images[finite]
            logits = net(images)
        if bool((logits >= 0).all()) and bool(((logits.sum(1) - 1).abs() < 1e-3).all()):
            raise ModelError(f"{source} returns probabilities: it must return logits, so leave the softmax out")
        alone = _one_by_one(net, images, logits, source)
        # What has drawn from a generator may still have drawn the same twice.
        for _ in range(1 if _chance(device) == before else 8):
            again = net(images), _one_by_one(net, images, logits, source)
            if max(_apart(net, logits, again[0]), _apart(net, alone, again[1])) > 0.01:
                raise ModelError(
                    f"{source} is random: the same images give other logits when it is asked again. Turn off "
                    "what draws in evaluation mode, such as dropout without training=self.training"
                )
        if _apart(net, logits, alone) > 1:
            raise ModelError(
                f"the logits of {source} for an image depend on the other images of its batch, so that it is no "
                "function of the image: use running statistics in the place of the batch's (track_running_stats)"
            )
    return int(logits.shape[1])


def _one_by_one(net: nn.Module, images: Tensor, logits: Tensor, source: str) -> Tensor:
    try:
        found = [net(image[None]) for image in images]
    except Exception as error:
        raise ModelError(
            f"{source} takes {len(images)} images at a time, but not one ({type(error).__name__}: {one_line(error)}): "
            "it must take batches of any size"
        ) from error
    if any(one.shape != logits[:1].shape for one in found):
        raise ModelError(
            f"{source} returns {shape_text(found[0].shape)} for one image: it must return logits N x K for batches of "
            "any size, so give squeeze() the axes that it is to remove"
        )
    return torch.cat(found)


def _apart(net: nn.Module, one: Tensor, other: Tensor) -> float:
    """The largest difference of two answers, as a multiple of what rounding may make."""
    kinds = {value.dtype for value in (one, *net.parameters()) if value.is_floating_point()}
    share = max(1e-3 if one.device.type == "cpu" else 2e-2, *(16 * torch.finfo(kind).eps for kind in kinds))
    if any("quantized.dynamic" in type(module).__module__ for module in net.modules()):
        # Its scales are those of the batch.
        share = max(share, 0.1)
    spread = (one - one.mean()).abs().amax().float() * share + one.abs().amax().float() * 1e-5 + 1e-12
    return float((one - other).abs().amax().float() / spread)


def _chance(device: torch.device) -> tuple[object, ...]:
    """Where the generators stand from which a net may draw."""
    own = torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()
    numbers = np.random.get_state(legacy=False)  # noqa: NPY002
    return own.numpy().tobytes(), random.getstate(), repr(numbers)


def _why_none(net: nn.Module, images: Tensor, source: str, error: Exception) -> str:
    """Why a net does not take these images, and what to do, in one line."""
    text = f"{type(error).__name__}: {one_line(error)}"
    kinds = {value.dtype for value in (*net.parameters(), *net.buffers()) if value.is_floating_point()}
    kinds -= {images.dtype}
    if kinds and re.search(r"dtype|type \(|scalar type|same type|Half|BFloat16|Double", text):
        names = " and ".join(sorted(str(kind).removeprefix("torch.") for kind in kinds))
        return f"{source} has weights in {names}, but images are float32 ({text}): return net.float()"
    if images.device.type != "cpu" and "quantized" in text:
        return f"{source} is quantised and does not run on {images.device} ({text}): choose the device cpu"
    for count in (1, 2, 8):
        try:
            net(images[:1].repeat(count, 1, 1, 1))
        except Exception:
            continue
        return (
            f"{source} takes {count} image{'s' if count > 1 else ''} at a time and no other number ({text}): trace or "
            "export it for batches of any size, or return the net that it was made from"
        )
    shape = shape_text(images.shape[1:])
    return f"{source} does not take images {shape} ({text}): give the input shape that it was made for"
