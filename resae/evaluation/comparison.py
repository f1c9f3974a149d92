"""Model × stacks × metrics → flat rows: what replacing layers costs, what is reconstructed, and how
much the dictionaries of different layers repeat each other.

Every method is measured on the same held-out tokens. Cross-entropy and KL are means over positions
whose input token is not special. Ablations put zero, or the mean activation, at the same tokens of
the same layers as the replacement they are compared with.
"""

from collections.abc import Callable, Iterable, Sequence
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
    cross_entropy,
    kl_divergence,
    recovered,
    redundancy,
)
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
from resae.replacements.context import replacement
from resae.stack.stack import ReSAE


@dataclass
class _Sums:
    """Nats over the evaluated positions of one way of running the model."""

    ce: float = 0.0
    kl: float = 0.0
    tokens: int = 0
    row_ce: list[float] = field(default_factory=list)
    row_tokens: list[int] = field(default_factory=list)

    def add(self, logits: Tensor, clean: Tensor, input_ids: Tensor, counted: Tensor) -> None:
        nats = cross_entropy(logits, input_ids).double()
        of_rows = nats.where(counted, 0.0).sum(1)
        self.row_ce += of_rows.tolist()
        self.row_tokens += counted.sum(1).tolist()
        self.ce += float(of_rows.sum())
        self.kl += float(kl_divergence(clean, logits)[counted].double().sum())
        self.tokens += int(counted.sum())


@dataclass(frozen=True)
class _Variant:
    """One replaced way of running the model."""

    method: Method
    mode: Mode
    loop: Loop | None
    layers: tuple[str, ...]
    sums: _Sums = field(default_factory=_Sums)


