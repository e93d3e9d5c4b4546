"""The part of the page with answers: held-out questions, what should be said, and what each artefact says."""

from __future__ import annotations

from edgepeft.report.markup import MISSING, Html, join, table, tag
from edgepeft.report.rundir import Run

SHOWN = 400  # characters of a question or an answer; of a question its end
ARTEFACTS = {"base": "base model", "tuned": "fine-tuned", "device": "on the device"}


def answers_section(run: Run) -> Html | None:
    """A row for each question; nothing where no text is generated."""
    if not run.answers:
        return None
    shown = {name: title for name, title in ARTEFACTS.items() if run.answers.get(name)}
    rows: list[list[object]] = []
    for number, (question, reference) in enumerate(zip(run.answers["question"], run.answers["reference"], strict=True)):
        said = [run.answers[name][number : number + 1] for name in shown]
        rows.append(
            [_end(question), tag("b", _start(reference)), *(_start(each[0]) if each else MISSING for each in said)]
        )
    explained = "Held-out examples, decoded greedily; long answers are cut off."
    head = ["question", "reference", *shown.values()]
    return join(table(head, rows, class_="cards texts"), tag("p", explained, class_="note"))


def _start(text: str) -> str:
    return (text.strip() or "(nothing)") if len(text.strip()) <= SHOWN else f"{text.strip()[:SHOWN]}…"


def _end(text: str) -> str:
    return text.strip() if len(text.strip()) <= SHOWN else f"…{text.strip()[-SHOWN:]}"
