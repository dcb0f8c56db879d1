"""Folding batch normalisation into the convolution before it: the same net with fewer passes over its maps."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from torch import fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval


def fold_batch_norms(net: nn.Module, keep: Sequence[str] = ()) -> int:
    """Fold, in place, each batch normalisation that alone takes a convolution's output into that convolution.

    In evaluation mode batch normalisation is a fixed scale and shift of each channel (Ioffe and Szegedy, ICML 2015,
    section 3.1), which the convolution's weights and bias can hold. Outputs agree up to rounding; the names of all
    modules stay. Left alone is whatever might not be the same: modules that are called more than once, that have more
    than one name, that are not in evaluation mode, that carry hooks, or whose statistics are those of the batch; and a
    net whose forward pass :mod:`torch.fx` cannot follow, as where it branches on values.

    Args:
        net: to be changed, so give a copy.
        keep: paths of modules whose output must stay what it is, such as feature layers.

    Returns:
        How many were folded.
    """
    try:
        graph = fx.Tracer().trace(net)
    except Exception:
        # A user's own code runs here, on stand-ins for its tensors, and fails in ways of its own.
        return 0
    calls = Counter(node.target for node in graph.nodes if node.op == "call_module")
    names = Counter(id(module) for _, module in net.named_modules(remove_duplicate=False))
    pairs = []
    for node in graph.nodes:
        before = node.args[0] if node.op == "call_module" and node.args else None
        if not isinstance(before, fx.Node) or before.op != "call_module" or len(before.users) > 1:
            continue
        if calls[node.target] > 1 or calls[before.target] > 1:
            continue
        conv, norm = str(before.target), str(node.target)
        if any(_inside(conv, name) and not _inside(norm, name) for name in keep):
            continue
        filters, scale = net.get_submodule(conv), net.get_submodule(norm)
        if names[id(filters)] > 1 or names[id(scale)] > 1 or not (_plain(filters) and _plain(scale)):
            continue
        # Exactly these classes: one derived from them may compute something else, as parametrised weights do.
        if type(filters) is nn.Conv2d and type(scale) is nn.BatchNorm2d and scale.running_mean is not None:
            pairs.append((conv, norm, fuse_conv_bn_eval(filters, scale)))
    for conv, norm, both in pairs:
        net.set_submodule(conv, both)
        net.set_submodule(norm, nn.Identity())
    return len(pairs)


def _plain(module: nn.Module) -> bool:
    return not (module.training or module._forward_hooks or module._forward_pre_hooks)


def _inside(name: str, outer: str) -> bool:
    return name == outer or name.startswith(f"{outer}.")
