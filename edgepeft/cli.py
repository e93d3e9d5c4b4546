"""The command line. Heavy imports stay inside the commands, so that help and profiles answer at once."""

from __future__ import annotations

import copy
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Annotated, Any

import typer

from edgepeft import flags, plancommand
from edgepeft.errors import EdgePeftError, UsageError, said
from edgepeft.output import bear_any_text, print_json

if TYPE_CHECKING:
    from edgepeft.ledger import Row

app = typer.Typer(
    cls=flags.Commands,
    help="Plan, fine-tune, merge and export models on the hardware you have.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

Model = Annotated[str | None, typer.Option("--model", help="A folder, a GGUF file, a catalogue name or a hub id.")]
DataOption = Annotated[
    str | None, typer.Option("--data", help="A .jsonl, .csv, .tsv or .parquet file, a folder, or a hub data set.")
]
Out = Annotated[Path, typer.Option("--out", help="The folder of the run.")]
RunFolder = Annotated[Path, typer.Argument(help="The folder of a run.")]


def _version(wanted: bool) -> None:
    if wanted:
        from edgepeft import __version__

        print(__version__)
        raise typer.Exit


@app.callback()
def about(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and end.")
    ] = False,
) -> None:
    """Plan, fine-tune, merge and export models on the hardware you have."""


@app.command()
def profiles(
    name: Annotated[str | None, typer.Argument(help="One profile, or auto.")] = None, as_json: flags.Json = False
) -> None:
    """Show the hardware profiles, or every number of one with its source."""
    from edgepeft import hardware, tables

    found = [hardware.load(name)] if name else [hardware.load(each) for each in hardware.names()]
    if as_json:
        shown = [{**asdict(each), "available_bytes": each.available_bytes} for each in found]
        print_json(shown[0] if name else shown, indent=2)
    elif name:
        tables.profile(found[0])
    else:
        tables.profiles(found)


_LISTED = ("name", "kind", "merges", "paper")  # of a method, where all are listed; one alone is told in full


@app.command()
def methods(
    name: Annotated[str | None, typer.Argument(help="One method.")] = None, as_json: flags.Json = False
) -> None:
    """List the methods by the survey's taxonomy, or show the hyper-parameters of one."""
    from edgepeft import tables, taxonomy
    from edgepeft.methods import base

    found = [taxonomy.describe(base.find(name))] if name else taxonomy.catalogue()
    if as_json:
        print_json(found[0] if name else [{key: each[key] for key in _LISTED} for each in found], indent=2)
    elif name:
        tables.method(found[0])
    else:
        tables.methods(found)


app.command()(plancommand.plan)


@app.command()
def measure(
    model: flags.Model,
    method: Annotated[str, typer.Option("--method", help="A method's name, or a dotted path.")],
    task: flags.Task = None,
    precision: flags.Precision = None,
    optimizer: flags.Optimizer = None,
    seq_len: Annotated[int, typer.Option("--seq-len", min=1, help="Tokens of a sequence.")] = 512,
    target_len: Annotated[int, typer.Option("--target-len", min=1, help="Tokens of a target (seq2seq).")] = 128,
    microbatch: Annotated[int, typer.Option(min=1, help="Sequences of a microbatch.")] = 1,
    checkpointing: Annotated[bool, typer.Option("--checkpointing", help="Compute activations again.")] = False,
    settings: flags.Option = None,
    out: Annotated[Path | None, typer.Option("--out", help="A .csv file that the row is added to.")] = None,
    as_json: flags.Json = False,
) -> None:
    """Run two real steps on this machine, and compare what they hold with what was predicted."""
    from edgepeft import backbone, hardware, tables
    from edgepeft import measure as measuring
    from edgepeft import recipe as recipes
    from edgepeft.surface import ADAMW

    values: dict[str, Any] = {}
    for setting in settings or []:
        recipes.assign(values, setting)
    if other := sorted(values.keys() - {"options"}):
        raise UsageError(
            f"measure: --set takes options of the method, and not {other[0]}.", "", "For example: --set options.rank=16"
        )
    for flag, count, name in (
        ("seq-len", seq_len, "max_tokens"),
        ("target-len", target_len, "max_target_tokens"),
        ("microbatch", microbatch, "microbatch"),
    ):
        recipes.check_count(f"measure: --{flag}", count, recipes.MOST[name])
    flags.check_file("measure: --out", out)
    if out is not None:
        measuring.rows_of(out)  # what it holds is known before the work, whose result would be lost
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
        optimizer=optimizer or ADAMW,
    )
    if out is not None:
        measuring.append(out, row)
    if as_json:
        print_json(row, indent=2)
    else:
        tables.measured(row)


