"""Text on standard output, whatever the encoding of a terminal or a pipe has characters for."""

from __future__ import annotations

import io
import json
import sys
from typing import Any


def bear_any_text() -> None:
    """Have characters that standard output's encoding lacks written as escapes: Python would end in a traceback."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # as standard error does


def print_json(value: Any, *, indent: int | None = None) -> None:
    """Print JSON, with its own escapes where standard output is not Unicode: Python's would not be JSON."""
    unicode = (sys.stdout.encoding or "").lower().startswith("utf")
    print(json.dumps(value, indent=indent, ensure_ascii=not unicode))
