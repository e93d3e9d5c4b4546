"""The frozen choice of everything that decides a run, and its file, recipe.toml."""

from __future__ import annotations

import dataclasses
import json
import math
import tomllib
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import UnionType
from typing import Any

from edgepeft.errors import UsageError, nearest
from edgepeft.files import write_text
from edgepeft.surface import ADAMW, DDP, EIGHT_BIT, FSDP, OPTIMIZERS, STRATEGIES

PRECISIONS = ("fp32", "bf16", "int8", "nf4")
VARIANTS = ("fp32", "int8", "int4")  # ONNX precisions
MOST = {  # more than anyone means; the loss goes through targets a part at a time, and so does its trace
    "seed": 2**32 - 1,
    **dict.fromkeys(("epochs", "global_batch", "microbatch"), 1_000_000),
    "max_tokens": 2**20,
    "max_target_tokens": 2**17,
}
_POSITIVE = (
    *("max_tokens", "max_target_tokens", "validation_limit", "microbatch", "global_batch", "epochs", "max_steps"),
    *("devices", "lr", "clip_norm", "evaluations", "patience"),
)


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What ``edgepeft run`` does. All but ``model`` and ``data`` has a default; what is None is chosen by the plan."""

    model: str
    """A folder, a GGUF file, a name of the catalogue or a hub id."""
    data: str
    """A .jsonl, .csv, .tsv or .parquet file, a folder with train and validation files, or a data set of the hub."""
    task: str | None = None
    """classification, causal-lm or seq2seq; read from the data's columns when not given."""
    columns: Mapping[str, str] = field(default_factory=dict)
    """Which columns are text, label, prompt, completion, input, target or messages, where they are named otherwise:
    `columns.text=review`."""
    validation: str | None = None
    """A file to validate on, or a folder or data set with a validation split; otherwise a share of the data is kept."""
    validation_fraction: float = 0.1
    """That share; examples of equal inputs are kept together."""
    validation_limit: int = 500
    """Examples of the validation split that an evaluation uses at most."""
    max_tokens: int | None = None
    """Longer examples are cut; 512, or as many as the model can read, when not given."""
    max_target_tokens: int = 128
    """Longer targets are cut (seq2seq)."""

    hardware: str = "auto"
    """A profile, a file with one, or auto for this machine."""
    devices: int = 1
    """How many of it share every update: GPUs of this machine, or processes of a CPU."""
    strategy: str | None = None
    """ddp, where each of several devices has a copy of the model, or fsdp, where each has a part of it."""
    method: str | None = None
    """A method's name, or the dotted path of one of your own."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """The method's hyper-parameters, such as `options.rank=16`; `edgepeft methods NAME` lists them."""
    precision: str | None = None
    """fp32, bf16, int8 or nf4."""
    microbatch: int | None = None
    """Examples in one forward pass."""
    checkpointing: bool | None = None
    """Whether activations are computed again in backward instead of kept."""
    optimizer: str | None = None
    """adamw, or adamw-8bit, whose states take a quarter of the memory; the latter where only that fits well."""

    global_batch: int = 16
    """Examples of one update, whatever the microbatch."""
    epochs: float = 1.0
    """Times the training data is seen."""
    max_steps: int | None = None
    """Updates after which training ends, if it has not before."""
    lr: float | None = None
    """Highest learning rate; the method's own when not given."""
    schedule: str = "cosine"
    """How the rate falls after the warm-up: cosine or linear, to zero."""
    warmup: float = 0.05
    """Share of the updates over which the rate rises from zero."""
    weight_decay: float = 0.0
    """AdamW's decay of matrices."""
    clip_norm: float = 1.0
    """Largest global norm of a gradient."""
    evaluations: int = 4
    """Evaluations and checkpoints over the run; the best adapter is kept."""
    patience: int | None = None
    """Evaluations in a row without improvement after which training stops early."""
    seed: int = 0
    """Of everything random: data order, split, initialisation, dropout; from 0 to 4294967295."""

    variants: tuple[str, ...] = ("int8",)
    """ONNX precisions that are made besides fp32, of int8 and int4; the smallest one that keeps the fine-tune goes to
    the device."""
    trust_remote_code: bool = False
    """Run code that a model repository brings along."""

    @property
    def choice(self) -> str:
        """What a plan chose, in words."""
        again = ", checkpointed" if self.checkpointing else ""
        again += f", {EIGHT_BIT}" if self.optimizer == EIGHT_BIT else ""
        again += f", on {self.devices} devices by {(self.strategy or DDP).upper()}" if self.devices > 1 else ""
        return f"{self.method} on {self.precision}, microbatch {self.microbatch}{again}"

    def __post_init__(self) -> None:
        for name, hint in typing.get_type_hints(Recipe).items():
            value = getattr(self, name)
            if isinstance(value, float) and not math.isfinite(value):
                raise UsageError(f"recipe: {name} = {value} is no number to count with.", "", "Give a finite one.")
            if not _fits(value, hint):
                raise UsageError(
                    f"recipe: {name} = {_shown(value)} is not of the right type.",
                    f"Expected {in_words(hint)}.",
                    "After --set, for instance: epochs=3, checkpointing=true, variants=int4, columns.text=review. "
                    "docs/recipe.md lists all.",
                )
        for name in _POSITIVE:
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise UsageError(f"recipe: {name} = {value} must be positive.", "", "")
        check_shared(self.global_batch, self.devices)
        if self.strategy is not None and self.devices == 1:
            raise UsageError(
                f"recipe: strategy = {self.strategy!r} says nothing of one device.",
                "It is how several share a model.",
                "Add --set devices=2, or leave it out.",
            )
        for name in ("seed", "weight_decay"):
            if getattr(self, name) < 0:
                raise UsageError(f"recipe: {name} = {getattr(self, name)} must not be negative.", "", "")
        for name, most in MOST.items():
            if (getattr(self, name) or 0) > most:
                raise UsageError(f"recipe: {name} = {getattr(self, name)} is too large.", "", f"Give at most {most:,}.")
        for name, fits in (("warmup", 0 <= self.warmup < 1), ("validation_fraction", 0 < self.validation_fraction < 1)):
            if not fits:
                raise UsageError(
                    f"recipe: {name} = {getattr(self, name)} is not a share between 0 and 1.",
                    "",
                    f"A tenth, for instance, is {name}=0.1",
                )
        for value, known in (
            (self.schedule, ("cosine", "linear")),
            (self.optimizer or ADAMW, OPTIMIZERS),
            (self.precision or PRECISIONS[0], PRECISIONS),
            (self.strategy or DDP, STRATEGIES),
            *((variant, VARIANTS) for variant in self.variants),
        ):
            if value not in known:
                raise UsageError(f"recipe: {value!r} is not known here.", "", nearest(value, known))


