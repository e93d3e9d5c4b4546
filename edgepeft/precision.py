"""How the weights of a frozen backbone are stored: fp32, bf16, int8 or NF4. The only file that knows how they are packed."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from edgepeft.errors import UsageError, nearest

Precision = Literal["fp32", "bf16", "int8", "nf4"]
PRECISIONS: tuple[str, ...] = get_args(Precision)

NF4_BLOCK = 64  # weights per scale, QLoRA section 3 (arXiv 2305.14314)
NF4_SCALE_BLOCK = 256  # scales per second-level scale: "double quantisation" in the same section


def check(precision: str) -> None:
    """Raise UsageError unless ``precision`` is one edgepeft knows."""
    if precision not in PRECISIONS:
        raise UsageError(f"Unknown precision {precision!r}.", "", nearest(precision, PRECISIONS))


def is_packed(precision: str) -> bool:
    """Whether weights at this precision are integers that cannot be trained or written in place."""
    return precision in ("int8", "nf4")


def compute_dtype(precision: str) -> torch.dtype:
    """The dtype of activations, and of everything that is not packed."""
    return torch.float32 if precision == "fp32" else torch.bfloat16


class _FrozenMatmul(torch.autograd.Function):
    """``x @ W.T`` with a packed W that is unpacked again in backward, so that no unpacked weight outlives a layer."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, packed: PackedLinear) -> Tensor:
        ctx.packed = packed
        return F.linear(x, packed.dequantize(), packed.bias)

    @staticmethod
    def backward(ctx: Any, *grad: Tensor) -> tuple[Tensor, None]:
        return grad[0] @ ctx.packed.dequantize(), None


class PackedLinear(nn.Module):
    """A frozen linear layer, y = x Wᵀ + b, whose W (out, in) is stored packed; x is (..., in) of ``compute``.

    Only buffers and plain torch operations: bitsandbytes' own ``Linear4bit`` repacks its weights in evaluation mode on some
    CPUs, after which gradients and merges are silently wrong, and its parameter class cannot be traced on fake tensors.
    """

    bias: Tensor | None

    def __init__(self, in_features: int, out_features: int, bias: Tensor | None, compute: torch.dtype) -> None:
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        self.compute = compute
        self.bias = None if bias is None else nn.Parameter(bias.detach().to(compute), requires_grad=False)

    @abstractmethod
    def dequantize(self) -> Tensor:
        """The weight (out, in) that this layer really multiplies with, in the compute dtype."""

    def forward(self, x: Tensor) -> Tensor:
        return _FrozenMatmul.apply(x, self)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"


