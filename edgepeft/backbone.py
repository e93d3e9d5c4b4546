"""Pretrained models: found by name, loaded for a task at a precision, built empty for planning, and saved."""

from __future__ import annotations

import contextlib
import copy
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from edgepeft import admission, anatomy, attending, catalog, heap, precision
from edgepeft.catalog import fields
from edgepeft.conv1d import linearize, transposed
from edgepeft.errors import EdgePeftError, UsageError, beside, nearest, said
from edgepeft.tasks import LOADERS as _LOADERS
from edgepeft.tasks import check, default_task

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerFast

Packing = Callable[[nn.Linear, str, frozenset[str]], precision.StoredLinear]


@dataclass(frozen=True)
class Source:
    """Where a model comes from: a folder, a GGUF file, an entry of the offline catalogue, or a hub id.

    Attributes:
        name: what the user wrote.
        location: folder or hub id that transformers loads from.
        gguf: file name in ``location`` when the weights are GGUF.
        known: the catalogue's config fields, if it has them.
    """

    name: str
    location: str
    gguf: str | None = None
    known: dict[str, Any] | None = None


@dataclass(frozen=True)
class Backbone:
    """A model ready for a method: frozen, in evaluation mode, its linears packed if the precision says so.

    Attributes:
        fresh: dotted names of parameters that every method must train: a classifier's head, which is new or was trained
            for other labels, and what else the checkpoint lacks.
    """

    model: PreTrainedModel
    anatomy: anatomy.Anatomy
    task: str
    precision: str
    fresh: frozenset[str]


def resolve(name: str) -> Source:
    """Find out what ``name`` means, without a network.

    Raises:
        UsageError: a path that holds no model.
    """
    path = Path(name)
    if path.suffix == ".gguf":
        if not path.is_file():
            raise UsageError(f"There is no file {name}.", "", "Give the path of a GGUF file.")
        return Source(name, str(path.parent), gguf=path.name)
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise UsageError(
                f"The folder {name} holds no model.",
                "It has no config.json.",
                "Give a folder written by save_pretrained, a GGUF file, a catalogue name or a hub id.",
            )
        return Source(name, name)
    entry = catalog.entry(name)
    if entry is not None:
        known = {key: value for key, value in entry.items() if not key.startswith("_")}
        return Source(name, entry["_edgepeft"]["hub_id"], known=known)
    if name.startswith((".", "/")) or name.count("/") != 1:
        raise UsageError(
            f"There is no model {name!r}.",
            "It is neither a folder, nor a GGUF file, nor in the catalogue, nor a hub id (owner/name).",
            nearest(name, catalog.names()),
        )
    return Source(name, name)


def config(source: Source, *, trust_remote_code: bool = False) -> PretrainedConfig:
    """The model's configuration; from the catalogue when it is there, so that planning works offline."""
    import transformers
    from transformers import CONFIG_MAPPING, AutoConfig

    if source.known is not None:
        return as_config(source.known)
    with _refusing_unloadable(source):
        written, _ = transformers.PretrainedConfig.get_config_dict(source.location, **_gguf(source))
    if "auto_map" in written and written.get("model_type") not in CONFIG_MAPPING:
        raise UsageError(
            f"The architecture of {source.name} is code in its repository.",
            f"transformers {transformers.__version__} has no {written.get('model_type')}; plans are traced with what "
            "it has.",
            "Use a version of transformers that has it, or another model.",
        )
    with _refusing_unloadable(source):
        found = AutoConfig.from_pretrained(source.location, trust_remote_code=trust_remote_code, **_gguf(source))
    admission.check(source.name, found.to_dict())
    return found


def as_fields(config: PretrainedConfig) -> dict[str, Any]:
    """A configuration as plain data."""

    def number(found: dict[str, Any]) -> Any:  # as transformers writes infinity, such as a bound of Mamba's
        return float(found["__float__"]) if found.keys() == {"__float__"} else found

    return json.loads(config.to_json_string(use_diff=False), object_hook=number)


def as_config(model: Mapping[str, Any]) -> PretrainedConfig:
    """The configuration that plain data are of."""
    from transformers import AutoConfig

    named = copy.deepcopy(dict(model))
    return AutoConfig.for_model(named.pop("model_type"), **named)


def tokenizer(source: Source, *, trust_remote_code: bool = False) -> PreTrainedTokenizerFast:
    """The model's fast tokenizer.

    Raises:
        UsageError: it has none that the ``tokenizers`` library can run, which the device needs.
    """
    from transformers import AutoTokenizer

    from edgepeft.data.tokens import check_files, split_as_named  # plans do not wait for the libraries of data

    check_files(source.location, gguf=source.gguf is not None)
    with _refusing_unloadable(source):
        loaded = AutoTokenizer.from_pretrained(source.location, trust_remote_code=trust_remote_code, **_gguf(source))
    if not loaded.is_fast:
        raise UsageError(
            f"The tokenizer of {source.name} is not a fast one.",
            "On the device only the tokenizers library runs it.",
            "Convert it to a tokenizer.json first.",
        )
    if source.gguf:
        split_as_named(loaded, Path(source.location, source.gguf))
    return loaded


