"""Result rows: one dataclass per table of a report, whose fields are the columns.

`dataclasses.asdict` gives the rows of report.json, in the order of the fields.
"""

from dataclasses import asdict, dataclass
from typing import Any

from resae.evaluation.metrics import Redundancy


@dataclass(frozen=True)
class ReplacementRow:
    """Cost of one way of replacing layers."""

    method: str
    """Name of the method."""
    loop: str | None
    """`open` or `closed`; None where both agree."""
    mode: str
    """`online`, `teacher_forced` or `error_added`."""
    layers: list[str]
    """Hook points that were replaced."""
    k: int | None
    """Nominal active latents per layer; None without autoencoders."""
    active_total: int
    """Active latents per token that the last reconstruction is made of."""
    ce_clean: float
    """Cross-entropy of the unchanged model, nats per token."""
    ce: float
    """Cross-entropy of the replaced model, nats per token."""
    delta_ce: float
    """`ce − ce_clean`, nats per token."""
    ce_recovered_zero: float
    """Share of the cross-entropy lost by zero ablation of these layers that the replacement
    keeps."""
    ce_recovered_mean: float
    """The same for mean ablation."""
    kl: float
    """KL divergence from the unchanged to the replaced model, nats per token."""
    tokens: int
    """Evaluated positions."""
    sinks: int = 0
    """Tokens that were left alone as sinks, at the layer where they were most."""


@dataclass(frozen=True)
class ReconstructionRow:
    """Quality of one layer's reconstructions, from clean activations."""

    method: str
    """Name of the method."""
    loop: str | None
    """`open` or `closed`; None where both agree."""
    k: int | None
    """Nominal active latents; None without autoencoders."""
    layer: str
    """Hook point."""
    fvu_stream: float
    """Fraction of the stream's variance that is unexplained, over tokens that are no sinks."""
    fvu_target: float | None
    """Fraction of the variance unexplained of the autoencoder's target; None without one."""
    l0: float
    """Active latents per token."""
    dead_fraction: float | None
    """Share of latents that never fired on these tokens; None without an autoencoder."""
    fvu_with_sinks: float | None = None
    """`fvu_stream` over sink tokens too, as if they were replaced; None in earlier reports."""
    sinks: int = 0
    """Sink tokens, by the rule of any of the methods compared, of which the other entries know
    nothing."""


@dataclass(frozen=True)
class DictionaryRow:
    """A method whose dictionaries are compared."""

    method: str
    """Name of the method."""
    k: int | None
    """Nominal active latents per layer."""


@dataclass(frozen=True)
class RedundancyRow(Redundancy, DictionaryRow):
    """Redundancy between the dictionaries of different layers of one method."""


@dataclass(frozen=True)
class HistogramRow(DictionaryRow):
    """Histogram of the largest cosine of each latent with a latent of another layer."""

    edges: list[float]
    """Bin edges, one more than counts."""
    counts: list[int]
    """Latents per bin."""


@dataclass(frozen=True)
class RowSums:
    """Cross-entropy of every evaluated row `[T]` in one way of running the model: what intervals
    are computed from."""

    method: str | None
    """Name of the method; None: the unchanged model."""
    loop: str | None
    """`open` or `closed`; None where both agree."""
    mode: str | None
    """`online`, `teacher_forced` or `error_added`; None: the unchanged model."""
    layers: list[str]
    """Hook points that were replaced."""
    ce: list[float]
    """Nats per row, summed over its evaluated positions."""
    tokens: list[int]
    """Evaluated positions of each row."""


@dataclass(frozen=True)
class Evaluation:
    """Tables of one evaluation."""

    replacement: list[ReplacementRow]
    """Per method, loop, mode and set of layers."""
    reconstruction: list[ReconstructionRow]
    """Per method, loop and layer."""
    redundancy: list[RedundancyRow]
    """Per method with several dictionaries."""
    redundancy_histogram: list[HistogramRow]
    """Per method with several dictionaries."""
    row_sums: list[RowSums]
    """Sums of the unchanged model, then per row of `replacement`; not in report.json."""

    def to_dict(self) -> dict[str, list[dict[str, Any]]]:
        """The tables as lists of dictionaries, as in report.json."""
        tables = asdict(self)
        del tables["row_sums"]
        return tables


@dataclass(frozen=True)
class EffectRow:
    """Measured and predicted change of the stream at one later layer, over the tokens where the
    prediction is not zero."""

    hook_point: str
    """Hook point that the change arrives at."""
    tokens: int
    """Tokens that the prediction reaches."""
    cosine: float
    """Cosine of predicted and measured change, mean over tokens."""
    norm_ratio: float
    """Norm of the predicted over that of the measured change, root mean square."""
    relative_error: float
    """Norm of the prediction's error over that of the measured change, root mean square."""


@dataclass(frozen=True)
class LayerPairRow:
    """Quality of the maps to one layer on held-out tokens."""

    method: str
    """Name of the method that has these maps."""
    hop: str
    """`source → target`, the layer before and the predicted one."""
    r2: float
    """Explained share of the target's variance."""
    shares: dict[str, float] | None = None
    """Share of each source layer in the prediction; None with a single source."""

    def to_dict(self) -> dict[str, Any]:
        """The row as a dictionary, without absent shares."""
        return {name: value for name, value in asdict(self).items() if value is not None}
