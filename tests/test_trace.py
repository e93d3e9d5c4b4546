"""Bytes are counted as they are held: by hand on small cases, fake tensors like real ones on whole training steps."""

from __future__ import annotations

import contextlib
import gc
import subprocess
import sys
import weakref
from collections.abc import Callable, Iterator
from unittest import mock

import conformance
import pytest
import tiny
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from edgepeft import backbone, precision, watch
from edgepeft.methods import base
from edgepeft.step import TrainingStep, recompute_activations
from edgepeft.surface import KINDS
from edgepeft.trace import Peak, Tracker, fake_device

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


def test_weights_do_not_keep_the_trackers_that_followed_them() -> None:
    """A run watches some phases, each with a tracker of its own, and its weights live until it ends."""
    model, phases = nn.Linear(8, 8), dict[str, int]()
    trackers: list[weakref.ref[Tracker]] = []

    def made(*, cuda: bool) -> Tracker:
        tracker = Tracker(cuda=cuda)
        trackers.append(weakref.ref(tracker))
        return tracker

    with mock.patch.object(watch, "Tracker", made):
        for name in ("forward+backward", "evaluation"):
            with watch.peak(phases, name, model):
                model(torch.ones(4, 8))
    assert len(trackers) == 2 and not any(tracker() for tracker in trackers)
    assert phases["forward+backward"] == phases["evaluation"] > 9 * 8 * 4
    del model  # whom the dead are not told of


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
    # Highest when w2's gradient is there: beside it the input of w2, the gradient of its output, the loss and its own.
    backward = peaks["forward+backward"].bytes
    assert backward["weights"] == matrix + activation
    assert backward["adapter"] == matrix
    assert backward["optimizer"] == 2 * matrix + 4
    assert backward["gradients"] == matrix
    assert backward["activations"] == activation + 4
    assert backward["temporaries"] == activation + 4
    update = peaks["update"].bytes
    assert update["gradients"] == matrix and update["adapter"] == matrix and update["optimizer"] == 2 * matrix + 4
    assert update["activations"] == 0 and update["temporaries"] == 0


def test_gradients_of_several_uses_are_added_in_place_as_autograd_does_without_a_tracker() -> None:
    def births(uses: int) -> int:
        x = torch.zeros(KB, requires_grad=True)
        loss = torch.stack([(x * number).sum() for number in range(uses)]).sum()
        tracker = Tracker(cuda=False)
        with tracker.phase("backward"):
            loss.backward()
        return sum(event > 0 and tracker.storage(event)[0] == 4 * KB for event in tracker.phases["backward"].events)

    assert births(3) == 3, "a product each, and no sums"


def test_backward_is_left_as_it_was() -> None:
    backward = Tensor.backward
    with contextlib.suppress(ZeroDivisionError), Tracker(cuda=False).phase("fails"):
        raise ZeroDivisionError
    assert Tensor.backward is backward


@contextlib.contextmanager
def real_device() -> Iterator[Tracker]:
    yield Tracker(cuda=False)


def traced(
    device: contextlib.AbstractContextManager[Tracker], family: str, name: str, at: str, again: bool
) -> dict[str, Peak]:
    """The peaks of an update of a tiny model on a padded batch, with the optimizer's states in place."""
    batch, others = tiny.batch(family, rows=3, lengths=(5, 9)), tiny.others(family, name)
    with device as tracker:
        made = backbone.skeleton(tiny.configuration(family), task=tiny.task(family), at=at, labels=3)
        own = {name for name, _ in made.model.named_parameters()}
        method = tiny.method(name, **others)
        base.apply(method, made)
        made.model.train()
        if again:
            recompute_activations(made.model)
        clip = None if method.updates_in_backward else 1.0
        optimizer = method.optimizer(made.model, 1e-3, 0.0)
        step = TrainingStep(made.model, optimizer, clip_norm=clip, penalty=method.penalty)
        new = (p for name, p in made.model.named_parameters() if p.requires_grad and name not in own)
        tracker.label_model(made.model, new)
        torch.stack([p.float().sum() for p in step.trained]).sum().backward()  # for the optimizer's states
        step.update()
        tracker.label_optimizer(optimizer)
        given = {name: torch.zeros(value.shape, dtype=value.dtype) for name, value in batch.items()}
        if not isinstance(given["input_ids"], FakeTensor):
            for name, value in given.items():
                value.copy_(batch[name])
        gc.collect()
        with tracker.phase("forward+backward"):
            step.backward([given], 1e-3)
        with tracker.phase("update"):
            step.update()
        return tracker.peaks()


