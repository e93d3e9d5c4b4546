"""Packed weights: what they multiply with, how large they are, and that evaluation never changes what training sees."""

from __future__ import annotations

import copy
from collections.abc import Callable

import bitsandbytes.functional as bnb
import pytest
import tiny
import torch
from bitsandbytes.nn import Linear4bit, Linear8bitLt
from torch import Tensor, nn
from torch.nn import functional as F

from edgepeft import adapter, precision, step
from edgepeft.errors import UsageError
from edgepeft.evaluate import evaluate
from edgepeft.merge import to_full_precision
from edgepeft.placements import delta
from edgepeft.trace import Tracker

PACKED = ("nf4", "int8")
SHAPES = [(32, 64), (100, 36), (48, 576), (7, 3)]  # odd ones too: some kernels want multiples of the block


def linear(out_features: int, in_features: int, *, bias: bool = True) -> nn.Linear:
    torch.manual_seed(out_features)
    return nn.Linear(in_features, out_features, bias=bias).to(torch.bfloat16)


@pytest.mark.parametrize("shape", SHAPES)
def test_nf4_unpacks_to_what_bitsandbytes_unpacks(shape: tuple[int, int]) -> None:
    plain = linear(*shape)
    packed, state = bnb.quantize_4bit(plain.weight.detach(), blocksize=64, compress_statistics=True, quant_type="nf4")
    assert torch.equal(precision.pack(plain, "nf4").dequantize(torch.bfloat16), bnb.dequantize_4bit(packed, state))


@pytest.mark.parametrize("shape", SHAPES)
def test_int8_unpacks_to_what_bitsandbytes_unpacks(shape: tuple[int, int]) -> None:
    plain = linear(*shape)
    packed, largest, _ = bnb.int8_vectorwise_quant(plain.weight.detach().to(torch.float16))
    theirs = bnb.int8_vectorwise_dequant(packed, largest)
    torch.testing.assert_close(precision.pack(plain, "int8").dequantize(torch.float32), theirs, rtol=1e-6, atol=0)


def test_int8_rows_of_zeros_stay_zeros() -> None:
    plain = linear(4, 8)
    with torch.no_grad():
        plain.weight[2] = 0
    unpacked = precision.pack(plain, "int8").dequantize(torch.bfloat16)
    assert torch.equal(unpacked[2], torch.zeros(8, dtype=torch.bfloat16))
    assert unpacked.isfinite().all()


def rounding(weight: Tensor, at: str) -> Tensor:
    """The most that packing may move each weight: half the widest gap of the 4-bit code, or half an 8-bit step."""
    if at == "int8":
        return (weight.abs().amax(1, keepdim=True) / 127 * 0.5).expand_as(weight)
    flat = weight.flatten()
    blocks = F.pad(flat, (0, -len(flat) % 64)).view(-1, 64)
    largest = blocks.abs().amax(1, keepdim=True).expand_as(blocks).flatten()[: len(flat)]
    return largest.view_as(weight) * 0.16  # the gap between -1 and the next value is 0.304


@pytest.mark.parametrize("at", PACKED)
@pytest.mark.parametrize("shape", SHAPES)
def test_packing_only_rounds(at: str, shape: tuple[int, int]) -> None:
    plain = linear(*shape).float()
    moved = (precision.pack(plain, at).dequantize(torch.float32) - plain.weight).abs()
    slack = 0.02 * plain.weight.abs().max()  # scales are themselves rounded to 8 bits
    assert (moved <= rounding(plain.weight.detach(), at) + slack).all()
    assert moved.max() > 0


@pytest.mark.parametrize("bf16", [True, False])
@pytest.mark.parametrize("at", PACKED)
@pytest.mark.parametrize("bias", [True, False])
def test_forward_and_gradient_are_those_of_the_explicit_product(at: str, bias: bool, bf16: bool) -> None:
    packed = precision.pack(linear(48, 64, bias=bias), at)
    with precision.emulating(bf16=bf16):
        dtype = torch.bfloat16 if bf16 else torch.float32
        weight = packed.dequantize(dtype)
        given = torch.randn(2, 5, 64, dtype=torch.bfloat16, requires_grad=True)
        ours = given.detach().requires_grad_()
        wanted = F.linear(given.to(dtype), weight, None if packed.bias is None else packed.bias.to(dtype))
        wanted = wanted.to(torch.bfloat16)
        got = packed(ours)
        assert torch.equal(got, wanted)
        upstream = torch.randn_like(wanted)
        wanted.backward(upstream)
        got.backward(upstream)
    assert given.grad is not None and ours.grad is not None
    assert torch.equal(ours.grad, given.grad)


@pytest.mark.parametrize("at", PACKED)
def test_a_frozen_input_builds_no_graph(at: str) -> None:
    assert not precision.pack(linear(48, 64), at)(torch.randn(3, 64, dtype=torch.bfloat16)).requires_grad


