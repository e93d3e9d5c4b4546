"""The device's side, against torch: greedy tokens, sampling, streaming, a folder that was damaged, and life without torch."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import exported
import numpy as np
import onnx
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GenerationConfig, TemperatureLogitsWarper, TopPLogitsWarper

from edgepeft.errors import EdgePeftError, UsageError
from edgepeft.runtime import decode, manifest, sampling
from edgepeft.runtime.__main__ import main
from edgepeft.runtime.device import Device
from edgepeft.runtime.sessions import Graph, open_graphs
from edgepeft.runtime.text import Detokenizer, StopStrings

GENERATORS = ("causal-lm", "seq2seq")
TEXTS = [*dict.fromkeys(exported.CORPUS), "é", "👩‍💻", "東京🚀京東", " a  b ", "x\n\n y"]


def prompts(task: str, lengths: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """Random prompts of these lengths, padded on the left, and their mask."""
    random = np.random.default_rng(20 + len(lengths))
    ids = random.integers(3, len(exported.tokenizer(task)), (len(lengths), max(lengths)))
    mask = np.array([[0] * (max(lengths) - length) + [1] * length for length in lengths])
    return ids, mask


def torch_tokens(task: str, ids: np.ndarray, mask: np.ndarray, tokens: int, eos: int | None) -> np.ndarray:
    """What transformers generates greedily, (batch, tokens), without the prompt or the decoder's start token."""
    model = exported.model(task)
    model.generation_config.eos_token_id = None  # it would stand in for an ``eos`` of None
    start = ids.shape[1] if task == "causal-lm" else 1
    found = model.generate(
        torch.tensor(ids),
        attention_mask=torch.tensor(mask),
        generation_config=GenerationConfig(
            max_new_tokens=tokens,
            do_sample=False,
            eos_token_id=eos,
            pad_token_id=0 if eos is None else eos,
            decoder_start_token_id=model.config.decoder_start_token_id if task == "seq2seq" else None,
        ),
    )
    return found[:, start:].numpy()


def onnx_tokens(task: str, ids: np.ndarray, mask: np.ndarray, tokens: int, eos: int | None) -> np.ndarray:
    graphs = open_graphs(exported.folder(task), task, threads=1)
    start = 0 if task == "seq2seq" else None
    return decode.greedy(graphs, ids, mask, tokens, () if eos is None else (eos,), start)


@pytest.fixture(scope="module")
def device() -> Callable[[str], Device]:
    loaded = {task: Device.load(exported.folder(task), threads=1) for task in manifest.GRAPHS}
    return loaded.__getitem__


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """A device folder of its own, to be damaged."""
    return shutil.copytree(exported.folder("seq2seq"), tmp_path / "copy")


# Decoding


@pytest.mark.parametrize("task", GENERATORS)
@pytest.mark.parametrize("lengths", [[1], [9], [3, 9, 6]])
def test_greedy_tokens_are_those_of_transformers(task: str, lengths: list[int]) -> None:
    ids, mask = prompts(task, lengths)
    expected = torch_tokens(task, ids, mask, 16, eos=None)
    assert max(lengths) == 1 or len(np.unique(expected)) > 4, "a degenerate model would prove nothing"
    np.testing.assert_array_equal(onnx_tokens(task, ids, mask, 16, eos=None), expected)


@pytest.mark.parametrize("task", GENERATORS)
def test_a_row_ends_at_its_end_token_while_the_others_go_on(task: str) -> None:
    ids, mask = prompts(task, [3, 9, 6])
    eos = int(torch_tokens(task, ids, mask, 16, eos=None)[1, 2])
    expected = torch_tokens(task, ids, mask, 16, eos)
    assert (expected[1] == eos).sum() > 1
    np.testing.assert_array_equal(onnx_tokens(task, ids, mask, 16, eos), expected)


def test_a_single_prompt_stops_right_after_its_end_token() -> None:
    ids, mask = prompts("causal-lm", [9])
    eos = int(onnx_tokens("causal-lm", ids, mask, 16, eos=None)[0, 4])
    found = onnx_tokens("causal-lm", ids, mask, 16, eos)
    assert found.shape[1] <= 5 and found[0, -1] == eos


