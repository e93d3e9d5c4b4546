"""FAR: the feed-forward nodes that change most in a short fine-tuning are trained, all else is frozen."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from edgepeft.anatomy import FEED_FORWARD, Anatomy
from edgepeft.methods.base import Method, Paper
from edgepeft.placements import change, delta, nodes, selection
from edgepeft.stage import Stage


@dataclass(frozen=True, kw_only=True)
class FAR(Method):
    """Freeze And Reconfigure: a node is a row of a feed-forward layer's weight and its bias.

    The first stage, priming, fine-tunes all of these layers. Then the learner nodes of each, those with the largest L1
    distance from the backbone, go on from where they are; all others are the backbone's again, and frozen. What is
    trained is multiplied apart, and takes its place among the outputs.

    The paper's learning rate could not be looked up, and no code of its authors' is known. This one is the highest that
    BERT's authors try in full fine-tuning (arXiv 1810.04805, appendix A.3), which FAR is of some of the nodes.
    """

    paper = Paper("Efficient Fine-Tuning of BERT Models on the Edge", 2022, "2205.01541")
    kind = "selective"
    writes_backbone = True
    learning_rate = 5e-5

    retention: float = 0.1
    """Share of the nodes of every layer that are trained; the paper has 0.1, 0.2 and 0.4."""
    priming: float = 0.1
    """Share of the run's updates that find them."""

    def __post_init__(self) -> None:
        self.require(0 < self.retention < 1, "retention", "a share between 0 and 1")
        self.require(0 < self.priming < 1, "priming", "a share between 0 and 1")

    def inject(self, model: nn.Module, anatomy: Anatomy) -> None:
        linears = {name: model.get_submodule(name) for name in anatomy.linears(FEED_FORWARD)}
        names = [f"{name}.{leaf}" for name, linear in linears.items() for leaf, _ in linear.named_parameters()]
        for place in change.places(model, names):
            change.put(place, change.Dense(place.tensor))

    def stages(self) -> tuple[Stage, ...]:
        return (
            Stage(name="priming", optimizer=self.optimizer, share=self.priming),
            Stage(name="nodes", optimizer=self.optimizer, share=1 - self.priming, begin=self._reconfigure),
        )

    def merge(self, model: nn.Module) -> None:
        delta.fold(model)
        selection.fold(model)

    def _reconfigure(self, model: nn.Module, anatomy: Anatomy) -> None:
        moved: dict[nn.Module, dict[str, Tensor]] = {}
        for place in change.changed(model):
            assert isinstance(place.change, change.Dense)
            ((linear, leaf),) = place.owners
            moved.setdefault(linear, {})[leaf] = place.change.delta.detach()
            change.remove(place)
        while moved:  # one by one: what priming moved in a layer is let go of with it
            linear, by = moved.popitem()
            assert isinstance(linear, nn.Linear)
            distance = sum(d.abs().sum(1) if d.dim() > 1 else d.abs() for d in by.values())
            assert isinstance(distance, Tensor)
            delta.attach(linear, nodes.Nodes(linear, nodes.most_changed(distance, self.retention), by))
