"""The page about a run says what the run's files say, whatever they hold and however few there are."""

from __future__ import annotations

import json
import math
import random
import re
from pathlib import Path
from typing import Any

import pytest
from page import Page

from edgepeft import __version__, report
from edgepeft.errors import EdgePeftError, UsageError
from edgepeft.files import write_json, write_text
from edgepeft.report.markup import memory, number
from edgepeft.report.rundir import read

MIB = 2**20
RECIPE = 'model = "models/minilm-l6"\nmethod = "lora"\nprecision = "bf16"\nhardware = "rtx-3060-12gb"\nlr = 5e-4\n'


def candidate(method: str, precision: str, fits: bool, **kinds: int) -> dict[str, Any]:
    parts = {kind: value * MIB for kind, value in kinds.items()}
    return {
        "method": method,
        "precision": precision,
        "microbatch": 32,
        "checkpointing": False,
        "fits": fits,
        "peak_bytes": sum(parts.values()),
        "bytes": parts,
    }


PLAN: dict[str, Any] = {
    "hardware": "rtx-3060-12gb",
    "available_bytes": 11_675 * MIB,
    "model": "models/minilm-l6",
    "candidates": [
        candidate(
            "full", "fp32", False, weights=6087, gradients=4087, optimizer=8174, activations=2610, temporaries=97
        ),
        candidate("galore", "bf16", True, weights=4043, gradients=31, optimizer=911, activations=2300, temporaries=153),
        candidate("lora", "bf16", True, weights=4043, adapter=11, gradients=11, optimizer=22, activations=2411),
        candidate("lora", "nf4", True, weights=1127, adapter=11, gradients=11, optimizer=22, activations=2411),
    ],
    "choice": 2,
}


def measured(
    artefact: str, accuracy: float, loss: float, bytes_: int, ms: float | None, deviation: float | None, note: str = ""
) -> dict[str, Any]:
    return {
        "artefact": artefact,
        "metrics": {"accuracy": accuracy, "loss": loss},
        "bytes": bytes_,
        "latency_ms": ms,
        "tokens_per_second": None,
        "deviation": deviation,
        "same_tokens": None,
        "kept": not note,
        "note": note,
    }


LEDGER = [
    measured("base", 0.5123, 0.6931, 90_870_000, None, None),
    measured("adapter", 0.8837, 0.3011, 1_190_000, 9.87, None),
    measured("merged", 0.8835, 0.3012, 90_870_001, 8.31, 3.1e-7),
    measured("onnx-fp32", 0.8836, 0.3013, 90_412_345, 4.62, 1.4e-6),
    measured("onnx-int8", 0.8811, 0.3081, 23_012_345, 2.19, 0.0213),
    measured("onnx-int4", 0.6123, 0.6512, 14_012_345, 3.77, 0.412, "lost 73 % of what fine-tuning gained"),
]
PREDICTED, MEASURED = 6498 * MIB, 6613 * MIB


def events(killed_at: int = 230, checkpoint: int = 200, steps: int = 400) -> list[dict[str, Any]]:
    """A training that was killed, resumed from its checkpoint, and ended."""
    noise = random.Random(0)

    def step(i: int) -> dict[str, Any]:
        loss = 0.28 + 0.45 * math.exp(-i / 80) + noise.gauss(0, 0.04)
        return {"event": "step", "step": i, "time": i * 0.5, "loss": loss, "tokens_per_second": 8000.0 + i}

    def evaluation(i: int) -> dict[str, Any]:
        metrics = {"accuracy": 0.9 - 0.4 * math.exp(-i / 90), "loss": 0.3 + 0.4 * math.exp(-i / 90)}
        return {"event": "evaluation", "step": i, "time": i * 0.5, "metrics": metrics, "best": i < 400}

    def run(first: int, last: int) -> list[dict[str, Any]]:
        return [e for i in range(first, last + 1) for e in ([step(i), evaluation(i)] if i % 50 == 0 else [step(i)])]

    start = {"event": "start", "step": 0, "predicted_peak_bytes": PREDICTED}
    end = {"event": "end", "step": steps, "measured_peak_bytes": MEASURED, "seconds": 212.4}
    resume = {"event": "resume", "step": checkpoint}
    return [start | {"predicted_peak_bytes": 1}, *run(1, killed_at), start, resume, *run(checkpoint + 1, steps), end]


