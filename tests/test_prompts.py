"""Prompts and prefixes compute what HF PEFT and plain algebra do, in training, generation and behind a cache."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import peft
import pytest
import tiny
import torch
import training
from conformance import randomised, stages, train
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from edgepeft import adapter, step
from edgepeft.errors import UsageError
from edgepeft.evaluate import evaluate, sample_logits, validation_batches
from edgepeft.methods import base
from edgepeft.placements import prompt

LENGTH = 5  # of the prompts and prefixes of narrow models
DECODERS = ("llama", "qwen3", "gpt2", "gemma2")


@pytest.mark.parametrize("family", ["bert", "llama", "t5"])
def test_a_prompt_starts_as_tokens_of_the_vocabulary(family: str) -> None:
    made, _ = tiny.adapted(family, "prompt_tuning")
    (prompt_,) = (p for name, p in adapter.trained(made.model).items() if name.endswith("prompt.embeddings"))
    table: Any = made.model.get_input_embeddings()
    same = (prompt_.detach()[:, None] == table.weight[None]).all(-1)
    assert same.any(1).all() and len(set(same.int().argmax(1).tolist())) > 1, "and not all of them one"


def unwindowed(family: str, name: str) -> tuple[Any, Any]:
    """A randomised method in a tiny model, and the plain model; Gemma's window is wide: HF PEFT hides prompts by it."""
    found = []
    for adapted in (True, False):
        made = tiny.load(family)
        if family == "gemma2":
            made.model.config.sliding_window = 64
            for layer in made.model.model.layers:
                layer.self_attn.sliding_window = layer.self_attn.sliding_window and 64
        if adapted:
            base.complete(tiny.method(name), made)
            randomised(made.model)
        found.append(made.model.eval())
    return found[0], found[1]


def target_logits(model: nn.Module, batch: step.Batch, skipped: int) -> Tensor:
    with torch.no_grad():
        logits = model(**step.inputs(batch)).logits[:, skipped:]
    return logits.flatten(0, 1)[batch["target_positions"]]


