"""How many tokens the batches of peft's MetaMathQA comparison have: what can be known without its training data.

Usage: ``pip install tiktoken``, then ``python benchmarks/lengths.py --tokenizer tokenizer.model
--gsm8k-train train.jsonl --gsm8k-test test.jsonl --math test.jsonl``

The tokenizer is Llama 3's (package ``llama-models`` on PyPI has it), GSM8K is in github.com/openai/grade-school-math,
MATH's test problems in github.com/microsoft/ToRA (src/data/math). MetaMathQA itself was not to be had. Prompts of
evaluations are GSM8K's, so their lengths are exact. MetaMathQA's examples were made from the problems of GSM8K and MATH
by a model; in their place stand problems and solutions of GSM8K's training set and MATH's test set, mixed as MetaMathQA
mixes them. Only MATH's are ever long: the longest of GSM8K has little more than half of the limit.
"""

from __future__ import annotations

import argparse
import base64
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

# From peft's run.py, data.py, utils.py and default_training_params.json
TEMPLATE = "Question: {query} Think step by step.\nAnswer:"
LIMIT_TOKENS, LIMIT_CHARACTERS = 768, 1300
EXAMPLES, BUCKET, MICROBATCH = 20_000, 80, 4  # trained on, and sorted by length at a time
EVALUATIONS = 10  # of the 20, those after a bucket's first half: steps 250, 750, ...
PROMPTS = 50  # in a batch of an evaluation, and in the validation set
OF_GSM8K, OF_MATH = 240, 155  # thousands of MetaMathQA's examples (arXiv 2309.12284, table 2)
TAIL = 0.05  # of MATH's examples, the longest, to which a tail is fitted
PATTERN = (  # how Llama 3 cuts text before byte pairs are merged (llama_models/llama3/tokenizer.py)
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    for name in ("tokenizer", "gsm8k-train", "gsm8k-test", "math"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    given = parser.parse_args(argv)
    count = _counter(given.tokenizer)
    learned, tested, problems = (_read(path) for path in (given.gsm8k_train, given.gsm8k_test, given.math))

    np.random.seed(0)  # as data.py draws the validation set
    drawn = np.arange(len(learned))
    np.random.shuffle(drawn)
    prompts = [count(TEMPLATE.format(query=learned[index]["question"])) for index in drawn[:PROMPTS]]
    print(f"validation: {max(prompts)} tokens")
    prompts = [count(TEMPLATE.format(query=row["question"])) for row in tested]
    print(f"test: {[max(prompts[start : start + PROMPTS]) for start in range(0, len(prompts), PROMPTS)]}")

    gsm8k = _lengths([(row["question"], row["answer"]) for row in learned], count)
    hard = _lengths([(row["problem"], row["solution"]) for row in problems], count)
    rates = OF_GSM8K * len(gsm8k) / len(learned), OF_MATH * len(hard) / len(problems)
    share = rates[1] / sum(rates)
    mean = share * hard.mean() + (1 - share) * gsm8k.mean()
    print(f"examples: {sum(rates) / (OF_GSM8K + OF_MATH):.1%} are short enough; {mean:.0f} tokens on average")
    print(f"longest of {len(hard)} of MATH {max(hard)}, of GSM8K {max(gsm8k)}")
    print(f"longest of {EXAMPLES}, quantiles 5, 50, 95 %: {_longest(hard, share * EXAMPLES)}")
    print(f"of all of MetaMathQA: {_longest(hard, share * 1000 * sum(rates))}")
    _buckets(gsm8k, hard, share)


def _longest(lengths: np.ndarray[Any, Any], count: float) -> list[int]:
    """Quantiles of the longest of ``count`` examples, by a generalised Pareto tail.

    It is fitted with probability-weighted moments (Hosking and Wallis, Technometrics 29, 1987).
    """
    kept = round(TAIL * len(lengths))
    ordered = np.sort(lengths)
    threshold = ordered[-kept - 1]
    excess = (ordered[-kept:] - threshold).astype(float)
    first = excess.mean()
    second = (excess * (kept - 1 - np.arange(kept)) / (kept - 1)).mean()
    shape = first / (first - 2 * second) - 2
    scale = 2 * first * second / (first - 2 * second)
    beyond = [-math.log(quantile) / (count * TAIL) for quantile in (0.05, 0.5, 0.95)]
    return [min(LIMIT_TOKENS, round(threshold + scale / shape * (1 - part**shape))) for part in beyond]


def _buckets(gsm8k: np.ndarray[Any, Any], hard: np.ndarray[Any, Any], share: float) -> None:
    """Lengths of the batches of a usual bucket, and of the one with the longest among those before evaluations."""
    random = np.random.default_rng(0)
    size = (2000, EVALUATIONS, BUCKET)
    drawn = np.where(random.random(size) < share, random.choice(hard, size), random.choice(gsm8k, size))
    batches = -np.sort(-drawn, axis=2)[:, :, ::MICROBATCH]
    longest = batches[np.arange(size[0]), batches[:, :, 0].argmax(axis=1)]
    print(f"a bucket's batches, medians: {np.median(batches, axis=(0, 1)).round().astype(int).tolist()}")
    print(f"where the longest is before an evaluation: {np.median(longest, axis=0).round().astype(int).tolist()}")
    print(f"its first, quantiles 5, 95 %: {np.quantile(longest[:, 0], (0.05, 0.95)).round().astype(int).tolist()}")


def _lengths(pairs: Sequence[tuple[str, str]], count: Any) -> np.ndarray[Any, Any]:
    """Tokens of the examples that data.py would keep."""
    kept = [pair for pair in pairs if len(" ".join(pair)) <= LIMIT_CHARACTERS]
    return np.array([min(LIMIT_TOKENS, count(TEMPLATE.format(query=query) + answer)) for query, answer in kept])


def _counter(path: Path) -> Any:
    """The number of tokens of a text, with the one that begins every text."""
    import tiktoken

    pairs = (line.split() for line in path.read_bytes().splitlines() if line)
    ranks = {base64.b64decode(token): int(rank) for token, rank in pairs}
    encoding = tiktoken.Encoding("llama3", pat_str=PATTERN, mergeable_ranks=ranks, special_tokens={})
    return lambda text: 1 + len(encoding.encode_ordinary(text))


def _read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


if __name__ == "__main__":
    main(sys.argv[1:])
