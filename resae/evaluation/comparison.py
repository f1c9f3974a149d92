"""Model × stacks × metrics → flat rows: what replacing layers costs, what is reconstructed, and how
much the dictionaries of different layers repeat each other.

Every method is measured on the same held-out tokens. Cross-entropy and KL are means over positions
whose input token is not special. Sink tokens (`resae.models.sinks`), by the rule of any of the
methods, are left alone by each stack that has a rule, and are in no FVU but `fvu_with_sinks`.
Ablations put zero, or the mean activation, at the same tokens of
the same layers as the replacement they are compared with.
"""

from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from resae.choices import Loop, Mode
from resae.evaluation.methods import Method
from resae.evaluation.metrics import (
    HISTOGRAM_EDGES,
    VarianceUnexplained,
    cosine_histogram,
    recovered,
    redundancy,
)
from resae.evaluation.next_token import largest_difference, next_token_losses
from resae.evaluation.rows import (
    Evaluation,
    HistogramRow,
    ReconstructionRow,
    RedundancyRow,
    ReplacementRow,
    RowSums,
)
from resae.models.hooked import HookedLM
from resae.models.points import HookPoint
from resae.models.restart import CleanPass, SharedPasses
from resae.models.sinks import SinkRule
from resae.models.unembedding import unembedding_of
from resae.replacements.context import Replacement, replacement
from resae.stack.stack import AffineOnly, ReSAE
from resae_kernels import SparseCode


@dataclass
class _Sums:
    """Nats over the evaluated positions of one way of running the model."""

    ce: float = 0.0
    kl: float = 0.0
    tokens: int = 0
    sinks: int = 0
    rows: dict[int, tuple[float, int]] = field(default_factory=dict)
    """Number of a row → cross-entropy and positions."""

    def add(self, rows: Sequence[int], positions: Sequence[int], ce: Tensor, kl: Tensor) -> None:
        """Add these rows, of which `ce` and `kl` have the evaluated positions one after another."""
        of_rows = [float(part.sum()) for part in ce.split(list(positions))]
        self.rows |= dict(zip(rows, zip(of_rows, positions, strict=True), strict=True))
        self.ce += float(ce.sum())
        self.kl += float(kl.sum())
        self.tokens += len(ce)

    @property
    def per_row(self) -> tuple[list[float], list[int]]:
        """Cross-entropy and positions of every row, in their order."""
        in_order = [self.rows[row] for row in sorted(self.rows)]
        return [ce for ce, _ in in_order], [positions for _, positions in in_order]


@dataclass(frozen=True)
class _Replaced:
    """A way of running the model: layers replaced by a stack."""

    stack: ReSAE | AffineOnly
    mode: Mode
    loop: Loop | None
    layers: tuple[str, ...]
    sums: _Sums = field(default_factory=_Sums)

    @property
    def overwrites(self) -> bool:
        """Does the replacement of the last layer overwrite all earlier ones?"""
        return self.mode == Mode.TEACHER_FORCED

    def active(
        self, lm: HookedLM, clean: CleanPass, left_alone: Tensor
    ) -> AbstractContextManager[Replacement]:
        del left_alone  # the stack's own rule
        options: dict[str, Any] = {"mode": self.mode, "loop": self.loop or "open"}
        if self.mode != Mode.ONLINE:
            options["clean"] = clean.streams
        return replacement(lm, self.stack, layers=self.layers, **options)


@dataclass(frozen=True)
class _Ablated:
    """A way of running the model: constants at the tokens of layers that are not left alone."""

    constants: Mapping[HookPoint, Tensor]
    """`[D]` per layer."""
    layers: tuple[str, ...]
    sums: _Sums = field(default_factory=_Sums)
    overwrites: bool = True

    def active(
        self, lm: HookedLM, clean: CleanPass, left_alone: Tensor
    ) -> AbstractContextManager[None]:
        del clean
        return lm.replacing(
            {point: _put_constant(value, left_alone) for point, value in self.constants.items()}
        )


@dataclass(frozen=True)
class _Variant:
    """One replaced way of running the model, of a method."""

    method: Method
    run: _Replaced


