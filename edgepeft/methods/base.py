"""The seam every method stands behind, and how a method is found by its name."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import json
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from edgepeft import stranger
from edgepeft.anatomy import Anatomy
from edgepeft.backbone import Backbone
from edgepeft.errors import EdgePeftError, UsageError, nearest
from edgepeft.peft_config import path_of
from edgepeft.placements import projection, selection
from edgepeft.precision import StoredLinear, is_packed, pack, store_frozen
from edgepeft.stage import Stage, no_choice
from edgepeft.surface import ADAMW, FSDP, OPTIMIZERS

if TYPE_CHECKING:
    from transformers import PretrainedConfig

DEPTHS = (2, 4)  # layers of the models that are traced for planning; even, as LST pairs them
WHOLE = (1 << 30, 1 << 31)  # more than any model has: it is traced as a whole

_FOREIGN = "edgepeft.foreign"  # imported by name: it stands on this module
Kind = Literal["additive", "selective", "reparametrised", "hybrid"]


@dataclass(frozen=True)
class Paper:
    """Where a method is published: its arXiv number, or the proceedings where there is none."""

    title: str
    year: int
    arxiv: str = ""
    venue: str = ""

    def __str__(self) -> str:
        return f"{self.title} ({self.year}), {f'arXiv {self.arxiv}' if self.arxiv else self.venue}"


class NotMergeable(EdgePeftError):
    """A method whose change cannot be folded into the backbone's weights."""


