"""Findings from the rows of a demo report, in sentences: also where a claim does not hold.

findings        of the paper's claims
extra_findings  of the further methods, each held against what it promises
"""

from collections.abc import Sequence

from resae.evaluation.labels import whole_selection
from resae.evaluation.rows import Evaluation, RedundancyRow, ReplacementRow
from resae.report.content import Report
from resae.report.rows import BoostRow, ElsewhereRow, FairRow, FvuRow, NestedFvuRow


def findings(evaluation: Evaluation, collapse: float) -> list[str]:
    """The claims, by the rows of `evaluate` and by what `collapse_difference` measured."""
    losses = _Losses(evaluation.replacement)
    return [
        *_online_sentences(losses),
        *_teacher_forced_sentences(losses),
        _identity_sentence(losses),
        _error_added_sentence(losses),
        _maps_alone_sentence(losses),
        _redundancy_sentence(evaluation.redundancy),
        f"Teacher-forced replacement of all layers equals replacing only the last one (max logit "
        f"difference {collapse:g}), because the last replacement overwrites the stream. Use the "
        f"online and error-added numbers.",
    ]


class _Losses:
    """Δ CE of replacing all selected layers."""

    def __init__(self, rows: Sequence[ReplacementRow]) -> None:
        self._rows = whole_selection(rows)
        self.layers = len(self._rows[0].layers)
        self.ks = sorted({row.k for row in rows if row.k is not None})
        self.methods = list(dict.fromkeys(row.method for row in self._rows))

    def by_k(self, method: str, mode: str, loop: str | None) -> dict[int, float]:
        """k → Δ CE, in the order of the rows; empty for a method that was not measured."""
        return {
            row.k: row.delta_ce
            for row in self._rows
            if (row.method, row.mode, row.loop) == (method, mode, loop) and row.k is not None
        }

    def of(self, method: str, mode: str, loop: str | None) -> list[float]:
        """Δ CE at each of `ks`."""
        losses = self.by_k(method, mode, loop)
        return [losses[k] for k in self.ks]

    def without_k(self, method: str, mode: str) -> float:
        """Δ CE of a method without autoencoders."""
        return next(r.delta_ce for r in self._rows if (r.method, r.mode) == (method, mode))


def _join(values: Sequence[float], digits: int = 2) -> str:
    return ", ".join(f"{v:.{digits}f}" for v in values)


def _online_sentences(losses: _Losses) -> list[str]:
    raw, equal = (losses.of(name, "online", None) for name in ("raw", "raw_equal_total"))
    ours, before = (losses.of("resae", "online", loop) for loop in ("closed", "open"))
    at = f"at k = {', '.join(map(str, losses.ks))}"
    ratios = [a / b for a, b in zip(ours, raw, strict=True)]
    held = "below 0.6 at every k" if max(ratios) < 0.6 else "NOT below 0.6 at every k"
    ahead = sum(a < b for a, b in zip(ours, equal, strict=True))
    return [
        f"Online, all {losses.layers} layers replaced at once, ReSAE loses {_join(ours)} "
        f"nats per token where raw SAEs lose {_join(raw)} ({at}): {_join(ratios)} of it, {held}.",
        f"Raw SAEs given as many latents in total as a ReSAE reconstruction is made of lose "
        f"{_join(equal)} online: ReSAE is ahead at {ahead} of {len(losses.ks)} k.",
        f"The residual must be taken against what was put into the stream: against the stream "
        f"before replacement, ReSAE loses {_join(before)} online.",
    ]


def _teacher_forced_sentences(losses: _Losses) -> list[str]:
    opened, closed = (losses.of("resae", "teacher_forced", loop) for loop in ("open", "closed"))
    order = "closed is below open" if all(map(float.__lt__, closed, opened)) else "the order VARIES"
    equal = losses.of("raw_equal_total", "teacher_forced", None)
    behind = sum(a > b for a, b in zip(opened, equal, strict=True))
    return [
        f"With clean codes, teacher-forced, encoding the error made so far again (closed loop) "
        f"loses {_join(closed)}, the open loop {_join(opened)}: {order}.",
        f"Teacher-forced at equal total latents, raw SAEs lose {_join(equal)}: open-loop ReSAE is "
        f"behind them at {behind} of {len(losses.ks)} k, so its gain is online, not here."
        if behind
        else f"Teacher-forced at equal total latents, raw SAEs lose {_join(equal)}, more than "
        f"open-loop ReSAE.",
    ]