def lines(records: list[dict[str, Any]]) -> str:
    return "".join(json.dumps(r) + "\n" for r in records)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    directory = tmp_path / "run"
    write_text(directory / "recipe.toml", RECIPE)
    write_json(directory / "plan.json", PLAN)
    write_text(directory / "events.jsonl", lines(events()))
    write_json(directory / "ledger.json", LEDGER)
    return directory


def page(run: Path) -> Page:
    path = report.write(run)
    assert path == run / "report.html"
    return Page(path.read_text(encoding="utf-8"))


def test_title_and_verdict(run: Path) -> None:
    shown = page(run)
    assert "models/minilm-l6 · lora · bf16 · rtx-3060-12gb" in shown.text
    assert "Fine-tuning took accuracy from 0.5123 to 0.8837" in shown.text
    assert "onnx-int8, for the device, has 0.8811 in 21.9 MiB" in shown.text  # 23,012,345 / 2**20
    assert __version__ in shown.text


def test_error_of_the_prediction_is_a_share_of_the_measurement(run: Path) -> None:
    shown = page(run)
    assert "predicted6.35 GiB" in shown.text and "measured6.46 GiB" in shown.text
    assert f"{100 * (MEASURED - PREDICTED) / MEASURED:.1f} % below the measurement" in shown.text


def test_phases_are_held_against_what_was_measured(run: Path) -> None:
    gib = 2**30
    planned = {"loading": gib, "forward+backward": 3 * gib, "merge": 2 * gib}
    process = {"predicted_process_bytes": 6 * gib, "measured_process_bytes": gib}  # merged by another one, later
    merged = {"measured_phases": {"merge": 4 * gib}}
    write_json(run / "plan.json", {**PLAN, "predicted_phases": planned, **process, **merged})
    ended = {"event": "end", "step": 400, "measured_phases": {"forward+backward": 2 * gib, "evaluation": gib}}
    write_text(run / "events.jsonl", lines([*events(), {**ended, "measured_process_bytes": 8 * gib}]))
    rows = {row[0]: row[1:] for row in page(run).rows if len(row) == 4}
    assert rows["forward+backward"] == ["3.00 GiB", "2.00 GiB", "+50.0 %"]
    assert rows["merge"] == ["2.00 GiB", "4.00 GiB", "-50.0 %"]
    assert rows["loading"] == ["1.00 GiB", "", ""] and rows["evaluation"] == ["", "1.00 GiB", ""]
    assert rows["the whole process"] == ["6.00 GiB", "8.00 GiB", "-25.0 %"]


def test_every_candidate_is_shown_and_the_choice_comes_first(run: Path) -> None:
    shown = page(run)
    rows = [row for row in shown.rows if len(row) == 6 and row[1] in ("fp32", "bf16", "nf4")]
    assert [row[0] for row in rows] == ["lora chosen", "galore", "lora", "full"]
    assert [row[5] for row in rows] == ["yes", "yes", "yes", "no"]
    for row, planned in zip(rows, (PLAN["candidates"][i] for i in (2, 1, 3, 0)), strict=True):
        share = 100 * planned["peak_bytes"] / PLAN["available_bytes"]
        assert row[2:5] == ["32", "no", f"{memory(planned['peak_bytes'])} ({share:.1f} %)"]
    assert "3 of 4 candidates fit on rtx-3060-12gb, which has 11.4 GiB available" in shown.text


