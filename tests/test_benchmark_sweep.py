"""The methods benchmark: which runs of a row are still to be done."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parent.parent / "benchmarks"))

import sweep
import tuning
from edgepeft.methods import base

Losses = dict[float, float]


def runs(losses: Losses, *, seeds: tuple[float, ...] = ()) -> dict[sweep.Key, dict[str, Any]]:
    """Finished runs at seed 0 with these losses by factor, and runs at seed 1 of ``seeds``."""
    found: dict[sweep.Key, dict[str, Any]] = {(factor, 0): {"dev": {"loss": loss}} for factor, loss in losses.items()}
    return found | {(factor, 1): {"dev": {"loss": 0.0}} for factor in seeds}


def test_a_factor_means_the_rate_that_it_meant_when_runs_were_made() -> None:
    bench = tuning.BENCHES["smollm2"]
    assert sweep.rate(bench, tuning.Row("lora", "bf16"), 3.0) == 3 * bench.scale * base.find("lora").learning_rate


def test_three_rates_come_first() -> None:
    assert sweep.wanted({}) == sweep.wanted(runs({3.0: 0.5})) == [(3.0, 0), (10.0, 0), (1.0, 0)]


def test_a_best_rate_in_the_middle_runs_again_at_another_seed() -> None:
    found = runs({1.0: 0.6, 3.0: 0.5, 10.0: 0.7})
    assert sweep.wanted(found)[3:] == [(3.0, 1)]
    assert not sweep.complete(found)
    assert sweep.complete(found | runs({}, seeds=(3.0,)))


def test_beyond_an_end_only_one_more_rate_is_tried() -> None:
    found = runs({1.0: 0.7, 3.0: 0.6, 10.0: 0.5})
    assert sweep.wanted(found)[3:] == [(30.0, 0)]
    assert sweep.wanted(found | runs({30.0: 0.4}))[3:] == [(30.0, 0), (30.0, 1)]
    assert sweep.wanted(found | runs({30.0: 0.9}))[3:] == [(30.0, 0), (10.0, 1)]


def test_a_rate_that_diverged_is_not_the_best() -> None:
    found = runs({1.0: 0.7, 3.0: 0.6}) | {(10.0, 0): {"failed": "The loss became nan at step 3."}}
    assert sweep.wanted(found)[3:] == [(3.0, 1)]


def test_a_refused_row_wants_nothing_more() -> None:
    found = {(3.0, 0): {"refused": "It finds no biases."}}
    assert sweep.wanted(found) == [(3.0, 0)] and sweep.complete(found)


def test_nothing_is_not_complete() -> None:
    assert not sweep.complete({})
