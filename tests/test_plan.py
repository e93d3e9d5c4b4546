"""Tracing: predictions against real tensors, and what is extrapolated against what is traced whole."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from planned import LLAMA, configuration, small_plan
from transformers import BertConfig, Gemma3TextConfig, GPT2Config, LlamaConfig, T5Config

from edgepeft import backbone, candidate, extrapolate, hardware, probe, traces
from edgepeft.cross_entropy import CHUNK_BYTES
from edgepeft.cuda_device import Device
from edgepeft.errors import UsageError
from edgepeft.methods import base
from edgepeft.precision import emulating
from edgepeft.step import TrainingStep
from edgepeft.surface import ADAMW, EIGHT_BIT, KINDS, read
from edgepeft.trace import Tracker

DEEP = {**LLAMA, "num_hidden_layers": 18}
BERT = backbone.as_fields(
    BertConfig(vocab_size=256, hidden_size=64, intermediate_size=160, num_hidden_layers=6, num_attention_heads=4)
)
GPT2 = backbone.as_fields(GPT2Config(vocab_size=256, n_embd=64, n_layer=6, n_head=4, n_positions=64))
T5 = backbone.as_fields(T5Config(vocab_size=256, d_model=64, d_kv=16, d_ff=128, num_layers=6, num_heads=4))
GEMMA3 = backbone.as_fields(  # a window shorter than what is read, in three layers of four
    Gemma3TextConfig(
        vocab_size=256,
        hidden_size=64,
        intermediate_size=160,
        num_hidden_layers=24,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        sliding_window=16,
        sliding_window_pattern=4,
    )
)


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDGEPEFT_CACHE", str(tmp_path_factory.getbasetemp() / "traces"))


@pytest.mark.parametrize(
    ("method", "precision", "optimizer", "within"),
    [
        ("lora", "fp32", ADAMW, 0.02),
        ("lora", "nf4", ADAMW, 0.02),
        ("lst", "nf4", ADAMW, 0.02),
        ("full", "fp32", ADAMW, 0.02),
        ("full", "fp32", EIGHT_BIT, 0.01),
        ("full", "bf16", EIGHT_BIT, 0.01),
    ],
)
def test_the_predicted_peak_is_what_real_tensors_take(
    method: str, precision: str, optimizer: str, within: float
) -> None:
    wanted = configuration(method, precision, bf16=False, optimizer=optimizer)
    predicted = max(peak.peak_bytes for peak in probe.peaks(wanted).values())
    fields = dict(LLAMA)
    config = LlamaConfig(**{name: value for name, value in fields.items() if name != "model_type"})
    torch.manual_seed(0)
    loaded = backbone.skeleton(config, task="causal-lm", at=precision)
    kind = base.create(method)
    base.apply(kind, loaded)
    loaded.model.train()
    made = kind.stages()[0].made(loaded.model, 1e-3, 0.0, optimizer)
    step = TrainingStep(loaded.model, made, clip_norm=1.0)
    ids = torch.randint(0, 512, (2, 32))
    mask = torch.ones_like(ids)
    mask[0, -1] = 0  # a mask without padding is skipped on real tensors
    batch = {
        "input_ids": ids,
        "attention_mask": mask,
        "target_positions": torch.arange(64),
        "target_ids": ids.flatten(),
    }
    tracker = Tracker(cuda=False)
    tracker.label([*loaded.model.parameters(), *loaded.model.buffers()], "weights")
    with emulating(bf16=False):  # as the prediction assumes, whatever this machine has
        for _ in range(2):
            with tracker.phase("step"):
                step.backward([batch], 1e-3)
                step.update()
    measured = tracker.peaks()["step"].peak_bytes
    assert predicted == pytest.approx(measured, rel=within)


@pytest.mark.parametrize(
    ("model", "method", "checkpointing", "cuda"),
    [
        (LLAMA, "full", True, True),
        (LLAMA, "lst", False, False),
        (T5, "lora", True, False),
        (T5, "full", False, True),
        (BERT, "lora", False, False),
        (GPT2, "full", False, True),
        ({**GPT2, "vocab_size": 21128}, "lora", False, True),  # 297 of its logits at a time, a multiple of 11
        (DEEP, "top_layers", False, False),
        ({**T5, "num_layers": 12, "num_decoder_layers": 4}, "full", False, True),
        ({**T5, "num_layers": 18, "num_decoder_layers": 6}, "lora", True, False),
        ({**T5, "num_decoder_layers": 12}, "full", False, True),
        (GEMMA3, "lora", True, False),
    ],
    ids=lambda value: value["model_type"] if isinstance(value, dict) else str(value),
)
def test_extrapolated_depth_and_microbatch_agree_with_a_full_trace(
    model: dict[str, object], method: str, checkpointing: bool, cuda: bool
) -> None:
    tasks = {"t5": "seq2seq", "bert": "classification"}
    task = tasks.get(str(model["model_type"]), "causal-lm")
    wanted = configuration(method, "fp32", model=model, task=task, cuda=cuda, checkpointing=checkpointing)
    if model is GEMMA3:
        wanted = replace(wanted, tokens=256)  # its masks are then large enough to be missed
    surface = extrapolate.surface(wanted)
    for microbatch in (1, 24):
        extrapolated = surface.peaks(microbatch)
        traced = probe.record(replace(wanted, microbatch=microbatch), whole=True).tracker.peaks()
        for phase in ("forward+backward", "update", "evaluation"):
            assert sum(extrapolated[phase].values()) == pytest.approx(traced[phase].peak_bytes, rel=0.002), phase


def test_what_has_a_method_s_rank_does_not_grow_with_the_microbatch() -> None:
    wide = {**LLAMA, "hidden_size": 512, "intermediate_size": 1024, "head_dim": 128, "vocab_size": 32000}
    wanted = configuration("lora", "bf16", model=wide, options={"rank": 88}, cuda=True)  # a multiple of 11
    surface = extrapolate.surface(wanted)
    for microbatch in (1, 24):
        traced = probe.record(replace(wanted, microbatch=microbatch), whole=False).tracker.peaks()["forward+backward"]
        found = sum(surface.peaks(microbatch)["forward+backward"].values())
        assert found == pytest.approx(traced.peak_bytes, rel=0.002)


@pytest.mark.parametrize("method", ("lora", "lets", "far"))
def test_both_ways_to_keep_activations_may_be_traced_together(method: str) -> None:
    """Also of a method with several stages: what one way leaves is not in the other's next stage."""
    wanted = configuration(method, model=BERT, task="classification")
    together = extrapolate.surfaces(wanted, [False, True])
    for again, found in zip((False, True), together, strict=True):
        alone = extrapolate.surface(replace(wanted, checkpointing=again))
        for microbatch in (1, 24):
            expected = {phase: sum(held.values()) for phase, held in alone.peaks(microbatch).items()}
            assert {p: sum(held.values()) for p, held in found.peaks(microbatch).items()} == pytest.approx(
                expected, rel=0.001
            )


