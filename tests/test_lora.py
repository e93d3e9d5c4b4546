"""LoRA is HF PEFT's LoRA, to the last gradient."""

from __future__ import annotations

import peft_twin
import pytest
import tiny
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from edgepeft import adapter, precision, step
from edgepeft.anatomy import ROLES
from edgepeft.errors import UsageError
from edgepeft.methods.lora import LowRank

NAMES = {"a": "lora_A", "b": "lora_B"}


@pytest.mark.parametrize(
    ("family", "targets"),
    [
        ("llama", ("query", "value")),
        ("llama", ("query", "key", "value", "output", "ffn_in", "ffn_out")),
        ("bert", ("query", "key", "value", "output", "ffn_in", "ffn_out")),
        ("gpt2", ("query", "key", "value", "output", "ffn_in", "ffn_out")),
        ("t5-gated", ("query", "cross_key", "cross_output", "ffn_out")),
    ],
)
def test_logits_gradients_and_merged_weights_are_those_of_peft(family: str, targets: tuple[str, ...]) -> None:
    made, method = tiny.adapted(family, "lora", rank=3, alpha=5.0, targets=targets)
    ours, trained = made.model, adapter.trained(made.model)
    for name in made.fresh:
        ours.get_parameter(name).requires_grad_(False)
        del trained[name]
    tiny.randomise(nn.ParameterList(trained.values()))
    config = LoraConfig(r=3, lora_alpha=5, target_modules=made.anatomy.linears(targets), lora_dropout=0.0)
    theirs = get_peft_model(tiny.model(family), config).eval()
    state = dict(theirs.named_parameters())

    def counterpart(name: str) -> nn.Parameter:
        path, _, factor = name.rpartition(".")
        return state[f"base_model.model.{path.removesuffix('.delta')}.{NAMES[factor]}.default.weight"]

    assert sum(parameter.requires_grad for parameter in state.values()) == len(trained)
    with torch.no_grad():
        for name, parameter in trained.items():
            counterpart(name).copy_(parameter)
    batch = tiny.batch(family)
    inputs = step.inputs(batch)
    logits = theirs(**inputs).logits
    torch.testing.assert_close(ours(**inputs).logits, logits, rtol=1e-4, atol=1e-4)
    upstream = torch.randn_like(logits)
    logits.backward(upstream)
    ours(**inputs).logits.backward(upstream)
    for name, parameter in trained.items():
        expected = counterpart(name).grad
        assert parameter.grad is not None and expected is not None and expected.any()
        assert (parameter.grad - expected).abs().max() < 1e-4 * expected.abs().max(), name
    method.merge(ours)
    merged = theirs.merge_and_unload()
    for name in made.anatomy.linears(targets):
        stored = merged.get_parameter(f"{name}.weight")
        weight = stored.t() if family == "gpt2" else stored
        torch.testing.assert_close(ours.get_parameter(f"{name}.weight"), weight, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_training_starts_at_the_backbone(family: str) -> None:
    made, _ = tiny.adapted(family, "lora")
    inputs = step.inputs(tiny.batch(family))
    assert torch.equal(made.model(**inputs).logits, tiny.load(family).model(**inputs).logits)


def test_the_seed_decides_the_start() -> None:
    def factors(seed: int) -> list[torch.Tensor]:
        made = tiny.load("llama", seed=seed)
        tiny.method("lora").inject(made.model, made.anatomy)
        return list(adapter.trained(made.model).values())

    assert all(torch.equal(a, b) for a, b in zip(factors(1), factors(1), strict=True))
    assert not torch.equal(factors(1)[0], factors(2)[0])


def test_dropout_only_in_training_and_with_its_expectation() -> None:
    layer = LowRank(nn.Linear(64, 8), rank=4, scale=2.0, dropout=0.5)
    nn.init.normal_(layer.b)
    x = torch.randn(5, 64)
    layer.eval()
    exact = layer.change(x)
    torch.testing.assert_close(exact, x @ layer.weight().t(), rtol=1e-4, atol=1e-4)
    layer.train()
    torch.manual_seed(0)
    drawn = torch.stack([layer.change(x) for _ in range(4000)])
    assert not torch.equal(drawn[0], drawn[1])
    torch.testing.assert_close(drawn.mean(0), exact, rtol=0, atol=0.1 * exact.std().item())


@pytest.mark.parametrize("bf16", [True, False])
def test_half_precision_keeps_its_factors_in_full_and_its_activations_in_half(bf16: bool) -> None:
    with precision.emulating(bf16=bf16):
        made, _ = tiny.adapted("llama", "lora", "nf4")
        assert {parameter.dtype for parameter in adapter.trained(made.model).values()} == {torch.float32}
        seen = set()
        for name in made.anatomy.linears(ROLES):
            made.model.get_submodule(name).register_forward_hook(
                lambda module, inputs, output: seen.add((inputs[0].dtype, output.dtype))
            )
        tiny.loss_sum(made.model, tiny.batch("llama"))
    assert seen == {(torch.bfloat16, torch.bfloat16)}


def test_one_delta_on_a_fused_projection() -> None:
    made, _ = tiny.adapted("gpt2", "lora", targets=("query", "key", "value"))
    assert sorted({name.rpartition(".delta")[0] for name in adapter.trained(made.model)}) == [
        "transformer.h.0.attn.c_attn",
        "transformer.h.1.attn.c_attn",
    ]


def test_a_part_of_a_fused_projection_is_refused() -> None:
    """It would be of queries and keys too."""
    with pytest.raises(UsageError, match="c_attn is key and query too") as caught:
        tiny.adapted("gpt2", "lora", targets=("value", "ffn_in"))
    assert caught.value.remedy.startswith("Give options.targets query, key, value, or none")


def test_targets_that_do_not_exist() -> None:
    with pytest.raises(UsageError, match="there is no target 'querry'") as caught:
        tiny.adapted("llama", "lora", targets=("querry",))
    assert "query" in caught.value.remedy
    with pytest.raises(UsageError, match="match no layer") as caught:
        tiny.adapted("llama", "lora", targets=("cross_query",))
    assert "ffn_in, ffn_out, key, output, query, value" in caught.value.remedy


@pytest.mark.parametrize("family", ["llama", "t5"])
def test_rank_stabilised_it_is_pefts_rslora(family: str) -> None:
    made, method = tiny.adapted(family, "lora", rank=4, alpha=6.0, rank_stabilised=True)
    config = LoraConfig(r=4, lora_alpha=6, use_rslora=True, target_modules=made.anatomy.linears(ROLES))
    factors = {"a": "lora_A", "b": "lora_B"}

    def theirs_of(name: str) -> str:
        path, _, factor = name.partition(".delta.")
        return f"{path}.{factors[factor]}.default.weight"

    peft_twin.compare(family, made, method, config, theirs_of)


def test_the_two_factors_keep_the_ratio_of_their_rates() -> None:
    """LoRA+: whatever the schedule says. Adam's first change of a number is its rate."""
    made, method = tiny.adapted("bert", "lora", ratio=16.0)
    trainer = step.TrainingStep(made.model, method.optimizer(made.model, 1e-3, 0.0), clip_norm=None)
    tiny.randomise(nn.ParameterList(adapter.trained(made.model).values()))
    before = {name: value.detach().clone() for name, value in adapter.trained(made.model).items()}
    trainer.backward([tiny.batch("bert")], 2e-5)
    trainer.update()
    moved = {
        name: (value.detach() - before[name]).abs().median().item()
        for name, value in adapter.trained(made.model).items()
    }
    for name, change in moved.items():
        expected = 32e-5 if name.endswith(".delta.b") else 2e-5
        assert change == pytest.approx(expected, rel=0.02), name
    assert sum(name.endswith(".delta.b") for name in moved) == 12


def test_a_ratio_of_one_is_the_usual_optimizer() -> None:
    made, method = tiny.adapted("llama", "lora")
    assert not [group for group in method.optimizer(made.model, 1e-3, 0.1).param_groups if "lr_scale" in group]
