"""Any configuration of HF PEFT as a method: PEFT puts its layers into the model, and merges them.

The model stays the Hugging Face model it was; PEFT's wrapper around it is kept out of its modules. Packed layers look
to PEFT like the ``nn.Linear`` they stand for, whose weight is unpacked when it is read, so that every type of PEFT that
works on plain layers works on them, without the layers of bitsandbytes that PEFT would look for.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from edgepeft import peft_config
from edgepeft.anatomy import Anatomy
from edgepeft.errors import UsageError
from edgepeft.methods.base import WHOLE, Method, NotMergeable, Paper
from edgepeft.placements import presumed, selection
from edgepeft.precision import StoredLinear, is_packed

if TYPE_CHECKING:
    from transformers import PretrainedConfig

_WRAPPER, _SHARED = "foreign_wrapper", "foreign_shared"  # attributes of a model
_ENCODER = "prompt_encoder"
ADAPTER = "default"  # what PEFT calls a model's adapter when there is one
_HEADS = {"classifier", "score"}  # PEFT writes both into a classifier's configuration, whichever it has
# What these bring to the layers is gone when activations are computed again.
_NOT_RECOMPUTED = {
    "PREFIX_TUNING": "its keys and values, in a cache",
    "CARTRIDGE": "its keys and values, in a cache",
    "POLY": "the number of the task",
}
_OF_TASKS = ("POLY", "MULTITASK_PROMPT_TUNING")


@dataclass(frozen=True, kw_only=True)
class Foreign(Method):
    """What an ``adapter_config.json`` describes."""

    paper = Paper("PEFT: State-of-the-art parameter-efficient fine-tuning", 2022, venue="github.com/huggingface/peft")
    kind = "reparametrised"
    identity_at_start = False

    source: str
    """``peft:`` and a path, as the user wrote it."""
    configuration: str
    """What the file says, JSON."""

    def __post_init__(self) -> None:
        self.parsed()

    @property
    def name(self) -> str:
        return self.source

    @property
    def type(self) -> str:
        """PEFT's name of what the configuration is one of."""
        return str(self.parsed().peft_type.value)

    # What a class of ours says of all its methods, a configuration of PEFT's says of itself: hence properties, which to
    # mypy are no class variables.
    @property
    def merges(self) -> bool:  # type: ignore[override]
        config = self.parsed()
        return not (config.is_prompt_learning or config.is_adaption_prompt)

    @property
    def writes_backbone(self) -> bool:  # type: ignore[override]
        start = getattr(self.parsed(), "init_lora_weights", None)
        return isinstance(start, str) and start.lower().startswith(("pissa", "olora"))  # PEFT takes "OLoRA" too

    @property
    def backpropagates(self) -> bool:  # type: ignore[override]
        return self.type not in _NOT_RECOMPUTED

    @property
    def not_checkpointed(self) -> str:  # type: ignore[override]
        return (
            f"PEFT hands the layers {_NOT_RECOMPUTED[self.type]}, and takes it away before backward, "
            "when checkpointing would compute them again."
        )

    @property
    def unexportable(self) -> str:  # type: ignore[override]
        if self.type == "LILY":
            return (
                "PEFT mixes LILY's experts alike for all tokens of a batch, padding included: what it says of a text "
                "depends on what else is in the batch, and a device reads one text."
            )
        if not (self.parsed().is_prompt_learning or self.type in _OF_TASKS):
            return ""
        return (
            f"What PEFT does for {self.type} depends on the sizes and values of its input while it runs, which a graph "
            "cannot. Its adapter works in PEFT."
        )

    def parsed(self) -> Any:
        """A new ``PeftConfig``, to be trained.

        Raises:
            UsageError: PEFT is not installed, or the configuration is none, or one that cannot be trained here.
        """
        return peft_config.parse(self.configuration, self.source)

    def check(self, at: str) -> None:
        super().check(at)
        if is_packed(at) and self.parsed().is_adaption_prompt:
            raise UsageError(
                f"{self.source} cannot train on {at} weights.",
                f"PEFT asks each attention for the device and type of its parameters, to make {self.type} like them, "
                "and packed weights are none.",
                "Use --precision bf16, or another type of configuration (docs/peft.md), or --method prefix_tuning.",
            )

    def positions(self, configuration: PretrainedConfig) -> int:
        config = self.parsed()
        return int(config.num_virtual_tokens or 0) if config.is_prompt_learning else 0

    def depths(self) -> tuple[int, int]:
        return WHOLE if _tells_layers_apart(self.parsed()) else super().depths()

    def inject(self, model: nn.Module, anatomy: Anatomy) -> None:
        config = self.parsed()
        _settle_task(self.source, config, anatomy)
        whole = getattr(config, "modules_to_save", None) or ()
        if whole:
            config.modules_to_save = None  # edgepeft trains them itself, in fp32 whatever the backbone is in
        own = {id(tensor) for tensor in _tensors(model).values()}
        head = _head(model)
        for module in model.modules():
            if isinstance(module, StoredLinear):
                _let_read(module)
        try:
            with presumed.values(model, config):
                _put(model, config)
        except Exception as error:  # PEFT's layers raise whatever they run into
            raise _refusal(self, model, error) from error
        if _head(model) is not head and not _weighs_tokens(_head(model)):
            raise UsageError(
                f"{self.source} changes the layer that predicts tokens.",
                "edgepeft computes token logits from its weight, a part at a time, and would not see the change.",
                'Take it out of target_modules; "modules_to_save" trains it whole.',
            )
        selection.train(model, [*_half_trained(model), *_named(self.source, model, whole)])
        described: Any = model
        described.backbone_tensors = frozenset(name for name, tensor in _tensors(model).items() if id(tensor) in own)

    def merge(self, model: nn.Module) -> None:
        if not self.merges:
            raise NotMergeable(f"{self.source} cannot be merged.", f"{self.type} changes no weights.", "")
        selection.fold(model)
        try:
            with presumed.values(model, self.parsed()):
                vars(model)[_WRAPPER].base_model.merge_and_unload()
        except Exception as error:
            why = f"PEFT cannot merge {self.type} into this model: {peft_config.first_line(error)}."
            raise NotMergeable(f"{self.source} cannot be merged.", why, "") from error
        for name in vars(model).pop(_SHARED):
            delattr(model, name)
        del vars(model)[_WRAPPER]
        vars(model).pop("forward", None)