@pytest.mark.parametrize(
    ("method", "precision"), [("lora", "nf4"), ("lora", "fp32"), ("full", "bf16"), ("fish_mask", "bf16")]
)
def test_every_phase_is_extrapolated_where_layers_come_between_what_is_alike(method: str, precision: str) -> None:
    """Loading and packing, an optimizer's loop over parameters, and what merging keeps: none is one layer's pass."""
    wanted = configuration(method, precision, model={**DEEP, "vocab_size": 4096}, microbatch=8)
    found, recording = extrapolate.surface(wanted).peaks(8), probe.record(wanted, whole=True)
    truth = recording.tracker.peaks()
    for phase in found.keys() & truth.keys():
        file = 4 * recording.parameters if phase == "loading" and precision != "fp32" else 0
        assert sum(found[phase].values()) == pytest.approx(truth[phase].peak_bytes + file, rel=0.005), phase


def test_on_a_cpu_a_file_in_another_dtype_is_in_memory_beside_what_is_made_of_it() -> None:
    """Of MiniLM's kind (fp32 files) and of SmolLM2's (bf16 files); a GPU holds none of it."""
    deep = {**DEEP, "vocab_size": 4096}
    parameters = probe.record(configuration(model=deep), whole=False).parameters

    def loading(precision: str, dtype: str, cuda: bool = False) -> list[int]:
        wanted = configuration("lora", precision, model={**deep, "dtype": dtype}, cuda=cuda)
        found = extrapolate.surface(wanted).peaks(1)
        return [sum(found.get(phase, {}).values()) for phase in ("loading", "reloading")]

    size = {at: loading(at, "float32")[0] for at in ("fp32", "bf16")}
    assert size["fp32"] == pytest.approx(4 * parameters, rel=0.01), "its tensors are views of the file"
    assert size["bf16"] == pytest.approx(6 * parameters, rel=0.01)
    assert loading("bf16", "bfloat16")[0] == pytest.approx(2 * parameters, rel=0.01)
    assert loading("nf4", "bfloat16")[0] > 2 * parameters, "all of the file stays until the last layer is packed"
    assert loading("nf4", "float32")[0] > 6 * parameters
    assert loading("nf4", "bfloat16")[1] == pytest.approx(6 * parameters, rel=0.01), "the original is merged in fp32"
    assert 4 * parameters < loading("nf4", "float32")[1] < 6 * parameters
    assert loading("bf16", "float32", cuda=True) == [pytest.approx(2 * parameters, rel=0.01), 0]


