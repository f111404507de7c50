"""Frozen linear layers and their adapters as one step each, on the CPU, and through oneDNN where that can be had.

PEFT's layer makes several tensors as wide as the layer where one will do. ``plugged`` makes one, by torch's own product
or by oneDNN's: torch multiplies float32 matrices with MKL, which on many processors runs at half of what oneDNN gets
out of them, and the only way there for plain tensors is ``mkldnn::_linear_pointwise``, which torch's compiler uses.
Because the name is private this module is its only door: the operator is tried on a small product first, and is used
where the processor's flags and the shapes say so, never by timing. No weight is copied, and no parameter changes.
"""

import platform
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache, partial
from typing import Any

import torch
import torch.nn.functional as functional
from peft.tuners.lora import Linear as AdaptedLinear
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers.pytorch_utils import Conv1D

NAME = "oneDNN"
"""As records name it."""

SMALLEST = 1 << 21
"""Multiplications from which a product goes through the operator; below, calling it takes longer than MKL does."""

_CAPABILITIES = ("AVX2", "AVX512")
_AGREE = 1e-5


def refusal(device: torch.device, precision: torch.dtype) -> str | None:
    """Why products on this device in this precision do not go through the operator; None if they do."""
    if device.type != "cpu":
        return f"{NAME} is for the CPU, and this runs on {device.type}"
    if precision != torch.float32:
        return f"{NAME} is used in float32, and this runs in {str(precision).removeprefix('torch.')}"
    return _missing()


@lru_cache
def _missing() -> str | None:
    capability = torch.backends.cpu.get_cpu_capability()
    if platform.machine() not in ("x86_64", "AMD64") or capability not in _CAPABILITIES:
        return f"{NAME} is used on x86 with AVX2 or AVX512, and this is {platform.machine()} with {capability}"
    backend: Any = torch.backends.mkldnn
    if not backend.is_available() or not backend.enabled:
        return f"this torch has no {NAME}, or it is switched off"
    try:
        return _wrong()
    except Exception as error:  # a private operator owes nobody its name, its arguments or its errors
        return f"torch {torch.__version__} no longer has mkldnn::_linear_pointwise as it was: {error}".splitlines()[0]


def _wrong() -> str | None:
    """Why the operator's results are not those of a matrix product; None if they are, also of transposed views."""
    numbers = torch.linspace(-1.0, 1.0, 24 * 40)
    x, weight, bias = numbers[: 24 * 16].view(24, 16), numbers[24 * 16 :].view(36, 16), numbers[:36]
    for case in ((x, weight, bias), (x, weight, None), (x @ weight.t(), weight.t(), None)):
        expected = functional.linear(*case)
        difference = float((_operator(*case) - expected).norm() / expected.norm())
        if not difference <= _AGREE:
            return f"mkldnn::_linear_pointwise differs from a matrix product by {difference:.1e}"
    return None


Product = Callable[[Tensor, Tensor, Tensor | None], Tensor]
"""``functional.linear``, or what does the same for ``[rows, in]`` and ``[out, in]``; need not be differentiable."""


