"""What every method must do, on every family and at every precision. A new method file is covered by being there."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from conformance import FAMILIES, gradients, home, needs, randomised, refusal, stages, structure, train
from torch import nn
from transformers import GenerationConfig

from edgepeft import adapter, backbone, checkpoint, precision, probe, step, taxonomy
from edgepeft.backbone import Backbone
from edgepeft.evaluate import evaluate, sample_logits
from edgepeft.export import onnx, parity
from edgepeft.merge import relative_difference, to_full_precision
from edgepeft.methods import base
from edgepeft.methods.base import Method, NotMergeable
from edgepeft.placements.selection import canonical
from edgepeft.runtime import decode
from edgepeft.runtime.sessions import open_graphs

UPDATES = 16
EARLIER = 8  # updates of other stages than the last: enough to find something, and not all there is to learn
MORE = {"adamix": 2}  # times as many updates: each of its experts is trained by a quarter of them
BY_PENALTY = {"ipt": ("subspace",)}  # stages whose method's own term alone trains: all others learn from the data
ROUNDING = 1e-5  # relative to the largest logit
NAMES = base.names()
EVERYWHERE = [(name, family) for name in NAMES for family in FAMILIES]
OTHERS = [family for family in tiny.FAMILIES if family not in FAMILIES]


def trainable_at(name: str, at: str) -> bool:
    return not (base.find(name).writes_backbone and precision.is_packed(at))


CASES = [(n, family, at) for n, family in EVERYWHERE for at in precision.PRECISIONS if trainable_at(n, at)]
CASES += [(name, family, "fp32") for name in NAMES for family in OTHERS]


@pytest.mark.parametrize(("name", "family", "at"), CASES)
def test_trains_and_is_saved_and_merged(name: str, family: str, at: str, tmp_path: Path) -> None:
    needs(name, family)
    batch, losses = tiny.batch(family), []  # before each stage that trains
    for made, method, stage in stages(family, name, at):
        model = made.model
        head = [p for n, p in model.named_parameters() if canonical(n) in made.fresh]
        for parameter in head:
            parameter.requires_grad_(False)  # it would learn whatever the method does
        frozen = {n: p.detach().clone() for n, p in model.named_parameters() if not p.requires_grad}
        if stage.updates != 0:
            losses.append(evaluate(model, [batch])["loss"])
        last = [each.name for each in method.stages() if each.updates != 0][-1]
        most = UPDATES * MORE.get(name, 1) if stage.name == last else EARLIER
        train(model, method, stage, batch, most if stage.updates is None else min(most, stage.updates))
        for n, p in model.named_parameters():
            assert p.requires_grad or torch.equal(p, frozen[n]), f"{n} is frozen and changed"
    after = evaluate(model, [batch])["loss"]
    assert after < 0.995 * losses[0] and after < losses[-1]
    for parameter in head:
        parameter.requires_grad_(True).data.add_(0.01)
    saved_and_loaded(made, method, batch, tmp_path / "adapter")
    if method.merges:
        merged(made, method, batch)
        assert structure(made.model) == structure(tiny.load(family).model), "the plain modules it started with"


def saved_and_loaded(made: Backbone, method: Method, batch: step.Batch, folder: Path) -> None:
    """The same outputs to the bit, from a file that holds only what changed."""
    card = adapter.card(method, model="m", task=made.task, precision=made.precision, labels=None, seed=0)
    adapter.save(folder, made.model, card)
    family = next(f for f in tiny.FAMILIES if tiny.folder(f) == Path(made.model.config._name_or_path))
    again, same = tiny.adapted(family, method.name, made.precision)
    fresh = {name: tensor.clone() for name, tensor in base.state(again.model).items()}
    assert adapter.read_card(folder).method == same.name == method.name
    adapter.load(folder, again.model)
    assert torch.equal(sample_logits(again.model.eval(), [batch])[0], sample_logits(made.model, [batch])[0])

    tensors = adapter.read_tensors(folder / adapter.TENSORS)
    assert tensors.keys() == base.state(made.model).keys()
    numbers = {name for name, tensor in tensors.items() if tensor.is_floating_point()}  # the rest says where they stand
    assert numbers == adapter.trained(made.model).keys()
    if made.precision == "fp32":  # in bf16 a small update may round to nothing
        as_before = [name for name in numbers if torch.equal(tensors[name], fresh[name])]
        assert all(method.name == "adalora" and name.endswith(".e") for name in as_before), "a layer without a budget"


def merged(made: Backbone, method: Method, batch: step.Batch) -> None:
    """The same function to rounding, without hooks."""
    to_full_precision(made.model)
    before = sample_logits(made.model, [batch])
    method.merge(made.model)
    assert relative_difference(before, sample_logits(made.model, [batch])) <= ROUNDING
    assert not [m for m in made.model.modules() if m._forward_hooks or m._forward_pre_hooks]


@pytest.mark.parametrize("name", NAMES)
def test_says_where_it_is_from_and_what_it_costs(name: str) -> None:
    method = base.create(name)
    assert method.name == name and method.learning_rate > 0
    assert method.kind in ("additive", "selective", "reparametrised", "hybrid")
    assert method.paper.title and 1990 < method.paper.year < 2030 and (method.paper.arxiv or method.paper.venue)
    assert not method.paper.arxiv or len(method.paper.arxiv.split(".")) == 2
    assert set(method.saves) <= {"disk", "memory"}
    assert method.merges != bool(method.overhead), "overhead is what a model costs that cannot be merged"
    described = taxonomy.describe(type(method))
    assert all(option["meaning"] for option in described["options"]) and described["summary"]


@pytest.mark.parametrize("name", NAMES)
def test_refuses_a_family_saying_why_and_works_on_another(name: str) -> None:
    refused = [error for family in tiny.FAMILIES if (error := refusal(name, family))]
    for error in refused:
        assert error.fact.startswith(name) and error.cause and error.remedy, error
    assert any(refusal(name, family) is None for family in FAMILIES)


@pytest.mark.parametrize("name", [name for name in NAMES if not base.find(name).merges])
def test_does_not_merge_saying_why(name: str) -> None:
    made, method = tiny.adapted(home(name), name)
    with pytest.raises(NotMergeable) as caught:
        method.merge(made.model)
    assert caught.value.fact and caught.value.cause and caught.value.remedy


@pytest.mark.parametrize(("name", "family"), EVERYWHERE)
def test_starts_as_the_backbone_or_says_that_it_does_not(name: str, family: str) -> None:
    needs(name, family)
    batch, (made, method, _) = tiny.batch(family), next(stages(family, name))
    plain = sample_logits(tiny.load(family).model, [batch])
    moved = relative_difference(plain, sample_logits(made.model.eval(), [batch]))
    assert moved <= ROUNDING if method.identity_at_start else moved > ROUNDING


@pytest.mark.parametrize(("name", "family"), EVERYWHERE)
def test_gradients_reach_exactly_what_is_trained(name: str, family: str) -> None:
    """In every stage, once what starts at zero has moved."""
    needs(name, family)
    for made, method, stage in stages(family, name):
        randomised(made.model.train())
        penalty = method.penalty if stage.name in BY_PENALTY.get(name, ()) else None
        found = gradients(made.model, tiny.batch(family), passes=8, penalty=penalty)
        assert found.keys() == {n for n, p in made.model.named_parameters() if p.requires_grad}
        assert not [n for n, gradient in found.items() if not gradient.any()]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("at", ["fp32", "bf16"])
def test_a_copy_of_a_model_is_a_model_of_its_own(name: str, at: str) -> None:
    family = home(name)
    made, batch = tiny.adapted(family, name, at)[0], tiny.batch(family)
    before = sample_logits(made.model.eval(), [batch])[0]
    twin = copy.deepcopy(made.model)
    assert torch.equal(sample_logits(twin, [batch])[0], before)
    randomised(twin, seed=3)
    assert torch.equal(sample_logits(made.model, [batch])[0], before)
    assert not torch.equal(sample_logits(twin, [batch])[0], before)
    tiny.loss_sum(twin, batch).backward()
    assert all(parameter.grad is None for parameter in made.model.parameters())


@pytest.mark.parametrize("name", NAMES)
def test_adapter_names_and_shapes_do_not_depend_on_precision(name: str) -> None:
    found = []
    for at in (at for at in precision.PRECISIONS if trainable_at(name, at)):
        made, _ = tiny.adapted(home(name), name, at)
        found.append({n: tuple(t.shape) for n, t in base.state(made.model).items()})
    assert all(names == found[0] for names in found)


@pytest.mark.parametrize(("name", "family"), EVERYWHERE)
def test_recomputed_activations_give_the_same_gradients(name: str, family: str) -> None:
    needs(name, family)
    found = []
    for again in (False, True):
        made, method = tiny.adapted(family, name)
        randomised(made.model.train())
        if again:
            step.recompute_activations(made.model)
        found.append(gradients(made.model, tiny.batch(family), penalty=method.penalty))
    kept, recomputed = found
    trained = [n for n, p in made.model.named_parameters() if p.requires_grad and n in kept]
    for n in trained:
        most = kept[n].abs().max().item()
        torch.testing.assert_close(recomputed[n], kept[n], rtol=1e-4, atol=1e-4 * most)


@pytest.mark.parametrize("at", ["fp32", "packed"])
@pytest.mark.parametrize("name", NAMES)
def test_goes_on_from_a_checkpoint_in_every_stage(name: str, at: str, tmp_path: Path) -> None:
    """To the same bits as if it had never stopped."""
    at = at if at == "fp32" else "nf4" if trainable_at(name, "nf4") else "bf16"
    family = home(name)
    batch, run = tiny.batch(family), stages(family, name, at)
    for number, (made, method, stage) in enumerate(run):
        if stage.updates == 0:
            continue  # it ends where it begins
        model, optimizer, folder = made.model.train(), stage.optimizer(made.model, 1e-3, 0.0), tmp_path / str(number)
        train_with(model, method, optimizer, batch, 0.2)
        left = checkpoint.save(folder, model, optimizer, {"step": 1})
        train_with(model, method, optimizer, batch, 0.6)

        begun = stages(family, name, at)
        for _ in range(number + 1):
            again, same, same_stage = next(begun)
        resumed = same_stage.optimizer(again.model.train(), 1e-3, 0.0)
        checkpoint.restore(left, again.model, resumed)
        train_with(again.model, same, resumed, batch, 0.6)
        before, after = (base.state(m, transient=True) for m in (model, again.model))
        assert before.keys() == after.keys()
        assert not [n for n, tensor in before.items() if not torch.equal(tensor, after[n])]


def train_with(
    model: nn.Module, method: Method, optimizer: torch.optim.Optimizer, batch: step.Batch, done: float
) -> None:
    """Two updates of a stage, each a fifth of it, of which a share is ``done``."""
    clip = None if method.updates_in_backward else 1.0
    hooks = {"penalty": method.penalty, "after_update": method.after_update}
    trainer = step.TrainingStep(model, optimizer, clip_norm=clip, **hooks)  # type: ignore[arg-type]
    for number in range(2):
        trainer.backward([batch], 1e-3)
        trainer.update(done + number / 5)


@pytest.mark.parametrize(("name", "family"), EVERYWHERE)
def test_is_traced_on_fake_tensors(name: str, family: str) -> None:
    """Every stage that trains, with as many bytes of adapter in the last as the real model has."""
    needs(name, family)
    at = "nf4" if trainable_at(name, "nf4") else "bf16"
    plain = {n for n, _ in tiny.load(family, at).model.named_parameters()}
    method = tiny.method(name)
    for made, _, stage in stages(family, name, at):
        if stage.updates != 0:  # evaluations are of the last that trains, before anything is dropped
            added = sum(p.nbytes for n, p in made.model.named_parameters() if p.requires_grad and n not in plain)
    found = probe.record(
        probe.Configuration(
            model=backbone.as_fields(tiny.configuration(family)),
            task=made.task,
            method=name,
            options={**method.narrow, **tiny.others(family, name)},
            precision=at,
            checkpointing=False,
            microbatch=2,
            tokens=12,
            target_tokens=6,
            labels=tiny.LABELS,
            accumulates=not method.updates_in_backward,
            cuda=False,
            bf16=True,
        ),
        whole=True,
    )
    peaks = found.tracker.peaks()
    training = [stage for stage in method.stages() if stage.updates != 0]
    for phase in ("forward+backward", "update"):
        assert sum(name.endswith(phase) for name in peaks) == len(training)
    assert peaks["evaluation"].bytes["adapter"] == added


EXPORTS = [(n, family) for n in NAMES for family in FAMILIES if not base.find(n).merges or family == home(n)]


@pytest.mark.parametrize(("name", "family"), EXPORTS)
def test_exports_to_onnx_with_the_same_logits_and_tokens(name: str, family: str, tmp_path: Path) -> None:
    """What merges is a plain model then, so that one family in turn will do."""
    needs(name, family)
    made, method = tiny.adapted(family, name)
    randomised(made.model)
    model = made.model.eval()
    before = sample_logits(model, [tiny.batch(family)])
    method.merge(model) if method.merges else method.condense(model)
    assert relative_difference(before, sample_logits(model, [tiny.batch(family)])) <= ROUNDING
    onnx.export(model, made.task, tmp_path / "onnx")
    graphs = open_graphs(tmp_path / "onnx", made.task, threads=1)
    for rows, lengths in ((1, (5, 5)), (3, (4, 11))):
        batch = tiny.batch(family, rows, lengths=lengths)
        expected = sample_logits(model, [batch])[0].numpy()
        found = parity.target_logits(graphs, {key: value.numpy() for key, value in batch.items()})
        assert np.abs(found - expected).max() <= 1e-4
    if made.task == "classification":
        return
    model.generation_config.eos_token_id = None
    start = 0 if made.task == "seq2seq" else None
    settings = GenerationConfig(
        max_new_tokens=8, do_sample=False, eos_token_id=None, pad_token_id=0, decoder_start_token_id=start
    )
    ids = np.array([[0, 0, 7, 9, 4], [3, 8, 5, 2, 6]])
    mask = (ids > 0).astype(np.int64)
    made_by_torch = model.generate(torch.tensor(ids), attention_mask=torch.tensor(mask), generation_config=settings)
    wanted = made_by_torch[:, 1 if start == 0 else ids.shape[1] :].tolist()
    assert decode.greedy(graphs, ids, mask, 8, (), start).tolist() == wanted
