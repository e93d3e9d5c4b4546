"""Ladder side-tuning: nothing is sent back through the backbone, and nothing is lost of it at the start."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor, nn

from edgepeft import adapter, backbone, step
from edgepeft.backbone import Backbone
from edgepeft.errors import UsageError
from edgepeft.methods import base
from edgepeft.placements.ladder import Rung, Top

GENERATORS = [family for family in tiny.FAMILIES if tiny.task(family) != "classification"]


def side(made: Backbone) -> nn.ParameterList:
    return nn.ParameterList(p for name, p in adapter.trained(made.model).items() if name not in made.fresh)


@pytest.mark.parametrize("at", ["fp32", "bf16", "nf4", "int8"])
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_training_starts_at_the_backbone(family: str, at: str) -> None:
    inputs = step.inputs(tiny.batch(family))
    plain = tiny.load(family, at)
    base.apply(tiny.method("ln_tuning"), plain)  # so that both multiply with the same kernels
    made, _ = tiny.adapted(family, "lst", at)
    assert torch.equal(made.model(**inputs).logits, plain.model(**inputs).logits)
    tiny.randomise(side(made))
    assert not torch.equal(made.model(**inputs).logits, plain.model(**inputs).logits)


@pytest.mark.parametrize("at", ["fp32", "nf4"])
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_nothing_goes_back_through_the_backbone(family: str, at: str) -> None:
    made = tiny.load(family, at)
    after = {*made.anatomy.norms} - {name for block in made.anatomy.blocks for name in block.norms}
    after |= {made.anatomy.unembedding, *made.anatomy.head, f"{made.model.base_model_prefix}.pooler"}
    base.apply(tiny.method("lst", layers=1.0), made)
    tiny.randomise(side(made))
    forward: list[str] = []
    backward: list[str] = []

    def watch(name: str, module: nn.Module) -> None:
        def note_graph(module: nn.Module, inputs: Any, output: Any) -> None:
            tensors = [t for t in (*inputs, output) if isinstance(t, Tensor)]
            forward.extend([name] if any(t.requires_grad for t in tensors) else [])

        module.register_forward_hook(note_graph)
        module.register_full_backward_hook(lambda module, inputs, outputs: backward.append(name))

    watched = 0
    for name, module in made.model.named_modules():
        inside = next((b.path for b in made.anatomy.blocks if name.startswith(f"{b.path}.")), None)
        own = inside is not None and name[len(inside) + 1 :].split(".")[0] not in ("rung", "entry", "top")
        if own or "embed" in name or name.endswith(("wte", "wpe")):
            if not any(name.startswith(part) for part in after if part):
                watch(name, module)
                watched += 1
    assert watched > 20
    made.model.train()
    tiny.loss_sum(made.model, tiny.batch(family)).backward()
    assert forward == [] and backward == []
    assert all(parameter.grad is not None for parameter in side(made))
    assert all(p.grad is None for p in made.model.parameters() if not p.requires_grad)


def deep(family: str, folder: Path, layers: int) -> Backbone:
    """The family's tiny model with more layers."""
    names = {"gpt2": ["n_layer"], "distilbert": ["n_layers"], "t5": ["num_layers", "num_decoder_layers"]}
    tiny.model(family, **{name: layers for name in names.get(family, ["num_hidden_layers"])}).save_pretrained(folder)
    labels = ["a", "b", "c"] if tiny.task(family) == "classification" else None
    return backbone.load(backbone.resolve(str(folder)), task=tiny.task(family), at="fp32", labels=labels)


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert", "distilbert", "t5"])
def test_half_the_layers_and_a_quarter_of_the_width(family: str, tmp_path: Path) -> None:
    made = deep(family, tmp_path, 4)
    wide = {n: m for n, m in made.model.named_modules() if isinstance(m, nn.Linear)}
    base.apply(tiny.method("lst"), made)
    rungs = {name: module for name, module in made.model.named_modules() if isinstance(module, Rung)}
    beside = [block.path for block in made.anatomy.blocks if f"{block.path}.rung" in rungs]
    for number in range(len(made.anatomy.stacks)):
        paths = [block.path for block in made.anatomy.blocks if block.stack == number]
        assert [path for path in paths if path in beside] == [paths[1], paths[3]]
    for name, rung in rungs.items():
        path = name.removesuffix(".rung")
        for inner, layer in rung.layer.named_modules():
            if isinstance(layer, nn.Linear):
                twin = wide[f"{path}.{inner}"]
                assert (layer.in_features * 4, layer.out_features * 4) == (twin.in_features, twin.out_features)
        assert rung.down.weight.shape == (8, 32)
    assert sum(isinstance(module, Top) for module in made.model.modules()) == 1