def positions(configuration: PretrainedConfig) -> int | None:
    """The longest sequence the model can read, or None when its positions are relative and unbounded (T5)."""
    return fields.positions(configuration.to_dict())


@heap.small()
def load(
    source: Source,
    *,
    task: str,
    at: str,
    device: str = "cpu",
    labels: Sequence[str] | None = None,
    seed: int = 0,
    padding: int | None = None,
    trust_remote_code: bool = False,
    pack: Packing | None = None,
) -> Backbone:
    """Load a model for ``task`` at precision ``at``, frozen, on ``device``.

    The seed decides what a classifier head that the checkpoint lacks starts as.

    Args:
        padding: the token that batches are padded with. A decoder classifies at the last token before it, and its
            configuration may name another one than its tokenizer.
        pack: packs a linear layer with these roles at a precision, other than ``precision.pack`` does.

    Raises:
        UsageError: the model cannot be had, has no such task, or is of an unknown architecture.
        EdgePeftError: its files lack weights.
    """
    import transformers

    precision.check(at)
    dtype = precision.compute_dtype(at)
    torch.manual_seed(seed)
    options: dict[str, Any] = {"dtype": dtype, "trust_remote_code": trust_remote_code, **_gguf(source)}
    options["return_dict"] = True  # what is read of outputs has a name, whatever the configuration says
    options["ignore_mismatched_sizes"] = True  # a head for another number of labels starts anew; all else is refused
    if labels is not None:
        options["id2label"] = dict(enumerate(labels))
        options["label2id"] = {label: number for number, label in enumerate(labels)}
    loader = getattr(transformers, _LOADERS[task])
    with _refusing_unloadable(source), _quietly():
        model, info = loader.from_pretrained(source.location, output_loading_info=True, **options)
    if source.gguf:
        _forget_gguf(model)
    if padding is not None and task == "classification" and default_task(model.config) == "causal-lm":
        model.config.pad_token_id = padding
    missing, misshapen = set(info["missing_keys"]), {name for name, *_ in info["mismatched_keys"]}
    made = _prepare(model, task, at, device, missing | misshapen | _head_parameters(model, task), pack)
    if precision.is_packed(at) and device == "cpu":
        _let_go_of_files(model)
    if task == "classification":  # the checkpoint of a language model has no head, and may have no pooler
        misshapen -= _head_parameters(model, task)
        body = tuple(f"{part}." for part in anatomy.body(model, made.anatomy))
        missing = {name for name in missing if name.startswith(body)}
    if lost := sorted(missing | misshapen):
        raise EdgePeftError(
            f"The weights of {source.name} are not whole.",
            f"{len(lost)} tensors are missing or of another shape, such as {lost[0]}.",
            "Fetch the model again; its config.json and its weights must belong together.",
        )
    return made


def skeleton(
    configuration: PretrainedConfig, *, task: str, at: str, labels: int = 2, pack: Packing | None = None
) -> Backbone:
    """The same as ``load`` without weights; call it under a fake-tensor mode or on the meta device, for planning."""
    import transformers

    check(configuration, task)
    configuration.num_labels, configuration.return_dict = labels, True
    loader = getattr(transformers, _LOADERS[task])
    try:
        model = loader.from_config(configuration, dtype=precision.compute_dtype(at))
        _untie_as_published(model)
    except Exception as error:  # a configuration may be wrong in any way
        raise UsageError(
            f"A {configuration.model_type} model cannot be built for {task} from this configuration.",
            said(error).partition(" Model type should be")[0],
            "Check its config.json, and that it is a text model's.",
        ) from error
    return _prepare(model, task, at, None, _head_parameters(model, task), pack)


def save(model: PreTrainedModel, directory: Path, tokens: PreTrainedTokenizerFast) -> None:
    """Write a folder that ``from_pretrained`` loads, in safetensors. The model must have plain modules again."""
    turned = {f"{name}.weight" for name in transposed(model)}
    state = {name: value.t().contiguous() if name in turned else value for name, value in model.state_dict().items()}
    model.config.dtype = model.dtype
    with _quietly():
        # Under the model's own names: some families' files have others, and layers fused, for code of before.
        model.save_pretrained(directory, state_dict=state, save_original_format=False)
        tokens.save_pretrained(directory)