@pytest.mark.parametrize("family", [*DECODERS, "t5"])
def test_a_prompt_is_that_of_hf_peft(family: str) -> None:
    model, plain = unwindowed(family, "prompt_tuning")
    kind = "SEQ_2_SEQ_LM" if family == "t5" else "CAUSAL_LM"
    config = peft.PromptTuningConfig(task_type=kind, num_virtual_tokens=LENGTH, num_transformer_submodules=1)
    other: Any = peft.get_peft_model(plain, config).eval()
    (embeddings,) = adapter.trained(model).values()
    other.prompt_encoder["default"].embedding.weight.data.copy_(embeddings.data)
    batch = tiny.batch(family)
    expected = target_logits(other, batch, 0 if family == "t5" else LENGTH)
    torch.testing.assert_close(sample_logits(model, [batch])[0], expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("family", DECODERS)
def test_a_prefix_is_that_of_hf_peft(family: str) -> None:
    model, plain = unwindowed(family, "prefix_tuning")
    states = list(adapter.trained(model).values())  # keys and values of each layer in turn
    width, head = states[0].shape[1], 8
    config = peft.PrefixTuningConfig(
        task_type="CAUSAL_LM",
        num_virtual_tokens=LENGTH,
        token_dim=width,
        num_attention_heads=width // head,
        num_layers=2,
    )
    other: Any = peft.get_peft_model(plain, config).eval()
    other.prompt_encoder["default"].embedding.weight.data.copy_(torch.cat([s.data for s in states], dim=1))
    batch = tiny.batch(family)
    torch.testing.assert_close(sample_logits(model, [batch])[0], target_logits(other, batch, 0), rtol=0, atol=1e-5)


def test_an_encoders_classifier_reads_its_own_first_token_behind_the_prompt() -> None:
    made, _ = tiny.adapted("bert", "prompt_tuning")
    randomised(made.model)
    model: Any = made.model.eval()
    plain: Any = tiny.load("bert").model.eval()
    plain.classifier.load_state_dict(model.classifier.state_dict())
    batch = tiny.batch("bert")
    ids, mask = batch["input_ids"], batch["attention_mask"]
    with torch.no_grad():
        embeddings = torch.cat(
            [prompt.of(model)().expand(len(ids), -1, -1), plain.bert.embeddings.word_embeddings(ids)], 1
        )
        mask = torch.cat([torch.ones(len(ids), LENGTH, dtype=mask.dtype), mask], dim=1)
        hidden = plain.bert(inputs_embeds=embeddings, attention_mask=mask).last_hidden_state
        expected = plain.classifier(plain.bert.pooler(hidden[:, LENGTH:]))
        assert not torch.allclose(expected, plain.classifier(plain.bert.pooler(hidden)), atol=1e-2)
    torch.testing.assert_close(sample_logits(model, [batch])[0], expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("over", ["sdpa", "eager"])
@pytest.mark.parametrize("shares", [None, 1, LENGTH])
@pytest.mark.parametrize("masked", ["not", "bool", "float"])
def test_attention_reads_the_prefix_as_in_plain_algebra(over: str, shares: int | None, masked: str) -> None:
    """softmax over [g · exp(q kₚ), exp(q k) · seen], in float64."""
    made, _ = tiny.adapted("llama", "prefix_tuning")
    randomised(made.model)
    module: Any = made.model.get_submodule("model.layers.0.self_attn").double()
    torch.manual_seed(0)
    query, (key, value) = torch.randn(2, 4, 6, 8).double(), torch.randn(2, 2, 2, 6, 8).double()
    seen = torch.ones(6, 6).tril().bool().expand(2, 1, 6, 6).clone()
    if masked != "not":
        seen[1, :, :, 2] = False
    added = torch.zeros(2, 1, 6, 6).double().masked_fill(~seen, torch.finfo(torch.float64).min)
    mask = {"bool": seen, "float": added}.get(masked)
    if over == "eager" and masked != "float":
        pytest.skip("transformers gives eager attention what is added to scores")
    gates = None if shares is None else torch.rand(2, 6, shares).double()
    given = {} if gates is None else {"prefix_shares": gates.log()}
    attend = ALL_ATTENTION_FUNCTIONS[f"edgepeft-reading-{over}"]
    found, _ = attend(module, query, key, value, mask, scaling=0.5, **given)

    before = [s.view(LENGTH, 2, 8).transpose(0, 1).expand(2, -1, -1, -1) for s in module.prefix()]
    keys, values = (torch.cat(pair, 2).repeat_interleave(2, 1) for pair in zip(before, (key, value), strict=True))
    weights = (0.5 * query @ keys.transpose(2, 3)).exp()
    weights[..., LENGTH:] *= seen
    if gates is not None:
        weights[..., :LENGTH] *= gates[:, None]
    expected = (weights / weights.sum(-1, keepdim=True)) @ values
    torch.testing.assert_close(found, expected.transpose(1, 2))


@pytest.mark.parametrize("name", ["prompt_tuning", "prefix_tuning", "adaptive_prefix", "unipelt"])
@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2", "t5"])
def test_a_cache_holds_the_input_alone_and_changes_nothing(family: str, name: str) -> None:
    """Step by step behind a cache or all at once: the same logits. So no gate sees a later token either."""
    made, _ = tiny.adapted(family, name)
    randomised(made.model)
    model: Any = made.model.eval()
    ids = torch.randint(2, tiny.VOCABULARY, (2, 7), generator=torch.Generator().manual_seed(1))
    source = {"input_ids": ids, "attention_mask": torch.ones_like(ids)} if family == "t5" else {}
    own = "decoder_input_ids" if family == "t5" else "input_ids"
    with torch.no_grad():
        expected = model(**{**source, own: ids}).logits
        cache, found = None, []
        for start, end in ((0, 3), (3, 4), (4, 5), (5, 6), (6, 7)):
            output = model(**{**source, own: ids[:, start:end]}, past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            found.append((start, output.logits))
    for start, logits in found:
        torch.testing.assert_close(logits, expected[:, start : start + logits.shape[1]], rtol=0, atol=2e-5)
    assert cache is not None and cache.get_seq_length() == 7


@pytest.mark.parametrize("family", ["llama", "bert", "t5"])
def test_a_condensed_prompt_is_made_once(family: str) -> None:
    made, method = tiny.adapted(family, "prompt_tuning")
    randomised(made.model)
    model, batch = made.model.eval(), tiny.batch(family)
    before = sample_logits(model, [batch])[0]
    method.condense(model)
    prompt.of(model).forward = None  # type: ignore[assignment]
    assert torch.equal(sample_logits(model, [batch])[0], before)


@pytest.mark.parametrize("family", ["llama", "bert", "t5"])
@pytest.mark.parametrize("name", ["prefix_tuning", "adaptive_prefix", "mam", "unipelt", "s4"])
def test_the_network_that_makes_a_prefix_is_dropped_after_training(family: str, name: str) -> None:
    run, batch = stages(family, name), tiny.batch(family)
    made, _, _ = next(run)
    randomised(made.model)
    before = sample_logits(made.model, [batch])[0]
    assert [n for n in adapter.trained(made.model) if ".trunk." in n]
    next(run)
    names = adapter.trained(made.model)
    assert not [n for n in names if ".trunk." in n or ".up." in n and ".prefix." in n]
    assert [n for n in names if n.endswith("prefix.keys")]
    assert torch.equal(sample_logits(made.model, [batch])[0], before)


def test_a_run_leaves_the_plain_prefix(tmp_path: Path) -> None:
    options = {"length": 4, "bottleneck": 8}
    chosen = training.written("causal-lm", method="prefix_tuning", options=options, lr=1e-2)
    done = training.run(chosen, tmp_path / "run")
    tensors = adapter.read_tensors(done.adapter / adapter.TENSORS)
    assert {name.rpartition(".")[2] for name in tensors} == {"keys", "values"}
    made, method, data = training.prepared(chosen, tmp_path / "cache")
    base.begin(method, made, 1)
    adapter.load(done.adapter, made.model)
    found = evaluate(made.model, validation_batches(data, chosen))
    assert found == pytest.approx(done.metrics, rel=1e-5)


@pytest.mark.parametrize("name", ["prompt_tuning", "prefix_tuning"])
def test_tokens_that_leave_no_position_are_refused(name: str) -> None:
    with pytest.raises(UsageError, match="64 tokens before the input leave it no position") as caught:
        tiny.adapted("llama", name, length=64)
    assert "64 positions" in caught.value.cause and "length=" in caught.value.remedy
    tiny.adapted("t5", name, length=64)  # positions without end
    with pytest.raises(UsageError, match="with length = 0"):
        base.create(name, {"length": 0})


def test_positions_that_methods_take() -> None:
    llama, bert = tiny.configuration("llama"), tiny.configuration("bert")
    for name in ("prefix_tuning", "adaptive_prefix", "mam", "unipelt", "s4"):
        method = tiny.method(name)
        assert (method.positions(llama), method.positions(bert)) == (LENGTH, 0)
    assert [tiny.method("prompt_tuning").positions(config) for config in (llama, bert)] == [LENGTH, LENGTH]
    assert tiny.method("lora").positions(llama) == 0


def test_spot_starts_from_the_prompt_of_another_run() -> None:
    made, method, _ = next(stages("llama", "spot"))
    folder = tiny.prompts("llama")[0]
    tuned, _ = tiny.adapted("llama", "prompt_tuning")
    adapter.load(Path(folder), tuned.model)
    batch = tiny.batch("llama")
    assert torch.equal(sample_logits(made.model, [batch])[0], sample_logits(tuned.model, [batch])[0])
    assert getattr(method, "source") == folder  # noqa: B009


@pytest.mark.parametrize(
    ("options", "part"),
    [
        ({"source": ""}, "needs a prompt to start from"),
        ({"source": "nowhere"}, "there is no adapter in 'nowhere'"),
        ({"length": 7}, "has 5 tokens of width 32"),
    ],
)
def test_spot_refuses_what_it_cannot_start_from(options: dict[str, Any], part: str) -> None:
    method = tiny.method("spot", **{**tiny.others("llama", "spot"), **options})
    with pytest.raises(UsageError, match=part) as caught:
        base.apply(method, tiny.load("llama"))
    assert caught.value.cause and caught.value.remedy


def test_a_prompt_of_another_backbone_is_refused() -> None:
    with pytest.raises(UsageError, match="is not one of this backbone") as caught:
        base.apply(tiny.method("spot", source=tiny.prompts("llama")[0]), tiny.load("qwen3"))
    assert str(tiny.folder("llama")) in caught.value.cause and str(tiny.folder("qwen3")) in caught.value.cause


@pytest.mark.parametrize(("name", "options"), [("spot", {"source": "gone"}), ("ipt", {"prompts": ("gone",)})])
def test_a_trained_adapter_does_not_need_what_it_started_from(name: str, options: dict[str, Any]) -> None:
    made, _ = tiny.adapted("llama", name, **options)
    adapter.load(Path(tiny.prompts("llama")[1]), made.model)


@pytest.mark.parametrize("card", ["[]", "null", '"card"'])
@pytest.mark.parametrize("name", ["spot", "ipt"])
def test_a_card_that_is_no_object_is_refused(name: str, card: str, tmp_path: Path) -> None:
    folders = [str(shutil.copytree(folder, tmp_path / str(n))) for n, folder in enumerate(tiny.prompts("llama")[:2])]
    (Path(folders[0]) / adapter.CARD).write_text(card, encoding="utf-8")
    options: dict[str, Any] = {"source": folders[0]} if name == "spot" else {"prompts": tuple(folders)}
    with pytest.raises(UsageError, match="there is no adapter in") as caught:
        base.apply(tiny.method(name, **options), tiny.load("llama"))
    assert caught.value.cause == "adapter.json is no JSON object." and caught.value.remedy


def test_an_adapter_without_a_prompt_is_refused(tmp_path: Path) -> None:
    made, method = tiny.adapted("llama", "lora")
    card = adapter.card(method, model="m", task=made.task, precision="fp32", labels=None, seed=0)
    adapter.save(tmp_path / "lora", made.model, card)
    with pytest.raises(UsageError, match="holds no prompt"):
        base.apply(tiny.method("spot", source=str(tmp_path / "lora")), tiny.load("llama"))


def test_ipt_goes_from_prompts_to_a_code_to_a_prompt() -> None:
    run, batch = stages("llama", "ipt"), tiny.batch("llama")
    made, method, _ = next(run)
    learned: Any = prompt.of(made.model)
    outputs = step.outputs(made.model, batch)
    penalty = method.penalty(made.model, batch, outputs)
    given = torch.stack(
        [next(iter(adapter.read_tensors(Path(f) / adapter.TENSORS).values())) for f in tiny.prompts("llama")]
    )
    rebuilt = learned.decode(learned.encode(given.flatten(1))).view_as(given)
    assert penalty is not None
    torch.testing.assert_close(penalty, ((rebuilt - given) ** 2).mean())
    assert {n.rpartition("prompt.")[2].partition(".")[0] for n in adapter.trained(made.model)} == {
        "encode",
        "inner",
        "outer",
    }
    before = sample_logits(made.model.eval(), [batch])[0]

    next(run)
    (code,) = adapter.trained(made.model).values()
    assert code.shape == (dataclasses.asdict(method)["dimension"],)
    assert method.penalty(made.model, batch, outputs) is None
    torch.testing.assert_close(sample_logits(made.model, [batch])[0], before, rtol=0, atol=1e-5)
    assert {n.rpartition(".")[2] for n in base.state(made.model)} >= {"code", "inner_weight", "outer_bias"}

    next(run)
    (embeddings,) = base.state(made.model).values()
    assert embeddings.shape == (LENGTH, 32)
    torch.testing.assert_close(sample_logits(made.model, [batch])[0], before, rtol=0, atol=1e-5)


def test_ipt_learns_to_give_prompts_back() -> None:
    """In the stage as it is trained, whose loss on this run's own task it must not follow."""
    made, method, stage = next(stages("llama", "ipt"))
    learned: Any = prompt.of(made.model)
    before = learned.loss().item()
    train(made.model, method, stage, tiny.batch("llama"), 100)
    assert learned.loss() < 0.01 * before
    alike = (learned.prompts - learned.prompts.mean(0)).square().mean()
    assert learned.loss() < 0.1 * alike, "it tells the prompts apart"


def test_ipt_needs_the_prompts_of_several_tasks() -> None:
    with pytest.raises(UsageError, match="ipt needs the prompts of several tasks") as caught:
        base.apply(tiny.method("ipt", prompts=tiny.prompts("llama")[:1]), tiny.load("llama"))
    assert "prompt_tuning" in caught.value.remedy
