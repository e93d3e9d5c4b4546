"""The survey's own harness (AdapterHub's `adapters`, HF peft, its script), counted and timed for ``survey_time.py``.

Runs in the environment that ``survey_harness.sh`` makes, which has the libraries of December 2023 and the authors'
fork of `adapters`; of edgepeft it needs only what counts operators. Writes ``survey_harness.json``:

- ``work``: what one microbatch (forward, backward) and one update compute and move, on the meta device at the survey's
  sizes, by class of operator: [calls, FLOPs, bytes]. Depths 1 and 2 are traced, and all of it is affine in depth.
- ``host``: processor seconds in which one thread issues each of the three, least of all repetitions, measured on a T5
  of full depth that is too narrow for arithmetic to matter (and whose prefixes are short, for the same reason). An
  update is timed without its list kernels: on a GPU each is a few launches, on a CPU one loop a tensor.

Gradients are zeroed but kept, as accelerate's ``zero_grad`` did, so that backward adds to them.

Usage: ``python benchmarks/survey_harness.py ROUNDS`` (``survey_harness.sh`` does it).
"""

from __future__ import annotations

import json
import multiprocessing
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import adapters
import adapters.utils
import peft
import torch
import transformers
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import T5Config, T5ForConditionalGeneration

from edgepeft import cuda_semantics, roofline
from edgepeft.cuda_device import Device
from edgepeft.roofline import Work
from edgepeft.work import Tally

OUT = Path(__file__).with_name("survey_harness.json")
SIZES = {
    "t5-large": {"d_model": 1024, "d_kv": 64, "d_ff": 4096, "num_heads": 16},
    "t5-3b": {"d_model": 1024, "d_kv": 128, "d_ff": 16384, "num_heads": 32},
}
NARROW = {"vocab_size": 128, "d_model": 128, "d_kv": 8, "d_ff": 256, "num_heads": 2}
LAYERS, DEPTHS = 24, (1, 2)
STEPS, WARM_UP = 14, 3

# Microbatch (table 3), padded source and target, as in survey_time.SETTINGS, which says what is certain of them.
SETTINGS = {
    "t5-large": ((32, 200, 8), (32, 56, 8), (16, 320, 8), (4, 512, 128)),
    "t5-3b": ((4, 128, 8), (4, 48, 8), (2, 192, 8), (1, 512, 128)),
}

# The names that the authors' script takes; what it makes of them is in `configured` and `HF_PEFT`.
ROWS = {
    "full": "full_tuning",
    "houlsby": "houlsby",
    "pfeiffer": "pfeiffer",
    "parallel": "scaled_parallel",
    "ia3": "ia3",
    "prefix": "prefix_tuning",
    "prompt": "prefix_tuning_flat",
    "ln": "ln_tuning",
    "lora_qv": "hf_lora",
    "lora_all": "hf_lora_all",
    "krona": "hf_krona",
    "compacter": "compacter",
    "compacter_pp": "compacter++",
    "mam": "mam",
    "unipelt": "unipelt",
}
HF_PEFT: dict[str, tuple[Callable[..., Any], dict[str, Any]]] = {
    "hf_lora": (peft.LoraConfig, {"r": 8, "lora_alpha": 8, "target_modules": ["q", "v"]}),
    "hf_lora_all": (
        peft.LoraConfig,
        {"r": 8, "lora_alpha": 8, "target_modules": ["k", "q", "v", "o", "wi", "wo"]},
    ),
    "hf_krona": (peft.LoKrConfig, {"target_modules": ["q", "v"]}),
}


def configured(name: str, kv_size: int, narrow: bool) -> str:
    """The configuration string of `adapters` that the authors' script makes from a name, for T5."""
    short = ",prefix_length=2,bottleneck_size=8" if narrow else ""
    if name.startswith("prefix_tuning"):
        return f"{name}[kv_size={kv_size}{short}]"
    if name == "mam":
        size = short or ",bottleneck_size=800"
        return f"prefix_tuning[kv_size={kv_size}{size}]|par_bn"
    if name == "unipelt":
        size = short or ",prefix_length=10"
        prefix = f"prefix_tuning[use_gating=True,kv_size={kv_size}{size}]"
        return f"lora[r=8,use_gating=True]|{prefix}|seq_bn[reduction_factor=16,use_gating=True]"
    return name


def built(row: str, config: T5Config, narrow: bool) -> Any:
    """A model as the authors' ``get_model`` and ``get_model_hf`` prepare it, in training mode."""
    name = ROWS[row]
    model: Any = T5ForConditionalGeneration(config)
    if name in HF_PEFT:
        kind, options = HF_PEFT[name]
        if narrow and name == "hf_krona":  # a rank at which the narrow factors are decomposed like the wide ones
            options = {**options, "r": 1}
        model = peft.get_peft_model(model, kind(task_type=peft.TaskType.SEQ_2_SEQ_LM, **options))
    elif name == "ln_tuning":
        for path, parameter in model.named_parameters():
            parameter.requires_grad = "layer_norm" in path
    elif name != "full_tuning":
        adapters.init(model)
        for parameter in model.parameters():
            parameter.requires_grad = False
        model.add_adapter("adapter", config=configured(name, config.d_kv, narrow), set_active=True)
        model.train_adapter("adapter")
        for path, module in model.named_modules():
            if "adapter" in path:
                for parameter in module.parameters():
                    parameter.requires_grad = True
    return model.train()


def optimizer(model: Any) -> torch.optim.Optimizer:
    """The authors' AdamW, on lists of tensors as it is on a GPU by default."""
    trained = [(path, parameter) for path, parameter in model.named_parameters() if parameter.requires_grad]
    still = [parameter for path, parameter in trained if "bias" in path or "layer_norm" in path]
    decayed = [parameter for path, parameter in trained if not ("bias" in path or "layer_norm" in path)]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": still, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=1e-3, foreach=True)


