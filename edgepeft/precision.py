"""How the weights of a frozen backbone are stored: fp32, bf16, int8 or NF4. Only this file knows how it packs them."""

from __future__ import annotations

import contextlib
import functools
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrize

from edgepeft import kernels
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


def stored_dtype(model: Mapping[str, Any]) -> torch.dtype:
    """The dtype of a checkpoint's file, as its configuration says; fp32 where it says nothing, as older ones do not."""
    dtype = getattr(torch, str(model.get("dtype") or model.get("torch_dtype") or "float32"), None)
    return dtype if isinstance(dtype, torch.dtype) else torch.float32


def is_converted(model: Mapping[str, Any], precision: str) -> bool:
    """Whether loading a model at a precision converts what its file holds; else tensors are views of the file."""
    return stored_dtype(model) is not compute_dtype(precision)


_emulated: ContextVar[tuple[bool, bool] | None] = ContextVar("emulated", default=None)


@contextlib.contextmanager
def emulating(*, bf16: bool, cuda: bool = False) -> Iterator[None]:
    """Choose arithmetic as a GPU or a CPU with or without native bf16 would, whatever is here: for planning."""
    token = _emulated.set((cuda, bf16))
    try:
        yield
    finally:
        _emulated.reset(token)


def matmul_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """The dtype in which tensors of ``dtype`` are best multiplied on ``device``.

    Without native instructions a CPU multiplies bf16 at less than half the speed of fp32; casting one layer's operands
    at a time costs little time and memory, while everything that is kept stays bf16.
    """
    if dtype is not torch.bfloat16:
        return dtype
    return torch.bfloat16 if _hardware(device)[1] else torch.float32


def has_fused_attention(states: Tensor, heads_per_key: int) -> bool:
    """Whether PyTorch has an attention for these that does not make all scores, on the device where they are.

    On GPUs: for bf16 where there are instructions for it (compute capability 8.0), and where several heads share keys
    and values for 16 bits only (aten/src/ATen/native/transformers/cuda/sdp_utils.cpp).
    """
    cuda, bf16 = _hardware(states.device)
    return not cuda or (bf16 if states.dtype is torch.bfloat16 else heads_per_key == 1)


def _hardware(device: torch.device) -> tuple[bool, bool]:
    """Whether it is a GPU, and whether it multiplies bf16."""
    return _emulated.get() or (device.type == "cuda", _native_bf16(device.type))


@functools.cache
def _native_bf16(device_type: str) -> bool:
    if device_type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device_type == "cpu":
        return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
    return True


