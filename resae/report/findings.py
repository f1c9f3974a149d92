"""Findings from the rows of a demo report, in sentences: also where a claim does not hold.

findings        of the paper's claims
extra_findings  of the further methods, each held against what it promises
"""

from collections.abc import Callable, Sequence
from typing import Any


def findings(report: dict[str, list[dict[str, Any]]], collapse: float) -> list[str]:
    """The claims, by the rows of `evaluate` and by what `collapse_difference` measured."""
    rows = report["replacement"]
    ks = sorted({row["k"] for row in rows if row["k"] is not None})
    several = max(len(row["layers"]) for row in rows)

    def delta(method: str, k: int | None, mode: str, loop: str | None) -> float:
        return next(
            row["delta_ce"]
            for row in rows
            if (row["method"], row["k"], row["mode"], row["loop"]) == (method, k, mode, loop)
            and len(row["layers"]) == several
        )

    def join(values: Sequence[float], digits: int = 2) -> str:
        return ", ".join(f"{v:.{digits}f}" for v in values)

    at = f"at k = {', '.join(map(str, ks))}"
    online = {
        "raw": [delta("raw", k, "online", None) for k in ks],
        "equal": [delta("raw_equal_total", k, "online", None) for k in ks],
        "identity": [delta("identity", k, "online", "closed") for k in ks],
        "resae": [delta("resae", k, "online", "closed") for k in ks],
        "before": [delta("resae", k, "online", "open") for k in ks],
    }
    ratios = [ours / raw for ours, raw in zip(online["resae"], online["raw"], strict=True)]
    held = "below 0.6 at every k" if max(ratios) < 0.6 else "NOT below 0.6 at every k"
    sentences = [
        f"Online, all {several} layers replaced at once, ReSAE loses {join(online['resae'])} "
        f"nats per token where raw SAEs lose {join(online['raw'])} ({at}): "
        f"{join(ratios)} of it, {held}.",
    ]
    fair = sum(a < b for a, b in zip(online["resae"], online["equal"], strict=True))
    sentences.append(
        f"Raw SAEs given as many latents in total as a ReSAE reconstruction is made of lose "
        f"{join(online['equal'])} online: ReSAE is ahead at {fair} of {len(ks)} k."
    )
    sentences.append(
        f"The residual must be taken against what was put into the stream: against the stream "
        f"before replacement, ReSAE loses {join(online['before'])} online."
    )
    opened = [delta("resae", k, "teacher_forced", "open") for k in ks]
    closed = [delta("resae", k, "teacher_forced", "closed") for k in ks]
    order = "closed is below open" if all(map(float.__lt__, closed, opened)) else "the order VARIES"
    sentences.append(
        f"With clean codes, teacher-forced, encoding the error made so far again (closed loop) "
        f"loses {join(closed)}, the open loop {join(opened)}: {order}."
    )
    equal = [delta("raw_equal_total", k, "teacher_forced", None) for k in ks]
    behind = sum(a > b for a, b in zip(opened, equal, strict=True))
    sentences.append(
        f"Teacher-forced at equal total latents, raw SAEs lose {join(equal)}: open-loop ReSAE is "
        f"behind them at {behind} of {len(ks)} k, so its gain is online, not here."
        if behind
        else f"Teacher-forced at equal total latents, raw SAEs lose {join(equal)}, more than "
        f"open-loop ReSAE."
    )
    identity_open = [delta("identity", k, "teacher_forced", "open") for k in ks]
    shares = [a / b for a, b in zip(online["resae"], online["identity"], strict=True)]
    sentences.append(
        f"Control: with the identity in place of the learned map the online loss is "
        f"{join(online['identity'])}, teacher-forced in open loop {join(identity_open)}. "
        + (
            "So the gain comes from passing the previous reconstruction on, hardly from the map "
            "being learned."
            if min(shares) > 0.85
            else f"Learning the map leaves {join(shares)} of that loss online."
        )
    )
    added = [delta("resae", k, "error_added", "closed") for k in ks]
    added_raw = [delta("raw", k, "error_added", None) for k in ks]
    added_equal = [delta("raw_equal_total", k, "error_added", None) for k in ks]
    fair = sum(a < b for a, b in zip(added, added_equal, strict=True))
    sentences.append(
        f"With the clean errors of all layers added to the running stream, closed-loop ReSAE loses "
        f"{join(added)}, raw SAEs {join(added_raw)}, raw SAEs with as many latents in total "
        f"{join(added_equal)}: ReSAE is ahead of the last at {fair} of {len(ks)} k."
    )
    alone = delta("affine_only", None, "online", None)
    beaten = [k for k, ours in zip(ks, online["resae"], strict=True) if alone < ours]
    sentences.append(
        f"The affine maps alone, no autoencoder after the first selected layer, which stays as it "
        f"is, lose {alone:.2f} online"
        + (f": less than ReSAE at k = {', '.join(map(str, beaten))}." if beaten else ".")
    )
    sentences.append(_redundancy_sentence(report["redundancy"]))
    sentences.append(
        f"Teacher-forced replacement of all layers equals replacing only the last one (max logit "
        f"difference {collapse:g}), because the last replacement overwrites the stream. Use the "
        f"online and error-added numbers."
    )
    return sentences


