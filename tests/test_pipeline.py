"""The whole way, on real models and data: every stage, what is skipped the second time, and what is refused."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import training
from transformers import AutoModelForSequenceClassification, AutoTokenizer, GenerationConfig

from edgepeft import ledger, pipeline
from edgepeft.errors import EdgePeftError, UsageError
from edgepeft.export import quantize
from edgepeft.recipe import Recipe
from edgepeft.runtime.device import Device

ROOT = Path(__file__).parents[1]
MODELS, DATA = ROOT / "models", ROOT / "data"


@pytest.fixture(autouse=True, scope="module")
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> object:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EDGEPEFT_CACHE", str(tmp_path_factory.mktemp("traces")))
        yield


def classifier(**changes: object) -> Recipe:
    values: dict[str, object] = {
        "model": str(MODELS / "minilm-l6"),
        "data": str(DATA / "sentiment"),
        "max_tokens": 64,
        "method": "lora",
        "precision": "fp32",
        "checkpointing": False,
        "lr": 2e-3,
        "max_steps": 60,
        "evaluations": 2,
        "validation_limit": 200,
    }
    return Recipe(**{**values, **changes})  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def tuned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("run") / "minilm"
    pipeline.run(classifier(), out)
    return out


def rows(out: Path) -> dict[str, ledger.Row]:
    return {row.artefact: row for row in ledger.read(out / "ledger.json")}


def test_a_classifier_learns_and_keeps_it_to_the_device(tuned: Path) -> None:
    found = rows(tuned)
    assert found["adapter"].metrics["accuracy"] > found["base"].metrics["accuracy"] + 0.1
    assert found["merged-fp32"].deviation is not None and found["merged-fp32"].deviation < 1e-5
    assert found["onnx-fp32"].deviation is not None and found["onnx-fp32"].deviation < 1e-4
    assert found["onnx-fp32"].metrics["accuracy"] == found["merged-fp32"].metrics["accuracy"]
    assert (found["onnx-int8"].bytes or 0) < 0.35 * (found["onnx-fp32"].bytes or 0)
    assert sum(row.kept for name, row in found.items() if name.startswith("onnx")) == 1
    answer = Device.load(tuned / "device").classify("A warm, funny and wonderful film.")
    assert {label for label, _ in answer} == {"negative", "positive"}


def test_the_merged_folder_is_a_normal_model(tuned: Path) -> None:
    model, info = AutoModelForSequenceClassification.from_pretrained(tuned / "merged", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert model.config.id2label == {0: "negative", 1: "positive"}


def test_measured_memory_is_near_what_was_predicted(tuned: Path) -> None:
    events = [json.loads(line) for line in (tuned / "events.jsonl").read_text().splitlines()]
    predicted = next(event["predicted_peak_bytes"] for event in events if event["event"] == "start")
    measured = next(event["measured_peak_bytes"] for event in events if event["event"] == "end")
    assert predicted == pytest.approx(measured, rel=0.1)


def test_every_phase_was_measured_and_is_near_what_was_predicted(tuned: Path) -> None:
    """Those that operators do not tell are of a process that loads libraries on the way, many times such a model."""
    planned = json.loads((tuned / "plan.json").read_text())
    ended = json.loads((tuned / "events.jsonl").read_text().splitlines()[-1])
    measured = {**ended["measured_phases"], **planned["measured_phases"]}
    predicted = planned["predicted_phases"]
    assert set(predicted) == set(measured)
    for phase in measured.keys() - {"loading", "reloading", "exporting"}:
        assert predicted[phase] == pytest.approx(measured[phase], rel=0.1), phase


def test_a_run_counts_what_the_survey_asks_for(tuned: Path) -> None:
    """Guidelines 1 and 2: what is trained, what changes and of which rank, bytes, memory and speed."""
    found = rows(tuned)
    stage, *_ = found["adapter"].stages
    assert stage["tokens_per_second"] > 0 and stage["peak_bytes"] > 0
    assert found["adapter"].counts["trained_parameters"] > 0 and (found["adapter"].bytes or 0) > 0
    merged = next(row for name, row in found.items() if name.startswith("merged") and row.kept).counts
    assert 0 < merged["rank_of_change"] <= ledger.RANKS and merged["changed_parameters"] > 0
    assert merged["tokens_per_second_unmerged"] > 0 and merged["tokens_per_second_merged"] > 0


def test_the_report_needs_no_network(tuned: Path) -> None:
    page = (tuned / "report.html").read_text()
    assert "merged-fp32" in page and "http://" not in page.replace("http://www.w3.org", "") and "src=" not in page


def test_the_same_command_again_does_nothing_anew(tuned: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in tuned.rglob("*.onnx*")}
    said: list[str] = []
    pipeline.run(classifier(), tuned, say=said.append)
    assert {path: path.stat().st_mtime_ns for path in tuned.rglob("*.onnx*")} == before
    assert [line for line in said if line.endswith("done before")] == [
        "train: done before",
        "merge: done before",
        "export: done before",
    ]


def test_a_different_run_is_refused_and_nothing_is_lost(tuned: Path) -> None:
    with pytest.raises(UsageError, match="already holds a different run") as caught:
        pipeline.run(classifier(method="ln_tuning"), tuned)
    assert "method" in caught.value.cause
    assert (tuned / "device" / "manifest.json").exists()


@pytest.mark.parametrize(
    ("method", "options"),
    [("cross_attention", {}), ("phm_adapter", {"n": 5}), ("top_layers", {"layers": 7}), ("spot", {})],
)
def test_a_method_that_does_not_fit_the_model_is_refused_before_the_data_is_tokenised(
    method: str, options: dict[str, int], tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=f"^{method} "):
        pipeline.run(classifier(method=method, options=options, lr=None), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_tokenizer_with_more_tokens_than_the_model_is_refused(tmp_path: Path) -> None:
    home = Path(shutil.copytree(training.source("causal-lm"), tmp_path / "source"))
    config = json.loads((home / "model" / "config.json").read_text())
    (home / "model" / "config.json").write_text(json.dumps({**config, "vocab_size": 50}))
    asked = Recipe(model=str(home / "model"), data=str(home / "data.jsonl"), method="lora")
    with pytest.raises(UsageError, match="makes token [0-9]+, and the model knows 50") as caught:
        pipeline.run(asked, tmp_path / "run")
    assert "resize_token_embeddings" in caught.value.remedy and not (tmp_path / "run" / "recipe.toml").exists()


def test_a_damaged_adapter_is_named(tuned: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(tuned, copy)
    adapter = copy / "adapter" / "adapter.safetensors"
    adapter.write_bytes(adapter.read_bytes()[:1000])
    with pytest.raises(EdgePeftError, match="adapter.safetensors cannot be read"):
        pipeline.run(classifier(), copy, until="merge")


def test_a_variant_that_overflows_is_refused_and_another_one_is_shipped(
    tuned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def overflowing(source: Path, variant: str, task: str, target: Path) -> None:
        shutil.copytree(source, target)
        proto = onnx.load(target / "model.onnx")
        table = max(proto.graph.initializer, key=lambda tensor: math.prod(tensor.dims))
        weights = np.full_like(onnx.numpy_helper.to_array(table), np.nan)
        table.CopyFrom(onnx.numpy_helper.from_array(weights, table.name))
        onnx.save(proto, target / "model.onnx")

    copy = tmp_path / "copy"
    shutil.copytree(tuned, copy)
    shutil.rmtree(copy / "device")
    shutil.rmtree(copy / "onnx")
    monkeypatch.setattr(quantize, "quantize", overflowing)
    pipeline.run(classifier(), copy)
    found = rows(copy)
    assert not found["onnx-int8"].kept and "not numbers" in found["onnx-int8"].note
    assert found["onnx-fp32"].kept and Device.load(copy / "device").classify("Fine.")
    json.loads((copy / "ledger.json").read_text(), parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))


def test_seq2seq_with_an_unmergeable_method_on_nf4(tmp_path: Path) -> None:
    recipe = Recipe(
        model=str(MODELS / "t5-tiny"),
        data=str(DATA / "sentiment-seq2seq"),
        max_tokens=48,
        method="lst",
        precision="nf4",
        options={"reduction": 4},
        max_steps=6,
        evaluations=1,
        validation_limit=32,
    )
    space = pipeline.run(recipe, tmp_path / "t5")
    found = rows(space.root)
    assert not space.merged.exists() and found["onnx-fp32"].same_tokens == 1.0
    counted = found["adapter"].counts
    assert counted["changed_parameters"] == counted["trained_parameters"] > 0
    assert counted["tokens_per_second_backbone"] > 0 and counted["tokens_per_second_unmerged"] > 0
    assert [stage["name"] for stage in found["adapter"].stages] == ["train"]
    assert isinstance("".join(Device.load(space.device).generate("A fine film.", max_new_tokens=4)), str)


def test_qlora_on_a_language_model_measures_every_merge(tmp_path: Path) -> None:
    recipe = Recipe(
        model=str(MODELS / "smollm2-135m-instruct"),
        data=str(DATA / "sentiment-chat"),
        max_tokens=96,
        method="qlora",
        microbatch=4,
        global_batch=4,
        max_steps=3,
        evaluations=1,
        validation_limit=8,
    )
    space = pipeline.run(recipe, tmp_path / "qlora", until="merge")
    found = rows(space.root)
    assert {"base", "adapter", "merged-dequantised", "merged-original", "merged-nf4"} <= found.keys()
    assert (found["merged-dequantised"].deviation or 1) < 1e-5
    kept = [row for name, row in found.items() if name.startswith("merged") and row.kept]
    best = min(found["merged-dequantised"].metrics["loss"], found["merged-original"].metrics["loss"])
    assert len(kept) == 1 and kept[0].metrics["loss"] == best and (space.merged / "model.safetensors").exists()


def test_a_run_goes_on_where_its_model_and_data_were_moved_to(tmp_path: Path) -> None:
    home = Path(shutil.copytree(training.source("causal-lm"), tmp_path / "here"))
    asked = Recipe(
        model=str(home / "model"), data=str(home / "data.jsonl"), method="lora", precision="fp32", max_steps=2
    )
    pipeline.run(asked, tmp_path / "run", until="train")
    home.rename(tmp_path / "there")
    out = Path(shutil.copytree(tmp_path / "run", tmp_path / "copy"))
    shutil.rmtree(out / "checkpoints")
    made = (out / "adapter" / "adapter.safetensors").read_bytes()
    moved = replace(asked, model=str(tmp_path / "there" / "model"), data=str(tmp_path / "there" / "data.jsonl"))
    pipeline.run(moved, out, until="merge")
    assert (out / "adapter" / "adapter.safetensors").read_bytes() == made
    before, after = (GenerationConfig.from_pretrained(folder).eos_token_id for folder in (moved.model, out / "merged"))
    closing = AutoTokenizer.from_pretrained(out / "merged").eos_token_id  # what training closes an answer with
    assert before != closing and after == sorted({before, closing} - {None})
    other = Path(shutil.copytree(tmp_path / "there" / "model", tmp_path / "other"))
    (other / "config.json").write_text((other / "config.json").read_text() + " ")
    with pytest.raises(UsageError, match="already holds a different run") as caught:
        pipeline.run(replace(moved, model=str(other)), out, until="merge")
    assert caught.value.cause.startswith("model differ")
    (tmp_path / "there" / "data.jsonl").write_text('{"prompt": "a", "completion": "b"}\n' * 9)
    with pytest.raises(UsageError, match="has changed: the data"):
        pipeline.run(moved, out, until="merge")
    assert (out / "adapter" / "adapter.safetensors").read_bytes() == made
