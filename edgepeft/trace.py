"""Run a step on fake tensors and count the bytes it holds at each moment, by phase and by kind."""

from __future__ import annotations

import contextlib
import logging
import sys
import weakref
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import masking_utils

from edgepeft import cuda_semantics
from edgepeft.cuda_device import Device
from edgepeft.placements import eight_bit
from edgepeft.recall import RecallingMode, describe
from edgepeft.roofline import Work
from edgepeft.surface import KINDS
from edgepeft.work import Tally


@dataclass(frozen=True)
class Peak:
    """The moment of a phase at which most is held: bytes in all and by kind."""

    peak_bytes: int
    bytes: Mapping[str, int]


@dataclass
class _Phase:
    """Allocations (uid > 0) and frees (uid < 0) of one phase in order, after what was held when it began."""

    held: list[int]
    events: list[int] = field(default_factory=list)
    tally: Tally = field(default_factory=Tally)


class _Alive(weakref.ref[torch.UntypedStorage]):
    """A storage that has not died yet. Its tracker holds this and it holds no tracker: weights outlive many."""

    __slots__ = ("address", "uid")
    address: int
    uid: int


class Tracker(TorchDispatchMode):
    """Follows every storage from its birth to its death, on fake tensors or real ones.

    A storage is counted once, however many tensors view it, rounded up as the device's allocator does. Kinds:
    ``weights`` and ``adapter`` are named by the caller (``label``), ``gradients`` and ``optimizer`` are recognised,
    ``activations`` are what forward leaves alive when backward begins, ``temporaries`` is the rest.

    Args:
        cuda: round and count workspaces as this CUDA device does; on the CPU neither is done.
    """

    def __init__(self, *, cuda: Device | bool) -> None:
        super().__init__()
        self.fake: RecallingMode | None = None
        self.cuda = Device() if cuda is True else cuda or None
        self.phases: dict[str, _Phase] = {}
        self._phase: _Phase | None = None
        self._uid = 0
        self._uid_of: dict[int, int] = {}  # live storages by address
        self._alive: dict[int, _Alive] = {}
        self._bytes: dict[int, int] = {}
        self._asked: dict[int, int] = {}  # the same before rounding
        self._kind: dict[int, str] = {}
        self._blas: set[bool] = set()  # the threads (is it backward's?) whose cuBLAS handle has its workspace
        own = weakref.ref(self)

        def ended(storage: Any) -> None:
            if (tracker := own()) is not None:
                tracker._died(storage)

        self._ended = ended

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # nothing is compiled here, and the guard against it costs much of a trace's time

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.prim.device.default:  # more than half of all calls, and none allocates
            return args[0].fake_device
        if self.cuda is not None and func in cuda_semantics.PRODUCTS:
            self._blas_workspace(self.cuda)
        if func is torch.ops.aten.add.Tensor and _accumulates_in_place(args):
            func = torch.ops.aten.add_.Tensor
        signature, tensors = describe(func, args, kwargs) if self.fake is not None else (None, [])
        if signature is not None and self.fake is not None and self.fake.knows(signature):
            result = self.fake.recall(signature, tensors)
        else:
            result = func(*args, **(kwargs or {}))
        if self._phase is not None:
            self._phase.tally.add(func, args, kwargs or {}, result, signature)
        for leaf in (result,) if type(result) is FakeTensor else tree_leaves(result):
            if isinstance(leaf, Tensor) and leaf.layout is torch.strided:  # a sparse one is made of others
                self._follow(leaf)
        for hidden in cuda_semantics.workspace_bytes(func, args, cuda=self.cuda is not None):
            self._record(uid := self._born(hidden))
            self._record(-uid)
        return result

    def _blas_workspace(self, device: Device) -> None:
        """A handle of cuBLAS belongs to a thread, and autograd runs backward in a thread of its own."""
        backward = torch._C._current_graph_task_id() != -1
        if backward not in self._blas:
            self._blas.add(backward)
            uid = self._born(device.blas_workspace_bytes)
            self._kind[uid] = "temporaries"  # scratch memory, though it is never freed
            self._uid_of[-uid] = uid
            self._record(uid)

    def empty_cache(self) -> None:
        """Note that ``torch.cuda.empty_cache`` would have been called here."""
        self._record(0)

    def label(self, tensors: Iterable[Tensor], kind: str) -> None:
        """Say what the storages of ``tensors`` are for. The first label a storage gets is kept."""
        for tensor in tensors:
            self._kind.setdefault(self._follow(tensor), kind)

    def label_model(self, model: nn.Module, adapter: Iterable[Tensor]) -> None:
        """Label a model's parameters and buffers, and recognise its gradients from now on."""
        self.label(adapter, "adapter")
        self.label([*model.parameters(), *model.buffers()], "weights")
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(self._label_gradient)

    def label_optimizer(self, optimizer: torch.optim.Optimizer) -> None:
        """Label an optimizer's states; call it at the end of a phase that created some."""
        states = (value for state in optimizer.state.values() for value in state.values())
        self.label((value for value in states if isinstance(value, Tensor)), "optimizer")

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Attribute what happens inside to the phase ``name``; the last one of a name is kept."""
        self._phase = self.phases[name] = _Phase(list(self._uid_of.values()))
        tensor: Any = Tensor
        backward = tensor.backward

        def marked(loss: Tensor, *args: Any, **kwargs: Any) -> None:
            for uid in self._uid_of.values():
                self._kind.setdefault(uid, "activations")
            backward(loss, *args, **kwargs)

        tensor.backward = marked
        try:
            with self:
                yield
        finally:
            tensor.backward = backward
            self._phase = None

    def peaks(self) -> dict[str, Peak]:
        """The peak of every phase."""
        return {name: self._peak(phase) for name, phase in self.phases.items()}

    def work(self) -> dict[str, dict[str, Work]]:
        """What every phase computed and moved, by class of operator."""
        return {name: phase.tally.work() for name, phase in self.phases.items()}

    def history(self, *phases: str) -> Iterator[tuple[int, int]]:
        """Births (uid, bytes) and deaths (-uid, bytes) of storages through ``phases`` in this order.

        What was held when the first of them began is born before it. The same phase may be named again: a step that is
        repeated. (0, 0) is where ``empty_cache`` was called. ``allocator.CachingAllocator.run`` takes this.
        """
        alive: set[int] = set()
        for name in phases:
            phase = self.phases[name]
            held = set(phase.held)
            yield from ((-uid, self._bytes[uid]) for uid in sorted(alive - held))
            yield from ((uid, self._bytes[uid]) for uid in sorted(held - alive))
            alive = held
            for event in phase.events:
                yield event, self._bytes[abs(event)] if event else 0
                alive.add(event) if event > 0 else alive.discard(-event)

    def storage(self, uid: int) -> tuple[int, int, str]:
        """Of a storage: the bytes that were asked for, the bytes that it takes, and its kind."""
        return self._asked[uid], self._bytes[uid], self._kind.get(uid, "temporaries")

    @property
    def moment(self) -> int:
        """How many births and deaths the current phase has seen; 0 outside of phases."""
        return 0 if self._phase is None else len(self._phase.events)

    def _peak(self, phase: _Phase) -> Peak:
        now = sum(self._bytes[uid] for uid in phase.held)
        highest, moment = now, 0
        for index, event in enumerate(phase.events, start=1):
            if event:
                now += self._bytes[event] if event > 0 else -self._bytes[-event]
            if now > highest:
                highest, moment = now, index
        alive = set(phase.held)
        for event in phase.events[:moment]:
            alive.add(event) if event > 0 else alive.discard(-event)
        kinds: Counter[str] = Counter(dict.fromkeys(KINDS, 0))
        for uid in alive:
            kinds[self._kind.get(uid, "temporaries")] += self._bytes[uid]
        return Peak(highest, dict(kinds))

    def _label_gradient(self, parameter: Tensor) -> None:
        if parameter.grad is not None:
            self._kind[self._follow(parameter.grad)] = "gradients"

    def _follow(self, tensor: Tensor) -> int:
        storage = tensor.untyped_storage()
        address = storage._cdata
        uid = self._uid_of.get(address)
        if uid is None:
            size = 0 if tensor.device.type == "meta" else storage.nbytes()  # a structure alone, of a real run
            uid = self._uid_of[address] = self._born(size)
            self._record(uid)
            self._alive[uid] = alive = _Alive(storage, self._ended)
            alive.address, alive.uid = address, uid
        return uid

    def _born(self, size: int) -> int:
        self._uid += 1
        self._asked[self._uid] = size
        rounding = cuda_semantics.ROUNDING if self.cuda else 1
        self._bytes[self._uid] = -(-size // rounding) * rounding
        return self._uid

    def _died(self, storage: _Alive) -> None:
        del self._alive[storage.uid]
        if self._uid_of.get(storage.address) == storage.uid:
            del self._uid_of[storage.address]
        self._record(-storage.uid)

    def _record(self, event: int) -> None:
        if self._phase is not None:
            self._phase.events.append(event)


def _accumulates_in_place(args: tuple[Any, ...]) -> bool:
    """Whether autograd's engine adds a gradient to one that nothing else holds: then it does so in place.

    Any dispatch mode makes the engine take a new tensor instead (can_accumulate_inplace in
    torch/csrc/autograd/input_buffer.cpp, isTensorSubclassLike in ATen/TensorSubclassLikeUtils.h).
    """
    if torch._C._current_graph_task_id() == -1 or torch.is_grad_enabled():
        return False
    caller: Any = sys._getframe(2)
    while caller.f_code.co_name in ("_fn", "inner"):  # what torch wraps dispatch modes in
        caller = caller.f_back
    if caller.f_code.co_name != "_engine_run_backward":  # but in the backward of a function written in Python
        return False
    held: Any = args[0]
    storage = held.untyped_storage()
    alone = held._use_count() == _USES and torch._C._storage_Use_Count(storage._cdata) == _STORAGE_USES
    return alone and isinstance(args[1], Tensor) and held.shape == args[1].shape and held.dtype is args[1].dtype


# Of a tensor that only the engine holds, seen from a dispatch mode: beside the engine's own, those of this very call.
_USES, _STORAGE_USES = 4, 2


@contextlib.contextmanager
def fake_device(*, cuda: Device | bool) -> Iterator[Tracker]:
    """Tensors made inside have shapes but no data; with ``cuda`` they allocate as on a CUDA device.

    Build model, optimizer and batches inside, label them, then run phases::

        with fake_device(cuda=True) as tracker:
            model, optimizer = ...
            tracker.label_model(model, adapter=[])
            with tracker.phase("forward+backward"):
                ...
        tracker.peaks()
    """
    logging.getLogger("torch._subclasses.fake_tensor").setLevel(
        logging.CRITICAL
    )  # errors are raised; printed too, twice
    eight_bit.codes()  # and with it bitsandbytes, whose tables must not be fake for the rest of the process
    tracker = Tracker(cuda=cuda)
    tracker.fake = RecallingMode()
    emulated = cuda_semantics.emulated(tracker.cuda) if tracker.cuda else contextlib.nullcontext()
    with tracker.fake, emulated, _not_packed():
        yield tracker


@contextlib.contextmanager
def _not_packed() -> Iterator[None]:
    """Answer for transformers what fake positions cannot: that no row of a batch holds several sequences.

    It asks only where there is no mask; without the answer it makes one, for example for a prompt that is encoded.
    """
    with mock.patch.object(masking_utils, "find_packed_sequence_indices", lambda positions: None):
        yield
