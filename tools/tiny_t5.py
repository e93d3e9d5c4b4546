"""A T5 of 1.4 million random weights, with a tokenizer of T5's kind made from real text; the same bytes every time."""

from __future__ import annotations

import json
import math
from collections import Counter
from pathlib import Path

from edgepeft.errors import EdgePeftError

VOCABULARY = 4096
SPECIALS = ("<pad>", "</s>", "<unk>")  # ids 0, 1 and 2, as in T5


def make(folder: Path, corpus: Path) -> None:
    """Write config, weights and tokenizer into ``folder``; ``corpus`` is jsonl with ``input`` and ``target``."""
    import torch
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
    from transformers import AutoTokenizer, PreTrainedTokenizerFast, T5Config, T5ForConditionalGeneration

    rows = [json.loads(line) for line in corpus.read_text(encoding="utf-8").splitlines()]
    texts = [row[column] for row in rows for column in ("input", "target")]
    backend = Tokenizer(models.Unigram(_pieces(texts), unk_id=SPECIALS.index("<unk>"), byte_fallback=False))
    backend.normalizer = normalizers.NFKC()
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    backend.post_processor = processors.TemplateProcessing(
        single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", SPECIALS.index("</s>"))]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=512
    ).save_pretrained(folder)

    torch.manual_seed(0)
    config = T5Config(
        vocab_size=VOCABULARY,
        d_model=128,
        d_kv=32,
        d_ff=512,
        num_heads=4,
        num_layers=2,
        num_decoder_layers=2,
        pad_token_id=SPECIALS.index("<pad>"),
        eos_token_id=SPECIALS.index("</s>"),
        decoder_start_token_id=SPECIALS.index("<pad>"),
    )
    T5ForConditionalGeneration(config).save_pretrained(folder)

    tokenizer = AutoTokenizer.from_pretrained(folder)
    for text in texts[:100]:
        ids = tokenizer(text).input_ids
        if tokenizer.decode(ids, skip_special_tokens=True).split() != text.split() or ids[-1] != tokenizer.eos_token_id:
            raise EdgePeftError(f"The tokenizer of t5-tiny does not give back {text!r}.")


def _pieces(texts: list[str]) -> list[tuple[str, float]]:
    """The vocabulary and log probabilities of a Unigram model.

    The library's own Unigram trainer gives another vocabulary at every call: its sums depend on the order of threads.
    So the pieces are those of byte-pair merging, which is deterministic, scored by how often text is split into them.
    """
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers

    merger = Tokenizer(models.BPE())
    merger.normalizer = normalizers.NFKC()
    merger.pre_tokenizer = pre_tokenizers.Metaspace()
    merger.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=VOCABULARY - len(SPECIALS), show_progress=False))
    counts = Counter(piece for encoding in merger.encode_batch(texts) for piece in encoding.tokens)
    scored = [(piece, round(math.log((counts[piece] + 0.5) / counts.total()), 6)) for piece in merger.get_vocab()]
    return [(special, 0.0) for special in SPECIALS] + sorted(scored, key=lambda entry: (-entry[1], entry[0]))
