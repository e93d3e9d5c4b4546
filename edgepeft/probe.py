"""The peak memory of one training configuration, from the training step itself run on fake tensors."""

from __future__ import annotations

import contextlib
import copy
import hashlib
import importlib.metadata
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, PretrainedConfig

from edgepeft import precision
from edgepeft.backbone import skeleton
from edgepeft.files import write_json
from edgepeft.methods import base
from edgepeft.step import TrainingStep
from edgepeft.trace import Peak, fake_device

DEPTHS = (2, 4)  # layers that are traced; a peak is affine in depth. Even, because LST pairs layers
BATCHES = (1, 8)


@dataclass(frozen=True, kw_only=True)
class Configuration:
    """Everything that decides how much memory a training step takes.

    Attributes:
        model: the Hugging Face configuration as a dictionary, with its ``model_type``.
        tokens: length of the (source) sequences; ``target_tokens``: of the targets of seq2seq.
        cuda: allocate as a CUDA device does.
        bf16: whether the hardware multiplies bf16.
    """

    model: Mapping[str, Any]
    task: str
    method: str
    options: Mapping[str, Any]
    precision: str
    checkpointing: bool
    microbatch: int
    tokens: int
    target_tokens: int
    labels: int
    accumulates: bool
    cuda: bool
    bf16: bool


def peaks(configuration: Configuration) -> dict[str, Peak]:
    """Trace the configuration as it is: the peak of each phase of an update in the steady state."""
    with precision.emulating(bf16=configuration.bf16), fake_device(cuda=configuration.cuda) as tracker, _quietly():
        fields = copy.deepcopy(dict(configuration.model))
        model_config = AutoConfig.for_model(fields.pop("model_type"), **fields)
        backbone = skeleton(
            model_config, task=configuration.task, at=configuration.precision, labels=configuration.labels
        )
        model: Any = backbone.model
        own = {name for name, _ in model.named_parameters()}
        method = base.create(configuration.method, configuration.options)
        base.apply(method, backbone)
        if configuration.checkpointing:
            model.activation_checkpointing_enable()
        stages = method.stages()
        for number, stage in enumerate(stages):
            if number:
                base.begin(method, backbone, number)
            model.train()
            optimizer = stage.optimizer(model, 1e-3, 0.0)
            step = TrainingStep(
                model,
                optimizer,
                clip_norm=None if method.updates_in_backward else 1.0,
                penalty=method.penalty,
                after_update=method.after_update,
            )
            tracker.label_model(model, [p for n, p in model.named_parameters() if p.requires_grad and n not in own])
            # The steady state: optimizer states exist, and with accumulation the gradients of earlier microbatches
            # too. Both are there after a backward pass and an update on any loss, so the cheapest one is taken.
            with tracker.phase(_UNCOUNTED):
                _touch(step)
                step.update(0.5)
                tracker.label_optimizer(optimizer)
                if configuration.accumulates and not method.updates_in_backward and not stage.one_by_one:
                    _touch(step)
            prefix = f"{stage.name}: " if len(stages) > 1 else ""
            batch = _batch(replace(configuration, microbatch=1) if stage.one_by_one else configuration)
            with tracker.phase(f"{prefix}forward+backward"):
                step.backward([batch], 1e-3)
            with tracker.phase(f"{prefix}update"):
                step.update(0.5)
            del optimizer, step, batch
    return {name: peak for name, peak in tracker.peaks().items() if name != _UNCOUNTED}


@dataclass(frozen=True)
class Surface:
    """Peaks over depth and microbatch, from shallow traces of small batches.

    Attributes:
        corners: phase → kind → the four traced values, for (depth, microbatch) in the order (low, low), (high, low),
            (low, high), (high, high). The kind ``peak`` is the sum of the others.
    """

    depths: tuple[int, int]
    corners: Mapping[str, Mapping[str, tuple[int, int, int, int]]]

    def at(self, depth: int, microbatch: int) -> tuple[str, Peak]:
        """The phase that needs the most memory, and its peak."""
        found = {phase: self._peak(kinds, depth, microbatch) for phase, kinds in self.corners.items()}
        phase = max(found, key=lambda name: found[name].peak_bytes)
        return phase, found[phase]

    def _peak(self, kinds: Mapping[str, tuple[int, int, int, int]], depth: int, microbatch: int) -> Peak:
        low, high = self.depths
        u = (depth - low) / (high - low) if high > low else 0.0
        v = (microbatch - BATCHES[0]) / (BATCHES[1] - BATCHES[0])
        size = {
            kind: max(0, round(a + u * (b - a) + v * (c - a) + u * v * (d - b - c + a)))
            for kind, (a, b, c, d) in kinds.items()
        }
        return Peak(sum(size.values()), size)