def _to(until: str) -> Callable[..., None]:
    """A command that begins a run or goes on with it, up to a stage."""

    def command(
        out: Out,
        model: Model = None,
        data: DataOption = None,
        recipe: flags.Recipe = None,
        gpu: flags.Gpu = None,
        gpus: flags.Gpus = None,
        task: flags.Task = None,
        method: flags.Method = None,
        precision: flags.Precision = None,
        optimizer: flags.Optimizer = None,
        seq_len: flags.SeqLen = None,
        target_len: flags.TargetLen = None,
        global_batch: flags.GlobalBatch = None,
        epochs: Annotated[float | None, typer.Option("--epochs", help="Times the data is seen.")] = None,
        lr: Annotated[float | None, typer.Option("--lr", help="Highest learning rate.")] = None,
        settings: flags.Set = None,
        as_json: flags.Json = False,
    ) -> None:
        from edgepeft import recipe as recipes

        if recipe is None and model is None and data is None and (out / "recipe.toml").is_file():
            recipe = out / "recipe.toml"  # the run that is there goes on
        values = recipes.read(recipe) if recipe else {}
        flagged = {
            "model": model,
            "data": data,
            "hardware": gpu,
            "devices": gpus,
            "task": task,
            "method": method,
            "precision": precision,
            "optimizer": optimizer,
            "max_tokens": seq_len,
            "max_target_tokens": target_len,
            "global_batch": global_batch,
            "epochs": epochs,
            "lr": lr,
        }
        values |= {name: value for name, value in flagged.items() if value is not None}
        for setting in settings or []:  # the recipe file, then flags, then --set: the later one wins
            recipes.assign(values, setting)
        if gpus is not None:
            from edgepeft import hardware, planning

            remedy = f"Leave it out, or share the cores among {gpus} processes: --set devices={gpus}."
            planning.check_devices(gpus, hardware.load(values.get("hardware", hardware.AUTO)), remedy)
        _run(values, out, until, as_json)

    return command


app.command(
    "run", help="Plan, train, merge, export, verify and package. The same command goes on where an earlier one stopped."
)(_to("export"))
app.command("train", help="Plan and train only.")(_to("train"))


@app.command()
def merge(folder: RunFolder, settings: flags.Afterwards = None, as_json: flags.Json = False) -> None:
    """Merge the adapter of a run into its backbone."""
    _run(_trained(folder, settings), folder, "merge", as_json)


@app.command()
def export(folder: RunFolder, settings: flags.Afterwards = None, as_json: flags.Json = False) -> None:
    """Export a trained run to ONNX and package it for the device."""
    _run(_trained(folder, settings), folder, "export", as_json)


@app.command()
def adapter(
    source: Annotated[Path, typer.Argument(help="A run, an adapter of edgepeft's, or one of HF PEFT's.")],
    target: Annotated[Path, typer.Argument(help="The folder to write.")],
    model: Annotated[str | None, typer.Option("--model", help="The backbone, if it is not where PEFT's says.")] = None,
    data: Annotated[
        str | None, typer.Option("--data", help="Make the target a run, which is measured on this data from there on.")
    ] = None,
) -> None:
    """Write an adapter in HF PEFT's format, or one of PEFT's in edgepeft's (with --data, a run to merge and export)."""
    from edgepeft import bring, interop, tables

    if target.exists():
        raise UsageError(f"{target} is already there.", "Nothing in it was touched.", "Choose another folder.")
    if data is None:
        notes = interop.convert(source, target, model)
    else:
        notes = bring.begin(source, target, data=data, model=model)
        notes += (f"Merge it with `edgepeft merge {target}`; `edgepeft export {target}` also exports it.",)
    for note in (*notes, f"adapter: {target}"):
        tables.say(note)


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []})
def infer(context: typer.Context) -> None:
    """Answer a text from a device folder, on onnxruntime alone."""
    from edgepeft.runtime.__main__ import main as device_main

    raise typer.Exit(device_main(context.args, prog="edgepeft infer"))


