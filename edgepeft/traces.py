"""Surfaces of configurations: shipped with the catalogue, kept on this disk, or traced, which alone needs torch.

So are the parameters of models with a method in them, as several devices share them.
"""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import importlib.metadata
import inspect
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgepeft import machine, sharding, stranger, surface
from edgepeft.catalog import entry, names, traced_as
from edgepeft.errors import EdgePeftError, said
from edgepeft.files import write_json
from edgepeft.peft_config import path_of, text_of
from edgepeft.sharding import Unit
from edgepeft.surface import ADAMW, Configuration, Surface

if TYPE_CHECKING:
    import concurrent.futures

METHODS = "methods.json"
TRACER_BYTES = 450 << 20  # of a process that traces; 405 MiB were resident while UniPELT was traced on T5-11B
TOKENS, TARGET_TOKENS, LABELS = 512, 128, 2  # what the shipped surfaces were traced at


@dataclass(frozen=True)
class Traits:
    """What planning needs to know of a method before it is traced; see ``methods.base.Method``."""

    aliases: Mapping[str, str]
    writes_backbone: bool
    backpropagates: bool
    updates_in_backward: bool
    shardable: bool
    unexportable: str = ""


def traits(method: str) -> Traits:
    """Those of a method by its own name, from the shipped table where it is in there.

    Raises:
        UsageError: there is no such method.
    """
    known = _shipped_methods().get(method)
    if known is not None:
        return Traits(**known)
    from edgepeft.methods import base

    return traits_of(base.find(method) if path_of(method) is None else base.create(method))


def traits_of(method: Any) -> Traits:
    """The traits of a method's class, or of a method whose configuration decides them."""
    return Traits(
        aliases=dict(method.aliases),
        writes_backbone=method.writes_backbone,
        backpropagates=method.backpropagates,
        updates_in_backward=method.updates_in_backward,
        shardable=method.shardable,
        unexportable=method.unexportable,
    )


def named(name: str) -> tuple[str, str | None] | None:
    """The shipped method that ``name`` or an alias means, with the precision an alias implies; None if unknown."""
    for method, known in _shipped_methods().items():
        if name == method or name in known["aliases"]:
            return method, known["aliases"].get(name)
    return None


def find(
    wanted: Sequence[Configuration], progress: Callable[[int, int], None] = lambda done, total: None
) -> list[Surface | EdgePeftError]:
    """The surface of each configuration, or why it has none."""
    found: dict[int, Surface | EdgePeftError] = {}
    for index, configuration in enumerate(wanted):
        known = shipped(configuration) or _stored(configuration)
        if known is not None:
            found[index] = known
    missing = [index for index in range(len(wanted)) if index not in found]
    if missing:
        had = len(found)
        progress(had, len(wanted))
        for index, result in _trace([wanted[index] for index in missing], lambda n: progress(had + n, len(wanted))):
            found[missing[index]] = result
    return [found[index] for index in range(len(wanted))]


def shipped(configuration: Configuration) -> Surface | None:
    """The surface that came with the catalogue, if it is this very configuration."""
    name = _usual_name(configuration) if configuration.accumulates else None
    if name is None:
        return None
    if configuration.tokens != usual_tokens(configuration.model):
        return None
    if configuration.task == "seq2seq" and configuration.target_tokens != TARGET_TOKENS:
        return None
    plain = _shipped_surfaces(name).get(key(configuration))
    return None if plain is None else surface.read(plain)


def units(configuration: Configuration) -> tuple[Unit, ...]:
    """What a model with a method in it has of parameters, for ``sharding.inventory``.

    Raises:
        UsageError: the method does not fit the model.
    """
    name = _usual_name(configuration)
    plain = None if name is None else _shipped_surfaces(name).get(units_key(configuration))
    path = _path(replace(configuration, checkpointing=False, tokens=0, target_tokens=0, cuda=False, optimizer=ADAMW))
    path = path.with_suffix(".units.json")
    if plain is None:
        with contextlib.suppress(OSError, ValueError):
            plain = json.loads(path.read_text(encoding="utf-8"))
    if plain is not None:
        return tuple(map(sharding.read, plain))
    from edgepeft import units as counting  # loads torch

    found = counting.of(configuration)
    _keep(path, [unit.plain() for unit in found])
    return found


