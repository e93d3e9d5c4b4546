"""What a rebuilt run needs of transformers, peft and bitsandbytes on fake tensors: patches, and an NF4 layer."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, Literal
from unittest import mock

import bitsandbytes as bnb
import torch
from bitsandbytes.functional import QuantState
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import _disable_current_modes

from edgepeft import catalog

TINYLLAMA = {  # config.json of TinyLlama/TinyLlama-1.1B-Chat-v1.0 on the Hugging Face hub; not in the catalogue
    "model_type": "llama",
    "vocab_size": 32000,
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": 22,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": False,
}
BLOCK, SCALE_BLOCK = 64, 256  # weights a scale, and scales a second-level scale: bitsandbytes' defaults


def config(model: str, layers: int | None = None) -> Any:
    """The transformers configuration of a model of the catalogue, with fewer layers if wanted."""
    from transformers import AutoConfig

    fields = catalog.entry(model) or (dict(TINYLLAMA) if "TinyLlama" in model else None)
    if fields is None:
        raise SystemExit(f"{model} is not in the catalogue.")
    fields.pop("_edgepeft", None)
    found = AutoConfig.for_model(fields.pop("model_type"), **fields)
    return found if layers is None else shallow(found, layers)


def shallow(config: Any, layers: int) -> Any:
    """The same configuration with ``layers`` layers in each stack."""
    for name in ("num_hidden_layers", "num_layers", "num_decoder_layers"):
        if getattr(config, name, None):
            setattr(config, name, layers)
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:layers]
    return config


@contextlib.contextmanager
def patched(*, padded: bool) -> Iterator[None]:
    """Let transformers and peft run on fake tensors as they run on real ones.

    Args:
        padded: the answer to every question whether a batch has padding, which fake tensors cannot give.
    """
    from transformers import masking_utils

    with (
        mock.patch.object(masking_utils, "is_tracing", lambda *_: False),
        mock.patch.object(masking_utils, "fast_all", lambda _: not padded),
        mock.patch.object(masking_utils, "find_packed_sequence_indices", lambda _: None),
        mock.patch.object(nn.Module, "_apply", _apply),
        mock.patch.object(FakeTensorMode, "__deepcopy__", lambda mode, _: mode, create=True),
    ):
        yield


def _apply(module: nn.Module, function: Any, recurse: bool = True) -> nn.Module:
    """``nn.Module._apply`` swaps the contents of tensors, which fake ones refuse; assigning new ones does the same."""
    for child in module.children() if recurse else ():
        child._apply(function)
    for parameter in module._parameters.values():
        if parameter is not None:
            changed = function(parameter.detach())
            if changed is not parameter and (changed.dtype != parameter.dtype or changed.device != parameter.device):
                parameter.data = changed
    for name, buffer in module._buffers.items():
        if buffer is not None:
            module._buffers[name] = function(buffer)
    return module


class FakeLinear4bit(bnb.nn.Linear4bit):
    """bitsandbytes' 4-bit linear without its parameter class, which cannot wrap a fake tensor.

    The same storages and the same call of ``matmul_4bit`` between the same casts.
    """

    def __init__(self, linear: nn.Linear, weight: Tensor, compute_dtype: torch.dtype, *, double: bool) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.compute_dtype = compute_dtype
        packed, state = _quantized(weight, compute_dtype, double=double)
        weight_of: Any = nn.Parameter(packed, requires_grad=False)
        weight_of.compress_statistics, weight_of.quant_type = double, "nf4"
        self.weight = weight_of
        self.state = state
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        given = x.dtype
        x = x.to(self.compute_dtype)
        bias = None if self.bias is None else self.bias.to(self.compute_dtype)
        return bnb.matmul_4bit(x, self.weight, bias=bias, quant_state=self.state).to(given)


def _quantized(weight: Tensor, dtype: torch.dtype, *, double: bool) -> tuple[Tensor, QuantState]:
    """What ``bitsandbytes.functional.quantize_4bit`` makes, in the order in which it allocates."""
    blocks = -(-weight.numel() // BLOCK)
    absmax = torch.empty(blocks)
    packed = torch.empty((weight.numel() + 1) // 2, 1, dtype=torch.uint8)
    common: Any = {"shape": weight.shape, "blocksize": BLOCK, "quant_type": "nf4", "dtype": dtype}
    if not double:
        return packed, QuantState(absmax=absmax, code=torch.empty(16), **common)
    offset, code = torch.empty(()), torch.empty(16)
    inner = QuantState(
        absmax=torch.empty(-(-blocks // SCALE_BLOCK)), code=torch.empty(256), blocksize=SCALE_BLOCK, dtype=torch.float32
    )
    absmax = torch.empty(blocks, dtype=torch.uint8)
    return packed, QuantState(absmax=absmax, code=code, offset=offset, state2=inner, **common)


def load(
    config: Any,
    dtype: torch.dtype,
    *,
    attention: str | None = None,
    nf4: Literal["single", "double"] | None = None,
    device_map: bool = True,
    auto: Any = None,
) -> Any:
    """A model as ``from_pretrained`` leaves it on a device; what it allocates on the way is traced, in order.

    With a ``device_map`` transformers first reserves as much as the model takes, then loads tensor by tensor, sorted
    by name (modeling_utils.caching_allocator_warmup, core_model_loading.convert_and_load_state_dict_in_model). Without,
    a model that was loaded on the CPU is moved tensor by tensor, module by module.

    Args:
        nf4: quantise linear layers to NF4 on the way, with single or double quantisation.
        auto: transformers' class, ``AutoModelForCausalLM`` if not given.
    """
    from transformers import AutoModelForCausalLM

    with _disable_current_modes(), torch.device("meta"):  # nothing of this is on the device
        model: Any = (auto or AutoModelForCausalLM).from_config(config, dtype=dtype, attn_implementation=attention)
    packed = {f"{name}.weight": name for name in _packed(model)} if nf4 else {}
    parameters = dict(model.named_parameters())
    if device_map:
        count = sum(
            p.numel() // 2 if name in packed else p.numel() * p.element_size() for name, p in parameters.items()
        )
        del_soon = torch.empty(count // 2, dtype=torch.float16)
        del del_soon
    for name in sorted(parameters, key=_natural) if device_map else parameters:
        module, _, own = name.rpartition(".")
        value = torch.empty(parameters[name].shape, dtype=parameters[name].dtype)
        if name in packed:
            linear = model.get_submodule(module)
            model.set_submodule(module, FakeLinear4bit(linear, value, dtype, double=nf4 == "double"))
        else:
            _set(model, parameters[name], nn.Parameter(value, requires_grad=True))
        del value
    for module in model.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype)
        for name, value in vars(module).items():
            if isinstance(value, Tensor) and value.is_meta:  # a rotary embedding's original frequencies
                setattr(module, name, torch.empty(value.shape, dtype=value.dtype))
    model.is_loaded_in_4bit = bool(nf4)
    return model.eval()


def _packed(model: Any) -> list[str]:
    """Linear layers that ``load_in_4bit`` packs: all but the head."""
    head = model.get_output_embeddings()
    return [name for name, module in model.named_modules() if type(module) is nn.Linear and module is not head]


def _set(model: nn.Module, old: nn.Parameter, new: nn.Parameter) -> None:
    """Put ``new`` wherever ``old`` is: tied parameters stay tied."""
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is old:
                module._parameters[name] = new


def _natural(name: str) -> list[tuple[int, int, str]]:
    """Sorts layer 10 after layer 9."""
    return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in name.split(".")]
