"""Fetch a real sentiment data set once and lay it out under data/ in the four shapes that edgepeft reads.

The text is movie review snippets, each rated from -4 to 4 by at least 20 people, out of Hutto & Gilbert, "VADER: A
Parsimonious Rule-based Model for Sentiment Analysis of Social Media Text" (ICWSM 2014), as shipped in the package
vaderSentiment 0.5 under the MIT licence. Usage: ``python tools/data.py``; quick when the data is there already.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
import sys
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from edgepeft.errors import EdgePeftError
from edgepeft.files import write_text
from fetch import ROOT, Package, downloaded, keep

PACKAGE = Package(
    name="vaderSentiment",
    version="0.5",
    sha256="5d97c37f3ef6e24eef331122e055dbedafeb6a56abfce0608b326701116ea49a",
    licence="MIT",
)
ARCHIVE = "vaderSentiment-0.5/additional_resources/hutto_ICWSM_2014.tar.gz"
MEMBER = "hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt"
CLEAR = 1.0  # mean ratings nearer to neutral than this are dropped: people do not agree on their sign

Example = tuple[str, str]  # text, "positive" or "negative"
SHAPES: dict[str, Callable[[str, str], dict[str, Any]]] = {
    "sentiment": lambda text, label: {"text": text, "label": label},
    "sentiment-prompts": lambda text, label: {"prompt": f"Review: {text}\nSentiment:", "completion": f" {label}"},
    "sentiment-seq2seq": lambda text, label: {"input": f"sentiment: {text}", "target": label},
    "sentiment-chat": lambda text, label: {
        "messages": [
            {"role": "user", "content": f"Is this review positive or negative?\n\n{text}"},
            {"role": "assistant", "content": label},
        ]
    },
}
SMALL = {"sentiment-chat": {"train": 1000, "validation": 200}}

NOTE = f"""# Where this data comes from

Movie review snippets with ratings by at least 20 people each, from the package vaderSentiment 0.5 (MIT licence,
SHA-256 {PACKAGE.sha256}), made by `tools/data.py`. Cite: C.J. Hutto and E.E. Gilbert, "VADER: A Parsimonious Rule-based
Model for Sentiment Analysis of Social Media Text", ICWSM 2014. The snippets were taken from the reviews collected by
B. Pang and L. Lee (2004); the MIT licence is the one under which the package's author distributes them.

Kept are snippets whose mean rating is at least {CLEAR} from neutral. The label is the rating's sign. One in ten is for
validation, chosen by a hash of the text alone. `sentiment` has text and label, `sentiment-prompts` has prompt and
completion, `sentiment-seq2seq` has input and target, `sentiment-chat` has messages (1000 and 200 examples only).
"""


def main() -> None:
    made = prepare()
    sizes = {name: (ROOT / "data" / name / "train.jsonl").stat().st_size for name in SHAPES}
    state = "made" if made else "already there"
    print(f"data/: {state}: " + ", ".join(f"{name} ({size / 1e6:.1f} MB)" for name, size in sizes.items()))


def prepare() -> bool:
    """Have all four data sets under data/; say whether they had to be made."""
    return keep(ROOT / "data", [PACKAGE], [Path(__file__)], _make)


def _make(folder: Path) -> None:
    with downloaded(PACKAGE) as archive:
        splits = _split(_examples(_read(archive)))
    for name, row in SHAPES.items():
        for split, examples in splits.items():
            wanted = examples[: SMALL.get(name, {}).get(split)]
            lines = (json.dumps(row(*example), ensure_ascii=False) for example in wanted)
            write_text(folder / name / f"{split}.jsonl", "\n".join(lines) + "\n")
    write_text(folder / "SOURCE.md", NOTE)


def _read(archive: Path) -> str:
    """The tab-separated ratings: number, mean rating, text."""
    with zipfile.ZipFile(archive) as package, tarfile.open(fileobj=io.BytesIO(package.read(ARCHIVE))) as inner:
        member = inner.extractfile(MEMBER)
        assert member is not None, MEMBER  # the archive's bytes are pinned
        return member.read().decode("utf-8")


def _examples(table: str) -> list[Example]:
    """Clear examples, shuffled; of texts that differ only in case, spaces or punctuation the first one stays."""
    kept: dict[str, Example] = {}
    for line in table.strip().split("\n"):
        _, rating, text = line.split("\t", 2)
        text = re.sub(r"\s+", " ", text).strip()
        if abs(float(rating)) >= CLEAR:
            kept.setdefault(_normal(text), (text, "positive" if float(rating) > 0 else "negative"))
    return [
        kept[text] for text in sorted(kept, key=_hash)
    ]  # the same order everywhere, and unlike the file's no pattern in it


def _split(examples: list[Example]) -> dict[str, list[Example]]:
    """One in ten for validation, by the text alone: a text is always on the same side, whatever else is there."""
    splits: dict[str, list[Example]] = {"train": [], "validation": []}
    for text, label in examples:
        splits["validation" if int(_hash(_normal(text)), 16) % 10 == 0 else "train"].append((text, label))
    return splits


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _normal(text: str) -> str:
    return re.sub(r"\W+", " ", text.casefold()).strip()


if __name__ == "__main__":
    try:
        main()
    except EdgePeftError as error:
        sys.exit(str(error))
