"""Measurements of a study by setting and method, with resamples of the documents."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from resae.evaluation.intervals import Bootstrap, Quantity
from resae.reproduce.jobs import MAPS_ALONE, METHODS, Job, Kind
from resae.reproduce.settings import Spacing, StudyConfig

ReadResult = Callable[[Job], dict[str, Any] | None]
"""Result of a job; None where it is not done."""


class Setting(NamedTuple):
    """A comparison: layers and active latents."""

    spacing: str
    k: int

    def __str__(self) -> str:
        return f"{self.spacing}, k = {self.k}"


@dataclass
class Measured:
    """One method in one setting."""

    method: str
    delta_ce: dict[tuple[str, str], dict[int, Quantity]] = field(default_factory=dict)
    """Mode and loop → seed → Δ CE; methods with a single loop have it under both."""
    fvu: list[list[float]] = field(default_factory=list)
    """Per seed and layer, of the stream, in closed loop."""
    dead: list[list[float]] = field(default_factory=list)
    """Per seed and layer: share of latents that are idle for `dead_after_tokens` at the end of the
    training."""
    largest_cosine: list[float] = field(default_factory=list)
    """Per seed: mean over latents of the largest cosine with another layer's latent."""
    active_total: int = 0
    """Active latents per token that the last reconstruction is made of."""
    lr: float | None = None

    def loss(self, mode: str, loop: str = "closed") -> Quantity | None:
        """Δ CE, mean over seeds; None: not measured."""
        seeds = self.delta_ce.get((mode, loop))
        return None if seeds is None else np.mean(list(seeds.values()), axis=0)


Table = dict[Setting, dict[str, Measured]]
"""Setting → method → measurements."""


def read_losses(jobs: Sequence[Job], result: ReadResult, config: StudyConfig) -> Table:
    """Everything that the evaluations measured so far."""
    table: Table = {}
    bootstrap: Bootstrap | None = None
    for job in jobs:
        found = result(job) if job.kind is Kind.EVALUATE else None
        if found is None:
            continue
        bootstrap = bootstrap or Bootstrap(len(found["row_sums"][0]["tokens"]))
        alone = job.method == MAPS_ALONE
        training = {} if alone else result(job.training) or {}
        for k in config.k if alone else (job.k,):
            row = table.setdefault(Setting(job.spacing, k), {})
            measured = row.setdefault(job.method, Measured(job.method))
            # The maps alone have no seed: they are compared with every one.
            for seed in range(config.seeds) if alone else (job.seed,):
                _add(measured, seed, found, training, bootstrap)
    order = (*METHODS, MAPS_ALONE)
    settings = [Setting(spacing, k) for spacing in Spacing for k in config.k]
    return {s: {m: table[s][m] for m in order if m in table[s]} for s in settings if s in table}


def _add(
    measured: Measured,
    seed: int,
    found: Mapping[str, Any],
    training: Mapping[str, Any],
    bootstrap: Bootstrap,
) -> None:
    clean, *replaced = found["row_sums"]
    for sums in replaced:
        delta = bootstrap.per_token(
            [a - b for a, b in zip(sums["ce"], clean["ce"], strict=True)], sums["tokens"]
        )
        for loop in ("open", "closed") if sums.get("loop") is None else (sums["loop"],):
            measured.delta_ce.setdefault((sums["mode"], loop), {})[seed] = delta
    rows = found["reconstruction"]
    measured.fvu.append([r["fvu_stream"] for r in rows if r.get("loop") != "open"])
    measured.largest_cosine += [r["mean_max_cos"] for r in found["redundancy"]]
    measured.active_total = max(r["active_total"] for r in found["replacement"])
    if training:
        measured.dead.append([m["dead_fraction"] for m in training["curve"][-1]["layers"]])
        measured.lr = training["settings"]["lr"]


def paired(
    a: Measured | None, b: Measured | None, mode: str, loop: str
) -> tuple[Quantity, Quantity] | None:
    """Δ CE of two methods, mean over the seeds that both have; None: there is none."""
    if a is None or b is None:
        return None
    ours, theirs = (m.delta_ce.get((mode, loop), {}) for m in (a, b))
    seeds = sorted(ours.keys() & theirs.keys())
    if not seeds:
        return None
    mean_ours, mean_theirs = (np.mean([of[s] for s in seeds], axis=0) for of in (ours, theirs))
    return mean_ours, mean_theirs