CASES = [
    *(("llama", name, "fp32", False) for name in base.names()),
    *(("llama", name, "nf4", False) for name in ("lora", "lst", "ln_tuning")),
    ("llama", "lora", "int8", False),
    ("llama", "ln_tuning", "bf16", False),
    ("llama", "lora", "nf4", True),
    ("gemma2", "lora", "fp32", False),
    ("gpt2", "galore", "fp32", False),
    ("bert", "lst", "bf16", False),
    ("t5", "lora", "fp32", True),
]


@pytest.mark.parametrize(("family", "name", "at", "again"), CASES)
def test_fake_tensors_take_the_bytes_of_real_ones(family: str, name: str, at: str, again: bool) -> None:
    conformance.needs(name, family)
    compare(family, name, at, again, bf16=True)


@pytest.mark.parametrize(("family", "name", "at"), [("llama", "lora", "nf4"), ("gpt2", "ln_tuning", "bf16")])
def test_also_where_bf16_is_multiplied_in_fp32(family: str, name: str, at: str) -> None:
    compare(family, name, at, again=False, bf16=False)


def compare(family: str, name: str, at: str, again: bool, *, bf16: bool) -> None:
    with precision.emulating(bf16=bf16):
        fake = traced(fake_device(cuda=False), family, name, at, again)
        real = traced(real_device(), family, name, at, again)
    assert fake == real
    for found in fake.values():
        assert sum(found.bytes.values()) == found.peak_bytes and set(found.bytes) == set(KINDS)


@pytest.mark.parametrize(
    ("family", "name", "again"),
    [
        *(("llama", name, False) for name in base.names()),
        ("llama", "lora", True),
        ("bert", "full", False),
        ("gpt2", "ln_tuning", False),
        ("t5", "lst", False),
        ("gemma2", "lora", True),
    ],
)
def test_every_method_can_be_planned_for_a_gpu(family: str, name: str, again: bool) -> None:
    conformance.needs(name, family)
    with precision.emulating(bf16=True):
        found = traced(fake_device(cuda=True), family, name, "bf16", again)
    backward = found["forward+backward"]
    assert sum(backward.bytes.values()) == backward.peak_bytes and backward.peak_bytes % 512 == 0
    weights = sum(parameter.numel() * 2 for parameter in tiny.load(family, "bf16").model.parameters())
    assert backward.bytes["weights"] + backward.bytes["adapter"] >= weights


def test_planning_leaves_nothing_fake_behind() -> None:
    """What a library makes when it is first imported is there for the rest of the process."""
    program = """
from edgepeft.trace import fake_device
with fake_device(cuda=False):
    from bitsandbytes.backends import utils
from torch._subclasses.fake_tensor import FakeTensor
assert not isinstance(utils._NF4_QUANT_TABLE, FakeTensor)
"""
    subprocess.run([sys.executable, "-c", program], check=True)


def test_no_tensor_is_touched_by_a_fake_device() -> None:
    """A model of four terabytes."""
    with fake_device(cuda=True) as tracker:
        large = nn.Linear(2**20, 2**20, bias=False)
        with tracker.phase("forward"), torch.no_grad():
            large(torch.ones(1, 2**20))
    assert tracker.peaks()["forward"].peak_bytes >= 2**42


def test_a_structure_without_weights_takes_no_memory() -> None:
    tracker = Tracker(cuda=False)
    with tracker.phase("save"):
        structure = torch.empty(1000, device="meta")
        real = torch.empty(1000)
    assert tracker.peaks()["save"].peak_bytes == real.nbytes == structure.nbytes
