"""The command line. Heavy imports stay inside the commands, so that help and profiles answer at once."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from edgepeft.errors import EdgePeftError, UsageError

app = typer.Typer(
    help="Plan, fine-tune, merge and export models on the hardware you have.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Model = Annotated[str | None, typer.Option("--model", help="A folder, a GGUF file, a catalogue name or a hub id.")]
DataOption = Annotated[
    str | None, typer.Option("--data", help="A .jsonl, .csv or .parquet file, a folder, or a hub data set.")
]
Out = Annotated[Path, typer.Option("--out", help="The folder of the run.")]
Gpu = Annotated[str | None, typer.Option("--gpu", "--hardware", help="A profile, a .toml of your own, or auto.")]
MethodOption = Annotated[str | None, typer.Option("--method", help="A method's name, or a dotted path.")]
PrecisionOption = Annotated[str | None, typer.Option("--precision", help="fp32, bf16, int8 or nf4.")]
Task = Annotated[str | None, typer.Option("--task", help="classification, causal-lm or seq2seq.")]
SeqLen = Annotated[int | None, typer.Option("--seq-len", help="Longest sequence in tokens.")]
TargetLen = Annotated[int | None, typer.Option("--target-len", help="Longest target in tokens (seq2seq).")]
GlobalBatch = Annotated[int | None, typer.Option("--global-batch", help="Examples of one update.")]
RecipeOption = Annotated[Path | None, typer.Option("--recipe", help="A recipe.toml.")]
Set = Annotated[list[str] | None, typer.Option("--set", help="key=value of the recipe; repeatable.")]
RunFolder = Annotated[Path, typer.Argument(help="The folder of a run.")]


@app.command()
def profiles(
    name: Annotated[str | None, typer.Argument(help="One profile, or auto.")] = None, as_json: Json = False
) -> None:
    """Show the hardware profiles, or every number of one with its source."""
    from edgepeft import hardware, tables

    found = [hardware.load(name)] if name else [hardware.load(each) for each in hardware.names()]
    if as_json:
        shown = [{**asdict(each), "available_bytes": each.available_bytes} for each in found]
        _print_json(shown[0] if name else shown)
    elif name:
        tables.profile(found[0])
    else:
        tables.profiles(found)


@app.command()
def methods(name: Annotated[str | None, typer.Argument(help="One method.")] = None, as_json: Json = False) -> None:
    """List the methods by the survey's taxonomy, or show the hyper-parameters of one."""
    from edgepeft import tables
    from edgepeft.methods import base

    found = [base.describe(base.find(name))] if name else base.catalogue()
    if as_json:
        _print_json(found[0] if name else found)
    elif name:
        tables.method(found[0])
    else:
        tables.methods(found)


@app.command()
def plan(
    model: Annotated[str, typer.Option("--model", help="A folder, a GGUF file, a catalogue name or a hub id.")],
    gpu: Gpu = None,
    task: Task = None,
    method: MethodOption = None,
    precision: PrecisionOption = None,
    seq_len: SeqLen = None,
    target_len: TargetLen = None,
    global_batch: GlobalBatch = None,
    settings: Set = None,
    infer: Annotated[bool, typer.Option("--infer", help="Plan running the model, not training it.")] = False,
    target: Annotated[str | None, typer.Option("--target", help="The device that runs it, with --infer.")] = None,
    reserve: Annotated[float, typer.Option(min=0, help="GiB of the device to leave to others.")] = 0.0,
    objective: Annotated[str, typer.Option(help="What decides among what fits: quality or memory.")] = "quality",
    recipe: Annotated[Path | None, typer.Option("--recipe", help="Write the choice as a recipe for `run`.")] = None,
    data: Annotated[str, typer.Option("--data", help="The data that the recipe names.")] = "data.jsonl",
    markdown: Annotated[bool, typer.Option("--markdown", help="Print a Markdown table.")] = False,
    trust_remote_code: Annotated[bool, typer.Option(help="Run code that the model brings along.")] = False,
    as_json: Json = False,
) -> None:
    """Say what fits a device, before a byte of weights is downloaded. Exit code 1 when nothing does."""
    from edgepeft import hardware, planning, tables
    from edgepeft import recipe as recipes

    if as_json and markdown:
        raise UsageError("plan: --json and --markdown exclude each other.", "", "Leave one of them out.")
    if infer or target:
        training = {"--gpu": gpu, "--method": method, "--precision": precision, "--global-batch": global_batch}
        _plan_inference(model, infer, target, task, seq_len, training, trust_remote_code, as_json)
        return
    found = planning.plan_model(
        model,
        planning.leaving(hardware.load(gpu or hardware.AUTO), round(reserve * 2**30)),
        task=task,
        method=method,
        precision=precision,
        tokens=seq_len,
        target_tokens=target_len,
        global_batch=global_batch,
        settings=settings or [],
        trust_remote_code=trust_remote_code,
        objective=objective,
        progress=tables.quiet if as_json else tables.progress("tracing"),
    )
    if as_json:
        _print_json(found.as_json())
    elif markdown:
        print(tables.markdown(found))
    else:
        tables.plan(found)
    if recipe is not None and found.choice is not None:
        recipes.write(planning.recipe(found, data, seq_len, target_len, global_batch, settings or []), recipe)
    if found.choice is None:
        if as_json:
            raise typer.Exit(1)
        raise EdgePeftError(*found.nothing_fits())


