"""Methods that are a configuration of HF PEFT, ``peft:PATH``: where it is and what it says, without torch and peft."""

from __future__ import annotations

from pathlib import Path

from edgepeft.errors import UsageError

PREFIX = "peft:"
FILE = "adapter_config.json"  # as PEFT's save_pretrained names it


def path_of(method: str | None) -> Path | None:
    """The file that a method's name means; None if the name is another kind's."""
    if method is None or not method.startswith(PREFIX):
        return None
    path = Path(method.removeprefix(PREFIX))
    return path / FILE if path.is_dir() else path


def text_of(method: str) -> str | None:
    """The configuration that a method's name means; None if the name is another kind's.

    Raises:
        UsageError: it cannot be read.
    """
    path = path_of(method)
    if path is None:
        return None
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(
            f"There is no PEFT configuration {str(path)!r}.",
            str(error),
            f"Give peft: and an {FILE}, or a folder with one, as PEFT's save_pretrained writes it.",
        ) from error
