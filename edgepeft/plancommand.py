"""The command ``edgepeft plan``. What it needs is imported when it runs, so that help answers at once."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from edgepeft import flags
from edgepeft.errors import EdgePeftError, UsageError
from edgepeft.output import print_json
from edgepeft.report import heatmap

if TYPE_CHECKING:
    from edgepeft.plan import Plan


def plan(
    model: flags.Model,
    gpu: flags.Gpu = None,
    gpus: Annotated[int, typer.Option("--gpus", help="How many of the GPU share the work, by DDP or FSDP.")] = 1,
    all_gpus: Annotated[bool, typer.Option("--all-gpus", help="Every machine with a profile, by method.")] = False,
    task: flags.Task = None,
    method: Annotated[
        str | None,
        typer.Option(
            help="A name, a dotted path, or all: every method, in the first precision that fits it well. What was never"
            " planned before is traced first: seconds for one method, minutes for all, and longer with --all-gpus."
        ),
    ] = None,
    precision: flags.Precision = None,
    optimizer: flags.Optimizer = None,
    seq_len: flags.SeqLen = None,
    target_len: flags.TargetLen = None,
    global_batch: flags.GlobalBatch = None,
    settings: flags.Option = None,
    reserve: Annotated[float, typer.Option(min=0, help="GiB of the device to leave to others.")] = 0.0,
    objective: Annotated[str, typer.Option(help="What decides among what fits: quality, memory or speed.")] = "quality",
    examples: Annotated[int | None, typer.Option(help="Training examples: estimates hours for the job.")] = None,
    epochs: Annotated[float | None, typer.Option(help="Times they are seen (1 when not given).")] = None,
    infer: Annotated[bool, typer.Option("--infer", help="Plan running the model, not training it.")] = False,
    target: Annotated[str | None, typer.Option("--target", help="The device that runs it, with --infer.")] = None,
    recipe: Annotated[Path | None, typer.Option("--recipe", help="Write the choice as a recipe for `run`.")] = None,
    data: Annotated[str | None, typer.Option("--data", help="The data that the recipe names.")] = None,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print a Markdown table.")] = False,
    html: Annotated[Path | None, typer.Option("--html", help="With --all-gpus: write a page to this file.")] = None,
    trust_remote_code: Annotated[bool, typer.Option(help="Run code that the model brings along.")] = False,
    as_json: flags.Json = False,
) -> None:
    """Say what fits a device, before a byte of weights is downloaded. Exit code 1 when nothing does."""
    one = {"--gpu": gpu, "--reserve": reserve or None, "--recipe": recipe, "--markdown": markdown or None}
    several = {"--gpus": gpus if gpus != 1 else None}
    training: dict[str, Any] = {
        **one,
        **several,
        "--all-gpus": all_gpus or None,
        "--html": html,
        "--method": method,
        "--precision": precision,
        "--optimizer": optimizer,
    }
    training |= {"--target-len": target_len, "--global-batch": global_batch, "--set": settings, "--epochs": epochs}
    training |= {"--examples": examples, "--data": data, "--objective": None if objective == "quality" else objective}
    if infer or target is not None:
        _inference(model, infer, target, task, seq_len, reserve, training, trust_remote_code, as_json)
        return
    _alone(
        "--all-gpus",
        all_gpus,
        one | several,
        "--all-gpus plans for every machine that has a profile, and chooses none.",
    )
    _needs("--html", html, "--all-gpus", all_gpus)
    _needs("--data", data, "--recipe", recipe is not None)
    _needs("--epochs", epochs, "--examples or --recipe", examples is not None or recipe is not None)
    _alone("--json", as_json, {"--markdown": markdown or None}, "Both are printed to the same place.")

    _check_new("--recipe", recipe, lambda there: False)
    _check_new("--html", html, heatmap.is_page)

    from edgepeft import alternatives, hardware, planning, planpage, tables
    from edgepeft import recipe as recipes

    asked: dict[str, Any] = {
        "task": task,
        "method": method,
        "precision": precision,
        "optimizer": optimizer,
        "tokens": seq_len,
        "target_tokens": target_len,
        "global_batch": global_batch,
        "settings": settings or [],
        "trust_remote_code": trust_remote_code,
        "objective": objective,
        "examples": examples,
        "epochs": epochs,
        "devices": gpus,
    }

    def planned(device: hardware.Hardware, /, **changes: Any) -> Plan:
        if "device" in changes:  # another, of which as much is left to others
            device = planning.leaving(changes.pop("device"), reserve)
        progress = tables.progress(f"tracing for {device.name}")
        return planning.plan_model(model, device, **{**asked, **changes}, progress=progress)

    if all_gpus:
        _machines([planned(device) for device in planning.machines()], html, as_json)
        return
    device = planning.leaving(hardware.load(hardware.AUTO if gpu is None else gpu), reserve)
    found = planned(device)
    if markdown:
        print(planpage.markdown(found))
    elif not as_json:
        planpage.show(found)
    if recipe is not None and found.choice is not None:
        named = hardware.AUTO if gpu is None else gpu
        counts = (seq_len, target_len, global_batch, epochs)
        chosen = planning.recipe(found, data or "data.jsonl", named, *counts, trust_remote_code)
        recipes.write(chosen, recipe)
        unsaid = "" if data else f" It names {chosen.data} as data: put yours there, or run it with --data."
        tables.say(f"recipe: {recipe}.{unsaid}")
    ways: tuple[alternatives.Alternative, ...] = ()
    if found.choice is None:
        fact, cause, _ = found.nothing_fits(device.name)
        tables.say("Nothing fits. Looking for what would ...")
        tokens = seq_len or planning.DEFAULT_TOKENS
        batch = global_batch or planning.DEFAULT_GLOBAL_BATCH
        again = partial(planned, device)
        one_method = None if method == planning.ALL else method
        ways = alternatives.find(
            found, again, tokens=tokens, global_batch=batch, method=one_method, precision=precision
        )
        if not as_json:
            raise EdgePeftError(fact, cause, alternatives.remedy(ways))
    if as_json:
        print_json({**found.as_json(), "alternatives": [asdict(way) for way in ways]}, indent=2)
        if found.choice is None:
            raise typer.Exit(1)


def _machines(plans: Sequence[Plan], html: Path | None, as_json: bool) -> None:
    from edgepeft import tables

    plain = [each.as_json() for each in plans]
    if html is not None:
        heatmap.write(plain, html)
    if as_json:
        print_json(plain, indent=2)
    else:
        tables.machines(plain)
    if all(each.choice is None for each in plans):
        raise typer.Exit(1)


def _inference(
    model: str,
    infer: bool,
    target: str | None,
    task: str | None,
    tokens: int | None,
    reserve: float,
    training: dict[str, Any],
    trust_remote_code: bool,
    as_json: bool,
) -> None:
    _needs("--target", target, "--infer", infer)
    if (gpu := training.pop("--gpu", None)) is not None:
        remedy = f"Use --target {gpu}." if target is None else "Leave --gpu out."
        raise UsageError("plan: --infer has a --target instead of a --gpu.", "", remedy)
    training.pop("--reserve")
    printed = {"--markdown": training.pop("--markdown")}
    _alone("--infer", True, printed, "The Markdown table is one of training; --infer prints a table, or JSON (--json).")
    _alone("--infer", True, training, "With --infer there is nothing to train.")
    from edgepeft import backbone, hardware, inferplan, planning, tables

    device = planning.leaving(hardware.runner(hardware.AUTO if target is None else target), reserve)
    source = backbone.resolve(model)
    planned = partial(inferplan.plan_model, source, device, task=task, trust_remote_code=trust_remote_code)
    found = planned(tokens=tokens)
    if as_json:
        print_json(found.as_json(), indent=2)
    else:
        tables.inference(found)
        tables.say(found.lengths)
    if not found.fits and not as_json:
        ways = inferplan.remedy(found, lambda shorter: planned(tokens=shorter), round(reserve * planning.GiB))
        tables.say(f"Nothing fits. {ways}")
    if not found.fits:
        raise typer.Exit(1)


def _alone(flag: str, given: bool, others: Mapping[str, Any], why: str) -> None:
    clashing = [other for other, value in others.items() if value is not None]
    if given and clashing:
        named = ", ".join(clashing)
        raise UsageError(f"plan: {flag} and {named} do not go together.", why, f"Leave {flag} out, or {named}.")


def _needs(flag: str, value: Any, other: str, given: bool) -> None:
    if value is not None and not given:
        raise UsageError(f"plan: {flag} says nothing without {other}.", "", f"Add {other}, or leave {flag} out.")


def _check_new(flag: str, path: Path | None, replaceable: Callable[[Path], bool]) -> None:
    """Refuse what cannot be written, and a file that is there, unless it may be replaced."""
    flags.check_file(f"plan: {flag}", path)
    if path is not None and path.exists() and not replaceable(path):
        raise UsageError(
            f"plan: {flag} {path} is already there.",
            "Nothing in it was touched.",
            "Give another name, or delete it.",
        )
