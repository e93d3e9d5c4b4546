"""Every entry of the catalogue builds the model it is named after: counted, parsed and rotated as published."""

from __future__ import annotations

import math
import subprocess
import sys
from functools import cache
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSeq2SeqLM, PreTrainedConfig

from edgepeft import catalog

BUILDERS = {"causal-lm": AutoModelForCausalLM, "seq2seq": AutoModelForSeq2SeqLM, "classification": AutoModel}
# Fields that transformers moves into rope_parameters when it reads them: test_rotary_frequencies checks those.
ROTARY_FIELDS = {"rope_theta", "rope_scaling", "rope_local_base_freq", "partial_rotary_factor"}


def fields(name: str) -> dict[str, Any]:
    """What the hub's config.json says, without our own key."""
    config = catalog.entry(name)
    assert config is not None
    del config["_edgepeft"]
    return config


def about(name: str) -> dict[str, Any]:
    config = catalog.entry(name)
    assert config is not None
    facts: dict[str, Any] = config["_edgepeft"]
    return facts


def parsed(name: str) -> PreTrainedConfig:
    return AutoConfig.for_model(**fields(name))


@cache
def built(name: str) -> Any:
    with torch.device("meta"):
        model = BUILDERS[about(name)["task"]].from_config(parsed(name))
        if (
            fields(name).get("tie_word_embeddings") is False
            and model.lm_head.weight is model.get_input_embeddings().weight
        ):
            # T5 1.1 and FLAN-T5 have a head of their own. transformers 5 ties it until it has read the checkpoint.
            model.lm_head.weight = torch.nn.Parameter(torch.empty_like(model.lm_head.weight))
    return model


@pytest.mark.parametrize("name", catalog.names())
def test_parameters_are_the_published_number(name: str) -> None:
    assert sum(parameter.numel() for parameter in built(name).parameters()) == about(name)["parameters"]


@pytest.mark.parametrize("name", catalog.names())
def test_transformers_reads_every_field(name: str) -> None:
    raw, config = fields(name), parsed(name)
    expected = {key: value for key, value in raw.items() if key not in ROTARY_FIELDS}
    if not raw.get("use_sliding_window", True):
        expected["sliding_window"] = None  # Qwen writes a window down and then does not use it
    if raw["model_type"] == "t5":
        expected["scale_decoder_outputs"] = expected.pop("tie_word_embeddings")
    if "dtype" in raw:
        expected["dtype"] = getattr(torch, raw["dtype"])
    assert {key: getattr(config, key, "missing") for key in expected} == expected


@pytest.mark.parametrize("name", [name for name in catalog.names() if about(name)["task"] == "causal-lm"])
def test_head_is_tied_as_published(name: str) -> None:
    model = built(name)
    tied = model.lm_head.weight is model.get_input_embeddings().weight
    assert tied == fields(name).get("tie_word_embeddings", True)


@pytest.mark.parametrize("name", [name for name in catalog.names() if "rope_theta" in fields(name)])
def test_rotary_frequencies(name: str) -> None:
    raw, config = fields(name), parsed(name)
    rotary = type(built(name).model.rotary_emb)(config)
    if "rope_local_base_freq" in raw:
        check_frequencies(rotary.full_attention_inv_freq, raw, raw["rope_theta"])
        check_frequencies(rotary.sliding_attention_inv_freq, raw | {"rope_scaling": None}, raw["rope_local_base_freq"])
    else:
        check_frequencies(rotary.inv_freq, raw, raw["rope_theta"])


def check_frequencies(actual: torch.Tensor, raw: dict[str, Any], theta: float) -> None:
    """Compare with the papers' formulas in float64: RoPE, Llama 3's stretched wavelengths, LongRoPE's short factors."""
    head = raw.get("head_dim") or raw["hidden_size"] // raw["num_attention_heads"]
    rotated = int(head * raw.get("partial_rotary_factor", 1.0))
    expected = theta ** -(torch.arange(0, rotated, 2, dtype=torch.float64) / rotated)
    scaling = raw.get("rope_scaling") or {}
    if scaling.get("rope_type") == "llama3":
        low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
        periods = scaling["original_max_position_embeddings"] * expected / (2 * math.pi)
        kept = ((periods - low) / (high - low)).clamp(0, 1)
        expected = expected * (kept + (1 - kept) / scaling["factor"])
    elif scaling.get("type") == "longrope":
        expected = expected / torch.tensor(scaling["short_factor"], dtype=torch.float64)
    torch.testing.assert_close(actual.double(), expected, rtol=1e-5, atol=0)


def test_sliding_windows_lie_where_the_papers_put_them() -> None:
    gemma_2, gemma_3 = parsed("gemma-2-9b").layer_types, parsed("gemma-3-1b").layer_types
    assert gemma_2 == ["sliding_attention", "full_attention"] * 21
    assert [layer for layer, kind in enumerate(gemma_3) if kind == "full_attention"] == [5, 11, 17, 23]
    assert set(parsed("qwen2.5-7b").layer_types) == {"full_attention"}


@pytest.mark.parametrize("name", ["t5-11b", "T5-11B", "google-t5/t5-11b", "GOOGLE-T5/t5-11b"])
def test_entry_is_found_by_name_and_hub_id_in_any_case(name: str) -> None:
    assert about(name)["hub_id"] == "google-t5/t5-11b"


def test_instruct_models_are_found_as_aliases() -> None:
    assert catalog.entry("meta-llama/Llama-3.2-3B-Instruct") == catalog.entry("llama-3.2-3b")
    assert about("HuggingFaceTB/SmolLM2-135M-Instruct")["hub_id"] == "HuggingFaceTB/SmolLM2-135M"


@pytest.mark.parametrize("name", ["", "t5", "t5-11b.json", "../t5-11b", "meta-llama/Llama-3.2"])
def test_unknown_names_are_none(name: str) -> None:
    assert catalog.entry(name) is None


def test_entry_is_the_callers_own() -> None:
    first = catalog.entry("llama-3.2-1b")
    assert first is not None
    first["rope_scaling"]["factor"] = 1.0
    assert fields("llama-3.2-1b")["rope_scaling"]["factor"] == 32.0


def test_no_name_means_two_models() -> None:
    called = [
        alias.casefold() for name in catalog.names() for alias in (about(name)["hub_id"], *about(name)["aliases"])
    ]
    called += [name.casefold() for name in catalog.names()]
    assert len(called) == len(set(called))


@pytest.mark.parametrize("name", catalog.names())
def test_entry_says_where_it_is_from(name: str) -> None:
    assert about(name).keys() - {"same_sizes_as"} == {"hub_id", "aliases", "parameters", "task", "source"}
    assert catalog.traced_as(name) in catalog.names()
    assert about(name)["source"] and about(name)["hub_id"].count("/") == 1


def test_catalogue_needs_neither_torch_nor_transformers() -> None:
    code = "import sys, edgepeft.catalog as c; c.entry('gpt2'); print({'torch', 'transformers'} & sys.modules.keys())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
