"""The training step: its loss is transformers' own, whatever the padding and however a batch is cut."""

from __future__ import annotations

from typing import Any

import pytest
import tiny
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from edgepeft import adapter, step
from edgepeft.data.batches import causal_batch, classification_batch, seq2seq_batch


def labels(batch: step.Batch) -> Tensor:
    """A batch's targets as transformers wants them: -100 where there is none."""
    if "labels" in batch:
        return batch["labels"]
    shape = batch["decoder_input_ids" if "decoder_input_ids" in batch else "input_ids"]
    found = torch.full_like(shape, -100)
    if "decoder_input_ids" in batch:
        found.view(-1)[batch["target_positions"]] = batch["target_ids"]
    else:  # transformers shifts by itself
        found.view(-1)[batch["target_positions"] + 1] = batch["target_ids"]
    return found


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_loss_is_that_of_transformers(family: str) -> None:
    model, batch = tiny.load(family).model, tiny.batch(family)
    theirs = model(**step.inputs(batch), labels=labels(batch)).loss
    ours = tiny.loss_sum(model, batch) / step.targets(batch).numel()
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=0)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_gradients_are_those_of_transformers(family: str) -> None:
    made, _ = tiny.adapted(family, "full")
    model, batch = made.model, tiny.batch(family)
    tiny.loss_sum(model, batch).div(step.targets(batch).numel()).backward()
    ours = {name: parameter.grad for name, parameter in model.named_parameters()}
    model.zero_grad(set_to_none=True)
    model(**step.inputs(batch), labels=labels(batch)).loss.backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(ours[name], parameter.grad, rtol=1e-4, atol=1e-6, msg=name)


def test_recomputing_sends_no_gradient_where_nothing_is_trained() -> None:
    made, _ = tiny.adapted("llama", "top_layers", layers=1)
    step.recompute_activations(made.model.train())
    seen: list[bool] = []
    for block in made.anatomy.blocks:
        made.model.get_submodule(block.path).register_forward_hook(lambda m, i, o: seen.append(o.requires_grad))
    tiny.loss_sum(made.model, tiny.batch("llama"))
    assert not seen[0] and seen[-1]


@pytest.mark.parametrize("family", ["gpt2", "gemma2", "t5"])
def test_the_model_has_its_head_back(family: str) -> None:
    """Also after an error on the way."""
    model, batch = tiny.load(family).model, tiny.batch(family)
    before = model(**step.inputs(batch)).logits
    step.answer_states(model, batch)
    assert torch.equal(model(**step.inputs(batch)).logits, before)
    with pytest.raises(Exception, match="index out of range"):
        step.answer_states(model, {**batch, "input_ids": batch["input_ids"] + 10**6})
    assert torch.equal(model(**step.inputs(batch)).logits, before)