@app.command()
def measure(
    model: Annotated[str, typer.Option("--model", help="A folder, a GGUF file, a catalogue name or a hub id.")],
    method: Annotated[str, typer.Option("--method", help="A method's name, or a dotted path.")],
    task: Task = None,
    precision: PrecisionOption = None,
    seq_len: Annotated[int, typer.Option("--seq-len", min=1, help="Tokens of a sequence.")] = 512,
    target_len: Annotated[int, typer.Option("--target-len", min=1, help="Tokens of a target (seq2seq).")] = 128,
    microbatch: Annotated[int, typer.Option(min=1, help="Sequences of a microbatch.")] = 1,
    checkpointing: Annotated[bool, typer.Option("--checkpointing", help="Compute activations again.")] = False,
    settings: Set = None,
    out: Annotated[Path | None, typer.Option("--out", help="A .csv file that the row is added to.")] = None,
    as_json: Json = False,
) -> None:
    """Run two real steps on this machine, and compare what they hold with what was predicted."""
    from edgepeft import backbone, hardware, tables
    from edgepeft import measure as measuring
    from edgepeft import recipe as recipes

    values: dict[str, Any] = {}
    for setting in settings or []:
        recipes.assign(values, setting)
    row = measuring.measure_model(
        backbone.resolve(model),
        hardware.load(hardware.AUTO),
        task=task,
        method=method,
        options=values.get("options", {}),
        precision_=precision,
        microbatch=microbatch,
        tokens=seq_len,
        target_tokens=target_len,
        checkpointing=checkpointing,
    )
    if out is not None:
        measuring.append(out, row)
    if as_json:
        _print_json(row)
    else:
        tables.measured(row)


@app.command()
def run(
    out: Out,
    model: Model = None,
    data: DataOption = None,
    recipe: RecipeOption = None,
    gpu: Gpu = None,
    task: Task = None,
    method: MethodOption = None,
    precision: PrecisionOption = None,
    seq_len: SeqLen = None,
    target_len: TargetLen = None,
    global_batch: GlobalBatch = None,
    settings: Set = None,
    as_json: Json = False,
) -> None:
    """Plan, train, merge, export, verify and package. The same command goes on where an earlier one stopped."""
    values = _values(recipe, settings, model, data, gpu, task, method, precision, seq_len, target_len, global_batch)
    _run(values, out, "export", as_json)


@app.command()
def train(
    out: Out,
    model: Model = None,
    data: DataOption = None,
    recipe: RecipeOption = None,
    gpu: Gpu = None,
    task: Task = None,
    method: MethodOption = None,
    precision: PrecisionOption = None,
    seq_len: SeqLen = None,
    target_len: TargetLen = None,
    global_batch: GlobalBatch = None,
    settings: Set = None,
    as_json: Json = False,
) -> None:
    """Plan and train only."""
    values = _values(recipe, settings, model, data, gpu, task, method, precision, seq_len, target_len, global_batch)
    _run(values, out, "train", as_json)


@app.command()
def merge(folder: RunFolder, as_json: Json = False) -> None:
    """Merge the adapter of a run into its backbone."""
    _run(_stored(folder), folder, "merge", as_json)


