"""What running a model on a device takes, before it is exported: memory at each ONNX precision, and speed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import nn
from transformers import PretrainedConfig

from edgepeft import anatomy, backbone, hardware, recipe, roofline, tasks
from edgepeft.errors import UsageError
from edgepeft.export.packing import BLOCK
from edgepeft.export.quantize import BITS, PROTECTED, SMALLEST
from edgepeft.hardware import Hardware
from edgepeft.runtime.manifest import PREFILL_TOKENS

Verdict = Literal["FITS", "TIGHT", "NO"]
PRECISIONS = ("fp32", *BITS)
DEFAULT_TOKENS = 512
SHORTEST = 32  # tokens: shorter contexts are not proposed
SINGLE = 4  # bytes of fp32, which everything that is not quantised is in
PROCESS_BYTES = 70 << 20
"""Python, numpy, onnxruntime 1.31 and tokenizers, 51 MiB, and a tokenizer of 49,152 tokens, 18 MiB: resident memory
measured on x86-64 Linux."""
TIGHT = 0.9  # of what is free: the rest is for what a system does beside


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One precision: bytes of weights, of keys and values at the context length, of the rest; and tokens per second.

    Reading is of a prompt that fills the context, writing is at the end of one. A classifier has no cache, and reads
    but does not write.
    """

    precision: str
    weights_bytes: int
    cache_bytes: int
    working_bytes: int
    needed_bytes: int
    verdict: Verdict
    read_tokens_per_second: float
    write_tokens_per_second: float | None


@dataclass(frozen=True, kw_only=True)
class InferencePlan:
    """Every precision, the most exact first."""

    hardware: Hardware
    model: str
    tokens: int
    variants: tuple[Variant, ...]

    @property
    def fits(self) -> bool:
        """Whether any precision does."""
        return any(variant.verdict != "NO" for variant in self.variants)

    @property
    def lengths(self) -> str:
        """What the speeds are for."""
        writing = "" if self.variants[0].write_tokens_per_second is None else ", and of writing after as many"
        return f"Speeds are of reading {self.tokens} tokens{writing}, on {self.hardware.title}."

    def as_json(self) -> dict[str, Any]:
        """Plain data for ``--json``."""
        return {
            "hardware": self.hardware.name,
            "available_bytes": self.hardware.available_bytes,
            "model": self.model,
            "tokens": self.tokens,
            "variants": [asdict(variant) for variant in self.variants],
        }


def plan(*, name: str, config: PretrainedConfig, task: str, device: Hardware, tokens: int) -> InferencePlan:
    """Size and time a model that need not be here.

    Args:
        tokens: the context: prompt and answer together; for seq2seq the length of each.

    Raises:
        UsageError: fewer than two tokens.
    """
    if tokens < 2:
        raise UsageError(f"A context of {tokens} tokens holds no question and answer.", "", "Use --seq-len 512.")
    recipe.check_count("plan: --seq-len", tokens, recipe.MOST["max_tokens"])
    with torch.device("meta"):
        model: Any = backbone.skeleton(config, task=task, at="fp32").model
    variants = tuple(_variant(model, task, at, device, tokens) for at in PRECISIONS)
    return InferencePlan(hardware=device, model=name, tokens=tokens, variants=variants)


def plan_model(
    source: backbone.Source, device: Hardware, *, task: str | None, tokens: int | None, trust_remote_code: bool
) -> InferencePlan:
    """What ``edgepeft plan --infer`` does.

    Raises:
        UsageError: an unknown task, or a context longer than the model's positions.
    """
    config = backbone.config(source, trust_remote_code=trust_remote_code)
    most = backbone.positions(config)
    if tokens is not None and most is not None and tokens > most:
        raise UsageError(
            f"{source.name} cannot read {tokens} tokens.", f"It has {most} positions.", f"Use --seq-len {most} or less."
        )
    return plan(
        name=source.name,
        config=config,
        task=task or tasks.usual_task(config),
        device=device,
        tokens=min(DEFAULT_TOKENS, most or DEFAULT_TOKENS) if tokens is None else tokens,
    )


