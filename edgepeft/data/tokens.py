"""What the data asks of a tokenizer, and what identifies it."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from tokenizers import pre_tokenizers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from edgepeft.errors import UsageError

_FILES = ("tokenizer.json", "tokenizer.model", "spiece.model", "vocab.txt", "vocab.json")


def check_files(location: str, *, gguf: bool) -> None:
    """Refuse a folder without a tokenizer: transformers would make one that knows no word.

    Raises:
        UsageError: see above.
    """
    folder = Path(location)
    if gguf or not folder.is_dir() or any((folder / name).is_file() for name in _FILES):
        return
    raise UsageError(
        f"The folder {location} has a model, but no tokenizer.",
        f"There is none of {', '.join(_FILES)}.",
        "Copy tokenizer.json and tokenizer_config.json of the model beside its config.json.",
    )


_EACH_DIGIT_ALONE = ("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone")
"""Ways of splitting text that GGUF files name, as llama.cpp splits by them, which transformers takes for GPT-2's."""


def split_as_named(tokenizer: PreTrainedTokenizerFast, file: Path) -> None:
    """Split text as the GGUF ``file`` of a tokenizer says, where transformers does not: the model learned it so."""
    from gguf import GGUFReader

    named = GGUFReader(file).get_field("tokenizer.ggml.pre")
    if named is not None and named.contents() in _EACH_DIGIT_ALONE:
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )


def check(
    tokenizer: PreTrainedTokenizerBase, task: str, max_tokens: int, max_target_tokens: int, fraction: float
) -> None:
    """Refuse settings with which no example could be encoded."""
    if not tokenizer.is_fast:
        raise UsageError(
            "The model's tokenizer has no fast version.",
            "The device runs tokenizers from a tokenizer.json, and training must see the same tokens.",
            "Choose a model that has a tokenizer.json.",
        )
    if task != "classification" and tokenizer.eos_token_id is None:
        raise UsageError(
            "The model's tokenizer has no eos token.",
            "Without one, a model cannot learn where an answer ends.",
            "Set eos_token in the model's tokenizer_config.json, or choose another model.",
        )
    if task == "seq2seq" and tokenizer.pad_token_id is None:
        raise UsageError(
            "The model's tokenizer has no pad token.",
            "The decoder of a T5 starts with it.",
            "Set pad_token in the model's tokenizer_config.json.",
        )
    least = 3 if task == "causal-lm" else tokenizer.num_special_tokens_to_add() + 1
    if max_tokens < least or max_target_tokens < 1:
        raise UsageError(
            f"At most {max_tokens} tokens, and {max_target_tokens} of a target, leave no room for an example.",
            f"The task {task} needs {least} tokens or more with this tokenizer, and targets need 1.",
            "Allow more tokens.",
        )
    if not 0 < fraction < 1:
        raise UsageError(
            f"{fraction} is no share of the examples to validate on.", "It must be above 0 and below 1.", "Try 0.1."
        )


def check_vocabulary(largest: int, vocabulary: int | None, model: str) -> None:
    """Refuse tokens that a model has no embedding for.

    Raises:
        UsageError: see above.
    """
    if vocabulary is not None and largest >= vocabulary:
        raise UsageError(
            f"The tokenizer of {model} makes token {largest}, and the model knows {vocabulary}.",
            "Tokens were added to the one without the other, or they do not belong together.",
            "Call model.resize_token_embeddings(len(tokenizer)) and save both, or fetch them again.",
        )


def fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """Changes with whatever changes the tokens of a text; padding and truncation do not, each call sets them."""
    backend = json.loads(tokenizer.backend_tokenizer.to_str()) | {"padding": None, "truncation": None}
    special = [tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.sep_token_id, tokenizer.chat_template]
    return hashlib.sha256(json.dumps([backend, special], sort_keys=True).encode()).hexdigest()


def pad_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """Padding is masked, so any token will do where there is none for it."""
    return next((i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id) if i is not None), 0)
