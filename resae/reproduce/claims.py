"""The claim table: each claim in each setting holds, does not, or cannot be told.

A claim about cross-entropy is judged by the paired 95 % interval over documents: of the difference
from a baseline, or of the ratio to it. Claims without such an interval are judged by their values.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from resae.choices import Choice, Mode
from resae.evaluation.intervals import Interval, interval
from resae.reproduce.jobs import MAPS_ALONE
from resae.reproduce.losses import Measured, Setting, Table, paired
from resae.reproduce.settings import Spacing


class Verdict(Choice):
    """Outcome of a claim in one setting."""

    HOLDS = "holds"
    FAILS = "does not hold"
    OPEN = "cannot be told from these documents"
    UNTESTED = "not testable at this scale"


class Origin(Choice):
    """Origin of a claim: the paper's, or a control that the paper lacks."""

    PAPER = "paper"
    CONTROL = "control"


@dataclass(frozen=True)
class LossClaim:
    """ReSAE loses less cross-entropy than a baseline, or at most a share of it."""

    text: str
    origin: Origin
    baseline: str
    mode: Mode
    method: str = "resae_closed"
    loop: str = "closed"
    at_most: float | None = None
    """Largest ratio to the baseline; None: the difference is below 0."""


HALF = 0.6
"""Largest ratio that is still called "about half"."""
LOSS_CLAIMS = (
    LossClaim(
        "teacher-forced, ReSAE loses less than raw SAEs of equal k",
        Origin.PAPER,
        "raw",
        Mode.TEACHER_FORCED,
    ),
    LossClaim(
        "teacher-forced, ReSAE trained and replaced in open loop loses less than raw SAEs of "
        "equal k",
        Origin.PAPER,
        "raw",
        Mode.TEACHER_FORCED,
        method="resae",
        loop="open",
    ),
    LossClaim(
        "online, ReSAE loses less than raw SAEs of equal k", Origin.PAPER, "raw", Mode.ONLINE
    ),
    LossClaim(
        f"online, ReSAE loses about half of what raw SAEs of equal k lose (at most {HALF:g})",
        Origin.PAPER,
        "raw",
        Mode.ONLINE,
        at_most=HALF,
    ),
    LossClaim(
        "online, ReSAE loses less than raw SAEs of equal total latents",
        Origin.CONTROL,
        "raw_equal_total",
        Mode.ONLINE,
    ),
    LossClaim(
        "online, the learned map loses less than the identity",
        Origin.CONTROL,
        "identity_closed",
        Mode.ONLINE,
    ),
    LossClaim(
        "online, ReSAE loses less than the maps alone", Origin.CONTROL, MAPS_ALONE, Mode.ONLINE
    ),
    LossClaim(
        "online, training in closed loop loses less than in open loop",
        Origin.CONTROL,
        "resae",
        Mode.ONLINE,
    ),
)
FVU_CLAIM = "ReSAE explains less of the variance than raw SAEs of equal k (mean FVU of the layers)"
COSINE_CLAIM = (
    "ReSAE's dictionaries repeat each other less than raw SAEs' (mean largest cosine with "
    "another layer's latent)"
)
GAP_CLAIM = "the maps predict worse the farther apart the layers are (mean R²)"
PROBING_CLAIM = "sparse probing and targeted perturbation are better"


class Finding(NamedTuple):
    """A claim in one setting."""

    claim: str
    origin: Origin
    setting: str
    verdict: Verdict
    numbers: str
    difference: Interval | None = None
    """From the baseline, nats per token."""
    ratio: Interval | None = None


def findings_of(table: Table, r2: Mapping[str, Sequence[float]]) -> list[Finding]:
    """Every claim in every setting that has the measurements for it.

    Args:
        r2: R² of each map of predictor `previous`, per spacing.
    """
    found = [
        finding
        for claim in LOSS_CLAIMS
        for setting, row in table.items()
        if (finding := _judged(claim, setting, row)) is not None
    ]
    found += _by_value(table, FVU_CLAIM, lower=False)
    found += _by_value(table, COSINE_CLAIM, lower=True)
    if set(r2) == set(Spacing):
        far, near = (_mean(r2[spacing]) for spacing in (Spacing.FAR, Spacing.NEAR))
        verdict = Verdict.HOLDS if far < near else Verdict.FAILS
        numbers = f"{far:.3f} far, {near:.3f} near"
        found.append(Finding(GAP_CLAIM, Origin.PAPER, "all", verdict, numbers))
    untested = "not measured in the study; `resae probe` measures it"
    found.append(Finding(PROBING_CLAIM, Origin.PAPER, "all", Verdict.UNTESTED, untested))
    return found


def _judged(claim: LossClaim, setting: Setting, row: Mapping[str, Measured]) -> Finding | None:
    pair = paired(row.get(claim.method), row.get(claim.baseline), claim.mode, claim.loop)
    if pair is None:
        return None
    ours, theirs = pair
    difference, ratio = interval(ours - theirs), interval(ours / theirs)
    verdict = below(difference, 0.0) if claim.at_most is None else below(ratio, claim.at_most)
    numbers = f"{ours[0]:.3f} against {theirs[0]:.3f}; difference {difference}, ratio {ratio}"
    return Finding(claim.text, claim.origin, str(setting), verdict, numbers, difference, ratio)


def below(found: Interval, bound: float) -> Verdict:
    """Verdict on a quantity being below a bound, by its interval."""
    if found.high < bound:
        return Verdict.HOLDS
    return Verdict.FAILS if found.low > bound else Verdict.OPEN


def _by_value(table: Table, claim: str, *, lower: bool) -> Iterator[Finding]:
    """A claim about FVU or cosines, of which there are no sums per document."""
    for setting, row in table.items():
        ours, theirs = (_value(row.get(name), claim) for name in ("resae_closed", "raw"))
        if ours is not None and theirs is not None:
            holds = ours < theirs if lower else ours > theirs
            verdict = Verdict.HOLDS if holds else Verdict.FAILS
            numbers = f"{ours:.3f} against {theirs:.3f}, no interval"
            yield Finding(claim, Origin.PAPER, str(setting), verdict, numbers)


def _value(measured: Measured | None, claim: str) -> float | None:
    if measured is None:
        return None
    if claim == COSINE_CLAIM:
        return _mean(measured.largest_cosine)
    return _mean([_mean(layers) for layers in measured.fvu])


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def summary_of(findings: Sequence[Finding]) -> str:
    """The findings of one claim in a few words: the settings in which it holds, or does not."""
    parts = []
    for verdict in Verdict:
        of_verdict = [f.setting for f in findings if f.verdict is verdict]
        if len(of_verdict) == len(findings):
            return str(verdict)
        if of_verdict:
            parts.append(f"{verdict} ({'; '.join(of_verdict)})")
    return ", ".join(parts)
