"""The folder of one run: which run it holds, and which stages are done for which inputs."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgepeft import recipe as recipes
from edgepeft.errors import EdgePeftError, UsageError
from edgepeft.files import sha256, write_json
from edgepeft.peft_config import path_of
from edgepeft.recipe import Recipe

# What may differ from one call to the next without making it another training run.
_FREE = ("variants", "hardware", "trust_remote_code")

_BEFORE_THE_PLAN = (
    "data",
    "plan.json",
    "ledger.json",
    "report.html",
)  # what a run may leave that stopped before it began


@dataclass(frozen=True)
class Workspace:
    """Paths of a run, and its state."""

    root: Path

    @property
    def recipe(self) -> Path:
        return self.root / "recipe.toml"

    @property
    def plan(self) -> Path:
        return self.root / "plan.json"

    @property
    def adapter(self) -> Path:
        return self.root / "adapter"

    @property
    def merged(self) -> Path:
        return self.root / "merged"

    @property
    def onnx(self) -> Path:
        return self.root / "onnx"

    @property
    def device(self) -> Path:
        return self.root / "device"

    @property
    def ledger(self) -> Path:
        return self.root / "ledger.json"

    @property
    def cache(self) -> Path:
        return self.root / "data"

    def stored(self) -> Recipe:
        """The recipe of the run that is here.

        Raises:
            UsageError: there is none.
        """
        return recipes.create(recipes.read(self.recipe))

    def adopt(self, wanted: Recipe) -> Recipe:
        """``wanted``, completed by what a run in this folder has already chosen.

        Raises:
            UsageError: the folder holds another run, or something that is no run.
        """
        if not self.recipe.exists():
            if self.root.exists() and not self.root.is_dir():
                raise UsageError(f"{self.root} is a file.", "A run is a folder.", "Choose another --out.")
            if self.root.exists() and any(entry.name not in _BEFORE_THE_PLAN for entry in self.root.iterdir()):
                raise UsageError(
                    f"The folder {self.root} is not empty and holds no run of edgepeft.",
                    "Nothing in it was touched.",
                    "Choose another --out.",
                )
            return wanted
        stored = self.stored()
        asked = {entry.name: getattr(wanted, entry.name) for entry in dataclasses.fields(Recipe)}
        chosen = ("task", "max_tokens", "method", "precision", "microbatch", "checkpointing")
        asked |= {name: getattr(stored, name) for name in chosen if asked[name] is None}
        merged = Recipe(**asked)
        differing = [name for name in asked if name not in _FREE and getattr(stored, name) != getattr(merged, name)]
        if differing:
            name = differing[0]
            raise UsageError(
                f"The folder {self.root} already holds a different run.",
                f"{', '.join(differing)} differ: {name} was {getattr(stored, name)!r}, now {getattr(merged, name)!r}.",
                "Choose another --out, or delete the folder to start over.",
            )
        return merged

    def done(self, stage: str, inputs: str) -> bool:
        """Whether ``stage`` was finished with these inputs."""
        return self._state().get(stage) == inputs

    def finish(self, stage: str, inputs: str) -> None:
        """Remember that ``stage`` was finished with these inputs."""
        write_json(self.root / "state.json", {**self._state(), stage: inputs})

    def _state(self) -> dict[str, str]:
        path = self.root / "state.json"
        try:
            return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        except ValueError as error:
            raise EdgePeftError(
                f"{path} is damaged.", str(error), "Delete it; finished stages are then checked again."
            ) from error


def fingerprint(*parts: Any) -> str:
    """A short hash of plain data and of files (their content) and folders (names, sizes and times of their files)."""
    digest = hashlib.sha256()
    for part in parts:
        if isinstance(part, Path) and part.is_file():
            digest.update(sha256(part).encode())
        elif isinstance(part, Path):
            for file in sorted(path for path in part.rglob("*") if path.is_file()):
                status = file.stat()
                digest.update(f"{file.relative_to(part)} {status.st_size} {status.st_mtime_ns}\n".encode())
        else:
            digest.update(json.dumps(part, sort_keys=True, default=str).encode())
    return digest.hexdigest()[:16]


def training_inputs(recipe: Recipe) -> str:
    """A fingerprint of everything training depends on."""
    fields = {
        entry.name: getattr(recipe, entry.name) for entry in dataclasses.fields(Recipe) if entry.name not in _FREE
    }
    sources = [Path(name) for name in (recipe.data, recipe.validation, recipe.model) if name and Path(name).exists()]
    if (configuration := path_of(recipe.method)) is not None:
        sources.append(configuration)
    return fingerprint(fields, *sources)
