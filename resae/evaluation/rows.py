"""Result rows: one dataclass per table of a report, whose fields are the columns.

`dataclasses.asdict` gives the rows of report.json, in the order of the fields. A number `x` that is
measured on text has its 95 % interval in `x_low` and `x_high`: by the bootstrap over documents
(`resae.evaluation.intervals`), the same resamples for all, so that differences are paired. Both are
None where there is no interval: a single document, or a report of an earlier version.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from resae.evaluation.redundancy import Redundancy


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
    ce_clean_low: float | None = None
    """Lower end of the interval of `ce_clean`."""
    ce_clean_high: float | None = None
    """Upper end of it."""
    ce_low: float | None = None
    """Lower end of the interval of `ce`."""
    ce_high: float | None = None
    """Upper end of it."""
    delta_ce_low: float | None = None
    """Lower end of the interval of `delta_ce`."""
    delta_ce_high: float | None = None
    """Upper end of it."""
    ce_recovered_zero_low: float | None = None
    """Lower end of the interval of `ce_recovered_zero`."""
    ce_recovered_zero_high: float | None = None
    """Upper end of it."""
    ce_recovered_mean_low: float | None = None
    """Lower end of the interval of `ce_recovered_mean`."""
    ce_recovered_mean_high: float | None = None
    """Upper end of it."""
    kl_low: float | None = None
    """Lower end of the interval of `kl`."""
    kl_high: float | None = None
    """Upper end of it."""
    reference: str | None = None
    """Method that `difference` is taken from; None for that method itself."""
    difference: float | None = None
    """`delta_ce` less that of the reference: of the same mode, layers and k, and of the same loop
    where it has one, otherwise closed."""
    difference_low: float | None = None
    """Lower end of the paired interval of `difference`."""
    difference_high: float | None = None
    """Upper end of it."""
    sum_of_single: float | None = None
    """Sum of `delta_ce` of replacing each of these layers alone (where online and teacher-forced
    are the same); None where that was not measured."""
    sum_of_single_low: float | None = None
    """Lower end of the interval of `sum_of_single`."""
    sum_of_single_high: float | None = None
    """Upper end of it."""


@dataclass(frozen=True)
class AblationRow:
    """Cost of putting a constant in the place of layers: what a replacement is compared with."""

    ablation: str
    """`zero`, or `mean`: the mean activation of the evaluated tokens."""
    layers: list[str]
    """Hook points that were ablated at once."""
    ce: float
    """Cross-entropy of the ablated model, nats per token."""
    delta_ce: float
    """`ce` less that of the unchanged model, nats per token."""
    kl: float
    """KL divergence from the unchanged to the ablated model, nats per token."""
    tokens: int
    """Evaluated positions."""
    ce_low: float | None = None
    """Lower end of the interval of `ce`."""
    ce_high: float | None = None
    """Upper end of it."""
    delta_ce_low: float | None = None
    """Lower end of the interval of `delta_ce`."""
    delta_ce_high: float | None = None
    """Upper end of it."""
    kl_low: float | None = None
    """Lower end of the interval of `kl`."""
    kl_high: float | None = None
    """Upper end of it."""


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
    explained_variance: float | None = None
    """`1 − fvu_stream`: 1 − Σ‖x − x̂‖² / Σ‖x − x̄‖², x̄ the mean of all evaluated tokens."""
    explained_variance_legacy: float | None = None
    """Mean over tokens of 1 − ‖x − x̂‖² / ‖x − x̄‖²: what SAEBench's paper calls explained variance.
    Tokens near the mean weigh more in it; x̄ is the mean of all tokens, there of a batch."""
    cosine: float | None = None
    """Cosine of x and x̂, mean over tokens."""
    norm_ratio: float | None = None
    """‖x̂‖ / ‖x‖, mean over tokens."""
    reconstruction_bias: float | None = None
    """Σ‖x̂‖² / Σ⟨x, x̂⟩: 1 where no scaling of x̂ would fit better, below 1 where it is too
    short."""
    reference: str | None = None
    """Method that `difference` is taken from; None for that method itself."""
    difference: float | None = None
    """`explained_variance` less that of the reference, of the same layer, k and loop as in
    `ReplacementRow`."""
    fvu_stream_low: float | None = None
    """Lower end of the interval of `fvu_stream`."""
    fvu_stream_high: float | None = None
    """Upper end of it."""
    fvu_target_low: float | None = None
    """Lower end of the interval of `fvu_target`."""
    fvu_target_high: float | None = None
    """Upper end of it."""
    l0_low: float | None = None
    """Lower end of the interval of `l0`."""
    l0_high: float | None = None
    """Upper end of it."""
    fvu_with_sinks_low: float | None = None
    """Lower end of the interval of `fvu_with_sinks`."""
    fvu_with_sinks_high: float | None = None
    """Upper end of it."""
    explained_variance_low: float | None = None
    """Lower end of the interval of `explained_variance`."""
    explained_variance_high: float | None = None
    """Upper end of it."""
    explained_variance_legacy_low: float | None = None
    """Lower end of the interval of `explained_variance_legacy`."""
    explained_variance_legacy_high: float | None = None
    """Upper end of it."""
    cosine_low: float | None = None
    """Lower end of the interval of `cosine`."""
    cosine_high: float | None = None
    """Upper end of it."""
    norm_ratio_low: float | None = None
    """Lower end of the interval of `norm_ratio`."""
    norm_ratio_high: float | None = None
    """Upper end of it."""
    reconstruction_bias_low: float | None = None
    """Lower end of the interval of `reconstruction_bias`."""
    reconstruction_bias_high: float | None = None
    """Upper end of it."""
    difference_low: float | None = None
    """Lower end of the paired interval of `difference`."""
    difference_high: float | None = None
    """Upper end of it."""


DENSITY_EDGES = [round(-6 + 0.25 * i, 2) for i in range(25)]
"""Bin edges for log10 of densities: −6 to 0 in steps of a quarter."""


@dataclass(frozen=True)
class DensityRow:
    """Firing rates of the latents of one layer, on tokens that are no sinks.

    The numbers are over latents and have no intervals: a resample of the text never holds a latent
    that the text does not."""

    method: str
    """Name of the method."""
    loop: str | None
    """`open` or `closed`; None where both agree."""
    k: int | None
    """Nominal active latents."""
    layer: str
    """Hook point."""
    tokens: int
    """Tokens that were looked at."""
    alive_fraction: float
    """Share of latents that fired at all: `1 − dead_fraction`."""
    over_1_percent: float
    """Share of latents that fire on more than 1 % of the tokens."""
    over_10_percent: float
    """Share of latents that fire on more than 10 % of the tokens."""
    activity_over_1_percent: float
    """Share of all firings that are of latents of `over_1_percent`."""
    activity_over_10_percent: float
    """Share of all firings that are of latents of `over_10_percent`."""
    edges: list[float]
    """Bin edges of log10 of the share of tokens on which a latent fires."""
    counts: list[int]
    """Latents per bin, of those that fired; rarer ones are in the first bin."""


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

    maps_of: str | None = None
    """Method whose maps latents are transported through: its own, where it learned some; None
    where no method did."""


@dataclass(frozen=True)
class HistogramRow(DictionaryRow):
    """Histogram of the largest cosine of each latent with a latent of another layer."""

    edges: list[float]
    """Bin edges, one more than counts."""
    counts: list[int]
    """Latents per bin."""


@dataclass(frozen=True)
class SharedLatentsRow:
    """Spread over layers of the latents of one dictionary that all layers share (MLSAE, arXiv
    2409.04185).

    Variances are of the position ℓ = 0 … L−1 of the layer at which a latent is active; each
    activation counts by its act. Each of the three is at most the one before it."""

    method: str
    """Name of the method."""
    k: int | None
    """Nominal active latents."""
    layers_per_latent: float
    """Number of layers at which a latent fires at all, mean over latents that do."""
    effective_layers: float
    """Exponential of the entropy of a latent's acts over layers, mean over latents that fire."""
    variance: float
    """Variance of ℓ over all activations."""
    variance_of_latent: float
    """Variance of ℓ over the activations of one latent, mean over activations."""
    variance_of_token: float
    """Variance of ℓ over the activations of one latent at one token, mean over activations."""


