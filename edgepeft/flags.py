"""The options that several commands of the command line share."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from edgepeft.errors import UsageError

Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Model = Annotated[str, typer.Option("--model", help="A folder, a GGUF file, a catalogue name or a hub id.")]
Gpu = Annotated[str | None, typer.Option("--gpu", "--hardware", help="A profile, a .toml of your own, or auto.")]
Gpus = Annotated[int | None, typer.Option("--gpus", help="How many GPUs of this machine share the work (DDP, FSDP).")]
Method = Annotated[str | None, typer.Option("--method", help="A method's name, or a dotted path.")]
Precision = Annotated[str | None, typer.Option("--precision", help="fp32, bf16, int8 or nf4.")]
Optimizer = Annotated[str | None, typer.Option("--optimizer", help="adamw or adamw-8bit.")]
Task = Annotated[str | None, typer.Option("--task", help="classification, causal-lm or seq2seq.")]
SeqLen = Annotated[int | None, typer.Option("--seq-len", help="Longest sequence in tokens.")]
TargetLen = Annotated[int | None, typer.Option("--target-len", help="Longest target in tokens (seq2seq).")]
GlobalBatch = Annotated[int | None, typer.Option("--global-batch", help="Examples of one update.")]
Recipe = Annotated[Path | None, typer.Option("--recipe", help="A recipe.toml.")]
Set = Annotated[list[str] | None, typer.Option("--set", help="key=value of the recipe (docs/recipe.md); repeatable.")]
Option = Annotated[
    list[str] | None,
    typer.Option("--set", help="options.NAME=value of the method (see `edgepeft methods METHOD`); repeatable."),
]
Afterwards = Annotated[
    list[str] | None,
    typer.Option("--set", help="variants, hardware, trust_remote_code, or where model and data lie now; repeatable."),
]


def check_file(named: str, path: Path | None) -> None:
    """Refuse what no file can be written to, before work whose result would be lost.

    Args:
        named: the command and its flag.

    Raises:
        UsageError: see above.
    """
    if path is not None and (path.is_dir() or not path.absolute().parent.is_dir()):
        why = "It is a folder." if path.is_dir() else f"There is no folder {path.absolute().parent}."
        raise UsageError(f"{named} {path} cannot be written.", why, "Give the name of a file.")


class Commands(TyperGroup):
    """Commands that refuse a flag which is given twice: typer would take the last, and say nothing."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """The command that is named, and what is left of the line for it.

        Raises:
            UsageError: a flag of one value has two.
        """
        name, command, rest = super().resolve_command(ctx, args)
        if command is not None:
            _check_once(str(name), command, rest)
        return name, command, rest


def _check_once(name: str, command: Any, line: Sequence[str]) -> None:
    known = {
        flag: option
        for option in command.params
        if option.param_type_name == "option" and not (option.is_flag or option.multiple)
        for flag in option.opts
    }
    given: dict[str, tuple[str, str]] = {}
    words = iter(line)
    for word in words:
        if word == "--":
            return
        flag, found, value = word.partition("=")
        if flag not in known:
            continue
        value = value if found else next(words, "")
        before, first = given.setdefault(known[flag].name, (flag, value))
        if first != value:
            raise UsageError(
                f"{name}: {before} {first} and {flag} {value} do not go together.",
                "It takes one value.",
                "Leave one out.",
            )