def evaluate(
    lm: HookedLM,
    methods: Sequence[Method],
    batches: Iterable[Tensor],
    *,
    on_batch: Callable[[int], None] | None = None,
) -> Evaluation:
    """Measure every method on the same token batches `[B, T]`; all stacks at the same hook points.

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
    layer_sets = sorted({v.layers for v in variants})
    means = _mean_activations(lm, points, batches)
    ablated = {(kind, layers): _Sums() for layers in layer_sets for kind in ("zero", "mean")}
    reconstructions = [_Reconstruction(m, loop) for m in methods for loop in m.loops]
    clean_sums = _Sums()

    for done, ids in enumerate(batches, start=1):
        special = lm.is_special(ids)
        counted = ~special[:, :-1]
        captured = lm.capture(ids, points)
        xs = [captured[point] for point in points]
        clean = lm.logits(ids)
        clean_sums.add(clean, clean, ids, counted)
        for (kind, layers), sums in ablated.items():
            constants = [m if kind == "mean" else torch.zeros_like(m) for m in means]
            put = {
                p: _put_constant(value, special)
                for p, value in zip(points, constants, strict=True)
                if p.name in layers
            }
            sums.add(lm.replace(ids, put), clean, ids, counted)
        for v in variants:
            options: dict[str, Any] = {"mode": v.mode, "loop": v.loop or "open", "layers": v.layers}
            if v.mode != "online":
                options["clean"] = xs
            with replacement(lm, v.method.stack, **options):
                v.sums.add(lm.logits(ids), clean, ids, counted)
        with torch.no_grad():
            for r in reconstructions:
                r.add([x[~special].float() for x in xs])
        if on_batch is not None:
            on_batch(done)

    compared = [(m, W_dec) for m in methods if len(W_dec := _dictionaries(m)) > 1]
    return Evaluation(
        replacement=[
            _replacement_row(v, clean_sums, ablated["zero", v.layers], ablated["mean", v.layers])
            for v in variants
        ],
        reconstruction=[row for r in reconstructions for row in r.rows()],
        redundancy=[RedundancyRow(m.name, m.k, **asdict(redundancy(W))) for m, W in compared],
        redundancy_histogram=[
            HistogramRow(m.name, m.k, HISTOGRAM_EDGES, cosine_histogram(W)) for m, W in compared
        ],
        row_sums=[
            RowSums(None, None, None, [], clean_sums.row_ce, clean_sums.row_tokens),
            *(_row_sums(v) for v in variants),
        ],
    )


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
    stack, tokens = v.method.stack, v.sums.tokens
    ce, ce_clean = v.sums.ce / tokens, clean.ce / clean.tokens
    if ce != ce:
        raise ValueError(
            f"evaluate: cross-entropy of {v.method.name} ({v.mode}) is NaN; the stack or the "
            f"model's activations hold NaN"
        )
    return ReplacementRow(
        method=v.method.name,
        loop=None if v.loop is None else str(v.loop),
        mode=str(v.mode),
        layers=list(v.layers),
        k=v.method.k,
        active_total=stack.upstream_l0(stack.hook_points.index(v.layers[-1])),
        ce_clean=ce_clean,
        ce=ce,
        delta_ce=ce - ce_clean,
        ce_recovered_zero=recovered(zero.ce / tokens, ce, ce_clean),
        ce_recovered_mean=recovered(mean.ce / tokens, ce, ce_clean),
        kl=v.sums.kl / tokens,
        tokens=tokens,
    )


def _row_sums(v: _Variant) -> RowSums:
    loop = None if v.loop is None else str(v.loop)
    sums = v.sums
    return RowSums(v.method.name, loop, str(v.mode), list(v.layers), sums.row_ce, sums.row_tokens)


def delta_ce(lm: HookedLM, stack: ReSAE, batches: Iterable[Tensor]) -> dict[str, float]:
    """ΔCE of replacing all layers on token batches `[B, T]`, closed loop, in nats per token: modes
    `online` and `teacher_forced`, equal to the rows of `evaluate`."""
    sums: dict[str, _Sums] = {"clean": _Sums(), "online": _Sums(), "teacher_forced": _Sums()}
    for ids in batches:
        ids = ids.to(lm.device)
        counted = ~lm.is_special(ids)[:, :-1]
        clean = lm.logits(ids)
        sums["clean"].add(clean, clean, ids, counted)
        modes = (Mode.ONLINE, Mode.TEACHER_FORCED)
        for mode in modes:
            with replacement(lm, stack, mode=mode, loop="closed"):
                sums[mode].add(lm.logits(ids), clean, ids, counted)
    ce = {name: s.ce / max(1, s.tokens) for name, s in sums.items()}
    return {name: ce[name] - ce["clean"] for name in ("online", "teacher_forced")}


def collapse_difference(lm: HookedLM, stack: ReSAE, input_ids: Tensor) -> float:
    """Largest difference between the logits with all layers replaced teacher-forced and with the
    last one alone, special tokens included: 0, since the last replacement overwrites the others.

    (With special tokens left alone it is only nearly 0: a separator inside a row is not
    overwritten, and carries on what it read from replaced tokens.)
    """
    logits = []
    for layers in (None, stack.hook_points[-1:]):
        with replacement(
            lm, stack, mode="teacher_forced", loop="open", layers=layers, replace_special=True
        ):
            logits.append(lm.logits(input_ids.to(lm.device)))
    return float((logits[0] - logits[1]).abs().max())


def forward_passes(methods: Sequence[Method]) -> int:
    """Number of forward passes that `evaluate` makes over each batch."""
    variants = _variants(methods, tuple(methods[0].stack.hook_points))
    return len(variants) + 2 * len({v.layers for v in variants}) + 3


def _variants(methods: Sequence[Method], everything: tuple[str, ...]) -> list[_Variant]:
    modes = (Mode.TEACHER_FORCED, Mode.ONLINE, Mode.ERROR_ADDED)
    variants = []
    for method in methods:
        for loop in method.loops:
            variants += [_Variant(method, mode, loop, everything) for mode in modes]
            variants += [_Variant(method, Mode.TEACHER_FORCED, loop, s) for s in method.subsets]
    return variants


def _put_constant(value: Tensor, special: Tensor) -> Callable[[Tensor], Tensor]:
    keep = special.unsqueeze(-1)
    return lambda stream: torch.where(keep, stream, value.to(stream.dtype))


def _mean_activations(
    lm: HookedLM, points: Sequence[HookPoint], batches: Sequence[Tensor]
) -> list[Tensor]:
    """`[D]` per point: the mean over the evaluated tokens."""
    sums = [torch.zeros(lm.d_model, dtype=torch.float64, device=lm.device) for _ in points]
    count = 0
    for ids in batches:
        keep = ~lm.is_special(ids)
        captured = lm.capture(ids, points)
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
        self.target = [VarianceUnexplained() for _ in layers]
        self.active = [0 for _ in layers]
        self.fired = [
            torch.zeros(method.stack.sae(i).config.d_sae, dtype=torch.bool)
            if isinstance(method.stack, ReSAE)
            else None
            for i in layers
        ]

    def add(self, xs: Sequence[Tensor]) -> None:
        stack = self.method.stack
        loop = self.loop or Loop.OPEN
        x_hats, codes = stack(xs, loop=loop)
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
                )
            )
        return rows


def _dictionaries(method: Method) -> list[Tensor]:
    # Of a boosted autoencoder the dictionary is two, that of the frozen one among them.
    stack = method.stack
    if not isinstance(stack, ReSAE) or stack.shared or stack.boosted:
        return []
    return [stack.sae(i).W_dec for i in range(stack.n_layers)]
