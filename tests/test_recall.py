"""What is recalled is what PyTorch's fake tensors would have answered."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F

from edgepeft import recall, work
from edgepeft.recall import RecallingMode
from edgepeft.trace import fake_device


def attention(x: Tensor) -> Any:
    return F.layer_norm(x @ x.transpose(-1, -2), (x.shape[-2],)).softmax(-1)


CASES: dict[str, Callable[[Tensor], Any]] = {
    "a chain": attention,
    "views at an offset": lambda x: [part[1:].t() for part in x[0].split(2)],
    "a view of a view": lambda x: x[:, 1:][:, 1:].flatten(1)[:, 3:],
    "an expanded row": lambda x: x[:1].expand(3, -1, -1) + 1,
    "in place": lambda x: x.mul_(2).add_(x),
    "another dtype": lambda x: x[0].view(torch.int32),
    "memory addressed as a whole": lambda x: x[1].as_strided((2, 2), (1, 2), 5),
    "several results": lambda x: x.max(-1),
    "on lists": lambda x: torch._foreach_add([x, x[0]], 1.0),
    "an integer and a number": lambda x: (x.long() + 1, x.long() + 1.0, x.long() + True),
}


def described(mode: FakeTensorMode, what: Callable[[Tensor], Any]) -> list[tuple[Any, ...]]:
    with mode:
        x = torch.empty(4, 6, 8)
        found = what(x)
        memory = {x.untyped_storage()._cdata: "x"}
        return [
            (*each.shape, each.stride(), each.storage_offset(), each.dtype, each.device, each.is_leaf)
            + (memory.get(each.untyped_storage()._cdata), each.untyped_storage().nbytes())
            for each in (found if isinstance(found, (list, tuple)) else [found])
        ]


@pytest.mark.parametrize("name", CASES)
def test_recalled_tensors_are_those_of_pytorch(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recall, "_known", {})
    expected = described(FakeTensorMode(), CASES[name])
    assert described(RecallingMode(), CASES[name]) == expected
    assert recall._known
    assert described(RecallingMode(), CASES[name]) == expected


def test_what_is_remembered_has_a_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    for module, name, empty in ((recall, "_known", dict), (recall, "_never", set), (work, "_calls", dict)):
        monkeypatch.setattr(module, name, empty())
        monkeypatch.setattr(module, "LARGEST", 8)
    seen = []
    with fake_device(cuda=False) as tracker, tracker.phase("step"):
        for size in range(2, 30):
            x = torch.empty(size, size)
            (x @ x).unsqueeze_(0)  # changes its input's shape, and is never recalled
            seen.append((len(recall._known) + len(recall._never), len(recall._never), len(work._calls)))
    assert max(both for both, _, _ in seen) <= 8 and max(calls for _, _, calls in seen) <= 8
    assert max(never for _, never, _ in seen) > 0


def test_a_part_elsewhere_in_memory_is_recalled_where_it_lies() -> None:
    with RecallingMode():
        x = torch.empty(4, 6)
        assert [x[row].view(2, 3).storage_offset() for row in range(4)] == [0, 6, 12, 18]


def test_offsets_that_count_from_where_memory_begins_are_those_of_each_part() -> None:
    with RecallingMode():
        x = torch.empty(4, 6)
        for _ in range(2):  # learned, and then recalled
            assert [x[row].view(torch.int16).storage_offset() for row in range(4)] == [0, 12, 24, 36]
            assert [x[row].as_strided((2,), (1,), 3).storage_offset() for row in range(4)] == [3, 3, 3, 3]


def test_what_depends_on_values_is_not_recalled() -> None:
    with RecallingMode(), pytest.raises(Exception, match="data|nonzero|dynamic"):
        for _ in range(2):
            torch.ones(3).nonzero()