def units_key(configuration: Configuration) -> str:
    """What distinguishes the parameters of one model in its shipped file."""
    return f"{configuration.method} {configuration.precision}"


def usual_tokens(model: Mapping[str, Any]) -> int:
    """The sequence length that is planned for when none is given."""
    from edgepeft.catalog.fields import positions

    return min(TOKENS, positions(model) or TOKENS)


def key(configuration: Configuration) -> str:
    """What distinguishes the surfaces of one model in its shipped file."""
    return " ".join(
        [
            *(configuration.method, configuration.precision),
            "recomputed" if configuration.checkpointing else "kept",
            "cuda" if configuration.cuda else "cpu",
            "bf16" if configuration.bf16 else "fp32",
            *([] if configuration.optimizer == ADAMW else [configuration.optimizer]),
        ]
    )


def usual(
    name: str, method: str, precision: str, *, checkpointing: bool = False, cuda: bool = True, bf16: bool = True
) -> Configuration:
    """A configuration of a catalogue model as it is traced for shipping."""
    known = entry(name)
    assert known is not None
    model = fields(name)
    return Configuration(
        model=model,
        task=known["_edgepeft"]["task"],
        method=method,
        options={},
        precision=precision,
        checkpointing=checkpointing,
        microbatch=1,
        tokens=usual_tokens(model),
        target_tokens=TARGET_TOKENS,
        labels=LABELS,
        accumulates=True,
        cuda=cuda,
        bf16=bf16,
    )


def fields(name: str) -> dict[str, Any]:
    """A catalogue model's configuration as plain data."""
    known = entry(name)
    assert known is not None
    return {field: value for field, value in known.items() if not field.startswith("_")}


@cache
def _shipped_methods() -> dict[str, dict[str, Any]]:
    path = files("edgepeft.catalog").joinpath("traces", METHODS)
    known: dict[str, dict[str, Any]] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return known


@cache
def _shipped_surfaces(name: str) -> dict[str, Any]:
    path = files("edgepeft.catalog").joinpath("traces", f"{traced_as(name)}.json.gz")
    found: dict[str, Any] = json.loads(gzip.decompress(path.read_bytes())) if path.is_file() else {}
    return found


def _usual_name(configuration: Configuration) -> str | None:
    """The catalogue's name of the model, where its task, its labels and the method's options are the usual ones."""
    if (configuration.labels, dict(configuration.options)) != (LABELS, {}):
        return None
    name = _catalogue_name(configuration.model)
    known = None if name is None else entry(name)
    return name if known is not None and known["_edgepeft"]["task"] == configuration.task else None


@cache
def _catalogue() -> dict[str, str]:
    return {json.dumps(fields(name), sort_keys=True): name for name in names()}


def _catalogue_name(model: Mapping[str, Any]) -> str | None:
    return _catalogue().get(json.dumps(dict(model), sort_keys=True))


def _trace(
    wanted: Sequence[Configuration], progress: Callable[[int], None]
) -> Iterator[tuple[int, Surface | EdgePeftError]]:
    """Traces run in processes of their own, one per core: a crash in one says which, and leaves the rest alone.

    Configurations that differ in nothing but checkpointing are traced together.
    """
    together: dict[str, list[int]] = {}
    for index, configuration in enumerate(wanted):
        together.setdefault(repr(replace(configuration, checkpointing=False)), []).append(index)
    jobs = [[wanted[index] for index in indices] for indices in together.values()]
    if len(jobs) == 1:
        yield from enumerate(_kept(jobs[0], _surfaces(jobs[0])))
        progress(len(jobs[0]))
        return
    import concurrent.futures

    pool = _pool()
    futures = {pool.submit(_surfaces, job): (job, at) for job, at in zip(jobs, together.values(), strict=True)}
    done = 0
    for future in concurrent.futures.as_completed(futures):
        job, indices = futures[future]
        crash = future.exception()
        if crash is None:
            found = list(_kept(job, future.result()))
        else:
            if isinstance(crash, concurrent.futures.BrokenExecutor):
                _pool.cache_clear()  # the next trace has new processes
            what = f"{job[0].method} at {job[0].precision}"
            kind = type(crash).__name__
            lost = f"{kind}: {said(crash).removeprefix(f'{kind}: ')}"
            remedy = "Please report it, with the model's config.json; another method may do."
            found = [EdgePeftError(f"{what} could not be traced.", lost, remedy)] * len(job)
        yield from zip(indices, found, strict=True)
        done += len(indices)
        progress(done)


