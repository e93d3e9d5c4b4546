"""Takes every type of the installed HF PEFT through plan, training, saving and merging, and writes docs/peft.md.

Usage: ``python tools/peft_page.py [TYPE ...]``; with types named, it only prints their rows. All take ten minutes.
"""

from __future__ import annotations

import os
import sys
import tempfile
import warnings
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))

import peft  # noqa: E402
import peft_types as types  # noqa: E402

from edgepeft.errors import EdgePeftError  # noqa: E402
from edgepeft.files import write_text  # noqa: E402

PAGE = ROOT / "docs" / "peft.md"
COLUMNS = (("llama", "fp32"), ("bert", "fp32"), ("t5", "fp32"), ("llama", "bf16"), ("llama", "int8"), ("llama", "nf4"))
HEAD = f"""# Configurations of HF PEFT

Made by `python tools/peft_page.py` with peft {peft.__version__}. Every type of configuration on tiny models of three
families with random weights: planned, trained for three updates, saved, put back into a fresh model, read by PEFT
itself (fp32), and merged. Outputs agree to 1e-5 of the largest where the same is computed twice, to 1e-4 after merging.

*merges* went through all of it; *stays* did too, and is not merged but exported beside its backbone, except prompts,
prefixes, POLY and LILY, which are not exported: `edgepeft run` refuses them before it begins, `edgepeft train` trains
them.
*no* is refused before training, for the reason below the table.
"""


def outcome(kind: str, family: str, at: str) -> tuple[str, str]:
    """What became of a type, and why."""
    with tempfile.TemporaryDirectory() as folder:
        os.environ["EDGEPEFT_CACHE"] = folder
        try:
            why = types.goes_through(kind, family, at, Path(folder))
        except EdgePeftError as error:
            return "no", f"{error.fact} {error.cause}".replace(f"peft:{folder}/configuration", "The file")
        except Exception as error:
            return "FAILS", f"{type(error).__name__}: {error}".splitlines()[0]
    return ("stays", why) if why else ("merges", "")


def main(wanted: list[str]) -> None:
    rows, notes = [], []
    for kind in wanted or types.TYPES:
        found = {f"{family} {at}": outcome(kind, family, at) for family, at in COLUMNS}
        rows.append(f"| {kind} | {' | '.join(result for result, _ in found.values())} |")
        print(rows[-1], flush=True)
        reasons: dict[str, list[str]] = {}
        for column, (_, why) in found.items():
            if why:
                reasons.setdefault(why, []).append(column)
        for why, columns in reasons.items():
            where = "" if len(columns) == len(COLUMNS) else f" ({', '.join(columns)})"
            notes.append(f"- {kind}{where}: {why}")
            print(notes[-1], flush=True)
    head = f"| type | {' | '.join(f'{family} {at}' for family, at in COLUMNS)} |\n|{'---|' * (len(COLUMNS) + 1)}"
    if not wanted:
        write_text(PAGE, "\n".join([HEAD, head, *rows, "", *notes, ""]))


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    main(sys.argv[1:])
