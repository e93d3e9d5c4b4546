"""Plan for a model by name, without data: what ``edgepeft plan`` does."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgepeft import catalog, hardware, tasks, traces
from edgepeft import recipe as recipes
from edgepeft.candidate import usable_microbatch
from edgepeft.catalog.fields import positions, positions_left
from edgepeft.errors import UsageError, nearest
from edgepeft.hardware import Hardware
from edgepeft.peft_config import path_of
from edgepeft.plan import PREFERRED, GiB, Plan, plan
from edgepeft.recipe import PRECISIONS, Recipe
from edgepeft.surface import OPTIMIZERS
from edgepeft.tasks import TASKS

if TYPE_CHECKING:
    from edgepeft.methods.base import Method

DEFAULT_TOKENS, DEFAULT_TARGET_TOKENS, DEFAULT_GLOBAL_BATCH = traces.TOKENS, traces.TARGET_TOKENS, 16
DEFAULT_EPOCHS = 1.0
OBJECTIVES = ("quality", "memory", "speed")
ALL = "all"
MOST_EXAMPLES = 10**12


def plan_model(
    model: str,
    device: Hardware,
    *,
    task: str | None,
    method: str | None,
    precision: str | None,
    tokens: int | None,
    target_tokens: int | None,
    global_batch: int | None,
    settings: Sequence[str],
    trust_remote_code: bool,
    optimizer: str | None = None,
    objective: str = OBJECTIVES[0],
    examples: int | None = None,
    epochs: float | None = None,
    devices: int = 1,
    whole: bool = True,
    first: bool = False,
    progress: Callable[[int, int], None],
) -> Plan:
    """Plan the training of a model whose weights need not be here.

    A model of the catalogue, at the usual lengths and with the usual methods, is planned from what was traced before;
    torch is not imported then.

    Args:
        model: a folder, a GGUF file, a catalogue name or a hub id.
        method: a name, an alias, a dotted path, or ``all``, each of which is planned in no further precision after
            one that fits well; those of ``plan.PREFERRED``, in all precisions, when not given.
        settings: ``options.NAME=VALUE`` of the method; values of one that is named again are all tried.
        optimizer: AdamW when not given, and AdamW in 8 bits where nothing else fits well.
        devices: how many of the device share the work.
        whole: whether the model is merged and exported there too.
        first: stop at the first candidate that fits comfortably.
        examples: of the training data; how long the job takes is estimated when it is given.

    Raises:
        UsageError: an unknown name, or a sequence longer than the model can read.
    """
    choices = ((precision, PRECISIONS), (optimizer, OPTIMIZERS), (task, TASKS), (objective, OBJECTIVES))
    for value, known in choices:
        if value is not None and value not in known:
            raise UsageError(f"plan: {value!r} is not known here.", "", nearest(value, known))
    most = recipes.MOST
    recipes.check_count("plan: --seq-len", tokens, most["max_tokens"])
    recipes.check_count("plan: --target-len", target_tokens, most["max_target_tokens"])
    recipes.check_count("plan: --global-batch", global_batch, most["global_batch"])
    recipes.check_count("plan: --examples", examples, MOST_EXAMPLES)
    recipes.check_count("plan: --epochs", epochs, most["epochs"])
    check_devices(devices, device)
    recipes.check_shared(global_batch or DEFAULT_GLOBAL_BATCH, devices)
    options = _options(settings, method)
    methods, implied = _methods(method, options)
    if precision is not None and implied is not None and precision != implied:
        raise UsageError(
            f"{method} means {implied}, not {precision}.", "", "Leave --precision out, or name the method itself."
        )
    fields, usual = _model(model, trust_remote_code)
    if target_tokens is not None and (task or usual) != "seq2seq":
        raise UsageError(
            f"plan: --target-len is about answers of their own, and {model} is planned for {task or usual}.",
            "There a prompt and its answer are one sequence.",
            "Use --seq-len for both together.",
        )
    taken = max(_taken(method, each, tokens, fields) for each in options)
    left = positions_left(model, positions(fields), method, taken, tokens)
    at = precision or implied
    _refuse(model, fields, task or usual, method, options)
    return plan(
        name=model,
        model=fields,
        task=task or usual,
        hardware=device,
        tokens=tokens or min(DEFAULT_TOKENS, left or DEFAULT_TOKENS),
        target_tokens=target_tokens or DEFAULT_TARGET_TOKENS,
        global_batch=global_batch or DEFAULT_GLOBAL_BATCH,
        methods=methods,
        options=options,
        precisions=[at] if at else None,
        optimizer=optimizer,
        objective=objective,
        examples=examples,
        epochs=epochs or DEFAULT_EPOCHS,
        devices=devices,
        whole=whole,
        first=first,
        sparing=method == ALL,
        progress=progress,
    )


def check_devices(devices: int, device: Hardware, remedy: str = "Leave it out.") -> None:
    """Refuse ``--gpus`` where it says nothing.

    Args:
        remedy: what to do on a CPU.

    Raises:
        UsageError: see above.
    """
    if devices < 1:
        raise UsageError(f"--gpus {devices} must be positive.", "", "")
    if devices > 1 and device.kind != "cuda":
        raise UsageError(f"{device.title} is not a GPU.", "--gpus is about GPUs only.", remedy)
    if devices > 1 and not device.several:
        raise UsageError(
            f"There is no machine with {devices} x {device.name}.",
            "Its profile states no interconnect, over which several would meet.",
            "Leave --gpus out; in a profile of your own, state `interconnect` (bytes per second, each way).",
        )


def machines() -> list[Hardware]:
    """All devices that profiles are shipped for, those with the least memory first."""
    return sorted(map(hardware.load, hardware.names()), key=lambda each: each.available_bytes)


def leaving(device: Hardware, reserve: float) -> Hardware:
    """The hardware with ``reserve`` GiB of its memory left to others.

    Raises:
        UsageError: it does not have that much.
    """
    if not 0 <= reserve * GiB < device.available_bytes:  # also refuses NaN
        free = device.available_bytes / GiB
        raise UsageError(
            f"{device.name} has {free:.1f} GiB free for a job.", f"--reserve is {reserve:g}.", "Give it less than that."
        )
    return replace(device, reserved_bytes=device.reserved_bytes + round(reserve * GiB))


def recipe(
    found: Plan,
    data: str,
    hardware: str,
    tokens: int | None,
    target_tokens: int | None,
    global_batch: int | None,
    epochs: float | None = None,
    trust_remote_code: bool = False,
) -> Recipe:
    """The plan's choice as a recipe that ``edgepeft run --recipe`` takes.

    Args:
        data: what to train on.
        hardware: a profile as it is asked for, by name or path.
    """
    chosen = found.chosen()
    global_batch = global_batch or DEFAULT_GLOBAL_BATCH
    values: dict[str, Any] = {
        "model": found.model,
        "data": data,
        "hardware": str(Path(hardware).resolve()) if hardware.endswith(".toml") else hardware,
        "devices": found.devices,
        "strategy": chosen.strategy or None,
        "method": chosen.method,
        "precision": chosen.precision,
        "checkpointing": chosen.checkpointing,
        "optimizer": chosen.optimizer,
        "global_batch": global_batch,
        "microbatch": usable_microbatch(chosen.microbatch, global_batch // found.devices),
        "max_tokens": tokens,
        "max_target_tokens": target_tokens,
        "task": found.task,
        "epochs": epochs,
        "options": dict(chosen.options),
        "trust_remote_code": trust_remote_code or None,
    }
    return recipes.create({name: value for name, value in values.items() if value is not None})


def _options(settings: Sequence[str], method: str | None) -> list[dict[str, Any]]:
    """The options of each variant that is to be planned: all combinations of the values that are given."""
    given: dict[str, list[str]] = {}
    for setting in settings:
        given.setdefault(setting.partition("=")[0].strip(), []).append(setting)
    found = []
    for combined in itertools.product(*given.values()):
        values: dict[str, Any] = {}
        for setting in combined:
            recipes.assign(values, setting)
        _check_options(values, method)
        found.append(values.get("options", {}))
    return found


def _check_options(values: Mapping[str, Any], method: str | None) -> None:
    options = values.get("options", {})
    if values.keys() - {"options"} or not isinstance(options, Mapping) or (values and method in (None, ALL)):
        raise UsageError(
            "plan: --set takes options of a method, with --method.",
            "",
            "For example: --method lora --set options.rank=16",
        )


def _methods(method: str | None, options: Sequence[Mapping[str, Any]]) -> tuple[list[str] | None, str | None]:
    """The methods to plan, and the precision that an alias implies."""
    if method is None:
        return None, None
    known = traces.named(method)
    if known is not None and not any(options):
        return [known[0]], known[1]
    from edgepeft.methods import base

    if method == ALL:
        return base.names(), None
    made = [base.create(method, each) for each in options]  # all of them: a value may be one that it refuses
    return [made[0].name], base.implied_precision(method)


def _taken(method: str | None, options: Mapping[str, Any], tokens: int | None, fields: Mapping[str, Any]) -> int:
    """How many positions a method takes from the input; those that are planned when none is named take none."""
    name, _ = (traces.named(method) if method else None) or (method, None)
    if name in (None, ALL, *PREFERRED) and not (options or tokens):
        return 0
    from edgepeft import backbone
    from edgepeft.methods import base

    return 0 if method in (None, ALL) else base.create(str(method), options).positions(backbone.as_config(fields))


def _refuse(
    model: str, fields: Mapping[str, Any], task: str, method: str | None, options: Sequence[Mapping[str, Any]]
) -> None:
    """Refuse in seconds what would be refused once traces have begun: a task, an architecture, or all that is asked of
    a method.
    """
    known = catalog.entry(model)
    if known is not None:  # its architecture is one of ours
        tasks.check_usual(str(fields["model_type"]), known["_edgepeft"]["task"], task)
    strange = method is not None and "." in method and path_of(method) is None
    if known is not None and not strange and not any(options):
        return  # without torch
    if not strange and not any(options):
        from edgepeft import probe

        probe.refuse(fields, task, None)
        return
    from edgepeft.methods import base

    refused = [_refusal(fields, task, base.create(str(method), each)) for each in options]
    if all(refused):  # otherwise there is a plan, which says what it left out
        raise next(filter(None, refused))


def _refusal(fields: Mapping[str, Any], task: str, made: Method) -> UsageError | None:
    """What speaks against a method on a model, if anything does whatever the precision."""
    from edgepeft import probe

    try:
        made.check("bf16")
    except UsageError:
        return None  # it is one of another precision, as LoftQ is
    try:
        probe.refuse(fields, task, made)
    except UsageError as error:
        return error
    return None


def _model(name: str, trust_remote_code: bool) -> tuple[dict[str, Any], str]:
    """The configuration as plain data, and the task it is usually tuned for."""
    known = None if Path(name).is_dir() or name.endswith(".gguf") else catalog.entry(name)
    if known is not None:
        return {field: value for field, value in known.items() if not field.startswith("_")}, known["_edgepeft"]["task"]
    from edgepeft import backbone

    config = backbone.config(backbone.resolve(name), trust_remote_code=trust_remote_code)
    return backbone.as_fields(config), tasks.usual_task(config)
