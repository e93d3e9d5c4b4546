"""The options that several commands of the command line share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Model = Annotated[str, typer.Option("--model", help="A folder, a GGUF file, a catalogue name or a hub id.")]
Gpu = Annotated[str | None, typer.Option("--gpu", "--hardware", help="A profile, a .toml of your own, or auto.")]
Gpus = Annotated[int | None, typer.Option("--gpus", help="How many GPUs of this machine share the work (DDP).")]
Method = Annotated[str | None, typer.Option("--method", help="A method's name, or a dotted path.")]
Precision = Annotated[str | None, typer.Option("--precision", help="fp32, bf16, int8 or nf4.")]
Optimizer = Annotated[str | None, typer.Option("--optimizer", help="adamw or adamw-8bit.")]
Task = Annotated[str | None, typer.Option("--task", help="classification, causal-lm or seq2seq.")]
SeqLen = Annotated[int | None, typer.Option("--seq-len", help="Longest sequence in tokens.")]
TargetLen = Annotated[int | None, typer.Option("--target-len", help="Longest target in tokens (seq2seq).")]
GlobalBatch = Annotated[int | None, typer.Option("--global-batch", help="Examples of one update.")]
Recipe = Annotated[Path | None, typer.Option("--recipe", help="A recipe.toml.")]
Set = Annotated[list[str] | None, typer.Option("--set", help="key=value of the recipe (docs/recipe.md); repeatable.")]
