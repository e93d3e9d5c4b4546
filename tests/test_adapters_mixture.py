"""AdaMix: who is chosen, what is averaged, and how far two passes may be apart."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import onnx
import pytest
import tiny
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from edgepeft import adapter, step
from edgepeft.backbone import Backbone
from edgepeft.export.onnx import export
from edgepeft.methods.adamix import Experts
from edgepeft.methods.base import Method
from edgepeft.placements.bottleneck import Bottleneck
from edgepeft.placements.projection import Projection


def mixture(family: str, **options: Any) -> tuple[Backbone, Method]:
    made, method = tiny.adapted(family, "adamix", **options)
    tiny.randomise(nn.ParameterList(adapter.trained(made.model).values()))
    return made, method


def by_expert(each: Bottleneck, x: Tensor, down: int, up: int) -> Tensor:
    first, second = (dict(part.named_parameters()) for part in (each.down, each.up))
    inner = F.gelu(x @ first["weight"][down].T + first["bias"][down])
    return inner @ second["weight"][up].T + second["bias"][up]


def test_downs_and_ups_are_drawn_independently_and_evenly() -> None:
    """A χ² test of 1,600 passes over the sixteen pairs; a right draw fails it once in a thousand."""
    made, _ = mixture("bert")
    each = next(module for module in made.model.modules() if isinstance(module, Bottleneck)).train()
    x = torch.randn(3, 32)
    pairs = [(down, up) for down in range(4) for up in range(4)]
    with torch.no_grad():
        results = torch.stack([by_expert(each, x, *pair) for pair in pairs])
        torch.manual_seed(0)
        seen = Counter(pairs[int((results - each(x)).abs().sum((1, 2)).argmin())] for _ in range(1600))
        assert (results - each(x)).abs().sum((1, 2)).min() < 1e-3, "one pair for all tokens"
    assert sum((seen[pair] - 100) ** 2 / 100 for pair in pairs) < 37.7  # 15 degrees of freedom


def test_each_layer_draws_for_itself() -> None:
    made, _ = mixture("bert")
    parts = [module.train() for module in made.model.modules() if isinstance(module, Experts)]
    torch.manual_seed(0)
    drawn = set()
    for _ in range(40):
        picked = [part.made()[1] for part in parts]
        drawn.add(tuple(int((part.bias == bias).all(1).nonzero()) for part, bias in zip(parts, picked, strict=True)))
    assert len(parts) == 4 and len(drawn) > 30


def test_experts_begin_as_copies_so_that_their_average_is_what_was_trained() -> None:
    made, _ = tiny.adapted("bert", "adamix")
    each = next(module for module in made.model.modules() if isinstance(module, Bottleneck))
    x = torch.randn(3, 32)
    passes = [each.train()(x) for _ in range(8)]
    for found in passes:
        torch.testing.assert_close(found, each.eval()(x))


@pytest.mark.parametrize("family", ["bert", "llama", "t5"])
def test_one_adapter_of_averages_is_what_is_evaluated_and_exported(family: str, tmp_path: Path) -> None:
    made, method = mixture(family)
    batch = step.inputs(tiny.batch(family))
    model = made.model.eval()
    each = next(module for module in model.modules() if isinstance(module, Bottleneck))
    down, up = (dict(part.named_parameters()) for part in (each.down, each.up))
    x = torch.randn(3, 32)
    expected = F.gelu(x @ down["weight"].mean(0).T + down["bias"].mean(0))
    expected = expected @ up["weight"].mean(0).T + up["bias"].mean(0)
    torch.testing.assert_close(each(x), expected)

    before = model(**batch).logits
    method.condense(model)
    torch.testing.assert_close(model(**batch).logits, before)
    assert not [module for module in model.modules() if isinstance(module, Experts)]
    projections = [module for module in model.modules() if isinstance(module, Projection)]
    assert {tuple(each.weight.shape) for each in projections} == {(2, 32), (32, 2)}
    if family == "bert":  # that the graphs compute the same is tested for every method and family
        shapes = set()
        for path in export(model, made.task, tmp_path / "onnx"):
            shapes |= {tuple(each.dims) for each in onnx.load(path, load_external_data=False).graph.initializer}
        assert not [shape for shape in shapes if shape in ((4, 2, 32), (4, 32, 2), (4, 2), (4, 32))]


def apart(first: Tensor, second: Tensor) -> Tensor:
    log_p, log_q = first.double().log_softmax(-1), second.double().log_softmax(-1)
    return ((log_p.exp() - log_q.exp()) * (log_p - log_q)).sum() / 2 / len(first)


@pytest.mark.parametrize("family", ["bert", "llama", "gemma2", "t5", "t5-gated"])
def test_the_penalty_is_the_mean_divergence_of_two_passes(family: str) -> None:
    made, method = mixture(family, consistency=0.5)
    model, batch = made.model.train(), tiny.batch(family)

    def logits(seed: int) -> Tensor:
        torch.manual_seed(seed)
        found: Tensor = model(**step.inputs(batch)).logits
        return found if "labels" in batch else found.flatten(0, 1)[batch["target_positions"]]

    torch.manual_seed(1)
    first = step.outputs(model, batch)
    torch.manual_seed(2)
    found = method.penalty(model, batch, first)
    assert found is not None
    found.backward()
    mine = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    expected = 0.5 * apart(logits(1), logits(2))
    expected.backward()
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-7)
    assert found > 1e-3, "the passes are different ones"
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(mine[name], parameter.grad, rtol=1e-3, atol=1e-5)


def test_without_consistency_there_is_no_second_pass() -> None:
    made, method = mixture("bert", consistency=0.0)
    assert method.penalty(made.model, tiny.batch("bert"), torch.zeros(4, 3)) is None


def test_training_draws_predictions_together() -> None:
    """With the consistency term two random passes end nearer to each other than without."""
    found = {}
    for consistency in (0.0, 20.0):
        made, method = mixture("bert", consistency=consistency)
        batch, model = tiny.batch("bert", 8), made.model.train()
        trainer = step.TrainingStep(model, method.optimizer(model, 1e-2, 0.0), clip_norm=1.0, penalty=method.penalty)
        torch.manual_seed(0)
        for _ in range(40):
            trainer.backward([batch], 1e-2)
            trainer.update()
        with torch.no_grad():
            pairs = [apart(step.outputs(model, batch), step.outputs(model, batch)) for _ in range(10)]
        found[consistency] = torch.stack(pairs).mean()
    assert found[20.0] < 0.5 * found[0.0]
