"""What training, evaluating and merging one configuration hold: the code that does it, run on fake tensors."""

from __future__ import annotations

import contextlib
import copy
import gc
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from edgepeft import largest, precision, work
from edgepeft import step as training
from edgepeft.backbone import Backbone, Packing, as_config, skeleton
from edgepeft.catalog.fields import at_depth, depth
from edgepeft.cuda_device import Device
from edgepeft.evaluate import sample_logits, totals
from edgepeft.merge import COMPARED, to_full_precision
from edgepeft.methods import base
from edgepeft.methods.base import Method, NotMergeable
from edgepeft.precision import StoredLinear
from edgepeft.stage import Stage
from edgepeft.step import Batch, TrainingStep
from edgepeft.surface import Configuration
from edgepeft.trace import Peak, Tracker, fake_device

_PASSES, _RECOMPUTED = "forward+backward", "recomputed "


@dataclass
class Recording:
    """A finished trace.

    Attributes:
        marks: phase → (label, moment) wherever a layer begins or ends, in order.
        own: bytes of what checkpoints hold: trained tensors with their optimizer states.
        parameters, largest: numbers in the backbone, and in its largest parameter.
    """

    tracker: Tracker
    marks: dict[str, list[tuple[tuple[str, int, int], int]]]
    own: int = 0
    parameters: int = 0
    largest: int = 0


def peaks(configuration: Configuration) -> dict[str, Peak]:
    """Trace the configuration as it is: the peak of each phase of an update in the steady state."""
    tracker = record(configuration, whole=False).tracker
    return {name: peak for name, peak in tracker.peaks().items() if name.endswith(("forward+backward", "update"))}


def record(configuration: Configuration, *, whole: bool) -> Recording:
    """Trace the configuration as it is; see ``recordings``."""
    return recordings(configuration, [configuration.checkpointing], whole=whole)[0]


def recordings(configuration: Configuration, checkpointing: Sequence[bool], *, whole: bool) -> list[Recording]:
    """Trace the configuration at each wanted value of its ``checkpointing``, and once what that does not change.

    Phases: ``loading``, ``forward+backward`` and ``update`` (of every stage, in the steady state) and, if ``whole``,
    ``evaluation`` at the training's microbatch, with one question answered, and ``merge``, which ends in fp32 and
    includes its own evaluations.
    """
    with (
        precision.emulating(bf16=configuration.bf16, cuda=configuration.cuda),
        fake_device(cuda=_device(configuration)) as tracker,
        _quietly(),
        _collecting_only_ours(),
    ):
        found = Recording(tracker, {})
        method = base.create(configuration.method, configuration.options)
        views = not configuration.cuda and not precision.is_converted(configuration.model, configuration.precision)
        mapped: list[torch.Tensor] = []
        with _phase(found, "loading"):
            wanted = (configuration.model, configuration.task, configuration.precision)
            backbone = _skeleton(*wanted, _noted(method.pack, found, mapped if views else None), configuration.labels)
        mapped.clear()
        sizes = [parameter.numel() for parameter in backbone.model.parameters()]
        found.parameters, found.largest = found.parameters + sum(sizes), max(found.largest, *sizes)
        own = {name for name, _ in backbone.model.named_parameters()}
        with _converting():
            base.apply(method, backbone)
        _follow_layers(backbone, found)
        stages = method.stages()
        for number, stage in enumerate(stages):
            if number:
                base.begin(method, backbone, number)
            if stage.updates == 0:  # nothing is trained in it
                _label(tracker, backbone, own)
                continue
            prefix = f"{stage.name}: " if len(stages) > 1 else ""
            step = _train(configuration, checkpointing, backbone, method, stage, own, prefix, found)
            if whole and all(later.updates == 0 for later in stages[number + 1 :]):
                with _phase(found, "evaluation"):  # beside the optimizer's states
                    totals(backbone.model, [largest.batch(configuration)])
                    largest.answer(configuration, backbone.model)
            del step
        if whole:
            backbone.model.eval()
            with _converting(), _phase(found, "merge"):
                _merge(configuration, backbone, method, found)
        return [_only(found, again) for again in checkpointing]


def _device(configuration: Configuration) -> Device | bool:
    """Without bf16: the newest that is without, Turing."""
    return Device() if configuration.cuda and configuration.bf16 else configuration.cuda and Device(capability=(7, 5))