@pytest.mark.parametrize("lengths", [[23], [23, 4]])
def test_a_prompt_read_in_pieces_gives_the_logits_of_the_whole(
    lengths: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    ids, mask = prompts("causal-lm", lengths)
    positions = torch.tensor(mask).cumsum(-1).sub(1).clamp(min=0)
    with torch.no_grad():
        output = exported.model("causal-lm")(torch.tensor(ids), torch.tensor(mask), position_ids=positions)
    monkeypatch.setattr(decode, "PREFILL_TOKENS", 5)
    graph = Graph(exported.folder("causal-lm") / "model.onnx", threads=1)
    found = next(decode.causal_steps(graph, ids, mask))
    np.testing.assert_allclose(found, output.logits[:, -1].numpy(), rtol=1e-4, atol=1e-4)


def test_logits_that_are_not_numbers_end_the_generation() -> None:
    def steps() -> Iterator[Any]:
        yield np.zeros((1, 4), np.float32)
        yield np.full((1, 4), np.nan, np.float32)

    tokens = decode.generate(steps(), sampling.greedy, 5)  # type: ignore[arg-type]
    assert next(tokens) == [0]
    with pytest.raises(EdgePeftError, match="not a number at generated token 2"):
        next(tokens)


# Sampling


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.5])
@pytest.mark.parametrize("top_p", [1e-6, 0.4, 0.95, 1.0])
@pytest.mark.parametrize("spread", [0.01, 1.0, 8.0])
def test_the_distribution_is_that_of_transformers_in_float64(temperature: float, top_p: float, spread: float) -> None:
    logits = np.random.default_rng(1).normal(0, spread, 300).astype(np.float32)
    scores = torch.tensor(logits[None], dtype=torch.float64)
    scores = TemperatureLogitsWarper(temperature)(None, scores)
    scores = TopPLogitsWarper(top_p)(None, scores) if top_p < 1 else scores
    expected = scores.softmax(-1)[0].numpy()
    candidates, probabilities = sampling.distribution(logits, temperature, top_p)
    found = np.zeros(300)
    found[candidates] = probabilities
    np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-12)


def test_tokens_are_drawn_as_often_as_they_are_likely() -> None:
    logits = np.random.default_rng(2).normal(0, 1.5, 8).astype(np.float32)
    candidates, probabilities = sampling.distribution(logits, 0.8, 0.9)
    assert 2 < len(candidates) < 8
    draws = 20_000
    tokens = sampling.sampler(0.8, 0.9, seed=3)(np.tile(logits, (draws, 1)))
    share = np.bincount(tokens, minlength=8)[candidates] / draws
    five_sigma = 5 * np.sqrt(probabilities * (1 - probabilities) / draws)
    assert (np.abs(share - probabilities) < five_sigma).all()
    assert share.sum() == 1


def test_temperature_zero_is_greedy_and_a_low_one_nearly() -> None:
    logits = np.random.default_rng(4).normal(0, 1, (5, 50)).astype(np.float32)
    expected = torch.tensor(logits).argmax(-1).numpy()
    np.testing.assert_array_equal(sampling.sampler(0)(logits), expected)
    np.testing.assert_array_equal(sampling.sampler(1e-4, seed=0)(logits), expected)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((-1.0,), "temperature is -1.0"),
        ((float("nan"),), "temperature is nan"),
        ((1.0, 0.0), "Top-p is 0.0"),
        ((1.0, 1.5), "Top-p is 1.5"),
        ((1.0, 1.0, -3), "seed is -3"),
    ],
)
def test_sampling_values_out_of_range_are_refused(arguments: tuple[Any, ...], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        sampling.sampler(*arguments)


# Text


def byte_fallback_tokenizer() -> Tokenizer:
    """Like Llama 2's: what is not in the vocabulary is spelt in bytes, and the first space is stripped."""
    made = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    made.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    specials = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256))]
    made.train_from_iterator(
        ["the quick brown fox"], trainers.BpeTrainer(vocab_size=300, special_tokens=specials, show_progress=False)
    )
    # Trained as special tokens to get their places in the vocabulary; as such they would be dropped from the text.
    state = json.loads(made.to_str())
    state["added_tokens"] = [token for token in state["added_tokens"] if token["content"] == "<unk>"]
    return Tokenizer.from_str(json.dumps(state))