@pytest.mark.parametrize(("layers", "expected"), [(0.34, [2]), (0.67, [0, 2]), (1.0, [0, 1, 2]), (0.01, [2])])
def test_the_last_layer_always_has_a_rung(layers: float, expected: list[int], tmp_path: Path) -> None:
    made = deep("llama", tmp_path, 3)
    base.apply(tiny.method("lst", layers=layers), made)
    found = [number for number, block in enumerate(made.anatomy.blocks) if "rung" in _children(made, block.path)]
    assert found == expected
    tiny.loss_sum(made.model, tiny.batch("llama")).backward()


def _children(made: Backbone, path: str) -> list[str]:
    return [name for name, _ in made.model.get_submodule(path).named_children()]


@pytest.mark.parametrize("at", ["fp32", "nf4"])
def test_the_side_network_starts_as_a_pruned_backbone(at: str) -> None:
    made, _ = tiny.adapted("llama", "lst", at, layers=1.0)
    dense = tiny.load("llama", at)
    from edgepeft.precision import unpack

    unpack(dense.model, torch.float32)
    block = made.anatomy.blocks[1].path
    rung: Any = made.model.get_submodule(f"{block}.rung")
    assert torch.equal(rung.down.weight.sum(1), torch.ones(8)) and not rung.down.bias.any()
    features = rung.down.weight.argmax(1)

    def wide(name: str) -> Tensor:
        return dense.model.get_submodule(f"{block}.{name}").weight.float()

    read = sum(wide(f"mlp.{name}").abs().sum(0) for name in ("gate_proj", "up_proj"))
    first = dense.anatomy.blocks[0].path
    layers = (dense.model.get_submodule(f"{first}.mlp.{name}") for name in ("gate_proj", "up_proj"))
    read += sum(layer.weight.float().abs().sum(0) for layer in layers)
    assert set(features.tolist()) == set(read.topk(8).indices.tolist())
    query = rung.layer.self_attn.q_proj.weight.float()
    torch.testing.assert_close(query, wide("self_attn.q_proj")[::4][:, features], rtol=1e-2, atol=1e-2)
    output = rung.layer.self_attn.o_proj.weight.float()
    torch.testing.assert_close(output, wide("self_attn.o_proj")[features][:, ::4], rtol=1e-2, atol=1e-2)
    down, written = rung.layer.mlp.down_proj.weight.float(), wide("mlp.down_proj")
    inner = written.abs().sum(0).topk(16).indices.sort().values
    torch.testing.assert_close(down, written[features][:, inner], rtol=1e-2, atol=1e-2)
    up = rung.layer.mlp.up_proj.weight.float()
    torch.testing.assert_close(up, wide("mlp.up_proj")[inner][:, features], rtol=1e-2, atol=1e-2)
    norm = made.model.get_submodule(f"{block}.input_layernorm").weight
    assert torch.equal(rung.layer.input_layernorm.weight, norm[features])


@pytest.mark.parametrize("family", ["llama", "bert"])
def test_each_rung_computes_what_the_paper_says(family: str) -> None:
    """In float64, from the plain backbone's own layers; section 3.2 of arXiv 2206.06522."""
    made, _ = tiny.adapted(family, "lst", layers=1.0)
    tiny.randomise(side(made))
    plain, model = tiny.load(family).model.double(), made.model.double()
    seen: list[tuple[Tensor, dict[str, Any], Tensor]] = []
    for block in made.anatomy.blocks:
        plain.get_submodule(block.path).register_forward_hook(
            lambda layer, args, kwargs, output: seen.append((args[0], kwargs, output)), with_kwargs=True
        )
    last: Any = model.get_submodule(made.anatomy.blocks[-1].path)
    found: list[Tensor] = []
    last.register_forward_hook(lambda layer, args, output: found.append(output))
    for each in (plain, model):
        each(**step.inputs(tiny.batch(family, lengths=(9, 9))), use_cache=False)

    def narrowed(x: Tensor, down: nn.Linear) -> Tensor:
        return x @ down.weight.T + down.bias

    first: Any = model.get_submodule(made.anatomy.blocks[0].path)
    state = narrowed(seen[0][0], first.entry.down)
    for block, (_, kwargs, hidden) in zip(made.anatomy.blocks, seen, strict=True):
        rung: Any = model.get_submodule(f"{block.path}.rung")
        gate = 1 / (1 + torch.exp(-rung.gate.detach() / 0.1))
        assert 0.01 < float(gate) < 0.99 and abs(float(gate) - 0.5) > 0.01, "neither end, and the two are told apart"
        if kwargs.get("position_embeddings") is not None:
            kwargs = {**kwargs, "position_embeddings": tuple(t[..., ::4] for t in kwargs["position_embeddings"])}
        state = rung.layer(gate * state + (1 - gate) * narrowed(hidden, rung.down), **kwargs)
    expected = seen[-1][2] + last.top.norm(state) @ last.top.up.weight.T
    torch.testing.assert_close(found[0], expected, rtol=1e-9, atol=1e-9)
    assert (expected - seen[-1][2]).abs().max() > 1e-2


