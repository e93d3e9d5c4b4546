"""Models are found by name, loaded for a task, refused with reasons, and saved as folders that load again."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import tiny
import tiny_tokenizers
import torch
import transformers
from safetensors.torch import load_file

from edgepeft import backbone, step, tasks
from edgepeft.errors import EdgePeftError, UsageError

MODELS = Path(__file__).resolve().parent.parent / "models"


def test_a_folder_a_gguf_file_a_catalogue_name_and_a_hub_id(tmp_path: Path) -> None:
    folder = tiny.folder("llama")
    assert backbone.resolve(str(folder)) == backbone.Source(str(folder), str(folder))
    file = tmp_path / "model.gguf"
    file.touch()
    assert backbone.resolve(str(file)) == backbone.Source(str(file), str(tmp_path), gguf="model.gguf")
    known = backbone.resolve("t5-11b")
    assert known.location == "google-t5/t5-11b" and known.known is not None and known.known["d_ff"] == 65536
    assert backbone.resolve("owner/name") == backbone.Source("owner/name", "owner/name")


@pytest.mark.parametrize(
    ("name", "fact", "remedy"),
    [
        ("t5-smal", "There is no model 't5-smal'", "t5-small"),
        ("./nowhere", "There is no model './nowhere'", ""),
        ("a/b/c", "There is no model 'a/b/c'", ""),
        ("nowhere.gguf", "There is no file nowhere.gguf", "GGUF"),
    ],
)
def test_unknown_names(name: str, fact: str, remedy: str) -> None:
    with pytest.raises(UsageError) as caught:
        backbone.resolve(name)
    assert fact in caught.value.fact and remedy in caught.value.remedy


def test_a_folder_without_a_model(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="holds no model") as caught:
        backbone.resolve(str(tmp_path))
    assert "no config.json" in caught.value.cause


def test_the_catalogue_gives_configurations_without_a_network() -> None:
    config = backbone.config(backbone.resolve("t5-11b"))
    assert (config.model_type, config.d_model, config.num_layers) == ("t5", 1024, 24)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_default_task(family: str) -> None:
    assert tasks.default_task(tiny.configuration(family)) == tiny.task(family)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_what_was_saved_is_read_beside_the_model(family: str, tmp_path: Path) -> None:
    class Unsaved:
        def save_pretrained(self, folder: Path) -> None: ...

    made, other = tiny.load(family).model, tiny.load(family).model
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.normal_()
    backbone.save(other, tmp_path, Unsaved())
    expected = {id(own): there for own, there in zip(made.parameters(), other.parameters(), strict=True)}
    found = dict((id(own), read) for own, read in backbone.saved(tmp_path, made))
    assert found.keys() == expected.keys()
    assert all(torch.equal(read, expected[key]) for key, read in found.items())
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(EdgePeftError, match="has no"):
        list(backbone.saved(tmp_path, made))


@pytest.mark.parametrize(
    ("family", "saved_as", "task"),
    [
        ("llama", "LlamaForSequenceClassification", "classification"),
        ("t5", "T5ForConditionalGeneration", "seq2seq"),
        ("bert", "BertModel", "classification"),
        ("gpt2", "OfNoLibrary", "causal-lm"),
    ],
)
def test_a_checkpoint_is_usually_for_what_it_was_saved_for(family: str, saved_as: str, task: str) -> None:
    configuration = tiny.configuration(family)
    configuration.architectures = [saved_as]
    assert tasks.usual_task(configuration) == task


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_positions_are_as_many_as_the_model_can_read(family: str) -> None:
    assert backbone.positions(tiny.configuration(family)) == (None if tiny.task(family) == "seq2seq" else 64)


@pytest.mark.parametrize("family", ["Roberta", "Camembert", "XLMRoberta", "Data2VecText", "Luke", "MarkupLM"])
def test_roberta_and_its_like_start_counting_positions_after_their_padding(family: str) -> None:
    """The longest input that does not fail in the model itself."""
    sizes = {"vocab_size": 16, "hidden_size": 8, "intermediate_size": 8, "max_position_embeddings": 12}
    sizes |= {"num_hidden_layers": 1, "num_attention_heads": 2, "pad_token_id": 1}
    config = getattr(transformers, f"{family}Config")(**sizes)
    longest = backbone.positions(config)
    assert longest is not None
    model = getattr(transformers, f"{family}Model")(config).eval()
    model(torch.full((1, longest), 5))
    with pytest.raises((IndexError, RuntimeError), match="out of"):
        model(torch.full((1, longest + 1), 5))


@pytest.mark.parametrize("at", ["fp32", "bf16", "nf4"])
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_a_loaded_model_is_frozen_and_computes_what_transformers_computes(family: str, at: str) -> None:
    made = tiny.load(family, at)
    assert not made.model.training and not [p for p in made.model.parameters() if p.requires_grad]
    assert all(p.dtype == (torch.float32 if at == "fp32" else torch.bfloat16) for p in made.model.parameters())
    if at == "fp32":
        reference = tiny.model(family)
        batch = step.inputs(tiny.batch(family))
        torch.testing.assert_close(made.model(**batch).logits, reference(**batch).logits)


@pytest.mark.parametrize("at", ["fp32", "bf16", "nf4", "int8"])
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_a_skeleton_has_the_shapes_of_the_loaded_model(family: str, at: str) -> None:
    real = tiny.load(family, at)
    with torch.device("meta"):
        planned = backbone.skeleton(tiny.configuration(family), task=tiny.task(family), at=at, labels=tiny.LABELS)

    def shapes(model: torch.nn.Module) -> dict[str, tuple[Any, ...]]:
        tensors = [*model.named_parameters(), *model.named_buffers()]
        return {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in tensors}

    assert shapes(planned.model) == shapes(real.model)
    assert planned.fresh == real.fresh
    assert planned.anatomy == real.anatomy


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_saved_models_load_again(family: str, tmp_path: Path) -> None:
    made = tiny.load(family)
    backbone.save(made.model, tmp_path / "saved", tiny_tokenizers.byte_level())
    loader = {"classification": "SequenceClassification", "causal-lm": "CausalLM", "seq2seq": "Seq2SeqLM"}[made.task]
    again = getattr(transformers, f"AutoModelFor{loader}").from_pretrained(tmp_path / "saved").eval()
    batch = step.inputs(tiny.batch(family))
    torch.testing.assert_close(again(**batch).logits, made.model(**batch).logits)
    assert type(again) is type(tiny.model(family))
    if made.task != "classification":
        tied = again.get_output_embeddings().weight is again.get_input_embeddings().weight
        assert tied == (family in ("qwen3", "gemma2", "gpt2", "t5"))
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "saved").eos_token == "<|im_end|>"


def test_gpt2_is_stored_transposed_as_transformers_does(tmp_path: Path) -> None:
    backbone.save(tiny.load("gpt2").model, tmp_path, tiny_tokenizers.byte_level())
    ours, theirs = load_file(tmp_path / "model.safetensors"), load_file(tiny.folder("gpt2") / "model.safetensors")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert ours["transformer.h.0.attn.c_attn.weight"].shape == (32, 96)


def test_labels_and_their_head() -> None:
    """A head of another size starts anew, the same on the same seed; one of the right size stays. Both are trained."""
    source = backbone.resolve(str(tiny.folder("bert")))

    def load(labels: list[str], seed: int = 0) -> backbone.Backbone:
        return backbone.load(source, task="classification", at="fp32", labels=labels, seed=seed)

    kept, anew = load(["a", "b", "c"]), load(["a", "b"])
    stored = load_file(tiny.folder("bert") / "model.safetensors")
    assert torch.equal(kept.model.get_parameter("classifier.weight"), stored["classifier.weight"])
    weight = anew.model.get_parameter("classifier.weight")
    assert weight.shape == (2, 32)
    assert torch.equal(weight, load(["a", "b"]).model.get_parameter("classifier.weight"))
    assert not torch.equal(weight, load(["a", "b"], seed=1).model.get_parameter("classifier.weight"))
    assert kept.fresh == anew.fresh == {"classifier.weight", "classifier.bias"}
    assert anew.model.config.id2label == {0: "a", 1: "b"} and anew.model.config.label2id == {"a": 0, "b": 1}


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("given", [None, 9])
def test_decoders_classify_at_the_last_token_before_padding(family: str, given: int | None) -> None:
    """GPT-2's configuration names no padding, and a tokenizer's may be another than that of the configuration."""
    source = backbone.resolve(str(tiny.folder(family)))
    made = backbone.load(source, task="classification", at="fp32", labels=["a", "b"], padding=given)
    assert made.fresh == {"score.weight"}
    padding = made.model.config.pad_token_id if given is None else given
    ids = torch.tensor([[5, 6, 7, padding, padding]])
    mask = torch.tensor([[1, 1, 1, 0, 0]])
    alone = made.model(input_ids=ids[:, :3]).logits
    padded = made.model(input_ids=ids.repeat(2, 1), attention_mask=mask.repeat(2, 1)).logits
    torch.testing.assert_close(padded[0], alone[0])


@pytest.mark.parametrize(
    ("family", "task", "part"),
    [("llama", "seq2seq", "Unrecognized configuration"), ("t5", "causal-lm", "Unrecognized configuration")],
)
def test_a_task_the_model_does_not_have(family: str, task: str, part: str) -> None:
    with pytest.raises(UsageError, match="could not be loaded") as caught:
        backbone.load(backbone.resolve(str(tiny.folder(family))), task=task, at="fp32")
    assert part in caught.value.cause
    with pytest.raises(UsageError, match=f"not trained for {task}"), torch.device("meta"):
        backbone.skeleton(tiny.configuration(family), task=task, at="fp32")


def test_an_encoder_is_not_taken_for_a_language_model() -> None:
    """transformers would load BERT as one, and every position would see the answer it predicts."""
    with pytest.raises(UsageError, match="bert model is not trained for causal-lm"):
        backbone.load(backbone.resolve(str(tiny.folder("bert"))), task="causal-lm", at="fp32")


def test_gguf_loads_the_weights_of_the_converted_folder_and_saves_them(tmp_path: Path) -> None:
    made = backbone.load(backbone.resolve(str(MODELS / "smollm2-135m-instruct.gguf")), task="causal-lm", at="bf16")
    assert (made.model.config.num_hidden_layers, made.model.config.hidden_size) == (30, 576)
    assert made.model.get_output_embeddings().weight is made.model.get_input_embeddings().weight
    backbone.save(made.model, tmp_path, tiny_tokenizers.byte_level())
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (tmp_path, MODELS / "smollm2-135m-instruct"))
    assert ours.keys() == theirs.keys() and len(ours) == 272
    assert all(torch.equal(ours[name], tensor) for name, tensor in theirs.items())
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())


def test_gguf_splits_text_as_the_model_learned_it() -> None:
    """Each digit alone; transformers splits as GPT-2 does, which gives other tokens near numbers."""
    ours, theirs = (
        backbone.tokenizer(backbone.resolve(str(MODELS / f"smollm2-135m-instruct{ending}"))) for ending in (".gguf", "")
    )
    for text in ("the 324 metres", "Hello  world\n\n 123 don't", "\u6f22\u5b57 \u0661\u0662 \u00bd x2"):
        assert ours(text)["input_ids"] == theirs(text)["input_ids"]


@pytest.mark.parametrize("shown", [True, False])
def test_progress_bars_are_as_they_were_after_loading(shown: bool) -> None:
    logging = transformers.utils.logging
    before = logging.is_progress_bar_enabled()
    switch = {True: logging.enable_progress_bar, False: logging.disable_progress_bar}
    switch[shown]()
    try:
        tiny.load("bert")
        assert logging.is_progress_bar_enabled() == shown
    finally:
        switch[before]()


def test_a_roberta_without_a_padding_token_is_refused(tmp_path: Path) -> None:
    """transformers builds it, and fails in its first step."""
    config = transformers.RobertaConfig(
        vocab_size=16, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, max_position_embeddings=12
    )
    (tmp_path / "config.json").write_text(json.dumps({**config.to_dict(), "pad_token_id": None}))
    with pytest.raises(UsageError, match="describes no model") as caught:
        backbone.config(backbone.resolve(str(tmp_path)))
    assert "pad_token_id is None" in caught.value.cause


@pytest.mark.parametrize("family", ["Bart", "Pegasus"])
def test_an_encoder_decoder_of_another_build_is_no_wrong_configuration(family: str, tmp_path: Path) -> None:
    getattr(transformers, f"{family}Config")().save_pretrained(tmp_path)
    with pytest.raises(UsageError, match=rf"architecture that edgepeft does not know \({family.lower()}\)"):
        backbone.config(backbone.resolve(str(tmp_path)))


@pytest.mark.parametrize("family", ["llama", "bert", "t5"])
def test_outputs_have_names_whatever_the_configuration_says(family: str, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny.folder(family), tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"return_dict": False}))
    source, task = backbone.resolve(str(folder)), tiny.task(family)
    loaded = backbone.load(source, task=task, at="fp32")
    planned = backbone.skeleton(backbone.config(source), task=task, at="fp32")
    for made in (loaded, planned):
        assert step.outputs(made.model, tiny.batch(family)).dim() == 2


def test_a_dtype_that_is_none_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "torch_dtype": "auto"}))
    with pytest.raises(UsageError, match="could not be loaded"):
        backbone.config(backbone.resolve(str(tmp_path)))