@pytest.mark.parametrize("kind", ["causal-lm", "classification", "seq2seq", "byte fallback"])
def test_pieces_add_up_to_the_whole_text_in_whole_characters(kind: str) -> None:
    tokenizer = byte_fallback_tokenizer() if kind == "byte fallback" else exported.tokenizer(kind).backend_tokenizer
    kept_back = 0
    for text in TEXTS:
        ids = tokenizer.encode(text).ids
        detokenizer = Detokenizer(tokenizer)
        pieces = [detokenizer.push(token) for token in ids]
        assert detokenizer.flush() == ""
        assert "".join(pieces) == tokenizer.decode(ids, skip_special_tokens=True)
        assert not any("\ufffd" in piece for piece in pieces)
        kept_back += pieces.count("")
    if kind in ("causal-lm", "byte fallback"):
        assert kept_back > 20, "no character was split over tokens, so nothing was shown"


def test_bytes_that_are_no_character_read_as_in_a_full_decode() -> None:
    tokenizer = exported.tokenizer("causal-lm").backend_tokenizer
    random = np.random.default_rng(5)
    for _ in range(200):
        ids = random.integers(0, tokenizer.get_vocab_size(), 12).tolist()
        detokenizer = Detokenizer(tokenizer)
        text = "".join(map(detokenizer.push, ids)) + detokenizer.flush()
        assert text == tokenizer.decode(ids, skip_special_tokens=True)


def cut_at_stop(text: str, stops: list[str]) -> str:
    """The plain reading of the rule: the first end of a stop string, and there the longest."""
    for end in range(len(text) + 1):
        if found := [stop for stop in stops if text[:end].endswith(stop)]:
            return text[: end - len(max(found, key=len))]
    return text


def test_stop_strings_cut_the_same_however_the_text_arrives() -> None:
    random = np.random.default_rng(6)
    stopped = 0
    for _ in range(2000):
        text = "".join(random.choice(list("abc"), random.integers(0, 12)))
        stops = ["".join(random.choice(list("abc"), random.integers(1, 5))) for _ in range(random.integers(0, 3))]
        cuts = sorted(random.integers(0, len(text) + 1, 3))
        pieces = [text[start:end] for start, end in zip([0, *cuts], [*cuts, len(text)], strict=True)]
        filtered = StopStrings(stops)
        found = "".join(map(filtered.push, pieces)) + filtered.flush()
        assert found == cut_at_stop(text, stops), (text, stops, pieces)
        assert filtered.stopped == any(stop in text for stop in stops)
        stopped += filtered.stopped
    assert stopped > 300


def test_text_that_cannot_become_a_stop_string_is_not_kept_back() -> None:
    filtered = StopStrings(["\nUser:"])
    assert filtered.push("Hello") == "Hello"
    assert filtered.push(" you\nUs") == " you"
    assert filtered.push("ually") == "\nUsually"
    with pytest.raises(UsageError, match="stop string is empty"):
        StopStrings(["a", ""])


# The device


def test_probabilities_are_those_of_torch(device: Callable[[str], Device]) -> None:
    text = "A film that is good, or bad; who knows? naïve façade"
    inputs = exported.tokenizer("classification")(text, return_tensors="pt")
    with torch.no_grad():
        output = exported.model("classification")(inputs["input_ids"], inputs["attention_mask"])
    expected = dict(zip(exported.LABELS, output.logits[0].softmax(-1).tolist(), strict=True))
    found = device("classification").classify(text)
    assert dict(found) == pytest.approx(expected, abs=1e-5)
    assert [label for label, _ in found] == sorted(expected, key=lambda label: -expected[label])


@pytest.mark.parametrize("task", GENERATORS)
def test_streamed_text_is_the_full_decode_of_transformers_tokens(task: str, device: Callable[[str], Device]) -> None:
    tokenizer = exported.tokenizer(task)
    text = "Grüße aus 東京"
    if task == "causal-lm":
        prompt = f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n"
        ids = np.array([tokenizer(prompt, add_special_tokens=False)["input_ids"]])
    else:
        ids = np.array([tokenizer(text)["input_ids"]])
    assert device(task).encode(text) == ids[0].tolist()
    eos = exported.model(task).config.eos_token_id
    expected = torch_tokens(task, ids, np.ones_like(ids), 24, eos)[0]
    generation = device(task).generate(text, max_new_tokens=24)
    pieces = list(generation)
    assert "".join(pieces) == tokenizer.decode(expected, skip_special_tokens=True)
    assert len(pieces) > 3
    assert (generation.prompt_tokens, generation.tokens) == (ids.shape[1], len(expected))