def padded(batch: dict[str, Tensor], extra: int, value: int) -> dict[str, Tensor]:
    """The batch with more padding on the right."""
    width = batch["input_ids"].shape[1]
    wider = {name: F.pad(batch[name], (0, extra)) for name in ("input_ids", "attention_mask")}
    wider["input_ids"][wider["attention_mask"] == 0] = value
    if "decoder_input_ids" in batch:
        width = batch["decoder_input_ids"].shape[1]
        wider["decoder_input_ids"] = F.pad(batch["decoder_input_ids"], (0, extra), value=value)
    if "target_positions" in batch:
        rows = batch["target_positions"] // width
        wider["target_positions"] = batch["target_positions"] + rows * extra
    return {**batch, **wider}


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_padding_changes_nothing(family: str) -> None:
    model, batch = tiny.load(family).model, tiny.batch(family)
    plain = tiny.loss_sum(model, batch)
    torch.testing.assert_close(tiny.loss_sum(model, padded(batch, 5, 0)), plain, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(tiny.loss_sum(model, padded(batch, 3, 7)), plain, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_a_mask_that_hides_nothing_changes_nothing(family: str) -> None:
    """Training leaves it out where there is no padding."""
    model, batch = tiny.load(family).model, tiny.batch(family, lengths=(9, 9))
    without = {name: value for name, value in batch.items() if name != "attention_mask"}
    torch.testing.assert_close(tiny.loss_sum(model, without), tiny.loss_sum(model, batch), rtol=1e-5, atol=1e-5)


def parts(batch: dict[str, Tensor], sizes: list[int], kind: str) -> list[dict[str, Tensor]]:
    """The batch cut into microbatches by rows, each without needless padding."""
    mask, found, first = batch["attention_mask"], [], 0
    for size in sizes:
        rows = range(first, first + size)
        inputs = [batch["input_ids"][row][mask[row].bool()].numpy() for row in rows]
        if kind == "classification":
            found.append(classification_batch(inputs, batch["labels"][first : first + size].numpy(), pad_id=0))
        else:
            width = batch["decoder_input_ids" if kind == "seq2seq" else "input_ids"].shape[1]
            where = [batch["target_positions"][batch["target_positions"] // width == row] % width for row in rows]
            if kind == "seq2seq":
                owner = batch["target_positions"] // width
                found.append(
                    seq2seq_batch(
                        inputs, [batch["target_ids"][owner == row].numpy() for row in rows], pad_id=0, start_id=0
                    )
                )
            else:
                answers = [torch.zeros(len(ids), dtype=torch.bool) for ids in inputs]
                for answer, positions in zip(answers, where, strict=True):
                    answer[positions + 1] = True
                found.append(causal_batch(inputs, [answer.numpy() for answer in answers], pad_id=0))
        first += size
    return found


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert", "t5-gated"])
@pytest.mark.parametrize("sizes", [[1, 2, 3], [5, 1]])
def test_accumulation_is_one_large_batch(family: str, sizes: list[int]) -> None:
    """Microbatches have different numbers of targets: a mean of means would weigh them wrongly."""
    batch = tiny.batch(family, rows=6, lengths=(4, 16))
    cut = parts(batch, sizes, tiny.task(family))
    if tiny.task(family) != "classification":
        assert len({step.targets(part).numel() / len(part["input_ids"]) for part in cut}) == len(cut)
    found = []
    for microbatches in ([batch], cut):
        made, method = tiny.adapted(family, "lora")
        tiny.randomise(nn.ParameterList(adapter.trained(made.model).values()))
        trainer = step.TrainingStep(made.model, method.optimizer(made.model, 1e-3, 0.0), clip_norm=1.0)
        loss = trainer.backward(microbatches, 1e-3)
        gradients = {name: parameter.grad.clone() for name, parameter in adapter.trained(made.model).items()}  # type: ignore[union-attr]
        norm = trainer.update()
        found.append((loss, gradients, norm))
    (loss, gradients, norm), (other, others, other_norm) = found
    torch.testing.assert_close(other, loss)
    torch.testing.assert_close(other_norm, norm, rtol=1e-4, atol=0)
    for name, gradient in gradients.items():
        assert (others[name] - gradient).abs().max() < 1e-4 * gradient.abs().max(), name


def test_an_update_clips_applies_and_frees_the_gradients() -> None:
    """Against torch's own AdamW, step by step, with the rate that each step was given."""
    made, method = tiny.adapted("llama", "lora")
    tiny.randomise(nn.ParameterList(adapter.trained(made.model).values()))
    trained = list(adapter.trained(made.model).values())
    trainer = step.TrainingStep(made.model, method.optimizer(made.model, 1e-3, 0.1), clip_norm=0.5)
    copies = [parameter.detach().clone().requires_grad_() for parameter in trained]
    oracle = torch.optim.AdamW(copies, lr=1e-3, weight_decay=0.1)
    for number, lr in enumerate((1e-3, 5e-3, 0.0)):
        trainer.backward([tiny.batch("llama", seed=number)], lr)
        gradients: list[Any] = [parameter.grad for parameter in trained]
        total = torch.stack([gradient.square().sum() for gradient in gradients]).sum().sqrt()
        assert total > 0.5
        for copy, gradient in zip(copies, gradients, strict=True):
            copy.grad = gradient * (0.5 / total)
        oracle.param_groups[0]["lr"] = lr
        oracle.step()
        torch.testing.assert_close(trainer.update(), total)
        assert all(parameter.grad is None for parameter in trained)
        for copy, parameter in zip(copies, trained, strict=True):
            torch.testing.assert_close(parameter, copy, rtol=1e-4, atol=1e-6)


def test_vectors_do_not_decay() -> None:
    made, method = tiny.adapted("gpt2", "full")
    optimizer = method.optimizer(made.model, 0.1, 0.5)
    before = {name: parameter.detach().clone() for name, parameter in made.model.named_parameters()}
    for parameter in made.model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for name, parameter in made.model.named_parameters():
        torch.testing.assert_close(parameter, before[name] * (0.95 if parameter.dim() > 1 else 1.0))