@app.command()
def export(folder: RunFolder, settings: Set = None, as_json: Json = False) -> None:
    """Export a trained run to ONNX and package it for the device."""
    from edgepeft import recipe as recipes

    values = _stored(folder)
    for setting in settings or []:
        recipes.assign(values, setting)
    _run(values, folder, "export", as_json)


@app.command()
def adapter(
    source: Annotated[Path, typer.Argument(help="A run, an adapter of edgepeft's, or one of HF PEFT's.")],
    target: Annotated[Path, typer.Argument(help="The folder to write.")],
) -> None:
    """Write an adapter in HF PEFT's format, or one of PEFT's in edgepeft's."""
    from edgepeft import interop

    if target.exists():
        raise UsageError(f"{target} is already there.", "Nothing in it was touched.", "Choose another folder.")
    if (source / interop.CONFIG).exists():
        interop.read(source, target)
    else:
        interop.write(source / "adapter" if (source / "adapter").is_dir() else source, target)


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []})
def infer(context: typer.Context) -> None:
    """Answer a text from a device folder, on onnxruntime alone."""
    from edgepeft.runtime.__main__ import main as device_main

    raise typer.Exit(device_main(context.args, prog="edgepeft infer"))


def main() -> None:
    """The ``edgepeft`` command."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        app(standalone_mode=True)
    except EdgePeftError as error:
        sys.stdout.flush()
        print(error, file=sys.stderr)
        sys.exit(error.exit_code)


def _plan_inference(
    model: str,
    infer: bool,
    target: str | None,
    task: str | None,
    tokens: int | None,
    training: Mapping[str, Any],
    trust_remote_code: bool,
    as_json: bool,
) -> None:
    given = [flag for flag, value in training.items() if value is not None]
    if not infer or given:
        cause = f"{', '.join(given)} is about training." if infer else "It names the device that runs a model."
        raise UsageError("plan: these flags do not go together.", cause, "plan --infer --target DEVICE --model MODEL")
    from edgepeft import backbone, hardware, inferplan, tables

    device = hardware.load(target or hardware.AUTO)
    source = backbone.resolve(model)
    found = inferplan.plan_model(source, device, task=task, tokens=tokens, trust_remote_code=trust_remote_code)
    if as_json:
        _print_json(found.as_json())
    else:
        tables.inference(found)
    if not found.fits:
        raise typer.Exit(1)


def _values(
    recipe: Path | None,
    settings: Sequence[str] | None,
    model: str | None,
    data: str | None,
    gpu: str | None,
    task: str | None,
    method: str | None,
    precision: str | None,
    seq_len: int | None,
    target_len: int | None,
    global_batch: int | None,
) -> dict[str, Any]:
    """The recipe file, then flags, then --set: the later one wins."""
    from edgepeft import recipe as recipes

    values = recipes.read(recipe) if recipe else {}
    flags = {
        "model": model,
        "data": data,
        "hardware": gpu,
        "task": task,
        "method": method,
        "precision": precision,
        "max_tokens": seq_len,
        "max_target_tokens": target_len,
        "global_batch": global_batch,
    }
    values |= {name: value for name, value in flags.items() if value is not None}
    for setting in settings or []:
        recipes.assign(values, setting)
    return values


def _stored(folder: Path) -> dict[str, Any]:
    from edgepeft import recipe as recipes

    path = folder / "recipe.toml"
    if not path.exists():
        raise UsageError(f"There is no run in {folder}.", "It has no recipe.toml.", "Start one with `edgepeft run`.")
    return recipes.read(path)


def _run(values: dict[str, Any], out: Path, until: str, as_json: bool) -> None:
    from edgepeft import ledger, pipeline, tables
    from edgepeft import recipe as recipes

    space = pipeline.run(recipes.create(values), out, until=until, say=tables.quiet if as_json else tables.say)
    rows = ledger.read(space.ledger)
    if as_json:
        _print_json({"out": str(out), "ledger": [asdict(row) for row in rows]})
    else:
        tables.ledger(rows)
        tables.say(f"report: {out / 'report.html'}")
        if until == "export":
            tables.say(f'Try it: edgepeft infer {space.device} "..."')


def _print_json(value: Any) -> None:
    print(json.dumps(value, indent=2, ensure_ascii=False))


if __name__ == "__main__":
    main()
