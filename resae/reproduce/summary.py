"""Results of a study from the jobs that are done: results.json, results.md and a figure."""

from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from resae.choices import Mode
from resae.evaluation.intervals import Interval, interval
from resae.evaluation.labels import LABELS
from resae.reproduce.claims import Finding, findings_of, summary_of
from resae.reproduce.figure import draw
from resae.reproduce.jobs import METHODS, Job, Kind, jobs_of, sweeps_of
from resae.reproduce.losses import Measured, ReadResult, Table, paired, read_losses
from resae.reproduce.settings import Spacing, StudyConfig
from resae.storage import save_json, write_atomically

SCHEMA_VERSION = 1
HEAD = "| | online Δ CE | of raw | teacher-forced Δ CE | FVU by layer | dead | active | seeds |"


def write_results(out: Path, config: StudyConfig, result: ReadResult) -> Path:
    """Write `results.json`, `results.md` and `delta_ce.svg` into `out`; returns `results.md`.

    Args:
        result: reads the result of a job.
    """
    jobs = jobs_of(config)
    table = read_losses(jobs, result, config)
    maps = {s: r for s in Spacing if (r := result(Job(Kind.MAPS, s))) is not None}
    findings = findings_of(table, {s: r["r2"]["previous"] for s, r in maps.items()})
    done = [found for job in jobs if (found := result(job)) is not None]
    environments = _environments(done)
    rates = _learning_rates(config, result)
    save_json(
        out / "results.json",
        {
            "schema_version": SCHEMA_VERSION,
            "config": config.to_json(),
            "environments": environments,
            "jobs": {"done": len(done), "all": len(jobs)},
            "claims": [_plain(finding._asdict()) for finding in findings],
            "methods": _method_rows(table),
            "maps": {s: {"layers": r["layers"], "r2": r["r2"]} for s, r in maps.items()},
            "learning_rates": rates,
        },
    )
    figure = draw(table)
    if figure is not None:
        write_atomically(out / "delta_ce.svg", lambda temporary: temporary.write_text(figure))
    page = out / "results.md"
    measured = f"{len(done)} of {len(jobs)} jobs done{_measured_in(environments)}"
    text = _page(config, table, maps, findings, rates, measured)
    write_atomically(page, lambda temporary: temporary.write_text(text))
    return page


