"""The command line of the device, also where torch and transformers cannot be imported."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import exported
import pytest

from edgepeft.runtime import manifest
from edgepeft.runtime.__main__ import main
from edgepeft.runtime.device import Device


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """A device folder of its own, to be damaged."""
    return shutil.copytree(exported.folder("seq2seq"), tmp_path / "copy")


def test_json_holds_the_answer_and_its_speed(capsys: pytest.CaptureFixture[str]) -> None:
    folder = str(exported.folder("seq2seq"))
    assert main([folder, "the quick fox", "--max-new-tokens", "6", "--json", "--threads", "1"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert main([folder, "the quick fox", "--max-new-tokens", "6"]) == 0
    assert capsys.readouterr().out == found["text"] + "\n"
    assert 1 <= found["tokens"] <= 6
    assert found["tokens_per_second"] == pytest.approx(found["tokens"] / found["seconds"], rel=0.05)


def test_options_reach_the_generation(capsys: pytest.CaptureFixture[str]) -> None:
    folder = str(exported.folder("causal-lm"))
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    options = ["--system", "Be brief.", "--temperature", "2", "--top-p", "0.9", "--seed", "7", "--max-new-tokens", "9"]
    expected = "".join(
        Device.load(exported.folder("causal-lm")).generate(
            messages, max_new_tokens=9, temperature=2.0, top_p=0.9, seed=7
        )
    )
    assert main([folder, "Hi", *options, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["text"] == expected
    stop = expected[2:4]
    assert main([folder, "Hi", *options, "--json", "--stop", "never seen", "--stop", stop]) == 0
    assert json.loads(capsys.readouterr().out)["text"] == expected[: expected.index(stop)]


def test_errors_give_fact_cause_and_remedy_and_a_code(capsys: pytest.CaptureFixture[str], copy: Path) -> None:
    folder = str(exported.folder("classification"))
    assert main([folder, "text", "--system", "Be brief."]) == 2
    assert capsys.readouterr().err == "tiny-classification is a classifier.\nIt generates no text.\nDrop --system.\n"
    for flags in (["--temperature", "0"], ["--max-new-tokens", "-4"], ["--seed", "1"], ["--stop", "."]):
        assert main([folder, "text", *flags]) == 2
        assert f"Drop {flags[0]}." in capsys.readouterr().err
    assert main([str(copy), "text", "--max-new-tokens", "-4"]) == 2
    assert "most new tokens is -4" in capsys.readouterr().err
    for flags in (["--top-p", "0.9", "--seed", "1"], ["--top-p", "0.9", "--seed", "1", "--temperature", "0"]):
        assert main([str(copy), "text", *flags]) == 2
        assert "--top-p and --seed would change nothing." in capsys.readouterr().err
    assert main([folder, " "]) == 2
    assert "No text was given." in capsys.readouterr().err
    assert main([folder, "text", "--threads", "0"]) == 2
    assert "number of threads is 0" in capsys.readouterr().err
    assert main([folder, "text", "--threads", "100000"]) == 2
    assert f"this machine has {os.cpu_count()} cores" in capsys.readouterr().err
    assert main([str(copy), "text", "--system", "Be brief."]) == 2
    assert "has 2 messages" in capsys.readouterr().err
    (copy / "encoder.onnx").unlink()
    assert main([str(copy), "text"]) == 1
    captured = capsys.readouterr()
    assert "encoder.onnx is missing." in captured.err and captured.out == ""


BLOCKER = """
import atexit, pathlib, sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {"torch", "transformers", "jinja2", "onnx", "datasets", "accelerate", "peft"}:
            raise ImportError(f"{name} is not on this device")

before = set(sys.modules)

def installed():
    paths = {name: getattr(sys.modules[name], "__file__", None) or "" for name in set(sys.modules) - before}
    return sorted({name.partition(".")[0] for name, path in paths.items() if "site-packages" in path})