def test_narrow_heads_turn_as_wide_ones_do() -> None:
    """Relative positions: scores of a narrow rotated head are those of the kept dimensions of the wide one."""
    made, _ = tiny.adapted("llama", "lst")
    seen: list[tuple[Tensor, Tensor]] = []
    rung: Any = next(module for module in made.model.modules() if isinstance(module, Rung))
    rung.layer.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["position_embeddings"]), with_kwargs=True
    )
    made.model(input_ids=torch.arange(2, 12)[None])
    cosine, sine = seen[0]
    assert cosine.shape == (1, 10, 2)
    frequency = made.model.model.rotary_emb.inv_freq[0]
    angles = torch.arange(10.0) * frequency
    torch.testing.assert_close(cosine[0], angles.cos()[:, None].expand(10, 2))
    torch.testing.assert_close(sine[0], angles.sin()[:, None].expand(10, 2))


@pytest.mark.parametrize("at", ["fp32", "nf4"])
@pytest.mark.parametrize("family", GENERATORS)
def test_generation_with_a_cache_is_generation_without(family: str, at: str) -> None:
    made, _ = tiny.adapted(family, "lst", at, layers=1.0)
    tiny.randomise(side(made), seed=5)
    batch = tiny.batch(family, rows=2, lengths=(7, 7))
    options: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    options |= {"attention_mask": batch["attention_mask"], "output_logits": True, "return_dict_in_generate": True}
    cached, plain = (made.model.generate(batch["input_ids"], use_cache=use, **options) for use in (True, False))
    assert torch.equal(cached.sequences, plain.sequences)
    for a, b in zip(cached.logits, plain.logits, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3 if at == "fp32" else 0.2)
    plain_backbone = tiny.load(family, at).model.generate(batch["input_ids"], use_cache=True, **options)
    assert not torch.equal(cached.logits[0], plain_backbone.logits[0]), "the side network is heard"


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_padding_changes_nothing(family: str) -> None:
    made, _ = tiny.adapted(family, "lst", layers=1.0)
    tiny.randomise(side(made))
    ids = torch.randint(2, tiny.VOCABULARY, (2, 6))
    wider = nn.functional.pad(ids, (0, 3))
    inputs: dict[str, Tensor] = {"input_ids": wider, "attention_mask": (wider != 0).long()}
    extra = {"decoder_input_ids": ids} if tiny.task(family) == "seq2seq" else {}
    padded = made.model(**inputs, **extra).logits
    plain = made.model(input_ids=ids, **extra).logits
    wanted = padded[:, :6] if tiny.task(family) == "causal-lm" else padded
    torch.testing.assert_close(wanted, plain, rtol=1e-4, atol=1e-4)


def test_a_pass_that_failed_leaves_nothing_behind() -> None:
    made, _ = tiny.adapted("llama", "lst", layers=1.0)
    tiny.randomise(side(made))
    inputs = step.inputs(tiny.batch("llama"))
    before = made.model(**inputs).logits

    def fail(*_: Any) -> None:
        raise MemoryError

    handle = made.model.get_submodule(made.anatomy.blocks[1].path).register_forward_pre_hook(fail)
    with pytest.raises(MemoryError):
        made.model(input_ids=torch.ones(1, 3, dtype=torch.long))
    handle.remove()
    assert torch.equal(made.model(**inputs).logits, before)


@pytest.mark.parametrize("reduction", [1, 2, 3, 8, 64])
def test_reductions_that_do_not_fit(reduction: int) -> None:
    """Narrower heads must keep whole pairs of rotated dimensions: of 8, only 4 times narrower ones do."""
    with pytest.raises(UsageError, match=f"a reduction of {reduction} does not fit") as caught:
        tiny.adapted("llama", "lst", reduction=reduction)
    assert "hidden size, 32" in caught.value.cause and "options.reduction=4" in caught.value.remedy


@pytest.mark.parametrize("reduction", [4, 8])
@pytest.mark.parametrize("family", ["gpt2", "bert", "t5"])
def test_reductions_that_fit(family: str, reduction: int) -> None:
    made, _ = tiny.adapted(family, "lst", reduction=reduction)
    tiny.loss_sum(made.model, tiny.batch(family)).backward()