def _environments(done: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The environments that jobs ran in, each with the number of its jobs."""
    found: list[dict[str, Any]] = []
    for job in done:
        same = next((e for e in found if e | {"jobs": 0} == job["environment"] | {"jobs": 0}), None)
        if same is None:
            found.append({**job["environment"], "jobs": 1})
        else:
            same["jobs"] += 1
    return found


def _measured_in(environments: Sequence[Mapping[str, Any]]) -> str:
    """Commits, versions and machines of the jobs, as the end of a sentence."""
    parts = [
        f"{e['jobs']} at commit {str(e.get('commit'))[:7]} (torch {e['torch']}, "
        f"transformers {e.get('transformers')}, {e.get('gpu') or e.get('processor')}, "
        f"threads: {e['threads']})"
        for e in environments
    ]
    return f": {'; '.join(parts)}" if parts else ""


def _plain(row: dict[str, Any]) -> dict[str, Any]:
    return {n: v._asdict() if isinstance(v, Interval) else v for n, v in row.items()}


def _method_rows(table: Table) -> list[dict[str, Any]]:
    """One flat row per setting, method, mode and loop."""
    rows: list[dict[str, Any]] = []
    for setting, of_setting in table.items():
        for name, measured in of_setting.items():
            for (mode, loop), by_seed in measured.delta_ce.items():
                pair = paired(measured, of_setting.get("raw"), mode, loop)
                row = {
                    "spacing": setting.spacing,
                    "k": setting.k,
                    "method": name,
                    "mode": mode,
                    "loop": loop,
                    "seeds": sorted(by_seed),
                    "delta_ce": interval(_of(measured, mode, loop)),
                    "delta_ce_by_seed": [float(of_seed[0]) for of_seed in by_seed.values()],
                    "minus_raw": None if pair is None else interval(pair[0] - pair[1]),
                    "over_raw": None if pair is None else interval(pair[0] / pair[1]),
                    "fvu": _by_layer(measured.fvu),
                    "dead": _by_layer(measured.dead),
                    "largest_cosine": measured.largest_cosine,
                    "active_total": measured.active_total,
                    "lr": measured.lr,
                }
                rows.append(_plain(row))
    return rows


def _of(measured: Measured, mode: str, loop: str) -> Any:
    loss = measured.loss(mode, loop)
    assert loss is not None
    return loss


def _by_layer(of_seeds: Sequence[Sequence[float]]) -> list[float]:
    """Mean over seeds, per layer."""
    return [sum(layer) / len(layer) for layer in zip(*of_seeds, strict=True)]


def _learning_rates(config: StudyConfig, result: ReadResult) -> list[dict[str, Any]]:
    """Online Δ CE on the tuning documents by method and learning rate."""
    rows: list[dict[str, Any]] = []
    for method in METHODS:
        for sweep in sweeps_of(method, config):
            found = result(sweep)
            if found is not None:
                loss = found["delta_ce"]
                online = None if loss is None else loss["online"]
                rows.append({"method": method, "factor": sweep.lr_factor, "online": online})
    return rows


def _page(
    config: StudyConfig,
    table: Table,
    maps: dict[Spacing, dict[str, Any]],
    findings: Sequence[Finding],
    rates: Sequence[dict[str, Any]],
    measured: str,
) -> str:
    lines = [
        f"# {config.name}",
        "",
        f"{config.train_tokens:,} training tokens, {config.expansion} × width latents per layer, "
        f"{config.documents} held-out documents of {config.context_tokens} tokens; blocks "
        + " and ".join(f"{', '.join(map(str, config.blocks(s)))} ({s})" for s in Spacing)
        + f". {measured}.",
        "",
        "Brackets: 95 % intervals by the bootstrap over documents, of differences and ratios "
        "paired between methods; they do not include the spread between seeds. Δ CE in nats per "
        "token, residual methods in closed loop. Dead: share of latents idle, at the end of the "
        "training, for so long that they are revived (`dead_after_tokens`): rare ones are among "
        "them.",
        "",
        "## Claims",
        "",
        "| claim | of | outcome |",
        "|---|---|---|",
    ]
    for claim, group in groupby(findings, key=lambda f: f.claim):
        of_claim = list(group)
        lines.append(f"| {claim} | {of_claim[0].origin} | {summary_of(of_claim)} |")
    lines += ["", "| claim | setting | outcome | numbers |", "|---|---|---|---|"]
    lines += [f"| {f.claim} | {f.setting} | {f.verdict} | {f.numbers} |" for f in findings]
    for setting, of_setting in table.items():
        lines += ["", f"## {setting}", "", HEAD, "|" + "---|" * (HEAD.count("|") - 1)]
        lines += [_line(measured, of_setting.get("raw")) for measured in of_setting.values()]
    if maps:
        lines += ["", "## Maps", "", "| | layers | R² previous | identity | all previous |"]
        lines.append("|---|---|---|---|---|")
        for spacing, found in maps.items():
            r2 = [_numbers(found["r2"][kind]) for kind in ("previous", "identity", "all_previous")]
            lines.append(f"| {spacing} | {', '.join(found['layers'])} | {' | '.join(r2)} |")
    if rates:
        lines += ["", "## Learning rates", "", _RATES, "", "| | times the default | online Δ CE |"]
        lines.append("|---|---|---|")
        for row in rates:
            online = "diverged" if row["online"] is None else f"{row['online']:.3f}"
            lines.append(f"| {LABELS[row['method']]} | {row['factor']:g} | {online} |")
    return "\n".join(lines) + "\n"


_RATES = (
    "Tried at the headline's k, far, on a part of the tokens and on documents that nothing else is "
    "measured on; the best is taken in every setting."
)


def _line(measured: Measured, raw: Measured | None) -> str:
    losses = []
    for mode in (Mode.ONLINE, Mode.TEACHER_FORCED):
        loss = measured.loss(mode)
        losses.append("" if loss is None else str(interval(loss)))
    pair = paired(measured, raw, Mode.ONLINE, "closed")
    ratio = "" if pair is None else str(interval(pair[0] / pair[1]))
    dead = ", ".join(f"{share:.0%}" for share in _by_layer(measured.dead))
    seeds = len(measured.fvu) if measured.dead else "–"
    return (
        f"| {LABELS[measured.method]} | {losses[0]} | {ratio} | {losses[1]} | "
        f"{_numbers(_by_layer(measured.fvu))} | {dead} | {measured.active_total} | {seeds} |"
    )


def _numbers(values: Sequence[float]) -> str:
    return ", ".join(f"{value:.3f}" for value in values)
