"""Other people's training code at the commits they measured with: cloned once, imported from there, never copied."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

FOLDER = Path(os.environ.get("EDGEPEFT_CACHE", Path.home() / ".cache" / "edgepeft")) / "sources"


def use(repository: str, commit: str) -> Path:
    """Put ``github.com/<repository>`` at ``commit`` on the import path.

    What it imports beside torch and transformers is for the caller to install (``benchmarks/README.md`` says what).
    """
    folder = FOLDER / f"{repository.rpartition('/')[2]}-{commit}"
    if not folder.exists():
        subprocess.run(["git", "clone", "--quiet", f"https://github.com/{repository}", str(folder)], check=True)
        subprocess.run(["git", "-C", str(folder), "checkout", "--quiet", commit], check=True)
    sys.path.insert(0, str(folder))
    return folder
