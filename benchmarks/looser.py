"""Other people's GPU runs whose set-ups are told less completely (``looser.csv``), traced with harnesses of their own.

Usage: ``python benchmarks/looser.py`` prints the section; ``plan.py`` puts it into ``results/plan.md``.
"""

from __future__ import annotations

import csv
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import rows
from edgepeft import hardware as profiles
from edgepeft.candidate import TIGHT

GiB = 2**30
EXCLUDED = (
    (
        "image generation with FLUX.2 and Stable Diffusion (peft)",
        "diffusers, and models of a kind that edgepeft does not plan",
    ),
    (
        "torchtune",
        "packed rows attend by a compiled flex_attention and all but one are compiled, which a trace of single "
        "operators does not see; tutorials and the unpacked baseline hang on the lengths of Alpaca, and whether AdamW "
        "was fused is not told, which is 6 GiB for the 3B model",
    ),
    ("torchao, ViT-H", "torch.compile, which decides what is kept for backward"),
    ("torchao, Llama 2 7B", "torchtune again, at the longest example of Alpaca under a template that is not told"),
    ("fsdp_qlora, sharded runs", "two GPUs: what an all-gather holds ahead is not traced"),
    (
        "LLaMA-Factory, LoRA in 16 bits and Unsloth's columns",
        "microbatch or card missing in what is stored of the page; Unsloth's own kernels",
    ),
    ("Unsloth's requirements page, odyn, qlora", "minima and budgets instead of runs; ZeRO-2; DPO without its lengths"),
    ("xw-yao/peft_comparison", "evaluation only, lengths of the data sets not recorded"),
    (
        "LST",
        "which of GLUE's tasks its 17.6 GB are of is not told, and with it the length of sources and targets; full "
        "fine-tuning at 100 x 128 came out 14 % under in an earlier try",
    ),
    ("peft's README, DeepSpeed columns", "ZeRO-3 with offloading"),
    ("superseded MetaMathQA rows of experiments that are not in the table above", "not traced for want of time"),
)
UNDER = 0.03  # a row that is further under is explained
GROUPS = {  # what each group's set-up is taken from
    "litgpt": "lit-gpt, A100. Its own model code at the commit that the table names (LoRA) or that added the rows "
    "(adapters), the longest example first as its script puts it, its tokens as the table states them.",
    "litgpt-later": "The Llama 2 rows of the same table again, at the commit that added it (0cc02af). Between the two "
    "commits RMSNorm went to fp32 (6178c7cc), and LayerNorm models did not change: the rows above that are 3 to 5 % "
    "under were measured with it. Not in the summary.",
    "complaints": "peft's README, A100 80 GB. Batch, rank, fp32 and optimizer from the example scripts of that commit; "
    "64 tokens are those scripts' max_length for bloomz, and an assumption for T5 sources (tweets of 140 characters). "
    "GB are MiB / 1000, as their code prints them. That PyTorch 1.13 kept zeroed gradients was put in after a first "
    "trace of full fine-tuning came out 6 % under.",
    "fsdp_qlora": "fsdp_qlora, its unsharded runs: every GPU holds all. Dummy data of an exact length, the script's "
    "defaults; layers of today's transformers, the loss of that time.",
    "galore": 'GaLore\'s README: LLaMA 7B pre-trained on an RTX 4090, "bsz=16, 22.8G"; all else from its script. '
    "What the number counts is not told: held against reserved bytes. Under, as a monitor's figure would hold the "
    "context, and what cuSOLVER takes to decompose an 11008 x 4096 matrix is not counted.",
    "llama_factory": "LLaMA-Factory, QLoRA with FlashAttention 2. Whole GB of something that the page does not define, "
    "held against reserved bytes; a monitor's figure would hold the CUDA context too, half a GiB, and rounding is 8 % "
    "of 6 GB: short runs are under for that or for reasons not found. Batches are taken to be as long as the cut-off; "
    "the code's defaults of April 2024. Long runs are over, not explained (28.0 GiB are allocated at 32768).",
    "unsloth": "Unsloth's column for Hugging Face with FlashAttention 2: the longest context that a card takes. "
    "Measured is the card; a right prediction is a little under it, by the context and what cannot be filled. What "
    "never ran is traced at 512 tokens. Not in the summary.",
}
OLDER = {"oft/llama-3.2-3B-rank32": "peft#2575 of June 2025, after these runs, made OFT need less; later runs do"}
CARDS = {
    "A100-SXM4-40GB": "a100-40gb",
    "A100 40GB": "a100-40gb",
    "A100 80GB": "a100-80gb",
    "RTX 3090": "rtx-3090-24gb",
    "RTX 4090": "rtx-4090-24gb",
}


@dataclass(frozen=True)
class Row:
    """A run that was measured (``outcome`` "ran"), ran out of memory ("oom"), or just fitted its card ("limit")."""

    group: str
    harness: str
    model: str
    setup: dict[str, Any]
    gpu: str
    quantity: str
    measured_bytes: float | None
    outcome: str

    @property
    def label(self) -> str:
        own = {key: value for key, value in self.setup.items() if key not in ("style", "model")}
        return f"{self.model.rpartition('/')[2]} " + " ".join(f"{key}={value}" for key, value in own.items())


def read() -> list[Row]:
    """All rows of ``looser.csv``."""
    with (rows.FOLDER / "looser.csv").open(encoding="utf-8", newline="") as file:
        return [_row(fields) for fields in csv.DictReader(file)]