@dataclass(frozen=True, kw_only=True)
class Method(ABC):
    """A way to fine-tune. Its fields are its hyper-parameters."""

    paper: ClassVar[Paper]
    kind: ClassVar[Kind]
    version: ClassVar[int] = 1  # raised when adapters of before would compute something else
    merges: ClassVar[bool] = True
    writes_backbone: ClassVar[bool] = False  # needs weights that are not packed
    backpropagates: ClassVar[bool] = True  # through the backbone, so that checkpointing its activations saves memory
    updates_in_backward: ClassVar[bool] = False  # no gradient is left to accumulate or clip when backward ends
    shardable: ClassVar[bool] = False  # each device may hold a part of each layer: nothing else reads what is trained
    aliases: ClassVar[Mapping[str, str]] = {}  # other names, each with the precision that it stands for
    learning_rate: ClassVar[float] = 1e-3  # where a search starts, as the paper or common practice has it
    identity_at_start: ClassVar[bool] = True  # before the first update the model computes what the backbone does
    saves: ClassVar[tuple[str, ...]] = ("disk", "memory")  # compared with full tuning, as the survey has it
    overhead: ClassVar[str] = ""  # what a model that cannot be merged computes besides its backbone, in a few words
    obstacle: ClassVar[str] = "No weight of the backbone can stand for what it computes."  # why it cannot be merged
    unexportable: ClassVar[str] = ""  # why it cannot be exported to ONNX, where it cannot
    not_checkpointed: ClassVar[str] = (  # why activations are not computed again, where it does not backpropagate
        "It keeps no activations of the backbone, and checkpointing would send gradients through it after all."
    )
    counts_layers: ClassVar[bool] = False  # whether it fits a model depends on how many layers that has
    narrow: ClassVar[Mapping[str, Any]] = {}  # options for a width of 32, heads of 8: where defaults are too large

    @property
    def name(self) -> str:
        """The name of the method's file, or the dotted path of one from elsewhere."""
        module = type(self).__module__
        return module.removeprefix(f"{__package__}.")

    def check(self, at: str) -> None:
        """Refuse, before work starts, a precision the method cannot train on."""
        if self.writes_backbone and is_packed(at):
            raise UsageError(
                f"{self.name} cannot train on {at} weights.",
                "It writes to the backbone's own weights, and packed weights cannot be written.",
                "Use --precision bf16, or a method that leaves the backbone alone: lora, ln_tuning, lst.",
            )

    def check_optimizer(self, kind: str) -> None:
        """Refuse, before work starts, an unknown optimizer, and another form of AdamW than a method's own optimizer."""
        if kind not in OPTIMIZERS:
            raise UsageError(f"There is no optimizer {kind!r}.", "", nearest(kind, OPTIMIZERS))
        if kind != ADAMW and self.updates_in_backward:
            raise no_choice(self.name, kind)

    def check_devices(self, devices: int, strategy: str | None) -> None:
        """Refuse, before work starts, several devices that could not share what each of them learned.

        Args:
            strategy: one of ``surface.STRATEGIES``, where one is chosen.
        """
        if devices > 1 and self.updates_in_backward:
            raise UsageError(
                f"{self.name} cannot be trained on {devices} devices.",
                "It updates each layer inside backward, before the devices could add up their gradients.",
                "Use one device, or another method: --method lora, --method full.",
            )
        if strategy == FSDP and not self.shardable:
            raise UsageError(
                f"{self.name} cannot be trained by FSDP.",
                "It needs whole tensors, or what several layers share, where each device has its part of one layer.",
                "Try --set strategy=ddp, or another method: --method lora, --method full.",
            )

    def check_checkpointing(self) -> None:
        """Refuse, before work starts, to compute activations again where that is no use or would go wrong."""
        if not self.backpropagates:
            raise UsageError(
                f"{self.name} is not trained with checkpointing.",
                self.not_checkpointed,
                "Try --set checkpointing=false (measure: without --checkpointing).",
            )

    def check_export(self) -> None:
        """Refuse, before work starts, an export to ONNX that could not be made."""
        if self.unexportable:
            raise UsageError(
                f"{self.name} cannot be exported to ONNX.",
                self.unexportable,
                "`edgepeft train` takes the same options and ends with the adapter. To run on a device, choose "
                "another method: lora, prompt_tuning, prefix_tuning.",
            )

    def require(self, holds: bool, option: str, expected: str) -> None:
        """Refuse the value of a hyper-parameter unless ``holds``; for ``__post_init__``."""
        if not holds:
            default = next(field.default for field in dataclasses.fields(self) if field.name == option)
            raise UsageError(
                f"{self.name} cannot work with {option} = {getattr(self, option)!r}.",
                f"It must be {expected}.",
                f"Its default is {default!r}; `edgepeft methods {self.name}` says what it is.",
            )

    @abstractmethod
    def inject(self, model: nn.Module, anatomy: Anatomy) -> None:
        """Change ``model`` in place. Afterwards ``requires_grad`` alone says what is trained."""

    def merge(self, model: nn.Module) -> None:
        """Fold what was trained into an unpacked model, leaving plain modules that compute the same.

        Raises:
            NotMergeable: the algebra does not allow it.
        """
        if not self.merges:
            raise NotMergeable(
                f"{self.name} cannot be merged into the backbone.",
                self.obstacle,
                "It is exported to ONNX together with the backbone.",
            )
        selection.fold(model)

    def condense(self, model: nn.Module) -> None:
        """Replace what only training needs, in a model that cannot be merged, by what computes the same for less.

        It is called once, on an unpacked fp32 model in evaluation mode, before that is exported. Projections whose
        weights are made anew in each pass become plain ones.
        """
        projection.condense(model)

    def optimizer(self, model: nn.Module, lr: float, weight_decay: float) -> torch.optim.Optimizer:
        """AdamW (arXiv 1711.05101) over what is trained, without decay on vectors.

        It is fused, so that updates need no temporaries.
        """
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        groups = [
            {"params": [p for p in trained if p.dim() > 1], "weight_decay": weight_decay},
            {"params": [p for p in trained if p.dim() <= 1], "weight_decay": 0.0},
        ]
        return torch.optim.AdamW([group for group in groups if group["params"]], lr=lr, fused=True)

    def stages(self) -> tuple[Stage, ...]:
        """The parts of training, in order. What is trained after the last one began is what an adapter holds."""
        return (Stage(name="train", optimizer=self.optimizer),)

    def finished(self) -> Method:
        """A method whose adapters are made like this one's, and which needs nothing that only training did."""
        return self

    def penalty(self, model: nn.Module, batch: Mapping[str, Tensor], outputs: Tensor) -> Tensor | None:
        """A term added to the mean loss, a scalar with a graph; None for none.

        Args:
            batch: one microbatch, on the model's device.
            outputs: what the loss was computed from, with its graph: a classifier's logits (batch, labels), or the
                states (targets, hidden) that the head reads. ``step.outputs`` computes them anew.
        """
        return None

    def positions(self, configuration: PretrainedConfig) -> int:
        """How many of the backbone's positions the method needs for tokens of its own; the input has the rest."""
        return 0

    def depths(self) -> tuple[int, int]:
        """Two even numbers of layers that planning traces models of, where the model has more.

        What each layer adds must be the same from the first number to the second and from there on; ``WHOLE`` where
        layers are not alike. Planning goes deeper where the model's own kinds of layers take turns.
        """
        return DEPTHS

    def after_update(self, model: nn.Module, progress: float) -> None:  # noqa: B027  (most methods have nothing to do here)
        """Called after each update, while its gradients are still there.

        Args:
            progress: the share of the stage's updates that are done, above 0 and up to 1.
        """

    def is_final(self, progress: float) -> bool:
        """Whether what is trained by then, of the last stage that trains, may be the adapter; at 1 it must."""
        return True

    @property
    def packs_its_own(self) -> bool:
        """Whether ``pack`` makes weights that belong to this method's adapters alone."""
        return False

    def pack(self, linear: nn.Linear, at: str, roles: Collection[str]) -> StoredLinear:
        """A packed copy of a linear layer of the backbone, made while it is loaded, before ``inject``.

        Args:
            roles: those of ``anatomy.ROLES`` that the layer has.
        """
        return pack(linear, at)


def apply(method: Method, backbone: Backbone) -> None:
    """Inject ``method`` and begin its first stage.

    Raises:
        UsageError: the method cannot work on this backbone.
    """
    method.check(backbone.precision)
    model: Any = backbone.model
    model.backbone_tensors = frozenset(name for name, _ in [*model.named_parameters(), *model.named_buffers()])
    with stranger.blamed(type(method).__module__, "when it is put into a model"):
        method.inject(model, backbone.anatomy)
        begin(method, backbone, 0)


