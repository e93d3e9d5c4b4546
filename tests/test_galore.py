"""GaLore: the paper's update by hand in float64, and no gradient that outlives its layer's update."""

from __future__ import annotations

import math

import pytest
import tiny
import torch
from torch import Tensor, nn

from edgepeft import step
from edgepeft.methods.galore import GaLoreAdamW, project, range_basis, unproject
from edgepeft.trace import Tracker

RANK, PERIOD, SCALE, LR, DECAY = 3, 2, 0.25, 1e-2, 0.1
SHAPES = [(6, 10), (10, 6), (7, 7)]


def optimizer(parameters: list[nn.Parameter], *, rank: int = RANK, decay: float = DECAY) -> GaLoreAdamW:
    for parameter in parameters:
        if parameter.dim() == 2:
            parameter.galore = True  # type: ignore[attr-defined]
    return GaLoreAdamW(parameters, lr=LR, weight_decay=decay, rank=rank, period=PERIOD, scale=SCALE)


def feed(parameter: nn.Parameter, gradient: Tensor) -> None:
    """Run a backward pass that gives the parameter this gradient."""
    (parameter * gradient).sum().backward()


@pytest.mark.parametrize("shape", SHAPES)
def test_the_update_of_the_paper(shape: tuple[int, int]) -> None:
    """Algorithm 2 of arXiv 2403.03507, in float64, with the basis that the optimizer chose."""
    torch.manual_seed(0)
    parameter = nn.Parameter(torch.randn(shape))
    galore = optimizer([parameter])
    expected = parameter.detach().double()
    first, second = 0.0, 0.0
    for update in range(1, 2 * PERIOD + 2):
        gradient = torch.randn(shape)
        feed(parameter, gradient)
        basis = galore.state[parameter]["basis"].double()
        left = shape[0] <= shape[1]
        low = basis.T @ gradient.double() if left else gradient.double() @ basis
        first = 0.9 * first + 0.1 * low
        second = 0.999 * second + 0.001 * low**2
        normalised = (first / (1 - 0.9**update)) / ((second / (1 - 0.999**update)).sqrt() + 1e-8)
        change = SCALE * (basis @ normalised if left else normalised @ basis.T)
        expected = expected * (1 - LR * DECAY) - LR * change
        torch.testing.assert_close(parameter.double(), expected, rtol=1e-4, atol=1e-5)
        assert tuple(galore.state[parameter]["exp_avg"].shape) == ((RANK, shape[1]) if left else (shape[0], RANK))


