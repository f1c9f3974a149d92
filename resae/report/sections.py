"""Sections of the page below its top, each with its text, figures and tables; those without rows
are left out."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

from resae.evaluation.labels import label, mode_label, modes_of, whole_selection
from resae.evaluation.rows import (
    DensityRow,
    GenerationRow,
    ReconstructionRow,
    RedundancyRow,
    ReplacementRow,
)
from resae.report.content import Report
from resae.report.figures import Figure
from resae.report.rows import Sample
from resae.report.tables import Cell, Column, Row, Table, table_of

RowOfK = TypeVar(
    "RowOfK", ReplacementRow, ReconstructionRow, RedundancyRow, DensityRow, GenerationRow
)


@dataclass(frozen=True, kw_only=True)
class Section:
    """One part of the page."""

    name: str
    """Its id."""
    title: str
    notes: Sequence[str] = ()
    """Paragraphs."""
    points: Sequence[str] = ()
    """Sentences of a list."""
    figures: Sequence[Figure] = ()
    tables: Sequence[Table] = ()
    samples: dict[str, list[Sample]] = field(default_factory=dict[str, list[Sample]])
    """Prompt → its continuations."""
    opened: bool = False
    """Shown without being asked for."""


def sections(report: Report, figures: dict[str, Figure]) -> list[Section]:
    """The sections that the report has data for, in their order."""
    return [
        *_findings(report),
        *_replacement(report, figures),
        *_subsets(report),
        *_ablation(report),
        *_redundancy(report, figures),
        *_maps(report, figures),
        *_reconstruction(report),
        *_density(report),
        *_generation(report, figures),
        *_tasks(report),
        *_further(report),
        *_training(figures),
        *_samples(report),
        *_configuration(report),
    ]


def _findings(report: Report) -> Iterator[Section]:
    if report.findings:
        yield Section(name="findings", title="What was found", points=report.findings, opened=True)


REPLACEMENT = {
    "name": "method",
    "k": "k",
    "active_total": "latents in the last x̂",
    "delta_ce": "Δ CE",
    "ce_recovered_mean": "loss recovered (mean)",
    "ce_recovered_zero": "loss recovered (zero)",
    "kl": "KL",
    "difference": "Δ CE less reference",
    "sum_of_single": "Δ CE one by one",
}
NO_WORD = re.compile(r"\W+")
ALIKE = ("ce_clean", "ce", "tokens", "sinks")
"""Columns of replacement rows that follow from others, or are the same in all rows."""


def _replacement(report: Report, figures: dict[str, Figure]) -> Iterator[Section]:
    rows = _by_k(whole_selection(report.replacement))
    yield Section(
        name="replacement",
        title="All selected layers replaced at once",
        figures=_of(figures, "delta_ce", "ce_recovered"),
        tables=[
            table_of(
                f"replaced-{NO_WORD.sub('-', mode)}",
                f"{mode_label(mode)}: nats per token",
                [row for row in rows if row.mode == mode],
                REPLACEMENT,
                left_out=ALIKE,
            )
            for mode in modes_of(rows)
        ],
        notes=[
            "Special tokens are neither replaced nor counted. Teacher-forced, replacing all layers "
            "is the same as replacing the last one: the stream put in last overwrites what came "
            "before. Online and error-added see every layer.",
            *_on_intervals(report),
        ],
    )


def _on_intervals(report: Report) -> Iterator[str]:
    """Sentences on brackets and differences, where there are any."""
    if any(row.delta_ce_low is not None for row in report.replacement):
        drawn = report.config.get("resampled", "rows")
        yield (
            f"Brackets are 95 % intervals of the bootstrap over {drawn} of the text. They hold for "
            f"this one training of each method."
        )
    references = dict.fromkeys(row.reference for row in report.replacement if row.reference)
    if references:
        names = ", ".join(label(name) for name in references)
        yield (
            f"The reference of differences is {names}. Their intervals are paired: where one does "
            f"not hold 0, the difference is not chance of the text."
        )


def _subsets(report: Report) -> Iterator[Section]:
    whole = whole_selection(report.replacement)
    rows = [row for row in report.replacement if row not in whole]
    if rows:
        columns = {"name": "method", "layers": "layers", "mode": "mode"}
        columns |= {name: text for name, text in REPLACEMENT.items() if name != "name"}
        yield Section(
            name="subsets",
            title="Some of the layers replaced",
            tables=[table_of("replaced-subsets", "nats per token", rows, columns, left_out=ALIKE)],
        )


def _ablation(report: Report) -> Iterator[Section]:
    if report.ablation:
        columns = {"ablation": "in place of the layers", "layers": "layers", "delta_ce": "Δ CE"}
        caption = "Layers ablated, nats per token"
        yield Section(
            name="ablation",
            title="Zero and mean ablation",
            tables=[
                table_of(
                    "ablation-table",
                    caption,
                    report.ablation,
                    columns | {"kl": "KL"},
                    left_out=("ce", "tokens"),
                )
            ],
            notes=[
                "Cost of putting zero, or the mean activation, in the place of the same layers: "
                "what the shares recovered are measured by."
            ],
        )


def _redundancy(report: Report, figures: dict[str, Figure]) -> Iterator[Section]:
    columns = {
        "name": "method",
        "k": "k",
        "mean_max_cos": "mean of largest cosine",
        "random_floor": "random directions",
        "share_over_0_5": "> 0.5",
        "share_over_0_7": "> 0.7",
        "share_over_0_9": "> 0.9",
        "layers_per_latent": "layers per latent",
        "mean_max_cos_within": "mean within the layer",
        "mean_max_cos_transported": "transported: mean",
        "share_over_0_5_transported": "transported > 0.5",
        "share_over_0_7_transported": "transported > 0.7",
        "share_over_0_9_transported": "transported > 0.9",
        "layers_per_latent_transported": "transported: layers per latent",
    }
    if report.redundancy or "redundancy" in figures:
        caption = "Largest cosine of a latent with one of another layer"
        rows = _by_k(report.redundancy)
        yield Section(
            name="redundancy",
            title="Redundancy between layers",
            figures=_of(figures, "redundancy"),
            tables=[table_of("redundancy-table", caption, rows, columns)] if rows else [],
            notes=[
                "A latent that points in nearly the same direction as one of another layer repeats "
                "it. Random directions of this width and number show what remains by chance."
            ],
        )


def _maps(report: Report, figures: dict[str, Figure]) -> Iterator[Section]:
    if report.affine:
        yield Section(
            name="maps",
            title="What the affine maps predict",
            figures=_of(figures, "r2"),
            tables=[
                table_of(
                    "maps-table",
                    "Explained share of the variance of a layer",
                    report.affine,
                    {"name": "method", "hop": "layers", "r2": "R²"},
                )
            ],
        )


def _reconstruction(report: Report) -> Iterator[Section]:
    rows = _by_k(report.reconstruction)
    sinks = max((row.sinks for row in rows), default=0)
    with_sinks = {"fvu_with_sinks": "FVU, stream with sinks"} if sinks else {}
    columns = {
        "name": "method",
        "k": "k",
        "layer": "layer",
        "fvu_stream": "FVU, stream",
        **with_sinks,
        "fvu_target": "FVU, target",
        "l0": "L0",
        "dead_fraction": "never fired",
        "explained_variance": "explained variance",
        "explained_variance_legacy": "the same, mean over tokens",
        "cosine": "cosine",
        "norm_ratio": "‖x̂‖ / ‖x‖",
        "reconstruction_bias": "bias",
        "difference": "explained variance less reference",
    }
    notes = [
        "FVU is the fraction of variance unexplained, 0 at a perfect reconstruction. Stream: the "
        "residual stream itself. Target: what the autoencoder reads, for residual methods what the "
        "prediction left. L0: active latents per token."
    ]
    if sinks:
        notes.append(
            f"{sinks} tokens are attention sinks, many times as long as the others: they are left "
            f"alone in replacement, and only in the column with sinks."
        )
    if rows:
        left_out = ("sinks", "fvu_with_sinks")
        caption = "Each layer reconstructed from clean activations"
        yield Section(
            name="reconstruction",
            title="Reconstruction from clean activations",
            tables=[table_of("reconstruction-table", caption, rows, columns, left_out=left_out)],
            notes=notes,
        )


def _density(report: Report) -> Iterator[Section]:
    if report.density:
        columns = {
            "name": "method",
            "k": "k",
            "layer": "layer",
            "alive_fraction": "alive",
            "over_1_percent": "fire on > 1 %",
            "over_10_percent": "fire on > 10 %",
            "activity_over_1_percent": "firings of those > 1 %",
            "activity_over_10_percent": "firings of those > 10 %",
        }
        caption = "Share of latents, and of all firings"
        rows = _by_k(report.density)
        yield Section(
            name="density",
            title="How often latents fire",
            tables=[table_of("density-table", caption, rows, columns, left_out=("tokens",))],
        )


def _generation(report: Report, figures: dict[str, Figure]) -> Iterator[Section]:
    rows = _by_k(report.generation)
    if rows:
        columns = {
            "name": "method",
            "k": "k",
            "agreement_tokens": "agreement, tokens",
            "perplexity": "perplexity",
            "kl": "KL",
            "difference": "KL less reference",
            "repetition": "repeated",
        }
        first = rows[0]
        shape = ("prompts", "prompt_tokens", "new_tokens")
        left_out = (*shape, "perplexity_plain", "repetition_plain")
        caption = f"{first.prompts} prompts of {first.prompt_tokens} tokens, each continued by "
        caption += f"{first.new_tokens}"
        yield Section(
            name="generation",
            title="Text written with the layers replaced: measures",
            figures=_of(figures, "generation"),
            tables=[table_of("generation-table", caption, rows, columns, left_out=left_out)],
            notes=[
                f"The model continues prompts greedily, all selected layers replaced online. "
                f"Agreement: tokens before the first that the unchanged model does not write. "
                f"Perplexity: of the text under the unchanged model; its own text has "
                f"{first.perplexity_plain:.4g}. Repeated: share of 4-grams that occurred before, "
                f"{first.repetition_plain:.4f} in its own text."
            ],
        )


def _tasks(report: Report) -> Iterator[Section]:
    if report.tasks:
        columns = {
            "name": "method",
            "k": "k",
            "task": "task",
            "metric": "metric",
            "value": "score",
            "difference": "score less unchanged model",
            "documents": "documents",
        }
        yield Section(
            name="tasks",
            title="Tasks of lm-eval",
            tables=[
                table_of(
                    "tasks-table",
                    "Mean score over the documents of a task",
                    report.tasks,
                    columns,
                    titled=lambda row: (
                        "unchanged model" if row.method is None else label(row.method, row.loop)
                    ),
                )
            ],
            notes=[
                "The model answers with all selected layers replaced online. Differences from the "
                "unchanged model are paired by document."
            ],
        )


def _further(report: Report) -> Iterator[Section]:
    for key, (heading, note, columns) in FURTHER.items():
        rows = getattr(report, key)
        if rows:
            table = table_of(
                f"{key}-table",
                heading,
                rows,
                columns,
                titled=lambda row: label(row.method),
            )
            yield Section(name=key, title=heading, tables=[table], notes=[note])


def _training(figures: dict[str, Figure]) -> Iterator[Section]:
    if "training" in figures:
        yield Section(name="training", title="Training", figures=_of(figures, "training"))


def _samples(report: Report) -> Iterator[Section]:
    if report.samples:
        of_prompt = {
            prompt: [sample for sample in report.samples if sample.prompt == prompt]
            for prompt in dict.fromkeys(sample.prompt for sample in report.samples)
        }
        yield Section(
            name="samples", title="Text written with the layers replaced", samples=of_prompt
        )


def _configuration(report: Report) -> Iterator[Section]:
    facts = {**report.config, **report.environment}
    if report.teacher_forced_collapse is not None:
        facts["teacher_forced_collapse"] = report.teacher_forced_collapse
    runs = [(run.name, {**run.config, **run.environment}) for run in report.runs]
    if not runs:
        runs = [("value", facts)]
    names = dict.fromkeys(name for _, values in runs for name in values)
    rows = [
        Row([Cell(name, name), *(_setting(values.get(name)) for _, values in runs)])
        for name in names
    ]
    columns = [Column("setting", numeric=False), *(Column(name, numeric=False) for name, _ in runs)]
    caption = "Settings, versions and machine"
    yield Section(
        name="configuration",
        title="Configuration",
        tables=[Table("settings", caption, columns, _differing(rows) if report.runs else rows)],
    )


def _differing(rows: Sequence[Row]) -> list[Row]:
    """Settings in which runs differ first, and marked."""
    marked = [replace(row, marked=len({cell.text for cell in row.cells[1:]}) > 1) for row in rows]
    return sorted(marked, key=lambda row: not row.marked)


def _setting(value: Any) -> Cell:
    if value is None:
        return Cell("–")
    text = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
    return Cell(text, text)


def _of(figures: dict[str, Figure], *names: str) -> list[Figure]:
    return [figures[name] for name in names if name in figures]


def _by_k(rows: Sequence[RowOfK]) -> list[RowOfK]:
    """Rows ordered by k, those without k last."""
    return sorted(rows, key=lambda row: (row.k is None, row.k or 0))


FURTHER: dict[str, tuple[str, str, dict[str, str]]] = {
    # table of the report → heading, note, columns
    "hierarchical": (
        "HierarchicalTopK: one autoencoder at every k",
        "FVU of the stream, from clean activations, next to an autoencoder trained at that k, and "
        "an ordinary one of the largest k truncated to it.",
        {
            "k": "k",
            "layer": "layer",
            "fvu": "FVU",
            "single": "trained at this k",
            "over_single": "over it, %",
            "truncated": "ordinary, truncated",
        },
    ),
    "mlsae": (
        "MLSAE: one dictionary for all layers",
        "FVU of the stream, from clean activations, beside a dictionary of this size per layer.",
        {
            "k": "k",
            "layer": "layer",
            "fvu": "FVU",
            "single": "a dictionary each",
            "over_single": "over it, %",
        },
    ),
    "boost": (
        "SAE Boost: one domain added to autoencoders that never saw it",
        "Held-out text of the domain and of the rest. TopK alone: without the threshold that keeps "
        "the boost silent elsewhere.",
        {
            "which": "autoencoders",
            "text": "text",
            "layer": "layer",
            "fvu": "FVU",
            "change": "change, %",
            "l0": "L0",
            "delta_ce": "Δ CE online, all layers",
        },
    ),
    "fair": (
        "The same comparison without an advantage for ReSAE",
        "All layers replaced, residual methods in closed loop. Latents by layer are those of its "
        "own dictionary; a ReSAE reconstruction also draws on those of the layers before.",
        {
            "name": "method",
            "k": "k",
            "k_per_layer": "active latents by layer",
            "d_sae": "latents by layer",
            "train_tokens": "tokens",
            "lr": "peak learning rate by layer",
            "online": "Δ CE online",
            "teacher_forced": "teacher-forced",
        },
    ),
    "elsewhere": (
        "The comparison at other hook points",
        "All of the points replaced. Above 1, a method loses more than raw SAEs of the same k.",
        {
            "name": "method",
            "where": "where",
            "loop": "loop",
            "mode": "mode",
            "k": "k",
            "delta_ce": "Δ CE",
            "of_raw": "raw SAEs = 1",
        },
    ),
    "shared_latents": (
        "One dictionary for all layers: at which layers a latent fires",
        "Variances are of the position of the layer, 0, 1, …, at which a latent is active; each "
        "activation counts by its act.",
        {
            "name": "method",
            "k": "k",
            "layers_per_latent": "layers per latent",
            "effective_layers": "effective layers",
            "variance": "variance, all",
            "variance_of_latent": "of one latent",
            "variance_of_token": "of one latent at one token",
        },
    ),
    "routing": (
        "Where the predictions from all previous layers come from",
        "Share of each source in the summed energy of what the sources contribute.",
        {"name": "method", "layer": "layer", "source": "from", "share": "share"},
    ),
}