def surface(configuration: Configuration) -> Surface:
    """Trace shallow versions of the configuration at two microbatches; cached on disk."""
    path = _cache_path(configuration)
    with contextlib.suppress(OSError, ValueError, KeyError):
        stored = json.loads(path.read_text(encoding="utf-8"))
        return Surface(tuple(stored["depths"]), stored["corners"])
    full = depth(configuration.model)
    depths = DEPTHS if full > DEPTHS[1] and full % 2 == 0 else (full, full)
    traced = [
        peaks(replace(configuration, model=at_depth(configuration.model, layers), microbatch=microbatch))
        for microbatch in BATCHES
        for layers in dict.fromkeys(depths)
    ]
    if depths[0] == depths[1]:
        traced = [traced[0], traced[0], traced[1], traced[1]]
    corners = {
        phase: {kind: tuple(peak[phase].bytes[kind] for peak in traced) for kind in traced[0][phase].bytes}
        for phase in traced[0]
    }
    with contextlib.suppress(OSError):  # a cache that cannot be written costs time, nothing else
        write_json(path, {"depths": depths, "corners": corners})
    return Surface(depths, corners)  # type: ignore[arg-type]


def depth(model: Mapping[str, Any]) -> int:
    """Layers of each stack of a model."""
    return int(next(model[name] for name in _DEPTHS if model.get(name)))


def at_depth(model: Mapping[str, Any], layers: int) -> dict[str, Any]:
    """The same model with fewer layers."""
    fields: dict[str, Any] = {name: layers if name in _DEPTHS and value else value for name, value in model.items()}
    if fields.get("layer_types"):
        fields["layer_types"] = list(fields["layer_types"])[:layers]
    return fields


def as_fields(config: PretrainedConfig) -> dict[str, Any]:
    """A configuration as plain data."""
    return json.loads(config.to_json_string(use_diff=False))


_UNCOUNTED = "start"

_DEPTHS = ("num_hidden_layers", "num_layers", "n_layer", "n_layers", "num_decoder_layers")


def _touch(step: TrainingStep) -> None:
    """Give every trained tensor a gradient, as a step would, without the model."""
    torch.stack([parameter.float().sum() for parameter in step.trained]).sum().backward()


def _batch(configuration: Configuration) -> dict[str, torch.Tensor]:
    size, tokens = configuration.microbatch, configuration.tokens
    ids = torch.ones(size, tokens, dtype=torch.long)
    batch = {"input_ids": ids, "attention_mask": torch.ones(size, tokens, dtype=torch.long)}
    if configuration.task == "classification":
        return {**batch, "labels": torch.ones(size, dtype=torch.long)}
    if configuration.task == "seq2seq":
        tokens = configuration.target_tokens
        batch["decoder_input_ids"] = torch.ones(size, tokens, dtype=torch.long)
    # Every token a target is the most a batch can ask for.
    every = torch.arange(size * tokens)
    return {**batch, "target_positions": every, "target_ids": torch.ones(size * tokens, dtype=torch.long)}


@contextlib.contextmanager
def _quietly() -> Any:
    """Chatter of transformers about shallow configurations is of no use to anyone."""
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)


def _cache_path(configuration: Configuration) -> Path:
    folder = Path(os.environ.get("EDGEPEFT_CACHE", Path.home() / ".cache" / "edgepeft")) / "traces"
    content = {**asdict(configuration), "microbatch": None, "versions": _versions()}
    return folder / f"{hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()}.json"


def _versions() -> list[str]:
    """What a trace depends on beside its configuration: the libraries, and our own code."""
    own = hashlib.sha256()
    for file in sorted(Path(__file__).parent.rglob("*.py")):
        own.update(file.read_bytes())
    return [*(importlib.metadata.version(name) for name in ("torch", "transformers", "bitsandbytes")), own.hexdigest()]