@pytest.mark.parametrize("shape", [*SHAPES, (5,)])
def test_a_layer_no_larger_than_the_rank_has_plain_adamw(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    parameter = nn.Parameter(torch.randn(shape))
    copy = nn.Parameter(parameter.detach().clone())
    optimizer([parameter], rank=max(shape))
    adamw = torch.optim.AdamW([copy], lr=LR, weight_decay=DECAY if len(shape) > 1 else 0.0)
    for _ in range(5):
        gradient = torch.randn(shape)
        feed(parameter, gradient)
        feed(copy, gradient)
        adamw.step()
        adamw.zero_grad()
        torch.testing.assert_close(parameter, copy)


@pytest.mark.parametrize("shape", SHAPES)
def test_in_a_fixed_subspace_it_is_adam_of_the_coordinates(shape: tuple[int, int]) -> None:
    """Gradients of low rank, whose span the basis finds exactly: nothing is lost but the scale."""
    torch.manual_seed(0)
    span = torch.linalg.qr(torch.randn(min(shape), RANK))[0]
    parameter = nn.Parameter(torch.zeros(shape))
    galore = optimizer([parameter], decay=0.0)
    for _ in range(2 * PERIOD):
        coordinates = torch.randn(RANK, max(shape))
        gradient = span @ coordinates if shape[0] <= shape[1] else (span @ coordinates).T
        feed(parameter, gradient)
        basis = galore.state[parameter]["basis"]
        torch.testing.assert_close(basis @ basis.T, span @ span.T, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(unproject(project(gradient, basis), basis), gradient, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shape", [(20, 50), (50, 20), (30, 30)])
def test_the_basis_is_orthonormal_and_as_good_as_singular_vectors(shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    gradient = torch.randn(shape) @ torch.diag(0.8 ** torch.arange(shape[1]))
    basis = range_basis(gradient, 6)
    assert tuple(basis.shape) == (min(shape), 6)
    torch.testing.assert_close(basis.T @ basis, torch.eye(6), rtol=0, atol=1e-5)
    best = torch.linalg.svdvals(gradient)[:6].square().sum()
    assert project(gradient, basis).square().sum() > 0.99 * best


def test_the_subspace_is_chosen_anew_every_period() -> None:
    torch.manual_seed(0)
    parameter = nn.Parameter(torch.randn(8, 8))
    galore, bases = optimizer([parameter]), []
    for _ in range(3 * PERIOD):
        feed(parameter, torch.randn(8, 8))
        bases.append(galore.state[parameter]["basis"].clone())
    changed = [not torch.equal(a, b) for a, b in zip(bases, bases[1:], strict=False)]
    assert changed == [(index + 1) % PERIOD == 0 for index in range(len(changed))]


@pytest.mark.parametrize("family", ["gpt2", "t5", "llama"])
def test_at_full_rank_a_model_trains_as_with_adamw(family: str) -> None:
    """Tied embeddings too: their two gradients are added before the one update."""
    made, _ = tiny.adapted(family, "galore")
    parameters = list(made.model.parameters())
    whole = GaLoreAdamW(parameters, lr=1e-3, weight_decay=0.0, rank=10**6, period=200, scale=0.25)
    galore = step.TrainingStep(made.model, whole, clip_norm=None)
    full, other = tiny.adapted(family, "full")
    adamw = step.TrainingStep(full.model, other.optimizer(full.model, 1e-3, 0.0), clip_norm=None)
    for seed in range(3):
        for trainer in (galore, adamw):
            trainer.backward([tiny.batch(family, seed=seed)], 1e-3)
            trainer.update()
    for (name, ours), theirs in zip(made.model.named_parameters(), full.model.parameters(), strict=True):
        second = adamw.optimizer.state[theirs]["exp_avg_sq"]
        heard = second > 1e-12  # a gradient of nearly zero, as of GPT-2's key biases, is noise with a sign
        assert heard.any() and torch.allclose(ours[heard], theirs[heard], rtol=0, atol=1e-5), name


def test_only_matrices_of_the_blocks_are_projected() -> None:
    made, method = tiny.adapted("llama", "galore")
    trainer = step.TrainingStep(made.model, method.optimizer(made.model, 1e-3, 0.0), clip_norm=None)
    trainer.backward([tiny.batch("llama")], 1e-3)
    projected = {name for name, p in made.model.named_parameters() if "basis" in trainer.optimizer.state[p]}
    roles = ("query", "key", "value", "output", "ffn_in", "ffn_out")
    assert projected == {f"{name}.weight" for name in made.anatomy.linears(roles)}


@pytest.mark.parametrize("at", ["fp32", "bf16"])
def test_no_gradient_is_left_and_only_one_is_ever_alive(at: str) -> None:
    made, method = tiny.adapted("llama", "galore", at)
    parameters = list(made.model.parameters())
    sizes = [parameter.numel() * parameter.element_size() for parameter in parameters]
    alive = []

    def measure(parameter: Tensor) -> None:
        alive.append(sum(size for p, size in zip(parameters, sizes, strict=True) if p.grad is not None))

    for parameter in parameters:  # before the optimizer's own hooks
        parameter.register_post_accumulate_grad_hook(measure)
    rate = 2e-2  # so that in bf16 some of every tensor moves in one update
    trainer = step.TrainingStep(made.model, method.optimizer(made.model, rate, 0.0), clip_norm=None)
    before = [parameter.detach().clone() for parameter in parameters]
    trainer.backward([tiny.batch("llama")], rate)
    assert len(alive) == len(parameters) and max(alive) == max(sizes)
    assert all(parameter.grad is None for parameter in parameters)
    assert trainer.update() is None
    assert not any(torch.equal(a, b) for a, b in zip(before, parameters, strict=True))
    states = (value for state in trainer.optimizer.state.values() for value in state.values())
    assert {state.dtype for state in states if isinstance(state, Tensor)} == {torch.float32}


def test_peak_memory_is_below_that_of_full_tuning_by_most_of_the_gradients() -> None:
    def peak(name: str) -> tuple[int, int]:
        made, method = tiny.adapted("llama", name)
        trainer = step.TrainingStep(made.model, method.optimizer(made.model, 1e-3, 0.0), clip_norm=None)
        trainer.backward([tiny.batch("llama", rows=1)], 1e-3)
        trainer.update()
        tracker = Tracker(cuda=False)
        tracker.label_model(made.model, adapter=[])
        tracker.label_optimizer(trainer.optimizer)
        with tracker.phase("step"):
            trainer.backward([tiny.batch("llama", rows=1)], 1e-3)
            trainer.update()
        found = tracker.peaks()["step"]
        return found.peak_bytes - found.bytes["optimizer"], found.bytes["weights"]

    (galore, weights), (full, _) = peak("galore"), peak("full")
    assert full - weights > weights, "full tuning holds one set of gradients"
    assert galore < full - 0.5 * weights


def test_steps_are_counted_for_each_parameter() -> None:
    """A parameter that gets its first gradient late starts its own bias correction: its first change is the rate."""
    early, late = nn.Parameter(torch.zeros(4, 4)), nn.Parameter(torch.zeros(4, 4))
    optimizer([early, late], rank=4, decay=0.0)
    for _ in range(3):
        feed(early, torch.ones(4, 4))
    feed(late, torch.ones(4, 4))
    torch.testing.assert_close(late, torch.full((4, 4), -LR), rtol=1e-5, atol=0)
    assert math.isclose(early[0, 0].item(), -3 * LR, rel_tol=1e-4)