def _redundancy_sentence(rows: Sequence[dict[str, Any]]) -> str:
    def of(method: str) -> dict[int, float]:
        return {row["k"]: row["mean_max_cos"] for row in rows if row["method"] == method}

    raw, ours, identity = of("raw"), of("resae"), of("identity")
    floor = rows[0]["random_floor"]
    near = all(value < floor + 0.05 for k, value in ours.items() if k <= 8)

    def join(values: dict[int, float]) -> str:
        return ", ".join(f"{v:.2f}" for v in values.values())

    return (
        f"Dictionaries of different layers repeat each other far less: mean of the largest cosine "
        f"{join(ours)} against {join(raw)} for raw SAEs (k = {', '.join(map(str, ours))}); "
        f"{'within' if near else 'NOT within'} 0.05 of random directions ({floor:.2f}) at k ≤ 8. "
        f"The identity residual does the same ({join(identity)})."
    )


_TUNED = (("resae", "ReSAE", "closed"), ("identity", "the identity residual", "closed"))
_TUNED += (("raw", "raw SAEs", None), ("raw_equal_total", "raw SAEs of equal total latents", None))


def _tuned_sentences(deltas: Callable[[str, str, str | None], dict[int, float]]) -> list[str]:
    """Online Δ CE before and after online training, and after as many steps of plain training."""
    sentences = []
    for method, label, loop in _TUNED:
        before = deltas(method, "online", loop)
        tuned, more = (deltas(f"{method}_{how}", "online", loop) for how in ("online", "more"))
        for k, after in tuned.items():
            control = f"; as many more steps of training leave {more[k]:.2f}" if k in more else ""
            sentences.append(
                f"Tuned online (KL to the plain model, all layers replaced), the online loss of "
                f"{label} falls from {before[k]:.2f} to {after:.2f} at k = {k}, "
                f"{after / before[k]:.2f} of it{control}."
            )
    return sentences