def read(name: str, options: Mapping[str, Any] | None) -> Foreign:
    """The method that ``peft:PATH`` names.

    Raises:
        UsageError: it cannot be read, or is not one that can be trained here.
    """
    if options and options.keys() == {"source", "configuration"}:  # those of an adapter's card
        return Foreign(**options)
    if options:
        raise UsageError(f"{name} takes no options.", "Its file says all.", f"Change {peft_config.path_of(name)}.")
    return Foreign(source=name, configuration=peft_config.text_of(name) or "")


def write(folder: Path, model: nn.Module, name: str) -> None:
    """Write the adapter of a model that a ``Foreign`` is in as PEFT's ``PeftModel.from_pretrained`` reads it.

    Args:
        name: of the backbone.
    """
    from peft import get_peft_model_state_dict

    outer = vars(model)[_WRAPPER]
    config = outer.peft_config[ADAPTER]
    prefix = "base_model." if config.is_prompt_learning else "base_model.model."
    state = {selection.canonical(name): tensor for name, tensor in outer.state_dict().items()}
    found = dict(get_peft_model_state_dict(outer, state_dict=state, save_embedding_layers=False))
    own = {selection.canonical(n) for n in vars(model)["backbone_tensors"]}
    trained = {selection.canonical(n) for n, p in model.named_parameters() if p.requires_grad} & own
    whole = sorted({n.rpartition(".")[0] for n in trained if not n.endswith(".base_layer.bias")})
    if getattr(config, "bias", "none") == "all":
        whole = [module for module in whole if f"{module}.weight" in trained]
    found |= {f"{prefix}{n}": state[f"{prefix}{n}"] for n in trained if n.rpartition(".")[0] in whole}
    found = {n: t.cpu().contiguous().clone() for n, t in found.items()}
    save_file(found, folder / peft_config.WEIGHTS, metadata={"format": "pt"})
    said = {"base_model_name_or_path": name, "inference_mode": True, **({"modules_to_save": whole} if whole else {})}
    before = {field: getattr(config, field, None) for field in said}
    vars(config).update(said)
    config.save_pretrained(str(folder))
    vars(config).update(before)


