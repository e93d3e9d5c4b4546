"""Which task a model is for, and which it cannot be trained for."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

from edgepeft.errors import UsageError, nearest

if TYPE_CHECKING:
    from transformers import PretrainedConfig

LOADERS = {  # the class of transformers that loads a model for it
    "classification": "AutoModelForSequenceClassification",
    "causal-lm": "AutoModelForCausalLM",
    "seq2seq": "AutoModelForSeq2SeqLM",
}
TASKS = tuple(LOADERS)
_OPTIMUM_TASKS = dict(zip(("text-classification", "text-generation", "text2text-generation"), TASKS, strict=True))


def usual_task(configuration: PretrainedConfig) -> str:
    """What a checkpoint was saved for, going by the class it names; ``default_task`` if that is none of our tasks."""
    for name in configuration.architectures or ():
        from optimum.exporters.tasks import TasksManager

        named = type(name, (), {"__module__": "transformers"})  # optimum goes by names; the class itself loads slowly
        with contextlib.suppress(ValueError):  # a class that serves no single task
            task = TasksManager.infer_task_from_model(named)
            if task in _OPTIMUM_TASKS:
                return _OPTIMUM_TASKS[task]
    return default_task(configuration)


def default_task(configuration: PretrainedConfig) -> str:
    """What a model of this architecture is usually tuned for."""
    if configuration.is_encoder_decoder:
        return "seq2seq"
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as DECODERS
    from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES as ENCODERS

    kind, encodes = configuration.model_type, ENCODERS.keys() | {"bert-generation"}  # an encoder until set up to decode
    decodes = kind in DECODERS and kind not in encodes
    return "causal-lm" if decodes else "classification"


def check(configuration: PretrainedConfig, task: str) -> None:
    """Refuse an unknown task, and one that models of this architecture are not trained for; say how the data would do.

    Raises:
        UsageError: see there.
    """
    if task not in TASKS:
        raise UsageError(f"There is no task {task!r}.", "", nearest(task, TASKS))
    if not getattr(configuration, "is_decoder", False):  # an encoder may be set up to decode
        check_usual(configuration.model_type, default_task(configuration), task)


def check_usual(kind: str, usual: str, task: str) -> None:
    """The same, of a kind of model whose usual task is known: it needs neither torch nor transformers.

    Raises:
        UsageError: models of this kind are not trained for the task.
    """
    if refused := _REFUSED.get((usual, task)):
        raise UsageError(f"A {kind} model is not trained for {task} here.", *refused)


_ENCODER = "It is an encoder: each of its positions sees the answer it should predict."
_LABELS = "Use data of text + label (--task classification), or a model that generates text."
_REFUSED = {
    ("classification", "causal-lm"): (_ENCODER, _LABELS),
    ("classification", "seq2seq"): (_ENCODER, _LABELS),
    ("seq2seq", "classification"): (
        "Its head would read the end of the text wherever that is, which cannot be planned.",
        "Write the data as input + target (--task seq2seq): it then answers with the label's name.",
    ),
    ("seq2seq", "causal-lm"): (
        "It reads an input and writes a target; it does not go on with a prompt.",
        "Use data of input + target (--task seq2seq). Columns prompt + completion are read as such with "
        "--set columns.input=prompt --set columns.target=completion",
    ),
    ("causal-lm", "seq2seq"): (
        "It has no encoder: it goes on with a prompt.",
        "Use data of prompt + completion or messages (--task causal-lm). Columns input + target are read as such with "
        "--set columns.prompt=input --set columns.completion=target; what separates the two must be in the data.",
    ),
}