def test_a_prompt_is_one_user_message(device: Callable[[str], Device]) -> None:
    chat = device("causal-lm")
    assert chat.encode("Hi") == chat.encode([{"role": "user", "content": "Hi"}])
    system = chat.encode([{"role": "system", "content": "Short."}, {"role": "user", "content": "Hi"}])
    assert chat.tokenizer.decode(system, skip_special_tokens=False) == (
        "<|im_start|>system\nShort.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    )


def test_sampling_repeats_with_its_seed(device: Callable[[str], Device]) -> None:
    def sample(seed: int | None) -> str:
        return "".join(device("causal-lm").generate("Hi", max_new_tokens=12, temperature=3.0, top_p=0.99, seed=seed))

    assert sample(1) == sample(1)
    assert len({sample(seed) for seed in range(4)}) == 4
    assert sample(None) != sample(None)


def test_a_stop_string_ends_the_text_and_the_work(device: Callable[[str], Device]) -> None:
    full = device("causal-lm").generate("Hi", max_new_tokens=24)
    text = "".join(full)
    stop = text[len(text) // 2 :][:3]
    generation = device("causal-lm").generate("Hi", max_new_tokens=24, stop=["never seen", stop])
    assert "".join(generation) == text[: text.index(stop)]
    assert generation.tokens < full.tokens


def test_prompt_and_answer_together_keep_to_max_tokens(device: Callable[[str], Device]) -> None:
    chat = device("causal-lm")
    overhead = len(chat.encode(""))
    generation = chat.generate("q" * (exported.MAX_TOKENS - overhead - 4), max_new_tokens=50)
    list(generation)
    # The last token of an answer is not read again, so it may stand one place further.
    assert generation.prompt_tokens + generation.tokens == exported.MAX_TOKENS + 1
    with pytest.raises(UsageError, match=f"{exported.MAX_TOKENS + 1} tokens; the model takes {exported.MAX_TOKENS}"):
        chat.generate("q" * (exported.MAX_TOKENS - overhead + 1))


def test_what_a_model_cannot_do_is_said(device: Callable[[str], Device]) -> None:
    with pytest.raises(UsageError, match=r"tiny-classification is a classifier[^$]*Use classify"):
        device("classification").generate("text")
    with pytest.raises(UsageError, match=r"generates text \(seq2seq\)"):
        device("seq2seq").classify("text")
    with pytest.raises(UsageError, match="has 2 messages"):
        device("seq2seq").generate([{"role": "system", "content": "a"}, {"role": "user", "content": "b"}])
    with pytest.raises(UsageError, match="not valid Unicode"):
        device("seq2seq").generate("\udcff")
    with pytest.raises(UsageError, match="most new tokens is 0"):
        device("seq2seq").generate("text", max_new_tokens=0)


# A damaged folder


def test_every_file_is_checked_for_a_single_flipped_bit(copy: Path) -> None:
    names = sorted(path.name for path in copy.iterdir() if path.name != manifest.MANIFEST)
    assert {"decoder.onnx", "decoder.onnx.data", "encoder.onnx", "tokenizer.json"} <= set(names)
    for name in names:
        whole = (copy / name).read_bytes()
        tampered = bytearray(whole)
        tampered[len(whole) // 2] ^= 1
        (copy / name).write_bytes(tampered)
        with pytest.raises(EdgePeftError, match=rf"{name} is corrupt or was changed") as caught:
            Device.load(copy)
        assert "export` again" in caught.value.remedy and caught.value.exit_code == 1
        (copy / name).write_bytes(whole)
    Device.load(copy)


def test_a_truncated_or_missing_file_is_named(copy: Path) -> None:
    path = copy / "decoder.onnx.data"
    whole = path.read_bytes()
    path.write_bytes(whole[:-10])
    cause = rf"decoder.onnx.data is incomplete[^$]*has {len(whole) - 10} bytes; manifest.json says {len(whole)}"
    with pytest.raises(EdgePeftError, match=cause):
        Device.load(copy)
    path.unlink()
    with pytest.raises(EdgePeftError, match="decoder.onnx.data is missing"):
        Device.load(copy)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": 2}, "has format 2[^$]*reads format 1"),
        ({"task": "sing"}, "unknown task 'sing'"),
        ({"eos_token_ids": "1"}, "'eos_token_ids' has a value of the wrong type"),
        ({"eos_token_ids": [True]}, "'eos_token_ids' has a value of the wrong type"),
        ({"metrics": {"loss": "low"}}, "'metrics' has a value of the wrong type"),
        ({"decoder_start_token_id": None}, "needs 'decoder_start_token_id'"),
        ({"task": "classification"}, "needs 'labels'"),
        ({"files": {}}, "encoder.onnx, decoder.onnx, tokenizer.json, which it omits"),
        ({"model": ...}, "lacks 'model'"),
    ],
)
def test_a_manifest_that_makes_no_sense_is_refused(copy: Path, change: dict[str, Any], message: str) -> None:
    path = copy / manifest.MANIFEST
    values = {**json.loads(path.read_text()), **change}
    path.write_text(json.dumps({key: value for key, value in values.items() if value is not ...}))
    with pytest.raises(EdgePeftError, match=message):
        Device.load(copy)


@pytest.mark.parametrize("content", [b'{"format": 1, "task', b"[1]", b"\xff\xfe"])
def test_a_manifest_that_is_not_json_is_refused(copy: Path, content: bytes) -> None:
    (copy / manifest.MANIFEST).write_bytes(content)
    with pytest.raises(EdgePeftError, match="manifest.json is malformed"):
        Device.load(copy)


@pytest.mark.parametrize("name", ["../secret", "/etc/hostname", "sub/../../secret", "..\\secret", ".."])
def test_a_manifest_cannot_point_outside_its_folder(copy: Path, name: str) -> None:
    (copy.parent / "secret").write_text("x")
    path = copy / manifest.MANIFEST
    values = json.loads(path.read_text())
    values["files"][name] = {"sha256": manifest.sha256(copy.parent / "secret"), "bytes": 1}
    path.write_text(json.dumps(values))
    with pytest.raises(EdgePeftError, match="lies outside the folder"):
        Device.load(copy)


def test_a_link_cannot_point_outside_its_folder(copy: Path) -> None:
    moved = shutil.move(copy / "tokenizer.json", copy.parent / "elsewhere.json")
    (copy / "tokenizer.json").symlink_to(moved)
    with pytest.raises(EdgePeftError, match="'tokenizer.json', which lies outside the folder"):
        Device.load(copy)


def test_a_wrong_path_is_a_usage_error_with_a_hint(copy: Path) -> None:
    with pytest.raises(UsageError, match=r"copi is not a folder[^$]*Did you mean copy\?"):
        Device.load(copy.with_name("copi"))
    run = copy.parent / "run"
    shutil.copytree(copy, run / "device")
    with pytest.raises(UsageError, match=rf"not a device folder[^$]*Did you mean {run / 'device'}\?"):
        Device.load(run)


def test_a_graph_onnxruntime_cannot_read_is_named(tmp_path: Path) -> None:
    whole = (exported.folder("classification") / "model.onnx").read_bytes()
    for content in (b"", b"not a graph", whole[: len(whole) // 2], whole):  # the last lacks its external weights
        (tmp_path / "model.onnx").write_bytes(content)
        with pytest.raises(EdgePeftError, match="model.onnx could not be loaded by onnxruntime"):
            open_graphs(tmp_path, "classification", threads=1)
    with pytest.raises(EdgePeftError, match=r"encoder.onnx is missing[^$]*encoder.onnx, decoder.onnx"):
        open_graphs(tmp_path, "seq2seq")


def test_a_cache_of_open_size_is_refused(tmp_path: Path) -> None:
    folder = shutil.copytree(exported.graphs("causal-lm"), tmp_path / "graphs")
    graph = onnx.load(folder / "model.onnx", load_external_data=False)
    value = next(value for value in graph.graph.input if value.name == "past_key_values.0.key")
    value.type.tensor_type.shape.dim[3].dim_param = "head_dim"
    onnx.save(graph, folder / "model.onnx")
    ids, mask = prompts("causal-lm", [3])
    with pytest.raises(EdgePeftError, match=r"leaves the size of its cache open[^$]*past_key_values.0.key"):
        decode.greedy(open_graphs(folder, "causal-lm", threads=1), ids, mask, 2)


def test_a_graph_fed_the_wrong_names_says_which_graph_failed() -> None:
    graph = Graph(exported.folder("classification") / "model.onnx", threads=1)
    with pytest.raises(EdgePeftError, match="model.onnx failed while it ran"):
        graph.run({"tokens": np.ones((1, 3), np.int64)})


# The command line


def test_json_holds_the_answer_and_its_speed(capsys: pytest.CaptureFixture[str]) -> None:
    folder = str(exported.folder("seq2seq"))
    assert main([folder, "the quick fox", "--max-new-tokens", "6", "--json", "--threads", "1"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert main([folder, "the quick fox", "--max-new-tokens", "6"]) == 0
    assert capsys.readouterr().out == found["text"] + "\n"
    assert 1 <= found["tokens"] <= 6
    assert found["tokens_per_second"] == pytest.approx(found["tokens"] / found["seconds"], rel=0.05)


def test_options_reach_the_generation(capsys: pytest.CaptureFixture[str], device: Callable[[str], Device]) -> None:
    folder = str(exported.folder("causal-lm"))
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    options = ["--system", "Be brief.", "--temperature", "2", "--top-p", "0.9", "--seed", "7", "--max-new-tokens", "9"]
    expected = "".join(device("causal-lm").generate(messages, max_new_tokens=9, temperature=2.0, top_p=0.9, seed=7))
    assert main([folder, "Hi", *options, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["text"] == expected
    stop = expected[2:4]
    assert main([folder, "Hi", *options, "--json", "--stop", "never seen", "--stop", stop]) == 0
    assert json.loads(capsys.readouterr().out)["text"] == expected[: expected.index(stop)]


def test_errors_give_fact_cause_and_remedy_and_a_code(capsys: pytest.CaptureFixture[str], copy: Path) -> None:
    folder = str(exported.folder("classification"))
    assert main([folder, "text", "--system", "Be brief."]) == 2
    assert (
        capsys.readouterr().err == "tiny-classification is a classifier.\nIt takes no system message.\nDrop --system.\n"
    )
    assert main([folder, " "]) == 2
    assert "No text was given." in capsys.readouterr().err
    assert main([folder, "text", "--threads", "0"]) == 2
    assert "number of threads is 0" in capsys.readouterr().err
    assert main([str(copy), "text", "--system", "Be brief."]) == 2
    assert "has 2 messages" in capsys.readouterr().err
    (copy / "encoder.onnx").unlink()
    assert main([str(copy), "text"]) == 1
    captured = capsys.readouterr()
    assert "encoder.onnx is missing." in captured.err and captured.out == ""


# Without torch

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


def test_it_generates_without_torch(
    bare: Callable[..., subprocess.CompletedProcess[bytes]], device: Callable[[str], Device]
) -> None:
    done = bare(str(exported.folder("causal-lm")), "東京?", "--max-new-tokens", "12")
    assert (done.returncode, done.stderr) == (0, b"")
    assert done.stdout.decode() == "".join(device("causal-lm").generate("東京?", max_new_tokens=12)) + "\n"


def test_it_fails_without_a_traceback(bare: Callable[..., subprocess.CompletedProcess[bytes]], copy: Path) -> None:
    (copy / "tokenizer.json").write_text("{}")
    done = bare(str(copy), "text")
    assert done.returncode == 1 and done.stdout == b""
    assert b"tokenizer.json is incomplete" in done.stderr and b"Traceback" not in done.stderr
    done = bare(str(copy), text=b"\xff\xfe")
    assert done.returncode == 2 and b"not UTF-8" in done.stderr


def test_a_reader_that_leaves_is_no_error() -> None:
    folder = exported.folder("causal-lm")
    command = [sys.executable, "-m", "edgepeft.runtime", str(folder), "Hi", "--max-new-tokens", "60"]
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, cwd=Path(__file__).parents[1], timeout=60)
    os.close(writing)
    assert (done.returncode, done.stderr) == (1, b"")
