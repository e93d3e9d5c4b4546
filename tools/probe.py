"""Measure what PyTorch reaches on this machine, and write a hardware profile of it.

Usage: ``python tools/probe.py my-machine.toml``, then ``edgepeft plan --gpu my-machine.toml``. It takes a minute.
Every number is the best of many repeats, because whatever else runs can only make one slower. On one thread
(``OMP_NUM_THREADS=1``) a CPU's numbers are processor seconds, which other processes' turns do not lengthen.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from edgepeft import hardware
from edgepeft.errors import EdgePeftError
from edgepeft.files import write_text
from edgepeft.hardware import Hardware
from edgepeft.placements import eight_bit
from edgepeft.precision import NF4Linear
from edgepeft.work import Tally

TOKENS, WIDTH, INNER, RANK = 1024, 768, 3072, 8  # of a training step of BERT-base's size
ATTENTION = (4, 12, 128, 64)  # batch, heads, tokens, width of a head
ROUNDS, LEAST_SECONDS = 7, 0.05
CALLS = 200
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
        bandwidth = self._bandwidth()
        flops, matmul = self._products()
        peak = flops[next(name for name, dtype in DTYPES.items() if dtype is self.half)]
        reached = {
            "matmul": matmul,
            "thin": self._thin() / peak,
            "attention": self._attention() / peak,
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

    def _products(self) -> tuple[dict[str, float], float]:
        """FLOP/s of each native dtype at its best shape, and the share of it at the shapes of training."""
        flops, shares = {}, []
        for name, dtype in DTYPES.items():
            if name not in self.known.flops:
                continue
            large = 4096 if self.device == "cuda" else 2048
            shapes = [(TOKENS, WIDTH, WIDTH), (TOKENS, WIDTH, INNER), (TOKENS, INNER, WIDTH), (large, large, large)]
            seconds = [self._seconds(_product(*shape, dtype, self.device)) for shape in shapes]
            work = [2 * math.prod(shape) for shape in shapes]
            flops[name] = max(w / s for w, s in zip(work, seconds, strict=True))
            shares.append(sum(work[:3]) / sum(seconds[:3]) / flops[name])
            self._say(f"flops.{name}", f"the fastest of products of {', '.join('x'.join(map(str, s)) for s in shapes)}")
        self._say("reached.matmul", "products of the shapes of a training step, over the fastest; mean of the dtypes")
        return flops, sum(shares) / len(shares)

    def _thin(self) -> float:
        """An adapter's products and their gradients, for few tokens and for many."""
        down = torch.randn(RANK, WIDTH, device=self.device).to(self.half).requires_grad_()
        up = torch.randn(WIDTH, RANK, device=self.device).to(self.half).requires_grad_()
        inputs = [torch.randn(tokens, WIDTH, device=self.device).to(self.half) for tokens in (TOKENS // 4, TOKENS)]
        inputs = [x.requires_grad_() for x in inputs]

        def adapter() -> None:
            for x in inputs:
                F.linear(F.linear(x, down), up).backward(x.detach())

        work = sum(each.flops for each in _counted(adapter).work().values())
        what = f"products of rank {RANK} and their gradients, of {TOKENS // 4} and {TOKENS} tokens"
        return self._rate("reached.thin", adapter, work, what)

    def _attention(self) -> float:
        query, key, value = (
            torch.randn(ATTENTION, dtype=self.half, device=self.device, requires_grad=True) for _ in range(3)
        )

        def layer() -> None:
            F.scaled_dot_product_attention(query, key, value).backward(value.detach())

        work = sum(each.flops for each in _counted(layer).work().values())
        return self._rate("reached.attention", layer, work, "attention with its gradients")

    def _elementwise(self) -> float:
        """The operators between the products of a transformer layer, as work.Tally counts their bytes."""
        x, y = (torch.randn(TOKENS, WIDTH, dtype=self.half, device=self.device) for _ in range(2))

        def layer() -> None:
            _ = (x + y) * y
            z = x.float()
            _ = (z * torch.rsqrt(z.pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype)

        return self._moved("elementwise", layer, "sums, products, RMS norms and casts of (1024, 768)")

    def _curved(self) -> float:
        scores = torch.randn(4 * 12, 256, 256, dtype=self.half, device=self.device)
        x = torch.randn(TOKENS, INNER, dtype=self.half, device=self.device, requires_grad=True)

        def layer() -> None:
            _ = scores.softmax(-1)
            F.gelu(F.layer_norm(x, (INNER,))).backward(x.detach())

        return self._moved("curved", layer, "softmax, and GELU and layer norm with their gradients")

    def _random(self) -> float:
        x = torch.empty(TOKENS, INNER, dtype=self.half, device=self.device)
        return self._moved("random", lambda: x.bernoulli_(0.1), "dropout masks of (1024, 3072)")

    def _moved(self, kind: str, run: Callable[[], Any], what: str) -> float:
        return self._rate(f"reached.{kind}", run, _counted(run).work()[kind].bytes, what)

    def _dequantize(self) -> float:
        weight = torch.randn(INNER, WIDTH, dtype=self.half)
        stored = NF4Linear(weight, None).to(self.device)
        moved = stored.packed.numel() + weight.numel() * weight.element_size()
        return self._rate("reached.dequantize", lambda: stored.dequantize(self.half), moved, "NF4 of (3072, 768)")

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
        """Seconds an operator costs whatever it does: a chain of them on single numbers, forward and backward."""
        start = torch.ones(1, device=self.device, requires_grad=True)
        factor = torch.ones(1, device=self.device)

        def chain() -> None:
            x = start
            for _ in range(CALLS):
                x = x * factor
            x.backward()

        calls = sum(work.calls for kind, work in _counted(chain).work().items() if kind != "view")
        self._say("call_seconds", "products of single numbers, forward and backward")
        return self._seconds(chain) / calls

    def _rate(self, name: str, run: Callable[[], Any], work: float, what: str) -> float:
        self._say(name, what)
        return work / self._seconds(run)

    def _say(self, name: str, what: str) -> None:
        count = torch.get_num_threads()
        threads = "" if self.device != "cpu" else f", {count} threads" if count > 1 else ", processor seconds, 1 thread"
        self.sources[name] = (
            f"measured by tools/probe.py: {what}; best of {ROUNDS}; torch {torch.__version__}{threads}, "
            f"{self.half if name.startswith('reached') else ''}".rstrip(", ")
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

    def table(values: Any) -> str:
        return "{ " + ", ".join(f"{name} = {value:.4g}" for name, value in values.items()) + " }"

    def texts(values: tuple[str, ...]) -> str:
        return "[" + ", ".join(_text(value) for value in values) + "]"

    lines = [
        f"title = {_text(device.title)}",
        f'kind = "{device.kind}"',
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
    write_text(given.out, as_toml(Probe(known.kind, known).profile()))
    found = hardware.load(str(given.out))  # what was written is what edgepeft reads
    rates = ", ".join(f"{name} {rate / 1e9:.0f} GFLOP/s" for name, rate in found.flops.items())
    print(f"{given.out}: {found.bandwidth / 1e9:.1f} GB/s, {rates}")


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except EdgePeftError as error:
        print(error, file=sys.stderr)
        sys.exit(error.exit_code)
