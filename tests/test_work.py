"""FLOPs and bytes of operators, against counts by hand and PyTorch's own counter."""

from __future__ import annotations

from typing import Any

import pytest
import tiny
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from edgepeft.precision import pack
from edgepeft.roofline import Work
from edgepeft.trace import fake_device
from edgepeft.work import Tally


class Counting(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.tally = Tally()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.tally.add(func, args, kwargs or {}, result)
        return result


def counted(run: Any) -> dict[str, Work]:
    with Counting() as mode:
        run()
    return mode.tally.work()


def test_a_product_computes_and_moves_what_it_must() -> None:
    a, b = torch.ones(128, 256), torch.ones(256, 512)
    assert counted(lambda: a @ b) == {
        "matmul.fp32": Work(1, 2 * 128 * 256 * 512, 4 * (128 * 256 + 256 * 512 + 128 * 512))
    }
    thin = counted(lambda: a.bfloat16() @ torch.ones(256, 8, dtype=torch.bfloat16))
    assert thin["thin.bf16"] == Work(1, 2 * 128 * 256 * 8, 2 * (128 * 256 + 256 * 8 + 128 * 8))


def test_heads_are_thin_when_they_are_narrower_than_ranks_that_are() -> None:
    for width, kind in ((16, "thin.fp32"), (32, "matmul.fp32"), (64, "matmul.fp32")):
        heads = torch.ones(12, 128, width)
        assert counted(lambda heads=heads: heads @ heads.mT).keys() - {"view"} == {kind}
    left, right = torch.ones(128, 256), torch.ones(256, 32)
    assert counted(lambda: left @ right).keys() == {"thin.fp32"}


def test_elementwise_operators_read_and_write_once() -> None:
    x = torch.ones(1000)
    assert counted(lambda: x + x) == {"elementwise": Work(1, 0, 3 * 4000)}  # nobody looks whether the two are one
    assert counted(lambda: x.mul_(2.0)) == {"elementwise": Work(1, 0, 2 * 4000)}
    assert counted(lambda: x.view(10, 100).t()) == {"view": Work(2, 0, 0)}
    wide = torch.ones(1).expand(1000)
    assert counted(lambda: x + wide) == {"elementwise": Work(1, 0, 2 * 4000 + 4)}


def test_a_lookup_reads_the_rows_it_was_asked_for() -> None:
    table, ids = torch.ones(5000, 64), torch.zeros(10, dtype=torch.long)
    assert counted(lambda: F.embedding(ids, table)) == {"elementwise": Work(1, 0, 2 * 10 * 64 * 4)}


def test_an_update_reads_four_tensors_and_writes_three() -> None:
    parameter = nn.Parameter(torch.ones(4096))
    parameter.grad = torch.ones(4096)
    adam = torch.optim.AdamW([parameter], fused=True)
    adam.step()
    found = counted(adam.step)["optimizer"]
    assert found.bytes == pytest.approx(7 * 4 * 4096, rel=0.01)  # and a step counter


def test_lists_of_tensors_take_as_many_launches_as_cuda_makes() -> None:
    small = [torch.ones(10) for _ in range(111)]
    assert counted(lambda: torch._foreach_mul_(small, 2.0))["optimizer"].calls == 2
    with fake_device(cuda=True):
        large = [torch.ones(320 * 65536 + 1)]
        assert counted(lambda: torch._foreach_mul_(large, 2.0))["optimizer"].calls == 2


def test_unpacking_is_a_class_of_its_own() -> None:
    stored = pack(nn.Linear(64, 128, bias=False), "nf4")
    found = counted(lambda: stored.dequantize(torch.float32))
    assert found["dequantize"].bytes >= 64 * 128 * 4 + 64 * 128 // 2


@pytest.mark.parametrize("family", ["llama", "t5", "bert"])
def test_a_step_has_the_flops_that_pytorch_counts(family: str) -> None:
    model, batch = tiny.load(family).model, tiny.batch(family)
    model.set_attn_implementation("eager")  # PyTorch's counter leaves out the CPU's attention
    model.train()
    model.requires_grad_(True)
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "decoder_input_ids") if name in batch}

    def step() -> None:
        model(**inputs).logits.sum().backward()

    counter = FlopCounterMode(display=False)
    with counter:
        step()
    found = counted(step)
    assert sum(work.flops for work in found.values()) == counter.get_total_flops() > 0


@pytest.mark.parametrize(("width", "counted_as"), [(8, 32), (16, 32), (32, 32), (40, 40)])
def test_attention_on_a_cpu_is_counted_as_on_a_gpu_and_narrow_heads_as_wider_ones(width: int, counted_as: int) -> None:
    query, key, value = (torch.ones(2, 4, 64, width, requires_grad=True) for _ in range(3))

    def step() -> None:
        F.scaled_dot_product_attention(query, key, value).sum().backward()

    found = counted(step)["attention.fp32"]
    forward = 4 * 2 * 4 * 64 * 64 * counted_as
    assert found.flops == forward + 2.5 * forward  # two products forward; four of them and one again backward


def test_a_traced_step_counts_what_a_real_one_does() -> None:
    def work(device: Any) -> dict[str, Work]:
        model = nn.Sequential(nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 64))
        x = torch.ones(100, 64)
        return counted(lambda: model(x).sum().backward())

    with fake_device(cuda=False):
        fake = work(None)
    assert fake == work(None)
