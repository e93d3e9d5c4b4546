"""The plan of a run: what a recipe leaves open is chosen for its data and hardware, and its memory is predicted."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from edgepeft import backbone, plan, resident, schedule
from edgepeft.candidate import usable_microbatch
from edgepeft.catalog.fields import positions_left
from edgepeft.data import Data
from edgepeft.files import write_json
from edgepeft.hardware import Hardware
from edgepeft.methods import base
from edgepeft.plan import Plan
from edgepeft.recipe import Recipe

DEFAULT_TOKENS = 512


@dataclasses.dataclass(frozen=True)
class RunPlan:
    """A plan for one run.

    Attributes:
        model: its configuration as plain data.
        whole: whether the model is merged and exported on the hardware too.
    """

    model: Mapping[str, Any]
    data: Data
    hardware: Hardware
    whole: bool

    def decide(self, recipe: Recipe) -> tuple[Recipe, dict[str, Any], str]:
        """The recipe with what was open in it chosen, all that was planned and predicted as JSON, and why in words.

        Raises:
            UsageError: nothing fits, or what the recipe asks for does not go together.
        """
        share = recipe.global_batch // recipe.devices
        found = self._plan(recipe, recipe.microbatch, accumulates=recipe.microbatch != share)
        chosen = found.chosen(recipe.hardware)
        method = base.find(chosen.method)
        size = recipe.microbatch or usable_microbatch(chosen.microbatch, share)
        if method.updates_in_backward and recipe.microbatch is None and size != recipe.global_batch:
            schedule.check(dataclasses.replace(recipe, microbatch=size), base.create(chosen.method, recipe.options))
        decided = dataclasses.replace(
            recipe,
            method=chosen.method,
            precision=chosen.precision,
            microbatch=size,
            checkpointing=chosen.checkpointing,
            optimizer=chosen.optimizer,
            strategy=chosen.strategy or None,
        )
        exact = self._plan(decided, size, accumulates=size != share).chosen()
        predicted = {
            "predicted_peak_bytes": exact.step_bytes,
            "predicted_process_bytes": exact.process_bytes,
            "ample": exact.ample,
            "predicted_phases": exact.phases,
            "bytes": exact.bytes,
        }
        return decided, {**found.as_json(), **predicted}, found.why

    def _plan(self, recipe: Recipe, microbatch: int | None, *, accumulates: bool) -> Plan:
        train, validation = self.data.train, self.data.validation
        return plan.plan(
            name=recipe.model,
            model=self.model,
            task=self.data.task,
            hardware=self.hardware.shared(recipe.devices),
            tokens=int(max(train.lengths.max(), validation.lengths.max())),
            target_tokens=int(max(train.target_lengths.max(), validation.target_lengths.max())),
            labels=len(self.data.labels) or 2,
            global_batch=recipe.global_batch,
            methods=[recipe.method] if recipe.method else None,
            options=[recipe.options if recipe.method else {}],
            precisions=[recipe.precision] if recipe.precision else None,
            checkpointing=recipe.checkpointing,
            optimizer=recipe.optimizer,
            microbatch=microbatch,
            accumulates=accumulates,
            first=True,
            devices=recipe.devices,
            strategy=recipe.strategy,
            whole=self.whole,
        )


def max_tokens(recipe: Recipe, config: Any) -> int:
    """The longest text of a recipe, which may leave it open, for a model of this configuration."""
    taken = 0 if recipe.method is None else base.create(recipe.method, recipe.options).positions(config)
    most = positions_left(recipe.model, backbone.positions(config), recipe.method, taken, recipe.max_tokens)
    return recipe.max_tokens or min(DEFAULT_TOKENS, most or DEFAULT_TOKENS)


def read(path: Path) -> dict[str, Any]:
    """What plan.json holds; nothing of an adapter that was trained elsewhere."""
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def note(path: Path, held: Mapping[str, int], kind: str) -> None:
    """Put what was measured beside what was predicted; nothing was of an adapter that was trained elsewhere.

    Args:
        held: bytes of tensors that phases were measured to hold.
        kind: of the hardware.
    """
    if planned := read(path):
        found: dict[str, Any] = {"measured_phases": {**planned.get("measured_phases", {}), **held}}
        if kind == "cpu":  # where what was predicted of the process is with merging and exporting
            found["measured_process_bytes"] = max(planned.get("measured_process_bytes", 0), resident.peak_bytes())
        write_json(path, {**planned, **found})