def saved(directory: Path, model: PreTrainedModel) -> Iterator[tuple[Tensor, Tensor]]:
    """Every parameter of ``model`` beside the one of that name in a folder of ``save``, read one at a time.

    Raises:
        EdgePeftError: the folder lacks one, or is damaged.
    """
    turned = {f"{name}.weight" for name in transposed(model)}
    wanted = dict(model.named_parameters())
    for path in sorted(directory.glob("*.safetensors")):
        with _refusing_unloadable(Source(str(directory), str(directory))), safe_open(path, framework="pt") as file:
            names = wanted.keys() & file.keys()
        for name in sorted(names):
            with safe_open(path, framework="pt") as file:  # anew, or all that was read of a mapped file stays in memory
                tensor = file.get_tensor(name)
            yield wanted.pop(name), tensor.t() if name in turned else tensor
    if wanted:
        raise EdgePeftError(f"{directory} has no {min(wanted)}.", "It is not what was merged.", "Delete it and merge.")


def repack(model: PreTrainedModel, parts: anatomy.Anatomy, at: str) -> None:
    """Pack the layers of an unpacked model that ``load`` would have packed."""
    precision.pack_where(
        model, lambda name: _may_be_packed(name, parts, model), None, lambda name, linear: precision.pack(linear, at)
    )


def _head_parameters(model: PreTrainedModel, task: str) -> set[str]:
    """A classifier's own parameters; what predicts tokens has none that a method must train."""
    if task != "classification":
        return set()
    base = {id(parameter) for parameter in model.base_model.parameters()}
    return {name for name, parameter in model.named_parameters() if id(parameter) not in base}


def _prepare(
    model: PreTrainedModel, task: str, at: str, device: str | None, fresh: set[str], pack: Packing | None
) -> Backbone:
    check(model.config, task)
    if task == "classification" and model.config.pad_token_id is None:  # decoders look for the last token before it
        eos = getattr(model.config, "eos_token_id", None)
        model.config.pad_token_id = next(iter(eos if isinstance(eos, list) else [eos or 0]), 0)
    attending.install()
    linearize(model)
    model.requires_grad_(False)
    model.eval()
    parts = anatomy.find(model)
    if precision.is_packed(at):
        precision.pack_where(
            model,
            lambda name: _may_be_packed(name, parts, model),
            device,
            lambda name, linear: pack(linear, at, parts.roles(name)) if pack else precision.pack(linear, at),
        )
    if device is not None:
        model.to(device)
    return Backbone(model, parts, task, at, frozenset(fresh))


def _let_go_of_files(model: nn.Module) -> None:
    """Copy what was not packed: on a CPU it is a view of a mapped file, all of which stays in memory with it."""
    for parameter in model.parameters():  # packed weights are buffers
        parameter.data = parameter.data.clone()


def _untie_as_published(model: Any) -> None:
    """FLAN-T5's head is its own, but transformers' T5 configuration ties it whatever its config.json says."""
    head = model.get_output_embeddings()
    tied = head is not None and head.weight is model.get_input_embeddings().weight
    if tied and getattr(model.config, "scale_decoder_outputs", True) is False:
        head.weight = nn.Parameter(torch.empty_like(head.weight))


def _may_be_packed(name: str, parts: anatomy.Anatomy, model: PreTrainedModel) -> bool:
    """Only layers of the blocks, as everywhere in the field; never T5's ``wo``, whose outliers do not survive it."""
    inside = any(name.startswith(f"{block.path}.") for block in parts.blocks)
    return inside and not (model.config.model_type in ("t5", "mt5", "umt5") and name.endswith(".wo"))


def _forget_gguf(model: PreTrainedModel) -> None:
    """transformers marks a model read from GGUF as quantised and refuses to save it; the tensors are plain."""
    for mark in ("is_quantized", "quantization_method", "hf_quantizer"):
        vars(model).pop(mark, None)
    del model.config.quantization_config


def _gguf(source: Source) -> dict[str, str]:
    return {"gguf_file": source.gguf} if source.gguf else {}


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """transformers reports a new classifier head at length; edgepeft trains it, so there is nothing to warn of."""
    from transformers.utils import logging

    before, shown = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(before)
        if shown:
            logging.enable_progress_bar()


@contextlib.contextmanager
def _refusing_unloadable(source: Source) -> Iterator[None]:
    from huggingface_hub.errors import StrictDataclassError
    from safetensors import SafetensorError

    try:
        yield
    except SafetensorError as error:
        raise EdgePeftError(
            f"The weights of {source.name} are damaged.", str(error), "Fetch the model again."
        ) from error
    except (OSError, ValueError, KeyError, AttributeError, StrictDataclassError) as error:
        name, others = repr(source.name), [*beside(source.name), *catalog.names()]
        remedy = f"Check the name, the task and the network. {nearest(source.name, others)}"
        if source.known is not None:  # the name is right: only the weights are not here
            name = f"{name} ({source.location} on the hub)"
            remedy = "Check the task and the network, or give a folder that holds the model."
        elif Path(source.name).exists():
            remedy = "Check the task and the files, or fetch the model again."
        if "trust_remote_code" in str(error):
            remedy = "Read that code; if you trust it, add --set trust_remote_code=true (plan: --trust-remote-code)."
        raise UsageError(f"The model {name} could not be loaded.", said(error), remedy) from error
