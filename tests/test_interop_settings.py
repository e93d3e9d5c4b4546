"""A damaged adapter_config.json is refused by what is wrong with it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiny

from edgepeft import adapter, interop
from edgepeft.errors import EdgePeftError
from edgepeft.peft_config import FILE


@pytest.mark.parametrize(
    ("name", "options", "changed", "message"),
    [
        ("lora", {}, {"lora_alpha": 0}, "with lora_alpha = 0 cannot be read"),
        ("lora", {}, {"lora_alpha": float("nan")}, "a number above 0"),
        ("lora", {}, {"lora_alpha": "16"}, "a number above 0"),
        ("lora", {}, {"alpha_pattern": [1]}, "with alpha_pattern = [1] cannot be read"),
        ("lora", {}, {"alpha_pattern": {"q_proj": [1]}}, "does not describe the tensors"),
        ("lora", {}, {"task_type": ["CAUSAL_LM"]}, "Its task_type is ['CAUSAL_LM']"),
        ("lora", {}, {"base_model_name_or_path": 5}, "Its base_model_name_or_path is 5"),
        ("adalora", {"rank": 3, "budget": 2}, {"init_r": 0}, "a whole number above 0"),
        ("adalora", {"rank": 3, "budget": 2}, {"init_r": 3.5}, "a whole number above 0"),
        ("adalora", {"rank": 3, "budget": 2}, {"init_r": 2}, "init_r is 2, and there are layers of rank 3"),
        ("krona", {"rank": 2}, {"rank_pattern": {"q_proj": 0}}, "does not describe the tensors"),
    ],
)
def test_settings_that_mean_nothing_are_refused(
    name: str, options: dict[str, Any], changed: dict[str, Any], message: str, tmp_path: Path
) -> None:
    made, method = tiny.adapted("llama", name, **options)
    card = adapter.card(method, model=str(tiny.folder("llama")), task=made.task, precision="fp32", labels=None, seed=0)
    adapter.save(tmp_path / "ours", made.model, card)
    interop.convert(tmp_path / "ours", tmp_path / "theirs")
    config = json.loads((tmp_path / "theirs" / FILE).read_text())
    (tmp_path / "theirs" / FILE).write_text(json.dumps({**config, **changed}))
    with pytest.raises(EdgePeftError) as refusal:
        interop.convert(tmp_path / "theirs", tmp_path / "back")
    assert message in str(refusal.value) and refusal.value.remedy
    assert not (tmp_path / "back").exists()