def _identity_sentence(losses: _Losses) -> str:
    ours, identity = (losses.of(name, "online", "closed") for name in ("resae", "identity"))
    opened = losses.of("identity", "teacher_forced", "open")
    shares = [a / b for a, b in zip(ours, identity, strict=True)]
    return (
        f"Control: with the identity in place of the learned map the online loss is "
        f"{_join(identity)}, teacher-forced in open loop {_join(opened)}. "
        + (
            "So the gain comes from passing the previous reconstruction on, hardly from the map "
            "being learned."
            if min(shares) > 0.85
            else f"Learning the map leaves {_join(shares)} of that loss online."
        )
    )


def _error_added_sentence(losses: _Losses) -> str:
    ours = losses.of("resae", "error_added", "closed")
    raw, equal = (losses.of(name, "error_added", None) for name in ("raw", "raw_equal_total"))
    ahead = sum(a < b for a, b in zip(ours, equal, strict=True))
    return (
        f"With the clean errors of all layers added to the running stream, closed-loop ReSAE loses "
        f"{_join(ours)}, raw SAEs {_join(raw)}, raw SAEs with as many latents in total "
        f"{_join(equal)}: ReSAE is ahead of the last at {ahead} of {len(losses.ks)} k."
    )


def _maps_alone_sentence(losses: _Losses) -> str:
    alone = losses.without_k("affine_only", "online")
    ours = losses.of("resae", "online", "closed")
    beaten = [k for k, loss in zip(losses.ks, ours, strict=True) if alone < loss]
    return (
        f"The affine maps alone, no autoencoder after the first selected layer, which stays as it "
        f"is, lose {alone:.2f} online"
        + (f": less than ReSAE at k = {', '.join(map(str, beaten))}." if beaten else ".")
    )


def _redundancy_sentence(rows: Sequence[RedundancyRow]) -> str:
    def of(method: str) -> dict[int, float]:
        return {r.k: r.mean_max_cos for r in rows if r.method == method and r.k is not None}

    raw, ours, identity = of("raw"), of("resae"), of("identity")
    floor = rows[0].random_floor
    near = all(value < floor + 0.05 for k, value in ours.items() if k <= 8)
    return (
        f"Dictionaries of different layers repeat each other far less: mean of the largest cosine "
        f"{_join(list(ours.values()))} against {_join(list(raw.values()))} for raw SAEs "
        f"(k = {', '.join(map(str, ours))}); {'within' if near else 'NOT within'} 0.05 of random "
        f"directions ({floor:.2f}) at k ≤ 8. "
        f"The identity residual does the same ({_join(list(identity.values()))})."
    )


_TUNED = (("resae", "ReSAE", "closed"), ("identity", "the identity residual", "closed"))
_TUNED += (("raw", "raw SAEs", None), ("raw_equal_total", "raw SAEs of equal total latents", None))


def _tuned_sentences(losses: _Losses) -> list[str]:
    """Online Δ CE before and after online training, and after as many steps of plain training."""
    sentences: list[str] = []
    for method, label, loop in _TUNED:
        before = losses.by_k(method, "online", loop)
        tuned, more = (losses.by_k(f"{method}_{how}", "online", loop) for how in ("online", "more"))
        for k, after in tuned.items():
            control = f"; as many more steps of training leave {more[k]:.2f}" if k in more else ""
            sentences.append(
                f"Tuned online (KL to the plain model, all layers replaced), the online loss of "
                f"{label} falls from {before[k]:.2f} to {after:.2f} at k = {k}, "
                f"{after / before[k]:.2f} of it{control}."
            )
    return sentences


def extra_findings(report: Report, boost_k: int) -> list[str]:
    """Findings for the further methods that are in the report. `boost_k`: active latents of the
    second autoencoders of SAE Boost."""
    losses = _Losses(report.replacement)
    sentences = _tuned_sentences(losses)
    sentences += [_closed_loop_sentence(report, losses), _all_previous_sentence(report, losses)]
    if report.mlsae:
        sentences.append(_mlsae_sentence(report.mlsae, losses))
    if report.hierarchical:
        sentences.append(_hierarchical_sentence(report.hierarchical))
    if report.boost:
        sentences.append(_boost_sentence(report.boost, boost_k))
    if report.fair:
        sentences += _fair_sentences(report.fair)
    sentences += _elsewhere_sentences(report.elsewhere)
    return [sentence for sentence in sentences if sentence]


