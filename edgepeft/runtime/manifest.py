"""manifest.json: what a device folder holds, and the proof that it is whole."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, get_args, get_origin, get_type_hints

from edgepeft.chat import is_whole
from edgepeft.errors import EdgePeftError, UsageError, nearest
from edgepeft.files import sha256, size_bytes, write_json

FORMAT = 1
MANIFEST = "manifest.json"
TOKENIZER = "tokenizer.json"
GRAPHS = {
    "classification": ("model.onnx",),
    "causal-lm": ("model.onnx",),
    "seq2seq": ("encoder.onnx", "decoder.onnx"),
}
PREFILL_TOKENS = 256
"""A longer prompt is read in pieces: the graph returns logits for every token it is given, (tokens, vocabulary) floats,
which would be gigabytes for a long prompt and a large vocabulary."""

_PASS_ANOTHER = "Pass the folder that `edgepeft export` wrote."
_EXPORT_AGAIN = "Copy the folder again from where it was made, or run `edgepeft export` again."


@dataclasses.dataclass(frozen=True, kw_only=True)
class Manifest:
    """The contents of manifest.json. Its fields are the keys of the file; those that are None are left out of it."""

    format: int = FORMAT
    task: str
    labels: list[str] | None = None
    """Classification: the name of each output, in order."""
    template: dict[str, Any]
    """How a prompt becomes text; see ``edgepeft.chat``."""
    eos_token_ids: list[int]
    """Tokens that end a generation."""
    stop: list[str] | None = None
    """Texts that end a generation, where no single token does."""
    closing_token_ids: list[int] | None = None
    """Causal language models: tokens that the tokenizer puts behind a text, and training left out behind a prompt."""
    decoder_start_token_id: int | None = None
    """Sequence to sequence: the token that the decoder starts from."""
    max_tokens: int
    """The longest input, and for causal-lm the longest input and output together."""
    add_special_tokens: bool
    """Whether the tokenizer adds its special tokens around the rendered text."""
    model: str
    method: str
    precision: str
    metrics: dict[str, float]
    edgepeft: str
    """The version of edgepeft that made the folder."""
    files: dict[str, dict[str, str | int]]
    """For each file, its "sha256" in hexadecimal and its size in "bytes"."""


def describe_files(directory: Path) -> dict[str, dict[str, str | int]]:
    """The ``files`` entry for everything in ``directory`` but the manifest itself."""
    files = sorted(file for file in directory.iterdir() if file.name != MANIFEST)
    return {file.name: {"sha256": sha256(file), "bytes": size_bytes(file)} for file in files}


def write(directory: Path, manifest: Manifest) -> None:
    """Write ``directory``/manifest.json."""
    values = dataclasses.asdict(manifest)
    write_json(directory / MANIFEST, {key: value for key, value in values.items() if value is not None})


def read(directory: Path) -> Manifest:
    """Read a device folder's manifest and check every file against it, so that a bad copy is found before it answers.

    The hashes prove that nothing was lost or changed by accident; they are not a signature.

    Raises:
        UsageError: ``directory`` is not a device folder.
        EdgePeftError: the manifest or a file it lists is missing, truncated, changed, of an unknown format, or lies
            outside the folder.
    """
    manifest = _parse(_folder_of(directory) / MANIFEST)
    needed = (*GRAPHS[manifest.task], TOKENIZER)
    unlisted = [name for name in needed if name not in manifest.files]
    if unlisted:
        raise _malformed(directory / MANIFEST, f"a {manifest.task} folder needs {', '.join(unlisted)}, which it omits")
    for name, entry in manifest.files.items():
        _check_file(directory, name, entry)
    return manifest


def _folder_of(directory: Path) -> Path:
    """``directory`` if it holds a manifest; otherwise an error that says what is wrong with it."""
    if not directory.is_dir():
        beside = sorted(str(path.parent) for path in directory.parent.glob(f"*/{MANIFEST}"))
        remedy = f"Device folders beside it: {', '.join(beside)}." if beside else _PASS_ANOTHER
        if directory.exists():
            raise UsageError(f"{directory} is not a folder.", "It is a file.", remedy)
        where = "" if directory.is_absolute() else f"It was looked for in {Path.cwd()}."
        raise UsageError(f"There is no folder {directory}.", where, remedy)
    if not (directory / MANIFEST).is_file():
        inside = directory / "device"
        remedy = f"Did you mean {inside}?" if (inside / MANIFEST).is_file() else _PASS_ANOTHER
        if remedy is _PASS_ANOTHER and (directory / "recipe.toml").is_file():  # a run on its way there
            remedy = f"`edgepeft export {directory}` makes it."
        raise UsageError(f"{directory} is not a device folder.", f"It holds no {MANIFEST}.", remedy)
    return directory


def _parse(path: Path) -> Manifest:
    """The manifest in ``path``, every value checked against the type of its field."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise _malformed(path, str(error)) from error
    if not isinstance(values, dict):
        raise _malformed(path, "expected a JSON object")
    if values.get("format") != FORMAT:
        raise EdgePeftError(
            f"{path} has format {values.get('format')!r}.",
            f"This version of edgepeft reads format {FORMAT}.",
            f"Install edgepeft {values.get('edgepeft', 'of the version that made the folder')}, or export again.",
        )
    fields: dict[str, Any] = {}
    hints = get_type_hints(Manifest)
    for field in dataclasses.fields(Manifest):
        if field.name not in values and field.default is dataclasses.MISSING:
            raise _malformed(path, f"it lacks {field.name!r}")
        value = values.get(field.name)
        if not _fits(value, hints[field.name]):
            raise _malformed(path, f"{field.name!r} has a value of the wrong type")
        fields[field.name] = value
    manifest = Manifest(**fields)
    if manifest.task not in GRAPHS:
        raise EdgePeftError(f"{path} has the unknown task {manifest.task!r}.", "", nearest(manifest.task, GRAPHS))
    if not is_whole(manifest.template):
        raise _malformed(path, "'template' is neither plain text's nor a whole chat's")
    if manifest.max_tokens < 1:
        raise _malformed(path, f"'max_tokens' is {manifest.max_tokens}, and must be above 0")
    if manifest.task == "classification" and not manifest.labels:
        raise _malformed(path, "a classifier needs 'labels'")
    if manifest.task == "seq2seq" and manifest.decoder_start_token_id is None:
        raise _malformed(path, "a seq2seq model needs 'decoder_start_token_id'")
    return manifest


