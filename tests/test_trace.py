"""Bytes are counted as they are held: by hand on small cases, and fake tensors like real ones on whole training steps."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable, Iterator

import pytest
import tiny
import torch
from torch import Tensor, nn

from edgepeft import backbone, precision
from edgepeft.methods import base
from edgepeft.step import TrainingStep
from edgepeft.trace import KINDS, Peak, Tracker, fake_device

KB = 1024


def tensor(count: int = KB) -> Tensor:
    """A tensor of ``count`` bytes."""
    return torch.empty(count, dtype=torch.uint8)


def peak(what: Callable[[], object], *, cuda: bool = False) -> int:
    tracker = Tracker(cuda=cuda)
    with tracker.phase("only"):
        what()
    return tracker.peaks()["only"].peak_bytes


def test_what_is_freed_makes_room() -> None:
    def one_after_the_other() -> None:
        a = tensor(3 * KB)
        del a
        b, c = tensor(KB), tensor(KB)
        del b, c

    assert peak(one_after_the_other) == 3 * KB


def test_what_is_held_together_adds_up() -> None:
    def together() -> list[Tensor]:
        return [tensor(KB), tensor(2 * KB), tensor(3 * KB)]

    assert peak(together) == 6 * KB


def test_views_and_updates_in_place_cost_nothing() -> None:
    def views() -> Tensor:
        a = tensor(4 * KB)
        a.fill_(1).add_(1)
        return a.view(2, -1).t()[1:].unsqueeze(0)

    assert peak(views) == 4 * KB


def test_a_view_keeps_its_whole_storage() -> None:
    def small_view() -> int:
        held = tensor(4 * KB)[:1]
        other = tensor(KB)
        return held.numel() + other.numel()

    assert peak(small_view) == 5 * KB


@pytest.mark.parametrize(("count", "expected"), [(1, 512), (512, 512), (513, 1024), (1, 512)])
def test_a_cuda_device_hands_out_blocks(count: int, expected: int) -> None:
    assert peak(lambda: tensor(count), cuda=True) == expected
    assert peak(lambda: tensor(count)) == count


def test_temporaries_inside_an_expression_count() -> None:
    x = torch.ones(KB // 4)
    assert peak(lambda: (x + 1) * 2) == 2 * KB


def test_a_phase_starts_with_what_was_held_before() -> None:
    tracker = Tracker(cuda=False)
    held = tensor(4 * KB)
    tracker.label([held], "weights")
    with tracker.phase("first"):
        extra = tensor(KB)
    with tracker.phase("second"):
        del extra
        tensor(2 * KB)
    peaks = tracker.peaks()
    assert peaks["first"] == Peak(5 * KB, {**dict.fromkeys(KINDS, 0), "weights": 4 * KB, "temporaries": KB})
    assert peaks["second"].peak_bytes == 6 * KB


def test_what_dies_between_phases_is_gone() -> None:
    tracker = Tracker(cuda=False)
    with tracker.phase("first"):
        held = tensor(4 * KB)
    del held
    with tracker.phase("second"):
        tensor(KB)
    assert tracker.peaks()["second"].peak_bytes == KB


def test_a_phase_of_the_same_name_replaces_the_first() -> None:
    tracker = Tracker(cuda=False)
    for count in (4 * KB, KB):
        with tracker.phase("step"):
            tensor(count)
    assert tracker.peaks()["step"].peak_bytes == KB


def test_kinds_of_a_training_step() -> None:
    """A network small enough to count: w1 (64, 64) frozen, w2 (64, 64) trained, 32 inputs, Adam."""
    matrix, activation = 64 * 64 * 4, 32 * 64 * 4
    first, second = nn.Linear(64, 64, bias=False), nn.Linear(64, 64, bias=False)
    first.requires_grad_(False)
    model = nn.Sequential(first, nn.Tanh(), second, nn.Tanh())
    optimizer = torch.optim.Adam([second.weight], foreach=False, fused=True)
    x = torch.randn(32, 64)
    tracker = Tracker(cuda=False)
    tracker.label_model(model, adapter=[second.weight])
    tracker.label([x], "weights")

    def step() -> None:
        with tracker.phase("forward+backward"):
            model(x).sum().backward()
        with tracker.phase("update"):
            optimizer.step()
            optimizer.zero_grad()

    step()
    tracker.label_optimizer(optimizer)
    step()
    peaks = tracker.peaks()
    # kept for backward: the outputs of both Tanh; alive at the peak besides: gradients of an activation on the way, and w2's
    backward = peaks["forward+backward"].bytes
    assert backward["weights"] == matrix + activation
    assert backward["adapter"] == matrix
    assert backward["optimizer"] == 2 * matrix + 4
    assert backward["activations"] >= 2 * activation
    update = peaks["update"].bytes
    assert update["gradients"] == matrix and update["adapter"] == matrix and update["optimizer"] == 2 * matrix + 4
    assert update["activations"] == 0 and update["temporaries"] == 0


def test_backward_is_left_as_it_was() -> None:
    backward = Tensor.backward
    with contextlib.suppress(ZeroDivisionError), Tracker(cuda=False).phase("fails"):
        raise ZeroDivisionError
    assert Tensor.backward is backward


@contextlib.contextmanager
def real_device() -> Iterator[Tracker]:
    yield Tracker(cuda=False)


def traced(device: contextlib.AbstractContextManager[Tracker], family: str, name: str, at: str, again: bool) -> dict[str, Peak]:
    """Two updates of a tiny model; the peaks of the second."""
    batches = [tiny.batch(family, rows=3, lengths=(9, 9)), tiny.batch(family, rows=3, lengths=(9, 9))]
    if tiny.task(family) == "seq2seq":
        sizes = {name: tuple(value.shape) for name, value in batches[0].items()}
    with device as tracker:
        made = backbone.skeleton(tiny.configuration(family), task=tiny.task(family), at=at, labels=3)
        own = {id(parameter) for parameter in made.model.parameters()}
        method = tiny.method(name)
        base.apply(method, made)
        made.model.train()
        if again:
            made.model.activation_checkpointing_enable()
        clip = None if method.updates_in_backward else 1.0
        optimizer = method.optimizer(made.model, 1e-3, 0.0)
        step = TrainingStep(made.model, optimizer, clip_norm=clip)
        tracker.label_model(made.model, [p for p in made.model.parameters() if p.requires_grad and id(p) not in own])
        for batch in batches:
            given = {name: torch.ones(tuple(value.shape), dtype=value.dtype) for name, value in batch.items()}
            gc.collect()
            with tracker.phase("forward+backward"):
                step.backward([given], 1e-3)
            with tracker.phase("update"):
                step.update()
            tracker.label_optimizer(optimizer)
        return tracker.peaks()


CASES = [
    *((family, name, "fp32", False) for family in ("llama", "bert", "t5", "gpt2") for name in base.names()),
    *(("llama", name, at, False) for name in ("lora", "lst", "ln_tuning") for at in ("bf16", "nf4", "int8")),
    ("llama", "lora", "nf4", True),
    ("t5", "lora", "fp32", True),
    ("llama", "full", "bf16", True),
    ("gemma2", "lora", "fp32", False),
]


@pytest.mark.parametrize(("family", "name", "at", "again"), CASES)
def test_fake_tensors_take_the_bytes_of_real_ones(family: str, name: str, at: str, again: bool) -> None:
    with precision.emulating(bf16=True):
        fake = traced(fake_device(cuda=False), family, name, at, again)
        real = traced(real_device(), family, name, at, again)
    assert fake == real
    for found in fake.values():
        assert sum(found.bytes.values()) == found.peak_bytes and set(found.bytes) == set(KINDS)


@pytest.mark.parametrize("name", base.names())
@pytest.mark.parametrize("family", ["llama", "bert", "t5", "gpt2"])
def test_every_method_can_be_planned_for_a_gpu(family: str, name: str) -> None:
    for again in (False, True):
        with precision.emulating(bf16=True):
            found = traced(fake_device(cuda=True), family, name, "bf16", again)
        backward = found["forward+backward"]
        assert sum(backward.bytes.values()) == backward.peak_bytes and backward.peak_bytes % 512 == 0
        weights = sum(p.numel() * 2 for p in tiny.load(family, "bf16").model.parameters())
        assert backward.bytes["weights"] >= weights


def test_no_tensor_is_touched_by_a_fake_device() -> None:
    """A model of four terabytes."""
    with fake_device(cuda=True) as tracker:
        large = nn.Linear(2**20, 2**20, bias=False)
        with tracker.phase("forward"), torch.no_grad():
            large(torch.ones(1, 2**20))
    assert tracker.peaks()["forward"].peak_bytes >= 2**42