def _closed_loop_sentence(report: Report, losses: _Losses) -> str:
    """Sentence on ReSAE trained in closed loop; empty without it."""
    trained = ("resae_closed", "resae")
    closed, opened = (losses.by_k(m, "teacher_forced", "closed") for m in trained)
    if not closed:
        return ""
    online, online_open = (losses.by_k(m, "online", "closed") for m in trained)
    last = report.reconstruction[-1].layer
    fvu = {
        (row.method, row.k): row.fvu_stream
        for row in report.reconstruction
        if (row.layer, row.loop) == (last, "closed")
    }
    errors = [_join([fvu[m, k] for k in closed], 3) for m in trained]
    better = sum(closed[k] < opened[k] for k in closed)
    worse = sum(online[k] > online_open[k] for k in closed)
    return (
        f"Trained in closed loop, ReSAE loses {_join(list(closed.values()), 3)} with clean codes "
        f"encoded in closed loop, trained in open loop {_join([opened[k] for k in closed], 3)} "
        f"(k = {', '.join(map(str, closed))}): better at {better} of {len(closed)} k; FVU "
        f"there at the last layer {errors[0]} against {errors[1]}. Online "
        f"{_join(list(online.values()), 3)} against {_join([online_open[k] for k in closed], 3)}: "
        f"{'worse at ' + str(worse) if worse else 'worse at none'} of {len(closed)} k."
    )


def _all_previous_sentence(report: Report, losses: _Losses) -> str:
    """Sentence on predictions from all previous layers; empty without any."""

    def to_last(method: str) -> float:
        return [row.r2 for row in report.affine if row.method == method][-1]

    told: list[str] = []
    for method in losses.methods:
        if method.startswith("all_previous"):
            map_type = method.removeprefix("all_previous").replace("_", " ").strip() or "full"
            online = losses.by_k(method, "online", "closed")
            told.append(
                f"{map_type} R² {to_last(method):.3f}, online {_join(list(online.values()), 3)} at "
                f"k = {', '.join(map(str, online))}"
            )
    if not told:
        return ""
    ours = losses.by_k("resae", "online", "closed")
    return (
        f"Predicting the last layer from all before it: {'; '.join(told)}. From the one before "
        f"(ReSAE): R² {to_last('resae'):.3f}, online {_join(list(ours.values()), 3)}."
    )


def _mlsae_sentence(table: Sequence[FvuRow], losses: _Losses) -> str:
    over = [row.over_single for row in table]
    own, raw = (losses.by_k(m, "online", None) for m in ("mlsae", "raw"))
    return (
        f"One dictionary for all layers (MLSAE) has an FVU {min(over):+.0%} to "
        f"{max(over):+.0%} from that of a dictionary of the same size per layer, and loses "
        f"{_join(list(own.values()))} online where those lose {_join([raw[k] for k in own])}."
    )


RAW_VARIANTS = {
    "raw": "raw SAEs",
    "raw_equal_total": "with as many active latents in total",
    "raw_matched": "with as many latents to draw on in each layer, too",
    "raw_wide": "with in every layer as many latents as all layers of the ReSAE have",
}
"""Raw SAEs with ever more of what a ReSAE reconstruction has."""


def _fair_sentences(table: Sequence[FairRow]) -> list[str]:
    """Sentences on `FAIR_METHODS` of the demo: which raw SAEs ReSAE is ahead of, and which not."""
    rows: dict[str, list[FairRow]] = {}
    for row in table:
        rows.setdefault(row.method, []).append(row)
    longest = max(row.train_tokens for row in table)
    told = [
        _raw_variants_sentence(rows, "", "At the usual learning rate"),
        _raw_variants_sentence(rows, "_best_lr", "Each at its own best learning rate"),
        _raw_variants_sentence(rows, "_long", f"After {longest:,} tokens"),
        _shares_sentence(rows),
        _learning_rates_sentence(table),
    ]
    return [sentence for sentence in told if sentence]


def _raw_variants_sentence(rows: dict[str, list[FairRow]], suffix: str, condition: str) -> str:
    """Sentence on the rows whose names end in `suffix`; empty without larger dictionaries."""
    if not any(f"{name}{suffix}" in rows for name in ("raw_matched", "raw_wide")):
        return ""
    ours = {row.k: row.online for row in rows[f"resae{suffix}"]}
    told = []
    for name, words in RAW_VARIANTS.items():
        raw = {row.k: row.online for row in rows.get(f"{name}{suffix}", [])}
        if raw:
            ahead = sum(ours[k] < loss for k, loss in raw.items())
            lost = ", ".join(f"{loss:.3f}" for loss in raw.values())
            told.append(f"{words} {lost} (ReSAE is ahead at {ahead} of {len(raw)} k)")
    return (
        f"{condition}, online at k = {', '.join(map(str, ours))}: ReSAE loses "
        f"{', '.join(f'{loss:.3f}' for loss in ours.values())}; {', '.join(told)}."
    )


