"""Reading a layer's output: for a whole forward pass, or stopping at that layer."""

from __future__ import annotations

import threading
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn

from nndefense.errors import InputError
from nndefense.modes import evaluating
from nndefense.unwrapping import WRAPPERS, unwrapped

#: The paper's names of ResNet-50's layers (Dubey et al. 2019, section 4) as torchvision's modules.
LAYER_ALIASES = {"conv_2_3": "layer1.2", "conv_3_4": "layer2.3", "conv_4_6": "layer3.5", "conv_5_1": "layer4.0"}
#: Images of a batch that shows which axis is theirs: a number that is no other axis's by habit.
PROBES = 3
_ENOUGH = 4


def resolve_layer(net: nn.Module, layer: str) -> str:
    """The module name that ``layer`` means in ``net``; where no module has that name, an alias is used, or the name
    without the parts that torch.compile and DataParallel add.

    Raises:
        InputError: no such module, and the message names some that exist; or one that cannot be read.
    """
    if isinstance(net, torch.jit.ScriptModule):
        raise _scripted("the classifier is")
    names = [name for name, _ in net.named_modules() if name]
    bare = ".".join(part for part in layer.split(".") if part not in WRAPPERS)
    for candidate in (layer, LAYER_ALIASES.get(layer, layer), bare):
        if candidate in names:
            for depth in range(1, candidate.count(".") + 2):
                if isinstance(net.get_submodule(".".join(candidate.split(".")[:depth])), torch.jit.ScriptModule):
                    raise _scripted(f"the layer {layer!r} is")
            return candidate
    shown = ", ".join(names[:12]) + (", ..." if len(names) > 12 else "")
    raise InputError(f"the classifier has no layer {layer!r}; its layers are {shown}")


def _scripted(what: str) -> InputError:
    return InputError(
        f"{what} TorchScript (traced or scripted), whose layers cannot be read: give the net that it was made from, "
        "with the same weights"
    )


def _unreached(layer: str) -> InputError:
    return InputError(
        f"a forward pass of the classifier does not reach the layer {layer!r}: choose another, or give the original of "
        "a net that was compiled or exported"
    )


class _Outputs(dict[str, Any]):
    """Layers' outputs by name, with an error for people where one is missing."""

    def __missing__(self, name: str) -> Any:
        raise _unreached(name)


@contextmanager
def tapped(
    net: nn.Module, layers: Sequence[str], of: Callable[[str, Tensor], Any] = lambda name, output: output.clone()
) -> Iterator[dict[str, Any]]:
    """While the context is open, each forward pass of ``net`` leaves these layers' outputs in the dictionary.

    ``of`` makes what is kept from a layer's name and output, at once: the layer after it may work in place, as
    ReLU(inplace=True) does. By default that is a copy.

    Raises:
        InputError: (from the forward pass) a layer that runs more than once in it, or gives more than one tensor;
            (from the dictionary) a layer that it did not reach.
    """
    outputs = _Outputs()

    def begin(module: nn.Module, args: Any) -> None:
        outputs.clear()

    def keep(name: str, module: nn.Module, args: Any, output: Any) -> None:
        if name in outputs:
            # Which of its outputs is meant? A pass that stops at the layer knows only the first.
            raise InputError(f"the layer {name!r} runs more than once in a forward pass: choose the module around it")
        outputs[name] = of(name, _tensor(output, name))

    with ExitStack() as hooks:
        hooks.enter_context(net.register_forward_pre_hook(begin))
        for name in layers:
            hooks.enter_context(net.get_submodule(name).register_forward_hook(partial(keep, name)))
        yield outputs


def spatial_layers(net: nn.Module, images: Tensor) -> list[str]:
    """The layers worth trying for retrieval, from the first to the last that a forward pass reaches.

    These are the outermost modules (a residual block rather than a convolution inside it) that run once and whose
    output is a map or tokens, with an axis for the images, and depends on a trained parameter. Plain containers are
    looked through; and where fewer than four are found, the module with the most parameters is, such as the net in a
    wrapper or the encoder of a transformer, until there are four.

    Args:
        net: the bare net.
        images: one or more images, N x C x H x W; one forward pass is made.

    Raises:
        InputError: there are none, because the net is TorchScript.
    """
    net, images = unwrapped(net), images[:1].repeat(PROBES, 1, 1, 1)
    runs: Counter[str] = Counter()
    shapes: dict[str, tuple[int, ...]] = {}
    kept: dict[str, Callable[[], Any]] = {}
    within: dict[str, list[str]] = {}

    def note(name: str, module: nn.Module, args: Any, output: Any) -> None:
        runs[name] += 1
        shapes.setdefault(name, tuple(output.shape) if isinstance(output, Tensor) else ())
        within[name] = [inner for inner, ref in kept.items() if inner.startswith(f"{name}.") and ref() is output]
        if isinstance(output, Tensor):
            kept[name] = weakref.ref(output)

    with evaluating(net), torch.no_grad(), ExitStack() as hooks:
        for name, module in net.named_modules():
            if name and not isinstance(module, torch.jit.ScriptModule):
                hooks.enter_context(module.register_forward_hook(partial(note, name)))
        net(images)
    order = {name: place for place, name in enumerate(shapes)}
    # What nothing trained has worked on yet is the image itself, perhaps normalised.
    first = next((place for name, place in order.items() if _weight(net.get_submodule(name))), len(order))

    def usable(name: str) -> bool:
        axes = shapes.get(name, ())
        shaped = len(axes) in (3, 4) and PROBES in axes[: 2 if len(axes) == 3 else 1]
        return shaped and runs[name] == 1 and order[name] >= first

    waiting = dict(_outermost(net))
    found = {name for name in waiting if usable(name)}
    while len(found) < _ENOUGH and (outer := max(waiting, key=lambda name: _weight(waiting[name]), default="")):
        inner = dict(_outermost(waiting.pop(outer), f"{outer}."))
        waiting |= inner
        found |= {name for name in inner if usable(name)}
        # A module whose output is that of its own last one would be tried twice.
        if found.intersection(within.get(outer, ())):
            found.discard(outer)
    if not found and any(isinstance(module, torch.jit.ScriptModule) for module in net.modules()):
        raise _scripted("the classifier is")
    return sorted(found, key=order.__getitem__)


