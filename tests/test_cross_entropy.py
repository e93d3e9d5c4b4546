"""The chunked loss is the plain one, to the rounding of fp32, and never holds all logits."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from edgepeft import cross_entropy, precision
from edgepeft.cross_entropy import chunks, linear_cross_entropy
from edgepeft.trace import Tracker

POSITIONS, WIDTH, VOCABULARY = 37, 8, 50
Loss = Callable[[Tensor, Tensor, Tensor | None, Tensor, float | None], Tensor]


def plain(hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, softcap: float | None) -> Tensor:
    """The same with all logits at once, in float64."""
    logits = F.linear(hidden.double(), weight.double(), None if bias is None else bias.double())
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    return F.cross_entropy(logits, targets, reduction="sum")


def evaluated(loss: Loss, dtype: torch.dtype, bias: bool, softcap: float | None, trains: str) -> list[Tensor]:
    """The loss times three, and the gradients of what ``trains`` names, in fp64."""
    random = torch.Generator().manual_seed(0)

    def values(*shape: int) -> Tensor:
        return torch.randn(shape, generator=random).to(dtype)

    hidden, weight, shift = values(POSITIONS, WIDTH), values(VOCABULARY, WIDTH), values(VOCABULARY)
    targets = torch.randint(VOCABULARY, (POSITIONS,), generator=random)
    given = {"hidden": hidden, "weight": weight, **({"bias": shift} if bias else {})}
    for name, tensor in given.items():
        tensor.requires_grad_(name in trains.split())
    total = 3 * loss(hidden, weight, given.get("bias"), targets, softcap)
    total.backward()
    gradients = [tensor.grad for tensor in given.values()]
    assert [gradient is not None for gradient in gradients] == [name in trains.split() for name in given]
    return [total.detach().double(), *(gradient.double() for gradient in gradients if gradient is not None)]


@pytest.fixture(params=["one chunk", "three chunks"])
def chunked(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "three chunks":
        monkeypatch.setattr(cross_entropy, "CHUNK_BYTES", 1)
        assert [part.stop - part.start for part in chunks(POSITIONS, VOCABULARY)] == [16, 16, 5]


@pytest.mark.usefixtures("chunked")
@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize(
    ("bias", "trains"),
    [(False, "hidden"), (True, "hidden"), (False, "weight"), (True, "bias"), (True, "hidden weight bias")],
)
def test_loss_and_gradients(bias: bool, trains: str, softcap: float | None) -> None:
    ours = evaluated(linear_cross_entropy, torch.float32, bias, softcap, trains)
    wanted = evaluated(plain, torch.float64, bias, softcap, trains)
    for got, expected in zip(ours, wanted, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.usefixtures("chunked")
@pytest.mark.parametrize("native", [True, False])
def test_half_precision_rounds_only_operands_and_results(native: bool) -> None:
    with precision.emulating(bf16=native):
        ours = evaluated(linear_cross_entropy, torch.bfloat16, True, None, "hidden weight bias")
    wanted = evaluated(plain, torch.bfloat16, True, None, "hidden weight bias")
    for got, expected in zip(ours, wanted, strict=True):
        scale = expected.abs().max().item()
        torch.testing.assert_close(got, expected, rtol=0.02, atol=0.01 * scale)


def test_gradients_are_the_slope_of_the_loss() -> None:
    """By finite differences along random directions, wide enough for the rounding of fp32."""
    random = torch.Generator().manual_seed(1)
    hidden, weight = (torch.randn(size, WIDTH, generator=random) for size in (5, VOCABULARY))
    targets = torch.randint(VOCABULARY, (5,), generator=random)
    hidden.requires_grad_()
    weight.requires_grad_()
    linear_cross_entropy(hidden, weight, None, targets, 2.0).backward()
    for _ in range(5):
        towards = [torch.randn(tensor.shape, generator=random) for tensor in (hidden, weight)]

        def moved(distance: float, towards: list[Tensor] = towards) -> Tensor:
            h, w = (t + distance * d for t, d in zip((hidden, weight), towards, strict=True))
            return linear_cross_entropy(h, w, None, targets, 2.0).detach()

        assert hidden.grad is not None and weight.grad is not None
        slope = (moved(1e-2) - moved(-1e-2)) / 2e-2
        expected = (hidden.grad * towards[0]).sum() + (weight.grad * towards[1]).sum()
        torch.testing.assert_close(slope, expected, rtol=5e-3, atol=5e-3)


def test_large_logits_do_not_overflow() -> None:
    hidden = torch.tensor([[1e4, 0.0], [0.0, 1e4]], requires_grad=True)
    loss = linear_cross_entropy(hidden, torch.eye(2), None, torch.tensor([0, 0]))
    loss.backward()
    assert loss.item() == 1e4 and hidden.grad is not None
    assert torch.equal(hidden.grad, torch.tensor([[0.0, 0.0], [-1.0, 1.0]]))


def test_no_positions_no_loss() -> None:
    hidden = torch.zeros(0, WIDTH, requires_grad=True)
    loss = linear_cross_entropy(hidden, torch.randn(VOCABULARY, WIDTH), None, torch.zeros(0, dtype=torch.long))
    loss.backward()
    assert loss.item() == 0 and hidden.grad is not None and hidden.grad.shape == (0, WIDTH)


def test_chunks_cover_every_position_once() -> None:
    for positions, vocabulary in ((1, 10), (16, 10**8), (33, 10**8), (10_000, 50_000), (0, 10)):
        parts = chunks(positions, vocabulary)
        assert [index for part in parts for index in range(part.start, part.stop)] == list(range(positions))
        assert all(
            part.stop - part.start <= 16 or (part.stop - part.start) * vocabulary * 4 <= cross_entropy.CHUNK_BYTES
            for part in parts
        )


@pytest.mark.parametrize("native", [True, False])
def test_memory_is_a_few_chunks_and_never_all_logits(native: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    positions, width, vocabulary = 1024, 16, 2048
    monkeypatch.setattr(cross_entropy, "CHUNK_BYTES", 32 * 4 * vocabulary)
    hidden = torch.randn(positions, width, dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(vocabulary, width, dtype=torch.bfloat16)
    targets = torch.randint(vocabulary, (positions,))

    def peak(loss: Loss) -> int:
        hidden.grad = None
        tracker = Tracker(cuda=False)
        tracker.label([hidden, weight, targets], "weights")
        with tracker.phase("loss"), precision.emulating(bf16=native):
            loss(hidden, weight, None, targets, None).backward()
        found = tracker.peaks()["loss"]
        return found.peak_bytes - found.bytes["weights"]

    logits = 4 * positions * vocabulary
    assert peak(plain) > 2 * logits
    kept = 2 * positions * width * 4  # the gradient of hidden, and its like
    assert peak(linear_cross_entropy) < 4 * cross_entropy.CHUNK_BYTES + kept < logits / 6
