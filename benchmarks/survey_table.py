"""The survey's half of ``results/time.md``; run alone, it replaces that half and leaves the rest.

Usage: ``python benchmarks/survey_table.py``. ``survey_harness.sh`` first, if its JSON file is to be made anew.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import survey_time
from edgepeft.files import write_text
from survey_time import Row

RESULTS = Path(__file__).resolve().parent / "results" / "time.md"
HEADING, NEXT = "## The survey's training throughput", "## Training steps"
TARGET = 0.9
COLUMNS = "| method | measured | step | operators | clock |\n|---|---|---|---|---|"

ABOUT = """\
Training throughput of the survey (arXiv 2303.15647v2, table 5), full tuning being 100, and three predictions:

- *step*: edgepeft's methods on edgepeft's T5, traced, and timed by the roofline as `edgepeft plan` does.
- *operators*: the same roofline on the operators of the survey's own harness: AdapterHub's `adapters` in the authors'
  fork of it and HF peft 0.7.1, on transformers 4.33.3.
- *clock*: that harness by what the authors' script reads. It takes the time when a microbatch begins and again when
  the optimizer's step has been issued, and waits for the device at the beginning only; so most rows are bound by Python
  and not by the device. Python and dispatch are measured: processor seconds of one thread, least of all steps, for a
  T5 of full depth that is too narrow for arithmetic to matter. To them come 3 us for each kernel, and the device where
  the processor gets 1000 launches ahead of it.

What is assumed: an A100 40 GB (the survey, section 11), the mean over data sets of source tokens a second (what the
authors log, and what notebook 18_dataset_average_table averages), source lengths that are guesses but for
CNN/DailyMail's. Efficiencies and times are data sheets', publications' and that measurement's; none comes from this
table.
"""

READING = """\
So the survey's own modules, counted or timed, do not give its order either: the target is met by none of the three, and
what edgepeft's step lacks of theirs is not the whole reason. Full tuning was measured apart (the authors'
`measure_throughput.py` leaves it out with the remark "different"), and each number is the time of one microbatch for
each of four data sets, the last that was logged. T5-3B's parameter counts of LoRA, prefix tuning and MAM are not those
of T5-3B (survey_counts.md).

To make the counts and times anew: `bash benchmarks/survey_harness.sh DIRECTORY` (an environment of its own, with pinned
versions; writes `benchmarks/survey_harness.json`), then `python benchmarks/survey_table.py`.
"""


def section(found: Mapping[str, Mapping[str, Row]]) -> str:
    """Markdown, from its heading to the next."""
    lines = [f"{HEADING} (arXiv 2303.15647v2, table 5)", "", ABOUT]
    for model, rows in found.items():
        ordered = sorted(rows.items(), key=lambda item: -item[1].measured)
        lines += [f"**{model}, {len(rows)} methods**", "", COLUMNS]
        lines += [_line(name, row, 1) for name, row in ordered]
        without = {name: row for name, row in rows.items() if name != "full"}
        lines += [_line("*Spearman*", survey_time.ranks(rows), 2)]
        lines += [_line("*Spearman, full tuning left out*", survey_time.ranks(without), 2), ""]
    best = max(max(survey_time.ranks(rows)[1:]) for rows in found.values())
    met = "met" if best >= TARGET else "NOT met"
    lines += [f"**A rank correlation of {TARGET} is {met}: the best over all methods of a model is {best:.2f}.**", ""]
    return "\n".join([*lines, READING, ""])


def _line(name: str, row: Row, digits: int) -> str:
    return f"| {name} | " + " | ".join(f"{value:.{digits}f}" for value in row) + " |"


if __name__ == "__main__":
    before, _, rest = RESULTS.read_text(encoding="utf-8").partition(HEADING)
    _, heading, after = rest.partition(NEXT)
    text = section(survey_time.compare())
    write_text(RESULTS, before + text + heading + after)
    print(text)