def remedy(failed: InferencePlan, again: Callable[[int], InferencePlan], reserve_bytes: int = 0) -> str:
    """What would fit where nothing does.

    Args:
        again: plans for another number of tokens.
        reserve_bytes: what is to be left to others, on any device.
    """
    need = min(variant.needed_bytes for variant in failed.variants) + reserve_bytes
    runners = [each for each in (hardware.load(name).runner for name in hardware.names()) if each is not None]
    roomy = [each for each in runners if each.available_bytes >= need]
    ways = [f"--target {each.name}" for each in sorted(roomy, key=lambda each: each.available_bytes)][:1]
    tokens = failed.tokens // 2
    while tokens >= SHORTEST and not again(tokens).fits:
        tokens //= 2
    if tokens >= SHORTEST:
        ways.append(f"--seq-len {tokens}")
    return f"What would: {'; '.join(ways)}." if ways else "A smaller model needs less; no profile has as much memory."


def weights_bytes(model: Any, task: str, precision: str) -> int:
    """Bytes of the weights of the exported graphs; ``export.quantize`` says what is stored how."""
    size = sum(_stored(each.tensor, each.kind, task, precision) for each in _weights(model))
    if task == "seq2seq":  # encoder and decoder are graphs of their own, and both look tokens up
        size += _stored(model.get_input_embeddings().weight, "lookup", task, precision)
    return size


