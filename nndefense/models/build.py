"""New classifiers with fresh weights."""

from __future__ import annotations

import difflib
from collections.abc import Sequence

import torch

from nndefense.errors import InputError
from nndefense.models.architectures import ARCHITECTURES
from nndefense.models.classifier import Classifier, check_input_shape


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
        hint = f"did you mean {close[0]}?" if close else f"choose one of {', '.join(ARCHITECTURES)}"
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
    classifier = Classifier(
        net,
        arch=arch,
        input_shape=shape,
        classes=classes,
        mean=mean,
        std=std,
        fixed_size=architecture.fixed_size,
    )
    return classifier.eval()
