"""A net read as the tensor operations of a pass: it does not matter how its code is written."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional as F

from nndefense.certificates.operations import Affine, Call, Maximum, Pull, Relu, Step
from nndefense.errors import InputError
from nndefense.modes import evaluating

# Images that a net is recorded on, another number than it is checked with.
_PROBES = 3
_ATEN = torch.ops.aten
# Each output is one coordinate of the source: in the same order, or in another.
_SHAPES = (
    "view",
    "_unsafe_view",
    "reshape",
    "squeeze",
    "unsqueeze",
    "clone",
    "detach",
    "alias",
    "lift_fresh",
    "_to_copy",
)
_MOVES = ("permute", "transpose", "t", "select", "slice")
_AVERAGES = ("avg_pool2d", "_adaptive_avg_pool2d", "mean", "sum")
_NORMALISATIONS = ("native_batch_norm", "cudnn_batch_norm", "_native_batch_norm_legit_no_training")
_KNOWN = (
    "convolution, linear layers, batch normalisation, averages, sums, multiples, reshapes, ReLU and maxima over places"
)


class _Form(NamedTuple):
    """What makes a step affine; without an adjoint, that of autograd."""

    call: Call
    size: Call
    adjoint: Pull | None = None
    diagonal: bool = False


def read_steps(net: Callable[[Tensor], Tensor], example: Tensor) -> list[Step]:
    """The steps of a net from images N x C x H x W to one tensor.

    Args:
        net: an image's output must depend on that image alone; it is held in evaluation mode while it is read.
        example: one or more images that it takes.

    Raises:
        InputError: a net that cannot be recorded, or with an operation that is not known.
    """
    images = example[torch.arange(_PROBES, device=example.device) % len(example)]
    with evaluating(*([net] if isinstance(net, nn.Module) else [])), torch.no_grad():
        try:
            graph = make_fx(torch.func.functionalize(net))(images)
        except InputError:
            raise
        except Exception as error:
            # A stranger's code fails in ways of its own when it is recorded.
            reason = str(error).partition("\n")[0]
            raise InputError(
                f"linear bounds need a net whose operations can be recorded, and this one's cannot ({reason})"
            ) from None
        graph.graph.eliminate_dead_code()
        return _Reader(graph).steps


class _Reader:
    """The steps of a recorded graph."""

    def __init__(self, graph: fx.GraphModule) -> None:
        self.steps: list[Step] = []
        self.number: dict[fx.Node, int] = {}
        self.fixed: dict[fx.Node, Any] = {}
        for node in graph.graph.nodes:
            if node.op == "placeholder":
                self.number[node] = 0
            elif node.op == "get_attr":
                self.fixed[node] = _double(operator.attrgetter(node.target)(graph))
            elif node.op == "call_function":
                self._call(node)
            elif self.number.get(node.args[0]) != len(self.steps):
                raise InputError("linear bounds need a net whose output is one tensor that depends on the image")

    def _call(self, node: fx.Node) -> None:
        moving = [source for source in node.all_input_nodes if source not in self.fixed]
        name = str(getattr(node.target, "overloadpacket", node.target)).rpartition(".")[2]
        if not moving:
            args, settings = fx.node.map_arg((node.args, node.kwargs), self.fixed.__getitem__)
            run: Any = node.target
            self.fixed[node] = _double(run(*args, **settings))
        elif node.target is operator.getitem and node.args[1] == 0:
            # Of a normalisation or a maximum the first result is its output.
            self.number[node] = self.number[moving[0]]
        else:
            shape = _output(node).shape
            if shape[:1] != (_PROBES,):
                raise InputError(f"linear bounds need a net that keeps images apart, but its {name} mixes them")
            known = all(source in self.number for source in moving)
            step = self._step(name, node, moving, shape[1:]) if known else None
            if step is None:
                raise InputError(f"linear bounds know {_KNOWN}, but not the net's {name}")
            self.steps.append(step)
            self.number[node] = len(self.steps)

    def _step(self, name: str, node: fx.Node, moving: list[fx.Node], shape: torch.Size) -> Step | None:
        """The step of an operation, or None where it is not known."""
        args: Any = fx.node.map_arg(node.args, lambda found: self.fixed.get(found, found))
        settings: Any = node.kwargs
        form: _Form | None
        windows: tuple[Tensor, int] | None
        sources, shapes = tuple(self.number[found] for found in moving), [_output(found).shape[1:] for found in moving]
        first, rest = args[0], list(args[1:])
        if name in ("add", "sub", "rsub", "cat"):
            form = _cat(args, moving) if name == "cat" else _sum(name, args, settings, moving, shape)
        elif len(moving) > 1:
            return None
        elif name == "relu" or (name == "clamp_min" and rest == [0]):
            return Relu(sources, shape)
        elif name in ("max_pool2d_with_indices", "amax"):
            windows = _whole(shapes[0], *rest) if name == "amax" else _pooled(shapes[0], shape, *rest)
            device = _output(node).device
            if windows is None:
                return None
            channels = shapes[0].numel() // windows[1]
            return Maximum(sources, shape, windows[0].to(device), shapes[0], channels)
        elif name == "addmm" and rest[0] is moving[0]:
            form = _linear(rest[1], first * settings.get("beta", 1), settings.get("alpha", 1))
        elif name == "mul" and first is not moving[0]:
            form = _multiple(first, shapes[0] == shape)
        elif first is moving[0]:
            form = _single(name, node, rest, shapes[0], shape)
        else:
            return None
        if form is None:
            return None
        device = _output(node).device
        zeros = [torch.zeros(1, *each, dtype=torch.float64, device=device) for each in shapes]

        def pulled(heads: Tensor) -> Sequence[Tensor]:
            blank = (zero.expand(len(heads), *zero.shape[1:]) for zero in zeros)
            found: Sequence[Tensor] = torch.func.vjp(form.call, *blank)[1](heads)
            return found

        return Affine(sources, shape, form.call, form.size, form.adjoint or pulled, form.diagonal, form.call(*zeros))


def _output(node: fx.Node) -> Tensor:
    """What it gave when it was recorded."""
    value = node.meta["val"]
    output: Tensor = value[0] if isinstance(value, (tuple, list)) else value
    return output


def _double(value: Any) -> Any:
    return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value


def _single(name: str, node: fx.Node, rest: list[Any], source: torch.Size, shape: torch.Size) -> _Form | None:
    """The form of an operation whose first argument alone depends on the image."""
    run: Any = node.target
    if name in _SHAPES:
        if not _output(node).is_floating_point():
            return None
        return _like(lambda x: x.reshape(len(x), *shape), diagonal=True)
    if name == "expand":
        return _like(lambda x: x.expand(len(x), *shape))
    if name in _MOVES or name in _AVERAGES:
        return _like(lambda x: run(x, *rest), diagonal=name in _MOVES)
    if name == "constant_pad_nd":
        return _Form(lambda x: F.pad(x, rest[0], value=rest[1] if rest[1:] else 0), lambda x: F.pad(x, rest[0]))
    if name == "mm":
        return _linear(rest[0])
    if name == "neg":
        return _multiple(-1.0, True)
    if name in ("mul", "div") and len(rest) == 1:
        return _multiple(rest[0] if name == "mul" else 1 / rest[0], source == shape)
    if name == "convolution":
        return _convolution(source, *rest)
    if name in _NORMALISATIONS and not (len(rest) == 7 and rest[4]):
        weight, bias, mean, var = (
            None if part is None else part.view(-1, *[1] * (len(shape) - 1)) for part in rest[:4]
        )
        scale = (1.0 if weight is None else weight) / torch.sqrt(var + rest[-1])
        form = _multiple(scale, True)
        return form._replace(call=lambda x: (x - mean) * scale + (0.0 if bias is None else bias))
    return None


def _like(call: Call, *, diagonal: bool = False) -> _Form:
    """An operation that moves as far as its source does, so that it is its own size."""
    return _Form(call, call, None, diagonal)


def _multiple(factor: Any, diagonal: bool) -> _Form:
    return _Form(
        lambda x: x * factor,
        lambda x: x * abs(factor),
        (lambda heads: [heads * factor]) if diagonal else None,
        diagonal,
    )


def _linear(weight: Tensor, bias: Any = 0.0, factor: float = 1) -> _Form:
    weight = weight * factor
    return _Form(lambda x: x @ weight + bias, lambda x: x @ weight.abs(), lambda heads: [heads @ weight.T])


def _convolution(source: torch.Size, weight: Tensor, bias: Tensor | None, *settings: Any) -> _Form:
    def adjoint(heads: Tensor) -> Sequence[Tensor]:
        blank = heads.new_empty(1).expand(len(heads), *source)
        mask = [True, False, False]
        return [_ATEN.convolution_backward(heads, blank, weight, None, *settings, mask)[0]]

    return _Form(
        lambda x: _ATEN.convolution(x, weight, bias, *settings),
        lambda x: _ATEN.convolution(x, weight.abs(), None, *settings),
        adjoint,
    )


def _sum(name: str, args: Any, settings: Any, moving: list[fx.Node], shape: torch.Size) -> _Form:
    factor = args[2] if len(args) > 2 else settings.get("alpha", 1)
    signs = {"add": (1, factor), "sub": (1, -factor), "rsub": (-factor, 1)}[name]

    def terms(values: Sequence[Tensor]) -> list[Any]:
        return [value if not isinstance(value, fx.Node) else values[moving.index(value)] for value in args[:2]]

    def size(*sizes: Tensor) -> Tensor:
        total = sizes[0].new_zeros(len(sizes[0]), *shape)
        for sign, term in zip(signs, args, strict=False):
            total = total + abs(sign) * sizes[moving.index(term)] if isinstance(term, fx.Node) else total
        return total

    def call(*values: Tensor) -> Tensor:
        first, second = terms(values)
        total: Tensor = signs[0] * first + signs[1] * second
        return total

    return _Form(call, size, None, len(moving) == 1 and _output(moving[0]).shape[1:] == shape)


def _cat(args: Any, moving: list[fx.Node]) -> _Form:
    def laid(values: Sequence[Tensor], fixed: float) -> Tensor:
        parts = [
            values[moving.index(part)]
            if isinstance(part, fx.Node)
            else fixed * part[:1].expand(len(values[0]), *part.shape[1:])
            for part in args[0]
        ]
        return torch.cat(parts, *args[1:])

    return _Form(lambda *values: laid(values, 1.0), lambda *sizes: laid(sizes, 0.0))


def _pooled(
    source: torch.Size,
    shape: torch.Size,
    kernel: Any,
    stride: Any = (),
    padding: Any = 0,
    dilation: Any = 1,
    ceil_mode: bool = False,
) -> tuple[Tensor, int]:
    """The windows k x W of a maximum over C x H x W, and the number of their places."""
    kernel, padding, dilation = (
        pair if isinstance(pair, (list, tuple)) else (pair, pair) for pair in (kernel, padding, dilation)
    )
    kernel, padding, dilation = (tuple(pair) * (2 // len(pair)) for pair in (kernel, padding, dilation))
    stride = tuple(stride) * (2 // len(stride)) if stride else kernel
    height, width = source[1:]
    needed = [(out - 1) * s + d * (k - 1) + 1 for out, s, d, k in zip(shape[1:], stride, dilation, kernel, strict=True)]
    places = torch.full(
        (1, 1, *(max(n, p + side) for n, p, side in zip(needed, padding, source[1:], strict=True))), height * width
    ).double()
    top, left = padding
    places[0, 0, top : top + height, left : left + width] = torch.arange(height * width).view(height, width).double()
    windows = F.unfold(places[:, :, : needed[0], : needed[1]], kernel, dilation, 0, stride)
    return windows[0].long(), height * width


def _whole(source: torch.Size, axes: Sequence[int], keep: bool = False) -> tuple[Tensor, int] | None:
    """The windows k x W of a maximum over whole axes, and the number of places: all of the source."""
    front = [axis % (len(source) + 1) - 1 for axis in axes] or list(range(-1, len(source)))
    if min(front) < 0:
        return None
    places = torch.arange(source.numel()).view(source).movedim(front, tuple(range(len(front))))
    return places.reshape(math.prod(source[axis] for axis in front), -1), source.numel()
