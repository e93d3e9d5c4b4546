"""The device folder: graphs, tokenizer and manifest, proven to load and run before it appears."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase

from edgepeft import __version__
from edgepeft.errors import EdgePeftError
from edgepeft.files import atomic_directory
from edgepeft.runtime import decode, manifest
from edgepeft.runtime.device import Device

README = "README.md"  # not among the manifest's files: it may be written in
_SAMPLES = (
    "Is this a test?",
    "  Leading, double  and trailing spaces ",
    "Two\nlines,\ta tab\r\n\nand 1234567890.",
    "Grüße, façade, Αθήνα, Київ, नमस्ते, 東京、서울",
    "e\N{COMBINING ACUTE ACCENT} ﬁ Ⅷ \N{ZERO WIDTH SPACE}\N{NO-BREAK SPACE}",
    "\N{WOMAN}\N{ZERO WIDTH JOINER}\N{PERSONAL COMPUTER} \N{THUMBS UP SIGN}\N{EMOJI MODIFIER FITZPATRICK TYPE-4}",
    "def f(x): return {'a': [x], \"b\": x != 0}  # </s> <pad> [SEP] <|endoftext|> <|im_end|>",
)


def package(
    *,
    graphs: Path,
    tokenizer: PreTrainedTokenizerBase,
    task: str,
    labels: Sequence[str] | None,
    template: Mapping[str, Any],
    eos_token_ids: Sequence[int],
    stop: Sequence[str],
    closing_token_ids: Sequence[int],
    decoder_start_token_id: int | None,
    max_tokens: int,
    name: str,
    method: str,
    variant: str,
    metrics: Mapping[str, float],
    target: Path,
) -> Path:
    """Make a device folder, and load it and run it once with the runtime; returns ``target``.

    Args:
        graphs: the folder of one ONNX variant. Its files are hard-linked where the file system can, else copied.
        tokenizer: the fast tokenizer that the model was trained with.
        task: "classification", "causal-lm" or "seq2seq".
        labels: classification: the name of each output, in order.
        template: how a prompt became text in training.
        eos_token_ids, stop: tokens and texts that end a generation.
        closing_token_ids: causal-lm: what the tokenizer puts behind a text, and a prompt was trained without.
        decoder_start_token_id: seq2seq: the first decoder input.
        max_tokens: the longest sequence the model takes.
        name: the model's name.
        method: the fine-tuning method's name.
        variant: the precision of the graphs.
        metrics: what this variant reached on the evaluation data.
        target: the folder to make; one that is there already is replaced, and stays as it is when this fails.

    Raises:
        EdgePeftError: a graph is missing or does not run, or the tokenizer cannot be had without transformers.
    """
    # A chat template's text already holds every special token the model was trained with.
    add_special_tokens = template["kind"] != "chat"
    with atomic_directory(target) as directory:
        for graph in manifest.GRAPHS[task]:
            _place_graph(graphs / graph, directory)
        _save_tokenizer(tokenizer, directory / manifest.TOKENIZER)
        manifest.write(
            directory,
            manifest.Manifest(
                task=task,
                labels=list(labels) if labels is not None else None,
                template=dict(template),
                eos_token_ids=list(eos_token_ids),
                stop=list(stop) or None,
                closing_token_ids=list(closing_token_ids) or None,
                decoder_start_token_id=decoder_start_token_id,
                max_tokens=max_tokens,
                add_special_tokens=add_special_tokens,
                model=name,
                method=method,
                precision=variant,
                metrics=dict(metrics),
                edgepeft=__version__,
                files=manifest.describe_files(directory),
            ),
        )
        device = Device.load(directory)
        _check_tokenizer(tokenizer, device)
        _try_out(device)
        (directory / README).write_text(_told(device.manifest), encoding="utf-8")
    return target


def _told(of: manifest.Manifest) -> str:
    """What whoever finds the folder needs to know."""
    does = {"classification": "classifies a text", "causal-lm": "goes on from a text", "seq2seq": "answers a text"}
    labels = f" Labels: {', '.join(of.labels)}." if of.labels else ""
    call = 'Device.load(".").classify("...")' if of.labels else '"".join(Device.load(".").generate("..."))'
    return f"""# {Path(of.model).name}, tuned by {of.method}, {of.precision} graph

It {does[of.task]} of up to {of.max_tokens} tokens.{labels} To run it, here in this folder:

```bash
pip install onnxruntime tokenizers numpy && pip install --no-deps edgepeft
python -m edgepeft.runtime . "..."
```

In Python: `from edgepeft.runtime.device import Device`, then `{call}`. Made by edgepeft {of.edgepeft}.
"""


def _place_graph(graph: Path, directory: Path) -> None:
    """Put a graph and its external weights (``graph`` + ".data") into ``directory``."""
    if not graph.is_file():
        raise EdgePeftError(f"{graph} is missing.", "The device folder needs it.", "Export the model again.")
    for file in graph.parent.glob(f"{graph.name}*"):
        source = file.resolve()  # a link to a symbolic link would point out of the device folder
        try:
            os.link(source, directory / file.name)
        except OSError:  # another file system, or one without hard links
            shutil.copyfile(source, directory / file.name)


def _save_tokenizer(tokenizer: PreTrainedTokenizerBase, path: Path) -> None:
    """Save the tokenizer's own part: its text to token mapping, without a length to cut or pad to."""
    if not tokenizer.is_fast:
        raise EdgePeftError(
            f"{type(tokenizer).__name__} has no tokenizer.json.",
            "It is written in Python, which would need transformers on the device.",
            "Load the model with a fast tokenizer (AutoTokenizer with use_fast=True).",
        )
    saved = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    saved.no_truncation()
    saved.no_padding()
    saved.save(str(path))


def _check_tokenizer(tokenizer: PreTrainedTokenizerBase, device: Device) -> None:
    """Raise unless the saved tokenizer alone gives the tokens that transformers gives."""
    flag = device.manifest.add_special_tokens
    for text in _SAMPLES:
        expected = tokenizer(text, add_special_tokens=flag)["input_ids"]
        found = device.tokenizer.encode(text, add_special_tokens=flag).ids
        if found != expected:
            raise EdgePeftError(
                f"tokenizer.json alone does not reproduce {type(tokenizer).__name__}.",
                f"For {text!r} it gives {found}; transformers gives {expected}.",
                "Save the tokenizer with save_pretrained, load it again with AutoTokenizer, and export again.",
            )


def _try_out(device: Device) -> None:
    """Answer a short text as the device will; a generator takes a second step, which reads its cache."""
    text = "a test"
    if device.manifest.task == "classification":
        device.classify(text)
        return
    ids = np.array([device.encode(text)], np.int64)
    start = device.manifest.decoder_start_token_id
    decode.greedy(device.graphs, ids, np.ones_like(ids), max_new_tokens=2, decoder_start_token_id=start)