def test_a_long_plan_folds_what_comes_after_the_first_candidates(run: Path) -> None:
    write_json(run / "plan.json", PLAN | {"candidates": PLAN["candidates"] * 5})
    shown = page(run)
    assert "10 more candidates" in shown.text
    assert sum(len(row) == 6 for row in shown.rows) == 20


def test_bars_are_to_scale(run: Path) -> None:
    bars = re.findall(r'<svg[^>]*class="bar">.*?</svg>', report.write(run).read_text(encoding="utf-8"))
    chosen = next(bar for bar in bars if "adapter: 11.0 MiB" in bar)
    widths = {kind: float(w) for w, kind in re.findall(r'width="([\d.]+)%"[^>]*class="k-(\w+)"', chosen)}
    for kind, bytes_ in PLAN["candidates"][2]["bytes"].items():
        assert widths[kind] / widths["weights"] == pytest.approx(bytes_ / (4043 * MIB), rel=1e-2, abs=1e-4)
    limit = float(re.search(r'x1="([\d.]+)%"[^>]*class="limit"', chosen)[1])  # type: ignore[index]
    assert limit / widths["weights"] == pytest.approx(11_675 / 4043, rel=1e-3)


def test_a_peak_above_the_sum_of_its_kinds_is_drawn_whole(run: Path) -> None:
    plan = json.loads((run / "plan.json").read_text())
    plan["candidates"][2]["peak_bytes"] += 512 * MIB
    write_json(run / "plan.json", plan)
    assert "other: 512 MiB" in page(run).text


def test_a_plan_without_available_memory_says_so(run: Path) -> None:
    write_json(run / "plan.json", {k: v for k, v in PLAN.items() if k != "available_bytes"})
    shown = page(run)
    assert "does not say how much memory is available" in shown.text
    assert shown.attributes("line", **{"class": "limit"}) == []


def test_a_plan_in_which_nothing_fits(run: Path) -> None:
    nothing = [candidate | {"fits": False} for candidate in PLAN["candidates"]]
    write_json(run / "plan.json", PLAN | {"candidates": nothing, "choice": None})
    assert "0 of 4 candidates fit" in page(run).text and "None was chosen." in page(run).text


def test_ledger_rows_equal_the_ledger(run: Path) -> None:
    shown = page(run)
    rows = {row[0]: row for row in shown.rows if row and row[0] in {r["artefact"] for r in LEDGER}}
    assert list(rows) == [r["artefact"] for r in LEDGER]
    for entry in LEDGER:
        row = rows[entry["artefact"]]
        assert [float(cell) for cell in row[1:3]] == [entry["metrics"]["accuracy"], entry["metrics"]["loss"]]
        assert row[3] == memory(entry["bytes"])
        assert row[4] == ("–" if entry["latency_ms"] is None else f"{entry['latency_ms']} ms")
        if entry["deviation"] is not None:
            assert float(row[6]) == pytest.approx(entry["deviation"], rel=0.05)
        assert row[5] == row[7] == "–"
        assert row[8:] == ["yes" if entry["kept"] else "", entry["note"]]


def test_language_model_ledger(run: Path) -> None:
    rows = [
        {"artefact": "base", "metrics": {"loss": 3.2}, "bytes": 1, "kept": True},
        {"artefact": "adapter", "metrics": {"loss": 2.1}, "bytes": 1, "kept": True},
        {
            "artefact": "onnx-int4",
            "metrics": {"loss": 2.2},
            "tokens_per_second": 41.53,
            "same_tokens": 0.9375,
            "kept": True,
        },
    ]
    write_json(run / "ledger.json", rows)
    shown = page(run)
    assert "Fine-tuning took loss from 3.200 to 2.100" in shown.text  # lower is better
    row = next(row for row in shown.rows if row and row[0] == "onnx-int4")
    assert row[4] == "41.5" and row[6] == "93.8 %"


