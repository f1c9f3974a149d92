"""Model × stacks × metrics → flat rows: what replacing layers costs, what is reconstructed, and how
much the dictionaries of different layers repeat each other.

Every method is measured on the same held-out tokens. Cross-entropy and KL are means over positions
whose input token is not special. Sink tokens (`resae.models.sinks`), by the rule of any of the
methods, are left alone by each stack that has a rule, and are in no FVU but `fvu_with_sinks`.
Ablations put zero, or the mean activation, at the same tokens of
the same layers as the replacement they are compared with.

Everything is summed per document while the text streams by: what is held does not grow with it, but
for the token ids. Intervals are made of these sums at the end.
"""

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import accumulate, chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from resae.choices import Loop, Mode
from resae.evaluation.intervals import Bootstrap, Quantity, divided
from resae.evaluation.methods import Method, counterpart, known_reference
from resae.evaluation.next_token import largest_difference
from resae.evaluation.passes import Ablated, Passes, Replaced, alike, sinks_of
from resae.evaluation.reconstruction import Reconstruction, StreamMeans
from resae.evaluation.redundancy import HISTOGRAM_EDGES, LargestCosines, redundancy
from resae.evaluation.rows import (
    AblationRow,
    Evaluation,
    HistogramRow,
    RedundancyRow,
    ReplacementRow,
    RowSums,
)
from resae.evaluation.sums import Checkpoint, Sums, digest, number_documents
from resae.models.hooked import HookedLM
from resae.models.points import HookPoint
from resae.models.restart import SharedPasses
from resae.models.unembedding import unembedding_of
from resae.replacements.context import replacement
from resae.stack.stack import ReSAE

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Variant:
    """One replaced way of running the model, of a method."""

    method: Method
    run: Replaced


def evaluate(
    lm: HookedLM,
    methods: Sequence[Method],
    batches: Iterable[Tensor],
    *,
    documents: Sequence[int] | None = None,
    reference: str | None = None,
    on_means: Callable[[int], None] | None = None,
    on_batch: Callable[[int], None] | None = None,
    checkpoint: Path | None = None,
    checkpoint_seconds: float = 60.0,
) -> Evaluation:
    """Measure every method on the same token batches `[B, T]`; all stacks at the same hook points.

    Args:
        batches: held-out rows, kept in memory (tokens only).
        documents: number of the document of every row, the same for neighbouring rows of one
            document, which intervals draw as one. None: rows that begin in the same document, as
            the separators tell; every row, where that gives fewer than 16. Of more than 512,
            neighbouring ones are drawn as one.
        reference: name of the method that differences are taken from; None: the first.
        on_means: called with the number of batches whose mean activations are summed, the first
            of two times through the batches.
        on_batch: called with the number of batches done, in the second.
        checkpoint: file that the sums so far are written to, and that an evaluation of the same
            model, stacks and tokens goes on from, to the same bits; removed at the end. The file of
            another evaluation is replaced.
        checkpoint_seconds: time between two writes.

    Raises:
        ValueError: no tokens, stacks of different layers or of another model, a reference that is
            no method, NaN in the result.
    """
    batches = [batch.to(lm.device) for batch in batches]
    if not batches:
        raise ValueError("evaluate: no held-out tokens; the dataset is empty or too short")
    names = _common_layers(lm, methods)
    reference = known_reference(methods, reference)
    numbers, told = number_documents(map(lm.is_special, batches), documents)
    shared = SharedPasses(lm, lm.hook_points(names), batches[0][:1])
    measured = _Comparison(shared, methods, numbers)
    saved = Checkpoint(
        checkpoint,
        measured.sums,
        lambda: _identity(shared, methods, numbers, batches),
        checkpoint_seconds,
    )
    if saved.is_of_another:
        log.warning(
            "%s holds the sums of another model, other stacks or other tokens; they are not used",
            checkpoint,
        )
    measured.run(batches, saved, on_means, on_batch)
    evaluation = measured.evaluation(reference, "documents" if told else "rows")
    saved.remove()
    return evaluation