@dataclass(frozen=True, kw_only=True)
class GenerationRow:
    """Text that the model continues prompts with, all layers replaced online, against its own."""

    method: str
    """Name of the method."""
    loop: str | None
    """`open` or `closed`; None where both agree."""
    k: int | None
    """Nominal active latents per layer; None without autoencoders."""
    prompts: int
    """Prompts that were continued."""
    prompt_tokens: int
    """Tokens of each prompt."""
    new_tokens: int
    """Tokens that were written greedily after each."""
    perplexity: float
    """Perplexity of the text under the unchanged model: exp of the mean cross-entropy per token."""
    perplexity_plain: float
    """The same of the unchanged model's own greedy text."""
    agreement_tokens: float
    """Tokens before the first that differs from the unchanged model's text, mean over prompts; at
    most `new_tokens`."""
    kl: float
    """KL divergence from the unchanged to the replaced model over the unchanged model's text, nats
    per token."""
    repetition: float
    """Share of the 4-grams of a text that occurred in it before."""
    repetition_plain: float
    """The same of the unchanged model's text."""
    kl_by_position: list[float]
    """`kl` at the first, second, … token after the prompt."""
    reference: str | None = None
    """Method that `difference` is taken from; None for that method itself."""
    difference: float | None = None
    """`kl` less that of the reference, of the same k, and of the same loop where it has one,
    otherwise closed."""
    perplexity_low: float | None = None
    """Lower end of the interval of `perplexity`."""
    perplexity_high: float | None = None
    """Upper end of it."""
    perplexity_plain_low: float | None = None
    """Lower end of the interval of `perplexity_plain`."""
    perplexity_plain_high: float | None = None
    """Upper end of it."""
    agreement_tokens_low: float | None = None
    """Lower end of the interval of `agreement_tokens`."""
    agreement_tokens_high: float | None = None
    """Upper end of it."""
    kl_low: float | None = None
    """Lower end of the interval of `kl`."""
    kl_high: float | None = None
    """Upper end of it."""
    repetition_low: float | None = None
    """Lower end of the interval of `repetition`."""
    repetition_high: float | None = None
    """Upper end of it."""
    repetition_plain_low: float | None = None
    """Lower end of the interval of `repetition_plain`."""
    repetition_plain_high: float | None = None
    """Upper end of it."""
    difference_low: float | None = None
    """Lower end of the paired interval of `difference`."""
    difference_high: float | None = None
    """Upper end of it."""
    kl_by_position_low: list[float] | None = None
    """Lower ends of the intervals of `kl_by_position`."""
    kl_by_position_high: list[float] | None = None
    """Upper ends of them."""


