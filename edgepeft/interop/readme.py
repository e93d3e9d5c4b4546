"""The README.md of an adapter in PEFT's format: how it is loaded there."""

from __future__ import annotations

from pathlib import Path

from edgepeft import backbone, tasks
from edgepeft.adapter import Card
from edgepeft.backbone import Backbone, Source
from edgepeft.data.tokens import pad_id
from edgepeft.errors import UsageError

_BREAK = ",\n    "
_NF4 = (
    'quantization_config=BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", '
    "bnb_4bit_use_double_quant=True)"
)


def of(card: Card, made: Backbone) -> str:
    """Markdown with a program that loads backbone and adapter, labels by name, as they were trained."""
    source = backbone.resolve(card.model)
    where = Path(source.location)
    arguments = [repr(str(where.resolve()) if where.exists() else source.location)]  # the program runs in its folder
    imports = [tasks.LOADERS[card.task]]
    if source.gguf:
        arguments.append(f"gguf_file={source.gguf!r}")
    if card.labels is not None:
        numbers = {label: number for number, label in enumerate(card.labels)}
        arguments += [f"id2label={dict(enumerate(card.labels))!r}", f"label2id={numbers!r}"]
    if card.task == "classification" and tasks.default_task(made.model.config) == "causal-lm":
        # It classifies at the last token before the padding, and often has no token for that.
        arguments.append(f"pad_token_id={_padding(source, made)}")
    if card.precision == "nf4":
        arguments.append(_NF4)
        imports.append("BitsAndBytesConfig")
    rounded = f" It was trained on weights that were rounded to {card.precision}." if card.precision == "int8" else ""
    return f"""---
library_name: peft
base_model: {source.location}
---
An adapter of {card.method} for {source.location}, written by edgepeft {card.edgepeft}.{rounded}

```python
from peft import PeftModel
from transformers import {", ".join(imports)}

model = {imports[0]}.from_pretrained(
    {_BREAK.join(arguments)},
)
model = PeftModel.from_pretrained(model, ".")
```
"""


def _padding(source: Source, made: Backbone) -> int:
    """The token that batches were padded with in training."""
    try:
        return pad_id(backbone.tokenizer(source))
    except UsageError:  # not there: what the configuration says, or else its end of text
        chosen: int = made.model.config.pad_token_id
        return chosen