class _Comparison:
    """All sums of an evaluation, by the methods that are compared.

    Args:
        documents: `[R]` number of the document of every row.
    """

    def __init__(self, shared: SharedPasses, methods: Sequence[Method], documents: Tensor):
        self._shared = shared
        self._methods = methods
        self._documents = documents
        self._rules = [m.stack.sinks for m in methods if m.stack.sinks is not None]
        count = int(documents[-1]) + 1
        names = tuple(methods[0].stack.hook_points)
        self._means = StreamMeans()
        self._clean = Sums(count)
        self._variants = _variants(methods, names, count)
        layer_sets = sorted({v.run.layers for v in self._variants})
        self._ablated = {(kind, s): Sums(count) for kind in ("zero", "mean") for s in layer_sets}
        self._reconstructions = [
            Reconstruction(method, loop, self._means, count)
            for method in methods
            for loop in method.loops
        ]
        self.sums = {"means": self._means.sums, "clean": self._clean}
        """All of them, by names for the checkpoint."""
        parts: list[Sums] = [v.run.sums for v in self._variants]
        parts += [*self._ablated.values()]
        parts += [s for r in self._reconstructions for s in (*r.sums, *r.latents)]
        self.sums |= {str(i): part for i, part in enumerate(parts)}

    def run(
        self,
        batches: Sequence[Tensor],
        saved: Checkpoint,
        on_means: Callable[[int], None] | None,
        on_batch: Callable[[int], None] | None,
    ) -> None:
        """Go through the batches twice: for mean activations, and with everything replaced. Those
        that are in the sums already are left out."""
        last = len(batches)
        for done in range(saved.done.get("means", 0) + 1, last + 1):
            self._add_means(batches[done - 1])
            saved.after_batch("means", done, last=done == last)
            if on_means is not None:
                on_means(done)
        passes = Passes(self._shared, self._rules, self._documents, self._clean)
        ablations = [
            _ablation(self._shared.points, kind, layers, self._means, sums)
            for (kind, layers), sums in self._ablated.items()
        ]
        runs = [*ablations, *(v.run for v in self._variants)]
        first_rows = [0, *accumulate(len(batch) for batch in batches)]
        for done in range(saved.done.get("passes", 0) + 1, last + 1):
            self._add_batch(batches[done - 1], first_rows[done - 1], passes, runs)
            saved.after_batch("passes", done, last=False)
            if on_batch is not None:
                on_batch(done)

    def _add_means(self, batch: Tensor) -> None:
        lm = self._shared.lm
        captured = lm.capture(batch, self._shared.points)
        streams = [captured[point] for point in self._shared.points]
        special = lm.is_special(batch)
        sinks = sinks_of(self._rules, streams, special)
        self._means.add([x[~special] for x in streams], ~sinks[~special])

    def _add_batch(
        self,
        batch: Tensor,
        first_row: int,
        passes: Passes,
        runs: Sequence[Replaced | Ablated],
    ) -> None:
        lm = self._shared.lm
        for part in alike(lm, batch):
            ids, rows = batch[part], first_row + part.cpu()
            clean, special = passes.measure(ids, rows, runs), lm.is_special(ids)
            kept = ~special
            sinks = sinks_of(self._rules, clean.streams, special)[kept]
            with torch.no_grad():
                xs = [x[kept].float() for x in clean.streams]
                documents, tokens = self._documents[rows], kept.sum(1).tolist()
                for reconstruction in self._reconstructions:
                    reconstruction.add(xs, sinks, documents, tokens)

    def evaluation(self, reference: str, resampled: str) -> Evaluation:
        """The rows of all sums, with intervals."""
        bootstrap = Bootstrap(self._clean.documents)
        costs = _Costs(bootstrap, self._clean, self._ablated, self._variants, reference)
        redundancy_rows, histograms = _redundancy_tables(self._methods)
        layers = range(len(self._shared.points))
        return Evaluation(
            replacement=[costs.replacement_row(v) for v in self._variants],
            reconstruction=[
                r.row(layer, bootstrap, self._counterpart(r, reference))
                for r in self._reconstructions
                for layer in layers
            ],
            redundancy=redundancy_rows,
            redundancy_histogram=histograms,
            row_sums=[
                RowSums(None, None, None, [], *_per_document(self._clean)),
                *(_row_sums(v) for v in self._variants),
            ],
            ablation=[costs.ablation_row(kind, layers) for kind, layers in self._ablated],
            density=[
                r.density_row(layer)
                for r in self._reconstructions
                if isinstance(r.method.stack, ReSAE)
                for layer in layers
            ],
            shared_latents=[
                r.shared_latents_row()
                for r in self._reconstructions
                if isinstance(r.method.stack, ReSAE) and r.method.stack.shared
            ],
            resampled=resampled,
        )

    def _counterpart(self, of: Reconstruction, reference: str) -> Reconstruction | None:
        if of.method.name == reference:
            return None
        named = [r for r in self._reconstructions if r.method.name == reference]
        return counterpart(of.method.k, of.loop, {(r.method.k, r.loop): r for r in named})