def is_in(model: nn.Module) -> bool:
    """Whether PEFT has put its layers into a model."""
    return _WRAPPER in vars(model)


class _Outer(nn.Module):
    """Stands where ``PeftModel`` would, around a tuner: names in PEFT's files begin there."""

    def __init__(self, tuner: Any) -> None:
        super().__init__()
        self.base_model = tuner
        self.peft_config = tuner.peft_config


def _put(model: Any, config: Any) -> None:
    """Let PEFT change the model in place, and keep the one module that both need out of the model's own."""
    import peft
    from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
    from peft.tuners.tuners_utils import BaseTuner

    if config.is_prompt_learning:
        outer = peft.get_peft_model(model, config)
        model.add_module(_ENCODER, outer.prompt_encoder)
        for module in list(outer.prompt_encoder.modules()):
            for leaf, parameter in list(module._parameters.items()):
                if parameter is not None and not parameter.requires_grad:  # random, and not to be had again
                    del module._parameters[leaf]
                    module.register_buffer(leaf, parameter.data)
        _route(model, outer, config)
        shared = [_ENCODER]
    else:
        tuner = PEFT_TYPE_TO_TUNER_MAPPING[config.peft_type](model, {ADAPTER: config}, ADAPTER)
        if isinstance(tuner, BaseTuner):
            tuner._cast_adapter_dtype(ADAPTER, True)
            if type(tuner).forward is not BaseTuner.forward:
                _route(model, tuner, config)
        shared = [name for name, _ in tuner.named_children() if name != "model"]
        for name in shared:  # what all layers use
            model.add_module(name, tuner.get_submodule(name))
        outer = _Outer(tuner)
    presumed.follow(model, config)
    vars(model)[_WRAPPER] = outer  # as an attribute it would become a module of its own module
    vars(model)[_SHARED] = shared


def _route(model: Any, through: Callable[..., Any], config: Any) -> None:
    """Let the model's forward go through PEFT's, which calls the model's own; outputs stay those of the input."""
    own: Callable[..., Any] = model.forward
    inside = False

    @functools.wraps(own)
    def forward(*args: Any, **kwargs: Any) -> Any:
        nonlocal inside
        if inside:
            return own(*args, **kwargs)
        ids = kwargs["input_ids"]
        if config.peft_type.value in _OF_TASKS:  # a run's data are one task's
            kwargs["task_ids"] = torch.zeros(len(ids), dtype=torch.long, device=ids.device)
        inside = True
        try:
            found = through(*args, **kwargs)
        finally:
            inside = False
        if config.is_prompt_learning and found.logits.dim() == 3:
            found.logits = found.logits[:, -kwargs.get("decoder_input_ids", ids).shape[1] :]
        return found

    vars(model)["forward"] = forward


def wraps(model: nn.Module) -> bool:
    """Whether calling the model means calling PEFT's wrapper of it."""
    return "forward" in vars(model)


