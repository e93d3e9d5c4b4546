"""Processes that each hold a part of a model (FSDP2, over gloo) end in the adapter that one with all of it makes."""

from __future__ import annotations

import dataclasses
import functools
import signal
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import training
from conformance import FAMILIES, refusal
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.tensor import DTensor

from edgepeft import adapter, checkpoint, ledger, pipeline, schedule, shards
from edgepeft.errors import UsageError
from edgepeft.methods import base
from edgepeft.ranks import ALONE, Ranks, joined
from edgepeft.step import TrainingStep

SHARDABLE = [name for name in base.names() if base.find(name).shardable]
COUNT = 3  # divides few dimensions of the models: parts differ in size, and some are empty
SAME: dict[str, dict[str, Any]] = {
    "lora": {"task": "seq2seq"},  # fp32: in bf16 an encoder's gradients, of all layers of the decoder, round by order
    "lora-nf4": {"task": "causal-lm", "precision": "nf4"},
    "lora-uneven": {"task": "causal-lm", "microbatch": 3, "global_batch": 6},  # the last update has one microbatch
    "full-recomputed": {"task": "causal-lm", "method": "full", "checkpointing": True},
}


@pytest.mark.parametrize("name", SAME)
def test_two_parts_make_the_adapter_of_the_whole(name: str, tmp_path: Path) -> None:
    chosen = training.written(**{"epochs": 1.0, "evaluations": 2, "options": {}, **SAME[name]})
    training.run(chosen, tmp_path / "one")
    divided = dataclasses.replace(chosen, devices=2, strategy="fsdp")
    assert training.together(divided, tmp_path / "two") == [0, 0]
    one, two = (load_file(tmp_path / out / "adapter" / adapter.TENSORS) for out in ("one", "two"))
    # Adam divides a gradient by its size: one that is the rounding of a sum, which the ranks make in another order,
    # moves its one number as far as any. The step itself is compared number by number below, with plain updates.
    moved = sum(row["lr"] for row in training.log(tmp_path / "one", "step"))  # what Adam may have moved a number by
    assert two.keys() == one.keys()
    for key, value in one.items():
        assert float((two[key] - value).float().square().mean().sqrt()) <= 1e-3 * moved, key
    for kind in ("step", "evaluation"):
        for mine, theirs in zip(*(training.log(tmp_path / out, kind) for out in ("one", "two")), strict=True):
            for key in {"loss", "grad_norm", "lr", "tokens", "metrics"} & mine.keys():
                assert theirs[key] == pytest.approx(mine[key], rel=1e-4)
            assert theirs.get("answers") == mine.get("answers")


def test_a_killed_run_goes_on(tmp_path: Path) -> None:
    """With dropout, and in bf16 with updates that are rounded at random: each rank draws numbers of its own."""
    values = {"method": "full", "options": {}, "precision": "bf16", "max_steps": 4, "evaluations": 2}
    chosen = training.written("classification", devices=2, strategy="fsdp", **values)
    assert training.together(chosen, tmp_path / "whole") == [0, 0]
    codes = training.together(chosen, tmp_path / "killed", on_forward=functools.partial(training.die_at, 3))
    assert codes[0] == 1 and codes[1] == -signal.SIGKILL and not (tmp_path / "killed" / "adapter").exists()
    assert checkpoint.newest(tmp_path / "killed" / "checkpoints") is not None
    assert training.together(chosen, tmp_path / "killed") == [0, 0]
    assert training.result(tmp_path / "killed") == training.result(tmp_path / "whole")
    held = [load_file(tmp_path / f"rank-{rank}.safetensors") for rank in range(2)]
    assert all(torch.equal(held[0][name], held[1][name]) for name in held[0])


