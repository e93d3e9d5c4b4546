"""From traces of shallow models to the whole one: a surface over the microbatch, exact where layers are alike.

Two identities carry it. Nearly every tensor of a step has either a size that is a multiple of the microbatch, or one
that does not depend on it; a microbatch that is a prime number dividing no dimension of the model tells which, so that
one trace gives the bytes at every microbatch. And within one layer's pass, forward or backward, all moments grow alike
with the number of layers: two depths give every depth, moment by moment.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np

from edgepeft import replay
from edgepeft.catalog.fields import at_depth, depth, positions, positions_left
from edgepeft.cross_entropy import CHUNK_BYTES, chunks
from edgepeft.cuda_device import Device
from edgepeft.methods import base
from edgepeft.precision import is_converted, is_packed, stored_dtype
from edgepeft.probe import Recording, as_config, recordings, refuse
from edgepeft.roofline import Work, along
from edgepeft.runtime.manifest import PREFILL_TOKENS
from edgepeft.surface import KINDS, PASSING, WORKING, Configuration, Moment, Surface

WIDTHS = ("hidden_size", "d_model", "n_embd")
SIZES = [2**power for power in range(11)]  # microbatches at which the peak of a segment is looked for
Array = np.ndarray[Any, np.dtype[np.float64]]
Span = tuple[int, int]  # the first moment and the last
Spared = Mapping[tuple[Any, ...], float]  # segment → bytes


@dataclass(frozen=True)
class Timeline:
    """One phase of one trace.

    Attributes:
        bytes: what is held at each moment, (moments, 2, kinds): fixed, and for each example.
        segments: (what, stack, layer counted from the nearer end, occurrence) → first and last moment.
        work: by class of operator, at microbatch 0 and at microbatch 1.
    """

    bytes: Array
    segments: Mapping[tuple[Any, ...], tuple[int, int]]
    work: tuple[Mapping[str, Work], Mapping[str, Work]] = ({}, {})

    def most(self, first: int, last: int, microbatch: int) -> int:
        """The moment from ``first`` to ``last`` at which most is held."""
        fixed, each = self.sums[:, first : last + 1]
        return first + int((fixed + microbatch * each).argmax())

    @cached_property
    def sums(self) -> Array:
        """Of all kinds, (2, moments)."""
        return np.ascontiguousarray(self.bytes.sum(2).T)


def surface(configuration: Configuration) -> Surface:
    """What the configuration needs at any microbatch, from as few and as shallow traces as will do."""
    return surfaces(configuration, [configuration.checkpointing])[0]


def surfaces(configuration: Configuration, checkpointing: Sequence[bool]) -> list[Surface]:
    """The same at each wanted value of ``checkpointing``.

    Traces share all but the forward and backward passes.

    Raises:
        UsageError: the method does not fit the model, or leaves it fewer positions than there are tokens.
    """
    saturated = _saturated(configuration)
    method = base.create(configuration.method, configuration.options)
    taken = method.positions(as_config(configuration.model))
    positions_left("The model", positions(configuration.model), configuration.method, taken, configuration.tokens)
    depths = traced_depths(configuration.model, method)
    if method.counts_layers and len(depths) > 1:
        refuse(configuration.model, configuration.task, method)
    # Larger tells better; but an answer's logits are made in chunks, all of which have to be followed.
    size = _prime(configuration, 101 if configuration.task == "classification" else max(saturated, 11))
    traces = [_recorded(configuration, checkpointing, layers, size) for layers in depths]
    less: Mapping[str, Spared] = {}
    if saturated > 1:  # the loss is the same with checkpointing and without
        one = _recorded(configuration, checkpointing[:1], depths[0], 1)[0]
        low, single = _timelines(configuration, traces[0][0], size), _timelines(configuration, one, 1)
        less = {phase: _less(low[phase], single[phase]) for phase in low}
    return [_surface(configuration, depths, size, recorded, less) for recorded in zip(*traces, strict=True)]


def traced_depths(model: Mapping[str, Any], method: base.Method) -> tuple[int, ...]:
    """The two depths that stand for a model with a method in it, or the whole one.

    Where kinds of layers take turns, whole turns lie between both depths, and between them and the whole model. Each
    has two turns at least, as what a kind shares, such as its mask, is held from its first layer to its last.
    """
    full, (low, high) = depth(model), method.depths()
    kinds = getattr(as_config(model), "layer_types", None) or [""]
    turn = next(length for length in range(1, len(kinds) + 1) if kinds[length:] == kinds[:-length])
    if (full - low) % turn or (high - low) % turn:
        step, least = math.lcm(high - low, turn), max(low, 2 * turn)
        low = least + (full - least) % step
        high = low + step
        if low + high >= full:  # the whole model is no more to trace
            return (full,)
    return (low, high) if full > high and full % 2 == 0 else (full,)


def _surface(
    configuration: Configuration,
    depths: Sequence[int],
    size: int,
    recorded: Sequence[Recording],
    less: Mapping[str, Spared],
) -> Surface:
    """From recordings at ``depths`` and the microbatch ``size``, and by how much microbatch 1 takes less, by phase."""
    full, saturated = depth(configuration.model), _saturated(configuration)
    traced = [_timelines(configuration, recording, size) for recording in recorded]
    grown = (full - depths[-1]) / (depths[-1] - depths[0]) if len(depths) > 1 else 0.0
    phases = {}
    for phase, low in traced[0].items():
        spares = less.get(phase, {})
        found: dict[tuple[float, ...], float] = {}
        for segment, high, slope in _moments(low, traced[-1][phase]):
            held, spared = tuple((high + grown * slope).ravel()), spares.get(segment, 0.0)
            found[held] = min(spared, found.get(held, spared))
        moments = [Moment(v[: len(KINDS)], v[len(KINDS) :], cut) for v, cut in found.items()]
        phases[phase] = tuple(_needed(moments, saturated))
    place = (full - depths[0]) / (depths[-1] - depths[0]) if len(depths) > 1 else 0.0
    work = dict(_work(traced[0], traced[-1], place))
    method = base.create(configuration.method, configuration.options)
    alike = method.depths() == base.DEPTHS  # only then are the layers in the middle like all others
    times = round(grown) if alike else 0
    overhead = replay.overhead(recorded[0], recorded[-1], times, size) if configuration.cuda else {}
    return Surface(phases, saturated, work, overhead)


def _work(
    low: dict[str, Timeline], high: dict[str, Timeline], place: float
) -> Iterator[tuple[str, tuple[Mapping[str, Work], Mapping[str, Work]]]]:
    """What a step of the last stage does, beyond the shallower trace by ``place`` times what the deeper one adds."""
    for phase in WORKING:
        last = next(name for name in reversed(low) if name.endswith(phase))
        (none, one), (deep_none, deep_one) = low[last].work, high[last].work
        yield phase, (along(none, deep_none, place), along(one, deep_one, place))


def _moments(low: Timeline, high: Timeline) -> Iterator[tuple[tuple[Any, ...], Array, Array]]:
    """The moments that can be a peak: bytes in the deeper trace, and what they are above those in the shallower.

    Each with the segment of the shallower trace that it is in, or is like.
    """
    for segment, whole in high.segments.items():
        what, stack, layer, occurrence = segment
        # A second or last but one layer is not in the shallower trace. It grows as its neighbour at the end does.
        like = segment if segment in low.segments else (what, stack, 0 if layer > 0 else -1, occurrence)
        if like not in low.segments or like not in high.segments:
            continue
        own = high.segments[like]
        parts = list(_parts(low.bytes, high.bytes, low.segments[like], own))
        for size in SIZES:
            top = high.most(*own, size)
            for part, pairs in parts:
                if like != segment and not part[0] <= top <= part[1]:
                    continue  # it grows as its neighbour does where that holds most
                slopes = (high.bytes[high.most(*b, size)] - low.bytes[low.most(*a, size)] for a, b in pairs)
                most = max(slopes, key=lambda slope: float(slope[0].sum() + size * slope[1].sum()))
                at = high.most(*(part if like == segment else whole), size)
                yield like, high.bytes[at], most


def _parts(low: Array, high: Array, one: Span, other: Span) -> Iterator[tuple[Span, list[tuple[Span, Span]]]]:
    """Two segments cut into what is alike from the beginning, what is alike to the end, and what is between.

    Yields:
        a part of the deeper one, and where both are to be looked at for how much more the deeper one holds there. What
        is between belongs to layers that the shallower one lacks: it grows as one of its ends does.
    """
    (a, b), (c, d) = one, other
    if b - a == d - c:
        yield other, [(one, other)]
        return
    before = _alike(low[a : b + 1], high[c : d + 1])
    after = min(_alike(low[a : b + 1][::-1], high[c : d + 1][::-1]), min(b - a, d - c) - before)
    first, last = (a + before, c + before), (b - after, d - after)
    yield (c, first[1]), [((a, first[0]), (c, first[1]))]
    if last[1] - first[1] > 1:
        yield (first[1], last[1]), [((here, here), (there, there)) for here, there in (first, last)]
    yield (last[1], d), [((last[0], b), (last[1], d))]


def _alike(one: Array, other: Array) -> int:
    """How many changes from the first moment on are the same in both."""
    count = min(len(one), len(other))
    differs = (np.diff(one[:count], axis=0) != np.diff(other[:count], axis=0)).any(axis=(1, 2))
    return int(differs.argmax()) if differs.any() else count - 1


def _less(low: Timeline, single: Timeline) -> dict[tuple[Any, ...], float]:
    """By how much each segment's peak at microbatch 1 is below what the trace of a larger one makes of it."""
    found = {}
    for segment, ends in low.segments.items():
        if segment in single.segments:
            expected = low.bytes[low.most(*ends, 1)].sum()
            found[segment] = float(expected - single.bytes[single.most(*single.segments[segment], 1)].sum())
    return found


