"""AdamW in 8 bits: the numbers of bitsandbytes and of AdamW, a quarter of the memory of its states, every method."""

from __future__ import annotations

from typing import Any

import conformance
import pytest
import tiny
import torch
from test_work import counted
from torch import nn

from edgepeft import cuda_semantics, roofline
from edgepeft.errors import UsageError
from edgepeft.hardware import load
from edgepeft.methods import base
from edgepeft.placements import eight_bit
from edgepeft.surface import EIGHT_BIT
from edgepeft.trace import fake_device

SHAPES = ((300, 257), (64,), (63, 65), (4096,), (128, 512))
OWN = {"galore"}  # methods with an optimizer of their own


def pairs(dtype: torch.dtype = torch.float32) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """The same parameters twice, of small shapes and large ones, and of sizes that are no multiple of a block."""
    torch.manual_seed(0)
    ours = [nn.Parameter(torch.randn(shape).to(dtype)) for shape in SHAPES]
    return ours, [nn.Parameter(parameter.detach().float()) for parameter in ours]


def step(ours: torch.optim.Optimizer, theirs: torch.optim.Optimizer, seed: int) -> None:
    """An update of both with the same gradients, which differ in size from row to row."""
    torch.manual_seed(seed)
    groups = zip(ours.param_groups, theirs.param_groups, strict=True)
    for one, other in ((a, b) for group, same in groups for a, b in zip(group["params"], same["params"], strict=True)):
        other.grad = torch.randn_like(other) * torch.logspace(-3, 0, len(other)).view(-1, *[1] * (other.dim() - 1))
        one.grad = other.grad.to(one.dtype)
    ours.step()
    theirs.step()


def test_on_fp32_it_is_bitsandbytes_to_the_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    """However much it works on at a time."""
    import bitsandbytes

    monkeypatch.setattr(eight_bit, "CHUNK", 2**14)
    (*decayed, other), (*same, its) = pairs()
    groups: list[dict[str, Any]] = [{"params": decayed, "weight_decay": 0.1}, {"params": [other]}]
    alike: list[dict[str, Any]] = [{"params": same, "weight_decay": 0.1}, {"params": [its]}]
    ours = eight_bit.AdamW(groups, lr=1e-2)
    theirs = bitsandbytes.optim.AdamW8bit(alike, lr=1e-2, weight_decay=0.0)
    for seed in range(4):
        step(ours, theirs, seed)
    for one, it in zip([*decayed, other], [*same, its], strict=True):
        assert torch.equal(one, it)
        for name, value in ours.state[one].items():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(theirs.state[it][name])), name


def test_states_are_those_of_adamw_within_half_a_step_of_the_codes() -> None:
    ours, theirs = pairs()
    lighter, full = eight_bit.AdamW([{"params": ours}], lr=1e-3), torch.optim.AdamW(theirs, lr=1e-3, weight_decay=0.0)
    step(lighter, full, 0)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-7)  # states of zeros have no error yet
        state = lighter.state[one]
        if one.numel() < eight_bit.SMALLEST:
            torch.testing.assert_close(state["state1"], full.state[other]["exp_avg"])
            continue
        for number, name in ((1, "exp_avg"), (2, "exp_avg_sq")):
            code = torch.tensor(eight_bit.codes()[number - 1])
            scales = state[f"absmax{number}"].repeat_interleave(eight_bit.BLOCK)[: one.numel()]
            found = code[state[f"state{number}"].flatten().long()] * scales
            error = (found - full.state[other][name].flatten()).abs()
            half = 1.01 * code.diff().max() / 2  # the kernel compares in fp32, and so errs a little between two codes
            assert (error <= half * scales).all() and error.max() > 0, name
    before = [parameter.detach().clone() for parameter in theirs]
    step(lighter, full, 1)
    for one, other, was in zip(ours, theirs, before, strict=True):
        assert (one - other).norm() < 0.1 * (other - was).norm()


def test_small_updates_of_bf16_weights_are_right_on_average() -> None:
    """At a rate of 1/1000 of half a step of bf16, to the nearest nothing would move."""
    parameter = nn.Parameter(torch.ones(256, 512, dtype=torch.bfloat16))
    optimizer = eight_bit.AdamW([{"params": [parameter]}], lr=1e-5)
    for _ in range(20):
        parameter.grad = torch.ones_like(parameter)
        optimizer.step()
    assert (1 - parameter.float().mean()).item() == pytest.approx(20e-5, rel=0.05)
    assert {value.dtype for value in optimizer.state[parameter].values() if isinstance(value, torch.Tensor)} == {
        torch.uint8,
        torch.float32,
    }


