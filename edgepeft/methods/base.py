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
from edgepeft.precision import is_packed, store_frozen

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
    backpropagates: ClassVar[bool] = True  # through the backbone, so that checkpointing its activations saves memory
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

    def require(self, holds: bool, option: str, expected: str) -> None:
        """Refuse the value of a hyper-parameter unless ``holds``; for ``__post_init__``."""
        if not holds:
            raise UsageError(f"{self.name}: {option} = {getattr(self, option)!r} must be {expected}.", "", "")

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
        """AdamW (arXiv 1711.05101) over what is trained, without decay on vectors.

        It is fused, so that updates need no temporaries.
        """
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
        backbone.model,  # sorted: the order of a set differs from process to process, and with it that of the optimizer
        (name for name in sorted(backbone.fresh) if name in present and not present[name].requires_grad),
    )
    store_frozen(backbone.model)


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
        right = isinstance(value, (int, float) if expected is float else expected)
        if expected is tuple:
            right = right and all(isinstance(item, str) for item in value)
        if not right or isinstance(value, bool) != (expected is bool):
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


def describe(method: type[Method]) -> dict[str, Any]:
    """A method as plain data: its place in the survey's taxonomy, its paper and its hyper-parameters."""
    import ast

    name = method.__module__.removeprefix(f"{__package__}.")
    body = ast.parse(inspect.getsource(method)).body[0]
    assert isinstance(body, ast.ClassDef)
    meanings = {  # a field's meaning is the string below it
        entry.target.id: text.value.value
        for entry, text in zip(body.body, body.body[1:], strict=False)
        if isinstance(entry, ast.AnnAssign) and isinstance(entry.target, ast.Name)
        if isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant)
    }
    options = [
        {"name": field.name, "default": field.default, "meaning": meanings.get(field.name, "")}
        for field in dataclasses.fields(method)
    ]
    return {
        "name": name,
        "kind": method.kind,
        "merges": method.merges,
        "paper": f"{method.paper.title} ({method.paper.year}), arXiv {method.paper.arxiv}",
        "summary": inspect.cleandoc(method.__doc__ or "").splitlines()[0],
        "aliases": dict(method.aliases),
        "learning_rate": method.learning_rate,
        "options": options,
    }
