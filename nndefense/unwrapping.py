"""A net without what is put around it to run it faster: torch.compile and data parallelism."""

from __future__ import annotations

import types
from typing import TypeVar, cast

import torch
from torch import nn

#: What wrappers call the net in them.
WRAPPERS = ("_orig_mod", "module")
# Where torch.compile keeps the function that it was given.
_COMPILED = "_torchdynamo_orig_callable"
_Net = TypeVar("_Net", bound=nn.Module)
_PARALLEL = (nn.DataParallel, nn.parallel.DistributedDataParallel)


def unwrapped(net: _Net) -> _Net:
    """The net that was compiled or wrapped for data parallelism, as a whole or in parts; any other is itself.

    Compiled code runs no hooks that came after it, and so no layer in it can be read; and replicas of a net run theirs
    on other devices. The net given stays as it is: modules around a part that is unwrapped are copied, and parameters
    and buffers are shared.
    """
    return cast(_Net, _unwrapped(net, {}))


def _unwrapped(net: nn.Module, done: dict[nn.Module, nn.Module]) -> nn.Module:
    if net in done:
        return done[net]
    done[net] = net
    if isinstance(net, torch.jit.ScriptModule):
        return net
    inner = net.module if isinstance(net, _PARALLEL) else net._modules.get("_orig_mod")
    if isinstance(inner, nn.Module):
        done[net] = _unwrapped(inner, done)
    else:
        parts = {name: None if part is None else _unwrapped(part, done) for name, part in net._modules.items()}
        compiled = net._compiled_call_impl is not None or hasattr(net.forward, _COMPILED)
        if compiled or any(parts[name] is not part for name, part in net._modules.items()):
            done[net] = _copy(net, parts)
    return done[net]


def _copy(net: nn.Module, parts: dict[str, nn.Module | None]) -> nn.Module:
    copy: nn.Module = object.__new__(type(net))
    copy.__dict__.update(net.__dict__, _modules=parts, _compiled_call_impl=None)
    forward = net.forward
    while hasattr(forward, _COMPILED):
        forward = getattr(forward, _COMPILED)
    own = "forward" in net.__dict__
    if getattr(forward, "__self__", None) is net or not own:
        # Bound to the copy, or it would run the parts of the original.
        forward = types.MethodType(getattr(forward, "__func__", forward), copy)
    if own or hasattr(net.forward, _COMPILED):
        copy.__dict__["forward"] = forward
    return copy