def _needed(moments: list[Moment], saturated: int) -> Iterator[Moment]:
    """The moments that are a peak at some microbatch."""
    winners = {
        max(range(len(moments)), key=lambda i: sum(moments[i].bytes(size, saturated).values())) for size in SIZES
    }
    return (moments[index] for index in sorted(winners))


def _recorded(configuration: Configuration, checkpointing: Sequence[bool], layers: int, size: int) -> list[Recording]:
    shallow = replace(configuration, model=at_depth(configuration.model, layers), microbatch=size)
    return recordings(shallow, checkpointing, whole=True)


def _timelines(configuration: Configuration, recording: Recording, size: int) -> dict[str, Timeline]:
    """The phases of one trace, those that cannot be traced among them."""
    found = {name: _timeline(recording, name, size) for name in recording.tracker.phases if name != "start"}
    loaded = found["loading"]
    if configuration.cuda:  # layers come to the device one at a time, and are packed there
        passing = np.zeros((2, len(KINDS)))
        packed = is_packed(configuration.precision)
        passing[0, KINDS.index("temporaries")] = _largest_passing(recording) if packed else 0
        found["loading"] = _single(loaded.bytes[-1] + passing)
    else:
        found |= _from_files(configuration, recording, loaded)
    trained = next(found[name] for name in reversed(found) if name.endswith("update"))
    copied = np.zeros((2, len(KINDS)))
    copied[0, KINDS.index("temporaries")] = 0 if configuration.cuda else recording.own
    found["checkpoint"] = _single(trained.bytes[-1] + copied)
    return found