@pytest.mark.parametrize(("at", "expected"), [("nf4", 0.5 + 1 / 64 + 4 / (64 * 256)), ("int8", 1.0)])
def test_bytes_per_weight(at: str, expected: float) -> None:
    """QLoRA section 3: 4 bits, an 8-bit scale for 64 of them, and a 32-bit scale for 256 of those."""
    packed = precision.pack(linear(1024, 2048, bias=False), at)
    stored = sum(buffer.numel() * buffer.element_size() for buffer in packed.buffers())
    assert stored / (1024 * 2048) == pytest.approx(expected, rel=0.005)
    assert not list(packed.parameters())


@pytest.mark.parametrize("at", PACKED)
def test_shapes_alone_allocate_the_same_buffers(at: str) -> None:
    real = precision.pack(linear(100, 36), at)
    planned = precision.pack(linear(100, 36).to("meta"), at)
    ours = {name: (buffer.shape, buffer.dtype) for name, buffer in planned.named_buffers()}
    assert ours == {name: (buffer.shape, buffer.dtype) for name, buffer in real.named_buffers()}
    assert all(buffer.is_meta for buffer in planned.buffers())


class Doubled(delta.Additive):
    """A delta with a weight of its own, to be found again."""

    def __init__(self, out_features: int, in_features: int) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.randn(out_features, in_features))

    def change(self, x: Tensor) -> Tensor:
        return F.linear(x, self.factor.to(x.dtype))

    def weight(self) -> Tensor:
        return self.factor.detach()


@pytest.mark.parametrize("at", PACKED)
def test_unpacking_keeps_weights_hooks_children_and_mode(at: str) -> None:
    model = nn.Sequential(precision.pack(linear(48, 64), at))
    packed = model[0]
    assert isinstance(packed, precision.StoredLinear)
    seen: list[str] = []
    packed.register_forward_pre_hook(lambda module, args, kwargs: seen.append("before"), with_kwargs=True)
    packed.register_forward_hook(lambda module, args, kwargs, output: seen.append("after"), with_kwargs=True)
    delta.attach(packed, Doubled(48, 64))
    model.eval()
    x = torch.randn(3, 64, dtype=torch.bfloat16)
    before, weight = model(x), packed.dequantize(precision.matmul_dtype(torch.bfloat16, x.device))
    assert seen == ["before", "after"]
    factor = packed.delta
    precision.unpack(model, torch.float32)
    plain = model[0]
    assert type(plain) is nn.Linear and not plain.training and plain.delta is factor
    assert torch.equal(plain.weight, weight.float()) and not plain.weight.requires_grad
    assert packed.bias is not None and torch.equal(plain.bias, packed.bias.float())
    torch.testing.assert_close(
        model(x.float()), before.float(), rtol=2e-2, atol=0.1
    )  # several units off without the delta
    assert seen == ["before", "after"] * 2


@pytest.mark.parametrize("bf16", [True, False])
def test_a_trained_weight_is_multiplied_with_what_is_kept_as_it_is(bf16: bool) -> None:
    x = torch.randn(3, 5, 64, dtype=torch.bfloat16, requires_grad=True)
    weight = nn.Parameter(torch.randn(8, 64))
    kept: list[Tensor] = []
    with (
        precision.emulating(bf16=bf16),
        torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t),  # type: ignore[func-returns-value]
    ):
        product = precision.linear(x, weight)
    assert product.dtype is (torch.bfloat16 if bf16 else torch.float32)
    assert any(t.data_ptr() == x.data_ptr() for t in kept) and all(t.dtype is x.dtype for t in kept if len(t) == 3)
    upstream = torch.randn_like(product)
    product.backward(upstream)
    assert weight.grad is not None and weight.grad.dtype is torch.float32 and x.grad is not None
    tolerance = {"rtol": 2e-2, "atol": 0.1} if bf16 else {"rtol": 1e-5, "atol": 1e-5}
    torch.testing.assert_close(product.double(), x.double() @ weight.double().t(), **tolerance)  # type: ignore[arg-type]
    expected = upstream.double().flatten(0, 1).t() @ x.double().flatten(0, 1)
    torch.testing.assert_close(weight.grad.double(), expected, **tolerance)  # type: ignore[arg-type]
    torch.testing.assert_close(x.grad.double(), upstream.double() @ weight.double(), rtol=2e-2, atol=0.1)


def test_bf16_weights_are_multiplied_in_fp32_where_that_is_faster() -> None:
    """The frozen layers only, and unpacking gives the very same weights back."""
    with precision.emulating(bf16=False):
        made, method = tiny.adapted("llama", "ln_tuning", "bf16")
        stored = {n: m for n, m in made.model.named_modules() if isinstance(m, precision.BF16Linear)}
        assert set(stored) == set(made.anatomy.linears(("query", "key", "value", "output", "ffn_in", "ffn_out")))
        reference = tiny.load("llama", "bf16").model
        precision.unpack(made.model, torch.bfloat16)
    for name in stored:
        assert torch.equal(made.model.get_parameter(f"{name}.weight"), reference.get_parameter(f"{name}.weight"))


