"""Plan for a model by name, without data: what ``edgepeft plan`` does."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from edgepeft import backbone, probe
from edgepeft import recipe as recipes
from edgepeft.errors import UsageError, nearest
from edgepeft.hardware import Hardware
from edgepeft.methods import base
from edgepeft.plan import Plan, plan
from edgepeft.precision import check

DEFAULT_TOKENS, DEFAULT_TARGET_TOKENS, DEFAULT_GLOBAL_BATCH = 512, 128, 16


def plan_model(
    source: backbone.Source,
    hardware: Hardware,
    *,
    task: str | None,
    method: str | None,
    precision: str | None,
    tokens: int | None,
    target_tokens: int | None,
    global_batch: int | None,
    settings: Sequence[str],
    trust_remote_code: bool,
    progress: Callable[[int, int], None],
) -> Plan:
    """Plan the training of a model whose weights need not be here.

    Args:
        settings: ``options.NAME=VALUE`` of the method.

    Raises:
        UsageError: an unknown name, or a sequence longer than the model can read.
    """
    if precision is not None:
        check(precision)
    if task is not None and task not in backbone.TASKS:
        raise UsageError(f"There is no task {task!r}.", "", nearest(task, backbone.TASKS))
    values: dict[str, Any] = {}
    for setting in settings:
        recipes.assign(values, setting)
    if values.keys() - {"options"} or (values and method is None):
        raise UsageError(
            "plan: --set takes options of a method, with --method.",
            "",
            "For example: --method lora --set options.rank=16",
        )
    implied = None
    if method is not None:
        implied = base.implied_precision(method)
        method = base.create(method, values.get("options", {})).name
    config = backbone.config(source, trust_remote_code=trust_remote_code)
    most = backbone.positions(config)
    if tokens is not None and most is not None and tokens > most:
        raise UsageError(
            f"{source.name} cannot read {tokens} tokens.", f"It has {most} positions.", f"Use --seq-len {most} or less."
        )
    at = precision or implied
    return plan(
        name=source.name,
        model=probe.as_fields(config),
        task=task or backbone.default_task(config),
        hardware=hardware,
        tokens=tokens or min(DEFAULT_TOKENS, most or DEFAULT_TOKENS),
        target_tokens=target_tokens or DEFAULT_TARGET_TOKENS,
        global_batch=global_batch or DEFAULT_GLOBAL_BATCH,
        methods=[method] if method else None,
        options=values.get("options"),
        precisions=[at] if at else None,
        progress=progress,
    )
