"""The folder of one run: which run it holds, and which stages are done for which inputs."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from edgepeft import recipe as recipes
from edgepeft.errors import EdgePeftError, UsageError
from edgepeft.files import write_json
from edgepeft.fingerprints import fingerprint
from edgepeft.methods import base
from edgepeft.peft_config import path_of
from edgepeft.placements.stored import TENSORS
from edgepeft.recipe import Recipe

BROUGHT = "brought"  # in the state, an adapter that was trained elsewhere

# What may differ from one call to the next without making it another training run.
_FREE = ("variants", "hardware", "trust_remote_code")

# What a plan chooses where the recipe leaves it open.
PLANNED = ("method", "precision", "microbatch", "checkpointing", "optimizer", "strategy")

# What may lie elsewhere by the next call, as on another computer, if it is what training began with.
_MOVABLE = {"data": "the data", "validation": "the validation data", "model": "the model"}

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
    def answers(self) -> Path:
        return self.root / "answers.json"

    @property
    def cache(self) -> Path:
        return self.root / "data"

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """While inside, no other process of this machine that asks for the same works in the folder.

        The lock is outside of the folder, which there may never be, and ends with the process that holds it.

        Raises:
            UsageError: another one works in it.
        """
        name = f"edgepeft-{fingerprint(str(self.root.resolve()))}.lock"
        lock = FileLock(Path(tempfile.gettempdir()) / name, timeout=0)
        try:
            lock.acquire()
        except Timeout:
            raise UsageError(
                f"Another process works in {self.root}.",
                "Two would write over each other.",
                "Wait until it has ended, or choose another --out.",
            ) from None
        except (OSError, NotImplementedError):
            pass  # no lock can be had there, as it is another user's or not to be written: as before there were any
        try:
            yield
        finally:
            lock.release()

    @property
    def begun(self) -> bool:
        """Whether training left something that it goes on from."""
        return (self.root / "checkpoints").exists() or self.adapter.exists()

    @property
    def forgotten(self) -> bool:
        """Whether state.json was deleted: it knows neither what training began with, nor of an adapter brought here."""
        return not self._state().keys() & {"training", "train", BROUGHT}

    def stored(self) -> Recipe:
        """The recipe of the run that is here.

        Raises:
            UsageError: there is none.
        """
        return recipes.create(recipes.read(self.recipe))

    def adopt(self, wanted: Recipe) -> Recipe:
        """``wanted``, without an alias and completed by what a run in this folder has already chosen.

        Raises:
            UsageError: the folder holds another run, or something that is no run.
        """
        wanted = without_alias(wanted)
        if not self.recipe.exists():
            if self.root.exists() and not self.root.is_dir():
                raise UsageError(f"{self.root} is a file.", "A run is a folder.", "Choose another --out.")
            others = [path.name for path in self.root.iterdir()] if self.root.exists() else []
            if any(name not in _BEFORE_THE_PLAN and not name.endswith(".part") for name in others):
                raise UsageError(
                    f"The folder {self.root} is not empty and holds no run of edgepeft.",
                    "Nothing in it was touched.",
                    "Choose another --out.",
                )
            return wanted
        stored = self.stored()
        asked = {entry.name: getattr(wanted, entry.name) for entry in dataclasses.fields(Recipe)}
        chosen = ("task", "max_tokens", *PLANNED)
        asked |= {name: getattr(stored, name) for name in chosen if asked[name] is None}
        if wanted.devices == 1:  # then there is none, whatever was stored; that they differ is said below
            asked["strategy"] = wanted.strategy
        merged = Recipe(**asked)
        open_ = {*_FREE, *(name for name in chosen if getattr(stored, name) is None), *self._moved(merged)}
        differing = [name for name in asked if name not in open_ and getattr(stored, name) != getattr(merged, name)]
        if differing:
            name = differing[0]
            raise UsageError(
                f"The folder {self.root} already holds a different run.",
                f"{', '.join(differing)} differ: {name} was {getattr(stored, name)!r}, now {getattr(merged, name)!r}.",
                "Choose another --out, or delete the folder to start over.",
            )
        return merged

    def _moved(self, recipe: Recipe) -> Iterator[str]:
        """What of a recipe is where it says, and in its contents what training began with."""
        before = self._state().get("training") or {}
        for name, what in _MOVABLE.items():
            value = getattr(recipe, name)
            if value and Path(value).exists() and before.get(what) == fingerprint(Path(value)):
                yield name

    def done(self, stage: str, inputs: Any) -> bool:
        """Whether ``stage`` was finished with these inputs, a fingerprint or several by name."""
        return bool(self._state().get(stage) == inputs)

    def finish(self, stage: str, inputs: Any) -> None:
        """Remember that ``stage`` was finished with these inputs."""
        write_json(self.root / "state.json", {**self._state(), stage: inputs})

    def changed(self, stage: str, inputs: Mapping[str, str]) -> list[str]:
        """The names of inputs that are not those with which ``stage`` was finished."""
        before = self._state().get(stage) or {}
        return [name for name in {**before, **inputs} if before.get(name) != inputs.get(name)]

    def check_unchanged(self, inputs: Mapping[str, str]) -> None:
        """Refuse to go on with a training that began with other inputs.

        Raises:
            UsageError: see above.
        """
        if changed := self.changed("training", inputs):
            raise UsageError(
                f"What the run in {self.root} began with has changed: {', '.join(changed)}.",
                "Going on would mix the two.",
                "Put it back as it was, choose another --out, or delete the folder to start over.",
            )

    def training_inputs(self, recipe: Recipe) -> dict[str, str]:
        """Fingerprints of all that training depends on, by name: the recipe, data and model, adapters it starts from.

        They are of contents, so that a folder that was copied, or fetched anew, is the same.
        """
        names = [entry.name for entry in dataclasses.fields(Recipe) if entry.name not in (*_FREE, *_MOVABLE)]
        fields = {name: getattr(recipe, name) for name in names}
        sources = self.sources(recipe)
        if (configuration := path_of(recipe.method)) is not None:
            sources["PEFT's configuration"] = fingerprint(configuration)
        others = {f"the adapter {name}": found for name in _named(recipe.options) if (found := self._other(name))}
        return {"the recipe": fingerprint(fields), **sources, **others}

    def sources(self, recipe: Recipe) -> dict[str, str]:
        """Fingerprints of data and model, by name."""
        named = {what: value for name, what in _MOVABLE.items() if (value := getattr(recipe, name))}
        return {w: fingerprint(Path(v) if Path(v).exists() else v) for w, v in named.items()}  # or on the hub

    def _other(self, folder: str) -> str | None:
        """A fingerprint of another run's adapter; what it was when this run began, where it is gone since.

        Only training reads it: a run that was trained is exported without.
        """
        tensors, entry = Path(folder) / TENSORS, f"adapter {folder}"
        if not tensors.is_file():
            return self._state().get(entry)
        found = fingerprint(tensors)
        if entry not in self._state():
            self.finish(entry, found)
        return found

    def _state(self) -> dict[str, Any]:
        path = self.root / "state.json"
        wrong = "It is no JSON object."
        try:
            found = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        except ValueError as error:
            found, wrong = None, str(error)
        if not isinstance(found, dict):
            remedy = (
                "Delete it and run the same command again: the adapter is checked, merging and exporting done anew."
            )
            raise EdgePeftError(f"{path} is damaged.", wrong, remedy)
        return found


def without_alias(wanted: Recipe) -> Recipe:
    """``qlora`` is ``lora`` at a precision: write both down."""
    if wanted.method is None:
        return wanted
    implied = base.implied_precision(wanted.method)
    if implied is None:
        base.find(wanted.method)
        return wanted
    if wanted.precision not in (None, implied):
        raise UsageError(
            f"{wanted.method} means {implied}, not {wanted.precision}.",
            "",
            "Leave --precision out, or name the method itself.",
        )
    return dataclasses.replace(wanted, method=base.create(wanted.method).name, precision=implied)


def _named(options: Mapping[str, Any]) -> list[str]:
    """Every text among a method's options, any of which may be the folder of an adapter (SPoT's, IPT's)."""
    values = (value if isinstance(value, (list, tuple)) else [value] for value in options.values())
    return [text for value in values for text in value if isinstance(text, str) and text]