@dataclass(frozen=True, kw_only=True)
class TaskRow:
    """Score on a task of lm-eval, mean over its documents."""

    method: str | None
    """Name of the method, all layers replaced online; None: the unchanged model."""
    loop: str | None
    """`open` or `closed`; None where both agree."""
    k: int | None
    """Nominal active latents per layer; None without autoencoders."""
    task: str
    """Name of the task."""
    metric: str
    """Name of the metric, as lm-eval calls it."""
    documents: int
    """Documents that were scored."""
    value: float
    """Mean of the metric over documents."""
    difference: float | None = None
    """`value` less that of the unchanged model; None for that itself."""
    value_low: float | None = None
    """Lower end of the interval of `value`."""
    value_high: float | None = None
    """Upper end of it."""
    difference_low: float | None = None
    """Lower end of the paired interval of `difference`."""
    difference_high: float | None = None
    """Upper end of it."""


@dataclass(frozen=True)
class RowSums:
    """Cross-entropy of every document in one way of running the model: what intervals are computed
    from. A document is an evaluated row `[T]`, or neighbouring rows (`evaluate`)."""

    method: str | None
    """Name of the method; None: the unchanged model."""
    loop: str | None
    """`open` or `closed`; None where both agree."""
    mode: str | None
    """`online`, `teacher_forced` or `error_added`; None: the unchanged model."""
    layers: list[str]
    """Hook points that were replaced."""
    ce: list[float]
    """Nats per document, summed over its evaluated positions."""
    tokens: list[int]
    """Evaluated positions of each document."""


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
    ablation: list[AblationRow] = field(default_factory=list[AblationRow])
    """Zero and mean ablation of every set of layers that is replaced."""
    density: list[DensityRow] = field(default_factory=list[DensityRow])
    """Per method with autoencoders, loop and layer."""
    shared_latents: list[SharedLatentsRow] = field(default_factory=list[SharedLatentsRow])
    """Per method with one dictionary at all layers."""
    resampled: str = "rows"
    """`documents` of the text, or `rows`: what the intervals draw again."""

    def to_dict(self) -> dict[str, list[dict[str, Any]]]:
        """The tables as lists of dictionaries, as in report.json."""
        tables = asdict(self)
        del tables["row_sums"], tables["resampled"]
        return tables

    def _repr_html_(self) -> str:
        return replacement_html("all selected layers replaced; nats per token", self.replacement)


def replacement_html(title: str, replacement: Sequence[ReplacementRow]) -> str:
    """Small table, for a notebook, of the rows with all selected layers replaced."""
    from resae_kernels.notebook import table_html

    most = max((len(row.layers) for row in replacement), default=0)
    columns = ("method", "loop", "mode", "k", "delta_ce", "ce_recovered_mean", "kl")
    rows = [
        [getattr(row, column) for column in columns]
        for row in replacement
        if len(row.layers) == most
    ]
    return table_html(title, columns, rows)


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