def _from_files(configuration: Configuration, recording: Recording, loaded: Timeline) -> dict[str, Timeline]:
    """Loading on a CPU, where the mapped file that is converted is in memory too, before training, to merge, to export.

    The exported graph is held beside the model that it must agree with, each in fp32; onnxruntime turns its matrices
    round one at a time. Then both give the logits of a text.
    """
    temporaries, weights = KINDS.index("temporaries"), KINDS.index("weights")
    model, at = configuration.model, configuration.precision
    file_bytes = stored_dtype(model).itemsize * recording.parameters
    beside = np.zeros((2, len(KINDS)))
    beside[0, temporaries] = file_bytes if is_converted(model, at) else 0
    # A packed backbone's original is loaded in fp32 to be merged; what was merged is read one tensor at a time.
    again = np.zeros((2, len(KINDS)))
    converted = file_bytes if is_packed(at) and is_converted(model, "fp32") else 0
    again[0, weights], again[0, temporaries] = 4 * recording.parameters, max(converted, 4 * recording.largest)
    exporting = np.zeros((2, len(KINDS)))
    exporting[0, weights] = 4 * recording.parameters
    exporting[0, temporaries] = 4 * (recording.parameters + max(recording.largest, 2 * _text_logits(configuration)))
    # Up to where packing begins the trace has temporaries of initialising, which loading does not do.
    packing = {segment: ends for segment, ends in loaded.segments.items() if segment[0] == "pack"}
    both = replace(loaded, bytes=loaded.bytes + beside, segments=packing)
    loading = both if packing else _single(both.bytes[-1])
    return {"loading": loading, "reloading": _single(again), "exporting": _single(exporting)}