def section() -> str:
    """The looser set-ups as markdown."""
    found = read()
    answers = list(zip(found, rows.traced([(row.harness, row.setup, None) for row in found]), strict=True))
    scored = [(row, answer) for row, answer in answers if row.group != "litgpt-later" and "error" not in answer]
    ran = [(row, answer) for row, answer in scored if row.measured_bytes and row.outcome == "ran"]
    errors = [(row.group, answer[f"{row.quantity}_bytes"] / (row.measured_bytes or 1) - 1) for row, answer in ran]
    groups = {group: [error for other, error in errors if other == group] for group in GROUPS}
    failed = [f"- {row.label}: {answer['error']}" for row, answer in answers if "error" in answer]
    lines = [
        "\n### Looser set-ups\n",
        "| rows | n | median | 90 % within | worst | most under | target |",
        "| --- | --- | --- | --- | --- | --- | --- |",
        _summary("all that ran", [error for _, error in errors], "median 5 %"),
        *(_summary(group, own, "") for group, own in groups.items() if own),
        "\n" + _verdicts(scored),
        *(line for group in GROUPS for line in _table(group, answers)),
        *(["\nFailed:\n", *failed] if failed else []),
        "\nNot rebuilt, and why:\n",
        *(f"- {name}: {why}." for name, why in EXCLUDED),
    ]
    return "\n".join(lines) + "\n"


def superseded(predicted: Mapping[str, float | None]) -> str:
    """Older runs of peft's MetaMathQA experiments against the same traces, as markdown.

    Args:
        predicted: reserved bytes of each experiment, with the libraries of the present runs.
    """
    with (rows.FOLDER / "superseded.csv").open(encoding="utf-8", newline="") as file:
        found = [(each, predicted.get(each["experiment"])) for each in csv.DictReader(file)]
    errors = [(each, size / (float(each["reserved_gib"]) * GiB) - 1) for each, size in found if size is not None]
    lines = [
        f"\n**Superseded runs.** {len(errors)} older runs of these experiments on the same card, against the same "
        "traces (of transformers 5 and peft 0.20, so not what these runs had):\n",
        "| transformers | n | median | 90 % within | worst | most under |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for version in sorted({each["transformers"] for each, _ in errors}):
        own = [error for each, error in errors if each["transformers"] == version]
        sizes = sorted(map(abs, own))
        lines.append(
            f"| {version} | {len(own)} | {statistics.median(sizes):.2%} | {sizes[-(-len(sizes) * 9 // 10) - 1]:.2%} "
            f"| {sizes[-1]:.2%} | {min(own):+.2%} |"
        )
    beyond = [(each, error) for each, error in errors if error < -UNDER]
    lines += ["\nMore than 3 % under:\n"]
    for each, error in beyond:
        why = f"; {OLDER[each['experiment']]}" if each["experiment"] in OLDER else ""
        lines.append(
            f"- {each['experiment']}, transformers {each['transformers']}, peft {each['peft']}: {error:+.1%}{why}"
        )
    return "\n".join(lines) + "\n"


def _summary(name: str, errors: Sequence[float], target: str) -> str:
    sizes = sorted(map(abs, errors))
    return (
        f"| {name} | {len(sizes)} | {statistics.median(sizes):.2%} | {sizes[-(-len(sizes) * 9 // 10) - 1]:.2%} "
        f"| {sizes[-1]:.2%} | {min(errors):+.2%} | {target} |"
    )


def _table(group: str, answers: Sequence[tuple[Row, dict[str, Any]]]) -> Iterator[str]:
    yield f"\n{GROUPS[group]}\n"
    yield "| row | quantity | measured GiB | predicted GiB | error |"
    yield "| --- | --- | --- | --- | --- |"
    for row, answer in answers:
        if row.group == group and "error" not in answer:
            predicted = answer[f"{row.quantity}_bytes"]
            measured, error = "out of memory", _verdict(row, answer)
            if row.measured_bytes is not None:
                measured, error = f"{row.measured_bytes / GiB:.2f}", f"{predicted / row.measured_bytes - 1:+.2%}"
            yield f"| {row.label} | {row.quantity} | {measured} | {predicted / GiB:.2f} | {error} |"


def _verdicts(answers: Sequence[tuple[Row, dict[str, Any]]]) -> str:
    """How runs that ran out of memory, and such that did not, are judged as ``edgepeft plan`` would."""
    out = [_verdict(row, answer) for row, answer in answers if row.outcome == "oom" and "error" not in answer]
    ran = [_verdict(row, answer) for row, answer in answers if row.outcome == "ran" and "error" not in answer]
    count = ", ".join(f"{out.count(name)} {name}" for name in ("NO", "TIGHT", "FITS"))
    others = ", ".join(f"{ran.count(name)} {name}" for name in ("FITS", "TIGHT", "NO"))
    return f"Verdicts on {len(out)} runs that ran out of memory: {count}. On those that ran: {others}."


def _verdict(row: Row, answer: dict[str, Any]) -> str:
    if row.gpu in CARDS:
        available = profiles.load(CARDS[row.gpu]).available_bytes
    else:  # "8 GB"
        available = int(row.gpu.partition(" ")[0]) * GiB
    share = answer["reserved_bytes"] / available
    return "NO" if share > 1 else "TIGHT" if share > TIGHT else "FITS"


def _row(fields: dict[str, str]) -> Row:
    pairs = (part.split("=", 1) for part in fields["setup"].split())
    setup: dict[str, Any] = {key: int(value) if value.isdigit() else value for key, value in pairs}
    return Row(
        group=fields["group"],
        harness=fields["harness"],
        model=fields["model"],
        setup={**setup, "model": fields["model"]},
        gpu=fields["gpu"],
        quantity=fields["quantity"],
        measured_bytes=float(fields["gib"]) * GiB if fields["gib"] else None,
        outcome=fields["outcome"],
    )


if __name__ == "__main__":
    print(section())
