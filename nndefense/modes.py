"""Modes: what is used and never trained is held in evaluation mode, and what needs gradients leaves inference mode."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

_Module = TypeVar("_Module", bound="EvaluationOnly")
_Call = TypeVar("_Call", bound=Callable[..., Any])
_lock = threading.Lock()
# Modules that were in training mode -> how many passes hold them in evaluation mode now.
_held: dict[nn.Module, int] = {}


class EvaluationOnly(nn.Module):
    """A module that is in evaluation mode always: ``train()``, also a parent's, changes neither it nor its parts.

    Its nets may be shared, and be trained elsewhere meanwhile: every pass through them stands in :func:`evaluating`.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.training = False

    def train(self: _Module, mode: bool = True) -> _Module:
        """Do nothing; with ``mode`` False, as by ``eval()``, put all parts in evaluation mode."""
        return self if mode else super().train(False)


@contextmanager
def evaluating(*nets: nn.Module) -> Iterator[None]:
    """Hold nets in evaluation mode for a while; then each of their modules has its own mode again.

    So batch normalisation uses its stored statistics and leaves them as they are, and dropout is off. Passes of several
    threads may overlap: a module's mode comes back with the last of them.
    """
    modules = {module for net in nets for module in net.modules()}
    with _lock:
        mine = [module for module in modules if module.training or module in _held]
        for module in mine:
            _held[module] = _held.get(module, 0) + 1
            module.training = False
    try:
        yield
    finally:
        with _lock:
            for module in mine:
                _held[module] -= 1
                if not _held[module]:
                    del _held[module]
                    module.training = True


def outside_inference_mode(function: _Call) -> _Call:
    """The function, run outside :func:`torch.inference_mode` wherever it is called, on copies of tensors that were made
    in it: autograd takes neither.
    """

    @functools.wraps(function)
    def call(*args: Any, **named: Any) -> Any:
        with torch.inference_mode(False):
            return function(*map(_normal, args), **{name: _normal(value) for name, value in named.items()})

    return call  # type: ignore[return-value]


def _normal(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) and value.is_inference() else value