def check_count(named: str, count: float | None, most: int) -> None:
    """Refuse a number that nothing can be counted by, as an option is ``named``.

    Raises:
        UsageError: see above.
    """
    if count is not None and not 0 < count <= most:
        raise UsageError(f"{named} {count} must be above 0, and no more than {most:,}.", "", "")


def check_shared(global_batch: int, devices: int) -> None:
    """Refuse a global batch that several devices cannot share.

    Raises:
        UsageError: see above.
    """
    if global_batch % devices:
        raise UsageError(
            f"A global batch of {global_batch} cannot be shared among {devices} devices.",
            "Each must see as many examples of an update as the others.",
            f"Try --global-batch {-(-global_batch // devices) * devices}.",
        )


def check_sharded(optimizer: str | None, strategy: str | None) -> None:
    """Refuse an optimizer that cannot work on parts of tensors, where each device has one.

    Raises:
        UsageError: see above.
    """
    if optimizer == EIGHT_BIT and strategy == FSDP:
        raise UsageError(
            f"{EIGHT_BIT} cannot be used with FSDP.",
            "Its states are quantised in blocks that run across the rows of a tensor, of which each device has some.",
            "Try --set strategy=ddp, or --optimizer adamw, whose states FSDP divides among the devices.",
        )


def create(values: Mapping[str, Any]) -> Recipe:
    """A recipe from plain values, as read from TOML.

    Raises:
        UsageError: a key that recipes do not have, a missing one, or a value of another type.
    """
    known = {entry.name for entry in dataclasses.fields(Recipe)}
    for name in values:
        if name not in known:
            raise UsageError(f"recipe: there is no {name!r}.", "", nearest(name, known))
    for name in ("model", "data"):
        if name not in values:
            raise UsageError(f"recipe: {name} is missing.", "", f"Give --{name}, or {name} = ... in the recipe file.")
    fields: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value for name, value in values.items()
    }
    for name, hint in typing.get_type_hints(Recipe).items():
        if typing.get_origin(hint) is tuple and isinstance(fields.get(name), str):
            fields[name] = (fields[name],)  # one name is a list of one
    return Recipe(**fields)