class _Costs:
    """Rows of what replaced and ablated layers cost, with intervals."""

    def __init__(
        self,
        bootstrap: Bootstrap,
        clean: Sums,
        ablated: Mapping[tuple[str, tuple[str, ...]], Sums],
        variants: Sequence[_Variant],
        reference: str,
    ):
        self._bootstrap = bootstrap
        self._ablated = ablated
        self._variants = variants
        self._reference = reference
        self._clean = self._per_token(clean, "ce")
        self._single = {
            (v.method, v.run.loop, v.run.layers): self._delta_ce(v.run.sums)
            for v in variants
            if len(v.run.layers) == 1 and v.run.mode == Mode.TEACHER_FORCED
        }

    def _per_token(self, sums: Sums, name: str) -> Quantity:
        return self._bootstrap.per_token(sums[name], sums["tokens"])

    def _delta_ce(self, sums: Sums) -> Quantity:
        return self._per_token(sums, "ce") - self._clean

    def _columns(self, quantities: Mapping[str, Quantity | None]) -> dict[str, Any]:
        columns: dict[str, Any] = {}
        for name, quantity in quantities.items():
            columns |= self._bootstrap.columns(name, quantity)
        return columns

    def replacement_row(self, v: _Variant) -> ReplacementRow:
        stack, run = v.method.stack, v.run
        ce, delta = self._per_token(run.sums, "ce"), self._delta_ce(run.sums)
        if ce[0] != ce[0]:
            raise ValueError(
                f"evaluate: cross-entropy of {v.method.name} ({run.mode}) is NaN; the stack or the "
                f"model's activations hold NaN"
            )
        against = self._counterpart(v)
        quantities = {
            "ce_clean": self._clean,
            "ce": ce,
            "delta_ce": delta,
            "ce_recovered_zero": self._recovered("zero", run.layers, ce),
            "ce_recovered_mean": self._recovered("mean", run.layers, ce),
            "kl": self._per_token(run.sums, "kl"),
            "difference": None if against is None else delta - self._delta_ce(against.run.sums),
            "sum_of_single": self._sum_of_single(v),
        }
        return ReplacementRow(
            method=v.method.name,
            loop=None if run.loop is None else str(run.loop),
            mode=str(run.mode),
            layers=list(run.layers),
            k=v.method.k,
            active_total=stack.upstream_l0(stack.hook_points.index(run.layers[-1])),
            tokens=round(run.sums.total("tokens")),
            sinks=round(run.sums.total("sinks")),
            reference=None if against is None else against.method.name,
            **self._columns(quantities),
        )

    def _counterpart(self, v: _Variant) -> _Variant | None:
        """The reference in the same mode and with the same layers replaced."""
        run = v.run
        if v.method.name == self._reference:
            return None
        among = {
            (other.method.k, other.run.loop): other
            for other in self._variants
            if other.method.name == self._reference
            and (other.run.mode, other.run.layers) == (run.mode, run.layers)
        }
        return counterpart(v.method.k, run.loop, among)

    def _recovered(self, kind: str, layers: tuple[str, ...], ce: Quantity) -> Quantity:
        """Share of the cross-entropy that an ablation loses and the replacement keeps."""
        ablated = self._per_token(self._ablated[kind, layers], "ce")
        if ablated[0] == self._clean[0]:
            raise ValueError("ce_recovered: the ablation does not change the cross-entropy")
        return divided(ablated - ce, ablated - self._clean)

    def _sum_of_single(self, v: _Variant) -> Quantity | None:
        """None for one layer, or where some layer was not replaced alone."""
        keys = [(v.method, v.run.loop, (layer,)) for layer in v.run.layers]
        if len(keys) == 1 or not all(key in self._single for key in keys):
            return None
        return np.sum([self._single[key] for key in keys], axis=0)

    def ablation_row(self, kind: str, layers: tuple[str, ...]) -> AblationRow:
        sums = self._ablated[kind, layers]
        quantities = {
            "ce": self._per_token(sums, "ce"),
            "delta_ce": self._delta_ce(sums),
            "kl": self._per_token(sums, "kl"),
        }
        tokens = round(sums.total("tokens"))
        return AblationRow(kind, list(layers), tokens=tokens, **self._columns(quantities))