def _fits(value: Any, hint: Any) -> bool:
    """Whether a JSON value is of the annotated type, items included."""
    if hint is Any:
        return True
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is UnionType:
        return any(_fits(value, argument) for argument in arguments)
    if origin is list:
        return isinstance(value, list) and all(_fits(item, arguments[0]) for item in value)
    if origin is dict:
        return isinstance(value, dict) and all(_fits(item, arguments[1]) for item in value.values())
    if hint is NoneType:
        return value is None
    if hint in (int, float):
        return isinstance(value, int | float if hint is float else int) and not isinstance(value, bool)
    return isinstance(value, hint)


def _check_file(directory: Path, name: str, entry: dict[str, str | int]) -> None:
    """Raise unless ``directory``/``name`` lies inside the folder and has the size and hash that ``entry`` gives."""
    path = directory / name
    inside = path.resolve().parent == directory.resolve()
    if not inside or "/" in name or "\\" in name:
        raise EdgePeftError(
            f"{directory / MANIFEST} lists the file {name!r}, which lies outside the folder.",
            "A device folder only uses its own files.",
            "Do not use this folder unless you know who made it; export again.",
        )
    if not path.is_file():
        raise EdgePeftError(f"{path} is missing.", f"{MANIFEST} lists it.", _EXPORT_AGAIN)
    found, expected = size_bytes(path), entry.get("bytes")
    if found != expected:
        cause = f"It has {found} bytes; {MANIFEST} says {expected}."
        raise EdgePeftError(f"{path} is incomplete or was changed.", cause, _EXPORT_AGAIN)
    if sha256(path) != entry.get("sha256"):
        cause = f"Its SHA-256 is not the one in {MANIFEST}."
        raise EdgePeftError(f"{path} is corrupt or was changed.", cause, _EXPORT_AGAIN)


def _malformed(path: Path, cause: str) -> EdgePeftError:
    return EdgePeftError(f"{path} is malformed.", f"{cause[:1].upper()}{cause[1:]}.", _EXPORT_AGAIN)