def begin(method: Method, backbone: Backbone, stage: int) -> None:
    """Go on from the stage before to ``stage``; parameters that the checkpoint did not have are trained in each."""
    model = backbone.model
    method.stages()[stage].begin(model, backbone.anatomy)
    present = dict(model.named_parameters())
    selection.train(
        model,  # sorted: the order of a set differs from process to process, and with it that of the optimizer
        (name for name in sorted(backbone.fresh) if name in present and not present[name].requires_grad),
    )
    if method.stages()[stage].updates != 0 and not any(p.requires_grad for p in model.parameters()):
        raise UsageError(
            f"{method.name} trains nothing.",
            "After its inject no parameter of the model has requires_grad.",
            "Name some in inject: selection.train(model, names) of edgepeft.placements. Or choose another method.",
        )
    store_frozen(model)


def complete(method: Method, backbone: Backbone) -> None:
    """Apply ``method`` and go through all its stages: the structure that a trained adapter belongs to."""
    method = method.finished()
    apply(method, backbone)
    for stage in range(1, len(method.stages())):
        begin(method, backbone, stage)


def state(model: nn.Module, *, transient: bool = False) -> dict[str, Tensor]:
    """What a method added to a model or changed in it: trained parameters and the buffers that it registered.

    Args:
        transient: with the buffers that only training needs, those registered with ``persistent=False``.
    """
    found: dict[str, Tensor] = {selection.canonical(n): p for n, p in model.named_parameters() if p.requires_grad}
    known: Any = model.backbone_tensors
    for path, module in model.named_modules():
        for leaf, buffer in module._buffers.items():
            name = f"{path}.{leaf}" if path else leaf
            kept = transient or leaf not in module._non_persistent_buffers_set
            if buffer is not None and kept and name not in known:
                found[name] = buffer
    return found


def names() -> list[str]:
    """The methods that come with edgepeft: the files of this folder."""
    return sorted(path.stem for path in Path(__file__).parent.glob("*.py") if path.stem not in ("__init__", "base"))


def find(name: str) -> type[Method]:
    """The class of a method, by file name, alias, dotted path (``stranger.load``) or ``peft:PATH``.

    Raises:
        UsageError: there is no such method.
    """
    if name in names():
        return _class_in(f"{__package__}.{name}")
    if path_of(name) is not None:
        return _class_in(_FOREIGN)
    if "." in name:
        return _class_in(name)
    for method in map(find, names()):
        if name in method.aliases:
            return method
    known = [*names(), *(alias for method in map(find, names()) for alias in method.aliases)]
    raise UsageError(f"There is no method {name!r}.", "", nearest(name, known))


def implied_precision(name: str) -> str | None:
    """The precision an alias stands for: ``qlora`` is ``lora`` on NF4. None for every other name."""
    return find(name).aliases.get(name)


def create(name: str, options: Mapping[str, Any] | None = None) -> Method:
    """A method with its hyper-parameters.

    Raises:
        UsageError: there is no such method, or it has no such hyper-parameter, or of another type.
    """
    method = find(name)
    if path_of(name) is not None:
        read: Callable[..., Method] = importlib.import_module(method.__module__).read
        return read(name, options)
    fields = {field.name: field for field in dataclasses.fields(method)}
    for option, value in (options or {}).items():
        if option not in fields:
            raise UsageError(
                f"{name} has no option {option!r}.",
                nearest(option, fields) if fields else "It has none.",
                f"`edgepeft methods {name}` says what it has.",
            )
        default = fields[option].default
        if isinstance(value, str) and isinstance(default, tuple):
            value = [value]  # one name is a list of one
        if isinstance(value, list):
            (options := dict(options or {}))[option] = value = tuple(value)
        if type(default) in _EXPECTED and not _is(value, type(default)):
            raise UsageError(
                f"{name} cannot work with {option} = {value!r}.",
                f"It must be {_EXPECTED[type(default)]}.",
                f"Its default is {json.dumps(default)}; `edgepeft methods {name}` says what it is.",
            )
    with stranger.blamed(method.__module__, "when it is made"):
        return method(**(options or {}))


_EXPECTED = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "a text",
    tuple: "a list of texts",
}


def _is(value: object, expected: type) -> bool:
    """Whether a recipe's value fits a field whose default is of this type; whole numbers are numbers too."""
    if isinstance(value, bool) or expected is bool:
        return isinstance(value, bool) and expected is bool
    if expected is float:
        return isinstance(value, (int, float)) and abs(value) <= sys.float_info.max
    if expected is tuple:
        return isinstance(value, tuple) and all(isinstance(item, str) for item in value)
    return isinstance(value, expected)


def _class_in(module_name: str) -> type[Method]:
    module = stranger.load(module_name)
    found = [
        value
        for value in vars(module).values()
        if inspect.isclass(value) and issubclass(value, Method) and value.__module__ == module_name
    ]
    if len(found) != 1:
        raise UsageError(
            f"The module {module_name} holds {len(found)} methods.", "A method is a module with one Method class.", ""
        )
    return found[0]