def _weight(module: nn.Module) -> int:
    quantised = sum(hasattr(part, "_packed_params") for part in module.modules())
    return quantised + sum(parameter.numel() for parameter in module.parameters())


def _outermost(net: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """The modules below ``net``, seen through plain containers but not into anything else."""
    for name, module in net.named_children():
        if type(module) in (nn.Sequential, nn.ModuleList, nn.ModuleDict):
            yield from _outermost(module, f"{prefix}{name}.")
        else:
            yield prefix + name, module


class Truncated(nn.Module):
    """A net up to one layer: images -> that layer's output, without computing what comes after it.

    The net is traced with torchvision's feature extraction where that is possible and gives the same output;
    otherwise it runs with a hook that stops the forward pass at the layer. The parameters are shared, not copied.
    It runs in evaluation mode, whatever mode the net is in.
    """

    def __init__(self, net: nn.Module, layer: str, example: Tensor) -> None:
        """``example`` is a batch of images N x C x H x W on which the traced net is checked.

        Raises:
            InputError: a layer that a forward pass does not reach, or runs more than once.
        """
        super().__init__()
        self.layer = layer
        self.net = net
        with evaluating(net):
            self.traced = _trace(net, layer, example)

    def forward(self, images: Tensor) -> Tensor:
        """N x C x H x W -> the layer's output."""
        with evaluating(self):
            if self.traced is not None:
                output: Tensor = self.traced(images)["output"]
                return output
            return _run_until(self.net, self.layer, images)

    def with_answer(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """The layer's output and the whole net's, from one forward pass."""
        outputs, mine = list[Tensor](), threading.get_ident()

        def keep(module: nn.Module, args: Any, output: Any) -> None:
            # Passes of other threads through the same net are not this one's.
            if threading.get_ident() == mine:
                outputs.append(_tensor(output, self.layer).clone())

        with evaluating(self.net), self.net.get_submodule(self.layer).register_forward_hook(keep):
            answer: Tensor = self.net(images)
        if not outputs:
            raise _unreached(self.layer)
        return outputs[0], answer


class _Reached(Exception):
    """Carries the layer's output out of a forward pass that needs to go no further."""

    def __init__(self, output: Tensor) -> None:
        super().__init__()
        self.output = output


def _run_until(net: nn.Module, layer: str, images: Tensor) -> Tensor:
    def stop(module: nn.Module, args: Any, output: Any) -> None:
        raise _Reached(_tensor(output, layer))

    with net.get_submodule(layer).register_forward_hook(stop):
        try:
            net(images)
        except _Reached as reached:
            return reached.output
    raise _unreached(layer)


def _trace(net: nn.Module, layer: str, example: Tensor) -> nn.Module | None:
    """The traced net, or None where it must be hooked."""
    # torchvision's import is slow, and only this function needs it.
    from torchvision.models.feature_extraction import create_feature_extractor

    with torch.no_grad():
        # One whole pass, which also finds out whether the layer runs exactly once.
        with tapped(net, [layer]) as outputs:
            net(example)
        expected = outputs[layer]
        try:
            both = create_feature_extractor(net, {layer: "output"})
            # Of its two graphs that of evaluation mode alone: a copy of the pair runs the other one.
            traced = fx.GraphModule(both, both.eval_graph)
            return traced if torch.equal(traced(example)["output"], expected) else None
        except Exception:
            # Tracing runs a stranger's forward method on symbols, and can fail in any way: the hook always works. It
            # may have failed on the graph of training mode, for which torchvision has switched the net.
            net.eval()
            return None


def _tensor(output: Any, layer: str) -> Tensor:
    if not isinstance(output, Tensor):
        raise InputError(f"the layer {layer!r} gives {type(output).__name__}, not one tensor: choose another layer")
    return output.dequantize() if output.is_quantized else output