sys.meta_path.insert(0, Blocker())
atexit.register(lambda: pathlib.Path(__file__).with_name("installed").write_text(" ".join(installed())))
"""


@pytest.fixture
def bare(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[bytes]]:
    """Runs the command line where torch and its like cannot be imported, and checks what it did import."""
    blocker = tmp_path / "blocker"
    blocker.mkdir()
    (blocker / "sitecustomize.py").write_text(BLOCKER)
    path = os.pathsep.join([str(blocker), str(Path(__file__).parents[1])])

    def run(*arguments: str, text: bytes = b"") -> subprocess.CompletedProcess[bytes]:
        command = [sys.executable, "-m", "edgepeft.runtime", *arguments]
        done = subprocess.run(
            command, input=text, capture_output=True, env={**os.environ, "PYTHONPATH": path}, cwd=tmp_path, timeout=60
        )
        imported = set((blocker / "installed").read_text().split())
        assert imported == {"numpy", "onnxruntime", "tokenizers"}
        return done

    return run


def test_it_classifies_without_torch(bare: Callable[..., subprocess.CompletedProcess[bytes]]) -> None:
    text = "A film that is good."
    done = bare(str(exported.folder("classification")), text=f"{text}\n".encode())
    assert (done.returncode, done.stderr) == (0, b"")
    expected = Device.load(exported.folder("classification"), threads=1).classify(text)
    rows = [line.split("\t") for line in done.stdout.decode().splitlines()]
    assert [label for label, _ in rows] == [label for label, _ in expected]
    assert [float(share) for _, share in rows] == pytest.approx([share for _, share in expected], abs=1e-4)


def test_it_generates_without_torch(bare: Callable[..., subprocess.CompletedProcess[bytes]]) -> None:
    done = bare(str(exported.folder("causal-lm")), "東京?", "--max-new-tokens", "12")
    assert (done.returncode, done.stderr) == (0, b"")
    assert (
        done.stdout.decode()
        == "".join(Device.load(exported.folder("causal-lm")).generate("東京?", max_new_tokens=12)) + "\n"
    )


def test_it_fails_without_a_traceback(bare: Callable[..., subprocess.CompletedProcess[bytes]], copy: Path) -> None:
    (copy / "tokenizer.json").write_text("{}")
    done = bare(str(copy), "text")
    assert done.returncode == 1 and done.stdout == b""
    assert b"tokenizer.json is incomplete" in done.stderr and b"Traceback" not in done.stderr
    done = bare(str(copy), text=b"\xff\xfe")
    assert done.returncode == 2 and b"not UTF-8" in done.stderr


def test_an_answer_that_the_terminal_has_no_characters_for_is_escaped(tmp_path: Path) -> None:
    """A classifier's labels are text that is known to come out."""
    folder = shutil.copytree(exported.folder("classification"), tmp_path / "device")
    labels = ["b\u00f6se \U0001f642", "good", "so so"]
    manifest.write(folder, dataclasses.replace(manifest.read(folder), labels=labels))
    latin = {**os.environ, "PYTHONIOENCODING": "ascii"}
    command = [sys.executable, "-m", "edgepeft.runtime", str(folder), "text"]
    told = subprocess.run(command, env=latin, check=True, capture_output=True, text=True, encoding="ascii").stdout
    assert r"b\xf6se \U0001f642" in told
    found = subprocess.run([*command, "--json"], env=latin, check=True, capture_output=True, encoding="ascii").stdout
    assert set(json.loads(found)["probabilities"]) == set(labels)


def test_a_reader_that_leaves_is_no_error() -> None:
    folder = exported.folder("causal-lm")
    command = [sys.executable, "-m", "edgepeft.runtime", str(folder), "Hi", "--max-new-tokens", "60"]
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, cwd=Path(__file__).parents[1], timeout=60)
    os.close(writing)
    assert (done.returncode, done.stderr) == (1, b"")