def refuse(model: Mapping[str, Any], task: str, method: Method | None) -> None:
    """Say what speaks against a model, or against a method on it, from as many of its layers as decide that.

    Raises:
        UsageError: the method does not fit it, or no method could.
    """
    with torch.device("meta"), _quietly():  # the whole model: its last layers may be of another build than its first
        skeleton(as_config(model), task=task, at="fp32")
    if method is None:
        return
    full = depth(model)
    layers = full if method.counts_layers else min(full, method.depths()[0])
    with fake_device(cuda=False), _quietly(), _converting():
        base.apply(method, _skeleton(at_depth(model, layers), task, "bf16", method.pack))


def _only(found: Recording, checkpointing: bool) -> Recording:
    """With the passes at one value of ``checkpointing``."""

    def chosen(phases: Mapping[str, Any]) -> dict[str, Any]:
        return {
            name.replace(_RECOMPUTED, ""): value
            for name, value in phases.items()
            if not name.endswith(_PASSES) or (_RECOMPUTED in name) == checkpointing
        }

    tracker = copy.copy(found.tracker)
    tracker.phases = chosen(tracker.phases)
    return replace(found, tracker=tracker, marks=chosen(found.marks))


def _skeleton(model: Mapping[str, Any], task: str, at: str, pack: Packing, labels: int = 2) -> Backbone:
    return skeleton(as_config(model), task=task, at=at, labels=labels, pack=pack)


def _noted(pack: Packing, found: Recording, mapped: list[torch.Tensor] | None) -> Packing:
    """The same; where it begins is noted, as up to there the model grows and from there on it shrinks.

    Args:
        mapped: gets what was packed, where it is a view of a mapped file: all of that stays in memory until the end.
    """
    begun = False

    def noted(linear: torch.nn.Linear, at: str, roles: frozenset[str]) -> StoredLinear:
        nonlocal begun
        if not begun:
            _note(found, "pack")
        begun = True
        found.parameters += linear.weight.numel()
        found.largest = max(found.largest, linear.weight.numel())
        if mapped is not None:
            mapped.append(linear.weight.detach())
        return pack(linear, at, roles)

    return noted


def _train(
    configuration: Configuration,
    checkpointing: Sequence[bool],
    backbone: Backbone,
    method: Method,
    stage: Stage,
    own: set[str],
    prefix: str,
    found: Recording,
) -> TrainingStep:
    model, tracker = backbone.model, found.tracker
    model.train()
    optimizer = stage.made(model, 1e-3, 0.0, configuration.optimizer)
    step = TrainingStep(
        model,
        optimizer,
        clip_norm=None if method.updates_in_backward else 1.0,
        penalty=method.penalty,
        after_update=method.after_update,
        summed=stage.one_by_one,
    )
    _label(tracker, backbone, own)
    # The steady state: optimizer states exist, and with accumulation the gradients of earlier microbatches too. Both
    # are there after a backward pass and an update on any loss, so the cheapest one is taken.
    accumulates = configuration.accumulates and not method.updates_in_backward and not stage.one_by_one
    with tracker.phase("start"):
        _touch(step)
        step.update(0.5)
        tracker.label_optimizer(optimizer)
        if accumulates:
            _touch(step)
    batch = largest.batch(replace(configuration, microbatch=1) if stage.one_by_one else configuration)
    for again in checkpointing:
        if not accumulates:
            for parameter in step.trained:
                parameter.grad = None
        name = f"{prefix}{_RECOMPUTED if again else ''}{_PASSES}"
        with _checkpointed(model, again), _phase(found, name), _growing_loss(found):
            step.backward([batch], 1e-3)
    with _phase(found, f"{prefix}update"):
        step.update(0.5)
    states = [value for state in optimizer.state.values() for value in state.values()]
    held = [*base.state(model, transient=True).values(), *(value for value in states if torch.is_tensor(value))]
    found.own = sum(tensor.nbytes for tensor in held)
    return step


def _label(tracker: Tracker, backbone: Backbone, own: set[str]) -> None:
    named = backbone.model.named_parameters()
    tracker.label_model(backbone.model, [p for name, p in named if p.requires_grad and name not in own])


@contextlib.contextmanager
def _checkpointed(model: Any, again: bool) -> Iterator[None]:
    if again:
        training.recompute_activations(model)
    try:
        yield
    finally:
        if again:
            model.activation_checkpointing_disable()


