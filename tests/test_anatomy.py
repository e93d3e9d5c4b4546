"""Every family's parts are found, each linear layer in one role only."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import tiny
import torch
import transformers
from torch import nn

from edgepeft import admission, anatomy, backbone, probe, tasks
from edgepeft.conv1d import linearize
from edgepeft.errors import UsageError

FUSED = {"gpt2": {"query", "key", "value"}, "phi3": {"query", "key", "value"}}
GATED = ("llama", "qwen2", "qwen3", "gemma2", "phi3", "mistral", "gte", "t5-gated")
_MORE = {
    "phi3": lambda: transformers.Phi3ForCausalLM(transformers.Phi3Config(**_small(), pad_token_id=0)),
    "phi": lambda: transformers.PhiForCausalLM(transformers.PhiConfig(**_small())),
    "mistral": lambda: transformers.MistralForCausalLM(transformers.MistralConfig(**_small(), num_key_value_heads=2)),
    "roberta": lambda: transformers.RobertaForSequenceClassification(
        transformers.RobertaConfig(**_small(), num_labels=3)
    ),
    "gte": lambda: transformers.GteForSequenceClassification(
        transformers.GteConfig(**_small(), num_labels=3, pad_token_id=0)
    ),
}
ALL = (*tiny.FAMILIES, *_MORE)


def _small() -> dict[str, int]:
    sizes = {"vocab_size": tiny.VOCABULARY, "hidden_size": 16, "intermediate_size": 32}
    return sizes | {"num_hidden_layers": 2, "num_attention_heads": 2}


def _model(family: str) -> nn.Module:
    made = _MORE[family]() if family in _MORE else tiny.model(family)
    linearize(made)
    return made


@pytest.mark.parametrize("family", ALL)
def test_every_linear_of_the_blocks_has_one_role(family: str) -> None:
    model = _model(family)
    found = anatomy.find(model)
    assert len(found.blocks) == (4 if family.startswith("t5") else 2)
    for block in found.blocks:
        layer = model.get_submodule(block.path)
        existing = {f"{block.path}.{name}" for name, module in layer.named_modules() if isinstance(module, nn.Linear)}
        roles = Counter(name for names in block.linears.values() for name in names)
        assert set(roles) == existing
        shared = {name for name, times in roles.items() if times > 1}
        fused = {name for role in FUSED.get(family, ()) for name in block.linears[role]}
        assert shared == fused and len(fused) == (family in FUSED)
        assert len(block.linears["ffn_in"]) == (2 if family in GATED and family != "phi3" else 1)


@pytest.mark.parametrize("family", ALL)
def test_roles_are_what_they_say(family: str) -> None:
    """By shape: feed-forward layers widen and narrow; by position: cross-attention only in a decoder."""
    model: Any = _model(family)
    found = anatomy.find(model)
    width = model.get_input_embeddings().weight.shape[1]
    for block in found.blocks:
        for name in block.linears["ffn_in"]:
            layer = model.get_submodule(name)
            assert layer.in_features == width and layer.out_features == width * (4 if family in ("gpt2", "phi3") else 2)
        for role in ("ffn_out", "output"):
            (name,) = block.linears[role]
            assert model.get_submodule(name).out_features == width
        assert ("cross_key" in block.linears) == (block.stack == 1)
        assert set(block.linears) <= set(anatomy.ROLES)


@pytest.mark.parametrize("family", ["llama", "bert", "t5", "gpt2", "qwen3"])
def test_the_output_layer_reads_values(family: str) -> None:
    """Without values there is nothing to attend to; queries and keys only say where."""
    model = _model(family)
    found = anatomy.find(model)
    value, output = found.blocks[0].linears["value"][0], found.blocks[0].linears["output"][0]
    layer: Any = model.get_submodule(value)
    with torch.no_grad():
        rows = slice(-layer.out_features // 3, None) if family == "gpt2" else slice(None)
        layer.weight[rows] = 0
        if layer.bias is not None:
            layer.bias[rows] = 0
    read: list[torch.Tensor] = []
    model.get_submodule(output).register_forward_hook(lambda module, inputs, out: read.append(inputs[0]))
    batch = tiny.batch(family)
    names = ("input_ids", "attention_mask", "decoder_input_ids")
    model(**{name: batch[name] for name in names if name in batch})
    assert not read[0].any()


@pytest.mark.parametrize("family", ALL)
def test_sub_layers_are_what_is_added_to_the_stream(family: str) -> None:
    """With the outputs of all of a layer's sub-layers given, the sums of its residual stream are known."""
    model = _model(family)
    found = anatomy.find(model)
    generator = torch.Generator().manual_seed(0)
    added: dict[str, torch.Tensor] = {}
    sums: dict[str, torch.Tensor] = {}
    streams: dict[str, list[torch.Tensor]] = {}

    def replace(output: str, result: torch.Tensor) -> torch.Tensor:
        added[output] = torch.randn(result.shape, generator=generator)
        return added[output]

    def note(path: str, inputs: Any, result: Any) -> None:
        streams[path] = [inputs[0], result if isinstance(result, torch.Tensor) else result[0]]

    for block in found.blocks:
        assert list(block.sub_layers) == [kind for kind in anatomy.SUB_LAYERS if kind in block.sub_layers]
        assert ("cross_attention" in block.sub_layers) == ("cross_query" in block.linears)
        model.get_submodule(block.path).register_forward_hook(lambda m, i, out, p=block.path: note(p, i, out))
        for part in block.sub_layers.values():
            model.get_submodule(part.output).register_forward_hook(lambda m, i, out, n=part.output: replace(n, out))
            if part.norm:
                norm = model.get_submodule(part.norm)
                norm.register_forward_hook(lambda m, i, out, n=part.norm: sums.update({n: i[0], f"{n} of": out}))
    batch = tiny.batch(family)
    names = ("input_ids", "attention_mask", "decoder_input_ids")
    model(**{name: batch[name] for name in names if name in batch})
    for block in found.blocks:
        stream, after = streams[block.path]
        for part in block.sub_layers.values():
            stream = stream + added[part.output]
            if part.norm:
                torch.testing.assert_close(sums[part.norm], stream)
                stream = sums[f"{part.norm} of"]
        torch.testing.assert_close(after, stream)