def cache_bytes(model: Any, task: str, tokens: int) -> int:
    """Bytes of keys and values after ``tokens`` tokens, from the cache that the model itself makes."""
    if task == "classification":
        return 0
    ids = torch.ones(1, 2, dtype=torch.long, device="meta")
    inputs = {"decoder_input_ids": ids} if task == "seq2seq" else {}
    with torch.no_grad():
        made = model(input_ids=ids, use_cache=True, **inputs).past_key_values
    stacks = (made.self_attention_cache, made.cross_attention_cache) if task == "seq2seq" else (made,)
    layers = [layer for stack in stacks for layer in stack.layers]
    each = sum(t.numel() // t.shape[-2] for layer in layers for t in (layer.keys, layer.values))
    return each * tokens * SINGLE


def _variant(model: Any, task: str, precision: str, hardware: Hardware, tokens: int) -> Variant:
    weights, cache = weights_bytes(model, task, precision), cache_bytes(model, task, tokens)
    working = PROCESS_BYTES + _repacked_bytes(model, task, precision) + _activation_bytes(model, task, tokens)
    needed = weights + cache + working
    share = needed / hardware.available_bytes
    reading, writing = _speeds(model, task, precision, hardware, tokens, cache)
    return Variant(
        precision=precision,
        weights_bytes=weights,
        cache_bytes=cache,
        working_bytes=working,
        needed_bytes=needed,
        verdict="NO" if share > 1 else "TIGHT" if share > TIGHT else "FITS",
        read_tokens_per_second=reading,
        write_tokens_per_second=writing,
    )


def _speeds(
    model: Any, task: str, precision: str, hardware: Hardware, tokens: int, cache: int
) -> tuple[float, float | None]:
    """Tokens per second of reading a prompt and of writing: the roofline, with two operations a weight and token.

    The int8 kernels multiply integers; so do the int4 ones, once they have unpacked the weights. Attention, and what is
    protected from quantisation, is computed in fp32.
    """
    found = anatomy.find(model)
    read, written = _passes(model, task, found)
    first, *others = found.stacks
    last = others[-1] if others else first

    def seconds(passed: list[_Weight], operation: str, attention: float) -> float:
        work = {"fp32": 0, "int8": 0}
        for each in passed:
            if each.kind != "plain":  # norms and biases
                integer = precision != "fp32" and each.kind != "protected"
                work["int8" if integer else "fp32"] += 2 * each.tensor.numel()

        def rate(operation: str, dtype: str = "fp32") -> float:
            return roofline.peak(hardware, dtype) * roofline.reached(hardware, operation, dtype)

        products = sum(flops / rate(operation, dtype) for dtype, flops in work.items())
        return products + attention / rate("attention")

    # A decoder's piece of a prompt attends to all before it and to itself: on average to half of the prompt and a half.
    attended = (tokens + min(tokens, PREFILL_TOKENS)) / 2 if task == "causal-lm" else tokens
    reading = 1 / seconds(read, "matmul", _attention(model, found, first) * attended)
    if task == "classification":
        return reading, None
    # A decoder beside an encoder attends twice: to what it wrote, and to what the encoder read.
    computing = seconds(written, "thin", len(found.stacks) * _attention(model, found, last) * tokens)
    size = sum(_stored(each.tensor, each.kind, task, precision) for each in written)
    moving = (size + cache) / (hardware.bandwidth * roofline.reached(hardware, "elementwise"))
    return reading, 1 / max(computing, moving)


def _passes(model: Any, task: str, found: anatomy.Anatomy) -> tuple[list[_Weight], list[_Weight]]:
    """The weights that a token passes when it is read, and those that it passes when it is written.

    Tables that tokens are looked up in are neither. The encoder's graph reads: that is the encoder, and the keys and
    values of cross-attention, which are made once. The decoder's graph writes: that is the rest, with the head.
    """
    passed = [each for each in _weights(model) if each.kind != "lookup"]
    if task != "seq2seq":
        return passed, passed
    crossing = set(found.linears(("cross_key", "cross_value")))
    encoder = f"{found.stacks[0].owner}."
    read = [each.module.startswith(encoder) or each.module in crossing for each in passed]
    return (
        [each for each, reads in zip(passed, read, strict=True) if reads],
        [each for each, reads in zip(passed, read, strict=True) if not reads],
    )


def _attention(model: Any, found: anatomy.Anatomy, stack: anatomy.Stack) -> int:
    """FLOP of a token that attends to one: a product of query and key, and one of score and value, in each layer.

    Both are of all heads together, which is what the projection of the output reads.
    """
    outputs = [block.linears["output"][0] for block in found.blocks if block.path.startswith(f"{stack.layers}.")]
    return sum(4 * model.get_submodule(name).in_features for name in outputs)


def _repacked_bytes(model: nn.Module, task: str, precision: str) -> int:
    """onnxruntime lays integer weights out anew for its kernels and keeps what it read; fp32 ones it replaces.

    SmolLM2-135M, measured after loading: fp32 527 MiB for 515 of weights, int8 221 MiB for 147.
    """
    if precision == "fp32":
        return 0
    repacked = (each for each in _weights(model) if each.kind in ("linear", "head"))
    return sum(_stored(each.tensor, each.kind, task, precision) for each in repacked)


def _activation_bytes(model: Any, task: str, tokens: int) -> int:
    """What reading holds at its widest: a layer's inner states with the scores of its attention, or all token logits.

    A decoder reads a prompt in pieces, each against all that came before; an encoder reads all at once, and makes no
    logits of tokens.
    """
    head = model.get_output_embeddings()  # where it is not tied it is linear too; what it makes are the logits
    own = [
        each for each in _weights(model) if each.kind == "linear" and (head is None or each.tensor is not head.weight)
    ]
    widest = max(each.tensor.shape[0] for each in own)
    heads = int(model.config.num_attention_heads)
    read = min(tokens, PREFILL_TOKENS) if task == "causal-lm" else tokens
    logits = read * model.config.vocab_size if task == "causal-lm" else 0
    return (read * (2 * widest + heads * tokens) + logits) * SINGLE


class _Weight(NamedTuple):
    """``kind``: linear, protected, lookup, head (tied to a lookup) or plain; ``module`` is dotted."""

    tensor: torch.Tensor
    kind: str
    module: str


def _weights(model: nn.Module) -> Iterator[_Weight]:
    """Each weight once."""
    lookups = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    made: Any = model
    head = made.get_output_embeddings()
    tied = {id(head.weight)} & lookups if head is not None else set()
    seen: set[int] = set()
    for name, module in model.named_modules():
        for part, weight in module.named_parameters(recurse=False):
            if id(weight) in seen:
                continue
            seen.add(id(weight))
            kind = "plain"
            if id(weight) in tied:
                kind = "head"
            elif id(weight) in lookups:
                kind = "lookup"
            elif isinstance(module, nn.Linear) and part == "weight":
                kind = "protected" if PROTECTED in name.split(".") else "linear"
            yield _Weight(weight, kind, name)


def _stored(weight: torch.Tensor, kind: str, task: str, precision: str) -> int:
    rows = weight.shape[0]
    columns = weight.shape[1] if weight.dim() > 1 else 1
    plain = weight.numel() * SINGLE
    if precision == "fp32" or weight.dim() != 2 or min(rows, columns) < SMALLEST or kind in ("plain", "protected"):
        return plain
    if kind in ("lookup", "head"):
        return plain if columns % BLOCK else _blocks(rows, columns, 8)
    if precision == "int8" and task != "causal-lm":
        return rows * columns + rows * SINGLE
    return _blocks(rows, columns, BITS[precision])


def _blocks(rows: int, columns: int, bits: int) -> int:
    count = rows * -(-columns // BLOCK)
    return count * (BLOCK * bits // 8 + SINGLE)
