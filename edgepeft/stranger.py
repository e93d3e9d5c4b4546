"""Methods from elsewhere: modules found by their dotted paths, whose mistakes are told as those of their authors."""

from __future__ import annotations

import contextlib
import importlib
import os
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

from edgepeft.errors import EdgePeftError, UsageError, said


def load(name: str) -> ModuleType:
    """Import the module that a dotted path means, from what is installed, ``PYTHONPATH`` or the current folder.

    Python has the current folder in ``sys.path`` for ``python -m edgepeft``, but not for the ``edgepeft`` script, nor
    for the processes that trace; here it stands at the end while the module is imported, so that it hides nothing.

    Raises:
        UsageError: there is no such module, or importing it fails.
    """
    here = os.getcwd()
    added = here not in sys.path
    if added:
        sys.path.append(here)
    try:
        return importlib.import_module(name)
    except (Exception, SystemExit) as error:
        absent = isinstance(error, ModuleNotFoundError) and error.name and f"{name}.".startswith(f"{error.name}.")
        if absent or (isinstance(error, (TypeError, ValueError)) and name.strip(".") != name):  # no name of a module
            raise UsageError(
                f"There is no method {name!r}.",
                str(error),
                "Give the dotted path of a module that holds a Method, in the current folder, in PYTHONPATH or "
                "installed.",
            ) from error
        raise blame(name, "when it is imported", error) from error
    finally:
        if added:
            sys.path.remove(here)


@contextlib.contextmanager
def blamed(module: str, when: str) -> Iterator[None]:
    """Tell what a method's code raises as a mistake of that code; in a module of edgepeft's own it is one of ours.

    Raises:
        UsageError: instead of what was raised.
    """
    try:
        yield
    except EdgePeftError:
        raise
    except Exception as error:
        if module.partition(".")[0] == __package__:
            raise
        raise blame(module, when, error) from error


def blame(module: str, when: str, error: BaseException) -> UsageError:
    """What is said of an error that a method's code raised, and where."""
    kind = type(error).__name__
    return UsageError(
        f"The method {module} fails {when}.",
        f"{kind}: {said(error).removeprefix(f'{kind}: ')}",
        f"Correct {_where(module, error)}.",
    )


def _where(module: str, error: BaseException) -> str:
    """The last line of the method's package that was at work."""
    if isinstance(error, SyntaxError) and error.filename:
        return f"{error.filename}, line {error.lineno}"
    frames = traceback.extract_tb(error.__traceback__)
    package = module.partition(".")[0]
    own = [frame for frame in frames if package in Path(frame.filename).with_suffix("").parts]
    return f"{own[-1].filename}, line {own[-1].lineno}" if own else "its code"
