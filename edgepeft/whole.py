"""Whether what a finished stage left is still whole; what is not is made again."""

from __future__ import annotations

from dataclasses import replace

from safetensors import SafetensorError, safe_open

from edgepeft import counts, events, ledger
from edgepeft.errors import EdgePeftError
from edgepeft.files import size_bytes
from edgepeft.ledger import Row
from edgepeft.runtime import manifest
from edgepeft.workspace import Workspace

_NO_ROW = "What was measured of it is not in ledger.json."


def measured(space: Workspace) -> bool:
    """Whether the ledger has what training measured."""
    return {"base", "adapter"} <= {row.artefact for row in ledger.read(space.ledger)}


def with_counts(row: Row, space: Workspace) -> Row:
    """A row of the adapter with what training took, where it was done here and its log still says so."""
    ends = [event for event in events.read(space.root / "events.jsonl") if event.get("event") == "end"]
    stages = ends[-1].get("stages") if ends else None
    return replace(row, counts=counts.training(stages), stages=stages) if stages else row


def merged(space: Workspace) -> str:
    """What is wrong with the merged model, if anything is; of an adapter that does not merge only a row is left."""
    rows = [row for row in ledger.read(space.ledger) if row.kept]
    kept = next((row for row in rows if row.artefact.startswith("merged")), None)
    if kept is None:
        beside = any(row.artefact == "adapter" and "changed_parameters" in row.counts for row in rows)
        return "" if beside else _NO_ROW
    files = sorted(space.merged.glob("*.safetensors"))
    # Not another size: a user may have put something beside it.
    if not files or size_bytes(space.merged) < (kept.bytes or 0):
        return f"{space.merged} is not whole: files are missing or cut short."
    for file in files:
        try:
            with safe_open(file, framework="pt"):  # which holds the header against the file's size
                pass
        except (OSError, SafetensorError) as error:
            return f"{file} is damaged: {error}."
    return ""


def exported(space: Workspace) -> str:
    """What is wrong with the device folder, if anything is, as its runtime would find."""
    try:
        manifest.read(space.device)
    except EdgePeftError as error:
        return error.fact
    rows = ledger.read(space.ledger)
    return "" if any(row.kept and row.artefact.startswith("onnx-") for row in rows) else _NO_ROW
