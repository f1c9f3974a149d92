"""Rows of the tables of a report that are not of an evaluation; `dataclasses.asdict` gives those
of report.json."""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class LayerFvu:
    """Quality of one layer in training."""

    fvu: float
    """Fraction of the training target's variance that is unexplained."""


@dataclass(frozen=True)
class LogEntry:
    """One point of a training curve."""

    step: int
    """Steps done."""
    tokens: int
    """Tokens trained on."""
    layers: list[LayerFvu]
    """One per layer."""


@dataclass(frozen=True, kw_only=True)
class TrainingRow:
    """Training curve of one stack."""

    method: str
    """Name of the method."""
    k: int
    """Nominal active latents per layer."""
    rank: int = 0
    """Position of k among those compared."""
    log: list[LogEntry]
    """Points at intervals."""


@dataclass(frozen=True)
class RoutingRow:
    """Share of one source layer in a prediction from several."""

    method: str
    """Name of the method that has these maps."""
    layer: str
    """Hook point that is predicted."""
    source: str
    """Hook point that it is predicted from."""
    share: float
    """Share of the source in the prediction, 0 to 1."""


@dataclass(frozen=True)
class BoostRow:
    """SAE Boost on held-out text, at one layer."""

    text: str
    """Domain of the text, or `rest`."""
    which: str
    """`before`, `after`, or `after, TopK alone`: without its threshold."""
    layer: str
    """Hook point."""
    fvu: float
    """Fraction of the stream's variance that is unexplained."""
    l0: float
    """Active latents per token."""
    delta_ce: float
    """Δ CE of replacing all layers online, nats per token."""
    change: float
    """Relative change of `fvu` from before."""


@dataclass(frozen=True)
class FairRow:
    """Sizes of one stack, and Δ CE of replacing all layers (in closed loop, where it has one)."""

    method: str
    """Name of the method."""
    k: int
    """Nominal active latents per layer."""
    k_per_layer: list[int]
    """Active latents of each layer."""
    d_sae: list[int]
    """Latents of each layer."""
    train_tokens: int
    """Tokens that it was trained on."""
    lr: list[float]
    """Peak learning rate of each layer."""
    online: float
    """Δ CE online, nats per token."""
    teacher_forced: float
    """Δ CE teacher-forced, nats per token."""


@dataclass(frozen=True)
class ElsewhereRow:
    """Cost of replacing layers at other hook points; columns as of `ReplacementRow`."""

    where: str
    """Name of the hook points."""
    method: str
    """Name of the method."""
    loop: str | None
    """`open` or `closed`; None where both agree."""
    mode: str
    """`online`, `teacher_forced` or `error_added`."""
    layers: list[str]
    """Hook points that were replaced."""
    k: int | None
    """Nominal active latents per layer."""
    active_total: int
    """Active latents per token that the last reconstruction is made of."""
    delta_ce: float
    """Nats per token."""
    of_raw: float
    """`delta_ce` over that of raw SAEs in the same mode."""


@dataclass(frozen=True)
class FvuRow:
    """FVU of one method at one layer, next to that of raw SAEs of the same k."""

    k: int
    """Active latents."""
    layer: str
    """Hook point."""
    fvu: float
    """Fraction of the stream's variance that is unexplained."""
    single: float
    """The same for raw SAEs trained at this k."""
    over_single: float
    """`fvu / single − 1`."""


@dataclass(frozen=True)
class NestedFvuRow(FvuRow):
    """FVU of one stack run with k of its active latents."""

    truncated: float | None
    """FVU of raw SAEs of the largest k, cut down to this k; None at the largest."""


@dataclass(frozen=True)
class Sample:
    """Text written by the model."""

    how: str
    """Replacement in words."""
    prompt: str
    """Text that was continued."""
    text: str
    """The continuation."""
    replaced: int
    """Activations that were replaced."""


@dataclass(frozen=True)
class RunRow:
    """One of several runs that a report compares."""

    name: str
    """Name of the run; its methods are called `resae (NAME)`."""
    title: str
    """Heading of its own report."""
    config: dict[str, Any]
    """Settings of its own report."""
    environment: dict[str, Any]
    """Versions and machine of its own report."""