def batch(rows: int, source: int, target: int, device: str) -> dict[str, torch.Tensor]:
    """What the authors' collator makes."""
    tokens = torch.ones(rows, source, dtype=torch.long, device=device)
    labels = torch.ones(rows, target, dtype=torch.long, device=device)
    return {
        "input_ids": tokens,
        "attention_mask": torch.ones_like(tokens),
        "labels": labels,
        "decoder_input_ids": labels,
    }


class _Counting(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.tally = Tally()

    def take(self) -> dict[str, Work]:
        """What was counted since the last time."""
        work, self.tally = self.tally.work(), Tally()
        return work

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.tally.add(func, args, kwargs or {}, result)
        return result


def traced(model: str, row: str, setting: tuple[int, int, int], layers: int) -> tuple[int, list[dict[str, Work]]]:
    """Trained parameters, and the work of forward, backward and update of a model of so many layers."""
    config = T5Config(vocab_size=32128, num_layers=layers, **SIZES[model])
    phases: list[dict[str, Work]] = []
    with cuda_semantics.emulated(Device()):
        with torch.device("meta"):
            net = built(row, config, narrow=False)
        net = net.to(device="meta", dtype=torch.bfloat16)
        update = optimizer(net)
        inputs = batch(*setting, device="meta")
        for counts in (False, True):  # the second time there are states, and gradients to add to
            with _Counting() if counts else nullcontext() as counting:
                loss = net(**inputs).loss
                if counting:
                    phases.append(counting.take())
                (loss / 8).backward()
                if counting:
                    phases.append(counting.take())
                update.step()
                if counting:
                    phases.append(counting.take())
            update.zero_grad(set_to_none=False)
    return sum(parameter.numel() for parameter in net.parameters() if parameter.requires_grad), phases


def timed(row: str) -> list[list[float]]:
    """Processor seconds of forward, backward and update of every repetition, on a narrow T5 of full depth."""
    torch.set_num_threads(1)
    net = built(row, T5Config(num_layers=LAYERS, **NARROW), narrow=True)
    inputs = batch(1, 8, 8, device="cpu")
    found = []
    with cuda_semantics.emulated(Device()):
        update = optimizer(net)
        for step in range(STEPS):
            start = time.process_time()
            loss = net(**inputs).loss
            forward = time.process_time()
            (loss / 8).backward()
            backward = time.process_time()
            with _without_list_kernels() if step else nullcontext():  # the first makes the states
                began = time.process_time()
                update.step()
                ended = time.process_time()
            update.zero_grad(set_to_none=False)
            if step >= WARM_UP:
                found.append([forward - start, backward - forward, ended - began])
    return found


@contextmanager
def _without_list_kernels() -> Iterator[None]:
    """Operators on lists return what they were given, but for the counts of steps, which a CPU keeps for a GPU too."""

    def quick(real: Any) -> Any:
        return lambda first, *args, **kwargs: real(first, *args, **kwargs) if first[0].dim() == 0 else list(first)

    real = {name: getattr(torch, name) for name in dir(torch) if name.startswith("_foreach_")}
    try:
        for name, function in real.items():
            setattr(torch, name, quick(function))
        yield
    finally:
        for name, function in real.items():
            setattr(torch, name, function)


def counted() -> list[dict[str, Any]]:
    """One entry for each model, row and setting, at full depth."""
    found = []
    for model, settings in SETTINGS.items():
        for row in ROWS:
            for setting in settings:
                (few, low), (more, high) = (traced(model, row, setting, depth) for depth in DEPTHS)
                place = (LAYERS - DEPTHS[0]) / (DEPTHS[1] - DEPTHS[0])
                phases = [roofline.along(one, other, place) for one, other in zip(low, high, strict=True)]
                trained = round(few + place * (more - few))
                found.append({"model": model, "row": row, "setting": setting, "trained": trained, "work": phases})
    return found


def measured(rounds: int) -> dict[str, list[float]]:
    """Row → least processor seconds of forward, backward and update; every round takes the rows in turn."""
    best: dict[str, list[float]] = {}
    with multiprocessing.get_context("fork").Pool(1, maxtasksperchild=1) as apart:  # a process for each
        for row in [*ROWS] * rounds:
            least = [min(times) for times in zip(*apart.apply(timed, (row,)), strict=True)]
            best[row] = [min(pair) for pair in zip(best.get(row, least), least, strict=True)]
    return best


def _lines(found: dict[str, Any]) -> str:
    """JSON with an entry a line."""
    least = {row: [round(seconds, 5) for seconds in times] for row, times in found["host"].items()}
    host = ",\n".join(f"{json.dumps(row)}: {json.dumps(times)}" for row, times in least.items())
    work = ",\n".join(json.dumps(entry, separators=(",", ":")) for entry in found["work"])
    versions = json.dumps(found["versions"])
    return f'{{"versions": {versions},\n"host": {{\n{host}\n}},\n"work": [\n{work}\n]}}\n'


if __name__ == "__main__":
    # The library asks the hub for an index of configurations even where it needs none of them.
    with tempfile.NamedTemporaryFile("w", suffix=".json") as index:
        index.write("{}")
        index.flush()
        adapters.utils.download_cached = lambda *args, **kwargs: index.name
        versions = {each.__name__: each.__version__ for each in (torch, transformers, peft)}
        found = {"versions": versions, "host": measured(int(sys.argv[1])), "work": counted()}
    OUT.write_text(_lines(found), encoding="utf-8")