def read(path: Path) -> dict[str, Any]:
    """The values of a recipe file.

    Raises:
        UsageError: there is no such file, or it is not TOML.
    """
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UsageError(f"There is no recipe {path}.", "", "`edgepeft plan --recipe FILE` writes one.") from error
    except IsADirectoryError as error:
        inside = path / "recipe.toml"
        remedy = f"Did you mean {inside}?" if inside.is_file() else "Give the name of a file."
        raise UsageError(f"The recipe {path} cannot be read.", "It is a folder.", remedy) from error
    except (ValueError, RecursionError) as error:
        raise UsageError(f"The recipe {path} cannot be read.", str(error), "Recipes are TOML files.") from error


def assign(values: dict[str, Any], setting: str) -> None:
    """Set ``key=value`` or ``options.key=value``, with the value in TOML; a bare word is a string.

    Raises:
        UsageError: there is no ``=``, or what stands before a dot holds no keys.
    """
    key, found, text = setting.partition("=")
    if not found:
        raise UsageError(f"--set {setting} is not of the form key=value.", "", "For example: --set options.rank=16")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except (ValueError, RecursionError):
        value = text
    *parents, leaf = key.strip().split(".")
    for parent in parents:
        values = values.setdefault(parent, {})
        if not isinstance(values, dict):
            raise UsageError(f"--set {setting}: {parent} is not a table.", "", "Only options and columns hold keys.")
    values[leaf] = value


def assignment(key: str, value: Any) -> str:
    """What ``assign`` takes to set ``key``."""
    return f"{key}={_toml(value)}"


def check_trained(folder: Path) -> None:
    """Refuse a run that is not trained to its end: what goes on from one does not train for hours first.

    Raises:
        UsageError: ``folder`` holds such a run.
    """
    path = folder / "recipe.toml"
    if path.exists() and not (folder / "adapter").is_dir():
        remedy = f"Go on with it: edgepeft train --recipe {path} --out {folder}"
        raise UsageError(f"The run in {folder} is not trained to its end.", "It has no adapter yet.", remedy)


def write(recipe: Recipe, path: Path) -> None:
    """Write recipe.toml."""
    write_text(path, dumps(recipe))


def dumps(recipe: Recipe) -> str:
    """A recipe as TOML. Tables come last, as TOML wants it."""
    plain, tables = [], []
    for entry in dataclasses.fields(recipe):
        value = getattr(recipe, entry.name)
        if isinstance(value, Mapping):
            if value:
                lines = [f"{_key(key)} = {_toml(item)}" for key, item in value.items()]
                tables.append("\n".join([f"[{entry.name}]", *lines]))
        elif value is not None:
            plain.append(f"{entry.name} = {_toml(value)}")
    return "\n".join(plain) + "\n" + "".join(f"\n{table}\n" for table in tables)


def in_words(hint: Any) -> str:
    """A field's type as people say it; that some may be left out is not part of it."""
    if isinstance(hint, UnionType):
        [hint] = (part for part in typing.get_args(hint) if part is not type(None))
    return _IN_WORDS[typing.get_origin(hint) or hint]


_IN_WORDS = {
    str: "text",
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    tuple: "a list of names",
    Mapping: "a table",
}


def _key(key: str) -> str:
    return key if key.replace("_", "").replace("-", "").isalnum() and key.isascii() else json.dumps(key)


def _toml(value: Any) -> str:
    if isinstance(value, (tuple, list)):
        return "[" + ", ".join(map(_toml, value)) + "]"
    # TOML writes strings, numbers and booleans as JSON does, but for one character
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")


def _fits(value: Any, hint: Any) -> bool:
    if isinstance(hint, UnionType):
        return any(_fits(value, part) for part in typing.get_args(hint))
    if hint is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    origin, parts = typing.get_origin(hint) or hint, typing.get_args(hint)
    if origin is tuple:
        return isinstance(value, tuple) and all(_fits(item, parts[0]) for item in value)
    if origin is Mapping:
        return isinstance(value, Mapping) and all(_fits(item, parts[1]) for item in value.values())
    return hint is Any or isinstance(value, origin)


def _shown(value: Any) -> str:
    """As a user wrote it; dates, which TOML has and recipes have not, as they are."""
    return str(value) if isinstance(value, float) else json.dumps(value, default=str, ensure_ascii=False)
