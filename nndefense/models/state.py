"""What a net keeps, as its fingerprint reads it: tensors of any kind, and whatever else stands in its state."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

_PLAIN = (bool, int, float, complex, str, bytes, bytearray, torch.dtype, torch.device)


def tensors_in(net: nn.Module) -> dict[str, Tensor]:
    """The tensors in a net's state, by name; a net may keep other things there (``_extra_state``, packed weights)."""
    return {name: value for name, value in net.state_dict().items() if isinstance(value, Tensor)}


def constants_in(net: nn.Module) -> dict[str, Tensor]:
    """The tensors that stand in the code of TorchScript, as the weights of a frozen net do."""
    found: dict[str, Tensor] = {}
    outermost = ""
    for name, module in net.named_modules():
        inside = outermost and name.startswith(outermost)
        if not inside and isinstance(module, torch.jit.ScriptModule) and hasattr(module, "forward"):
            outermost = f"{name}."
            graph = module.inlined_graph
            values = [node.output().toIValue() for node in graph.findAllNodes("prim::Constant")]  # type: ignore[attr-defined]
            tensors = [value for value in values if isinstance(value, Tensor)]
            found |= {f"{name} constant {place}": tensor for place, tensor in enumerate(tensors)}
            if not name:
                break
    return found


def update_with_state(digest: hashlib._Hash, state: Mapping[str, Any]) -> None:
    """Feed a net's state to a hash in order of its names.

    Of a tensor: name, type, shape and little-endian bytes. Of anything else what it is made of: the tensors in it, and
    the values that Python would copy it by.
    """
    for name in sorted(state):
        _update(digest, name, state[name])


def _update(digest: hashlib._Hash, name: str, value: Any, within: tuple[int, ...] = ()) -> None:
    def parts(kind: str, found: Iterable[tuple[str, Any]]) -> None:
        digest.update(f"{name} {kind}\n".encode())
        for part, inner in found:
            _update(digest, f"{name}.{part}", inner, (*within, id(value)))

    if isinstance(value, Tensor):
        if hasattr(value, "__tensor_flatten__"):
            inner, context = value.__tensor_flatten__()
            parts(type(value).__qualname__, [*((part, getattr(value, part)) for part in inner), ("context", context)])
        elif value.is_quantized:
            grid: tuple[Any, ...]
            if value.qscheme() == torch.per_tensor_affine:
                grid = value.q_scale(), value.q_zero_point()
            else:
                grid = value.q_per_channel_scales(), value.q_per_channel_zero_points(), value.q_per_channel_axis()
            parts(str(value.dtype), [("numbers", value.int_repr()), ("grid", grid)])
        else:
            _update_with_tensor(digest, name, value)
    elif id(value) in within:
        digest.update(f"{name} is around itself\n".encode())
    elif isinstance(value, Mapping):
        parts("mapping", sorted(((repr(key), inner) for key, inner in value.items()), key=lambda pair: pair[0]))
    elif isinstance(value, (set, frozenset)):
        parts("set", [(text, None) for text in sorted(map(repr, value))])
    elif isinstance(value, (list, tuple)):
        parts("sequence", ((str(place), inner) for place, inner in enumerate(value)))
    elif value is None or isinstance(value, _PLAIN):
        digest.update(f"{name} {type(value).__qualname__} {value!r}\n".encode())
    elif hasattr(value, "__qualname__"):
        # Without its module: that of a user's file has the file's path in it.
        digest.update(f"{name} is {value.__qualname__}\n".encode())
    else:
        try:
            made = value.__reduce_ex__(4)
        except Exception:
            # What cannot be copied has nothing to be told by but its kind.
            made = None
        found = (
            [made]
            if made is None or isinstance(made, str)
            else [tuple(p) if isinstance(p, Iterator) else p for p in made]
        )
        parts(type(value).__qualname__, ((str(place), inner) for place, inner in enumerate(found)))


def _update_with_tensor(digest: hashlib._Hash, name: str, tensor: Tensor) -> None:
    if tensor.layout != torch.strided:
        tensor = tensor.to_dense()
    tensor = tensor.detach().cpu().contiguous()
    digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
    data = tensor.reshape(-1).view(torch.uint8)
    if sys.byteorder == "big":
        data = data.view(-1, tensor.element_size()).flip(1).reshape(-1)
    digest.update(data.numpy().data)
