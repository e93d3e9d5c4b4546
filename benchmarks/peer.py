"""The peer's side: transformers' Trainer, HF peft and bitsandbytes, used as their documentation shows."""

from __future__ import annotations

import tempfile
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, Trainer, TrainerCallback, TrainingArguments

import job
import measure


class _Watch(TrainerCallback):
    """Hands the Trainer's step boundaries to the measure: forward, backward, clipping, update, zeroing of gradients."""

    def __init__(self, watch: measure.Measure) -> None:
        self.watch = watch

    def on_step_begin(self, args: Any, state: Any, control: Any, **known: Any) -> None:
        self.watch.begin(known["model"], known["optimizer"])

    def on_step_end(self, args: Any, state: Any, control: Any, **known: Any) -> None:
        self.watch.end(known["optimizer"])


def _model(precision: str) -> Any:
    dtype = torch.float32 if precision.endswith("fp32") else torch.bfloat16
    nf4 = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )
    base = AutoModelForCausalLM.from_pretrained(
        job.MODEL, dtype=dtype, quantization_config=nf4 if precision.startswith("nf4") else None
    )
    lora = LoraConfig(task_type="CAUSAL_LM", r=job.RANK, lora_alpha=job.ALPHA, target_modules="all-linear")
    return get_peft_model(base, lora)


def _examples(steps: int) -> list[dict[str, list[int]]]:
    # The first token has no token before it to be predicted from; marked, the Trainer averages over the same targets.
    return [
        {"input_ids": row, "attention_mask": [1] * job.TOKENS, "labels": [-100, *row[1:]]} for row in job.rows(steps)
    ]


def main() -> None:
    given = measure.arguments()
    if given.method != "lora":
        raise SystemExit(f"HF peft has no {given.method}.")
    torch.manual_seed(job.SEED)
    model = _model(given.precision)
    watch = measure.chosen(given.trace)
    with tempfile.TemporaryDirectory() as folder:
        settings = TrainingArguments(
            output_dir=folder,
            max_steps=given.steps,
            per_device_train_batch_size=job.MICROBATCH,
            learning_rate=job.LEARNING_RATE["lora"],
            lr_scheduler_type="constant",
            max_grad_norm=job.CLIP_NORM,
            train_sampling_strategy="sequential",
            logging_steps=1,
            save_strategy="no",
            disable_tqdm=True,
            use_cpu=True,
            seed=job.SEED,
        )
        trainer = Trainer(model, settings, train_dataset=_examples(given.steps), callbacks=[_Watch(watch)])
        trainer.train()
    losses = [float(entry["loss"]) for entry in trainer.state.log_history if "loss" in entry]
    measure.report(watch, losses, model)


if __name__ == "__main__":
    main()