def extra_findings(report: dict[str, Any], boost_k: int) -> list[str]:
    """Findings for the further methods that are in the report. `boost_k`: active latents of the
    second autoencoders of SAE Boost."""
    sentences = []
    rows = report["replacement"]
    everything = max(len(row["layers"]) for row in rows)
    measured = {
        (r["method"], r["k"], r["mode"], r["loop"]): r["delta_ce"]
        for r in rows
        if len(r["layers"]) == everything
    }

    def join(values: Sequence[float], digits: int = 3) -> str:
        return ", ".join(f"{v:.{digits}f}" for v in values)

    def deltas(method: str, mode: str, loop: str | None) -> dict[int, float]:
        return {k: v for (m, k, *how), v in measured.items() if (m, *how) == (method, mode, loop)}

    sentences += _tuned_sentences(deltas)
    closed, opened = (deltas(m, "teacher_forced", "closed") for m in ("resae_closed", "resae"))
    if closed:
        online, online_open = (deltas(m, "online", "closed") for m in ("resae_closed", "resae"))
        last = report["reconstruction"][-1]["layer"]
        fvu = {
            (r["method"], r["k"]): r["fvu_stream"]
            for r in report["reconstruction"]
            if (r["layer"], r["loop"]) == (last, "closed")
        }
        errors = [join([fvu[m, k] for k in closed]) for m in ("resae_closed", "resae")]
        better = sum(closed[k] < opened[k] for k in closed)
        worse = sum(online[k] > online_open[k] for k in closed)
        sentences.append(
            f"Trained in closed loop, ReSAE loses {join(list(closed.values()))} with clean codes "
            f"encoded in closed loop, trained in open loop {join([opened[k] for k in closed])} "
            f"(k = {', '.join(map(str, closed))}): better at {better} of {len(closed)} k; FVU "
            f"there at the last layer {errors[0]} against {errors[1]}. Online "
            f"{join(list(online.values()))} against {join([online_open[k] for k in closed])}: "
            f"{'worse at ' + str(worse) if worse else 'worse at none'} of {len(closed)} k."
        )
    names = list(dict.fromkeys(m for m, *_ in measured if m.startswith("all_previous")))
    forms = {m: deltas(m, "online", "closed") for m in names}
    r2 = {m: [r["r2"] for r in report["affine"] if r["method"] == m] for m in (*names, "resae")}
    told = [
        f"{m.removeprefix('all_previous_').replace('_', ' ') if m != 'all_previous' else 'full'} "
        f"R² {r2[m][-1]:.3f}, online {join(list(of_k.values()))} at "
        f"k = {', '.join(map(str, of_k))}"
        for m, of_k in forms.items()
    ]
    if told:
        sentences.append(
            f"Predicting the last layer from all before it: {'; '.join(told)}. From the one before "
            f"(ReSAE): R² {r2['resae'][-1]:.3f}, online "
            f"{join(list(deltas('resae', 'online', 'closed').values()))}."
        )
    if "mlsae" in report:
        over = [row["over_single"] for row in report["mlsae"]]
        own, raw = (deltas(m, "online", None) for m in ("mlsae", "raw"))
        sentences.append(
            f"One dictionary for all layers (MLSAE) has an FVU {min(over):+.0%} to "
            f"{max(over):+.0%} from that of a dictionary of the same size per layer, and loses "
            f"{join(list(own.values()), 2)} online where those lose "
            f"{join([raw[k] for k in own], 2)}."
        )
    if "hierarchical" in report:
        sentences.append(_hierarchical_sentence(report["hierarchical"]))
    if "boost" in report:
        sentences.append(_boost_sentence(report["boost"], boost_k))
    if "fair" in report:
        sentences += _fair_sentences(report["fair"])
    if "elsewhere" in report:
        sentences += _elsewhere_sentences(report["elsewhere"])
    return sentences


RAW_VARIANTS = {
    "raw": "raw SAEs",
    "raw_equal_total": "with as many active latents in total",
    "raw_matched": "with as many latents to draw on in each layer, too",
    "raw_wide": "with in every layer as many latents as all layers of the ReSAE have",
}
"""Raw SAEs with ever more of what a ReSAE reconstruction has."""


def _fair_sentences(table: Sequence[dict[str, Any]]) -> list[str]:
    """Sentences on `FAIR_METHODS` of the demo: which raw SAEs ReSAE is ahead of, and which not."""
    rows: dict[str, list[dict[str, Any]]] = {}
    for row in table:
        rows.setdefault(row["method"], []).append(row)
    longest = max(row["train_tokens"] for row in table)
    told = [
        _raw_variants_sentence(rows, "", "At the usual learning rate"),
        _raw_variants_sentence(rows, "_best_lr", "Each at its own best learning rate"),
        _raw_variants_sentence(rows, "_long", f"After {longest:,} tokens"),
        _shares_sentence(rows),
        _learning_rates_sentence(table),
    ]
    return [sentence for sentence in told if sentence]


def _raw_variants_sentence(
    rows: dict[str, list[dict[str, Any]]], suffix: str, condition: str
) -> str:
    """Sentence on the rows whose names end in `suffix`; empty without larger dictionaries."""
    if not any(f"{name}{suffix}" in rows for name in ("raw_matched", "raw_wide")):
        return ""
    ours = {row["k"]: row["online"] for row in rows[f"resae{suffix}"]}
    told = []
    for name, words in RAW_VARIANTS.items():
        raw = {row["k"]: row["online"] for row in rows.get(f"{name}{suffix}", [])}
        if raw:
            ahead = sum(ours[k] < loss for k, loss in raw.items())
            lost = ", ".join(f"{loss:.3f}" for loss in raw.values())
            told.append(f"{words} {lost} (ReSAE is ahead at {ahead} of {len(raw)} k)")
    return (
        f"{condition}, online at k = {', '.join(map(str, ours))}: ReSAE loses "
        f"{', '.join(f'{loss:.3f}' for loss in ours.values())}; {', '.join(told)}."
    )