def main() -> None:
    """The ``edgepeft`` command."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    bear_any_text()
    try:
        app(standalone_mode=True)
    except EdgePeftError as error:
        sys.stdout.flush()
        print(error, file=sys.stderr)
        sys.exit(error.exit_code)
    except OSError as error:
        sys.stdout.flush()
        where, remedy = (
            (error.filename, "Choose another path.") if error.filename else ("A file", "Check disk and network.")
        )
        cause = (error.strerror or said(error)).rstrip(".")  # one that a library raised may have a text alone
        print(f"{where} cannot be used.\n{cause}.\n{remedy}", file=sys.stderr)
        sys.exit(EdgePeftError.exit_code)


# What a run that is trained still takes: what is made of it, and where things lie. The workspace checks the latter.
_OPEN = ("variants", "hardware", "trust_remote_code", "model", "data", "validation")
_UNSAID = ("lr", "max_steps", "patience")  # settled too, though they may have no value


def _trained(folder: Path, settings: Sequence[str] | None) -> dict[str, Any]:
    """The recipe of a run that was trained to its end, with settings of this call."""
    from edgepeft import recipe as recipes

    path = folder / "recipe.toml"
    if not path.exists():
        raise UsageError(f"There is no run in {folder}.", "It has no recipe.toml.", "Start one with `edgepeft run`.")
    recipes.check_trained(folder)
    values = recipes.read(path)
    before = recipes.create(copy.deepcopy(values))
    for setting in settings or []:
        recipes.assign(values, setting)
    wanted = recipes.create(values)
    settled = [name for name, was in vars(before).items() if was is not None and name not in _OPEN] + [*_UNSAID]
    if late := sorted({name for name in settled if getattr(before, name) != getattr(wanted, name)}):
        raise UsageError(
            f"The run in {folder} is trained; {', '.join(late)} cannot change any more.",
            "--set takes variants and hardware here, and where its model and data lie now.",
            f"Leave it out, or train another run: edgepeft run --recipe {path} --out OTHER, with --set.",
        )
    return values


def _run(values: dict[str, Any], out: Path, until: str, as_json: bool) -> None:
    from edgepeft import ledger, pipeline, tables
    from edgepeft import recipe as recipes

    space = pipeline.run(recipes.create(values), out, until=until, say=tables.quiet if as_json else tables.say)
    rows = ledger.read(space.ledger)
    if as_json:
        print_json({"out": str(out), "ledger": [asdict(row) for row in rows]}, indent=2)
    else:
        tables.ledger(rows)
        _warn(rows)
        tables.say(f"report: {out / 'report.html'}")
        if until == "export":
            tables.say(f'Try it: edgepeft infer {quote(str(space.device))} "..."')


def _warn(rows: Sequence[Row]) -> None:
    """Say so where training did not help."""
    from edgepeft import tables
    from edgepeft.evaluate import better

    base, tuned = (next((row.metrics for row in rows if row.artefact == name), None) for name in ("base", "adapter"))
    if base and tuned and not better("classification" if "accuracy" in base else "", tuned, base):
        before, after = (", ".join(f"{name} {value:.4f}" for name, value in each.items()) for each in (base, tuned))
        tables.say(f"Fine-tuning did not help: {before} became {after}. Try more epochs (--epochs) or another --lr.")


if __name__ == "__main__":
    main()
