"""The seam every method stands behind, and how a method is found by its name."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import nn

from edgepeft.anatomy import Anatomy
from edgepeft.backbone import Backbone
from edgepeft.errors import EdgePeftError, UsageError, nearest
from edgepeft.placements import selection
from edgepeft.precision import is_packed

Kind = Literal["additive", "selective", "reparametrised", "hybrid"]


@dataclass(frozen=True)
class Paper:
    """Where a method is published."""

    title: str
    year: int
    arxiv: str


class NotMergeable(EdgePeftError):
    """A method whose change cannot be folded into the backbone's weights."""


@dataclass(frozen=True, kw_only=True)
class Method(ABC):
    """A way to fine-tune. Its fields are its hyper-parameters."""

    paper: ClassVar[Paper]
    kind: ClassVar[Kind]
    merges: ClassVar[bool] = True
    writes_backbone: ClassVar[bool] = False  # needs weights that are not packed
    updates_in_backward: ClassVar[bool] = False  # no gradient is left to accumulate or clip when backward ends
    aliases: ClassVar[Mapping[str, str]] = {}  # other names, each with the precision that it stands for
    learning_rate: ClassVar[float] = 1e-3  # where a search starts, as the paper or common practice has it

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

    @abstractmethod
    def inject(self, model: nn.Module, anatomy: Anatomy) -> None:
        """Change ``model`` in place. Afterwards ``requires_grad`` alone says what is trained."""

    def merge(self, model: nn.Module) -> None:
        """Fold what was trained into an unpacked model, leaving plain modules that compute the same.

        Raises:
            NotMergeable: the algebra does not allow it.
        """
        selection.fold(model)

    def optimizer(self, model: nn.Module, lr: float, weight_decay: float) -> torch.optim.Optimizer:
        """AdamW (arXiv 1711.05101) over what is trained, without decay on vectors; fused, so that updates need no temporaries."""
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        groups = [
            {"params": [p for p in trained if p.dim() > 1], "weight_decay": weight_decay},
            {"params": [p for p in trained if p.dim() <= 1], "weight_decay": 0.0},
        ]
        return torch.optim.AdamW([group for group in groups if group["params"]], lr=lr, fused=True)


def apply(method: Method, backbone: Backbone) -> None:
    """Inject ``method``; parameters that the checkpoint did not have are trained with every method.

    Raises:
        UsageError: the method cannot work on this backbone.
    """
    method.check(backbone.precision)
    method.inject(backbone.model, backbone.anatomy)
    present = dict(backbone.model.named_parameters())
    selection.train(
        backbone.model, (name for name in backbone.fresh if name in present and not present[name].requires_grad)
    )


def names() -> list[str]:
    """The methods that come with edgepeft: the files of this folder."""
    return sorted(path.stem for path in Path(__file__).parent.glob("*.py") if path.stem not in ("__init__", "base"))


def find(name: str) -> type[Method]:
    """The class of a method, by file name, alias or dotted path of a module outside edgepeft.

    Raises:
        UsageError: there is no such method.
    """
    if name in names():
        return _class_in(f"{__package__}.{name}")
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
    fields = {field.name: field for field in dataclasses.fields(method)}
    for option, value in (options or {}).items():
        if option not in fields:
            has = nearest(option, fields) if fields else "It has none."
            raise UsageError(f"{name} has no option {option!r}.", "", has)
        expected = type(fields[option].default)
        if isinstance(value, list):
            (options := dict(options or {}))[option] = value = tuple(value)
        if not isinstance(value, (int, float) if expected is float else expected) or isinstance(value, bool) != (
            expected is bool
        ):
            raise UsageError(
                f"{name}: {option} = {value!r} is not of type {expected.__name__}.",
                "",
                f"Its default is {fields[option].default!r}.",
            )
    return method(**(options or {}))


def _class_in(module_name: str) -> type[Method]:
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        raise UsageError(
            f"There is no method {module_name!r}.",
            str(error),
            "Give the dotted path of an importable module that holds a Method.",
        ) from error
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
