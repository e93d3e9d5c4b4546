"""Folding what was trained into the backbone's weights, and measuring what that did."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, MutableMapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from edgepeft import counts, precision
from edgepeft.answers import stops
from edgepeft.backbone import Backbone, repack, save
from edgepeft.errors import EdgePeftError
from edgepeft.evaluate import better, evaluate, sample_logits
from edgepeft.files import atomic_directory, size_bytes
from edgepeft.ledger import Row
from edgepeft.methods import base
from edgepeft.methods.base import Method
from edgepeft.placements import selection
from edgepeft.step import Batch
from edgepeft.watch import peak

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

TOLERANCE = 1e-4  # relative, in fp32: measured merges are at 4e-7 (MiniLM) to 3e-6 (SmolLM2), a wrong one is far away
COMPARED = 4  # microbatches whose logits are compared


def merge(
    trained: Callable[[str], Backbone],
    at: str,
    method: Method,
    *,
    batches: Sequence[Batch],
    tokenizer: PreTrainedTokenizerFast,
    out: Path,
    phases: MutableMapping[str, int],
    ends: Collection[int] = (),
) -> list[Row]:
    """Merge a trained model into a Hugging Face folder ``out``, in fp32.

    A packed backbone is merged twice: into the dequantised weights that the adapter was trained against, and into the
    original ones, unless the method packed them for itself and its adapter fits no others. Both are measured and the
    better is kept. What packing the merged weights again would do is measured too.

    Args:
        trained: loads the backbone at a precision, with the trained adapter in it.
        at: the precision it was trained at.
        batches: held-out examples.
        phases: where the most bytes of tensors that merging held are noted, as ``merge``.
        ends: tokens that training closed answers with: the folder's generation settings name them, beside their own.

    Returns:
        The ledger's rows, the kept one last.

    Raises:
        EdgePeftError: the merged model does not compute what the unmerged one does.
        NotMergeable: the method does not merge.
    """
    packed = precision.is_packed(at)
    rows: list[Row] = []
    with atomic_directory(out) as folder:

        def merge_into(backbone: Backbone, into: str) -> None:
            """Leave the result in ``folder`` if it is better than what is there; only one model is held at a time."""
            model, row = _merged(backbone, method, f"merged-{into}", batches)
            if rows and not better(backbone.task, row.metrics, rows[-1].metrics):
                rows.insert(0, replace(row, kept=False))
                return
            if ends:  # a base model that learned a chat's end of turn would go on behind it
                model.generation_config.eos_token_id = sorted({*ends, *stops(model)})
            save(model, folder, tokenizer)
            rows[:] = [replace(other, kept=False) for other in rows if other.artefact != f"merged-{at}"]
            if packed:
                repack(model, backbone.anatomy, at)
                note = f"What {at} would make of the merged weights again; not used."
                rows.append(Row(artefact=f"merged-{at}", metrics=evaluate(model, batches), kept=False, note=note))
            rows.append(row)

        originals = ["original"] if packed and not method.packs_its_own else []
        for into in ["dequantised" if packed else at, *originals]:
            backbone = trained("fp32" if into == "original" else at)
            with peak(phases, "merge", backbone.model):
                merge_into(backbone, into)
            del backbone
    rows[-1] = replace(rows[-1], bytes=size_bytes(out))
    return rows


def _merged(backbone: Backbone, method: Method, name: str, batches: Sequence[Batch]) -> tuple[Any, Row]:
    model: Any = backbone.model
    model.eval()
    to_full_precision(model)
    before, unmerged = read(model, batches[:COMPARED])
    method.merge(model)
    after, merged = read(model, batches[:COMPARED])
    deviation = relative_difference(before, after)
    if not deviation <= TOLERANCE:  # also refuses NaN
        raise EdgePeftError(
            f"Merging {method.name} changed the model.",
            f"Logits differ by {deviation:.2g} of the largest; up to {TOLERANCE:g} is rounding.",
            "The adapter is untouched. Please report it with the recipe.",
        )
    speeds = {"tokens_per_second_unmerged": unmerged, "tokens_per_second_merged": merged}
    return model, Row(artefact=name, metrics=evaluate(model, batches), deviation=deviation, counts=speeds)


def beside(trained: Callable[[], Any], plain: Callable[[], Any], batches: Sequence[Batch]) -> dict[str, float]:
    """What an adapter that does not merge changed, and how fast its backbone reads with it and without.

    Args:
        trained, plain: load the backbone with the adapter in it and without; one of the two is held at a time.
    """
    model = trained()
    added = base.state(model)
    to_full_precision(model)
    _, with_adapter = read(model, batches[:COMPARED])
    del model
    model = plain()
    to_full_precision(model)
    return {
        "changed_parameters": counts.beside(model, added),
        "tokens_per_second_unmerged": with_adapter,
        "tokens_per_second_backbone": read(model, batches[:COMPARED])[1],
    }


def read(model: nn.Module, batches: Sequence[Batch]) -> tuple[list[Tensor], float]:
    """Logits of the model, and how many tokens it read a second in fp32, after a warm-up."""
    sample_logits(model, batches[:1], bounded=True)
    started = time.perf_counter()
    logits = sample_logits(model, batches, bounded=True)
    return logits, sum(batch["input_ids"].numel() for batch in batches) / (time.perf_counter() - started)


def to_full_precision(model: nn.Module) -> None:
    """Unpack and cast to fp32 in place: the same function, without the rounding of half-precision arithmetic."""
    precision.unpack(model, torch.float32)
    model.float()
    selection.recast(model, torch.float32)


def relative_difference(reference: Sequence[Tensor], others: Sequence[Tensor]) -> float:
    """The largest difference between two lists of tensors, over the largest magnitude in the first."""
    difference = torch.stack([(a - b).abs().max() for a, b in zip(reference, others, strict=True)])
    size = torch.stack([a.abs().max() for a in reference])
    return float(difference.max() / size.max())  # Python's max would lose a NaN