def evaluate(
    lm: HookedLM,
    methods: Sequence[Method],
    batches: Iterable[Tensor],
    *,
    on_batch: Callable[[int], None] | None = None,
) -> Evaluation:
    """Measure every method on the same token batches `[B, T]`; all stacks at the same hook points.

    Passes start at the first layer that they replace, and at the last one where that overwrites the
    others (`resae.models.restart`). Logits are made and compared in blocks of the vocabulary
    (`resae.evaluation.next_token`); what the head reads is kept of every pass over one batch.

    Args:
        batches: held-out rows, kept in memory (tokens only).
        on_batch: called with the number of batches done.

    Raises:
        ValueError: no tokens, stacks of different layers or of another model, NaN in the result.
    """
    batches = [batch.to(lm.device) for batch in batches]
    if not batches:
        raise ValueError("evaluate: no held-out tokens; the dataset is empty or too short")
    names = _common_layers(lm, methods)
    points = lm.hook_points(names)
    variants = _variants(methods, tuple(names))
    rules = [m.stack.sinks for m in methods if m.stack.sinks is not None]
    zero, mean = _ablations(
        points,
        _mean_activations(lm, points, batches, rules),
        {v.run.layers for v in variants},
    )
    reconstructions = [_Reconstruction(m, loop) for m in methods for loop in m.loops]
    passes = _Passes(SharedPasses(lm, points, batches[0][:1]), rules)
    runs = [*zero.values(), *mean.values(), *(v.run for v in variants)]
    for done, batch in enumerate(batches, start=1):
        for part in _alike(lm, batch):
            ids = batch[part]
            clean, special = passes.measure(batch, part, runs), lm.is_special(ids)
            sinks = _sinks(rules, clean.streams, special)
            with torch.no_grad():
                for r in reconstructions:
                    r.add([x[~special].float() for x in clean.streams], sinks[~special])
        if on_batch is not None:
            on_batch(done)

    compared = [(m, W_dec) for m in methods if len(W_dec := _dictionaries(m)) > 1]
    return Evaluation(
        replacement=[
            _replacement_row(v, passes.clean, zero[v.run.layers].sums, mean[v.run.layers].sums)
            for v in variants
        ],
        reconstruction=[row for r in reconstructions for row in r.rows()],
        redundancy=[RedundancyRow(m.name, m.k, **asdict(redundancy(W))) for m, W in compared],
        redundancy_histogram=[
            HistogramRow(m.name, m.k, HISTOGRAM_EDGES, cosine_histogram(W)) for m, W in compared
        ],
        row_sums=[
            RowSums(None, None, None, [], *passes.clean.per_row),
            *(_row_sums(v) for v in variants),
        ],
    )


class _Passes:
    """Measures ways of running a model on batches, and the model as it is."""

    def __init__(self, shared: SharedPasses, rules: Sequence[SinkRule]):
        self._shared = shared
        self._rules = rules
        self.clean = _Sums()
        self._rows_before = 0

    def measure(
        self, batch: Tensor, part: Tensor, runs: Sequence[_Replaced | _Ablated]
    ) -> CleanPass:
        """Run the rows `part` of a batch `[B, T]` unchanged and in every way, and add the losses to
        `sums`. The next batch begins when all rows have been run."""
        ids = batch[part]
        lm, unembedding = self._shared.lm, self._shared.unembedding
        special = lm.is_special(ids)
        counted = ~special[:, :-1]
        clean = self._shared.clean(ids)
        sinks = [_sinks([rule], clean.streams, special) for rule in self._rules]
        masks = [special, *(special | found for found in sinks)]
        left_alone = torch.stack(masks).any(0)
        # One that is left alone behind replaced ones keeps what it read of them. A stack leaves
        # alone by its own rule or, without one, only special tokens.
        overwritten = not any(_left_alone_inside(mask).any() for mask in (*masks, left_alone))
        targets = ids[:, 1:][counted]
        rows = [self._rows_before + row for row in part.tolist()]
        positions = counted.sum(1).tolist()

        def final(run: _Replaced | _Ablated) -> Tensor:
            overwrites = run.overwrites and overwritten
            start = self._shared.start(lm.hook_points(run.layers), overwrites=overwrites)
            with run.active(lm, clean, left_alone) as active:
                ended = _at(counted, self._shared.final(clean, start))
            if active is not None:
                run.sums.sinks += max(count.sinks for count in active.counts)
            return ended

        unchanged = _at(counted, clean.final)
        targets = targets.to(unchanged.device)
        at_once = len(runs) if unembedding.path is not None else 1  # whole logits: one pass's
        for i in range(0, len(runs), at_once):
            now = runs[i : i + at_once]
            losses = next_token_losses(unembedding, [unchanged, *map(final, now)], targets)
            if i == 0:
                self.clean.add(rows, positions, losses.ce[0], losses.kl[0])
            for run, ce, kl in zip(now, losses.ce[1:], losses.kl[1:], strict=True):
                run.sums.add(rows, positions, ce, kl)
        if len(self.clean.rows) == self._rows_before + len(batch):
            self._rows_before += len(batch)
        return clean