def test_freed_memory_is_kept_only_where_there_is_enough() -> None:
    """A CPU without much room trains in less, at the same microbatch; the verdict is of what it then needs."""
    pi = hardware.load("raspberry-pi-5-8gb")
    wanted = {"microbatch": 64, "tokens": 512}
    roomy = small_plan(hardware=pi, **wanted).chosen()
    least = candidate.needed_bytes(roomy.reserved_bytes, pi)
    passing = roomy.bytes["activations"] + roomy.bytes["temporaries"]
    assert roomy.ample and roomy.process_bytes == pytest.approx(least + candidate.KEPT * passing, abs=1)
    small = hardware.Hardware(**{**vars(pi), "memory_bytes": pi.reserved_bytes + (least + roomy.process_bytes) // 2})
    tight = small_plan(hardware=small, **wanted).chosen()
    assert tight.fits and not tight.ample and tight.process_bytes == least
    assert not small_plan(microbatch=64).chosen().ample, "a GPU's allocator is another matter"
    largest, run = (small_plan(hardware=pi, tokens=512, microbatch=size).chosen() for size in (None, 16))
    assert largest.run_microbatch == 16 < largest.microbatch
    assert run.ample and largest.run_process_bytes == run.process_bytes, "as the run's own plan has it"


def test_hopper_s_larger_workspaces_are_planned_as_they_are_traced(monkeypatch: pytest.MonkeyPatch) -> None:
    """Surfaces are shared by all architectures, and cuBLAS has 32 MiB for each of two threads on this one."""
    traced = {}
    for capability in ((8, 0), (9, 0)):
        monkeypatch.setattr(probe, "_device", lambda _, capability=capability: Device(capability))
        traced[capability] = probe.record(configuration(cuda=True), whole=True).tracker.peaks()
    more = 2 * ((32 << 20) - 8_519_680)
    differ = {phase: traced[9, 0][phase].peak_bytes - peak.peak_bytes for phase, peak in traced[8, 0].items()}
    assert {"evaluation", "merge"} < differ.keys()
    assert differ == {phase: 0 if phase == "loading" else more for phase in differ}
    ampere, hopper = (small_plan(hardware=hardware.load(gpu)).candidates[0] for gpu in ("a100-80gb", "h100-80gb"))
    assert {phase: hopper.phases[phase] - size for phase, size in ampere.phases.items()} == {
        phase: 0 if phase == "loading" else more for phase in ampere.phases
    }


def test_groups_of_layers_are_extrapolated_as_groups() -> None:
    """S4's layers are not alike. (At a microbatch of 1 its gradients are taken to be up to 4 % more than they are.)"""
    wanted = configuration("s4", model=DEEP, microbatch=24)
    found = extrapolate.surface(wanted).peaks(24)
    for phase, peak in probe.peaks(wanted).items():
        assert sum(found[phase].values()) == pytest.approx(peak.peak_bytes, rel=0.002)
        assert found[phase]["adapter"] == peak.bytes["adapter"]


@pytest.mark.parametrize(("method", "task"), [("attention_fusion", "classification"), ("diff_pruning", "causal-lm")])
def test_what_is_done_around_the_loss_may_grow_with_the_layers(method: str, task: str) -> None:
    wanted = configuration(method, "bf16", microbatch=1, task=task)
    found = extrapolate.surface(wanted).peaks(1)
    for phase, peak in probe.peaks(wanted).items():
        assert sum(found[phase].values()) == pytest.approx(peak.peak_bytes, rel=0.05), phase


@pytest.mark.parametrize(("method", "options"), [("top_layers", {"layers": 7}), ("intrinsic_said", {"dimension": 42})])
def test_what_the_whole_depth_refuses_is_refused_while_shallower_models_are_traced(
    method: str, options: dict[str, int]
) -> None:
    """Six layers have 42 matrices."""
    with pytest.raises(UsageError) as caught:
        extrapolate.surface(configuration(method, options=options))
    assert " 6." in caught.value.cause or "42 layers" in caught.value.cause


@pytest.mark.parametrize(
    ("method", "changes"),
    [("lora", {"model": {**LLAMA, "vocab_size": 60_000}, "tokens": 128}), ("full", {"model": T5, "task": "seq2seq"})],
)
def test_extrapolated_work_is_that_of_the_whole_step(method: str, changes: dict[str, object]) -> None:
    wanted = configuration(method, "bf16", cuda=True, **changes)
    traced = probe.record(replace(wanted, microbatch=7), whole=False).tracker.work()
    for phase, work in extrapolate.surface(wanted).work_at(7).items():
        for part, tolerance in (("calls", 0.03), ("flops", 0.005), ("bytes", 0.005)):  # calls: chunks are whole
            sums = [sum(getattr(each, part) for each in found.values()) for found in (work, traced[phase])]
            assert sums[0] == pytest.approx(sums[1], rel=tolerance), (phase, part)


def test_a_surface_survives_its_file() -> None:
    surface = extrapolate.surface(configuration("lora", "nf4", checkpointing=True))
    again = read(json.loads(json.dumps(surface.plain())))
    for microbatch in (1, 7, 300):
        assert sum(again.at(microbatch)[1].values()) == pytest.approx(sum(surface.at(microbatch)[1].values()), rel=1e-4)
        assert again.work_at(microbatch) == surface.work_at(microbatch)


def test_loading_onto_a_cpu_holds_the_unpacked_model_and_onto_a_gpu_one_layer_of_it() -> None:
    on_cpu = extrapolate.surface(configuration("lora", "nf4", cuda=False)).peaks(1)["loading"]
    on_gpu = extrapolate.surface(configuration("lora", "nf4", cuda=True)).peaks(1)["loading"]
    linears = 6 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 160)
    assert sum(on_cpu.values()) > 2 * linears > sum(on_gpu.values()) - 2 * 2 * 512 * 64 - 2 * 64 * 160


def test_kinds_add_up_and_mean_what_they_say() -> None:
    peak = probe.peaks(configuration("lora", "bf16", cuda=True, accumulates=True))["forward+backward"]
    assert set(peak.bytes) == set(KINDS)
    assert sum(peak.bytes.values()) == peak.peak_bytes
    trained = 6 * 8 * 2 * (64 + 64 + 64 + 32 + 64 + 32 + 64 + 64 + 3 * (64 + 160)) // 2
    assert peak.bytes["adapter"] == pytest.approx(4 * trained, rel=0.15)  # fp32, rounded up to 512 bytes a tensor
    assert peak.bytes["optimizer"] == pytest.approx(2 * peak.bytes["adapter"], rel=0.15)
    assert peak.bytes["activations"] > 0


def test_checkpointing_and_lst_need_fewer_activations() -> None:
    kept, again, side = (
        probe.peaks(configuration(method, "bf16", cuda=True, checkpointing=checkpointing, tokens=128))
        for method, checkpointing in (("lora", False), ("lora", True), ("lst", False))
    )
    name = "forward+backward"
    assert again[name].bytes["activations"] < 0.4 * kept[name].bytes["activations"]
    assert side[name].bytes["activations"] < 0.4 * kept[name].bytes["activations"]


def test_a_large_vocabulary_never_has_all_its_logits() -> None:
    fields = {**LLAMA, "vocab_size": 120_000, "num_hidden_layers": 2}
    peak = probe.peaks(configuration("lora", "bf16", model=fields, tokens=512, cuda=True))["forward+backward"]
    logits = 2 * 512 * 120_000 * 4
    assert peak.bytes["temporaries"] < 4 * CHUNK_BYTES < logits


def test_traces_are_cached(monkeypatch: pytest.MonkeyPatch) -> None:
    (first,) = traces.find([configuration()])
    monkeypatch.setattr(extrapolate, "surface", lambda configuration: pytest.fail("traced again"))
    assert traces.find([configuration()]) == [first]
