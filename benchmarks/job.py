"""The job both sides do: which model, tokens and LoRA. Nothing of edgepeft is imported for it."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
MODEL = ROOT / "models" / "smollm2-135m-instruct"
TEXT = ROOT / "data" / "sentiment" / "train.jsonl"
MICROBATCH, TOKENS = 4, 256
RANK, ALPHA = 8, 16
CLIP_NORM = 1.0
LEARNING_RATE = {"lora": 5e-4, "lst": 2e-3}
SEED = 0
WARM_UP = 1  # steps before the first timed one


@cache
def rows(steps: int) -> list[list[int]]:
    """Real text as rows of exactly ``TOKENS`` token ids, ``MICROBATCH`` rows a step, in training order."""
    from tokenizers import Tokenizer

    encode = Tokenizer.from_file(str(MODEL / "tokenizer.json")).encode
    wanted = steps * MICROBATCH * TOKENS
    ids: list[int] = []
    with TEXT.open(encoding="utf-8") as lines:
        for line in lines:
            ids += encode(json.loads(line)["text"] + "\n").ids
            if len(ids) >= wanted:
                return [ids[start : start + TOKENS] for start in range(0, wanted, TOKENS)]
    raise SystemExit(f"{TEXT} has fewer than {wanted} tokens.")