class _FrozenMatmul(torch.autograd.Function):
    """``x @ W.T`` with a stored W that is unpacked again in backward, so that no unpacked weight outlives a layer."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, stored: StoredLinear, rounded: bool, bias: Tensor | None) -> Tensor:
        ctx.stored, ctx.dtype = stored, x.dtype
        dtype = matmul_dtype(x.dtype, x.device)
        product = F.linear(x.to(dtype), stored.dequantize(dtype), None if bias is None else bias.to(dtype))
        return product.to(x.dtype) if rounded else product

    @staticmethod
    def backward(ctx: Any, *grad: Tensor) -> tuple[Tensor, None, None, Tensor | None]:
        dtype = matmul_dtype(grad[0].dtype, grad[0].device)
        to_bias = grad[0].flatten(0, -2).sum(0) if ctx.needs_input_grad[3] else None
        return (grad[0].to(dtype) @ ctx.stored.dequantize(dtype)).to(ctx.dtype), None, None, to_bias


class _TrainedMatmul(torch.autograd.Function):
    """``x @ W.T`` of a half-precision x and an fp32 W in fp32; what backward keeps of x is x, not its cast."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return F.linear(x.to(weight.dtype), weight)

    @staticmethod
    def backward(ctx: Any, *grad: Tensor) -> tuple[Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        change = grad[0].flatten(0, -2).t() @ x.flatten(0, -2).to(weight.dtype)
        return (grad[0] @ weight).to(x.dtype), change


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """``x @ W.T`` with a trained fp32 W (out, in), in the dtype in which x is best multiplied.

    Casting W there and not x leaves x the one tensor that all layers that read it keep for backward.
    """
    dtype = matmul_dtype(x.dtype, x.device)
    if dtype is x.dtype:
        return F.linear(x, weight.to(dtype))
    return _TrainedMatmul.apply(x, weight)


class StoredLinear(nn.Module):
    """A frozen linear layer, y = x Wᵀ + b, whose W (out, in) is kept in a form that is not multiplied with directly.

    Only buffers and plain torch operations: bitsandbytes' own ``Linear4bit`` repacks its weights in evaluation mode on
    some CPUs, after which gradients and merges are silently wrong, and its parameter class cannot be traced on fake
    tensors.
    """

    bias: Tensor | None

    def __init__(self, in_features: int, out_features: int, bias: Tensor | None) -> None:
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        self.bias = None if bias is None else nn.Parameter(bias.detach().to(torch.bfloat16), requires_grad=False)

    @abstractmethod
    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """The weight (out, in)."""

    def forward(self, x: Tensor, *, rounded: bool = True) -> Tensor:
        """(..., in) to (..., out), in the dtype of x; if it need not be ``rounded``, in that of the arithmetic."""
        return _FrozenMatmul.apply(x, self, rounded, self.bias)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"


class BF16Linear(StoredLinear):
    """Plain bf16 weights on hardware that multiplies fp32 faster. T5 asks its ``wo`` for the dtype of ``weight``."""

    weight: Tensor

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__(weight.shape[1], weight.shape[0], bias)
        self.register_buffer("weight", weight.detach())

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        return self.weight.to(dtype)


class NF4Linear(StoredLinear):
    """4-bit NormalFloat with double quantisation (QLoRA, arXiv 2305.14314): 0.516 bytes a weight."""

    packed: Tensor
    scale: Tensor
    scale_offset: Tensor
    scale_scale: Tensor
    scale_code: Tensor
    code: Tensor

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__(weight.shape[1], weight.shape[0], bias)
        if is_shape_only(weight):
            self._allocate(weight)
        else:
            self._quantize(weight)

    def _quantize(self, weight: Tensor) -> None:
        packed, state = kernels.bitsandbytes().quantize_4bit(
            weight.contiguous(), blocksize=NF4_BLOCK, compress_statistics=True, quant_type="nf4"
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
        byte, single = torch.uint8, torch.float32
        self.register_buffer("packed", weight.new_empty((weight.numel() + 1) // 2, 1, dtype=byte))
        self.register_buffer("scale", weight.new_empty(blocks, dtype=byte))
        self.register_buffer("scale_offset", weight.new_empty((), dtype=single))
        self.register_buffer("scale_scale", weight.new_empty(-(-blocks // NF4_SCALE_BLOCK), dtype=single))
        self.register_buffer("scale_code", weight.new_empty(256, dtype=single))
        self.register_buffer("code", weight.new_empty(16, dtype=single))

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        bnb = kernels.bitsandbytes()
        inner = bnb.QuantState(
            absmax=self.scale_scale, code=self.scale_code, blocksize=NF4_SCALE_BLOCK, dtype=torch.float32
        )
        state = bnb.QuantState(
            absmax=self.scale,
            shape=torch.Size((self.out_features, self.in_features)),
            code=self.code,
            blocksize=NF4_BLOCK,
            quant_type="nf4",
            dtype=dtype,
            offset=self.scale_offset,
            state2=inner,
        )
        dequantized: Tensor = bnb.dequantize_4bit(self.packed, state)
        return dequantized


class Int8Linear(StoredLinear):
    """8-bit integers with one scale per output row, as LLM.int8() stores them (arXiv 2208.07339): 1 byte a weight."""

    packed: Tensor
    largest: Tensor
    """The largest magnitude of each row, (out,)."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__(weight.shape[1], weight.shape[0], bias)
        if is_shape_only(weight):
            packed, largest = (
                weight.new_empty(weight.shape, dtype=torch.int8),
                weight.new_empty(weight.shape[0]).float(),
            )
        else:
            packed, largest, _ = kernels.bitsandbytes().int8_vectorwise_quant(weight.to(torch.float16))
        self.register_buffer("packed", packed)
        self.register_buffer("largest", largest)

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        return self.packed.to(dtype).mul_((self.largest / 127).to(dtype)[:, None])


def pack(linear: nn.Linear, precision: str) -> StoredLinear:
    """A packed copy of ``linear`` on its device."""
    kind = {"int8": Int8Linear, "nf4": NF4Linear}[precision]
    return kind(linear.weight.detach(), linear.bias)


def one_by_one(model: nn.Module, wanted: Callable[[nn.Module], bool]) -> Iterator[tuple[str, Any]]:
    """The submodules that are wanted, with their names, none of which is held for longer than its turn.

    So what is put in their places may take their memory: a list of them would keep all of a model twice.
    """
    for name in [name for name, module in model.named_modules() if wanted(module)]:
        yield name, model.get_submodule(name)


def pack_where(
    model: nn.Module,
    wanted: Callable[[str], bool],
    device: str | None,
    packing: Callable[[str, nn.Linear], StoredLinear],
) -> None:
    """Replace, in place and one at a time, every ``nn.Linear`` whose name is ``wanted`` by its ``packing``.

    It is moved to ``device`` before.
    """
    for name, module in one_by_one(model, lambda module: type(module) is nn.Linear):
        if wanted(name):
            model.set_submodule(name, packing(name, module.to(device) if device else module))


def weight_of(linear: nn.Module) -> Tensor:
    """The weight (out, in) that a linear layer, plain or stored, multiplies with, in the dtype of that product."""
    if isinstance(linear, StoredLinear):
        return linear.dequantize(matmul_dtype(torch.bfloat16, next(linear.buffers()).device))
    plain: Any = linear
    weight: Tensor = plain.weight
    return weight


def store_frozen(model: nn.Module) -> None:
    """Where bf16 is slow to multiply, let frozen bf16 layers be multiplied in fp32. The head is left to the loss."""
    for name, module in one_by_one(model, lambda module: type(module) is nn.Linear):
        weight = module.weight
        if not weight.requires_grad and module is not _head(model):
            if matmul_dtype(weight.dtype, weight.device) is not weight.dtype:
                _replace(model, name, module, BF16Linear(weight, module.bias))


def unpack(model: nn.Module, dtype: torch.dtype) -> None:
    """Replace, in place, every stored layer by an ``nn.Linear`` with the weights it multiplied with, in ``dtype``."""
    for name, module in one_by_one(model, lambda module: isinstance(module, StoredLinear)):
        if parametrize.is_parametrized(module, "bias"):  # one that is trained: its fp32 master
            parametrize.remove_parametrizations(module, "bias", leave_parametrized=False)
        weight = weight_of(module).to(dtype)
        with torch.device("meta"):  # no time and memory spent on an initialisation that is thrown away
            linear = nn.Linear(module.in_features, module.out_features, bias=module.bias is not None)
        linear.weight = nn.Parameter(weight, requires_grad=False)
        if module.bias is not None:
            linear.bias = nn.Parameter(module.bias.detach().to(dtype), requires_grad=module.bias.requires_grad)
        _replace(model, name, module, linear)


_HOOKS = (  # a hook, and whether it takes keyword arguments, or runs whatever happens
    *("_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called"),
    *("_forward_pre_hooks", "_forward_pre_hooks_with_kwargs"),
)


def _replace(model: nn.Module, name: str, old: nn.Module, new: nn.Module) -> None:
    """Put ``new`` where ``old`` was, with the hooks and children that methods hung on it."""
    for child, value in old.named_children():
        new.add_module(child, value)
    for hooks in _HOOKS:
        setattr(new, hooks, getattr(old, hooks))
    new.train(old.training)
    model.set_submodule(name, new)


def _head(model: Any) -> nn.Module | None:
    return model.get_output_embeddings()


def is_shape_only(tensor: Tensor) -> bool:
    """Whether a tensor has no values to look at: when planning."""
    from torch._subclasses.fake_tensor import FakeTensor

    return isinstance(tensor, FakeTensor) or tensor.device.type == "meta"