def test_every_method_that_says_so_has_the_same_gradients_and_updates(tmp_path: Path) -> None:
    """Three ranks of five microbatches, of which one runs one for nothing."""
    tasks = [(name, family) for name in SHARDABLE for family in FAMILIES if refusal(name, family) is None]
    assert len(tasks) > 30
    processes = [training.SERVER.Process(target=_rank, args=(rank, tmp_path, tasks)) for rank in range(COUNT)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(300)
    assert [process.exitcode for process in processes] == [0] * COUNT
    for name, family in tasks:
        alone, divided = _trained(name, family, ALONE), load_file(tmp_path / f"{name}-{family}.safetensors")
        assert divided.keys() == alone.keys() and any(key.startswith("gradient/") for key in alone)
        for key, value in alone.items():
            size = float(value.abs().max())
            assert float((divided[key] - value).abs().max()) <= 1e-5 * max(size, 1e-3), (name, family, key)


BATCH_SEEDS = range(5)


def _trained(name: str, family: str, ranks: Ranks) -> dict[str, torch.Tensor]:
    """The loss and the gradients of a step, and what is trained after two plain ones, on all ranks together."""
    made, method = tiny.adapted(family, name)
    tiny.randomise(nn.ParameterList(adapter.trained(made.model).values()))
    shards.divide(made, ranks)
    trained = adapter.trained(made.model)
    assert not ranks.sharded or all(isinstance(parameter, DTensor) for parameter in made.model.parameters())
    optimizer = torch.optim.SGD(trained.values(), lr=0.01)  # Adam's first steps make large ones of rounding
    step = TrainingStep(made.model, optimizer, clip_norm=1.0, ranks=ranks)
    batches = [tiny.batch(family, seed=seed) for seed in BATCH_SEEDS]
    found = {"loss": step.backward(batches, 0.01)}
    for key, parameter in trained.items():
        if parameter.grad is not None:
            found[f"gradient/{key}"] = parameter.grad.clone()
    norm = step.update()
    assert norm is not None
    found["norm"] = norm
    step.backward(batches, 0.01)
    step.update()
    found |= {f"parameter/{key}": parameter.detach() for key, parameter in trained.items()}
    return {key: shards.whole(value).contiguous() for key, value in found.items()}


def _rank(rank: int, folder: Path, tasks: list[tuple[str, str]]) -> None:
    torch.set_num_threads(1)
    for family in FAMILIES:
        tiny.folder(family)  # transformers lets only the first rank write
    with joined(rank, COUNT, "cpu", folder / "meeting", sharded=True) as ranks:
        for name, family in tasks:
            found = _trained(name, family, ranks)
            if ranks.first:
                save_file(found, folder / f"{name}-{family}.safetensors")


@pytest.mark.parametrize("name", [name for name in base.names() if name not in SHARDABLE])
def test_every_other_method_refuses_before_work_starts(name: str) -> None:
    chosen = training.written("causal-lm", method=name, options={}, devices=2, strategy="fsdp")
    with pytest.raises(UsageError, match=f"{name} cannot be trained (by FSDP|on 2 devices)") as caught:
        schedule.check(chosen, base.create(name))
    assert "--method lora" in caught.value.remedy


@pytest.mark.parametrize("count", [1, 2, 3, 8])
def test_all_ranks_run_as_many_passes(count: int) -> None:
    for length in range(1, 20):
        items = list(range(length))
        ranks = [Ranks(rank, count, sharded=True) for rank in range(count)]
        assert len({len(each.mine(items)) + len(each.idle(items)) for each in ranks}) == 1
        assert not any(Ranks(rank, count).idle(items) for rank in range(count))


def test_a_run_as_a_user_has_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDGEPEFT_CACHE", str(tmp_path / "cache"))
    chosen = training.written("causal-lm", options={}, checkpointing=False, devices=2, strategy="fsdp", max_steps=2)
    said = list[str]()
    space = pipeline.run(chosen, tmp_path / "run", until="merge", say=said.append)
    assert any("on 2 devices by FSDP" in line for line in said)
    rows = {row.artefact: row for row in ledger.read(space.ledger)}
    assert rows["adapter"].metrics["loss"] < rows["base"].metrics["loss"] and rows["merged-fp32"].kept
    assert "a sharded model holds is not followed on a CPU" in (tmp_path / "run" / "report.html").read_text()
