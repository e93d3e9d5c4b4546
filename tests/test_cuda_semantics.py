"""What an operator allocates and keeps for backward on CUDA, where a CPU does it otherwise."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from edgepeft import cuda_semantics
from edgepeft.cuda_device import Device
from edgepeft.trace import Tracker, fake_device

BATCH, HEADS, TOKENS, WIDTH = 2, 4, 64, 16
STATES = BATCH * HEADS * TOKENS * WIDTH
SCORES = BATCH * HEADS * TOKENS * TOKENS


def kept(make: Callable[[], tuple[Tensor, ...]], operate: Callable[..., Tensor], *, cuda: bool = True) -> int:
    """Bytes beside its inputs that are alive when an operator has run: its output, and what it keeps for backward."""
    with fake_device(cuda=cuda):
        tracker = Tracker(cuda=False)  # exact bytes, not rounded to blocks
        inputs = make()
        tracker.label(inputs, "weights")
        with tracker.phase("forward"):
            output = operate(*inputs)
        with tracker.phase("after"):
            pass
        held = tracker.peaks()["after"]
        del output
    return held.peak_bytes - held.bytes["weights"]


def states(count: int = 3, dtype: torch.dtype = torch.bfloat16, heads: int = HEADS) -> tuple[Tensor, ...]:
    shapes = [(BATCH, HEADS, TOKENS, WIDTH), *[(BATCH, heads, TOKENS, WIDTH)] * (count - 1)]
    return tuple(torch.empty(shape, dtype=dtype, requires_grad=True) for shape in shapes)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dropout_keeps_a_mask_of_bytes(dtype: torch.dtype) -> None:
    size = STATES * dtype.itemsize
    module = nn.Dropout(0.1)
    assert kept(lambda: states(1, dtype), module) == size + STATES
    assert kept(lambda: states(1, dtype), lambda x: F.dropout(x, 0.1)) == size + STATES
    assert kept(lambda: states(1, dtype), module, cuda=False) > size + STATES, "the CPU's mask is as wide as its input"


def test_dropout_of_nothing_keeps_nothing() -> None:
    assert kept(lambda: states(1), nn.Dropout(0.0)) == 0
    assert kept(lambda: states(1), nn.Dropout(0.1).eval()) == 0


@pytest.mark.parametrize(("dtype", "fused"), [(torch.float16, True), (torch.bfloat16, False)])
def test_softmax_of_float16_into_fp32_has_no_copy_of_its_input(dtype: torch.dtype, fused: bool) -> None:
    """ATen's kernel converts float16, and only that: "conversion is supported for Half type only"."""

    def peak(cuda: bool) -> int:
        with fake_device(cuda=cuda):
            tracker = Tracker(cuda=False)
            x = torch.empty(BATCH, HEADS, TOKENS, TOKENS, dtype=dtype, requires_grad=True)
            tracker.label([x], "weights")
            with tracker.phase("forward"):
                assert F.softmax(x, dim=-1, dtype=torch.float32).dtype is torch.float32
            found = tracker.peaks()["forward"]
        return found.peak_bytes - found.bytes["weights"]

    assert peak(cuda=True) == (4 if fused else 8) * SCORES
    assert peak(cuda=False) == 8 * SCORES


def test_softmax_backward_has_a_workspace() -> None:
    """ATen's CUDA kernel is given grad · output as a tensor."""

    def peak(cuda: bool) -> int:
        with fake_device(cuda=cuda) as tracker:
            x = torch.empty(BATCH, HEADS, TOKENS, TOKENS, requires_grad=True)
            y = F.softmax(x, dim=-1)
            gradient = torch.empty_like(y)
            tracker.label([x, y, gradient], "weights")
            with tracker.phase("backward"):
                y.backward(gradient)
            return tracker.peaks()["backward"].peak_bytes

    assert peak(cuda=True) - peak(cuda=False) == 4 * SCORES


