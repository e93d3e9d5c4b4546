"""The training step on this CPU: the peak of tensor bytes that ``probe`` predicts, and what PyTorch's allocator counts.

The prediction traces fake tensors. The measurement runs the same set-up on real ones: bytes of all live storages when
the second step begins, plus the highest running sum of the profiler's allocations and frees in that step. The profiler
sees what kernels allocate inside, which a trace does not, and it is no code of edgepeft's.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import sys
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from edgepeft import largest, precision, probe
from edgepeft.backbone import skeleton
from edgepeft.methods import base
from edgepeft.step import TrainingStep
from edgepeft.surface import Configuration

PRECISIONS = ("fp32", "bf16", "int8", "nf4")
TOKENS, MICROBATCH, TARGET_TOKENS = 64, 4, 16
_DECODER = {
    "vocab_size": 1024,
    "hidden_size": 128,
    "intermediate_size": 352,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 256,
    "tie_word_embeddings": False,
}
_ENCODER = {k: v for k, v in _DECODER.items() if k not in ("num_key_value_heads", "head_dim", "tie_word_embeddings")}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("causal-lm", {**_DECODER, "model_type": "llama"}),
    "gpt2": (
        "causal-lm",
        {"model_type": "gpt2", "vocab_size": 1024, "n_embd": 128, "n_layer": 4, "n_head": 4, "n_positions": 256},
    ),
    "bert": ("classification", {**_ENCODER, "model_type": "bert"}),
    "t5": (
        "seq2seq",
        {"model_type": "t5", "vocab_size": 1024, "d_model": 128, "d_kv": 32, "d_ff": 352, "num_layers": 4}
        | {"num_heads": 4, "decoder_start_token_id": 0, "pad_token_id": 0, "eos_token_id": 1},
    ),
}


def cases() -> list[tuple[str, str, str]]:
    """(method, family, precision) of all that edgepeft has; those that need other runs' prompts aside."""
    return [
        (method, family, at)
        for method in base.names()
        if method not in ("spot", "ipt")
        for family in FAMILIES
        for at in PRECISIONS
        if not (base.find(method).writes_backbone and precision.is_packed(at))
    ]


def compare(method: str, family: str, at: str) -> dict[str, Any]:
    """Predicted and measured peak bytes of every stage's step; ``refused`` where the method refuses the family."""
    from edgepeft.errors import UsageError

    task, model = FAMILIES[family]
    configuration = Configuration(
        model=model,
        task=task,
        method=method,
        options=base.find(method).narrow,
        precision=at,
        checkpointing=False,
        microbatch=MICROBATCH,
        tokens=TOKENS,
        target_tokens=TARGET_TOKENS,
        labels=2,
        accumulates=False,
        cuda=False,
        bf16=True,
    )
    try:
        predicted = max(peak.peak_bytes for peak in probe.peaks(configuration).values())
        return {"predicted": predicted, "measured": _measured(configuration)}
    except UsageError as error:
        return {"refused": error.fact}


def _measured(configuration: Configuration) -> int:
    from transformers import AutoConfig

    fields = dict(configuration.model)
    config = AutoConfig.for_model(fields.pop("model_type"), **fields)
    highest = 0
    with precision.emulating(bf16=configuration.bf16):
        method = base.create(configuration.method, configuration.options)
        made = skeleton(config, task=configuration.task, at=configuration.precision, labels=2, pack=method.pack)
        base.apply(method, made)
        batch = largest.batch(configuration)
        batch["attention_mask"][0, -1] = 0  # without any padding transformers drops the mask, and what it takes
        for number, stage in enumerate(method.stages()):
            if number:
                base.begin(method, made, number)
            made.model.train()
            step = TrainingStep(
                made.model,
                stage.optimizer(made.model, 1e-3, 0.0),
                clip_norm=None if method.updates_in_backward else 1.0,
                penalty=method.penalty,
                after_update=method.after_update,
            )
            given = {name: value[:1] for name, value in batch.items()} if stage.one_by_one else batch
            if stage.one_by_one and "target_positions" in batch:
                count = len(batch["target_positions"]) // configuration.microbatch
                given |= {name: batch[name][:count] for name in ("target_positions", "target_ids")}
            step.backward([given], 1e-3)
            step.update(0.5)
            highest = max(highest, _peak(step, given))
    return highest


def _peak(step: TrainingStep, batch: dict[str, Tensor]) -> int:
    gc.collect()
    held = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in _tensors()}
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        step.backward([batch], 1e-3)
        step.update(0.5)
    now = highest = sum(held.values())
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        highest = max(highest, now)
    return highest


def _tensors() -> list[Tensor]:
    found = []
    for each in gc.get_objects():
        with contextlib.suppress(ReferenceError):
            real = issubclass(type(each), Tensor) and not issubclass(type(each), FakeTensor)
            if real and each.device.type == "cpu" and each.layout is torch.strided:
                found.append(each)
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="One case; rows.py asks for many.")
    parser.add_argument("case", nargs=3, metavar=("METHOD", "FAMILY", "PRECISION"))
    print(json.dumps(compare(*parser.parse_args(sys.argv[1:]).case)))