def _at(counted: Tensor, final: Tensor) -> Tensor:
    """`[n, D]` of `final [B, T, D]` at the evaluated positions `counted [B, T−1]`."""
    return final[:, :-1][counted.to(final.device)]


def _left_alone_inside(left_alone: Tensor) -> Tensor:
    """`[B]` bool of `left_alone [B, T]`: is there such a token behind one that is replaced?"""
    return (left_alone[:, 1:] & ~left_alone[:, :-1]).any(1)


def _alike(lm: HookedLM, batch: Tensor) -> Generator[Tensor]:
    """Numbers of the rows of a batch without special tokens behind others, and of those with such;
    either of them only if there are any."""
    inside = _left_alone_inside(lm.is_special(batch))
    for chosen in (~inside, inside):
        rows = chosen.nonzero().squeeze(1)
        if len(rows):
            yield rows


def _ablations(
    points: Sequence[HookPoint], means: Sequence[Tensor], layer_sets: set[tuple[str, ...]]
) -> tuple[dict[tuple[str, ...], _Ablated], dict[tuple[str, ...], _Ablated]]:
    """Per set of layers zero and mean ablation of it."""

    def ablations(constants: Sequence[Tensor]) -> dict[tuple[str, ...], _Ablated]:
        pairs = list(zip(points, constants, strict=True))
        return {
            layers: _Ablated({p: value for p, value in pairs if p.name in layers}, layers)
            for layers in sorted(layer_sets)
        }

    return ablations([torch.zeros_like(m) for m in means]), ablations(means)


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


def _replacement_row(v: _Variant, clean: _Sums, zero: _Sums, mean: _Sums) -> ReplacementRow:
    stack, run, tokens = v.method.stack, v.run, v.run.sums.tokens
    ce, ce_clean = run.sums.ce / tokens, clean.ce / clean.tokens
    if ce != ce:
        raise ValueError(
            f"evaluate: cross-entropy of {v.method.name} ({run.mode}) is NaN; the stack or the "
            f"model's activations hold NaN"
        )
    return ReplacementRow(
        method=v.method.name,
        loop=None if run.loop is None else str(run.loop),
        mode=str(run.mode),
        layers=list(run.layers),
        k=v.method.k,
        active_total=stack.upstream_l0(stack.hook_points.index(run.layers[-1])),
        ce_clean=ce_clean,
        ce=ce,
        delta_ce=ce - ce_clean,
        ce_recovered_zero=recovered(zero.ce / tokens, ce, ce_clean),
        ce_recovered_mean=recovered(mean.ce / tokens, ce, ce_clean),
        kl=run.sums.kl / tokens,
        tokens=tokens,
        sinks=run.sums.sinks,
    )


def _row_sums(v: _Variant) -> RowSums:
    run = v.run
    loop = None if run.loop is None else str(run.loop)
    return RowSums(v.method.name, loop, str(run.mode), list(run.layers), *run.sums.per_row)


def delta_ce(lm: HookedLM, stack: ReSAE, batches: Iterable[Tensor]) -> dict[str, float]:
    """ΔCE of replacing all layers on token batches `[B, T]`, closed loop, in nats per token: modes
    `online` and `teacher_forced`, equal to the rows of `evaluate`."""
    layers = tuple(stack.hook_points)
    modes = (Mode.ONLINE, Mode.TEACHER_FORCED)
    runs = [_Replaced(stack, mode, Loop.CLOSED, layers) for mode in modes]
    batches = [batch.to(lm.device) for batch in batches]
    if not batches:
        return {str(mode): 0.0 for mode in modes}
    rules = [] if stack.sinks is None else [stack.sinks]
    passes = _Passes(SharedPasses(lm, lm.hook_points(layers), batches[0][:1]), rules)
    for batch in batches:
        for part in _alike(lm, batch):
            passes.measure(batch, part, runs)
    ce = [run.sums.ce - passes.clean.ce for run in runs]
    return {
        str(mode): loss / max(1, passes.clean.tokens) for mode, loss in zip(modes, ce, strict=True)
    }


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
    variants = _variants(methods, tuple(methods[0].stack.hook_points))
    return len(variants) + 2 * len({v.run.layers for v in variants}) + 2


def _variants(methods: Sequence[Method], everything: tuple[str, ...]) -> list[_Variant]:
    modes = (Mode.TEACHER_FORCED, Mode.ONLINE, Mode.ERROR_ADDED)
    variants = []
    for method in methods:
        for loop in method.loops:
            cases = [(mode, everything) for mode in modes]
            cases += [(Mode.TEACHER_FORCED, subset) for subset in method.subsets]
            variants += [_Variant(method, _Replaced(method.stack, m, loop, s)) for m, s in cases]
    return variants


