"""Measure what PyTorch reaches on this machine, and write a hardware profile of it.

Usage: ``python tools/probe.py my-machine.toml``, then ``edgepeft plan --gpu my-machine.toml``. It takes a minute.
Every number is the best of many repeats, because whatever else runs can only make one slower. On one thread
(``OMP_NUM_THREADS=1``) a CPU's numbers are processor seconds, which other processes' turns do not lengthen.
Operators run through several layers, each with tensors of its own: one that is repeated on the same ones finds them in
a cache, where a training step does not.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from edgepeft import hardware, heap, roofline
from edgepeft.errors import EdgePeftError
from edgepeft.files import write_text
from edgepeft.hardware import Hardware
from edgepeft.placements import eight_bit
from edgepeft.precision import NF4Linear
from edgepeft.work import Tally

TOKENS, WIDTH, INNER, RANK = 1024, 768, 3072, 8  # of a training step of BERT-base's size
ATTENTION = (4, 12, 128, 64)  # batch, heads, tokens, width of a head
LAYERS = 16  # together larger than most caches
ROUNDS, LEAST_SECONDS = 7, 0.05
CALLED_LAYERS = 8
FEW_AND_MANY = (TOKENS // 4, TOKENS)
_either = " and ".join(map(str, FEW_AND_MANY))
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class Probe:
    """Times operators on one device.

    Args:
        device: ``cpu`` or ``cuda``.
        known: the device as ``hardware.detect`` finds it: says which dtypes are native.
    """

    def __init__(self, device: str, known: Hardware) -> None:
        self.device = device
        self.known = known
        self.half = torch.bfloat16 if known.bf16 else torch.float16 if "fp16" in known.flops else torch.float32
        self.sources: dict[str, str] = {}

    def profile(self) -> Hardware:
        """Everything, measured."""
        bandwidth, flops = self._bandwidth(), self._flops()
        reached = {
            f"{kind}.{name}": rate(name) / flops[name]
            for kind, rate in (("matmul", self._products), ("thin", self._thin), ("attention", self._attention))
            for name in flops
        }
        reached |= {
            "elementwise": self._elementwise() / bandwidth,
            "curved": self._curved() / bandwidth,
            "random": self._random() / bandwidth,
            "dequantize": self._dequantize() / bandwidth,
            "optimizer": self._optimizer() / bandwidth,
            "requantize": self._requantize() / bandwidth,
        }
        kept = {name: text for name, text in self.known.sources.items() if not name.startswith(("flops", "bandwidth"))}
        return replace(
            self.known,
            bandwidth=bandwidth,
            flops=flops,
            reached=reached,
            call_seconds=self._call(),
            sources=kept | self.sources,
        )

    def _bandwidth(self) -> float:
        source = torch.ones((1 << 28) // 4, device=self.device)
        target = torch.empty_like(source)
        return self._rate("bandwidth", lambda: target.copy_(source), 2 * (1 << 28), "copying 256 MiB, read and written")

    def _flops(self) -> dict[str, float]:
        """FLOP/s of each native dtype at its best shape, from tensors that are at hand."""
        large = 4096 if self.device == "cuda" else 2048
        shapes = [(TOKENS, WIDTH, WIDTH), (TOKENS, WIDTH, INNER), (TOKENS, INNER, WIDTH), (large, large, large)]
        what = f"the fastest of products of {', '.join('x'.join(map(str, shape)) for shape in shapes)}"
        found = {}
        for name, dtype in DTYPES.items():
            if name in self.known.flops:
                products = [(shape, _product(*shape, dtype, self.device)) for shape in shapes]
                found[name] = max(2 * math.prod(shape) / self._seconds(run) for shape, run in products)
                self._say(f"flops.{name}", what, dtype)
        return found

    def _products(self, name: str) -> float:
        """Products of a training step, for few tokens and for many."""
        layers = [
            _product(tokens, inner, columns, DTYPES[name], self.device)
            for tokens in FEW_AND_MANY
            for inner, columns in ((WIDTH, WIDTH), (WIDTH, INNER), (INNER, WIDTH))
            for _ in range(LAYERS // 4)
        ]
        what = f"products of {_either} tokens, {WIDTH} and {INNER} wide"
        return self._computed(f"matmul.{name}", lambda: [layer() for layer in layers], what)

    def _thin(self, name: str) -> float:
        """An adapter's products and their gradients, for few tokens and for many."""

        def inputs(tokens: int) -> tuple[Tensor, ...]:
            return tuple(self._random_tensor(name, *shape) for shape in ((tokens, WIDTH), (RANK, WIDTH), (WIDTH, RANK)))

        def adapter(x: Tensor, down: Tensor, up: Tensor) -> Tensor:
            return F.linear(F.linear(x, down), up)

        layers = [inputs(tokens) for tokens in FEW_AND_MANY for _ in range(LAYERS)]
        what = f"products of rank {RANK} and their gradients, of {_either} tokens"
        return self._computed(f"thin.{name}", lambda: _forward_and_backward(adapter, layers), what)

    def _attention(self, name: str) -> float:
        layers = [tuple(self._random_tensor(name, *ATTENTION) for _ in range(3)) for _ in range(LAYERS)]
        what = f"attention of {ATTENTION[2]} tokens and heads {ATTENTION[3]} wide, with its gradients"
        attend = F.scaled_dot_product_attention
        return self._computed(f"attention.{name}", lambda: _forward_and_backward(attend, layers), what)

    def _computed(self, name: str, run: Callable[[], Any], what: str) -> float:
        """FLOP/s."""
        work = sum(each.flops for each in _counted(run).work().values())
        self._say(f"reached.{name}", what, DTYPES[name.partition(".")[2]])
        return work / self._seconds(run)

    def _random_tensor(self, name: str, *shape: int) -> Tensor:
        return torch.randn(shape, device=self.device).to(DTYPES[name]).requires_grad_()

    def _elementwise(self) -> float:
        """The operators between the products of a transformer layer, as work.Tally counts their bytes."""
        pairs = [
            tuple(torch.randn(TOKENS, WIDTH, dtype=self.half, device=self.device) for _ in range(2))
            for _ in range(LAYERS)
        ]

        def layer(x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
            z = x.float()
            return (x + y) * y, z, (z * torch.rsqrt(z.pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype)

        what = f"sums, products, RMS norms and casts of ({TOKENS}, {WIDTH})"
        return self._moved("elementwise", lambda: [layer(*pair) for pair in pairs], what)

    def _curved(self) -> float:
        scores = [torch.randn(4 * 12, 256, 256, dtype=self.half, device=self.device) for _ in range(LAYERS // 4)]
        layers = [
            (torch.randn(TOKENS, INNER, dtype=self.half, device=self.device, requires_grad=True),)
            for _ in range(LAYERS // 4)
        ]

        def passes() -> None:
            kept = [each.softmax(-1) for each in scores]
            _forward_and_backward(lambda x: F.gelu(F.layer_norm(x, (INNER,))), layers)
            del kept

        return self._moved("curved", passes, "softmax, and GELU and layer norm with their gradients")

    def _random(self) -> float:
        """A number costs the same in any dtype, so all of them together."""
        masks = [torch.empty(TOKENS, INNER, dtype=dtype, device=self.device) for dtype in (self.half, torch.float32)]
        what = f"dropout masks of ({TOKENS}, {INNER}), in {self.half} and torch.float32"
        return self._moved("random", lambda: [mask.bernoulli_(0.1) for mask in masks], what)

    def _moved(self, kind: str, run: Callable[[], Any], what: str) -> float:
        return self._rate(f"reached.{kind}", run, _counted(run).work()[kind].bytes, what)

    def _dequantize(self) -> float:
        weights = [torch.randn(INNER, WIDTH, dtype=self.half) for _ in range(LAYERS)]
        stored = [NF4Linear(weight, None).to(self.device) for weight in weights]
        moved = sum(
            packed.packed.numel() + weight.numel() * weight.element_size()
            for packed, weight in zip(stored, weights, strict=True)
        )
        what = f"NF4 of ({INNER}, {WIDTH})"
        return self._rate("reached.dequantize", lambda: [each.dequantize(self.half) for each in stored], moved, what)

    def _optimizer(self) -> float:
        parameter = torch.nn.Parameter(torch.randn(4 << 20, device=self.device))
        parameter.grad = torch.randn_like(parameter)
        adam = torch.optim.AdamW([parameter], fused=True)
        moved = 7 * 4 * parameter.numel()  # four tensors are read and three written
        return self._rate("reached.optimizer", lambda: adam.step(), moved, "fused AdamW on 4 Mi fp32 parameters")

    def _requantize(self) -> float:
        parameter = torch.nn.Parameter(torch.randn(4 << 20, device=self.device))
        parameter.grad = torch.randn_like(parameter)
        adam = eight_bit.AdamW([{"params": [parameter]}], lr=1e-3)
        return self._moved("requantize", adam.step, "AdamW with states in 8 bits on 4 Mi fp32 parameters")

    def _call(self) -> float:
        """Seconds an operator costs whatever it does: in a model so narrow that nothing else matters."""
        from transformers import LlamaConfig, LlamaModel

        narrow = LlamaConfig(
            vocab_size=16, hidden_size=16, intermediate_size=16, num_hidden_layers=CALLED_LAYERS, num_attention_heads=2
        )
        model = LlamaModel(narrow).to(self.device)
        ids = torch.ones(1, 4, dtype=torch.long, device=self.device)

        def step() -> None:
            model(ids, use_cache=False).last_hidden_state.sum().backward()

        step()  # from now on gradients are added to
        calls = sum(
            work.calls * (roofline.VIEW if kind == "view" else 1) for kind, work in _counted(step).work().items()
        )
        self._say("call_seconds", f"a Llama of {CALLED_LAYERS} layers 16 wide, forward and backward, by its operators")
        return self._seconds(step) / calls

    def _rate(self, name: str, run: Callable[[], Any], work: float, what: str) -> float:
        self._say(name, what)
        return work / self._seconds(run)

    def _say(self, name: str, what: str, dtype: torch.dtype | None = None) -> None:
        count = torch.get_num_threads()
        threads = "" if self.device != "cpu" else f", {count} threads" if count > 1 else ", processor seconds, 1 thread"
        of = "" if dtype is None else f", {dtype}"
        self.sources[name] = (
            f"measured by tools/probe.py: {what}; best of {ROUNDS}; torch {torch.__version__}{threads}{of}"
        )

    def _seconds(self, run: Callable[[], Any]) -> float:
        """Best time of one call."""
        run()
        count = 1
        while (took := self._timed(run, count)) < LEAST_SECONDS:
            count = max(2 * count, math.ceil(count * LEAST_SECONDS / max(took, 1e-6)))
        return min(self._timed(run, count) for _ in range(ROUNDS)) / count

    def _timed(self, run: Callable[[], Any], count: int) -> float:
        clock = time.process_time if self.device == "cpu" and torch.get_num_threads() == 1 else time.perf_counter
        self._wait()
        started = clock()
        for _ in range(count):
            run()
        self._wait()
        return clock() - started

    def _wait(self) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()


def _product(rows: int, inner: int, columns: int, dtype: torch.dtype, device: str) -> Callable[[], Tensor]:
    left = torch.randn(rows, inner, device=device).to(dtype)
    right = torch.randn(columns, inner, device=device).to(dtype)
    return lambda: F.linear(left, right)


def _forward_and_backward(layer: Callable[..., Tensor], inputs: Sequence[tuple[Tensor, ...]]) -> None:
    """All layers, what they make being kept, and back through them; a layer's result is shaped as its first input."""
    made = [layer(*each) for each in inputs]
    for result, each in zip(reversed(made), reversed(inputs), strict=True):
        torch.autograd.grad(result, each, each[0].detach())


def _counted(run: Callable[[], Any]) -> Tally:
    tally = Tally()

    class Count(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = func(*args, **(kwargs or {}))
            tally.add(func, args, kwargs or {}, result)
            return result

    with Count():
        run()
    return tally


def as_toml(device: Hardware) -> str:
    """A profile that ``hardware.load`` reads back as ``device``."""

    def table(values: Mapping[str, float]) -> str:
        return "{ " + ", ".join(f"{name} = {value:.4g}" for name, value in values.items()) + " }"

    def texts(values: tuple[str, ...]) -> str:
        return "[" + ", ".join(_text(value) for value in values) + "]"

    lines = [
        f"title = {_text(device.title)}",
        f'kind = "{device.kind}"',
        *([f'capability = "{".".join(map(str, device.capability))}"'] if device.capability else []),
        *([f"devices = {texts(device.devices)}"] if device.devices else []),
        f"memory_bytes = {device.memory_bytes}",
        f"reserved_bytes = {device.reserved_bytes}",
        f"bandwidth = {device.bandwidth:.4g}",
        f"flops = {table(device.flops)}",
        f"reached = {table(device.reached)}",
        *([f"call_seconds = {device.call_seconds:.3g}"] if device.call_seconds else []),
        *([f"interconnect = {device.interconnect:.4g}"] if device.interconnect else []),
        *([f"cores = {device.cores}"] if device.cores else []),
        *([f"instructions = {texts(device.instructions)}"] if device.instructions else []),
        *([f"watts = {device.watts:.4g}"] if device.watts else []),
        f"providers = {texts(device.providers)}",
        "",
    ]
    if beside := device.processor:
        lines += [
            "[processor]",
            f"reserved_bytes = {beside.reserved_bytes}",
            f"flops = {table(beside.flops)}",
            *([f"instructions = {texts(beside.instructions)}"] if beside.instructions else []),
            "",
        ]
    lines += [
        "[sources]",
        *(f"{name} = {_text(source)}" for name, source in device.sources.items()),
    ]
    return "\n".join(lines) + "\n"


def _text(value: str) -> str:
    escaped = value.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("out", type=Path, help="the profile to write, NAME.toml")
    given = parser.parse_args(argv)
    if given.out.suffix != ".toml":
        parser.error("the profile's name must end in .toml")
    known = hardware.detect()
    with heap.ample():  # as training has it: where memory is taken anew, its pages cost more than the operators
        found = Probe(known.kind, known).profile()
    write_text(given.out, as_toml(found))
    found = hardware.load(str(given.out))  # what was written is what edgepeft reads
    rates = ", ".join(f"{name} {rate / 1e9:.0f} GFLOP/s" for name, rate in found.flops.items())
    print(f"{given.out}: {found.bandwidth / 1e9:.1f} GB/s, {rates}")


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except EdgePeftError as error:
        print(error, file=sys.stderr)
        sys.exit(error.exit_code)