@pytest.mark.parametrize(
    ("capability", "version", "size"),
    [
        ((7, 5), (2, 13), 8519680),
        ((8, 9), (2, 13), 8519680),
        ((9, 0), (2, 13), 32 << 20),
        ((12, 0), (2, 13), 32 << 20),
        ((12, 0), (2, 11), 8519680),
        ((7, 5), (1, 13), 4 << 20),
    ],
)
def test_forward_and_backward_have_a_cublas_workspace_each(
    capability: tuple[int, int], version: tuple[int, int], size: int
) -> None:
    device = Device(capability, version)
    with fake_device(cuda=device) as tracker:
        layer, x = nn.Linear(64, 64, bias=False), torch.empty(8, 64)
        with tracker.phase("forward"):
            loss = layer(layer(x)).sum()
        with tracker.phase("backward"):
            loss.backward()
        with tracker.phase("after"):
            pass
        peaks = tracker.peaks()
    assert size <= peaks["forward"].peak_bytes < size + (64 << 10)
    assert 2 * size <= peaks["after"].peak_bytes < 2 * size + (64 << 10)


@pytest.mark.parametrize(("capability", "scores"), [((7, 5), True), ((8, 0), False)])
def test_grouped_heads_without_flash_attention_have_scores(capability: tuple[int, int], scores: bool) -> None:
    """The memory-efficient kernel takes no grouped heads: a T4 falls back to plain products."""
    with fake_device(cuda=Device(capability)) as tracker:
        query, key, value = states(heads=2)
        with tracker.phase("forward"):
            F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
        assert (tracker.peaks()["forward"].peak_bytes > 4 * SCORES) is scores


@pytest.mark.parametrize("cuda", [True, False])
def test_logsumexp_has_a_workspace_on_every_device(cuda: bool) -> None:
    with fake_device(cuda=cuda) as tracker:
        x = torch.empty(64, 1024)
        tracker.label([x], "weights")
        with tracker.phase("forward"):
            x.logsumexp(1)
        found = tracker.peaks()["forward"]
    assert found.peak_bytes - found.bytes["weights"] == pytest.approx(x.nbytes, abs=1024)


def attention(**options: Any) -> Callable[..., Tensor]:
    return lambda query, key, value: F.scaled_dot_product_attention(query, key, value, **options)


def test_flash_attention_keeps_its_output_and_a_number_per_row() -> None:
    rows = 4 * BATCH * HEADS * TOKENS
    assert kept(states, attention(is_causal=True)) == pytest.approx(2 * STATES + rows, abs=64)
    full = kept(lambda: states(dtype=torch.float32), attention(is_causal=True))
    assert kept(states, attention(is_causal=True)) < 2 * SCORES and full < 4 * SCORES, "no scores"


def test_grouped_heads_are_not_repeated_by_flash_attention() -> None:
    def grouped() -> tuple[Tensor, ...]:
        return states(heads=2)

    assert kept(grouped, attention(is_causal=True, enable_gqa=True)) == kept(states, attention(is_causal=True))


@pytest.mark.parametrize("mask_dtype", [torch.bool, torch.bfloat16])
def test_a_mask_means_memory_efficient_attention(mask_dtype: torch.dtype) -> None:
    def operate(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        mask = torch.empty(BATCH, 1, TOKENS, TOKENS, dtype=mask_dtype)
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask)

    without = kept(states, attention())
    mask = BATCH * TOKENS * TOKENS * 2  # as wide as the states, for all heads together
    assert kept(states, operate) == pytest.approx(without + mask, abs=256)


def test_attention_has_the_shape_and_dtype_of_its_queries_and_backward_that_of_its_inputs() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        for kind in ("causal", "masked", "grouped"):
            with fake_device(cuda=True):
                query, key, value = inputs = states(dtype=dtype, heads=2 if kind == "grouped" else HEADS)
                mask = torch.ones(BATCH, 1, TOKENS, TOKENS, dtype=torch.bool) if kind == "masked" else None
                output = F.scaled_dot_product_attention(
                    query, key, value, attn_mask=mask, is_causal=kind == "causal", enable_gqa=kind == "grouped"
                )
                assert output.shape == inputs[0].shape and output.dtype is dtype
                output.sum().backward()
                assert all(t.grad is not None and t.grad.shape == t.shape for t in inputs)


def test_everything_is_put_back() -> None:
    before = (F.dropout, F.softmax, F.scaled_dot_product_attention)
    with pytest.raises(ZeroDivisionError), cuda_semantics.emulated(Device()):
        assert before[0] is not F.dropout
        raise ZeroDivisionError
    assert (F.dropout, F.softmax, F.scaled_dot_product_attention) == before