def test_answers_stand_beside_what_should_be_said(run: Path) -> None:
    """Questions that only the device was asked have no other answers, and long ones are cut where nobody looks."""
    long = "x" * 500
    said = {
        "question": ["<b>2 + 2</b>", f"{long} end"],
        "reference": ["4", "start"],
        "base": ["5"],
        "tuned": [" 4"],
        "device": ["4", f"begin {long}"],
    }
    write_json(run / "answers.json", said)
    rows = [row for row in page(run).rows if row and (row[0] == "<b>2 + 2</b>" or row[0].endswith(" end"))]
    assert rows[0] == ["<b>2 + 2</b>", "4", "5", "4", "4"]
    assert rows[1][1:4] == ["start", "–", "–"]
    assert rows[1][0].startswith("…x") and rows[1][4].startswith("begin x") and rows[1][4].endswith("x…")
    (run / "answers.json").unlink()
    assert "Held-out examples" not in page(run).text


def test_a_lost_fine_tune_is_said(run: Path) -> None:
    write_json(run / "ledger.json", [row | {"kept": not row["artefact"].startswith("onnx")} for row in LEDGER])
    shown = page(run)
    assert "no exported artefact was good enough to keep" in shown.text
    assert shown.attributes("p", **{"class": "verdict bad"})
    worse = [LEDGER[0], LEDGER[1] | {"metrics": {"accuracy": 0.4}}]
    write_json(run / "ledger.json", worse)
    assert "Fine-tuning did not help: accuracy went from 0.5123 to 0.4000" in page(run).text


def test_a_resumed_run_draws_each_step_once_with_its_last_value(run: Path) -> None:
    points = read(run).series("step", "loss")
    assert [step for step, _ in points] == list(range(1, 401))
    written = events()
    repeated = [e["loss"] for e in written if e["event"] == "step" and e["step"] == 215]
    assert len(repeated) == 2 and dict(points)[215] == repeated[1]
    shown = page(run)
    assert len(shown.attributes("line", **{"class": "resumed"})) == 2  # on the loss curve and on the accuracy curve
    assert "3 min 32 s" in shown.text


def test_evaluations_are_drawn_and_listed(run: Path) -> None:
    shown = page(run)
    dots = [title for title in re.findall(r"evaluation accuracy at step (\d+): ([\d.]+)", shown.text)]
    expected = {e["step"]: e["metrics"] for e in events() if e["event"] == "evaluation"}
    assert {int(step): float(value) for step, value in dots} == {
        step: pytest.approx(metrics["accuracy"], abs=5e-5) for step, metrics in expected.items()
    }
    assert ["350", *(number(expected[350][name]) for name in ("accuracy", "loss")), "best"] in shown.rows
    assert sum(row[-1] == "best" for row in shown.rows if row) == 1


def test_steps_without_a_finite_loss_are_counted_not_drawn(run: Path) -> None:
    bad = [{"event": "step", "step": i, "loss": float("nan")} for i in (401, 402)]
    write_text(run / "events.jsonl", lines([*events(), *bad]))
    shown = page(run)
    assert "2 steps had a loss that is NaN or infinite" in shown.text
    assert all("nan" not in (a["points"] or "") for a in shown.attributes("polyline"))


def test_half_a_line_in_the_events_is_counted(run: Path) -> None:
    write_text(run / "events.jsonl", lines(events()[:100]) + '{"event": "step", "st')
    shown = page(run)
    assert "1 unreadable line" in shown.text
    assert "Training has not ended" in shown.text
    assert "There is no measurement: training has not ended" in shown.text


def test_recipe_is_shown_verbatim(run: Path) -> None:
    assert RECIPE in page(run).text


@pytest.mark.parametrize("missing", ["recipe.toml", "plan.json", "events.jsonl", "ledger.json"])
def test_a_missing_file_is_said(run: Path, missing: str) -> None:
    (run / missing).unlink()
    assert f"There is no {missing}" in page(run).text