@pytest.mark.parametrize("bf16", [True, False])
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_every_family_runs_with_and_without_native_bf16(family: str, bf16: bool) -> None:
    """Some models ask their layers for ``weight``: every kind of layer has to bear it."""
    batch = tiny.batch(family)
    with precision.emulating(bf16=bf16):
        made, _ = tiny.adapted(family, "lora", "bf16")
        half = tiny.loss_sum(made.model, batch)
        half.backward()
    full, _ = tiny.adapted(family, "lora", "fp32")
    assert half.item() == pytest.approx(tiny.loss_sum(full.model, batch).item(), rel=0.02)


@pytest.mark.parametrize("at", PACKED)
@pytest.mark.parametrize("family", ["llama", "bert", "t5"])
def test_no_layer_of_bitsandbytes_is_in_a_model(family: str, at: str) -> None:
    made, _ = tiny.adapted(family, "lora", at)
    assert not [m for m in made.model.modules() if isinstance(m, (Linear4bit, Linear8bitLt))]
    packed = {
        name for name, m in made.model.named_modules() if isinstance(m, (precision.NF4Linear, precision.Int8Linear))
    }
    roles = ("query", "key", "value", "output", "cross_query", "cross_key", "cross_value", "cross_output", "ffn_in")
    wanted = set(made.anatomy.linears(roles if family == "t5" else (*roles, "ffn_out")))
    assert packed == wanted, "all layers of the blocks, but T5's wo, and neither embeddings nor head"


def dense_reference(model: nn.Module) -> nn.Module:
    """A copy whose packed layers are plain ones with the weights written out."""
    written = copy.deepcopy(model)
    precision.unpack(written, torch.bfloat16)
    return written


def gradients(model: nn.Module, batch: step.Batch) -> dict[str, Tensor]:
    model.train()
    model.zero_grad(set_to_none=True)
    tiny.loss_sum(model, batch).backward()
    return {name: parameter.grad for name, parameter in adapter.trained(model).items() if parameter.grad is not None}


@pytest.mark.parametrize("family", ["llama", "bert", "t5"])
def test_training_after_evaluation_sees_the_same_weights(family: str) -> None:
    """bitsandbytes repacks 4-bit weights in evaluation mode on some CPUs; gradients and merges are wrong afterwards."""
    made, method = tiny.adapted(family, "lora", "nf4")
    model, batch = made.model, tiny.batch(family)
    trainer = step.TrainingStep(model, method.optimizer(model, 1e-2, 0.0), clip_norm=1.0)

    def train(updates: int) -> None:
        model.train()
        for _ in range(updates):
            trainer.backward([batch], 1e-2)
            trainer.update()

    with precision.emulating(bf16=True):  # so that both do the same arithmetic, on any machine
        train(3)
        first = evaluate(model, [batch])
        after = gradients(model, batch)
        reference = gradients(dense_reference(model), batch)
        assert after.keys() == reference.keys() == adapter.trained(model).keys()
        assert all(gradient.abs().max() > 0 for gradient in after.values())
        for name, gradient in after.items():
            assert torch.equal(gradient, reference[name]), name
        model.zero_grad(set_to_none=True)
        train(3)
        assert evaluate(model, [batch])["loss"] < first["loss"]
        to_full_precision(model)
        unmerged = evaluate(model, [batch])
        method.merge(model)
    assert not [name for name, _ in model.named_modules() if name.endswith(".delta")]
    assert evaluate(model, [batch])["loss"] == pytest.approx(unmerged["loss"], rel=1e-5)


@pytest.mark.parametrize("at", ["int8", "nf4"])
def test_packing_and_unpacking_hold_one_layer_twice_and_not_the_model(at: str) -> None:
    size, count = 128, 16
    model = nn.Sequential(*(nn.Linear(size, size, bias=False) for _ in range(count)))
    whole, one = 4 * count * size**2, 4 * size**2

    def peak(change: Callable[[], None]) -> int:
        tracker = Tracker(cuda=False)
        tracker.label(list(model.state_dict().values()), "weights")
        with tracker.phase("change"):
            change()
        return tracker.peaks()["change"].peak_bytes

    def packing() -> None:
        precision.pack_where(model, lambda name: True, None, lambda name, linear: precision.pack(linear, at))

    assert peak(packing) < whole + 3 * one  # with the temporaries of one packing
    assert peak(lambda: precision.unpack(model, torch.float32)) < whole + 3 * one


def test_unknown_precision() -> None:
    with pytest.raises(UsageError, match="Unknown precision 'nf5'") as caught:
        precision.check("nf5")
    assert "nf4" in caught.value.remedy