def _shares_sentence(rows: dict[str, list[FairRow]]) -> str:
    """Sentence on ReSAEs whose layers have different k; empty without any."""
    moved = [row for name, same in rows.items() if name.startswith("resae_k_") for row in same]
    if not moved:
        return ""
    compared = [*moved, *(row for row in rows["resae"] if row.k == moved[0].k)]
    told = [
        f"{tuple(row.k_per_layer)} {row.online:.3f} online and {row.teacher_forced:.3f} "
        f"teacher-forced"
        for row in compared
    ]
    best, best_forced = (
        tuple(min(compared, key=lambda row: getattr(row, mode)).k_per_layer)
        for mode in ("online", "teacher_forced")
    )
    return (
        f"ReSAE with the same active latents in other shares loses {'; '.join(told)}: online best "
        f"with {best}, teacher-forced with {best_forced}."
    )


def _learning_rates_sentence(table: Sequence[FairRow]) -> str:
    """Sentence on the grid of learning rates; empty without it."""
    tried: dict[str, list[FairRow]] = {}
    for row in table:
        method, mark, _ = row.method.partition("_lr_")
        if mark:
            tried.setdefault(method, []).append(row)
    best = {method: min(same, key=lambda row: row.online) for method, same in tried.items()}
    told = [f"{name} {row.online:.3f} at {row.lr[0]:g}" for name, row in best.items()]
    return f"Least lost online among the learning rates: {', '.join(told)}." if told else ""


def _elsewhere_sentences(table: Sequence[ElsewhereRow]) -> list[str]:
    """Sentences on the comparison at other hook points: also where ReSAE gains nothing."""
    sentences = []
    for where in dict.fromkeys(row.where for row in table):
        online = {
            row.method: row
            for row in table
            if (row.where, row.mode) == (where, "online") and row.loop != "open"
        }
        loss = {name: row.delta_ce for name, row in online.items()}
        ours = online["resae"]
        of_total = loss["resae"] / loss["raw_equal_total"]
        points = ", ".join(name.removeprefix("blocks.") for name in ours.layers)
        sentences.append(
            f"With {points} replaced (k = {ours.k}), ReSAE loses {loss['resae']:.3f} online, "
            f"raw SAEs {loss['raw']:.3f}, with as many active latents in total "
            f"{loss['raw_equal_total']:.3f}, the identity residual {loss['identity']:.3f}: ReSAE "
            f"loses {ours.of_raw:.2f} of what raw SAEs lose, {of_total:.2f} of it at equal total"
            f"{': NO gain there.' if of_total >= 1 else '.'}"
        )
    return sentences


def _hierarchical_sentence(table: Sequence[NestedFvuRow]) -> str:
    worst: dict[int, float] = {}
    for row in table:
        worst[row.k] = max(row.over_single, worst.get(row.k, -1.0))
    over = ", ".join(f"{value:+.1%} at k = {k}" for k, value in worst.items())
    held = max(worst.values()) <= 0.03
    cut = [(row.fvu, row.truncated) for row in table if row.truncated is not None]
    better = sum(nested < truncated for nested, truncated in cut)
    return (
        f"One SAE trained over prefixes (HierarchicalTopK) has at its worst layer an FVU {over} "
        f"from that of an SAE trained at that k: {'within' if held else 'NOT within'} 3 % at each "
        f"k. It is better than an ordinary SAE truncated to that k in {better} of {len(cut)} cases."
    )


def _boost_sentence(table: Sequence[BoostRow], k: int) -> str:
    (name,) = {row.text for row in table} - {"rest"}

    def changes(text: str, which: str) -> list[float]:
        return [r.change for r in table if (r.text, r.which) == (text, which)]

    def join(values: Sequence[float]) -> str:
        return ", ".join(f"{v:+.1%}" for v in values)

    rest, domain = changes("rest", "after"), changes(name, "after")
    plain, plain_domain = (changes(t, "after, TopK alone") for t in ("rest", name))
    held = max(map(abs, rest)) < 0.01 and max(domain) <= -0.10
    return (
        f"SAE Boost, SAEs that never saw {name} and beside them others trained on it alone "
        f"(k = {k}), changes FVU on {name} by {join(domain)} (layer by layer) and "
        f"on the rest by {join(rest)}: {'within' if held else 'NOT within'} the bounds (at least "
        f"10 % better, less than 1 % change). With TopK alone in use, without the threshold: "
        f"{join(plain_domain)} and {join(plain)}."
    )
