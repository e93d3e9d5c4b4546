"""Models and data sets by hub id, fetched by the real clients from a hub on this machine."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import hub
import training


def edgepeft(address: str, home: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the command in a process of its own, since hub clients read their address when they are imported."""
    offline = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE")
    environment = {name: value for name, value in os.environ.items() if name not in offline}
    environment |= {"HF_ENDPOINT": address, "HF_HOME": str(home), "EDGEPEFT_CACHE": str(home / "traces")}
    command = [sys.executable, "-m", "edgepeft.cli", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)


def test_a_hub_model_is_trained_on_a_hub_data_set(tmp_path: Path) -> None:
    source = training.source("classification")
    data = tmp_path / "reviews"
    data.mkdir()
    rows = [json.loads(line) for line in (source / "data.jsonl").read_text().splitlines()]
    for split, part in (("train", rows[:16]), ("validation", rows[16:])):
        (data / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    with hub.serve({"owner/tiny": source / "model"}, {"owner/reviews": data}) as address:
        out = tmp_path / "run"
        options = ("--method", "lora", "--precision", "fp32", "--set", "max_steps=2", "--set", "global_batch=4")
        done = edgepeft(
            address, tmp_path / "home", "train", "--model", "owner/tiny", "--data", "owner/reviews", "--out", str(out),
            *options,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert "16 to train on, 6 to validate" in done.stderr
        assert (out / "adapter" / "adapter.safetensors").exists()

        missing = edgepeft(
            address, tmp_path / "home", "train", "--model", "owner/tiny", "--data", "owner/nothing",
            "--out", str(tmp_path / "other"),
        )  # fmt: skip
    assert missing.returncode == 2 and "Traceback" not in missing.stderr
    assert "The data set owner/nothing could not be loaded." in missing.stderr
    assert not (tmp_path / "other" / "recipe.toml").exists()
