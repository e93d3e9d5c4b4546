"""One self-contained HTML page about a run: ``write(run_directory)`` writes its ``report.html``."""

from __future__ import annotations

import contextlib
import platform
from collections.abc import Iterator
from importlib import metadata, resources
from pathlib import Path
from string import Template

import edgepeft
from edgepeft.files import write_text
from edgepeft.report.answered import answers_section
from edgepeft.report.markup import Html, join, tag
from edgepeft.report.outcome import ledger_section, verdict_section
from edgepeft.report.planned import peak_section, plan_section
from edgepeft.report.rundir import Run, read
from edgepeft.report.trained import training_section

LIBRARIES = ("torch", "transformers", "accelerate", "bitsandbytes", "datasets", "onnx", "onnxruntime", "tokenizers")


def write(run: Path) -> Path:
    """Write ``run/report.html`` from what the run left so far and return its path; the same files give the same page.

    Raises:
        UsageError: ``run`` is no directory.
        EdgePeftError: a file of the run is damaged, or the disk is full.
    """
    left = read(run)
    described = {key: left.described(key) for key in ("model", "method", "precision", "hardware")}
    known = [value for value in described.values() if value]
    sections = (
        ("Memory: predicted and measured", peak_section(left)),
        ("Plan", plan_section(left)),
        ("Training", training_section(left)),
        ("Ledger", ledger_section(left)),
        ("Answers", answers_section(left)),
        ("Recipe", _recipe(left)),
        ("Versions", _versions()),
    )
    body = join(
        tag("h1", Path(described["model"]).name if described["model"] else run.resolve().name),
        tag("p", " · ".join(known), class_="subtitle"),
        verdict_section(left),
        *(tag("section", tag("h2", heading), content) for heading, content in sections if content is not None),
    )
    page = Template(resources.files(__package__).joinpath("page.html").read_text(encoding="utf-8"))
    path = run / "report.html"
    title = tag("title", "edgepeft: ", " · ".join(known) or run.resolve().name)
    write_text(path, page.substitute(title=title, body=body))
    return path


def _recipe(run: Run) -> Html:
    if run.recipe is None:
        return tag("p", "There is no recipe.toml.", class_="absent")
    return tag("pre", run.recipe)


def _versions() -> Html:
    """What is installed where the page is written."""
    installed = {"edgepeft": edgepeft.__version__, "python": platform.python_version()}
    for library in LIBRARIES:
        try:
            installed[library] = metadata.version(library)
        except metadata.PackageNotFoundError:
            continue  # an optional one; its absence is told by its not being listed
    entries = (tag("span", name, " ", tag("b", version)) for name, version in installed.items())
    return tag("p", *entries, class_="versions")


@contextlib.contextmanager
def afterwards(run: Path) -> Iterator[None]:
    """Write the report of what there is afterwards, also of what failed or was stopped half-way."""
    try:
        yield
    except BaseException:
        with contextlib.suppress(Exception):  # what went wrong before is what is said
            if (run / "recipe.toml").exists():
                write(run)
        raise
    write(run)
