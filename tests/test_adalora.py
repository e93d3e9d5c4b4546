"""AdaLoRA is HF PEFT's AdaLoRA: its function, its importances and which ranks are left after training."""

from __future__ import annotations

from pathlib import Path

import peft_twin
import pytest
import tiny
import torch
import training
from peft import AdaLoraConfig, get_peft_model
from peft.tuners.adalora.layer import RankAllocator
from torch import nn

from edgepeft import adapter, step
from edgepeft.anatomy import ROLES
from edgepeft.errors import UsageError
from edgepeft.methods import base
from edgepeft.methods.adalora import AdaLoRA, Triplets

NAMES = {"a": "lora_A", "b": "lora_B", "e": "lora_E"}
UPDATES = 20


def theirs_of(name: str) -> str:
    path, _, leaf = name.partition(".delta.")
    return f"{path}.{NAMES[leaf]}.default"


@pytest.mark.parametrize("family", ["llama", "bert", "t5"])
def test_logits_gradients_and_merged_weights_are_those_of_peft(family: str) -> None:
    made, method = tiny.adapted(family, "adalora", rank=3, budget=2, alpha=5.0)
    targets = made.anatomy.linears(ROLES)
    config = AdaLoraConfig(init_r=3, target_r=2, lora_alpha=5, target_modules=targets, total_step=10, tinit=1, tfinal=1)
    peft_twin.compare(family, made, method, config, theirs_of)


def test_the_adapter_of_a_run_keeps_to_the_budget(tmp_path: Path) -> None:
    """Evaluations before the ranks have fallen choose no adapter, however good they are."""
    options = {"rank": 4, "budget": 1, "warmup": 0.0, "settled": 0.2}
    chosen = training.written("causal-lm", method="adalora", options=options, lr=5e-3)
    done = training.run(chosen, tmp_path / "run")
    evaluated = training.log(tmp_path / "run", "evaluation")
    assert len(evaluated) == 4 and [event["best"] for event in evaluated[:2]] == [False, False]
    found = [t for name, t in adapter.read_tensors(done.adapter / adapter.TENSORS).items() if name.endswith(".e")]
    assert 0 < sum(int((values != 0).sum()) for values in found) <= len(found)


def test_importances_and_the_ranks_that_are_left_are_those_of_peft() -> None:
    """The same steps through PEFT's rank allocator, fed with our parameters and gradients."""
    made, method = tiny.adapted("llama", "adalora", rank=4, budget=2, warmup=0.2, settled=0.25)
    found = [module for module in made.model.modules() if isinstance(module, Triplets)]
    names = [name for name, module in made.model.named_modules() if isinstance(module, Triplets)]
    config = AdaLoraConfig(
        init_r=4,
        target_r=2,
        target_modules=made.anatomy.linears(ROLES),
        total_step=UPDATES,
        tinit=4,
        tfinal=5,
        deltaT=1,
    )
    twin = get_peft_model(tiny.model("llama"), config)
    theirs = dict(twin.named_parameters())
    allocator = RankAllocator(twin, config, "default")
    trainer = step.TrainingStep(made.model, method.optimizer(made.model, 5e-3, 0.0), clip_norm=None)
    counts = []
    for update in range(1, UPDATES + 1):
        trainer.backward([tiny.batch("llama", seed=update)], 5e-3)
        trainer.optimizer.step()
        with torch.no_grad():
            for name, parameter in adapter.trained(made.model).items():
                other = theirs[f"base_model.model.{theirs_of(name)}"]
                other.copy_(parameter.view_as(other))
                assert parameter.grad is not None
                other.grad = parameter.grad.view_as(other).clone()
        if update <= UPDATES - config.tfinal:
            budget, pattern = allocator.update_and_allocate(twin, update, force_mask=update == UPDATES - config.tfinal)
        method.after_update(made.model, update / UPDATES)
        trainer.optimizer.zero_grad()
        for name, module in zip(names, found, strict=True):
            e = theirs[f"base_model.model.{name.removesuffix('.delta')}.lora_E.default"].flatten()
            if update <= UPDATES - config.tfinal:
                assert torch.equal(module.e == 0, e == 0), update
            else:
                kept = torch.tensor(pattern[f"base_model.model.{name.removesuffix('.delta')}.lora_E.default"]).flatten()
                assert torch.equal(module.e != 0, kept), update
        counts.append(sum(int((module.e != 0).sum()) for module in found))
    assert counts[3] == 4 * len(found) and counts[-1] == 2 * len(found) and sorted(counts, reverse=True) == counts
    assert len({int((module.e != 0).sum()) for module in found}) > 1, "ranks differ between layers"


def test_the_penalty_is_that_of_peft_and_reaches_the_factors() -> None:
    made, method = tiny.adapted("llama", "adalora", orthogonality=0.3)
    found = [module for module in made.model.modules() if isinstance(module, Triplets)]
    tiny.randomise(made.model)
    penalty = method.penalty(made.model, {}, torch.zeros(()))
    assert penalty is not None
    expected = 0.0
    for module in found:
        for gram in (module.a @ module.a.T, module.b.T @ module.b):
            expected += torch.linalg.matrix_norm((gram - torch.eye(4)).double()).item()
    assert penalty.item() == pytest.approx(0.3 * expected / (2 * len(found)), rel=1e-5)
    penalty.backward()
    assert all(module.a.grad is not None and module.b.grad is not None for module in found)


def test_the_budget_falls_with_the_cube_of_the_time() -> None:
    method = AdaLoRA(rank=12, budget=8, warmup=0.1, settled=0.5)
    assert [method.ranks_at(progress, 10) for progress in (0.1, 0.5, 0.9)] == [120, 80, 80]
    assert method.ranks_at(0.3, 10) == int(80 + 40 * 0.5**3)


def test_importance_is_kept_for_training_alone() -> None:
    made, _ = tiny.adapted("llama", "adalora")
    assert not [name for name in base.state(made.model) if "sensitivity" in name]
    assert [name for name in base.state(made.model, transient=True) if "sensitivity" in name]


@pytest.mark.parametrize("options", [{"budget": 13}, {"budget": 0}, {"warmup": 0.6}, {"settled": 0.9}], ids=str)
def test_schedules_that_do_not_exist(options: dict[str, object]) -> None:
    with pytest.raises(UsageError, match="adalora cannot work with"):
        base.create("adalora", options)


def test_ranks_go_where_they_are_needed() -> None:
    """Two layers, of which one must change by rank 4 and the other not at all."""
    torch.manual_seed(0)
    goal = [torch.randn(16, 4) @ torch.randn(4, 16) / 4, torch.zeros(16, 16)]
    method = AdaLoRA(rank=4, budget=2, alpha=4.0, warmup=0.1, settled=0.3)
    changes = [Triplets(nn.Linear(16, 16, bias=False), 4, 1.0) for _ in goal]
    model = nn.ModuleList(changes)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-2, weight_decay=0.0)
    for update in range(300):
        x = torch.randn(32, 16)
        errors = [(change.change(x) - x @ g.t()).square().mean() for change, g in zip(changes, goal, strict=True)]
        penalty = method.penalty(model, {}, torch.zeros(()))
        assert penalty is not None
        (torch.stack(errors).sum() + penalty).backward()
        optimizer.step()
        method.after_update(model, (update + 1) / 300)
        optimizer.zero_grad()
    assert [int((change.e.detach() != 0).sum()) for change in changes] == [4, 0]
