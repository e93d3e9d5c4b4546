"""The command line of a device: ``python -m edgepeft.runtime DIR "text"``."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from edgepeft.errors import EdgePeftError, UsageError
from edgepeft.output import bear_any_text, print_json
from edgepeft.runtime.device import Device, Prompt

GENERATION = ("max_new_tokens", "temperature", "top_p", "stop", "seed")  # what Device.generate takes


def main(argv: Sequence[str], prog: str = "python -m edgepeft.runtime") -> int:
    """Answer one text from a device folder; returns the exit code: 0, 1 (work failed) or 2 (bad input).

    Args:
        argv: the arguments after the command's name.
        prog: the name that the help text shows.

    Raises:
        SystemExit: argparse refused the arguments (2) or printed the help (0).
    """
    bear_any_text()
    arguments = _parser(prog).parse_intermixed_args(argv)
    try:
        text = arguments.text if arguments.text is not None else _read_stdin()
        if not text.strip():
            raise UsageError("No text was given.", "", "Pass it after the folder, or on standard input.")
        device = Device.load(arguments.directory, arguments.threads)
        if device.manifest.task == "classification":
            _classify(device, text, arguments)
        else:
            _generate(device, text, arguments)
    except EdgePeftError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    except BrokenPipeError:
        # The reader (head, less) left. Python would complain again when it flushes stdout at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


def _parser(prog: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=prog, description="Classify a text, or answer it, with a device folder.")
    parser.add_argument("directory", type=Path, help="the folder that holds manifest.json")
    parser.add_argument("text", nargs="?", help="the text; standard input when left out")
    parser.add_argument("--max-new-tokens", type=int, help="the most tokens to generate (default 128)")
    parser.add_argument("--temperature", type=float, help="0, the default, takes the likeliest token")
    parser.add_argument("--top-p", type=float, help="sample from the likeliest tokens of this probability")
    parser.add_argument("--stop", action="append", metavar="TEXT", help="end before this text; repeatable")
    parser.add_argument("--seed", type=int, help="makes sampling reproducible")
    parser.add_argument("--system", metavar="TEXT", help="a system message, for a model with a chat template")
    parser.add_argument("--json", action="store_true", help="print one JSON object with the answer and its speed")
    parser.add_argument("--threads", type=int, help="threads to use (default: one per physical core)")
    return parser


def _classify(device: Device, text: str, arguments: argparse.Namespace) -> None:
    given = [f"--{name.replace('_', '-')}" for name in ("system", *GENERATION) if vars(arguments)[name] is not None]
    if given:
        model = device.manifest.model
        raise UsageError(f"{model} is a classifier.", "It generates no text.", f"Drop {' and '.join(given)}.")
    start = time.perf_counter()
    ranking = device.classify(text)
    seconds = time.perf_counter() - start
    if arguments.json:
        answer = {"label": ranking[0][0], "probabilities": dict(ranking)}
        _print_json(answer, len(device.encode(text)), seconds)
        return
    for label, probability in ranking:
        print(f"{label}\t{probability:.4f}")


def _generate(device: Device, text: str, arguments: argparse.Namespace) -> None:
    if not arguments.temperature and (
        idle := [f"--{name.replace('_', '-')}" for name in ("top_p", "seed") if vars(arguments)[name] is not None]
    ):
        raise UsageError(
            f"{' and '.join(idle)} would change nothing.",
            "At temperature 0, the default, the likeliest token is taken.",
            f"Add --temperature 1, or drop {' and '.join(idle)}.",
        )
    prompt: Prompt = text
    if arguments.system is not None:
        prompt = [{"role": "system", "content": arguments.system}, {"role": "user", "content": text}]
    start = time.perf_counter()
    asked = {name: vars(arguments)[name] for name in GENERATION if vars(arguments)[name] is not None}
    generation = device.generate(prompt, **asked)
    if arguments.json:
        answer = {"text": "".join(generation)}
        _print_json(answer, generation.tokens, time.perf_counter() - start)
        return
    for piece in generation:
        print(piece, end="", flush=True)
    print()


def _print_json(answer: dict[str, Any], tokens: int, seconds: float) -> None:
    """Print ``answer`` with its speed: ``tokens`` are those generated, or those read by a classifier."""
    speed = {"tokens": tokens, "seconds": round(seconds, 6), "tokens_per_second": round(tokens / seconds, 2)}
    print_json({**answer, **speed})


def _read_stdin() -> str:
    try:
        return sys.stdin.buffer.read().decode("utf-8").removesuffix("\n")
    except UnicodeDecodeError as error:
        raise UsageError("Standard input is not UTF-8 text.", str(error), "Save it as UTF-8.") from error


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