def _operator(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    result: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return result


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``x @ weight.t() + bias``, through the operator where that pays. Not differentiable by itself.

    Args:
        x: ``[rows, in]``.
        weight: ``[out, in]``, or a transposed view; ``product(gradient, weight.t())`` is the way back.
        bias: ``[out]``.

    Returns:
        ``[rows, out]``.
    """
    if x.numel() * weight.shape[0] < SMALLEST or x.dtype != torch.float32 or x.device.type != "cpu":
        return functional.linear(x, weight, bias)
    return _operator(x, weight, bias)


def _shaped(flat: Tensor, like: Tensor) -> Tensor:
    """``[rows, out]`` with the leading sizes of ``like``; no view to autograd: a model may change it in place."""
    shaped: Tensor = torch.ops.aten._unsafe_view(flat, [*like.shape[:-1], flat.shape[-1]])
    return shaped


class _Frozen(torch.autograd.Function):
    """A linear layer whose weights do not train."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, product: Product) -> Tensor:
        ctx.save_for_backward(weight)
        ctx.product = product
        return _shaped(product(x.flatten(0, -2), weight, bias), x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, outer: Tensor) -> tuple[Tensor, None, None, None]:
        (weight,) = ctx.saved_tensors
        return ctx.product(outer.flatten(0, -2), weight.t(), None).view(*outer.shape[:-1], -1), None, None, None


class _Adapted(torch.autograd.Function):
    """A frozen linear layer and its adapter: ``x W' + bias + scale (d A') B'``, where d is x after dropout.

    The scale goes to the narrow product and the adapter's part is added in place, which spares passes over tensors as
    wide as the layer.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        dropped: Tensor | None,
        frozen: tuple[Tensor, Tensor | None],
        a: Tensor,
        b: Tensor,
        scale: float,
        product: Product,
    ) -> Tensor:
        flat, source = x.flatten(0, -2), (x if dropped is None else dropped).flatten(0, -2)
        narrow = product(source, a, None).mul_(scale)
        ctx.save_for_backward(source, narrow, frozen[0], a, b)
        ctx.scale, ctx.product, ctx.shares = scale, product, dropped is None
        return _shaped(product(flat, *frozen).addmm_(narrow, b.t()), x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, outer: Tensor) -> tuple[Tensor | None, ...]:
        source, narrow, weight, a, b = ctx.saved_tensors
        flat, shape, product = outer.flatten(0, -2), (*outer.shape[:-1], -1), ctx.product
        back = product(flat, b.t(), None).mul_(ctx.scale)
        by_a = product(back.t(), source.t(), None)
        by_b = product(narrow.t(), flat.t(), None).t().contiguous()
        by_x = by_dropped = None
        if ctx.needs_input_grad[0]:
            by_x = product(flat, weight.t(), None)
            by_x = (by_x.addmm_(back, a) if ctx.shares else by_x).view(shape)
        if ctx.needs_input_grad[1]:
            by_dropped = product(back, a.t(), None).view(shape)
        return by_x, by_dropped, None, by_a, by_b, None, None


def _forward(layer: Any, product: Product, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """A frozen layer's forward."""
    if args or kwargs or not _fits(x):
        result: Tensor = type(layer).forward(layer, x, *args, **kwargs)
    else:
        result = _Frozen.apply(x, _matrix(layer), layer.bias, product)  # type: ignore[no-untyped-call]
    return result


def _adapted_forward(layer: Any, product: Product, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """An adapted layer's forward where it is plain LoRA; PEFT's own, with a base layer of ours, for all else."""
    adapter = _plain_adapter(layer)
    if args or kwargs or adapter is None or not _fits(x):
        return AdaptedLinear.forward(layer, x, *args, **kwargs)  # type: ignore[no-any-return]
    dropout, frozen = layer.lora_dropout[adapter], (_matrix(layer.base_layer), layer.base_layer.bias)
    dropped = None if isinstance(dropout, nn.Identity) or not dropout.training else dropout(x)
    a, b, scale = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight, layer.scaling[adapter]
    output: Tensor = _Adapted.apply(x, dropped, frozen, a, b, scale, product)  # type: ignore[no-untyped-call]
    return output


def _fits(x: Tensor) -> bool:
    return x.dtype == torch.float32 and x.numel() > 0 and x.dim() > 1 and not torch.is_autocast_enabled("cpu")


def _plain_adapter(layer: Any) -> str | None:
    """The one adapter in force, if nothing but A and B belongs to it."""
    active = [name for name in layer.active_adapters if name in layer.lora_A]
    if layer.disable_adapters or layer.merged or len(active) != 1 or active[0] in layer.lora_variant:
        return None
    a, b = layer.lora_A[active[0]], layer.lora_B[active[0]]
    is_plain = a.bias is None and b.bias is None and a.weight.dtype == b.weight.dtype == torch.float32
    return active[0] if is_plain else None


def _matrix(layer: Any) -> Tensor:
    """``[out, in]``; GPT-2's layers hold it transposed."""
    weight: Tensor = layer.weight
    return weight.t() if isinstance(layer, Conv1D) else weight


def _is_frozen(module: nn.Module) -> bool:
    """A plain linear layer of plain float32 tensors on the CPU, none of which trains."""
    return type(module) in (nn.Linear, Conv1D) and all(
        p.dtype == torch.float32 and p.device.type == "cpu" and not p.requires_grad and type(p) is nn.Parameter
        for p in module.parameters()
    )


@contextmanager
def plugged(model: nn.Module, by: Product = product) -> Iterator[int]:
    """Has a model's frozen float32 layers on the CPU, and the LoRA adapters on them, multiply by ``by``.

    Walks the modules, so it stands around a loop, never inside a step. Ask ``refusal`` before ``product`` is used;
    ``functional.linear`` needs no permission.

    Yields:
        How many frozen layers do; the others are as they were.
    """
    changed: list[Any] = []
    module: Any
    for module in model.modules():
        if "forward" in vars(module):
            continue  # somebody else's hook
        if _is_frozen(module):
            module.forward = partial(_forward, module, by)
        elif type(module) is AdaptedLinear and _is_frozen(module.base_layer):
            module.forward = partial(_adapted_forward, module, by)
        else:
            continue
        changed.append(module)
    try:
        yield sum(_is_frozen(module) for module in changed)
    finally:
        for module in changed:
            del module.forward