@contextlib.contextmanager
def _growing_loss(recording: Recording) -> Iterator[None]:
    """The loss goes through the answers in chunks of a fixed size, so that no operator of it shows that it grows.

    Where it begins and ends is noted, as what a method does around it may grow with the layers.
    """
    before = training.loss_of

    def loss_of(model: torch.nn.Module, batch: Batch, found: torch.Tensor) -> torch.Tensor:
        _note(recording, "loss")
        with work.growing():
            loss = before(model, batch, found)
        _note(recording, "loss end")
        if loss.requires_grad:
            loss.register_hook(lambda gradient: _note(recording, "loss backward"))
        if found.requires_grad:
            found.register_hook(lambda gradient: _note(recording, "loss backward end"))
        return loss

    training.loss_of = loss_of
    try:
        yield
    finally:
        training.loss_of = before


def _merge(configuration: Configuration, backbone: Backbone, method: Method, found: Recording) -> None:
    """What ``merge.merge`` and the exporter do to a trained model before they write or export it.

    The logits that a merge compares are those of several batches, of a GPU's kept on the host. All but the first are
    made without running the model: it would hold no more than then, or when it is evaluated.
    """
    model = backbone.model
    batch = largest.batch(configuration)
    to_full_precision(model)
    _note(found, "kept")
    kept = sample_logits(model, [batch], bounded=True)
    if configuration.cuda:
        kept.clear()
    kept += [torch.empty_like(logits) for logits in kept for _ in range(COMPARED - 1)]
    if method.merges:
        _note(found, "merge")
        with contextlib.suppress(NotMergeable):  # found out only by trying: the model is then exported as it is
            method.merge(model)
        _note(found, "kept")
        kept += [torch.empty_like(logits) for logits in kept]
    _note(found, "totals")
    totals(model, [batch])


@contextlib.contextmanager
def _converting() -> Iterator[None]:
    """``Module.float`` and the like refuse fake tensors; let them replace data as they do for real ones."""

    def apply(module: Any, change: Any, recurse: bool = True) -> Any:
        for child in module.children() if recurse else ():
            child._apply(change)
        for parameter in module._parameters.values():
            if parameter is not None:
                parameter.data = change(parameter.data)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = change(buffer)
        return module

    kind: Any = torch.nn.Module
    before, kind._apply = kind._apply, apply
    try:
        yield
    finally:
        kind._apply = before


def _touch(step: TrainingStep) -> None:
    """Give every trained tensor a gradient, as a step would, without the model.

    A product is part of it, forward and backward: from the first step on cuBLAS has its workspaces.
    """
    total = torch.stack([parameter.float().sum() for parameter in step.trained]).sum()
    (total.view(1, 1) @ torch.ones(1, 1)).sum().backward()


@contextlib.contextmanager
def _phase(found: Recording, name: str) -> Iterator[None]:
    marks: list[tuple[tuple[str, int, int], int]] = []
    found.marks[name] = marks
    _current.append(marks)
    gc.collect()
    gc.disable()  # when it runs is chance: what only it would free is counted as held
    try:
        with found.tracker.phase(name):
            yield
    finally:
        gc.enable()
        _current.pop()


@contextlib.contextmanager
def _collecting_only_ours() -> Iterator[None]:
    """The collections before each phase need not look through all that the imported libraries hold."""
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


_current: list[list[tuple[tuple[str, int, int], int]]] = []


def _note(found: Recording, what: str, stack: int = 0, index: int = 0) -> None:
    """Note that something begins or ends now."""
    if _current:
        _current[-1].append(((what, stack, index), found.tracker.moment))


def _follow_layers(backbone: Backbone, found: Recording) -> None:
    """Note where each layer begins and ends, forward and backward: traces of two depths are laid together there."""
    indices: dict[int, int] = {}
    for block in backbone.anatomy.blocks:
        index = indices[block.stack] = indices.get(block.stack, -1) + 1
        module = backbone.model.get_submodule(block.path)

        def note(what: str, stack: int = block.stack, index: int = index) -> None:
            _note(found, what, stack, index)

        def ends(module: Any, args: Any, output: Any, note: Any = note) -> None:
            note("end")
            states = output[0] if isinstance(output, tuple) else output
            if states.requires_grad:
                states.register_hook(lambda gradient: note("backward"))

        module.register_forward_pre_hook(lambda module, args, note=note: note("forward"))
        module.register_forward_hook(ends)


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """Chatter of transformers about shallow configurations is of no use to anyone."""
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)