def _ablation(
    points: Sequence[HookPoint],
    kind: str,
    layers: tuple[str, ...],
    means: StreamMeans,
    sums: Sums,
) -> Ablated:
    """The ablation `zero` or `mean` of these layers."""
    values = {p: means.without_sinks(i) for i, p in enumerate(points) if p.name in layers}
    if kind == "zero":
        values = {point: torch.zeros_like(mean) for point, mean in values.items()}
    return Ablated(values, layers, sums)


def _identity(
    shared: SharedPasses, methods: Sequence[Method], documents: Tensor, batches: Sequence[Tensor]
) -> bytes:
    """Digest of an evaluation: tokens, stacks, and what the model makes of the first row."""
    named = [f"{m.name} {m.k} {m.subsets} {m.stack.hook_points}" for m in methods]
    probe = shared.clean(batches[0][:1])
    stacks = [t for m in methods for t in _tensors_of(m)]
    return digest(
        [shared.lm.name, str(shared.lm.device), *named],
        chain([documents], batches, probe.streams, [probe.final], stacks),
    )


def _tensors_of(method: Method) -> Iterator[Tensor]:
    stack = method.stack
    yield from (stack if isinstance(stack, ReSAE) else stack.predictor).state_dict().values()


def _common_layers(lm: HookedLM, methods: Sequence[Method]) -> list[str]:
    """Hook points of all methods. Raises ValueError where they differ, or for another model."""
    names = methods[0].stack.hook_points
    for method in methods:
        method.stack.require_model(lm)
        if method.stack.hook_points != names:
            raise ValueError(
                f"evaluate: {method.name} has layers {', '.join(method.stack.hook_points)}, "
                f"{methods[0].name} {', '.join(names)}; evaluate them apart"
            )
    return names


def _per_document(sums: Sums) -> tuple[list[float], list[int]]:
    return sums["ce"].tolist(), sums["tokens"].long().tolist()


def _row_sums(v: _Variant) -> RowSums:
    run = v.run
    loop = None if run.loop is None else str(run.loop)
    return RowSums(v.method.name, loop, str(run.mode), list(run.layers), *_per_document(run.sums))


def delta_ce(lm: HookedLM, stack: ReSAE, batches: Iterable[Tensor]) -> dict[str, float]:
    """ΔCE of replacing all layers on token batches `[B, T]`, closed loop, in nats per token: modes
    `online` and `teacher_forced`, equal to the rows of `evaluate`."""
    layers = tuple(stack.hook_points)
    modes = (Mode.ONLINE, Mode.TEACHER_FORCED)
    runs = [Replaced(stack, mode, Loop.CLOSED, layers, Sums(1)) for mode in modes]
    batches = [batch.to(lm.device) for batch in batches]
    if not batches:
        return {str(mode): 0.0 for mode in modes}
    rules = [] if stack.sinks is None else [stack.sinks]
    shared, clean = SharedPasses(lm, lm.hook_points(layers), batches[0][:1]), Sums(1)
    for batch in batches:
        passes = Passes(shared, rules, torch.zeros(len(batch), dtype=torch.int64), clean)
        for part in alike(lm, batch):
            passes.measure(batch[part], part, runs)
    tokens = max(1.0, clean.total("tokens"))
    ce = clean.total("ce")
    return {str(run.mode): (run.sums.total("ce") - ce) / tokens for run in runs}