def _put_constant(value: Tensor, special: Tensor) -> Callable[[Tensor], Tensor]:
    keep = special.unsqueeze(-1)
    return lambda stream: torch.where(keep, stream, value.to(stream.dtype))


def _sinks(rules: Sequence[SinkRule], xs: Sequence[Tensor], special: Tensor) -> Tensor:
    """`[B, T]` bool: sinks by any of the rules, from streams `[B, T, D]`; special tokens are
    none."""
    found = torch.zeros_like(special)
    for rule in rules:
        found |= rule.anywhere(xs).to(found.device)
    return found & ~special


def _mean_activations(
    lm: HookedLM,
    points: Sequence[HookPoint],
    batches: Sequence[Tensor],
    rules: Sequence[SinkRule],
) -> list[Tensor]:
    """`[D]` per point: the mean over the evaluated tokens that are no sinks."""
    sums = [torch.zeros(lm.d_model, dtype=torch.float64, device=lm.device) for _ in points]
    count = 0
    for ids in batches:
        captured = lm.capture(ids, points)
        special = lm.is_special(ids)
        keep = ~(special | _sinks(rules, [captured[point] for point in points], special))
        for total, point in zip(sums, points, strict=True):
            total += captured[point][keep].double().sum(0)
        count += int(keep.sum())
    return [total / max(1, count) for total in sums]


class _Reconstruction:
    """Streaming FVU, L0 and fired latents of one method and loop, per layer."""

    def __init__(self, method: Method, loop: Loop | None):
        self.method = method
        self.loop = loop
        layers = range(method.stack.n_layers)
        self.stream = [VarianceUnexplained() for _ in layers]
        self.with_sinks = [VarianceUnexplained() for _ in layers]
        self.sinks = 0
        self.target = [VarianceUnexplained() for _ in layers]
        self.active = [0 for _ in layers]
        self.fired = [
            torch.zeros(method.stack.sae(i).config.d_sae, dtype=torch.bool)
            if isinstance(method.stack, ReSAE)
            else None
            for i in layers
        ]

    def add(self, xs: Sequence[Tensor], sinks: Tensor) -> None:
        """Add L streams `[N, D]`, of which the tokens `sinks [N]` are sinks."""
        stack = self.method.stack
        loop = self.loop or Loop.OPEN
        x_hats, codes = stack(xs, loop=loop)
        for x, x_hat, sums in zip(xs, x_hats, self.with_sinks, strict=True):
            sums.add(x, x_hat)
        found = int(sinks.sum())
        if found:
            self.sinks += found
            kept = ~sinks
            xs, x_hats = [x[kept] for x in xs], [x_hat[kept] for x_hat in x_hats]
            codes = [SparseCode(*(part[kept] for part in code)) for code in codes]
        for layer, x in enumerate(xs):
            self.stream[layer].add(x, x_hats[layer])
            if not isinstance(stack, ReSAE):
                continue
            code = codes[layer]
            prediction = stack.predictor(layer, x_hats if self.loop == "closed" else xs)
            target = x if prediction is None else x - prediction
            self.target[layer].add(target, stack.sae(layer).decode(*code))
            self.active[layer] += int((code.acts > 0).sum())
            fired = self.fired[layer]
            assert fired is not None
            fired[code.indices[code.acts > 0].cpu()] = True

    def rows(self) -> list[ReconstructionRow]:
        rows: list[ReconstructionRow] = []
        for layer, name in enumerate(self.method.stack.hook_points):
            fired = self.fired[layer]
            rows.append(
                ReconstructionRow(
                    method=self.method.name,
                    loop=None if self.loop is None else str(self.loop),
                    k=self.method.k,
                    layer=name,
                    fvu_stream=self.stream[layer].fvu(),
                    fvu_target=None if fired is None else self.target[layer].fvu(),
                    l0=self.active[layer] / self.stream[layer].count,
                    dead_fraction=None if fired is None else float((~fired).double().mean()),
                    fvu_with_sinks=self.with_sinks[layer].fvu(),
                    sinks=self.sinks,
                )
            )
        return rows


def _dictionaries(method: Method) -> list[Tensor]:
    # Of a boosted autoencoder the dictionary is two, that of the frozen one among them.
    stack = method.stack
    if not isinstance(stack, ReSAE) or stack.shared or stack.boosted:
        return []
    return [stack.sae(i).W_dec for i in range(stack.n_layers)]