@pytest.mark.parametrize("family", ALL)
def test_norms_are_all_found(family: str) -> None:
    """A norm holds one vector of the hidden size, or of a head, and perhaps a shift, and nothing else."""
    model = _model(family)
    found = anatomy.find(model)
    embeddings_and_linears = (nn.Embedding, nn.Linear)
    vectors = {
        name
        for name, module in model.named_modules()
        if not isinstance(module, embeddings_and_linears)
        and list(module.parameters(recurse=False))
        and all(parameter.dim() == 1 for parameter in module.parameters(recurse=False))
    }
    assert set(found.norms) == vectors and vectors
    inside = {name for block in found.blocks for name in block.norms}
    assert inside == {name for name in vectors if any(name.startswith(f"{block.path}.") for block in found.blocks)}


@pytest.mark.parametrize("family", ALL)
def test_head_or_unembedding(family: str) -> None:
    model = _model(family)
    found = anatomy.find(model)
    if family in ("bert", "distilbert", "roberta", "gte"):
        assert found.unembedding == ""
        outside = {name.split(".")[0] for name, _ in model.named_parameters()} - {model.base_model_prefix}
        assert outside <= set(found.head) and "classifier" in outside
    else:
        assert found.head == () and found.unembedding == "lm_head"


@pytest.mark.parametrize("family", ALL)
def test_stacks_hold_the_blocks(family: str) -> None:
    model = _model(family)
    found = anatomy.find(model)
    assert len(found.stacks) == (2 if family.startswith("t5") else 1)
    for number, stack in enumerate(found.stacks):
        layers = model.get_submodule(stack.layers)
        assert isinstance(layers, nn.ModuleList)
        paths = [block.path for block in found.blocks if block.stack == number]
        assert [model.get_submodule(path) for path in paths] == list(layers)
        assert stack.layers.startswith(stack.owner)