def _text_logits(configuration: Configuration) -> int:
    """How many logits a graph gives at once: those of a piece of one text."""
    if configuration.task == "classification":
        return configuration.labels
    tokens = configuration.target_tokens if configuration.task == "seq2seq" else configuration.tokens
    return min(tokens, PREFILL_TOKENS) * int(configuration.model["vocab_size"])


def _timeline(recording: Recording, name: str, size: int) -> Timeline:
    tracker, phase = recording.tracker, recording.tracker.phases[name]
    known = {uid: tracker.storage(uid) for uid in {*phase.held, *map(abs, phase.events)}}

    def changes(events: Sequence[int], growing: bool) -> Array:
        """What each of the events adds, (events, 2, kinds)."""
        found = np.zeros((len(events), 2, len(KINDS)))
        if not events:
            return found
        each = [known[abs(event)] for event in events]
        asked, taken = np.array([(asked, taken) for asked, taken, _ in each]).T
        # Of what has the size of trained tensors, one in ``size`` is a multiple of it by chance.
        grows = np.array([growing and size > 1 and kind in PASSING for _, _, kind in each]) & (asked % size == 0)
        shares, signs = np.where(grows, asked // size, 0), np.sign(events)
        rows, columns = np.arange(len(events)), [KINDS.index(kind) for _, _, kind in each]
        found[rows, 0, columns] = signs * (taken - shares * size)
        found[rows, 1, columns] = signs * shares
        return found

    held = changes(phase.held, True).sum(0)
    later = changes(phase.events, not name.endswith("update"))
    segments = _segments(recording.marks.get(name, []), len(phase.events))
    return Timeline(np.concatenate([held[None], later]).cumsum(0), segments, phase.tally.split(size))


def _segments(marks: list[tuple[tuple[str, int, int], int]], moments: int) -> dict[tuple[Any, ...], tuple[int, int]]:
    """Where a phase is cut, with a name for each part that it has at every depth.

    Layers inside a stack are left out: they lie between the first and the last in memory as in place.
    """
    layers = {stack: 1 + max(i for (_, s, i), _ in marks if s == stack) for (_, stack, _), _ in marks}
    cuts: list[tuple[tuple[Any, ...], int]] = [(("begin", 0, 0), 0)]
    for (what, stack, index), moment in marks:
        nearer = index if index < layers[stack] / 2 else index - layers[stack]
        cuts.append(((what, stack, nearer), moment))
    found: dict[tuple[Any, ...], tuple[int, int]] = {}
    seen: dict[tuple[Any, ...], int] = {}
    for (label, start), end in zip(cuts, [*(moment for _, moment in cuts[1:]), moments], strict=True):
        seen[label] = seen.get(label, 0) + 1
        found[(*label, seen[label])] = (start, end)
    return found


def _single(held: Array) -> Timeline:
    return Timeline(held[None], {("begin", 0, 0, 1): (0, 0)})


def _largest_passing(recording: Recording) -> int:
    """The largest layer that existed unpacked for a while."""
    events = recording.tracker.phases["loading"].events
    return max((recording.tracker.storage(-event)[1] for event in events if event < 0), default=0)


def _saturated(configuration: Configuration) -> int:
    """The microbatch from which the answers fill a chunk of the loss; 1 where there are no chunks."""
    if configuration.task == "classification":
        return 1
    tokens = configuration.target_tokens if configuration.task == "seq2seq" else configuration.tokens
    return max(1, math.ceil(_loss_rows(configuration) / tokens))


def _loss_rows(configuration: Configuration) -> int:
    """How many answers the loss makes logits of at a time."""
    return int(chunks(1 << 20, int(configuration.model["vocab_size"]))[0].stop)


def _prime(configuration: Configuration, least: int) -> int:
    """A prime of at least ``least`` that divides no number of model and method, no length and no workspace of cuBLAS.

    Nor does it divide the rows that are multiplied at a time: of logits by the vocabulary, of the head by its width.
    """
    given = (*configuration.model.values(), *configuration.options.values())
    numbers = {value for value in given if isinstance(value, int) and value > 1}
    numbers |= {configuration.tokens, configuration.target_tokens, Device().blas_workspace_bytes}
    if configuration.task != "classification":
        numbers |= {
            _loss_rows(configuration),
            *(CHUNK_BYTES // (4 * (configuration.model.get(w) or 1)) for w in WIDTHS),
        }
    size = least
    while any(size % d == 0 for d in range(2, math.isqrt(size) + 1)) or any(n % size == 0 for n in numbers):
        size += 1
    return size