def test_an_empty_run_directory_still_gives_a_page(tmp_path: Path) -> None:
    shown = page(tmp_path)
    assert "Nothing was done yet." in shown.text
    assert shown.text.count("There is no") == 4


@pytest.mark.parametrize(
    ("kept", "said"),
    [(["plan.json"], "Planned; not trained yet."), (["events.jsonl"], "Trained; no artefact was measured")],
)
def test_verdict_of_an_unfinished_run(run: Path, kept: list[str], said: str) -> None:
    for file in run.iterdir():
        if file.name not in kept:
            file.unlink()
    assert said in page(run).text


def test_everything_from_the_files_is_escaped(run: Path) -> None:
    evil = "</pre><script>alert('1')</script>\"&<b a='"
    write_text(run / "recipe.toml", f"# {evil}\n")
    write_json(
        run / "plan.json",
        PLAN | {"hardware": evil, "model": evil, "candidates": [candidate(evil, evil, True, **{evil: 3})], "choice": 0},
    )
    write_json(
        run / "ledger.json", [{"artefact": evil, "metrics": {evil: 1.5}, "bytes": 1, "kept": True, "note": evil}]
    )
    evaluation = {"event": "evaluation", "step": 1, "metrics": {evil: 0.5}, "best": True}
    write_text(run / "events.jsonl", lines([*events()[:9], evaluation]))
    shown = page(run)
    assert shown.text.count(evil) > 10
    assert not shown.attributes("script") and not [a for t, a in shown.tags if t == "b" and a]


def test_the_page_needs_nothing_from_elsewhere(run: Path) -> None:
    shown = page(run)
    assert {t for t, _ in shown.tags}.isdisjoint({"script", "link", "img", "iframe", "object", "use", "image", "base"})
    for _, attributes in shown.tags:
        assert attributes.keys().isdisjoint({"src", "href", "srcset", "xlink:href", "style"})
        assert not any(name.startswith("on") for name in attributes)
    assert "url(" not in shown.styles and "@import" not in shown.styles
    policy = shown.attributes("meta", **{"http-equiv": "Content-Security-Policy"})[0]["content"]
    assert policy == "default-src 'none'; style-src 'unsafe-inline'"


def test_every_style_class_exists(run: Path) -> None:
    shown = page(run)
    used = {name for _, a in shown.tags for name in (a.get("class") or "").split()}
    styled = set(re.findall(r"\.([a-z][\w-]*)", shown.styles))
    assert used <= styled, used - styled


def test_writing_again_changes_nothing_and_leaves_no_other_file(run: Path) -> None:
    before = {file.name for file in run.iterdir()}
    first = report.write(run).read_bytes()
    assert report.write(run).read_bytes() == first
    assert {file.name for file in run.iterdir()} == before | {"report.html"}


def test_no_run_directory(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="There is no run directory"):
        report.write(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("file", "content", "cause"),
    [
        ("plan.json", '{"hardware": "x"', "it is not JSON"),
        ("plan.json", "[]", "it holds a list where a dict belongs"),
        ("plan.json", json.dumps(PLAN | {"choice": 4}), "its choice 4 is none of its candidates"),
        ("plan.json", json.dumps(PLAN | {"candidates": [{"method": "lora"}]}), "an entry without precision"),
        ("ledger.json", '[{"artefact": "base", "kept": true}]', "an entry without metrics"),
        ("ledger.json", "[3]", "it holds a int where a dict belongs"),
    ],
)
def test_a_damaged_file_is_named_and_the_old_page_stays(run: Path, file: str, content: str, cause: str) -> None:
    old = report.write(run).read_bytes()
    write_text(run / file, content)
    with pytest.raises(EdgePeftError) as raised:
        report.write(run)
    assert str(run / file) in raised.value.fact and cause in raised.value.cause and raised.value.remedy
    assert (run / "report.html").read_bytes() == old
