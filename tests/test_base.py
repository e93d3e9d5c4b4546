"""How methods are found, named and given hyper-parameters."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
from conformance import train

from edgepeft import adapter, probe
from edgepeft.errors import UsageError
from edgepeft.methods import base

ROOT = Path(__file__).resolve().parent.parent


def test_names_aliases_and_dotted_paths() -> None:
    assert base.find("qlora") is base.find("lora") is base.find("edgepeft.methods.lora")
    assert base.implied_precision("qlora") == "nf4" and base.implied_precision("lora") is None
    assert base.create("qlora", {"rank": 2}).name == "lora"


STRANGER = '''
from dataclasses import dataclass
from edgepeft.methods.base import Method, Paper
from edgepeft.placements import selection

@dataclass(frozen=True, kw_only=True)
class BitFit(Method):
    """Train the biases."""

    paper = Paper("BitFit", 2021, "2106.10199")
    kind = "selective"

    def inject(self, model, anatomy):
        selection.train(model, [name for name, _ in model.named_parameters() if name.endswith(".bias")])
'''


def test_a_strangers_method_works_by_dotted_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "strange").mkdir()
    (tmp_path / "strange" / "bitfit.py").write_text(STRANGER)
    (tmp_path / "strange" / "empty.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    made, method = tiny.adapted("bert", "strange.bitfit")
    assert method.name == "strange.bitfit"
    assert {name.rpartition(".")[2] for name in adapter.trained(made.model)} == {"bias", "weight"}
    losses = train(made.model, method, method.stages()[0], tiny.batch("bert"), 5)
    assert losses[-1] < losses[0]
    with pytest.raises(UsageError, match="holds 0 methods"):
        base.find("strange.empty")
    with pytest.raises(UsageError, match="There is no method 'strange.nothing'"):
        base.find("strange.nothing")


@pytest.mark.parametrize(
    ("code", "told"),
    [
        ("raise RuntimeError('no luck')", ("fails when it is imported", "RuntimeError: no luck", "odd.py, line 1")),
        ("x = 1\ndef inject(:\n", ("fails when it is imported", "SyntaxError", "odd.py, line 2")),
        ("import nothing_like_it", ("fails when it is imported", "nothing_like_it", "odd.py, line 1")),
        (
            STRANGER.replace("selection.train(", "model.nothing("),
            ("when it is put into a model", "'nothing'", "line 14"),
        ),
        (STRANGER.replace('".bias"', '".none"'), ("trains nothing", "requires_grad")),
        (STRANGER.replace("def inject", "def inspect"), ("fails when it is made", "abstract method")),
    ],
)
def test_a_strangers_mistakes_are_told(
    code: str, told: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = f"mistaken{abs(hash(code))}"
    (tmp_path / package).mkdir()
    (tmp_path / package / "odd.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    model = {"attention_bias": True, **tiny.load("llama").model.config.to_dict()}
    with pytest.raises(UsageError) as caught:
        probe.refuse(model, "causal-lm", base.create(f"{package}.odd"))
    assert all(part in str(caught.value) for part in told), str(caught.value)


def test_a_strangers_method_is_found_in_the_current_folder(tmp_path: Path) -> None:
    """Where Python would not look for it: the ``edgepeft`` script starts with a path of its own."""
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "bitfit.py").write_text(STRANGER)
    code = "import sys; before = list(sys.path); from edgepeft.methods import base; print(base.find('mine.bitfit')); "
    command = [sys.executable, "-P", "-c", f"{code} assert sys.path == before"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert "BitFit" in done.stdout, done.stderr


def test_unknown_method() -> None:
    with pytest.raises(UsageError, match="There is no method 'loar'") as caught:
        base.create("loar")
    assert "lora" in caught.value.remedy


@pytest.mark.parametrize(
    ("name", "options", "part"),
    [
        ("lora", {"ranks": 4}, "Did you mean rank"),
        ("lora", {"rank": 4.0}, "with rank = 4.0.\nIt must be a whole number"),
        ("lora", {"rank": True}, "with rank = True.\nIt must be a whole number"),
        ("lora", {"alpha": True}, "with alpha = True.\nIt must be a number"),
        ("lora", {"targets": 8}, "with targets = 8.\nIt must be a list of texts"),
        ("lora", {"targets": [1]}, "with targets = (1,).\nIt must be a list of texts"),
        ("lora", {"rank": 0}, "with rank = 0.\nIt must be at least 1"),
        ("lora", {"dropout": 1.0}, "with dropout = 1.0.\nIt must be a probability below 1"),
        ("galore", {"rank": 0}, "with rank = 0.\nIt must be at least 1"),
        ("galore", {"period": 0}, "with period = 0.\nIt must be at least 1"),
        ("lst", {"layers": 0.0}, "with layers = 0.0.\nIt must be a share"),
        ("lst", {"layers": 1.5}, "with layers = 1.5.\nIt must be a share"),
        ("full", {"rank": 4}, "It has none."),
        ("lora", {"alpha": float("nan")}, "with alpha = nan.\nIt must be a number"),
        ("lora", {"alpha": float("inf")}, "with alpha = inf.\nIt must be a number"),
        ("lora", {"alpha": 10**400}, "It must be a number"),
        ("lora", {"dropout": -0.1}, "It must be a probability below 1"),
        ("intrinsic_said", {"scales": 1}, "with scales = 1.\nIt must be true or false"),
        *((name, {"alpha": -1.0}, "with alpha = -1.0.\nIt must be above 0") for name in ("lora", "dora", "adalora")),
        *((name, {"scale": 0.0}, "It must be above 0") for name in ("krona", "krona_res", "galore", "mam")),
        *((name, {"density": 1.5}, "It must be a share") for name in ("fish_mask", "lt_sft", "diff_pruning")),
    ],
)
def test_options_are_checked(name: str, options: dict[str, object], part: str) -> None:
    with pytest.raises(UsageError) as caught:
        base.create(name, options)
    assert part in str(caught.value) and f"edgepeft methods {name}" in caught.value.remedy


@pytest.mark.parametrize(
    ("name", "options", "next_step"),
    [
        *((name, {"rank": 33}, "options.rank=4") for name in ("lora", "dora", "adalora", "glora", "unipelt", "s4")),
        ("galore", {"rank": 32}, "options.rank=8"),
        ("compacter", {"rank": 3}, "options.rank=2"),
        ("lora", {"targets": []}, "some of what it has: ffn_in, ffn_out, key"),
        ("lora", {"targets": ["cross_key"]}, "some of what it has: ffn_in, ffn_out, key"),
        ("lora", {"targets": ["q_proj"]}, "Known: cross_key"),
    ],
)
def test_what_does_not_fit_the_model_is_refused_with_what_does(
    name: str, options: dict[str, object], next_step: str
) -> None:
    made = tiny.load("llama")  # of width 32, whose keys and values are of width 16
    with pytest.raises(UsageError) as caught:
        base.apply(tiny.method(name, **options), made)
    assert caught.value.fact.startswith(name) and caught.value.cause and next_step in caught.value.remedy


def test_a_rank_that_only_some_layers_can_have_is_one() -> None:
    base.apply(tiny.method("lora", rank=32), tiny.load("llama"))


def test_whole_numbers_are_floats_too_and_lists_are_tuples() -> None:
    method = base.create("lora", {"alpha": 4, "targets": ["query"]})
    assert vars(method)["alpha"] == 4 and vars(method)["targets"] == ("query",)


@pytest.mark.parametrize("name", ["full", "galore"])
@pytest.mark.parametrize("at", ["nf4", "int8"])
def test_packed_weights_cannot_be_written(name: str, at: str) -> None:
    with pytest.raises(UsageError, match=f"{name} cannot train on {at} weights") as caught:
        tiny.adapted("llama", name, at)
    assert "lora" in caught.value.remedy


def test_a_new_head_is_trained_with_every_method_in_the_same_order_everywhere() -> None:
    """In half precision the order of the parameters follows the order in which they become trainable."""
    orders = []
    for fresh in (["classifier.weight", "classifier.bias"], ["classifier.bias", "classifier.weight"]):
        made = tiny.load("bert", "bf16")
        assert made.fresh == set(fresh)
        shuffled = type("Ordered", (frozenset,), {"__iter__": lambda self, order=fresh: iter(order)})(fresh)
        object.__setattr__(made, "fresh", shuffled)
        base.apply(tiny.method("ln_tuning"), made)
        orders.append(list(adapter.trained(made.model)))
    assert orders[0] == orders[1]
    assert {"classifier.weight", "classifier.bias"} <= set(orders[0])