@contextlib.contextmanager
def pooled() -> Iterator[None]:
    """The processes that trace are kept inside, and gone after it: a plan may trace several times."""
    try:
        yield
    finally:
        if _pool.cache_info().currsize:
            _pool().shutdown(cancel_futures=True)
            _pool.cache_clear()


@cache
def _pool() -> concurrent.futures.ProcessPoolExecutor:
    """One process for each processor that has memory for it; each takes seconds to load torch. See ``pooled``."""
    import concurrent.futures
    import multiprocessing

    count = max(1, min(machine.processors(), machine.memory().available_bytes // TRACER_BYTES))
    context = multiprocessing.get_context("spawn")
    return concurrent.futures.ProcessPoolExecutor(count, mp_context=context, initializer=_ready)


def _kept(
    wanted: Sequence[Configuration], traced: Sequence[Surface | EdgePeftError]
) -> Iterator[Surface | EdgePeftError]:
    """The same as it will be read from this disk, where it is written."""
    for configuration, found in zip(wanted, traced, strict=True):
        if isinstance(found, EdgePeftError):
            yield found
            continue
        _keep(_path(configuration), found.plain())
        yield surface.read(found.plain())


def _keep(path: Path, plain: Any) -> None:
    """Write to the cache; one that cannot be written, or whose disk is full, costs time, nothing else."""
    with contextlib.suppress(OSError, EdgePeftError):
        write_json(path, plain)


def _surfaces(wanted: Sequence[Configuration]) -> Sequence[Surface | EdgePeftError]:
    """Of configurations that differ in nothing but checkpointing."""
    from edgepeft import extrapolate

    try:
        return extrapolate.surfaces(wanted[0], [configuration.checkpointing for configuration in wanted])
    except EdgePeftError as error:  # the method is not for this model; the others may be
        return [error] * len(wanted)
    except Exception as error:
        method = wanted[0].method
        if path_of(method) is None and "." in method:
            return [stranger.blame(method, "in a step on tensors without values", error)] * len(wanted)
        if path_of(method) is None:
            raise
        why = next(iter(str(error).strip().splitlines()), type(error).__name__)
        refusal = EdgePeftError(  # layers of PEFT's, some of which look at values
            f"{method} cannot be planned.",
            f"PEFT failed in a step on tensors without values: {why.rstrip('.')}.",
            "What is not planned is not trained here; PEFT itself may train it.",
        )
        return [refusal] * len(wanted)


def _stored(configuration: Configuration) -> Surface | None:
    with contextlib.suppress(OSError, ValueError, KeyError):
        return surface.read(json.loads(_path(configuration).read_text(encoding="utf-8")))
    return None


def _ready() -> None:
    """Prepare a process that traces: it takes one core, and ends when the process that started it was killed."""
    import multiprocessing
    import threading

    import torch

    torch.set_num_threads(1)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def follow() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()


def _path(configuration: Configuration) -> Path:
    folder = Path(os.environ.get("EDGEPEFT_CACHE", Path.home() / ".cache" / "edgepeft")) / "traces"
    content = {**asdict(replace(configuration, microbatch=0)), "versions": _versions()}
    if (said := text_of(configuration.method)) is not None:
        content |= {"configuration": said, "peft": importlib.metadata.version("peft")}
    elif configuration.method not in _shipped_methods():
        content |= {"source": _source(configuration.method)}
    return folder / f"{hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()}.json"


@cache
def _source(method: str) -> str:
    """What a method from elsewhere is: the Python files of its folder."""
    from edgepeft.methods import base

    found = hashlib.sha256()
    for file in sorted(Path(inspect.getfile(base.find(method))).parent.glob("*.py")):
        found.update(file.read_bytes())
    return found.hexdigest()


@cache
def _versions() -> tuple[str, ...]:
    """What a trace depends on beside its configuration: the libraries, and our own code."""
    own = hashlib.sha256()
    for file in sorted(Path(__file__).parent.rglob("*.py")):
        own.update(file.read_bytes())
    return (*(importlib.metadata.version(name) for name in ("torch", "transformers", "bitsandbytes")), own.hexdigest())
