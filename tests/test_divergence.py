"""The divergence of two predictions is the plain one, chunk by chunk, to the rounding of fp32."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from edgepeft import cross_entropy
from edgepeft.divergence import divergence, linear_divergence
from edgepeft.trace import Tracker

POSITIONS, WIDTH, VOCABULARY = 37, 8, 50


def plain(first: Tensor, second: Tensor) -> Tensor:
    """The symmetrised Kullback-Leibler divergence by torch's own, in float64."""
    log_p, log_q = first.double().log_softmax(-1), second.double().log_softmax(-1)
    there = F.kl_div(log_q, log_p, reduction="sum", log_target=True)
    back = F.kl_div(log_p, log_q, reduction="sum", log_target=True)
    return (there + back) / 2


def states(dtype: torch.dtype = torch.float32) -> list[Tensor]:
    random = torch.Generator().manual_seed(0)
    return [torch.randn(POSITIONS, WIDTH, generator=random).to(dtype).requires_grad_() for _ in range(2)]


@pytest.mark.parametrize("chunked", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("softcap", [None, 1.5])
def test_value_and_gradients(softcap: float | None, bias: bool, chunked: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if chunked:
        monkeypatch.setattr(cross_entropy, "CHUNK_BYTES", 1)
    random = torch.Generator().manual_seed(1)
    weight = torch.randn(VOCABULARY, WIDTH, generator=random)
    shift = torch.randn(VOCABULARY, generator=random) if bias else None

    def all_logits(state: Tensor) -> Tensor:
        logits = F.linear(state, weight.double(), None if shift is None else shift.double())
        return logits if softcap is None else softcap * torch.tanh(logits / softcap)

    ours, exact = states(), states(torch.float64)
    found = linear_divergence(ours[0], ours[1], weight, shift, softcap)
    expected = plain(*(all_logits(state) for state in exact))
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-6)
    (3 * found).backward()
    (3 * expected).backward()
    for mine, other in zip(ours, exact, strict=True):
        assert mine.grad is not None and other.grad is not None
        torch.testing.assert_close(mine.grad.double(), other.grad, rtol=1e-4, atol=1e-5)


def test_of_a_few_classes_it_is_the_same() -> None:
    first, second = states()
    torch.testing.assert_close(divergence(first, second).double(), plain(first, second), rtol=1e-5, atol=1e-6)
    assert divergence(first, first).item() == 0


def test_all_logits_are_never_held(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cross_entropy, "CHUNK_BYTES", 1 << 16)
    vocabulary, positions = 5000, 400
    first, second = (torch.randn(positions, WIDTH, requires_grad=True) for _ in range(2))
    weight = torch.randn(vocabulary, WIDTH)
    tracker = Tracker(cuda=False)
    tracker.label([first, second, weight], "weights")
    with tracker.phase("divergence"):
        linear_divergence(first, second, weight, None).backward()
    held = tracker.peaks()["divergence"].peak_bytes - 4 * (first.numel() + second.numel() + weight.numel())
    assert held < 6.5 * 16 * vocabulary * 4  # of at least 16 positions at a time; all would be 400