class NF4Linear(PackedLinear):
    """4-bit NormalFloat with double quantisation (QLoRA, arXiv 2305.14314): 0.516 bytes a weight."""

    def __init__(self, weight: Tensor, bias: Tensor | None, compute: torch.dtype) -> None:
        super().__init__(weight.shape[1], weight.shape[0], bias, compute)
        if _is_shape_only(weight):
            self._allocate(weight)
        else:
            self._quantize(weight)

    def _quantize(self, weight: Tensor) -> None:
        import bitsandbytes.functional as bnb

        packed, state = bnb.quantize_4bit(
            weight.to(self.compute).contiguous(), blocksize=NF4_BLOCK, compress_statistics=True, quant_type="nf4"
        )
        self.register_buffer("packed", packed)
        self.register_buffer("scale", state.absmax)
        self.register_buffer("scale_offset", state.offset)
        self.register_buffer("scale_scale", state.state2.absmax)
        self.register_buffer("scale_code", state.state2.code)
        self.register_buffer("code", state.code)

    def _allocate(self, weight: Tensor) -> None:
        """The same buffers by shape alone, for planning."""
        blocks = -(-weight.numel() // NF4_BLOCK)
        byte, single = {"dtype": torch.uint8}, {"dtype": torch.float32}
        self.register_buffer("packed", weight.new_empty((weight.numel() + 1) // 2, 1, **byte))
        self.register_buffer("scale", weight.new_empty(blocks, **byte))
        self.register_buffer("scale_offset", weight.new_empty((), **single))
        self.register_buffer("scale_scale", weight.new_empty(-(-blocks // NF4_SCALE_BLOCK), **single))
        self.register_buffer("scale_code", weight.new_empty(256, **single))
        self.register_buffer("code", weight.new_empty(16, **single))

    def dequantize(self) -> Tensor:
        from bitsandbytes.functional import QuantState, dequantize_4bit

        inner = QuantState(
            absmax=self.scale_scale, code=self.scale_code, blocksize=NF4_SCALE_BLOCK, dtype=torch.float32
        )
        state = QuantState(
            absmax=self.scale,
            shape=torch.Size((self.out_features, self.in_features)),
            code=self.code,
            blocksize=NF4_BLOCK,
            quant_type="nf4",
            dtype=self.compute,
            offset=self.scale_offset,
            state2=inner,
        )
        return dequantize_4bit(self.packed, state)


class Int8Linear(PackedLinear):
    """8-bit integers with one scale per output row, as LLM.int8() stores them (arXiv 2208.07339): 1 byte a weight."""

    def __init__(self, weight: Tensor, bias: Tensor | None, compute: torch.dtype) -> None:
        super().__init__(weight.shape[1], weight.shape[0], bias, compute)
        if _is_shape_only(weight):
            packed, largest = weight.new_empty(weight.shape, dtype=torch.int8), weight.new_empty(weight.shape[0]).float()
        else:
            import bitsandbytes.functional as bnb

            packed, largest, _ = bnb.int8_vectorwise_quant(weight.to(torch.float16))
        self.register_buffer("packed", packed)
        self.register_buffer("largest", largest)  # the largest magnitude of each row, (out,)

    def dequantize(self) -> Tensor:
        scale = (self.largest / 127).to(self.compute)
        return self.packed.to(self.compute).mul_(scale[:, None])


def pack(linear: nn.Linear, precision: str) -> PackedLinear:
    """A packed copy of ``linear`` on its device, computing in bf16."""
    kind = {"int8": Int8Linear, "nf4": NF4Linear}[precision]
    return kind(linear.weight.detach(), linear.bias, compute_dtype(precision))


def pack_where(model: nn.Module, precision: str, wanted: Callable[[str], bool], device: str | None) -> None:
    """Replace, in place and one at a time, every ``nn.Linear`` whose dotted name is ``wanted``, packing it on ``device``."""
    for name, module in list(model.named_modules()):
        if type(module) is nn.Linear and wanted(name):
            model.set_submodule(name, pack(module.to(device) if device else module, precision))


def unpack(model: nn.Module, dtype: torch.dtype = torch.float32) -> None:
    """Replace, in place, every packed layer by an ``nn.Linear`` with the very weights it multiplied with, cast to ``dtype``.

    Hooks, children and training flags that methods attached to a packed layer move to its replacement.
    """
    for name, module in list(model.named_modules()):
        if isinstance(module, PackedLinear):
            weight = module.dequantize().to(dtype)
            with torch.device("meta"):  # no time and memory spent on an initialisation that is thrown away
                linear = nn.Linear(module.in_features, module.out_features, bias=module.bias is not None)
            linear.weight = nn.Parameter(weight, requires_grad=False)
            if module.bias is not None:
                linear.bias = nn.Parameter(module.bias.detach().to(dtype), requires_grad=False)
            for child, value in module.named_children():
                linear.add_module(child, value)
            linear._forward_hooks = module._forward_hooks
            linear._forward_pre_hooks = module._forward_pre_hooks
            linear.train(module.training)
            model.set_submodule(name, linear)


def _is_shape_only(tensor: Tensor) -> bool:
    from torch._subclasses.fake_tensor import FakeTensor

    return isinstance(tensor, FakeTensor) or tensor.device.type == "meta"
