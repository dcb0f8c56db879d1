"""The state of a net while it is attacked in the middle of its training, and back."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from torch import Tensor, nn

from nndefense.attacks.objective import Model
from nndefense.errors import InputError

MODES = ("eval", "train")


def check_mode(mode: str) -> None:
    """Raise :class:`InputError` unless ``mode`` is one of :data:`MODES`."""
    if mode not in MODES:
        raise InputError(f"mode is {mode!r}, but must be one of {', '.join(MODES)}")


@contextlib.contextmanager
def attacked_in(model: Model, mode: str = "eval") -> Iterator[None]:
    """Hold a net still for an attack, and give it back as it was, whatever happens inside.

    Inside, no parameter requires a gradient, so that no graph to the weights is built; the net is in evaluation mode,
    or in training mode with copies in the place of its buffers. Afterwards every module has its own mode again, every
    parameter its own ``requires_grad``, and every buffer (such as the statistics of batch normalisation) is untouched.

    Args:
        model: a module; a callable that is none is left as it is.
        mode: ``eval``, or ``train`` for batch statistics and dropout.
    """
    if not isinstance(model, nn.Module):
        yield
        return
    modes = [(module, module.training) for module in model.modules()]
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    # Put aside, not overwritten: the graph of an earlier pass may still need them as they are.
    buffers = [] if mode == "eval" else [(m, name, b) for m in model.modules() for name, b in _own_buffers(m)]
    try:
        for parameter in learning:
            parameter.requires_grad_(False)
        for module, name, buffer in buffers:
            setattr(module, name, buffer.clone())
        model.train(mode == "train")
        yield
    finally:
        for module, training in modes:
            module.training = training
        for module, name, buffer in buffers:
            setattr(module, name, buffer)
        for parameter in learning:
            parameter.requires_grad_(True)


def _own_buffers(module: nn.Module) -> list[tuple[str, Tensor]]:
    return list(module.named_buffers(recurse=False))