def test_linears_are_listed_once_and_in_the_order_of_the_model() -> None:
    found = anatomy.find(_model("gpt2"))
    assert found.linears(("query", "key", "value", "query")) == [
        "transformer.h.0.attn.c_attn",
        "transformer.h.1.attn.c_attn",
    ]
    assert found.linears(("cross_query",)) == []


def test_unknown_architecture() -> None:
    sizes = {"vocab_size": 16, "hidden_size": 8, "n_layer": 1, "n_head": 2}
    with pytest.raises(UsageError) as caught:
        anatomy.find(transformers.BloomForCausalLM(transformers.BloomConfig(**sizes)))
    assert "BloomForCausalLM is not one edgepeft knows" in caught.value.fact
    assert "Llama" in caught.value.remedy


@pytest.mark.parametrize(("kind", "why"), [("OpenAIGPT", "lists"), ("IBert", "scale"), ("Xmod", "language")])
def test_names_alone_do_not_make_a_model_known(kind: str, why: str) -> None:
    """GPT-1 has GPT-2's, the other two BERT's."""
    sizes = {"vocab_size": 16, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    made = getattr(transformers, f"{kind}Config")(**sizes, intermediate_size=8)
    with torch.device("meta"):
        model = getattr(transformers, f"{kind}{'LMHead' if kind == 'OpenAIGPT' else ''}Model")(made)
    with pytest.raises(UsageError, match="is not one edgepeft knows") as caught:
        anatomy.find(model)
    assert why in caught.value.cause


@pytest.mark.parametrize(
    ("kind", "sizes"),
    [("Glm4Moe", {"n_routed_experts": 4, "first_k_dense_replace": 1}), ("Ernie4_5_Moe", {"moe_num_experts": 4})],
)
def test_experts_behind_a_first_layer_of_a_known_build_are_refused(kind: str, sizes: dict[str, int]) -> None:
    sizes = _small() | sizes | {"num_key_value_heads": 2, "moe_intermediate_size": 8}
    config = getattr(transformers, f"{kind}Config")(**sizes)
    with torch.device("meta"):
        model = getattr(transformers, f"{kind}ForCausalLM")(config)
    with pytest.raises(UsageError, match="not all of one build") as caught:
        anatomy.find(model)
    assert caught.value.cause.startswith("The first has mlp.gate_proj, and number 2 has not")


_MIXED = {"hidden_size": 32, "moe_intermediate_size": 16, "num_attention_heads": 4, "num_key_value_heads": 2}
_MIXED |= {"vocab_size": 64, "intermediate_size": 64, "num_experts": 4, "num_experts_per_tok": 2, "head_dim": 8}


@pytest.mark.parametrize(
    "configuration",
    [
        transformers.Qwen3MoeConfig(**_MIXED, num_hidden_layers=6, mlp_only_layers=[0, 1, 2, 3]),
        transformers.GPTNeoConfig(vocab_size=64, hidden_size=16, num_layers=4, attention_types=[[["global"], 4]]),
        transformers.FunnelConfig(vocab_size=64, block_sizes=[1, 1], d_model=16, n_head=2, d_head=8, d_inner=16),
        transformers.BambaConfig(vocab_size=64, hidden_size=16, num_hidden_layers=2, mamba_n_heads=4, mamba_d_head=8),
    ],
    ids=lambda made: made.model_type,
)
def test_what_no_method_can_work_on_is_refused_before_it_is_traced(
    configuration: transformers.PretrainedConfig,
) -> None:
    """Experts behind more layers than are traced; layers by other names, or described one by one; infinity."""
    task = tasks.usual_task(configuration)
    with pytest.raises(UsageError) as caught:
        admission.check("a model", configuration.to_dict())
        probe.refuse(backbone.as_fields(configuration), task, None)
    experts = configuration.model_type == "qwen3_moe"
    assert ("are not all of one build" if experts else "is not one edgepeft knows") in caught.value.fact