def collapse_difference(lm: HookedLM, stack: ReSAE, input_ids: Tensor) -> float:
    """Largest difference between the logits with all layers replaced teacher-forced and with the
    last one alone, special tokens included: 0, since the last replacement overwrites the others.
    Both passes are whole.

    (With special tokens left alone it is only nearly 0: a separator inside a row is not
    overwritten, and carries on what it read from replaced tokens.)
    """
    input_ids = input_ids.to(lm.device)
    unembedding = unembedding_of(lm, input_ids)
    finals = []
    for layers in (None, stack.hook_points[-1:]):
        with replacement(
            lm, stack, mode="teacher_forced", loop="open", layers=layers, replace_special=True
        ):
            finals.append(unembedding.final(input_ids).flatten(0, 1))
    return largest_difference(unembedding, *finals)


def forward_passes(methods: Sequence[Method]) -> int:
    """Number of forward passes that `evaluate` makes over each batch, most of them started at a
    replaced layer."""
    variants = _variants(methods, tuple(methods[0].stack.hook_points), 1)
    return len(variants) + 2 * len({v.run.layers for v in variants}) + 2


def _variants(
    methods: Sequence[Method], everything: tuple[str, ...], documents: int
) -> list[_Variant]:
    """All layers in every mode; further sets of layers teacher-forced and, where it differs,
    online."""
    modes = (Mode.TEACHER_FORCED, Mode.ONLINE, Mode.ERROR_ADDED)
    variants = []
    for method in methods:
        for loop in method.loops:
            cases = [(mode, everything) for mode in modes]
            for subset in method.subsets:
                cases.append((Mode.TEACHER_FORCED, subset))
                if len(subset) > 1:
                    cases.append((Mode.ONLINE, subset))
            for mode, layers in dict.fromkeys(cases):
                run = Replaced(method.stack, mode, loop, layers, Sums(documents))
                variants.append(_Variant(method, run))
    return variants


def _redundancy_tables(
    methods: Sequence[Method],
) -> tuple[list[RedundancyRow], list[HistogramRow]]:
    """Rows of every method with several dictionaries. Latents of a method without maps of its own
    are transported through those of the first method that learned some."""
    learned = [m for m in methods if _maps_of(m) is not None]
    rows, histograms = [], []
    for m in methods:
        W_dec = _dictionaries(m)
        if len(W_dec) < 2:
            continue
        source = m if m in learned else next(iter(learned), None)
        largest, transported = LargestCosines(W_dec, within=True), None
        if source is not None:
            transported = LargestCosines(W_dec, _maps_of(source))
        found = asdict(redundancy(largest, transported))
        maps_of = None if source is None else source.name
        rows.append(RedundancyRow(m.name, m.k, **found, maps_of=maps_of))
        histograms.append(HistogramRow(m.name, m.k, HISTOGRAM_EDGES, largest.histogram()))
    return rows, histograms


def _maps_of(method: Method) -> list[Tensor] | None:
    """The maps that a method learned; None for none, or the identity."""
    predictor = method.stack.predictor
    return None if predictor.kind in ("none", "identity") else predictor.A


def _dictionaries(method: Method) -> list[Tensor]:
    # Of a boosted autoencoder the dictionary is two, that of the frozen one among them.
    stack = method.stack
    if not isinstance(stack, ReSAE) or stack.shared or stack.boosted:
        return []
    return [stack.sae(i).W_dec for i in range(stack.n_layers)]