@pytest.mark.parametrize(("cuda", "dtype"), [(True, torch.float32), (True, torch.bfloat16), (False, torch.float32)])
def test_states_take_two_bytes_a_number_and_temporaries_are_bounded(
    cuda: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(eight_bit, "CHUNK", 2**16)
    count = 2048 * 1024
    with fake_device(cuda=cuda) as tracker:
        parameter = nn.Parameter(torch.empty(2048, 1024, dtype=dtype))
        optimizer = eight_bit.AdamW([{"params": [parameter]}], lr=1e-3)
        parameter.grad = torch.empty_like(parameter)
        tracker.label([parameter, parameter.grad], "weights")
        with tracker.phase("first"):
            optimizer.step()
            tracker.label_optimizer(optimizer)
        with tracker.phase("update"):
            optimizer.step()
        found = tracker.peaks()["update"].bytes
    assert found["optimizer"] == 2 * (count + 4 * count // eight_bit.BLOCK)
    if cuda and dtype is torch.float32:
        assert found["temporaries"] == 0, "CUDA's kernel works in place"
    else:
        assert 0 < found["temporaries"] <= 20 * 2**16


@pytest.mark.parametrize("count", [eight_bit.SMALLEST - 1, 2**18 + 3])
def test_what_a_kernel_takes_on_a_cpu_is_counted(count: int) -> None:
    """By PyTorch's profiler, which sees every allocation."""
    parameter = nn.Parameter(torch.randn(count))
    optimizer = eight_bit.AdamW([{"params": [parameter]}], lr=1e-3)
    parameter.grad = torch.randn(count)
    optimizer.step()
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        optimizer.step()
    now = highest = 0
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        highest = max(highest, now)
    small = count < eight_bit.SMALLEST
    packet = torch.ops.bitsandbytes.optimizer_update_32bit if small else _update()
    counted = cuda_semantics.workspace_bytes(packet.default, ("adam", None, parameter), cuda=False)
    assert sum(counted) == pytest.approx(highest, rel=0.01)
    assert cuda_semantics.workspace_bytes(packet.default, ("adam", None, parameter), cuda=True) == ()


def _update() -> Any:
    return torch.ops.bitsandbytes.optimizer_update_8bit_blockwise


def test_every_method_is_trained_with_it_or_says_that_it_has_its_own() -> None:
    for name in base.names():
        for made, method, stage in conformance.stages(conformance.home(name), name):
            if name in OWN:
                with pytest.raises(UsageError, match="adamw-8bit"):
                    method.check_optimizer(EIGHT_BIT)
                with pytest.raises(UsageError, match="adamw-8bit"):
                    stage.made(made.model, 1e-3, 0.0, EIGHT_BIT)
            else:
                method.check_optimizer(EIGHT_BIT)
                plain, lighter = (stage.made(made.model, 1e-3, 0.1, kind) for kind in ("adamw", EIGHT_BIT))
                assert isinstance(lighter, eight_bit.AdamW) or stage.updates is not None
                for own, given in zip(lighter.param_groups, plain.param_groups, strict=True):
                    kept = given.keys() - (plain.defaults.keys() - {"weight_decay"})
                    assert {key: own.get(key) for key in kept} == {key: given[key] for key in kept}


def test_an_unknown_optimizer_and_a_device_without_a_kernel_are_refused() -> None:
    with pytest.raises(UsageError, match="no optimizer 'sgd'"):
        tiny.method("lora").check_optimizer("sgd")
    eight_bit.check("cpu")
    with pytest.raises(UsageError, match="cannot run on this machine"):
        eight_bit.check("mps")


def test_its_time_is_a_class_of_its_own() -> None:
    parameter = nn.Parameter(torch.ones(64, 64))
    parameter.grad = torch.ones(64, 64)
    optimizer = eight_bit.AdamW([{"params": [parameter]}], lr=1e-3)
    found = counted(optimizer.step)["requantize"]
    assert found.bytes == pytest.approx(4096 * (3 * 4 + 4 * 1), rel=0.3)  # and tables, and scales
    cpu = load("cpu-x86-16gb")
    assert roofline.seconds({"requantize": found}, cpu) > 10 * roofline.seconds({"optimizer": found}, cpu)