def _shares_sentence(rows: dict[str, list[dict[str, Any]]]) -> str:
    """Sentence on ReSAEs whose layers have different k; empty without any."""
    moved = [row for name, same in rows.items() if name.startswith("resae_k_") for row in same]
    if not moved:
        return ""
    compared = [*moved, *(row for row in rows["resae"] if row["k"] == moved[0]["k"])]
    told = [
        f"{tuple(row['k_per_layer'])} {row['online']:.3f} online and {row['teacher_forced']:.3f} "
        f"teacher-forced"
        for row in compared
    ]
    best, best_forced = (
        tuple(min(compared, key=lambda row: row[mode])["k_per_layer"])
        for mode in ("online", "teacher_forced")
    )
    return (
        f"ReSAE with the same active latents in other shares loses {'; '.join(told)}: online best "
        f"with {best}, teacher-forced with {best_forced}."
    )


def _learning_rates_sentence(table: Sequence[dict[str, Any]]) -> str:
    """Sentence on the grid of learning rates; empty without it."""
    tried: dict[str, list[dict[str, Any]]] = {}
    for row in table:
        method, mark, _ = row["method"].partition("_lr_")
        if mark:
            tried.setdefault(method, []).append(row)
    best = {method: min(same, key=lambda row: row["online"]) for method, same in tried.items()}
    told = [f"{name} {row['online']:.3f} at {row['lr'][0]:g}" for name, row in best.items()]
    return f"Least lost online among the learning rates: {', '.join(told)}." if told else ""


def _elsewhere_sentences(table: Sequence[dict[str, Any]]) -> list[str]:
    """Sentences on the comparison at other hook points: also where ReSAE gains nothing."""
    sentences = []
    for where in dict.fromkeys(row["where"] for row in table):
        online = {
            row["method"]: row
            for row in table
            if (row["where"], row["mode"]) == (where, "online") and row["loop"] != "open"
        }
        loss = {name: row["delta_ce"] for name, row in online.items()}
        ours = online["resae"]
        of_total = loss["resae"] / loss["raw_equal_total"]
        points = ", ".join(name.removeprefix("blocks.") for name in ours["layers"])
        sentences.append(
            f"With {points} replaced (k = {ours['k']}), ReSAE loses {loss['resae']:.3f} online, "
            f"raw SAEs {loss['raw']:.3f}, with as many active latents in total "
            f"{loss['raw_equal_total']:.3f}, the identity residual {loss['identity']:.3f}: ReSAE "
            f"loses {ours['of_raw']:.2f} of what raw SAEs lose, {of_total:.2f} of it at equal total"
            f"{': NO gain there.' if of_total >= 1 else '.'}"
        )
    return sentences


def _hierarchical_sentence(table: Sequence[dict[str, Any]]) -> str:
    worst: dict[int, float] = {}
    for row in table:
        worst[row["k"]] = max(row["over_single"], worst.get(row["k"], -1.0))
    over = ", ".join(f"{value:+.1%} at k = {k}" for k, value in worst.items())
    held = max(worst.values()) <= 0.03
    cut = [(row["fvu"], row["truncated"]) for row in table if row["truncated"] is not None]
    better = sum(nested < truncated for nested, truncated in cut)
    return (
        f"One SAE trained over prefixes (HierarchicalTopK) has at its worst layer an FVU {over} "
        f"from that of an SAE trained at that k: {'within' if held else 'NOT within'} 3 % at each "
        f"k. It is better than an ordinary SAE truncated to that k in {better} of {len(cut)} cases."
    )


def _boost_sentence(table: Sequence[dict[str, Any]], k: int) -> str:
    (name,) = {row["text"] for row in table} - {"rest"}

    def changes(text: str, which: str) -> list[float]:
        return [r["change"] for r in table if (r["text"], r["which"]) == (text, which)]

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
