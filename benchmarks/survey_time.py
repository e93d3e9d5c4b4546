"""The survey's relative training throughput (arXiv 2303.15647v2, table 5), predicted twice.

- *edgepeft's step*: edgepeft's methods on edgepeft's T5, traced and timed by the roofline as a plan is.
- *their harness*: the modules that the survey ran (``survey_harness.py``), counted and timed: ``survey_clock.py``.
"""

from __future__ import annotations

import csv
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import AutoConfig

import survey_clock
from edgepeft import catalog, hardware, precision, roofline
from edgepeft.backbone import skeleton
from edgepeft.catalog.fields import at_depth
from edgepeft.hardware import Hardware
from edgepeft.methods import base
from edgepeft.roofline import Work
from edgepeft.trace import fake_device

TABLE = Path(__file__).with_name("survey_efficiency.csv")
MODELS = ("t5-large", "t5-3b")
LAYERS, DEPTHS = 24, (2, 4)
DEVICE = "a100-40gb"  # section 11 of the survey, for all of these rows
QUERY_VALUE = {"targets": ("query", "value", "cross_query", "cross_value")}

# The survey's rows as edgepeft's methods. Its prompt tuning is AdapterHub's flat prefix tuning: the count of trained
# parameters, 30 positions x 2 x 72 attentions x 1024, and the authors' notebook 18_dataset_average_table say so.
METHODS: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "full": ("full", {}),
    "houlsby": ("houlsby", {}),
    "pfeiffer": ("pfeiffer", {}),
    "parallel": ("parallel", {}),
    "ia3": ("ia3", {}),
    "prefix": ("prefix_tuning", {}),
    "prompt": ("prefix_tuning", {"bottleneck": 0}),
    "ln": ("ln_tuning", {}),
    "lora_qv": ("lora", QUERY_VALUE),
    "lora_all": ("lora", {}),
    "krona": ("krona", {"rank": 8, "targets": QUERY_VALUE["targets"]}),
    "compacter": ("compacter", {}),
    "compacter_pp": ("compacter_pp", {}),
    "mam": ("mam", {}),
    "unipelt": ("unipelt", {}),
}


class Setting(NamedTuple):
    """One data set of the survey: microbatch (table 3), padded source length, target length.

    The source lengths are guesses at what the longest of a microbatch is padded to; only CNN/DailyMail's is certain.
    """

    microbatch: int
    source: int
    target: int


SETTINGS: Mapping[str, tuple[Setting, ...]] = {
    "t5-large": (Setting(32, 200, 8), Setting(32, 56, 8), Setting(16, 320, 8), Setting(4, 512, 128)),
    "t5-3b": (Setting(4, 128, 8), Setting(4, 48, 8), Setting(2, 192, 8), Setting(1, 512, 128)),
}


def measured(model: str) -> dict[str, float]:
    """Table 5's training throughput of every method, full tuning being 100."""
    with TABLE.open(encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if row["model"] == model]
    return {row["method"]: float(row["train_throughput_rel"]) for row in rows if row["train_throughput_rel"]}


def predicted(model: str, row: str, device: Hardware) -> float:
    """Source tokens a second, averaged over the data sets as ``survey_clock.predicted`` says."""
    method, options = METHODS[row]
    rates = []
    for setting in SETTINGS[model]:
        low, high = (traced(model, method, options, setting, depth) for depth in DEPTHS)
        work = roofline.along(low, high, (LAYERS - DEPTHS[0]) / (DEPTHS[1] - DEPTHS[0]))
        rates.append(setting.source / roofline.seconds(work, device))
    return statistics.fmean(rates)


def traced(model: str, method: str, options: Mapping[str, Any], setting: Setting, depth: int) -> dict[str, Work]:
    """One microbatch and an update, as the survey ran them: all bf16, eager attention, AdamW on lists of tensors."""
    fields = at_depth(catalog.entry(model) or {}, depth)
    with precision.emulating(bf16=True), fake_device(cuda=True) as tracker:
        configuration = AutoConfig.for_model(fields.pop("model_type"), **fields)
        configuration._attn_implementation = "eager"
        backbone = skeleton(configuration, task="seq2seq", at="bf16")
        net: Any = backbone.model
        base.apply(base.create(method, options), backbone)
        net.train()
        trained = [parameter for parameter in net.parameters() if parameter.requires_grad]
        for parameter in trained:
            parameter.data = parameter.data.to(torch.bfloat16)
        optimizer = torch.optim.AdamW(trained, foreach=True)
        source = torch.ones(setting.microbatch, setting.source, dtype=torch.long)
        target = torch.ones(setting.microbatch, setting.target, dtype=torch.long)
        for phase in ("first", "steady"):
            with tracker.phase(phase):
                net(input_ids=source, attention_mask=torch.ones_like(source), labels=target).loss.backward()
                optimizer.step()
                optimizer.zero_grad()
        return tracker.work()["steady"]


def spearman(one: Sequence[float], other: Sequence[float]) -> float:
    """Rank correlation; ties share their mean rank."""
    return statistics.correlation(_ranks(one), _ranks(other))


def _ranks(values: Sequence[float]) -> list[float]:
    ordered = sorted(values)
    return [ordered.index(value) + (ordered.count(value) - 1) / 2 for value in values]


class Row(NamedTuple):
    """Training throughput of a method, full tuning being 100."""

    measured: float
    step: float
    operators: float
    clock: float


def compare() -> dict[str, dict[str, Row]]:
    """Model → row → measured and predicted."""
    device = hardware.load(DEVICE)
    theirs = survey_clock.predicted(device)
    found: dict[str, dict[str, Row]] = {}
    for model in MODELS:
        table = measured(model)
        rates = {row: (predicted(model, row, device), *theirs[model][row]) for row in table}
        full = rates["full"]
        shares = {row: [100 * a / b for a, b in zip(each, full, strict=True)] for row, each in rates.items()}
        found[model] = {row: Row(table[row], *shares[row]) for row in table}
    return found


def ranks(rows: Mapping[str, Row]) -> Row:
    """Rank correlation of every column with what was measured."""
    columns = list(zip(*rows.values(), strict=True))
    return Row(*(spearman(columns[0], column) for column in columns))


if __name__ == "__main__":
    for model, rows in compare().items():
        for row, each in sorted(rows.items(), key=lambda item: -item[1].measured):
            print(f"{model:9} {row:13}" + "".join(f"{value:8.1f}" for value in each))
        print(f"{model:9} {'Spearman':13}" + "".join(f"{value:8.3f}" for value in ranks(rows)))