def _tells_layers_apart(config: Any) -> bool:
    """Whether a configuration may treat some layers of a stack otherwise than others."""
    for name in ("layers_to_transform", "layers_pattern", "rank_pattern", "alpha_pattern"):
        if getattr(config, name, None) not in (None, [], {}, ""):
            return True
    for name in ("target_modules", "exclude_modules", "target_parameters", "modules_to_save"):
        given = getattr(config, name, None) or ()
        if isinstance(given, str) and given != "all-linear":  # a regular expression
            return True
        if not isinstance(given, str) and any(part.isdigit() for entry in given for part in entry.split(".")):
            return True
    return False


def _settle_task(source: str, config: Any, anatomy: Anatomy) -> None:
    task = "classification" if not anatomy.unembedding else "seq2seq" if len(anatomy.stacks) == 2 else "causal-lm"
    said = getattr(config.task_type, "value", config.task_type)
    if said not in (None, peft_config.TASKS[task]):
        raise UsageError(
            f"{source} is for {said}, and this run is a {task} one ({peft_config.TASKS[task]}).",
            "A configuration may name the task it is for, as task_type.",
            "Change it there, or choose the task with --task.",
        )
    config.task_type = peft_config.TASKS[task]


def _refusal(method: Foreign, model: nn.Module, error: Exception) -> UsageError:
    ends = sorted({name.rpartition(".")[2] for name, module in model.named_modules() if _is_linear(module)})
    remedy = "Use a type that this model and precision can have (docs/peft.md), or a method of edgepeft's own."
    words = set(re.findall(r"\w+", str(error)))
    if named := sorted(words & (json.loads(method.configuration).keys() - {"target_modules"})):
        remedy = f"Correct {named[0]} in {peft_config.path_of(method.source)}."
    if any(word in str(error).lower() for word in ("not found", "specify")):  # of the layers to change
        remedy = f"Its linear layers are called {', '.join(ends)}."
    return UsageError(
        f"PEFT cannot put {method.type} of {method.source} into this model.",
        f"{peft_config.first_line(error)}.",
        remedy,
    )


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, (nn.Linear, StoredLinear))


def _named(source: str, model: nn.Module, ends: Iterable[str]) -> list[str]:
    """The parameters of the modules that ``modules_to_save`` means."""
    found: list[str] = []
    for end in ends:
        modules = [name for name, _ in model.named_modules() if name == end or name.endswith(f".{end}")]
        if not modules and end not in _HEADS:
            raise UsageError(f"{source}: modules_to_save names {end!r}.", "There is no such module in the model.", "")
        found += [f"{name}.{leaf}" for name in modules for leaf, _ in model.get_submodule(name).named_parameters()]
    return list(dict.fromkeys(found))


def _half_trained(model: nn.Module) -> list[str]:
    """What PEFT trains in half precision, in which small updates are lost."""
    half = (torch.float16, torch.bfloat16)
    return [name for name, p in model.named_parameters() if p.requires_grad and p.dtype in half]


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def _head(model: Any) -> nn.Module | None:
    found: nn.Module | None = model.get_output_embeddings()
    return found


def _weighs_tokens(head: nn.Module | None) -> bool:
    """Whether PEFT made a head that is tied to embeddings some of whose rows are trained; their change is then in
    its weight, which PEFT's own has not.
    """
    from peft.tuners.trainable_tokens.layer import TrainableTokensLayer

    if not isinstance(head, TrainableTokensLayer):
        return False
    weight = property(lambda self: self.get_merged_weights(self.active_adapters))
    head.__class__ = type("TrainableTokensHead", (type(head),), {"weight": weight})
    return True


def _let_read(stored: StoredLinear) -> None:
    """Make a stored layer an ``nn.Linear`` too, whose weight (out, in), bf16, is unpacked whenever it is read."""
    kind = type(stored)
    weight = {} if "weight" in stored._buffers else {"weight": property(lambda self: self.dequantize(torch.bfloat16))}
    stored.__class__ = type(kind.__name__, (kind, nn.Linear), weight)
