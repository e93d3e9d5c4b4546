"""The files of an adapter folder, PEFT's and edgepeft's, and the methods that both have."""

from __future__ import annotations

from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from edgepeft.errors import EdgePeftError
from edgepeft.interop import low_rank, products, prompts, scales
from edgepeft.interop.form import Form, Tensors

FORMS: dict[str, Form] = {
    "lora": low_rank.LORA,
    "dora": low_rank.DORA,
    "adalora": low_rank.ADALORA,
    "ia3": scales.IA3_FORM,
    "ln_tuning": scales.LN_TUNING,
    "krona": products.KRONA,
    "glora": products.GLORA,
    "prompt_tuning": prompts.PROMPT,
    "prefix_tuning": prompts.PREFIX,
}


def prefix(form: Form) -> str:
    """What PEFT puts before the names of the model's modules: one level less where it changes no layers."""
    return "base_model." if form.before_the_input else "base_model.model."


def tensors(path: Path) -> Tensors:
    """The tensors of a safetensors file.

    Raises:
        EdgePeftError: it is missing or damaged.
    """
    pickled = path.with_suffix(".bin").exists() and not path.exists()
    if pickled:
        raise EdgePeftError(
            f"{path} is missing.",
            f"The adapter is in {path.with_suffix('.bin').name}, a pickle, which can run any code when it is read.",
            "Load it with PEFT and save it again: save_pretrained writes safetensors.",
        )
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise damaged(path, f"It is missing or damaged: {str(error).splitlines()[0]}.") from error


def save(tensors: Tensors, path: Path) -> None:
    """Write a safetensors file."""
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, metadata={"format": "pt"})


def damaged(path: Path, cause: str) -> EdgePeftError:
    """The error about a file that is not what it should be."""
    return EdgePeftError(f"{path} cannot be read.", cause, "Copy the folder again, or save the adapter again.")
